"""Background work in processes of its own.

`queue` is the table of jobs and who may claim one; `worker` is the process that claims and runs them.
"""
