"""Runs the control plane: migrations, worker processes, the HTTP server. One process group, stopped as one."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from types import FrameType
from typing import Any

import uvicorn

from control_plane.api.enrolment import create_device_app
from control_plane.app import create_app
from control_plane.backup.restore import check_finished
from control_plane.config import ControlPlaneConfig
from control_plane.database.migrate import migrate_when_reachable
from control_plane.identity.authority import SITE
from control_plane.identity.listener import DeviceListener
from control_plane.jobs.worker import run_worker
from control_plane.listening import listen
from control_plane.logs import configure_logging
from control_plane.services import Services, open_services
from models.service_notice import ServiceNotice

log = logging.getLogger("sortline.server")


class _Server(uvicorn.Server):
    """Lets open streams know that it stops, before it waits for them to end."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Is called with the signal that stops the server."""
        self._stopping.set()
        super().handle_exit(sig, frame)


def serve(config: ControlPlaneConfig) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status.

    A database server that is away is waited for; the broker is connected to whenever it is there.

    Raises:
        UnavailableError: `server.port_in_use`, `database.unreachable`.
        ConfigError: `server.no_token`, `backup.unfinished`.
    """
    configure_logging()
    check_finished(config.root)
    config.root.mkdir(parents=True, exist_ok=True)
    listener = listen(config.server.host, config.server.port, code="server.port_in_use")
    notice = ServiceNotice(Counter())
    migrate_when_reachable(config.database_url, waiting=notice.waiting)
    services = open_services(config)

    async def turned() -> None:
        """Runs in the event loop that answers every request."""
        notice.alive()

    devices = _device_listener(config, services)
    workers = [_start_worker(config, number) for number in range(config.jobs.workers)]
    host, port = listener.getsockname()[:2]
    log.info("control plane on http://%s:%s", host, port)
    settings = uvicorn.Config(
        create_app(services),
        log_level="warning",
        timeout_graceful_shutdown=3,  # an open event stream would keep the server for ever
        proxy_headers=False,
        server_header=False,
        callback_notify=turned,
        timeout_notify=0,  # seconds between two calls; uvicorn looks once a second
    )
    server = _Server(settings, services.stopping)
    # After its own shutdown uvicorn raises the signal again; by default that would end us before the workers are ended.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if devices is not None:
        devices.start()
    try:
        server.run(sockets=[listener])
    finally:
        notice.stopping()
        if devices is not None:
            devices.stop()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(8.0)
            if worker.is_alive():
                worker.kill()
    return 0


def _device_listener(config: ControlPlaneConfig, services: Services) -> DeviceListener | None:
    """Returns the HTTPS listener for agents, where the site has a certificate authority."""
    if services.enrolment is None or services.site_files is None:
        return None
    listener = listen(config.identity.host, config.identity.port, code="server.port_in_use")
    host, port = listener.getsockname()[:2]
    log.info("agents enrol at https://%s:%s", host, port)
    counters = services.counters

    def tell(name: str) -> None:
        counters[name] += 1

    app = create_device_app(services.enrolment, counters)
    return DeviceListener(app, listener, config.identity_folder / SITE / "server.pem", services.site_files, tell)


def _start_worker(config: ControlPlaneConfig, number: int) -> Any:
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=work, args=(config, os.getpid()), name=f"worker-{number}")
    worker.start()
    return worker


def work(config: ControlPlaneConfig, parent: int = 0) -> None:
    """Body of a worker process: ends on SIGTERM, and when its parent is gone.

    Raises:
        ConfigError: `backup.unfinished`.
    """
    configure_logging()
    check_finished(config.root)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if parent:
        run_worker(config, lambda: stop.is_set() or os.getppid() != parent)
        return
    notice = ServiceNotice(Counter())
    migrate_when_reachable(config.database_url, waiting=notice.waiting)

    def turned() -> bool:
        """Runs at least once a second, also while a job runs in its child process."""
        notice.alive()
        return stop.is_set()

    run_worker(config, turned)
    notice.stopping()
