"""Runs the embedded broker as its own process: `python -m control_plane.broker --help`."""

import argparse
import asyncio
import json
import logging
import os
import resource
import signal
import sys
from asyncio import sslproto
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from control_plane.broker.access import Credentials
from control_plane.broker.broker import Broker
from control_plane.broker.client_certificates import Certificates
from control_plane.broker.server import serve
from control_plane.broker.sessions import BrokerLimits
from models.errors import ConfigError, SortlineError
from models.files import write_atomically
from models.service_notice import ServiceNotice

_BEAT_S: Final = 1.0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m control_plane.broker", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=1883, help="0 chooses a free one (default: 1883)")
    parser.add_argument("--site", type=Path, help="mutual TLS: the authority's site folder (`sortline ca init`)")
    parser.add_argument("--credentials", type=Path, help="passwords (`sortline broker add`); this machine only")
    parser.add_argument("--anonymous", action="store_true", help="admit everyone; loopback only, for tests")
    parser.add_argument("--ready-file", type=Path, help="gets host, port and pid as JSON once the broker listens")
    parser.add_argument("--limit", action="append", default=[], metavar="KEY=VALUE", help="override one limit")
    return parser.parse_args(argv)


def _limits(pairs: list[str]) -> BrokerLimits:
    try:
        return msgspec.convert(dict(pair.split("=", 1) for pair in pairs), BrokerLimits, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        known = ", ".join(BrokerLimits.__struct_fields__)
        raise ConfigError("broker.bad_limit", f"A limit is wrong: {error}.", expected=known, got=pairs) from error


def _open(arguments: argparse.Namespace) -> Broker:
    limits = _limits(arguments.limit)
    if arguments.site is not None:
        return Broker(Certificates(arguments.site), limits)
    if arguments.host not in {"127.0.0.1", "::1", "localhost"}:
        raise ConfigError(
            "broker.exposed",
            "Beyond this machine clients need certificates: --site FOLDER.",
            expected="--site, or --host 127.0.0.1",
            got=arguments.host,
        )
    if not arguments.anonymous and arguments.credentials is None:
        raise ConfigError("broker.no_credentials", "Say who may connect: --site FOLDER, or --credentials FILE.")
    return Broker(Credentials(None if arguments.anonymous else arguments.credentials), limits)


def _prepare_process() -> None:
    """Raises the limit of open files, and keeps TLS connections from taking a quarter of a megabyte each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # CPython 3.11 to 3.14: every TLS connection takes a read buffer of 256 KiB the moment it is accepted, before
    # its client is authenticated; a TLS record has 16 KiB.
    sslproto.SSLProtocol.max_size = 16 * 1024


async def _run(arguments: argparse.Namespace) -> None:
    broker, stop = _open(arguments), asyncio.Event()
    loop, notice = asyncio.get_running_loop(), ServiceNotice(Counter())
    beats: list[asyncio.Task[None]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready(host: str, port: int) -> None:
        sys.stdout.write(f"broker listens on {host}:{port}\n")
        sys.stdout.flush()
        if arguments.ready_file is not None:
            facts = {"host": host, "port": port, "pid": os.getpid()}
            write_atomically(arguments.ready_file, json.dumps(facts).encode())
        beats.append(loop.create_task(_beat(notice), name="beat"))

    await serve(broker, arguments.host, arguments.port, on_ready=ready, stop=stop)
    notice.stopping()
    for beat in beats:
        beat.cancel()


async def _beat(notice: ServiceNotice) -> None:
    """Reports regularly that the loop which serves every connection runs."""
    while True:
        notice.alive()
        await asyncio.sleep(_BEAT_S)


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    _prepare_process()
    try:
        asyncio.run(_run(_arguments(argv)))
    except SortlineError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
