"""A copy of the control plane that another machine can go on from, and the way back from it.

`archive` is the format: a folder of files with a manifest of their digests. `database_copy` copies a database while it
is in use, and loads the copy. `save` makes a backup, `restore` brings one into an empty place, and `after_restore`
changes what must not stay as it was: agents have seen newer versions and generations than the copy knows.
"""
