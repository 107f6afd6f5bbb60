"""Delivery and activation of bundles on the box, and the way back when one fails.

`fetch` collects missing chunks from MQTT and `transfer` writes them; `offline_import` reads them from a stick instead;
`lifecycle` is the table of states, `state_file` keeps the state on disk; `updater` carries the champion through it,
`challenger` the bundle in the shadow; `selftest_process` runs the self-test in a throw-away process.
"""
