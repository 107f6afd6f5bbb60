"""The supervisor process: everything of the agent that is not the line.

`supervisor` is its event loop and wires the rest; `journal` keeps events, the reported fault and the counters,
`conditions` the faults that have not recovered, `connection_file` whether there is a broker; `report` builds the
reported state; `line_control` sends the line its requests, `line_keeper` starts, watches and replaces line processes,
`line_process` is one of them; `lots` accepts or refuses a change of lot and keeps it durably; `line.switching`
applies it.
"""
