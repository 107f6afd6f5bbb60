"""`sortline demo`: broker, control plane and three simulated lines as real processes on this machine.

`run` starts them, trains, rolls out, watches, and prints the table of what was sorted.
"""
