"""Identities: the site's certificate authority, enrolment of agents, revocation, and the files that brokers read.

`authority` keeps the keys of the site in a folder; `certificates` issues, by pure functions; `enrolment` decides who
gets one and records it; `retirement` finds the agents that a retirement would cut off; `publication` writes what
brokers read (trust, revocations, access lists); `mosquitto` writes the profile of that broker; `listener` and `tls`
serve enrolment over TLS. The issuing key is on the control plane; the root key is needed only to replace an authority
and belongs off this machine.
"""
