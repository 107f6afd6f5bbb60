"""Keeps views on the box that a person should review.

`disagreement` keeps items that champion and challenger judge differently.
"""
