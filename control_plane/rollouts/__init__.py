"""Rollouts: which agent gets which bundle, when, and when to stop.

`policy` parses what a person orders (rates, abort criteria, schedule); `selector` and `waves` choose agents and their
order; `schedule` knows maintenance windows; `planner` decides purely what to do next; `executor` carries it out under a
lease; `records` is the database's side; `blast_radius` tells what a rollout would touch before anything happens.
"""
