"""The REST interface: pages and command line do nothing it cannot.

One router per subject: `learning` (datasets, training, models), `operating` (agents, windows, audit), `recipes`,
`rollouts`, `trust`, `identities` and `enrolment`; `schemas` says what goes in, `errors` maps errors to HTTP.
"""
