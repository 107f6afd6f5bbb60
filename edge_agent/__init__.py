"""The box beside the line.

Two processes. The *supervisor* (`supervisor`) speaks MQTT (`mqtt`), fetches bundles chunk by chunk and keeps them
in slots with a life cycle that survives a power cut (`delivery`), runs only what is signed (`trust`, `identity`), and
spools statistics until the control plane has them (`telemetry`). The *line* (`line`) does nothing but sort: camera
(`devices`, `simulation`) -> find, follow and judge items (`vision`) -> fire (`ejection`), and watches its camera and
its judgement (`health`, `sampling`). They are joined by a socket pair (`line_protocol`): either may die or stall and
the other goes on. A new bundle is first tried in a third, throw-away process; while it is on trial, another
line process with the old one in memory waits to take over.

Beside them: `calibration` finds the geometry of a line, `recording` keeps what replays bit by bit, `offline` runs a
line without supervisor, `cli` is the `sortline-agent` command. On the ground floor, importable by all and light:
`config`, `line_config`, `interfaces`, `line_protocol`, `events`, `host` (the supervisor as its parts see it),
`state_directory` (the places of its files).

The last good bundle runs with no network, no broker, no control plane and a wrong clock. Nothing here imports the
control plane, scikit-learn or a database; the supervisor does not even load OpenCV or ONNX Runtime.
"""
