"""Connections to a broker: one parser of its address, the reader of its password, callbacks that never raise.

One parser, so that every command and setting takes the same addresses. It uses neither sockets nor paho.
"""

import ipaddress
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from models.errors import ConfigError
from models.text import mask

MQTT_PORT: Final = 1883
MQTTS_PORT: Final = 8883
_MAX_SECRET_BYTES: Final = 64 * 1024
_HOST: Final = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?"
)
_FORMS: Final = "HOST, HOST:PORT, [IPV6]:PORT, mqtt://HOST:PORT or mqtts://HOST:PORT"


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens.

    Attributes:
        host: Name or IP address, without brackets.
        port: 1 to 65535; None = the address does not say.
        tls: Whether the address asks for TLS (`mqtts://`).
    """

    host: str
    port: int | None = None
    tls: bool = False


def parse_broker(text: str) -> BrokerAddress:
    """Reads the address of a broker: `host`, `host:1883`, `[::1]:1883`, `mqtt://host:1883`, `mqtts://host`.

    Args:
        text: What a person wrote.

    Raises:
        ConfigError: `config.bad_value`: it is none of these; user names and passwords have keys of their own.
    """
    scheme, separator, rest = text.strip().rpartition("://")
    if scheme.lower() not in ({"mqtt", "mqtts"} if separator else {""}):
        raise _no_broker(text, f"the scheme {mask(scheme)!r}")
    rest = rest.removesuffix("/")
    if "@" in rest:
        raise _no_broker(text, "a user name: set broker.username and broker.password_file")
    tls = scheme.lower() == "mqtts"
    host, port = _split(text, rest)
    if not _HOST.fullmatch(host) and not _is_ip(host):
        raise _no_broker(text, f"the host {host!r}")
    if port is None:
        return BrokerAddress(host, None, tls)
    if not port.isascii() or not port.isdecimal() or not 1 <= int(port[:6]) <= 65_535:
        raise _no_broker(text, f"the port {port!r}")
    return BrokerAddress(host, int(port), tls)


def broker_of(host: str, port: int) -> BrokerAddress:
    """Returns the broker that the keys `host` and `port` of a configuration name; `host` may be a whole address.

    Args:
        host: What a person wrote.
        port: Of its own key; 1883, its default, says nothing where the address has a port.

    Raises:
        ConfigError: `config.bad_value`: it is no address, or the two name different ports.
    """
    address = parse_broker(host)
    named = address.port if address.port is not None else MQTTS_PORT if address.tls else None
    if named is None:
        return BrokerAddress(address.host, port, address.tls)
    if address.port is not None and port not in {MQTT_PORT, address.port}:
        raise ConfigError(
            "config.bad_value", "broker.host and broker.port name different ports.", expected=address.port, got=port
        )
    return BrokerAddress(address.host, named if port == MQTT_PORT else port, address.tls)


def _split(text: str, rest: str) -> tuple[str, str | None]:
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")) or not _is_ip(host) or ":" not in host:
            raise _no_broker(text, f"{rest!r}")
        return host, tail[1:] if tail else None
    if rest.count(":") > 1:
        return rest, None  # an IPv6 address without brackets, or nothing
    host, colon, port = rest.partition(":")
    return host, port if colon else None


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _no_broker(text: str, got: str) -> ConfigError:
    return ConfigError("config.bad_value", f"{mask(text)!r} is no address of a broker.", expected=_FORMS, got=got[:200])


def read_secret(path: str) -> str | None:
    """Returns the broker password in a file; None = no file is named.

    Raises:
        ConfigError: `broker.no_password`: the file cannot be read, or holds no text.
    """
    if not path:
        return None
    try:
        with Path(path).open("rb") as stream:
            return stream.read(_MAX_SECRET_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "broker.no_password",
            f"{path} cannot be read; it must hold the broker password.",
            expected="a readable file",
            got=getattr(error, "strerror", None) or error,
        ) from error


def guarded(callback: Callable[..., None], counters: Counter[str], log: logging.Logger) -> Callable[..., None]:
    """Returns a callback that never raises: an exception in one of paho's ends its thread without a word.

    Args:
        callback: Takes whatever it is called with.
        counters: Gets `callback_failed`.
        log: Gets the traceback.
    """

    def call(*arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            counters["callback_failed"] += 1
            log.exception("an MQTT callback failed")

    return call
