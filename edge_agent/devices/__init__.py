"""The hardware of a line behind the interfaces.

`hardware` opens all of it from the line's configuration. Pictures: `cameras` opens what an address names; `video_file`
plays recordings, `live_camera` reads devices and streams; `captures` opens both, `pictures` decodes files, `timestamps`
mends times, `orientation` turns pictures, `camera_counters` counts; `frames` loops over frames until the camera ends.
The belt: `image_encoder` measures it from the picture where there is no encoder. `drivers` speaks to encoders,
ejectors, sensors and the belt.
"""
