"""The REST interface: pages and command line do nothing it cannot.

One router per subject, under the word that the command line and the domain use: `datasets`, `training`, `models`,
`recipes`, `agents`, `windows`, `statistics`, `alarms`, `audit`, `rollouts`, `trust`, `identities`. `enrolment` is an
application of its own, for agents that have no certificate yet. `schemas` holds the bodies that routes accept, `actor`
decides who acts, `errors` maps the families of errors to HTTP statuses.
"""
