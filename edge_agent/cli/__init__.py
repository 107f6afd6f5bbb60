"""The `sortline-agent` command.

`commands` has the parser and the exit status; `run` sorts (and names the lot, or a simulated line's trouble), `record`
replays, collects and draws, `setup` enrols, calibrates and imports, `inspect` looks at an agent or a machine; `options`
is what they share.
"""
