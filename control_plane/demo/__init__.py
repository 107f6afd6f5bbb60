"""`sortline demo`: broker, control plane and simulated lines as real processes on this machine.

`run` starts and ends a demo and writes its report; `story` holds the steps (keys, servers, agents, collecting,
training, rollout, watching) and `dirty_lens` those of a lens that gets dirty and is wiped; `processes` starts, watches
and stops the processes; `table` shows the lines while they sort; `options` is what a person decides.
"""
