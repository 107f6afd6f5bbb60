"""Whether the line can be believed.

`camera` names what is wrong with the frames; `abstain_budget` watches how many items the model is unsure of.
"""
