"""Statistics on their way to the control plane.

`spool` keeps records on disk until they are acknowledged; `uplink` sends them in batches.
"""
