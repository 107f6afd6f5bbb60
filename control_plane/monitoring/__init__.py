"""From windows of statistics to what people and Prometheus see.

`status` derives an agent's states and figures with their age; `board` keeps them for the whole fleet, fresh to some
seconds; `prometheus` exports them as `/metrics`.
"""
