"""Verifies one desired state in a process of its own: `-m edge_agent.trust.verify --folder D --root F --agent ID`.

The libraries of signatures take memory and read hostile bytes: they live here for half a second, never in the
supervisor. Reads one MessagePack `Question` from standard input, prints one JSON `Answer`; exit status 0 = accepted.
What is trusted from now on is on disk before the answer is given. Rules: `models.trust`.
"""

import argparse
import fcntl
import resource
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edge_agent.trust.question import Answer, Question
from models.errors import SortlineError, TrustError
from models.files import write_atomically
from models.messages import fault_of
from models.signed_set import MAX_SET_BYTES, MAX_TRUSTED_BYTES, parse_set
from models.trust import Outcome, verify

TRUSTED = "trusted.json"
MAX_ROOT_BYTES = 64 * 1024
_CPU_S = 20
_MEMORY_BYTES = 768 * 1024 * 1024


def answer(question: Question, *, folder: Path, root: Path, agent_id: str, now: datetime) -> Answer:
    """Verifies, persists what is trusted, answers.

    Args:
        question: The unverified documents.
        folder: The agent's trust folder: `trusted.json`; one process at a time works in it.
        root: The trust anchor.
        agent_id: The agent to which the assignment must belong.
        now: The machine's clock.

    Raises:
        OSError: The disk refused; nothing was accepted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            anchor = _read(root, MAX_ROOT_BYTES)
        except OSError as error:
            return _refused(
                TrustError(
                    "trust.no_anchor",
                    f"{root} cannot be read; put the root of this installation there.",
                    expected="root.json",
                    got=error.strerror,
                )
            )
        trusted, quarantined = _memory(folder / TRUSTED)
        scratch = folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            outcome = verify(
                question.offered,
                question.bin,
                question.document,
                agent_id=agent_id,
                anchor=anchor,
                trusted=trusted,
                now=now,
                scratch=scratch,
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if outcome.trusted != trusted:
            write_atomically(folder / TRUSTED, outcome.trusted)
        return _answer(outcome, quarantined)


def _answer(outcome: Outcome, quarantined: str) -> Answer:
    refused = _refused(outcome.error) if outcome.error else Answer()
    desired = outcome.assignment.desired if outcome.assignment else None
    return msgspec.structs.replace(refused, desired=desired, facts=outcome.facts, quarantined=quarantined)


def _refused(error: SortlineError) -> Answer:
    return Answer(fault=fault_of(error))


def _memory(path: Path) -> tuple[bytes, str]:
    """Returns the trusted metadata; a broken file is set aside, and trust begins again at the anchor."""
    if not path.exists():
        return b"", ""
    data = _read(path, MAX_TRUSTED_BYTES)
    try:
        parse_set(data, MAX_TRUSTED_BYTES)
    except TrustError:
        broken = path.with_name(f"{path.name}.broken")
        path.replace(broken)
        return b"", str(broken)
    return data, ""


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(limit + 1)


def main(argv: list[str] | None = None) -> int:
    """Runs the process."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.trust.verify", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the agent's trust folder")
    parser.add_argument("--root", type=Path, required=True, help="the trust anchor, root.json")
    parser.add_argument("--agent", required=True, help="agent id")
    arguments = parser.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    data = sys.stdin.buffer.read(5 * MAX_SET_BYTES)
    try:
        question = msgspec.msgpack.decode(data, type=Question)
        found = answer(
            question, folder=arguments.folder, root=arguments.root, agent_id=arguments.agent, now=datetime.now(UTC)
        )
    except msgspec.MsgspecError as error:
        found = _refused(TrustError("trust.malformed", "This is no question.", expected="Question", got=error))
    except OSError as error:
        found = _refused(TrustError("trust.not_persisted", "The disk refuses to keep what is trusted.", got=error))
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    return 0 if found.fault is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
