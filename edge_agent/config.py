"""Configuration of the agent: identity, broker, line, budgets. Loaded once, passed down (`models.config`)."""

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_agent.line_config import LineConfig
from models.config import load_config
from models.connection import MQTT_PORT, broker_of
from models.messages import AgentId

PREFIX = "SORTLINE_AGENT"
Seconds = Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The MQTT broker and this agent's account there."""

    host: str = "127.0.0.1"
    """Name or address; a whole address such as `mqtts://broker:8883` is understood."""
    port: Port = MQTT_PORT
    username: str = ""
    """Empty = the agent's id."""
    password_file: str = ""
    """File that holds the password, readable by the agent alone."""
    tls_ca: str = ""
    """CA certificates (PEM), one of which the broker must prove; empty = no TLS. An enrolled agent has its own."""
    tls_cert: str = ""
    """The agent's certificate chain (PEM); with its key in the same file, or in `tls_key`."""
    tls_key: str = ""
    """The key of `tls_cert`; empty = in the same file."""
    tls: bool = False
    """Connect by TLS or not at all, as an address that begins with `mqtts://` asks; needs `tls_ca`."""
    reconnect_min_s: Seconds = 1.0
    reconnect_max_s: Seconds = 30.0
    """Attempts are spread at random between these, so that a fleet does not come back in one moment."""

    def __post_init__(self) -> None:
        """Reads an address such as `mqtts://broker:8883` or `[::1]:1883` given as `host` into its parts."""
        address = broker_of(self.host, self.port)
        msgspec.structs.force_setattr(self, "host", address.host)
        msgspec.structs.force_setattr(self, "port", address.port)
        msgspec.structs.force_setattr(self, "tls", self.tls or address.tls)


class SpoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Records that wait for the control plane."""

    max_bytes: Annotated[int, msgspec.Meta(ge=1024 * 1024)] = 256 * 1024 * 1024
    """On disk; beyond it the least important, then the oldest records are dropped and reported as gaps."""
    ballast_bytes: Annotated[int, msgspec.Meta(ge=0)] = 4 * 1024 * 1024
    """Kept aside so that records can still be deleted on a full disk."""
    retry_s: Seconds = 10.0
    """A batch without acknowledgement is sent again after this time."""


class DeliveryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fetching bundles."""

    window: Annotated[int, msgspec.Meta(ge=1, le=8)] = 8
    """Chunks asked for at a time."""
    reserve_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024 * 1024
    """Disk space that stays free."""
    bytes_per_s: Annotated[float, msgspec.Meta(ge=65_536.0)] = 8 * 1024 * 1024
    """Most bytes of chunks asked for per second: a bundle must leave the line's network to telemetry. Lines that share
    a connection share its capacity: set it accordingly."""
    stall_s: Seconds = 15.0
    """Without a chunk for so long, everything is asked for again, also of the control plane itself."""
    selftest_budget_ms: Annotated[float, msgspec.Meta(gt=0.0)] = 50.0
    """p99 of one run of a candidate model."""
    selftest_memory_mb: Annotated[int, msgspec.Meta(ge=256)] = 2048
    """Address space of the self-test's process: a model that needs more is refused."""
    selftest_timeout_s: Seconds = 60.0
    max_tries: Annotated[int, msgspec.Meta(ge=1, le=10)] = 2
    """Starts of a bundle on trial before it is rolled back."""
    standby_wait_s: Annotated[float, msgspec.Meta(ge=0.0, le=600.0)] = 30.0
    """A trial waits so long for its standby, then begins without one: a box that is too small still gets updates."""


class IdentityConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent's certificate (`sortline-agent enrol`)."""

    folder: str = ""
    """Empty = `identity` in `state_dir`."""
    check_s: Seconds = 6.0 * 3600.0
    """Between two looks whether the certificate is due."""


class TrustConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is believed (`models/TRUST.md`)."""

    root: str = ""
    """The trust anchor: the root this box was given when it was enrolled; empty = `root.json` in `folder`."""
    folder: str = ""
    """Memory of what was verified; empty = `trust` in `state_dir`."""
    refresh_s: Seconds = 300.0
    """Fresh metadata without a new assignment is looked at so much later."""
    retry_s: Seconds = 30.0
    """What was refused is looked at again after this; the pause doubles."""
    timeout_s: Seconds = 60.0
    """Longest time of one verification."""


class Standby(StrEnum):
    """When a second line process waits to take over from one that dies (`edge_agent.supervisor.line_keeper`)."""

    TRIAL = "trial"
    """While a new bundle is on trial, with the bundle before."""
    ALWAYS = "always"
    """Outside trials too, with the active bundle."""
    NEVER = "never"


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One agent."""

    id: AgentId = "agent-1"
    state_dir: str = "sortline-agent-state"
    """Slots, spool, state. Survives everything."""
    labels: dict[str, str] = {}
    """Such as site, line: rollouts select by them."""
    broker: BrokerConfig = BrokerConfig()
    line: LineConfig = LineConfig()
    lot_commands: bool = True
    """Whether the control plane may say which lot runs; false = the operator at the line alone."""
    spool: SpoolConfig = SpoolConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    identity: IdentityConfig = IdentityConfig()
    trust: TrustConfig = TrustConfig()
    standby: Standby = Standby.TRIAL
    """`trial`, `always` or `never`: a line that dies is replaced in a moment, for the memory of a second line."""


def load_agent_config(
    path: Path | None, overrides: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> AgentConfig:
    """Defaults < file < environment (`SORTLINE_AGENT__SECTION__KEY`) < command line.

    Raises:
        ConfigError: See `models.config.load_config`.
    """
    return load_config(
        AgentConfig,
        path,
        environment=os.environ if environment is None else environment,
        prefix=PREFIX,
        overrides=overrides,
    )
