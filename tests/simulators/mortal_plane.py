"""A control plane as a process that ends or stops itself, by a real signal, at a chosen point of a rollout turn.

`python -m tests.simulators.mortal_plane POINT`: SIGKILL at the first turn that has something to do, at

* `before-commit`: the steps are written in the transaction, which is not committed;
* `before-publish`: committed and not yet published;
* `after-publish`: published;
* `stop-after-lease`: SIGSTOP (not KILL) after the lease was taken and before the turn's transaction;
* `never`.

Configuration comes from the environment, as for `sortline serve`.
"""

import logging
import os
import signal
import sys
from datetime import datetime

from control_plane import services
from control_plane.config import load_control_plane_config
from control_plane.rollouts.executor import RolloutExecutor
from control_plane.server import serve

POINTS = ("before-commit", "before-publish", "after-publish")


class MortalExecutor(RolloutExecutor):
    point = "never"
    stopped = False

    def carry_out(self, session, rollout, parts, steps, now):  # type: ignore[no-untyped-def]
        changed = super().carry_out(session, rollout, parts, steps, now)
        self.worked = bool(steps)
        if steps and self.point == "before-commit":
            session.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return changed

    def _advance(self, rollout_id: int, fence: int, now: datetime) -> int:
        if self.point == "stop-after-lease" and not self.stopped and self.to_do(rollout_id):
            MortalExecutor.stopped = True
            sys.stderr.write("stopping\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGSTOP)
        return super()._advance(rollout_id, fence, now)

    def to_do(self, rollout_id: int) -> bool:
        """Returns whether an agent still waits for the bundle."""
        from sqlmodel import select

        from control_plane.database.engine import reading
        from control_plane.database.tables.rollouts import RolloutAgent

        with reading(self._engine) as session:
            query = select(RolloutAgent).where(RolloutAgent.rollout_id == rollout_id, RolloutAgent.generation == 0)
            return session.exec(query).first() is not None

    def publish(self, agent_ids: list[str]) -> None:
        working = getattr(self, "worked", False)
        if working and self.point == "before-publish":
            os.kill(os.getpid(), signal.SIGKILL)
        super().publish(agent_ids)
        if working and self.point == "after-publish":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    MortalExecutor.point = sys.argv[1]
    services.RolloutExecutor = MortalExecutor  # type: ignore[misc]
    raise SystemExit(serve(load_control_plane_config(None)))
