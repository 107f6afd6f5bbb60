"""Real processes: broker, control plane, agents; power cuts at bad moments; the demo as a person runs it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.delivery.state_file import champion_file
from models.bundle import MODEL, blobs_of, read_bundle
from models.messages import (
    MAX_REPORTED_BYTES,
    Ack,
    Event,
    Mode,
    Phase,
    RecordKind,
    Reported,
    ShadowPhase,
    decode,
    decode_batch,
    decode_packed,
    encode,
)
from models.topics import SENTINEL_TOPIC, TRUST_TOPIC, Channel, agent_topic, bin_of, bin_topic, blob_topic
from models.windows import Window
from tests.simulators.processes import free_port, running, wait_until
from tests.simulators.site import Site, embedded_mtls, make_site, mosquitto_mtls
from tests.simulators.tiny_bundle import tiny_bundle
from tests.simulators.trust_repository import Repository, Signed

ROOT = Path(__file__).resolve().parents[2]
BROKERS = [
    pytest.param(embedded_mtls, id="embedded"),
    pytest.param(mosquitto_mtls, id="mosquitto", marks=pytest.mark.mosquitto),
]


@dataclass
class Plane:
    """A small control plane at the other end of the wire: publishes bundles and assignments, acknowledges batches."""

    port: int
    repository: Repository
    site: Site | None = None
    """The site whose certificates are used; None = a broker that admits every client."""
    reported: Reported | None = None
    stored: dict[tuple[str, int], bytes] = field(default_factory=dict)
    window_keys: set[tuple[str, int]] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    repeats: int = 0
    holes: set[int] = field(default_factory=set)

    def __enter__(self) -> Self:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="plane", protocol=mqtt.MQTTv311)
        if self.site is None:
            self.client.username_pw_set("plane", "x")
        else:
            self.client.tls_set_context(self.site.tls(self.site.files / "control.pem"))
        self.client.on_message = self._take
        self.client.on_connect = lambda *_: self.client.subscribe("sortline/v1/agents/#", 1)
        self.client.connect("127.0.0.1", self.port)
        self.client.loop_start()
        self.client.publish(SENTINEL_TOPIC, b"1", 1, True)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _take(self, _client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        if message.topic.endswith("/reported"):
            self.reported = decode(message.payload, Reported, limit=MAX_REPORTED_BYTES)
        elif message.topic.endswith("/batch"):
            records = decode_batch(message.payload).records
            for record in records:
                self.repeats += (record.boot_id, record.seq) in self.stored
                if record.kind is RecordKind.WINDOW:
                    self.window_keys.add((record.boot_id, record.seq))
                if record.kind is RecordKind.EVENT:
                    self.events.append(decode_packed(record.payload, Event))
                self.stored[record.boot_id, record.seq] = record.payload
            ack = Ack(boot_id=records[-1].boot_id, from_seq=records[0].seq, through_seq=records[-1].seq)
            self.client.publish(agent_topic("line-1", Channel.ACK), encode(ack), 1)

    def windows(self) -> list[Window]:
        return [decode_packed(payload, Window) for key, payload in list(self.stored.items()) if key in self.window_keys]

    def offer(self, directory: Path, *, poison: bool = False) -> str:
        bundle = read_bundle(directory)
        self.repository.release_manifest(bundle.manifest)
        model = {chunk.sha256 for entry in bundle.manifest.files if entry.path == MODEL for chunk in entry.chunks}
        for digest, data in blobs_of(bundle.manifest, lambda entry: (directory / entry.path).read_bytes()):
            self.client.publish(blob_topic(digest), b"poison" if poison and digest in model else data, 1, True)
        return bundle.digest

    def desire(self, digest: str, generation: int, **options: object) -> None:
        document = self.repository.assign("line-1", digest, generation, **({"trial_items": 10} | options))
        self.give(self.repository.sign_changes())
        self.client.publish(agent_topic("line-1", Channel.DESIRED), document, 1, True)

    def give(self, signed: Signed) -> None:
        self.client.publish(bin_topic(bin_of("line-1")), signed.bin(), 1, True)
        self.client.publish(TRUST_TOPIC, signed.set, 1, True)

    def phase(self, phase: Phase, digest: str) -> bool:
        found = self.reported
        return found is not None and found.phase is phase and digest in {found.active, found.target}


@pytest.fixture(params=BROKERS)
def plane(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Plane]:
    opened: Callable = request.param
    site = make_site(tmp_path)
    site.identity("line-1", tmp_path / "line-1-identity")
    repository = Repository(tmp_path / "keys", now=datetime.now(UTC))
    with opened(site, tmp_path) as port, Plane(port, repository, site) as found:
        yield found
    site.engine.dispose()


def agent(plane: Plane, state: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "edge_agent", "run", "--id", "line-1", "--broker", f"127.0.0.1:{plane.port}"]
    (state / "trust").mkdir(parents=True, exist_ok=True)
    (state / "trust" / "root.json").write_bytes(plane.repository.anchor)
    environment = os.environ | {
        "SORTLINE_AGENT__BROKER__RECONNECT_MAX_S": "1.5",
        "SORTLINE_AGENT__LINE__WINDOW_S": "1",
        "SORTLINE_AGENT__IDENTITY__FOLDER": str(plane.site.folder.parent / "line-1-identity"),
    }
    with (state.parent / "log").open("ab") as log:
        return subprocess.Popen([*command, "--state-dir", str(state), *flags], cwd=ROOT, env=environment, stderr=log)


def end(process: subprocess.Popen) -> int:
    process.terminate()
    return process.wait(300)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_bundle_is_fetched_tested_tried_and_committed_and_windows_arrive_once(plane: Plane, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b", padding=400_000)
    process = agent(plane, tmp_path / "state")
    try:
        digest = plane.offer(tmp_path / "b")
        plane.desire(digest, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, digest), "the commit")
        wait_until(lambda: len(plane.stored) >= 6, "windows")
    finally:
        assert end(process) == 0
    seqs = sorted(seq for _, seq in plane.stored)
    assert seqs == list(range(len(seqs)))
    assert plane.repeats == 0


@pytest.mark.slow
@pytest.mark.parametrize("plane", BROKERS[:1], indirect=True)
def test_a_challenger_judges_in_the_shadow_and_is_promoted_without_a_second_fetch(plane: Plane, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a", bias=-2.5)
    tiny_bundle(tmp_path / "b", bias=2.5)
    champion, challenger = plane.offer(tmp_path / "a"), plane.offer(tmp_path / "b")
    process = agent(plane, tmp_path / "agent")
    try:
        plane.desire(champion, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, champion), "the champion")
        plane.desire(challenger, 2, mode=Mode.SHADOW)
        wait_until(lambda: plane.reported.shadow_running, "the challenger at work")
        wait_until(lambda: any(w.shadow_disagreed for w in plane.windows()), "disagreements")
        reported = plane.reported
        assert (reported.generation, reported.phase, reported.active) == (2, Phase.COMMITTED, champion)
        assert (reported.shadow, reported.shadow_phase) == (challenger, ShadowPhase.SHADOW)
        shadowed = [w for w in plane.windows() if w.shadow_bundle]
        assert {(w.bundle, w.shadow_bundle) for w in shadowed} == {(champion, challenger)}
        assert sum(w.shadow_compared for w in shadowed) <= sum(w.items for w in shadowed)
        wait_until(lambda: any((tmp_path / "agent" / "shadow-samples").glob("*.npz")), what="a sample")
        plane.desire(challenger, 3)
        wait_until(lambda: plane.phase(Phase.COMMITTED, challenger), "the promotion")
        assert (plane.reported.shadow, plane.reported.shadow_phase) == ("", ShadowPhase.IDLE)
        assert "fetch_stalled" not in plane.reported.counters
    finally:
        assert end(process) == 0


@pytest.mark.slow
def test_a_second_agent_on_the_same_state_is_refused(plane: Plane, tmp_path: Path) -> None:
    first = agent(plane, tmp_path / "state")
    try:
        wait_until(lambda: plane.reported is not None, "the first agent")
        second = subprocess.run(
            [sys.executable, "-m", "edge_agent", "run", "--state-dir", str(tmp_path / "state")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert second.returncode == 3
        assert "agent.already_running" in second.stderr
        assert str(first.pid) in second.stderr
    finally:
        end(first)


@pytest.mark.parametrize("poison", ["nan", "golden"])
@pytest.mark.slow
def test_a_bundle_that_fails_its_self_test_never_reaches_the_line(plane: Plane, tmp_path: Path, poison: str) -> None:
    tiny_bundle(tmp_path / "good")
    tiny_bundle(tmp_path / "bad", poison=poison)
    process = agent(plane, tmp_path / "state")
    try:
        good = plane.offer(tmp_path / "good")
        plane.desire(good, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, good), "the first commit")
        bad = plane.offer(tmp_path / "bad")
        plane.desire(bad, 2)
        wait_until(lambda: bad in plane.reported.blocked, "the refusal")
        assert plane.reported.active == good
        assert plane.reported.fault is not None
        assert plane.reported.fault.code in {"model.not_finite", "golden.mismatch"}
        plane.desire(bad, 3)
        wait_until(lambda: plane.reported.generation == 3, "the third assignment")
        assert plane.reported.active == good
        assert plane.reported.fault.code == "agent.digest_blocked"
    finally:
        end(process)


@pytest.mark.slow
def test_a_trial_that_judges_too_little_goes_back(plane: Plane, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a")
    tiny_bundle(tmp_path / "b", bias=1.0)
    process = agent(plane, tmp_path / "state")
    try:
        first, second = plane.offer(tmp_path / "a"), plane.offer(tmp_path / "b")
        plane.desire(first, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, first), "the first commit")
        plane.desire(second, 2, trial_items=100_000, trial_s=2.0)
        wait_until(lambda: plane.phase(Phase.ROLLED_BACK, first), "the rollback")
        assert plane.reported.blocked == (second,)
    finally:
        end(process)


def events(plane: Plane) -> list[Event]:
    """All events that arrived, in the order in which they happened."""
    return sorted(plane.events, key=lambda event: event.at_ms)


@pytest.mark.slow
def test_a_model_that_fails_late_is_rolled_back(plane: Plane, tmp_path: Path) -> None:
    """It passes its self-test and fails on the line's first items: the old one judges again, the digest is blocked."""
    tiny_bundle(tmp_path / "good")
    tiny_bundle(tmp_path / "late", poison="late")
    process = agent(plane, tmp_path / "state")
    try:
        good, late = plane.offer(tmp_path / "good"), plane.offer(tmp_path / "late")
        plane.desire(good, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, good), "the first commit")
        plane.desire(late, 2, trial_items=1000, trial_s=60.0)
        wait_until(lambda: late in plane.reported.blocked, "the rollback")
        assert (plane.reported.phase, plane.reported.active) == (Phase.ROLLED_BACK, good)
        codes = lambda: [event.code for event in events(plane)]  # noqa: E731
        wait_until(lambda: codes().count("bundle.swapped") >= 3, "the swap back")
        assert "selftest.passed" in codes()
        failed = next(event for event in events(plane) if event.facts.get("bundle") == late and "model." in event.code)
        back = next(e for e in events(plane) if e.code == "bundle.swapped" and e.at_ms >= failed.at_ms)
        assert back.facts["bundle"] == good
        sys.stdout.write(f"line gap {back.at_ms - failed.at_ms} ms\n")
    finally:
        end(process)


@pytest.mark.slow
def test_a_line_that_dies_in_the_trial_falls_back_at_once_and_after_two_tries_for_good(
    plane: Plane, tmp_path: Path
) -> None:
    tiny_bundle(tmp_path / "good")
    tiny_bundle(tmp_path / "new", bias=0.5)
    process = agent(plane, tmp_path / "state")
    state = lambda: champion_file(tmp_path / "state").load()  # noqa: E731
    try:
        good, new = plane.offer(tmp_path / "good"), plane.offer(tmp_path / "new")
        plane.desire(good, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, good), "the first commit")
        plane.desire(new, 2, trial_items=100_000, trial_s=600.0)
        for tries in (1, 2):
            wait_until(lambda: plane.phase(Phase.TRIAL, new) and plane.reported.items_on_active > 0, "the trial")
            assert state().tries == tries
            line, spare = sorted(children(process.pid), key=threads_of, reverse=True)
            os.kill(line, signal.SIGSEGV)
            taken = lambda: [e for e in events(plane) if e.code == "line.taken_over"]  # noqa: E731
            wait_until(lambda tries=tries, taken=taken: len(taken()) == tries, "the standby")
            assert taken()[-1].facts["bundle"] == good
            assert spare in children(process.pid)
            assert line not in children(process.pid)
            assert state().tries == (1 if tries == 1 else 0)
        wait_until(lambda: new in plane.reported.blocked, "the rollback")
        assert (plane.reported.phase, plane.reported.active) == (Phase.ROLLED_BACK, good)
        wait_until(lambda: plane.reported.items_on_active > 0, "the old bundle at work")
        wait_until(lambda: children(process.pid) == [spare], "no standby, since there is no trial")
        assert plane.reported.counters["standby_takeovers"] == 2
        assert "standby_died" not in plane.reported.counters
    finally:
        assert end(process) == 0
    windows = sorted(plane.windows(), key=lambda window: window.started_ms)
    assert [w.lifetime_items for w in windows] == sorted(w.lifetime_items for w in windows)
    for before, after in itertools.pairwise(windows):
        assert before.started_ms + before.duration_ms <= after.started_ms + 2, "two lines judged at the same time"


def threads_of(pid: int) -> int:
    """A line at work has many, a standby few."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.slow
def test_a_line_that_is_killed_comes_back_with_the_same_bundle(plane: Plane, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a")
    process = agent(plane, tmp_path / "state")
    try:
        digest = plane.offer(tmp_path / "a")
        plane.desire(digest, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, digest), "the commit")
        before = plane.reported.items_on_active
        (line,) = children(process.pid)
        os.kill(line, signal.SIGKILL)
        wait_until(lambda: children(process.pid) not in ([], [line]), "a new line")
        wait_until(lambda: 0 < plane.reported.items_on_active < before + 10_000, "items again")
        assert plane.reported.active == digest
        gone_ms = lambda: next((e.at_ms for e in plane.events if e.code == "line.gone"), sys.maxsize)  # noqa: E731
        wait_until(lambda: any(w.started_ms > gone_ms() and w.items for w in plane.windows()), "its windows")
    finally:
        assert end(process) == 0
    # OpenCV by the first line, ONNX Runtime with its first bundle: the second line takes that over.
    assert [event.code for event in plane.events].count("line.tuned") == 2


@pytest.mark.slow
@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.SELF_TEST, Phase.TRIAL])
def test_a_power_cut_in_any_phase_ends_in_the_right_bundle(plane: Plane, tmp_path: Path, phase: Phase) -> None:
    tiny_bundle(tmp_path / "a", padding=3_000_000)
    process = agent(plane, tmp_path / "state")
    try:
        digest = plane.offer(tmp_path / "a")
        plane.desire(digest, 1, trial_items=30)
        wait_until(lambda: plane.reported and plane.reported.phase in {phase, Phase.COMMITTED}, phase)
        killed = children(process.pid)
        process.kill()
        process.wait()
        process = agent(plane, tmp_path / "state")
        wait_until(lambda: plane.phase(Phase.COMMITTED, digest), "the commit after the power cut")
        for pid in killed:
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists() or _zombie(pid), "the old line's end")
    finally:
        end(process)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_poisoned_chunks_are_reported_and_never_committed(plane: Plane, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a")
    process = agent(plane, tmp_path / "state")
    try:
        digest = plane.offer(tmp_path / "a", poison=True)
        plane.desire(digest, 1)
        wait_until(
            lambda: plane.reported and plane.reported.fault and plane.reported.fault.code == "delivery.poisoned_chunk",
            "the report",
        )
        assert plane.reported.active == ""
        plane.offer(tmp_path / "a")
        wait_until(lambda: plane.phase(Phase.COMMITTED, digest), "the commit after the repair")
    finally:
        end(process)


@pytest.mark.slow
def test_a_broker_that_loses_its_store_is_filled_again(tmp_path: Path) -> None:
    """The real control plane and the sentinel: after a broker restart everything retained is there again."""
    from control_plane.database.engine import writing
    from control_plane.database.tables.agents import Agent
    from control_plane.database.tables.columns import utc_now
    from control_plane.registry.versions import register
    from tests.simulators.plane import make_services, release

    tiny_bundle(tmp_path / "b")
    port = free_port()
    command = [sys.executable, "-m", "control_plane.broker", "--anonymous", "--port", str(port)]
    services = make_services(tmp_path / "plane", port=port)
    with writing(services.engine) as session:
        digest = register(session, services.store, tmp_path / "b", actor="t", now=utc_now()).bundle
        session.add(Agent(id="line-1", generation=4, desired_bundle=digest))
        session.commit()
    release(services, digest)
    services.start_fleet()
    try:
        for life in (1, 2):
            with running(command, stdout=subprocess.DEVNULL):
                wait_until(lambda: services.connection.connected, "the connection")
                wait_until(lambda life=life: services.counters["republished"] >= life, "the republication")
                with Plane(port, Repository(tmp_path / f"keys-{life}")) as watcher:
                    _hears_desired(watcher)
    finally:
        services.stop_fleet()
        services.engine.dispose()


def _hears_desired(watcher: Plane) -> None:
    seen = threading.Event()
    watcher.client.on_message = lambda _c, _d, m: seen.set() if m.topic.endswith("/desired") else None
    watcher.client.subscribe(agent_topic("line-1", Channel.DESIRED), 1)
    assert seen.wait(300.0)


@pytest.mark.slow
def test_a_port_in_use_is_said_with_what_to_do(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "control_plane", "serve", "--port", str(port), "--data-dir", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 4
    assert "server.port_in_use" in done.stderr


@pytest.mark.slow
def test_the_demo_does_the_whole_loop_and_leaves_nothing_behind(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "control_plane", "demo", "--seconds", "20", "--report", str(report), "--port", "0"]
    done = subprocess.run(
        [*command, "--items", "160", "--agents", "2", "--data-dir", str(tmp_path / "demo")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(report.read_text())
    assert facts["ok"]
    assert facts["rollout"]["state"] == "completed"
    for found in facts["agents"]:
        assert found["active"] == facts["training"]["bundle"]
        assert found["items"] > 100
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "demo")], capture_output=True, text=True, check=False)
    assert left.stdout == ""
