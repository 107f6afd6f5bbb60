"""Views worth a person's look, kept on the box.

`disagreement` keeps items that champion and challenger judge differently.
"""
