"""Nothing unproven passes the gate, nothing proven waits for ever; verification is the real process."""

import queue
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import TrustConfig
from edge_agent.trust.verifier import AssignmentVerifier, Verified
from edge_agent.trust.verify import TRUSTED, Question, answer
from models.errors import MessageError, SortlineError
from models.messages import Desired
from tests.simulators.trust_repository import Repository, Signed


@dataclass
class Host:
    counters: Counter[str] = field(default_factory=Counter)
    events: queue.Queue = field(default_factory=queue.Queue)
    faults: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    generation: int = 0
    now: float = 1000.0

    def enqueue(self, event: object) -> bool:
        self.events.put(event)
        return True

    def event(self, code: str, message: str, **facts: str) -> None:
        self.said.append(code)

    def report_error(self, error: SortlineError) -> None:
        self.faults.append(error.code)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository", now=datetime.now(UTC).replace(microsecond=0))


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def gate(repository: Repository, host: Host, tmp_path: Path) -> AssignmentVerifier:
    found = AssignmentVerifier(
        tmp_path / "agent", TrustConfig(), "line-1", host, lambda: host.generation, lambda: host.now
    )
    found.folder.mkdir(parents=True)
    (found.folder / "root.json").write_bytes(repository.anchor)
    return found


def turn(gate: AssignmentVerifier, host: Host, after_s: float = 1.0) -> Desired | None:
    """Lets time pass and waits for the process if one was started."""
    host.now += after_s
    gate.tick()
    if not gate._running:
        return None
    event = host.events.get(timeout=300)
    assert isinstance(event, Verified)
    return gate.done(event)


def assigned(repository: Repository, generation: int = 1, content: bytes = b"model") -> tuple[Signed, bytes]:
    document = repository.assign("line-1", repository.release(content), generation)
    return repository.sign_changes(), document


def offer(gate: AssignmentVerifier, signed: Signed) -> None:
    """Delivers the set as a broker does, in two retained messages."""
    gate.offer_bin(signed.bin())
    gate.offer_set(signed.set)


def test_a_proven_assignment_passes_once_in_whatever_order_it_came(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    offered, document = assigned(repository, 3)
    gate.offer_document(document)
    assert turn(gate, host) is None
    assert host.faults == ["trust.no_set"]
    offer(gate, offered)
    assert turn(gate, host).generation == 3
    assert gate.facts["timestamp_version"] == "1"
    assert turn(gate, host) is None
    # Hourly metadata is looked at later, and the assignment stays what it is.
    offer(gate, repository.sign_changes())
    assert turn(gate, host, 10.0) is None
    assert turn(gate, host, 300.0).generation == 3
    assert gate.facts["timestamp_version"] == "2"


@pytest.mark.slow
def test_a_late_set_is_no_attack_and_a_missing_one_is_reported(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    offered, document = assigned(repository)
    offer(gate, offered)
    gate.offer_document(document)
    assert turn(gate, host) is not None
    host.generation = 1
    newer, second = assigned(repository, 2, b"better")
    gate.offer_document(second)
    assert turn(gate, host) is None
    assert host.faults == []
    assert turn(gate, host, 4.0) is None
    assert host.faults == ["trust.wrong_assignment"]
    assert host.counters["refused_trust.wrong_assignment"] == 2
    offer(gate, newer)
    assert turn(gate, host).generation == 2


@pytest.mark.parametrize("order", ["set bin document", "document set bin", "bin document set"])
@pytest.mark.slow
def test_three_parts_that_come_a_second_apart_are_no_attack(
    repository: Repository, gate: AssignmentVerifier, host: Host, order: str
) -> None:
    old, old_document = assigned(repository)
    offer(gate, old)
    gate.offer_document(old_document)
    assert turn(gate, host).generation == 1
    host.generation = 1
    new, document = assigned(repository, 2, b"better")
    give = {
        "set": lambda: gate.offer_set(new.set),
        "bin": lambda: gate.offer_bin(new.bin()),
        "document": lambda: gate.offer_document(document),
    }
    accepted = []
    for part in order.split():
        give[part]()
        accepted.append(turn(gate, host))
    accepted += [turn(gate, host, 3.0) for _ in range(3)]
    assert host.faults == []
    assert max(found.generation for found in accepted if found) == 2


def test_a_missing_bin_is_reported_until_it_arrives(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    offered, document = assigned(repository)
    gate.offer_set(offered.set)
    gate.offer_document(document)
    assert turn(gate, host) is None
    assert host.faults == []
    assert turn(gate, host, 3.0) is None
    assert host.faults == ["trust.incomplete"]
    gate.offer_bin(offered.bin())
    assert turn(gate, host).generation == 1


@pytest.mark.slow
def test_a_thief_who_sends_parts_that_do_not_fit_all_the_time_is_reported(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    offered, document = assigned(repository)
    gate.offer_document(document)
    for n in range(4):
        gate.offer_set(offered.set)
        gate.offer_bin(b"{}" + b" " * n)
        assert turn(gate, host) is None
    assert host.faults == ["trust.mixed"]


def test_a_replayed_set_changes_nothing_and_alarms_only_where_something_new_was_wanted(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    old, old_document = assigned(repository)
    newer, document = assigned(repository, 2, b"better")
    offer(gate, newer)
    gate.offer_document(document)
    assert turn(gate, host).generation == 2
    host.generation = 2
    offer(gate, old)
    gate.offer_document(old_document)
    assert turn(gate, host) is None
    assert host.counters["refused_trust.rollback"] == 1
    assert host.faults == []


def test_an_agent_without_anchor_says_so_and_begins_when_it_gets_one(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    (gate.folder / "root.json").unlink()
    offered, document = assigned(repository)
    offer(gate, offered)
    gate.offer_document(document)
    assert turn(gate, host) is None
    assert host.faults == ["trust.no_anchor"]
    (gate.folder / "root.json").write_bytes(repository.anchor)
    assert turn(gate, host, 31.0) is not None


def test_a_broken_memory_is_set_aside_and_trust_begins_at_the_anchor(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    (gate.folder / TRUSTED).write_bytes(b"\0" * 40)
    offered, document = assigned(repository)
    offer(gate, offered)
    gate.offer_document(document)
    assert turn(gate, host) is not None
    assert host.said == ["trust.memory_broken"]
    assert (gate.folder / f"{TRUSTED}.broken").exists()
    assert not (gate.folder / "scratch").exists()


@pytest.mark.slow
def test_a_clock_that_is_behind_is_said_once_and_does_not_stop_updates(
    repository: Repository, gate: AssignmentVerifier, host: Host
) -> None:
    repository.later(minutes=10)
    for generation in (1, 2, 3):
        offered, document = assigned(repository, generation, str(generation).encode())
        offer(gate, offered)
        gate.offer_document(document)
        assert turn(gate, host).generation == generation
    assert host.said == ["clock.behind"]
    assert int(gate.facts["clock_behind_s"]) > 500


def test_garbage_is_refused_before_a_process_is_started(gate: AssignmentVerifier, host: Host) -> None:
    for payload in (b"", b"{}", b"x" * 9000):
        with pytest.raises(MessageError):
            gate.offer_document(payload)
    with pytest.raises(MessageError):
        gate.offer_set(b"x" * 200_000)
    with pytest.raises(MessageError):
        gate.offer_bin(b"x" * 200_000)
    assert turn(gate, host) is None
    assert host.faults == []


def test_a_verifier_that_crashes_accepts_nothing(
    repository: Repository, gate: AssignmentVerifier, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered, document = assigned(repository)
    offer(gate, offered)
    gate.offer_document(document)
    monkeypatch.setattr("edge_agent.trust.verifier.sys.executable", "/bin/false")
    assert turn(gate, host) is None
    assert host.faults == ["trust.crashed"]
    monkeypatch.undo()
    assert turn(gate, host, 31.0) is not None


def test_trusted_metadata_is_on_disk_before_the_answer(repository: Repository, tmp_path: Path) -> None:
    offered, document = assigned(repository)
    root = tmp_path / "root.json"
    root.write_bytes(repository.anchor)
    question = Question(offered=offered.set, bin=offered.bin(), document=document)
    folder = tmp_path / "trust"
    given = {"folder": folder, "root": root, "agent_id": "line-1", "now": repository.now}
    found = answer(question, **given)
    assert found.desired is not None
    kept = (folder / TRUSTED).read_bytes()
    folder.joinpath(TRUSTED).unlink()
    folder.joinpath(TRUSTED).mkdir()  # the disk refuses
    with pytest.raises(OSError):  # noqa: PT011  any refusal of the disk
        answer(question, **given)
    folder.joinpath(TRUSTED).rmdir()
    folder.joinpath(TRUSTED).write_bytes(kept)
    assert answer(question, **given) == msgspec.structs.replace(found)
