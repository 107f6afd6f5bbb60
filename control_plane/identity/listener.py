"""The HTTPS listener for agents, in a thread of its own; its certificate follows the site's files while it runs."""

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvicorn

from control_plane.identity.publication import SiteFiles
from control_plane.identity.tls import load_pair, server_context
from models.errors import SortlineError

log = logging.getLogger("sortline.identity")
_UPKEEP_S: Final = 60.0
_CONNECTIONS: Final = 256


class DeviceListener:
    """Serves the device application and keeps the site's files in step.

    Args:
        app: `control_plane.api.enrolment.create_device_app`.
        listener: A listening socket.
        server_pem: Key and chain of the server.
        site_files: Brought up to date at the start and each minute.
        tell: Called with the names of counters.
    """

    def __init__(
        self, app: Any, listener: socket.socket, server_pem: Path, site_files: SiteFiles, tell: Callable[[str], None]
    ) -> None:
        self._pem, self._site_files, self._tell = server_pem, site_files, tell
        self._stamp = server_pem.stat().st_mtime_ns
        self._context = server_context(server_pem)
        self._stopping = threading.Event()
        settings = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
            ssl_context_factory=lambda _config, _default: self._context,
        )
        self._server = uvicorn.Server(settings)
        self._threads = [
            threading.Thread(target=self._server.run, args=([listener],), name="enrolment", daemon=True),
            threading.Thread(target=self._upkeep, name="identity-upkeep", daemon=True),
        ]

    def start(self) -> None:
        """Starts the thread that serves."""
        for thread in self._threads:
            thread.start()

    @property
    def started(self) -> bool:
        """Whether the listener answers."""
        return self._server.started

    def stop(self) -> None:
        """Ends the thread within a few seconds."""
        self._stopping.set()
        self._server.should_exit = True
        for thread in self._threads:
            thread.join(5.0)

    def follow(self) -> None:
        """Brings the site's files up to date, also by what another process wrote; later connections use them."""
        self._site_files.publish()
        stamp = self._pem.stat().st_mtime_ns
        if stamp != self._stamp:
            load_pair(self._context, self._pem)
            self._stamp = stamp

    def _upkeep(self) -> None:
        """Renews the site's own certificates and publishes the brokers' files again, each minute."""
        while not self._stopping.wait(_UPKEEP_S):
            try:
                self.follow()
            except (SortlineError, OSError) as error:
                self._tell("identity_upkeep_failed")
                log.warning("identity upkeep failed: %s", error)
            except Exception:
                # For example while the database is away: the files stay unchanged, and it is tried again.
                self._tell("identity_upkeep_failed")
                log.exception("identity upkeep failed")
