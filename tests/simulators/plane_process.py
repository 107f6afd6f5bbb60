"""The control plane's MQTT side as a process of its own, to be killed: `python -m tests.simulators.plane_process`."""

import argparse
import signal
import threading
from pathlib import Path

from tests.simulators.plane import make_services


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    services = make_services(given.root, port=given.port)
    services.start_fleet()
    services.rollouts.start()
    while not stop.wait(1.0):
        pass
    services.rollouts.stop()
    services.stop_fleet()
    services.engine.dispose()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
