"""Rollouts: which agent gets which bundle, when, and when to stop.

`policy` parses what a person orders (rates, abort criteria, time-outs, budget); `selector` and `waves` choose agents
and their order; `schedule` has the maintenance windows. `planner` decides purely what to do next: `views` is the data
it looks at and the steps it returns, `observation` finds the outcome of each agent, `way_back` the bundle it can go
back to, `waiting` what a rollout waits for. `executor` carries the steps out under a lease, when `changes` finds news
in the agents' reports; `records` is the database's side, `description` what the API and the pages show of it,
`blast_radius` what a rollout would touch before anything happens.
"""
