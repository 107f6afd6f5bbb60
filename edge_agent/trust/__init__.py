"""Only what is proven changes this agent.

`verifier` keeps what was offered and lets a desired state through when it is proven; `verify` is the short-lived
process that checks the signatures; `question` is what the two say to each other. Rules: `models/trust.py`,
`models/TRUST.md`.
"""
