"""Background work in processes of its own.

`queue` is the table of jobs and their claims; `requests` checks the options of a job for command line, API and worker;
`worker` is the process that claims and runs them.
"""
