"""What may run here.

`verifier` offers signed metadata to `verify`, a process of its own that loads the signature libraries, and applies
its answer.
"""
