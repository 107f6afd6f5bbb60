"""Configuration of the control plane. Loaded once, passed down (`models.config`)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from models.config import load_config
from models.connection import broker_of
from models.errors import ConfigError

PREFIX = "SORTLINE"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_PLAIN_PORT: Final = 1883
_TLS_PORT: Final = 8883
_MIN_TOKEN: Final = 16
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server of API and pages."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 8080
    """Port to listen on; 0 chooses a free one."""
    public_url: str = ""
    """Address under which browsers reach the server, such as `https://plant.example/sortline`, where a reverse proxy
    stands before it: its host is allowed, its origin may act, its path is the prefix of every link. Empty = none."""
    root_path: str = ""
    """Prefix behind a reverse proxy; empty = the path of `public_url`."""
    token_file: str = ""
    """File with the token that changes and reading need (`Authorization: Bearer ...`), 16 characters or more. A server
    that listens beyond this machine must have one. Empty = no token is asked for."""
    read_token_file: str = ""
    """File with a token that allows reading alone, for dashboards and Prometheus. Empty = reading needs the token."""
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]", "testserver")
    """Names under which the server may be called; guards against DNS rebinding."""
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 600 * 1024 * 1024
    """Largest upload of a bundle, in bytes; other bodies end at 4 MiB."""

    @property
    def prefix(self) -> str:
        """Prefix of every link, without a slash at its end."""
        return (self.root_path or urlsplit(self.public_url).path).rstrip("/")

    @property
    def public_origin(self) -> str:
        """Scheme, host and port of `public_url` as a browser writes them in `Origin`; empty without one."""
        parts = urlsplit(self.public_url)
        return f"{parts.scheme}://{parts.netloc}".lower() if parts.netloc else ""

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names under which the server may be called."""
        host = urlsplit(self.public_url).hostname
        return (*self.allowed_hosts, *((f"[{host}]" if ":" in host else host,) if host else ()))

    def check(self) -> None:
        """Checks what no type says.

        Raises:
            ConfigError: `server.bad_public_url`.
        """
        parts = urlsplit(self.public_url)
        plain = not (parts.query or parts.fragment or parts.username)
        if self.public_url and not (parts.scheme in {"http", "https"} and parts.hostname and plain):
            raise ConfigError(
                "server.bad_public_url",
                "server.public_url is no address of a server.",
                expected="such as https://plant.example/sortline",
                got=self.public_url,
            )


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The MQTT broker."""

    host: str = "127.0.0.1"
    port: Port = _PLAIN_PORT
    username: str = "control-plane"
    password_file: str = ""
    """File with the password, for a broker on this machine; certificates need none."""
    tls: bool = False
    """Whether to connect with the site's certificates (`sortline ca init`)."""
    certificates: str = ""
    """Folder with ca.pem, control.pem and bulk.pem (key and chain each); empty = those of the site's authority."""
    replica: str = ""
    """Name of this replica of the control plane (`sortline ca replica NAME`); empty = the first."""
    enabled: bool = True
    retained_max_bytes: Annotated[int, msgspec.Meta(ge=0)] = 2 * 1024**3
    """Largest sum of blobs that the broker is given to keep, in bytes; 0 where the broker keeps no large messages and
    every agent asks for each blob and gets it alone."""
    bundle_bytes_per_s: Annotated[float, msgspec.Meta(ge=65_536.0)] = 32 * 1024 * 1024
    """Largest rate at which blobs are published, in bytes per second, so that telemetry and control find room."""

    def __post_init__(self) -> None:
        """Reads an address such as `mqtts://broker:8883` or `[::1]:1883` given as `host` into its parts."""
        address = broker_of(self.host, self.port)
        msgspec.structs.force_setattr(self, "host", address.host)
        msgspec.structs.force_setattr(self, "port", address.port)
        msgspec.structs.force_setattr(self, "tls", self.tls or address.tls)

    @property
    def tls_port(self) -> int:
        """Port of the listener with mutual TLS: `port`, unless that is the usual port without TLS."""
        return _TLS_PORT if self.port == _PLAIN_PORT else self.port


class IdentityConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The site's certificate authority (made by `sortline ca init`), and where agents enrol."""

    folder: str = ""
    """Folder of the authority; empty = `identity` in `data_dir`."""
    host: str = "127.0.0.1"
    """Address of the HTTPS listener for agents; it serves enrolment and renewal only."""
    port: Port = 8443
    broker_host: str = ""
    """Address of the broker as agents reach it; empty = broker.host."""
    broker_port: Port = 0
    """Port of the broker as agents reach it; 0 = broker.port."""
    mosquitto_profile: str = ""
    """Folder of `sortline broker mosquitto-profile`; its access list follows every enrolment and revocation."""


class JobsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Training runs, imports and other long work."""

    workers: Annotated[int, msgspec.Meta(ge=0, le=64)] = 1
    """Worker processes that the server starts; 0 = they run elsewhere (`sortline worker`)."""
    lease_s: Annotated[float, msgspec.Meta(gt=1.0)] = 15.0
    max_attempts: Annotated[int, msgspec.Meta(ge=1)] = 2
    niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    """Niceness of jobs: they give way to everything else on the machine."""


class RolloutsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The process that moves rollouts forward: one of all replicas, by a lease in the database."""

    period_s: Annotated[float, msgspec.Meta(ge=0.05, le=60.0)] = 1.0
    """Seconds between two turns."""
    lease_s: Annotated[float, msgspec.Meta(ge=1.0, le=600.0)] = 10.0
    """Seconds of silence after which a leader is replaced; clocks of the replicas must agree to a fraction of it."""


AlarmSeverity = Literal["info", "warning", "critical"]
Receiver = Annotated[str, msgspec.Meta(min_length=1, max_length=40, pattern=r"^[a-z0-9-]+\Z")]


class WebhookConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A receiver of alarms over HTTP, `[[alarms.webhooks]]`."""

    name: Receiver
    url: str
    secret_file: str = ""
    """File with the secret that signs each message: `whsec_` and base64, or any text. Empty = not signed."""
    proxy: str = ""
    """Address of an HTTP proxy; empty = none."""
    severity: AlarmSeverity = "warning"
    """Least severity that is sent."""
    after_escalations: Annotated[int, msgspec.Meta(ge=0, le=5)] = 0
    """Escalations from which the receiver hears of an alarm; 0 = at once."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0.0, le=60.0)] = 10.0
    """Longest attempt in all, in seconds."""


class MailConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A receiver of alarms by e-mail, `[[alarms.mails]]`."""

    name: Receiver
    host: str
    port: Port = 587
    security: Literal["starttls", "tls", "plain"] = "starttls"
    """`plain` sends everything in the clear: for a relay on this machine."""
    username: str = ""
    password_file: str = ""
    sender: str
    recipients: tuple[str, ...]
    severity: AlarmSeverity = "warning"
    """Least severity that is sent."""
    after_escalations: Annotated[int, msgspec.Meta(ge=0, le=5)] = 0
    """Escalations from which the receiver hears of an alarm; 0 = at once."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0.0, le=120.0)] = 20.0
    """Longest attempt in all, in seconds."""


class AlarmPolicyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What alarms of a cause may ask for, `[[alarms.policies]]`."""

    cause: str
    """A cause of `detection.finding.Cause`."""
    request: Literal["review-queue", "samples", "retraining-proposal"]
    severity: AlarmSeverity = "warning"
    """Least severity that asks."""
    items: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    """Items or samples asked for at a time."""
    budget_items_per_day: Annotated[int, msgspec.Meta(ge=0)] = 500
    """Items that all alarms of this policy may ask for in 24 hours; beyond it the request is withheld."""
    cool_down_h: Annotated[float, msgspec.Meta(ge=0.0, le=720.0)] = 12.0
    """Hours after a request for a line in which the policy asks nothing more for it."""
    confirmation: bool = True
    """Whether a person must confirm before the request stands."""


class AlarmsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Alarms: when they are raised and cleared, whom they reach, what they may start."""

    period_s: Annotated[float, msgspec.Meta(ge=0.1, le=300.0)] = 5.0
    """Seconds between two looks at what was stored."""
    lease_s: Annotated[float, msgspec.Meta(ge=1.0, le=600.0)] = 30.0
    """Seconds of silence after which another replica raises alarms."""
    hold_s: Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)] = 60.0
    """Seconds for which a finding must be absent, while its line is heard, before its alarm is closed."""
    escalate_after_s: Annotated[float, msgspec.Meta(ge=0.0, le=604_800.0)] = 900.0
    """Seconds without an answer after which an alarm is escalated, and again after as many; 0 = never."""
    keep_days: Annotated[float, msgspec.Meta(ge=1.0)] = 400.0
    """Days for which resolved alarms are kept."""
    first_retry_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600.0)] = 5.0
    """Seconds before the second attempt to deliver a message; doubled with each further one."""
    longest_retry_s: Annotated[float, msgspec.Meta(ge=1.0, le=86_400.0)] = 900.0
    give_up_after_s: Annotated[float, msgspec.Meta(ge=1.0)] = 86_400.0
    """Seconds after which a message that could not be delivered is given up, counted and shown."""
    topic: bool = True
    """Whether alarms are published over MQTT as well, on `sortline/v1/alarms`."""
    webhooks: tuple[WebhookConfig, ...] = ()
    mails: tuple[MailConfig, ...] = ()
    policies: tuple[AlarmPolicyConfig, ...] = ()

    def check(self) -> None:
        """Checks what no type says: names are unique, addresses are addresses, files of secrets can be read.

        Raises:
            ConfigError: `alarms.bad_receiver`, `alarms.no_secret`.
        """
        names = [one.name for one in self.webhooks] + [one.name for one in self.mails]
        if twice := sorted({name for name in names if names.count(name) > 1 or name == "mqtt"}):
            raise ConfigError("alarms.bad_receiver", "Receivers of alarms need names of their own.", got=twice)
        for hook in self.webhooks:
            parts = urlsplit(hook.url)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise ConfigError(
                    "alarms.bad_receiver",
                    f"The address of the webhook {hook.name} is no address of a server.",
                    expected="such as https://plant.example/alarms",
                    got=hook.url,
                )
        for mail in self.mails:
            if not mail.host or "@" not in mail.sender or not mail.recipients:
                raise ConfigError(
                    "alarms.bad_receiver",
                    f"The mail receiver {mail.name} needs a host, a sender and recipients.",
                    expected="host, sender, recipients",
                )
        for file in (*(h.secret_file for h in self.webhooks), *(m.password_file for m in self.mails)):
            read_secret(file)


def read_secret(file: str) -> str:
    """Returns the secret that a file holds; empty without a file.

    Raises:
        ConfigError: `alarms.no_secret`.
    """
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError("alarms.no_secret", f"{file} cannot be read.", got=error) from error


class RetentionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long what agents send is kept; the audit trail is never deleted."""

    windows_days: Annotated[int, msgspec.Meta(ge=2, le=3650)] = 14
    """Days for which windows of ten seconds are kept."""
    minutes_days: Annotated[int, msgspec.Meta(ge=2, le=3650)] = 90
    """Days for which sums over minutes are kept."""
    hours_days: Annotated[int, msgspec.Meta(ge=2, le=36_500)] = 1100
    """Days for which sums over hours, so those of lots, and fidelity by hour are kept."""
    days_days: Annotated[int, msgspec.Meta(ge=2, le=36_500)] = 3650
    """Days for which sums over days are kept."""
    events_days: Annotated[int, msgspec.Meta(ge=2, le=36_500)] = 400
    """Days for which events of agents are kept."""
    history_days: Annotated[int, msgspec.Meta(ge=2, le=36_500)] = 1100
    """Days for which the set-ups of agents are kept that hold no longer."""
    period_s: Annotated[float, msgspec.Meta(ge=1.0, le=3600.0)] = 60.0
    """Seconds between two looks at what is past its time."""
    archive: str = ""
    """Folder that gets every closed day as a Parquet file; empty = there is no archive. Needs the extra `archive`."""

    def __post_init__(self) -> None:
        """Refuses sums that go before what they are the sums of."""
        if not self.windows_days <= self.minutes_days <= self.hours_days <= self.days_days:
            raise ValueError("windows_days <= minutes_days <= hours_days <= days_days must hold")


class TrustConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Signed metadata and online keys (made by `sortline keys init`)."""

    folder: str = ""
    """Folder of metadata and keys; empty = `trust` in `data_dir`."""


class ControlPlaneConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One control plane."""

    data_dir: str = "sortline-data"
    database: str = ""
    """SQLAlchemy URL; empty = SQLite in `data_dir`."""
    database_wait_s: Annotated[float, msgspec.Meta(ge=0.1, le=60.0)] = 5.0
    """Longest wait for a database that is locked or away, in seconds; then a request is refused with 503."""
    server: ServerConfig = ServerConfig()
    broker: BrokerConfig = BrokerConfig()
    jobs: JobsConfig = JobsConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    identity: IdentityConfig = IdentityConfig()
    trust: TrustConfig = TrustConfig()
    retention: RetentionConfig = RetentionConfig()

    @property
    def identity_folder(self) -> Path:
        """Where the certificate authority is."""
        return Path(self.identity.folder).resolve() if self.identity.folder else self.root / "identity"

    @property
    def certificates_folder(self) -> Path:
        """Where the control plane's own certificates for the broker are."""
        if self.broker.certificates:
            return Path(self.broker.certificates).resolve()
        return self.identity_folder / "site"

    @property
    def root(self) -> Path:
        """`data_dir` as a path."""
        return Path(self.data_dir).resolve()

    @property
    def trust_folder(self) -> Path:
        """Where signed metadata and online keys are."""
        return Path(self.trust.folder).resolve() if self.trust.folder else self.root / "trust"

    @property
    def database_url(self) -> str:
        """Where the tables are."""
        return self.database or f"sqlite:///{self.root / 'sortline.sqlite'}"

    @property
    def token(self) -> str:
        """The API token; empty when none is asked for.

        Raises:
            ConfigError: `server.no_token` when the server would be open to the network without one.
        """
        if self.server.token_file:
            return _read_token(self.server.token_file)
        if self.server.host not in LOOPBACK:
            raise ConfigError(
                "server.no_token",
                "Beyond this machine the API needs a token: set server.token_file.",
                expected="server.token_file, or host 127.0.0.1",
                got=self.server.host,
            )
        if self.server.read_token_file:
            raise ConfigError(
                "server.no_token",
                "A read token without a token protects nothing: set server.token_file.",
                expected="server.token_file",
                got="server.read_token_file alone",
            )
        return ""

    @property
    def read_token(self) -> str:
        """The token that allows reading alone; empty when there is none.

        Raises:
            ConfigError: `server.no_token`.
        """
        return _read_token(self.server.read_token_file) if self.server.read_token_file else ""


def _read_token(file: str) -> str:
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError("server.no_token", f"{file} cannot be read.", got=error) from error
    if len(token) < _MIN_TOKEN:
        raise ConfigError("server.no_token", f"The token in {file} is too short.", expected=">= 16 characters")
    return token


def load_in(path: Path | None, data_dir: str | None) -> ControlPlaneConfig:
    """Returns the configuration of a file and the environment, with another data folder where one is given."""
    return load_control_plane_config(path, {"data_dir": data_dir} if data_dir else {})


def load_control_plane_config(
    path: Path | None, overrides: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> ControlPlaneConfig:
    """Defaults < file < environment (`SORTLINE__SECTION__KEY`) < command line.

    Raises:
        ConfigError: See `models.config.load_config`.
    """
    return load_config(
        ControlPlaneConfig,
        path,
        environment=os.environ if environment is None else environment,
        prefix=PREFIX,
        overrides=overrides or {},
    )
