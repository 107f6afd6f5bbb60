"""Faults of the camera and of the recipe in force.

`camera` names what is wrong with the frames; `abstain_budget` watches how many items the model is unsure of.
"""
