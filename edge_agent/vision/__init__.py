"""What the camera sees.

`segmentation` finds items on the belt; `tracking` keeps their identity from frame to frame; `judge` turns views into a
verdict; `belt_motion` matches blocks between two pictures.
"""
