"""The tables, one file per domain; importing this package fills SQLModel's metadata with all of them.

`columns` (types of columns shared by all), `datasets`, `jobs`, `registry` (models and their versions), `agents` (what
they are and what they send), `rollouts`, `blobs` (what the broker retains), `trust` (signed metadata), `identities`
(certificates and tokens), `leases`, `requests` (answers to requests that may be repeated), `windows` (what is made of
what agents send), `audit`, `alarms`.
"""

from control_plane.database.tables import (
    agents,
    alarms,
    audit,
    blobs,
    columns,
    datasets,
    identities,
    jobs,
    leases,
    registry,
    requests,
    rollouts,
    trust,
    windows,
)

__all__ = [
    "agents",
    "alarms",
    "audit",
    "blobs",
    "columns",
    "datasets",
    "identities",
    "jobs",
    "leases",
    "registry",
    "requests",
    "rollouts",
    "trust",
    "windows",
]
