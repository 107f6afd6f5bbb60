"""A simulated line that implements the same interfaces as hardware.

`line` is camera, encoder, ejectors and scale in one world; `rendering` draws items; `optics` shows the scene through
lamp, lens and sensor; `belt` moves the belt through ramps and stops; `faults` schedules trouble (dirt, blur, dead
valves).
"""
