"""The supervisor process: everything of the agent that is not the line.

`supervisor` is its event loop and wires the rest; `journal` keeps events, the reported fault and the counters,
`conditions` what has not recovered, `connection_file` whether there is a broker; `report` builds what is reported;
`line_control` is all that is asked of the line, `line_keeper` starts, watches and replaces the line processes,
`line_process` is one of them; `lots` accepts or refuses a change of lot and keeps it durably; `line.switching`
applies it.
"""
