"""Detection: from sums of windows to findings that name a cause. Pure functions over numbers, no database, no HTTP.

`finding` is the vocabulary: what is present, where, how large, since how many items, and what a person should do.
"""
