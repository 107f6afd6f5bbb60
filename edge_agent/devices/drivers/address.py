"""Addresses of devices: URLs such as `modbus://plc:502/input/100?mm_per_pulse=0.1`, and loading of optional libraries.

`SCHEME://HOST:PORT/PATH?OPTION=VALUE`. Options are typed by a struct of the driver: unknown options are refused.
"""

import importlib
import os
import socket
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from edge_agent.config import BrokerConfig
from models.errors import ConfigError

Positive = Annotated[float, msgspec.Meta(gt=0.0, le=1e6)]
Finite = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0.0, le=60_000.0)]
Unit = Annotated[int, msgspec.Meta(ge=0, le=247)]
Table: TypeAlias = Literal["input", "holding", "discrete", "coil"]
"""Registers, or single bits (`discrete` inputs and coils), which are read as registers of value 0 or 1."""
_REGISTERS: Final[tuple[Table, ...]] = ("input", "holding")
_PORTS: Final = {"modbus": 502, "mqtt": 1883, "gpio": 0}
_MAX_URL: Final = 2048
_MAX_TOPIC: Final = 256


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options that may stand behind the `?` of every address; drivers add theirs."""

    unit: Unit = 1
    """Modbus unit (slave) number."""
    timeout_ms: Milliseconds = 500.0
    """Longest time of one Modbus request and of connecting, milliseconds."""
    password_file: str = ""
    """File with the MQTT password."""
    tls_ca: str = ""
    """CA certificate that an MQTT broker must prove; empty = no TLS."""
    client: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """MQTT client id; empty = made from host and process."""


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, slots=True)
class Address:
    """A URL taken apart."""

    scheme: str
    host: str
    port: int
    path: str
    user: str = ""

    @property
    def shown(self) -> str:
        """The address for messages and logs, without options and user."""
        return f"{self.scheme}://{self.host}{f':{self.port}' if self.port else ''}{self.path}"

    def register(self, tables: tuple[Table, ...] = _REGISTERS) -> tuple[Table, int]:
        """Returns table and first address of a Modbus path such as `/input/100`.

        Args:
            tables: Tables that are possible here.

        Raises:
            ConfigError: `driver.bad_url`.
        """
        name, _, number = self.path.strip("/").partition("/")
        table = next((known for known in tables if known == name), None)
        if table is None or not (number.isascii() and number.isdigit()) or int(number) > 0xFFFF:
            raise _bad_url(" or ".join(f"/{known}/NUMBER" for known in tables) + ", counted from 0", self.shown)
        return table, int(number)

    def topic(self) -> str:
        """Returns the MQTT topic of the path.

        Raises:
            ConfigError: `driver.bad_url`.
        """
        topic = unquote(self.path).strip("/")
        if not topic or len(topic) > _MAX_TOPIC or any(c in topic for c in "+#\0"):
            raise _bad_url(f"a topic without wildcards, at most {_MAX_TOPIC} characters", self.shown)
        return topic

    def broker(self, options: Options, role: str) -> tuple[BrokerConfig, str]:
        """Returns broker and client id of an MQTT address."""
        client = options.client or f"sortline-{role}-{socket.gethostname()}-{os.getpid()}"
        config = BrokerConfig(
            host=self.host,
            port=self.port,
            username=self.user,
            password_file=options.password_file,
            tls_ca=options.tls_ca,
            reconnect_min_s=0.2,
            reconnect_max_s=5.0,
        )
        return config, client


def _bad_url(expected: object, got: object) -> ConfigError:
    return ConfigError("driver.bad_url", "This is no address of such a device.", expected=expected, got=got)


def parse_address(
    url: str, options: type[OptionsT], *, schemes: tuple[str, ...], many: tuple[str, ...] = ()
) -> tuple[Address, OptionsT]:
    """Takes a URL apart and checks its options.

    Args:
        url: The address.
        options: Struct of the options.
        schemes: Schemes that are possible here.
        many: Options that may be given several times; the others may not.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`.
    """
    try:
        if len(url) > _MAX_URL:
            raise ValueError("too long")
        parts = urlsplit(url)
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), max_num_fields=256)
    except ValueError as error:
        raise _bad_url(error, url[:_MAX_URL].partition("?")[0].rpartition("@")[2]) from error
    host = parts.hostname or ""
    address = Address(parts.scheme, host, port or _PORTS.get(parts.scheme, 0), parts.path, parts.username or "")
    if parts.scheme not in schemes:
        raise _bad_url(" or ".join(f"{scheme}://" for scheme in schemes), address.shown)
    if parts.password is not None:
        raise _bad_url("the password in a file (password_file=...)", address.shown)
    if not host and parts.scheme != "gpio":
        raise _bad_url("a host", address.shown)
    return address, _options(pairs, options, many)


def _options(pairs: list[tuple[str, str]], options: type[OptionsT], many: tuple[str, ...]) -> OptionsT:
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name in many:
            given.setdefault(name, []).append(value)
        elif name in given:
            raise ConfigError("driver.bad_option", f"The option {name} stands twice.", expected="once", got="twice")
        else:
            given[name] = value
    try:
        return msgspec.convert(given, options, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(options.__struct_fields__)
        raise ConfigError(
            "driver.bad_option", f"An option of a device is wrong: {error}.", expected=known, got=sorted(given)
        ) from error


def numbered(entries: tuple[str, ...], *, parts: int, limit: int) -> dict[tuple[str, ...], int]:
    """Returns entries such as `reject:1` or `0:reject:17` as a mapping to their last part.

    Raises:
        ConfigError: `driver.bad_option`.
    """
    found: dict[tuple[str, ...], int] = {}
    for entry in entries:
        *names, number = entry.split(":")
        fits = len(names) == parts - 1 and all(names) and number.isascii() and number.isdigit()
        if not fits or int(number) > limit or tuple(names) in found:
            raise ConfigError(
                "driver.bad_option",
                "An outlet is wrong.",
                expected=f"{parts} parts between colons, a number up to {limit} last, each outlet once",
                got=entry,
            )
        found[tuple(names)] = int(number)
    return found


def load_extra(module: str, extra: str) -> Any:
    """Imports an optional library.

    Raises:
        ConfigError: `driver.missing_library`: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            "driver.missing_library",
            f"This device needs a library that is not installed: pip install 'sortline[{extra}]'.",
            expected=module,
            got=error,
        ) from error
