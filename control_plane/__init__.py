"""The control plane: keeps the data, trains and registers models, rolls them out, watches the fleet.

The story on one page. `training` turns a folder of labelled photographs into a bundle; `jobs` and `worker` run it in
processes of their own. `registry` numbers bundles as versions of models and `store` keeps their bytes by content.
`rollout` plans, purely, which agent gets which bundle next; `fleet` speaks MQTT: it publishes chunks and desired
states, takes in what agents report, and acknowledges a record only after the database has it. `monitoring` turns
windows into figures with an age. `api` is the REST interface, `pages` shows the same to people, `cli` is the
`sortline` command. `broker` is the embedded MQTT broker, a process of its own.

Everything that must outlive a process is in the database (`tables`, `database`, `migrations`) or the store.
"""
