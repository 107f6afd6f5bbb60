"""The box beside the line.

Two processes. The *supervisor* (`supervisor`) speaks MQTT (`link`), fetches bundles chunk by chunk (`delivery`),
keeps them in slots with a life cycle that survives a power cut (`slots`), and spools statistics until the control
plane has them (`spool`). The *line* (`line`) does nothing but sort: camera (`camera`, `simulation`) -> where are
items (`locate`) -> which is which (`tracking`) -> what are they (`judging`) -> fire (`ejection`), and counts what it
did (`counting`). They meet at a socket pair (`pipe`): either may die or stall and the other goes on. A new bundle
is first tried in a third, throw-away process (`selftest`); while it is on trial, another line process with the old one
in memory (`standby`) waits to take over (`keeping`).

The last good bundle runs with no network, no broker, no control plane and a wrong clock. Nothing here imports the
control plane, scikit-learn or a database; the supervisor does not even load OpenCV or ONNX Runtime.
"""
