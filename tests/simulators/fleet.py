"""Hundreds of light agents (`simulated_agent`) in one thread over a real broker.

Run as a process of its own: `python -m tests.simulators.fleet --port 1883 --count 200 --report figures.json`.
"""

import argparse
import contextlib
import json
import queue
import selectors
import signal
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as mqtt

from control_plane.identity.authority import SITE
from models.messages import Phase, Presence, encode
from models.topics import Channel, agent_topic
from tests.simulators.simulated_agent import Manner, SimulatedAgent, wall_ms

__all__ = ["Manner", "SimulatedAgent", "SimulatedFleet"]


class SimulatedFleet:
    """Many agents on one broker; use as a `with` block.

    Args:
        port: Of the broker.
        count: Agents: `sim-000`, `sim-001`, ...; labels `site` (one of `sites`) and `line` (its number).
        manner: Of all of them; `agents[...].manner` may be replaced one by one.
        sites: Names, given round robin.
        prepare: Gives a client its credentials (`username_pw_set`, `tls_set_context`); by default its id and "x".
        seed: Of everything random.
    """

    def __init__(
        self,
        port: int,
        count: int,
        *,
        host: str = "127.0.0.1",
        manner: Manner | None = None,
        sites: tuple[str, ...] = ("north", "south"),
        prepare: Callable[[mqtt.Client, str], None] = lambda client, agent_id: client.username_pw_set(agent_id, "x"),
        seed: int = 1,
    ) -> None:
        self.host, self.port, self.prepare = host, port, prepare
        self._selector = selectors.DefaultSelector()
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()
        self._stop = threading.Event()
        self.slowest_turn_s = 0.0
        base = manner or Manner()
        self.agents: dict[str, SimulatedAgent] = {}
        for number in range(count):
            labels = {"site": sites[number % len(sites)], "line": str(number)}
            own = replace(base)
            agent = SimulatedAgent(self, f"sim-{number:03d}", labels, own, seed * 100_003 + number)
            self.agents[agent.id] = agent
        self._thread = threading.Thread(target=self._run, name="simulated-fleet", daemon=True)

    # -- sockets ----------------------------------------------------------------------------------------------

    def watch(self, sock: Any, agent: SimulatedAgent, *, write: bool = False) -> None:
        """Called by a client: this socket is to be looked at."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        try:
            self._selector.modify(sock, events, agent)
        except (KeyError, ValueError, OSError):
            with contextlib.suppress(KeyError, ValueError, OSError):
                self._selector.register(sock, events, agent)

    def unwatch(self, sock: Any) -> None:
        """Called by a client: the socket is about to be closed."""
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(sock)

    def _run(self) -> None:
        next_tick_s = 0.0
        while not self._stop.is_set():
            for key, mask in self._selector.select(0.02):
                agent: SimulatedAgent = key.data
                if mask & selectors.EVENT_READ:
                    agent.client.loop_read()
                if mask & selectors.EVENT_WRITE and agent.client.socket() is not None:
                    agent.client.loop_write()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._calls.get_nowait()()
            now = time.monotonic()
            if now >= next_tick_s:
                next_tick_s = now + 0.05
                for agent in self.agents.values():
                    agent.tick(now)
                self.slowest_turn_s = max(self.slowest_turn_s, time.monotonic() - now)
        for agent in self.agents.values():
            goodbye = Presence(online=False, boot_id=agent.boot_id, at_ms=wall_ms())
            if agent.connected:
                agent.client.publish(agent_topic(agent.id, Channel.PRESENCE), encode(goodbye), qos=1, retain=True)
            agent.client.disconnect()
            if agent.client.socket() is not None:
                agent.client.loop_write()
                agent.client.loop_read()

    # -- from other threads -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10.0)
        self._selector.close()

    def do(self, action: Callable[[SimulatedAgent], None], *agent_ids: str) -> None:
        """Runs an action on these agents (all when none is named) in the fleet's thread; waits for it."""
        done = threading.Event()

        def call() -> None:
            for agent_id in agent_ids or list(self.agents):
                action(self.agents[agent_id])
            done.set()

        self._calls.put(call)
        assert done.wait(300.0), "the simulated fleet does not run"

    def connected(self) -> int:
        """Returns the number of agents with a connection."""
        return sum(agent.connected for agent in self.agents.values())

    def running(self, bundle: str) -> int:
        """Returns the number of agents that have committed this bundle."""
        return sum(a.held.active == bundle and a.held.phase is Phase.COMMITTED for a in self.agents.values())

    def produced(self) -> set[tuple[str, str, int]]:
        """The oracle: (agent, boot, seq) of every record."""
        return {(a.id, boot, seq) for a in self.agents.values() for boot, seq in a.produced}

    def waiting(self) -> int:
        """Records that are not acknowledged."""
        return sum(len(agent.held.records) for agent in self.agents.values())

    def figures(self) -> dict[str, Any]:
        """Returns the facts of this fleet for a report, as plain JSON."""
        total: Counter[str] = Counter()
        for agent in self.agents.values():
            total.update(agent.counters)
        bundles = Counter(a.held.active for a in self.agents.values() if a.held.phase is Phase.COMMITTED)
        return {
            "agents": len(self.agents),
            "connected": self.connected(),
            "produced": sum(len(a.produced) for a in self.agents.values()),
            "waiting": self.waiting(),
            "committed": dict(bundles),
            "phases": dict(Counter(str(a.held.phase) for a in self.agents.values())),
            "counters": dict(total),
            "slowest_turn_s": round(self.slowest_turn_s, 3),
        }


def _credentials(folder: str) -> Callable[[mqtt.Client, str], None]:
    def prepare(client: mqtt.Client, agent_id: str) -> None:
        path = Path(folder) / f"{agent_id}.password"
        client.username_pw_set(agent_id, path.read_text(encoding="utf-8").strip() if folder else "x")

    return prepare


def _certificates(folder: Path) -> Callable[[mqtt.Client, str], None]:
    """The authority in `identity` there, and `<agent>.pem` with key and chain."""

    def prepare(client: mqtt.Client, agent_id: str) -> None:
        context = ssl.create_default_context(cafile=str(folder / "identity" / SITE / "ca.pem"))
        context.load_cert_chain(folder / f"{agent_id}.pem")
        client.tls_set_context(context)

    return prepare


def main() -> int:
    """Runs a fleet until SIGTERM; prints its figures once a second as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--passwords", default="", help="folder with <agent>.password")
    parser.add_argument("--pairs", type=Path, help="folder of a site with <agent>.pem: mutual TLS")
    parser.add_argument("--reconnect-s", type=float, nargs=2, default=Manner.reconnect_s, help="between two tries")
    parser.add_argument("--every-s", type=float, default=1.0, help="between two lines")
    parser.add_argument("--window-s", type=float, default=10.0)
    parser.add_argument("--items-per-s", type=float, default=20.0)
    parser.add_argument("--verdict", default="commit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="written at the end")
    given = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    manner = Manner(
        window_s=given.window_s,
        items_per_s=given.items_per_s,
        verdict=given.verdict,
        reconnect_s=tuple(given.reconnect_s),
    )
    prepare = _certificates(given.pairs) if given.pairs else _credentials(given.passwords)
    with SimulatedFleet(given.port, given.count, manner=manner, prepare=prepare, seed=given.seed) as fleet:
        while not stop.wait(given.every_s):
            sys.stdout.write(json.dumps(fleet.figures()) + "\n")
            sys.stdout.flush()
        if given.report:
            given.report.write_text(json.dumps(fleet.figures(), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
