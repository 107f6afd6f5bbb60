"""How a bundle gets onto the box and into use, and back when it fails.

`fetch` collects missing chunks from MQTT and `transfer` writes them; `offline_import` reads them from a stick instead;
`lifecycle` is the table of states, `state_file` keeps the state on disk; `updater` carries the champion through it,
`challenger` the bundle in the shadow; `selftest_process` runs the self-test in a throw-away process.
"""
