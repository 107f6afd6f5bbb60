"""The line process: frame to ejector.

`process` is the process and its threads: `camera_feed` reads frames, `switching` changes bundle, challenger and lot
between two frames, `reporting` sends beats and windows; `sorting` is the one path from frame to ejector; `loader`
loads bundles beside the running line; `shadow` runs a challenger whose verdicts are not executed; `counters` counts
what becomes a window; `fail_safe` acts while the camera is at fault; `standby` waits, small, to take over and
`warm_up` makes it ready; `thread_tuning` measures how many threads pay; `selftest` is the throw-away process that
tries a bundle: whether it computes its golden views again (`models.golden`), fast enough and in bounds.
"""
