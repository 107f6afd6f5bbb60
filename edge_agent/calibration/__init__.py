"""Geometry of a line from its own pictures.

`calibrate` is the procedure; `survey` watches items pass; `lanes` finds the lanes; `scale` finds millimetres per pixel
from a board; `overlay` draws what was found for a person to check.
"""
