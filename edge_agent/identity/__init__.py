"""The identity with which this agent connects to the broker.

`certificate` keeps key and certificate and says when to renew; `enrolment` obtains them, in a process of its own.
"""
