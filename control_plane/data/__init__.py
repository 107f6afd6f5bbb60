"""The data that training and evaluation learn from.

`photo_folder` reads a folder of labelled photographs and refuses what cannot be learnt from; `class_order` puts the
good class first; `splits` keeps all views of an item on one side of every split; `catalog` keeps data sets and their
versions under names.
"""
