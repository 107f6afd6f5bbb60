"""The supervisor process: everything of the agent that is not the line.

`supervisor` is its event loop; `line_process` is one running line process, `line_keeper` starts, watches and replaces
them; `lots` keeps which lot and variety runs; `service_notice` reports to systemd.
"""
