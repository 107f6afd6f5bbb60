"""Delivery and activation of bundles on the box, and the way back when one fails.

`transfer` requests missing chunks over MQTT at a limited rate; `fetch` checks and writes them, and goes on from what is
on disk after a crash; `offline_import` reads them from a stick instead; `lifecycle` is the table of states,
`state_file` keeps the state on disk; `updater` carries the champion through it, `challenger` the bundle in the shadow;
`selftest_process` runs the self-test in a throw-away process.
"""
