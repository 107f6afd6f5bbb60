"""The control plane: keeps the data, trains and registers models, rolls them out, watches the fleet.

The story on one page. `data` reads labelled photographs, `training` turns them into a bundle, `evaluation` says how
good it is; `jobs` runs this in processes of their own. `registry` numbers bundles as versions of models and keeps their
bytes by content. `rollouts` plans, purely, which agent gets which bundle next; `fleet` speaks MQTT: it publishes chunks
and desired states, takes in what agents report, and acknowledges a record only after the database has it. `monitoring`
turns windows into figures with an age, `detection` finds in their sums what is unusual and names the cause, `alarms`
brings that to people. `trust` signs what may run, `identity` issues certificates, `backup` copies all of it to go on
elsewhere.
`services` puts all of it together; `api` is the REST interface, `pages` shows the same to people, `app` serves both,
`server` is the process (its ports are bound by `listening`, its log lines are written by `logs`, what it lets in is
decided by `guard`), `cli` the `sortline` command with its `client`, `demo` the whole loop on one machine; `config` is
read once. `broker` is the embedded MQTT broker, a process of its own.

Everything that must outlive a process is in the `database` or the registry's store.
"""
