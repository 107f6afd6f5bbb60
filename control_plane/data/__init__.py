"""What training and evaluation learn from.

`photo_folder` reads a folder of labelled photographs and refuses what cannot be learnt from; `splits` keeps all views
of an item on one side of every split.
"""
