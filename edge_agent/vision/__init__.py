"""Finds items in the picture, follows them and judges them.

`segmentation` finds items on the belt; `tracking` keeps their identity from frame to frame and chooses the frames that
become views; `follower` joins the two for commands that judge nothing; `judge` turns views into a verdict;
`belt_motion` matches the silhouettes of two pictures, for `devices.image_encoder`.
"""
