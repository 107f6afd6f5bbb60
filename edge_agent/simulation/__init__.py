"""A simulated line that implements the same interfaces as hardware.

`line` is camera, encoder, ejectors and scale in one world; `rendering` draws items; `belt` moves, slips and jerks;
`faults` schedules trouble (noise, blur, dead valves).
"""
