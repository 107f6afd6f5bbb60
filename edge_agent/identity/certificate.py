"""The agent's identity on disk, and the thread that renews it. Cryptography runs in a child process only.

The folder is outside the slots and survives every update: `identity.pem` (key and certificate chain in one file,
readable by the agent alone, so that a power cut cannot part them), `ca.pem` (the roots it trusts), `identity.json`
(facts), and `next.key` while a new certificate is being asked for. The line never waits for any of it.
"""

import logging
import os
import random
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from edge_agent.config import AgentConfig, BrokerConfig
from edge_agent.state_directory import StateDirectory
from models.errors import ConfigError
from models.identity import Enrolled
from models.messages import AgentId

log = logging.getLogger("sortline.identity")
PAIR: Final = "identity.pem"
ANCHORS: Final = "ca.pem"
FACTS: Final = "identity.json"
NEXT_KEY: Final = "next.key"
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; Python names no constant for it."""
_DAY_S: Final = 86_400.0
_CHILD_S: Final = 120.0


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The facts in `identity.json`."""

    schema_version: Literal[1] = 1
    agent: AgentId
    control_plane: str
    """https://host:port where the certificate is renewed."""
    not_before_s: int
    not_after_s: int
    renew_after_s: int
    broker_host: str = ""
    broker_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0

    @classmethod
    def of(cls, answer: Enrolled, control_plane: str) -> "Facts":
        """Returns the facts in an answer of the control plane."""
        return cls(
            agent=answer.agent,
            control_plane=control_plane,
            not_before_s=answer.not_before_s,
            not_after_s=answer.not_after_s,
            renew_after_s=answer.renew_after_s,
            broker_host=answer.broker_host,
            broker_port=answer.broker_port,
        )


def identity_folder(config: AgentConfig) -> Path:
    """Returns the folder of this agent's identity."""
    return Path(config.identity.folder or StateDirectory(Path(config.state_dir)).identity).resolve()


def read_facts(folder: Path) -> Facts | None:
    """Returns the identity's facts; None when the agent was never enrolled.

    Raises:
        ConfigError: `identity.unreadable`.
    """
    path = folder / FACTS
    try:
        return msgspec.json.decode(path.read_bytes(), type=Facts)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            "identity.unreadable", f"{path} cannot be read; enrol the agent again.", expected="our JSON", got=error
        ) from error


def with_identity(config: AgentConfig) -> AgentConfig:
    """Returns the configuration of an enrolled agent: its name, its certificates, and the broker named at enrolment.

    A broker address in the configuration has priority. An identity that cannot be read is logged: the
    line runs without a broker.

    Raises:
        ConfigError: `identity.other_agent`; `config.bad_value`: TLS without a trusted certificate authority.
    """
    folder = identity_folder(config)
    if config.broker.tls_cert or config.broker.password_file:
        return _with_tls(config)
    broker = msgspec.structs.replace(config.broker, tls_ca=str(folder / ANCHORS), tls_cert=str(folder / PAIR))
    try:
        facts = read_facts(folder)
    except ConfigError as error:
        # The line must run even without this file; the broker is used with a certificate or not at all.
        log.error("%s", error)  # noqa: TRY400  the message says it all
        return msgspec.structs.replace(config, broker=broker)
    if facts is None:
        return _with_tls(config)
    default = AgentConfig()
    if config.id not in {facts.agent, default.id}:
        raise ConfigError(
            "identity.other_agent",
            f"{folder} is the identity of another agent; enrol this one, or choose another --state-dir.",
            expected=config.id,
            got=facts.agent,
        )
    if facts.broker_host and (broker.host, broker.port) == (BrokerConfig().host, BrokerConfig().port):
        broker = msgspec.structs.replace(broker, host=facts.broker_host, port=facts.broker_port or broker.port)
    return msgspec.structs.replace(config, id=facts.agent, broker=broker)


def _with_tls(config: AgentConfig) -> AgentConfig:
    """Returns the same configuration; one with TLS must name a trusted certificate authority."""
    if config.broker.tls and not config.broker.tls_ca:
        raise ConfigError(
            "config.bad_value",
            "mqtts:// needs the broker's certificate authority: enrol this box, or set broker.tls_ca.",
            expected="broker.tls_ca",
            got="none",
        )
    return config


def check_dates(context: ssl.SSLContext, not_before_s: int, now_s: float) -> None:
    """Ignores the server's dates while this machine's clock is before the start of its own certificate.

    Such a clock is certainly wrong (no battery, no network yet). The signature is still checked: a wrong clock must not
    disconnect the box.
    """
    if now_s < not_before_s - _DAY_S:
        context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    else:
        context.verify_flags &= ~ssl.VerifyFlags(_NO_CHECK_TIME)


class BrokerTls:
    """TLS towards the broker: trusts the site's roots alone, shows our certificate, follows renewals.

    Args:
        config: `tls_ca`, and `tls_cert` with `tls_key` where the broker asks for a certificate.
        clock: Seconds since 1970.
    """

    def __init__(self, config: BrokerConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._config, self._clock = config, clock
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2

    def follow(self) -> None:
        """Reads trust, certificate and clock; called before each connection.

        Raises:
            ConfigError: `identity.unreadable`; the agent goes on without a broker and tries again.
        """
        config = self._config
        try:
            self.context.load_verify_locations(cafile=config.tls_ca)
            if config.tls_cert:
                self.context.load_cert_chain(config.tls_cert, config.tls_key or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                "identity.unreadable",
                f"{config.tls_ca} or {config.tls_cert} cannot be used; enrol the agent again.",
                expected="certificates and key, PEM",
                got=error,
            ) from error
        facts = read_facts(Path(config.tls_cert).parent) if config.tls_cert else None
        check_dates(self.context, facts.not_before_s if facts else 0, self._clock())


class IdentityUpkeep:
    """Checks regularly, in a child process, whether the certificate is due, and renews it.

    Args:
        folder: The identity.
        check_s: Seconds between two looks.
        counters: Gets `identity_renewed`, `identity_check_failed` and `identity_days_left`.
        clock: Seconds since 1970.
        rng: Spreads a fleet's looks.
    """

    def __init__(
        self,
        folder: Path,
        *,
        check_s: float,
        counters: Counter[str],
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._folder, self._check_s, self._counters, self._clock = folder, check_s, counters, clock
        self._rng = rng or random.Random()  # noqa: S311  spreads load, keeps no secret
        self._stopping = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, name="identity", daemon=True)

    def start(self) -> None:
        """Starts the thread where there is an identity."""
        if (self._folder / FACTS).exists():
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread and a child that may run."""
        self._stopping.set()
        child = self._child
        if child is not None:
            child.kill()

    def _run(self) -> None:
        wait_s = self._rng.uniform(0.0, min(30.0, self._check_s))
        while not self._stopping.wait(wait_s):
            self.look()
            wait_s = self._check_s * self._rng.uniform(0.8, 1.2)

    def look(self) -> None:
        """Checks once; a failure is counted and tried again next time."""
        try:
            status, said, complaint = self._ask()
            facts = read_facts(self._folder)
        except (OSError, subprocess.TimeoutExpired, ConfigError) as error:
            self._counters["identity_check_failed"] += 1
            log.warning("the identity cannot be checked: %s", error)
            return
        if status != 0:
            self._counters["identity_check_failed"] += 1
            log.warning("the certificate was not renewed: %s", complaint.strip()[-500:])
        elif "renewed" in said:
            self._counters["identity_renewed"] += 1
            log.info("the certificate was renewed; it is used from the next connection on")
        if facts is not None:
            self._counters["identity_days_left"] = max(0, int((facts.not_after_s - self._clock()) / _DAY_S))

    def _ask(self) -> tuple[int, str, str]:
        """Runs the child; returns its exit status and its output."""
        with subprocess.Popen(
            [sys.executable, "-m", "edge_agent.identity.enrolment", str(self._folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as self._child:
            try:
                said, complaint = self._child.communicate(timeout=_CHILD_S)
            finally:
                self._child.kill()
        return self._child.returncode, said, complaint
