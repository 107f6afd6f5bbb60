"""The listening side: passwords on this machine, or mutual TLS that follows the site's certificates while it runs."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from control_plane.broker.acceptor import Acceptor
from control_plane.broker.broker import Broker
from control_plane.broker.client_certificates import Certificates
from control_plane.listening import listen
from models.errors import ConfigError

log = logging.getLogger("sortline.broker")


async def serve(
    broker: Broker,
    host: str,
    port: int,
    *,
    on_ready: Callable[[str, int], Any],
    stop: asyncio.Event,
) -> None:
    """Runs the broker until `stop` is set; mutual TLS where its identities are certificates.

    Args:
        broker: The exchange.
        host: Address to bind.
        port: 0 chooses a free one.
        on_ready: Called with the address once it listens.
        stop: Ends the broker.

    Raises:
        UnavailableError: `broker.port_in_use`.
    """
    listener = listen(host, port, code="broker.port_in_use", backlog=512)
    door = Acceptor(broker, listener)
    address = listener.getsockname()
    on_ready(address[0], address[1])
    upkeep = asyncio.create_task(_upkeep(broker), name="upkeep")
    await stop.wait()
    upkeep.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await upkeep
    door.close()
    for connection in list(broker.connections):
        connection.drop("shutdown")
    broker.verifier.shutdown(wait=False, cancel_futures=True)
    await asyncio.sleep(0)


async def _upkeep(broker: Broker) -> None:
    """Follows the files and expires sessions every second, and publishes statistics every ten."""
    turn, credentials = 0, broker.credentials
    while True:
        try:
            if credentials.reload():
                log.info("identities changed")
        except ConfigError as error:
            broker.counters["credentials_broken"] += 1
            log.warning("%s", error)
        if isinstance(credentials, Certificates) and credentials.withdrawn_trust:
            credentials.withdrawn_trust = False
            for connection in list(broker.connections):
                connection.drop("identity_removed")
        broker.expire_sessions()
        if turn % 10 == 0:
            broker.publish_stats()
        turn += 1
        await asyncio.sleep(1.0)
