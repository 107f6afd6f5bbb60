"""Builds what an agent reports about itself (`models.messages.Reported`) from the parts of the supervisor."""

import os
import platform
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import AgentConfig
from edge_agent.delivery.challenger import Challenger
from edge_agent.delivery.updater import Updater
from edge_agent.mqtt import Link
from edge_agent.supervisor.conditions import Conditions
from edge_agent.supervisor.journal import Journal
from edge_agent.supervisor.line_control import LineControl
from edge_agent.supervisor.lots import Lots
from edge_agent.telemetry.spool import Spool
from edge_agent.trust.verifier import AssignmentVerifier
from models.messages import Reported, wall_ms


@dataclass(frozen=True, slots=True)
class Report:
    """The parts of one agent that its report is built from."""

    config: AgentConfig
    boot_id: str
    journal: Journal
    updater: Updater
    challenger: Challenger
    lots: Lots
    line: LineControl
    spool: Spool
    link: Link
    verifier: AssignmentVerifier
    conditions: Conditions

    def build(self) -> Reported:
        """Returns the state of the agent now."""
        state, beat = self.updater.state, self.line.beat
        shadow = self.challenger.state
        return Reported(
            boot_id=self.boot_id,
            at_ms=wall_ms(),
            generation=state.generation,
            phase=state.phase,
            active=state.active,
            previous=state.previous,
            safe_state=self.updater.safe_state,
            target=state.target,
            progress=round(self.updater.progress(beat), 3),
            items_on_active=beat.items_on_bundle if beat and beat.digest == state.active else 0,
            blocked=state.blocked,
            shadow_phase=shadow.phase,
            shadow=shadow.digest,
            shadow_running=bool(self.challenger.running),
            fault=self.journal.fault,
            line_running=self.line.line_ready,
            camera=self.line.camera,
            camera_fault=beat.camera_fault if beat else "",
            conditions=self.conditions.standing,
            lot=self.lots.running(beat),
            spool_records=self.spool.depth,
            spool_dropped=self.spool.dropped,
            counters={**self.journal.counters, **{f"link_{k}": v for k, v in self.link.counters.items()}},
            versions={"python": platform.python_version()},
            hardware=box_facts(self.link.address) | self.line.tuned,
            trust=self.verifier.facts,
            lanes=self.line.lanes,
            labels=self.config.labels,
            rss_mb=resident_mb((os.getpid(), *self.line.keeper.pids)),
        )


def box_facts(address: str) -> dict[str, str]:
    """Describes this box; host name and address distinguish two boxes that use one identity.

    Args:
        address: Its own address in the connection to the broker; empty = not known.
    """
    facts = {"machine": platform.machine(), "cores": str(os.cpu_count() or 1), "host": socket.gethostname()[:64]}
    return facts | ({"address": address} if address else {})


def resident_mb(pids: Iterable[int]) -> float:
    """Returns the resident memory of these processes together, in megabytes; ended processes count as 0."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
