"""A simulated line that implements the same interfaces as hardware.

`line` is camera, encoder, ejectors and scale in one world; `rendering` draws items; `belt` moves the belt through
ramps and stops; `faults` schedules trouble (noise, blur, dead valves).
"""
