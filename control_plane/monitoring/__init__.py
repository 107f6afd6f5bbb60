"""From windows of statistics to what people and Prometheus see.

`windows` is the one reader of stored windows; `sorting` says what the names of a bundle's recipe mean; `figures` works
out an agent's figures and drift from the sum of its recent windows; `status` derives its states and ages; `board` keeps
them for the whole fleet, fresh to some seconds; `prometheus` exports them as `/metrics`.
"""
