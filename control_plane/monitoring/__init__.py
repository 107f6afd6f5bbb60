"""From windows of statistics to what people and Prometheus see.

`ledger` counts windows in the transaction that stores them: `rollups` adds them up over minutes, hours and days,
`fidelity` says how far they can be trusted. `windows` is the one reader of stored windows and of their sums; `sorting`
says what the names of a bundle's recipe mean; `figures` works out an agent's figures and drift from the sum of its
recent windows; `status` derives its states and ages; `board` keeps them for the whole fleet, fresh to some seconds;
`prometheus` exports them as `/metrics`. `upkeep` keeps the tables in bounds on one of the replicas, by what `retention`
deletes and `closed_days` writes as Parquet before. `as_of` puts together what held on a line at a moment.
"""
