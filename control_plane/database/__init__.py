"""The database and what every other room needs of it.

`engine` opens SQLite or PostgreSQL and gives `reading` and `writing` sessions; `tables` holds one file per domain;
`migrate` brings a database to the present schema with the scripts of `migrations`; `leases` lets one replica at a time
do a duty, with a fencing number; `lookup` finds an agent and its events by name; `agent_rows` reads and writes many
agents at once; `idempotency` recognises a repeated request; `audit` appends to the hash-chained audit trail in the
caller's transaction, `audit_check` finds out step by step whether the trail is whole.
"""
