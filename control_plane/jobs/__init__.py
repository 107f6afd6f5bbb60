"""Background work in processes of its own.

`queue` is the table of jobs and who may claim one; `requests` checks what may be asked of a job, for every door alike;
`worker` is the process that claims and runs them.
"""
