"""Faults and condition of the camera, and of the recipe in force.

`camera` names what is wrong with the frames as they come; `camera_sensor` notices dirt, blur, changed light and a moved
camera: about once a second it looks at the belt between the items (`belt_look`), learns and keeps its levels
(`camera_levels`) and where the picture stands (`registration`);
`evidence` says what changed in words and a picture; `abstain_budget` watches how many items the model is unsure of.
"""
