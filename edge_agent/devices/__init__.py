"""The hardware of a line behind the interfaces.

`hardware` opens all of it from the line's configuration; `cameras` reads frames; `frames` loops over them until the
camera ends; `image_encoder` measures the belt from the picture where there is no encoder; `drivers` speaks to encoders,
ejectors, sensors and the belt.
"""
