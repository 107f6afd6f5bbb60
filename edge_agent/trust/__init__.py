"""Verification: only a desired state that is proven changes this agent.

`verifier` keeps what was offered and lets a desired state through when it is proven; `verify` is the short-lived
process that runs the check; `question` is what the two send each other. What is refused and why is decided in
`models/trust.py` (its document is `models/TRUST.md`).
"""
