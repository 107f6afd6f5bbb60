"""Trust through the real broker with real processes: ceremonies as commands, releases, thieves, a stick."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from control_plane.broker.access import Role, add_identities
from control_plane.client import Client
from models.errors import ConflictError, SortlineError
from models.messages import Desired, Phase, encode
from models.topics import Channel, agent_topic
from tests.integration.test_whole_system import Plane, agent, end
from tests.simulators.processes import embedded_broker, free_port, running, wait_until
from tests.simulators.site import embedded_mtls, make_site
from tests.simulators.tiny_bundle import tiny_bundle
from tests.simulators.trust_repository import Repository, Signed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_publications_of_a_thief_change_nothing_on_a_running_line(tmp_path: Path) -> None:
    """The thief has the broker; then also the online keys of another installation; then an old set of this one."""
    tiny_bundle(tmp_path / "good")
    tiny_bundle(tmp_path / "evil", bias=1.0)
    repository = Repository(tmp_path / "keys", now=datetime.now(UTC))
    site = make_site(tmp_path)
    site.identity("line-1", tmp_path / "line-1-identity")
    with embedded_mtls(site, tmp_path) as port, Plane(port, repository, site) as plane:
        process = agent(plane, tmp_path / "state")
        try:
            good = plane.offer(tmp_path / "good")
            old_document = repository.assign("line-1", good, 1)
            old_set = repository.sign_changes()
            plane.desire(good, 2)
            wait_until(lambda: plane.phase(Phase.COMMITTED, good), "the commit")
            stranger = Repository(tmp_path / "stranger", now=datetime.now(UTC))
            thief = Plane(port, stranger, site)
            thief.client = plane.client
            evil = thief.offer(tmp_path / "evil")

            def publish(signed: Signed | None, document: bytes, refusal: str) -> None:
                before = plane.reported.counters.get(f"refused_{refusal}", 0)
                if signed is not None:
                    plane.give(signed)
                plane.client.publish(agent_topic("line-1", Channel.DESIRED), document, 1, True)
                wait_until(
                    lambda: plane.reported.counters.get(f"refused_{refusal}", 0) > before, f"a refusal: {refusal}"
                )
                assert plane.reported.active == good
                assert plane.reported.generation == 2
                assert plane.reported.line_running

            publish(None, encode(Desired(generation=3, bundle=evil)), "trust.wrong_assignment")
            publish(stranger.sign_changes(), stranger.assign("line-1", evil, 4), "trust.unsigned")
            publish(old_set, old_document, "trust.rollback")
            held_back = repository.assign("line-1", good, 4)
            publish(replace(repository.sign_changes(), bins=old_set.bins), held_back, "trust.mixed")
            plane.desire(good, 5)
            wait_until(lambda: plane.reported.generation == 5, "the true one again")
        finally:
            assert end(process) == 0


def sortline(*arguments: str, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "control_plane", *arguments],
        cwd=ROOT,
        env=os.environ | {"SORTLINE_KEY_PASSPHRASE": "a passphrase in a test"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def keys(tmp_path: Path) -> list[str]:
    """Three root keys and a release key on media of their own; public metadata in `plane/trust`."""
    roots = [str(tmp_path / f"usb-{n}" / "root.pem") for n in (1, 2, 3)]
    release = str(tmp_path / "usb-4" / "release.pem")
    flags = [flag for path in roots for flag in ("--root-key", path)]
    sortline("keys", "init", "--trust", str(tmp_path / "plane" / "trust"), *flags, "--release-key", release)
    return [*roots, release]


@pytest.fixture
def site(tmp_path: Path, keys: list[str]) -> Iterator[tuple[str, int]]:
    """A control plane and a broker as a plant runs them; yields URL and broker port."""
    credentials = tmp_path / "ids.json"
    passwords = add_identities(credentials, {"control-plane": Role.CONTROL_PLANE, "line-1": Role.AGENT})
    for name, password in passwords.items():
        (tmp_path / f"{name}.password").write_text(password)
    port = free_port()
    with embedded_broker(tmp_path, "--credentials", str(credentials)) as broker_port:
        environment = os.environ | {
            "SORTLINE__DATA_DIR": str(tmp_path / "plane"),
            "SORTLINE__SERVER__PORT": str(port),
            "SORTLINE__BROKER__PORT": str(broker_port),
            "SORTLINE__BROKER__PASSWORD_FILE": str(tmp_path / "control-plane.password"),
            "SORTLINE__JOBS__WORKERS": "0",
        }
        command = [sys.executable, "-m", "control_plane", "serve"]
        with (tmp_path / "log").open("ab") as log, running(command, cwd=ROOT, env=environment, stderr=log):
            client = Client(f"http://127.0.0.1:{port}")
            wait_until(lambda: _answers(client), "the control plane")
            yield client.url, broker_port
            client._http.close()


def _answers(client: Client) -> bool:
    try:
        return bool(client.get("/readyz")["ready"])
    except SortlineError:
        return False


def run_agent(tmp_path: Path, name: str, port: int) -> subprocess.Popen:
    state = tmp_path / name
    (state / "trust").mkdir(parents=True, exist_ok=True)
    anchor = (tmp_path / "plane" / "trust" / "1.root.json").read_bytes()
    (state / "trust" / "root.json").write_bytes(anchor)
    command = [sys.executable, "-m", "edge_agent", "run", "--id", name, "--broker", f"127.0.0.1:{port}"]
    with (tmp_path / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--password-file", str(tmp_path / "line-1.password"), "--state-dir", str(state)],
            cwd=ROOT,
            stderr=log,
        )


def committed(client: Client, digest: str) -> bool:
    try:
        found = client.get("/api/v1/agents/line-1")
    except SortlineError:
        return False
    return found["active"] == digest and found["phase"] == "committed"


@pytest.mark.slow
def test_a_plant_with_offline_keys_from_ceremony_to_stick(
    tmp_path: Path, keys: list[str], site: tuple[str, int]
) -> None:
    url, broker_port = site
    client, release = Client(url), keys[3]
    first = tiny_bundle(tmp_path / "b1", padding=300_000).digest
    second = tiny_bundle(tmp_path / "b2", bias=0.5).digest
    online = run_agent(tmp_path, "line-1", broker_port)
    offline = None
    try:
        assert client.get("/healthz")["trust"] == "ok"
        sortline("models", "push", str(tmp_path / "b1"), "--server", url)
        wait_until(lambda: _known(client), "the agent")
        with pytest.raises(ConflictError, match="release it first"):
            client.post("/api/v1/rollouts", {"model": "tiny", "waves": ["100%"], "trial_items": 10, "actor": "t"})
        sortline("models", "release", "tiny", "--key", release, "--server", url)
        client.post("/api/v1/rollouts", {"model": "tiny", "waves": ["100%"], "trial_items": 10, "actor": "t"})
        wait_until(lambda: committed(client, first), "the first commit")
        # After a theft: new online keys, signed by two root keys; the agent follows without being touched.
        trust = tmp_path / "plane" / "trust"
        assert "targets 2" in sortline("keys", "pull", "--trust", str(trust), "--server", url)
        printed = sortline(
            "keys", "rotate", "online", "--trust", str(trust), "--key", keys[0], "--release-key", release
        )
        assert "1 more signature" in printed
        sortline("keys", "sign", "--trust", str(trust), "--key", keys[1])
        assert "root 2" in sortline("keys", "push", "--trust", str(trust), "--server", url)
        sortline("models", "push", str(tmp_path / "b2"), "--server", url)
        sortline("models", "release", "tiny:2", "--key", release, "--server", url)
        client.post("/api/v1/rollouts", {"model": "tiny:2", "waves": ["100%"], "trial_items": 10, "actor": "t"})
        wait_until(lambda: committed(client, second), "the commit under the new root")
        assert client.get("/api/v1/agents/line-1")["reported"]["trust"]["root_version"] == "2"
        rows = json.loads(sortline("keys", "status", "--server", url, "--json"))["roles"]
        assert {row["role"]: row["alarm"] for row in rows} == dict.fromkeys(
            ("root", "targets", "assign", "snapshot", "timestamp", "bins"), ""
        )
        # The same line without network: what the stick carries is verified the same way.
        assert end(online) == 0
        (tmp_path / "stick").mkdir()
        (tmp_path / "stick" / "holiday.jpg").write_bytes(b"a stick holds other files, too")
        export = ("export", "--agent", "line-1", "--to", str(tmp_path / "stick"), "--server", url)
        sortline(*export)
        assert ", 0 of them new" in sortline(*export), "a weekly export changes what changed"
        offline_state = tmp_path / "line-1-offline"
        (offline_state / "trust").mkdir(parents=True)
        (offline_state / "trust" / "root.json").write_bytes((trust / "1.root.json").read_bytes())
        flags = ["--id", "line-1", "--state-dir", str(offline_state)]
        taken = _agent("import", str(tmp_path / "stick"), *flags)
        assert second in taken
        offline = subprocess.Popen(
            [sys.executable, "-m", "edge_agent", "run", *flags, "--broker", f"127.0.0.1:{free_port()}"],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: _active(offline_state) == second, "the bundle of the stick in use")
        desired = tmp_path / "stick" / "sortline" / "line-1" / "desired.json"
        desired.write_bytes(encode(Desired(generation=99, bundle=first)))
        assert "trust.wrong_assignment" in _agent("import", str(tmp_path / "stick"), *flags, status=1)
    finally:
        client._http.close()
        for process in (online, offline):
            if process is not None and process.poll() is None:
                end(process)


def _known(client: Client) -> bool:
    return any(a["id"] == "line-1" and a["reported_age_s"] is not None for a in client.get("/api/v1/agents"))


def _agent(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def _active(state: Path) -> str:
    try:
        facts = json.loads(_agent("status", "--state-dir", str(state), "--json"))
    except AssertionError:
        return ""
    return str(facts["active"]) if facts["phase"] == "committed" else ""


@pytest.mark.slow
def test_ceremonies_are_commands_that_need_no_server(tmp_path: Path, keys: list[str]) -> None:
    trust = ["--trust", str(tmp_path / "plane" / "trust")]
    assert "keys.already_initialised" in sortline("keys", "init", *trust, "--release-key", "x", status=3)
    tiny_bundle(tmp_path / "b")
    assert "is released" in sortline("keys", "sign", str(tmp_path / "b"), *trust, "--key", keys[3])
    assert "trust.not_enough_signatures" in sortline(
        "keys", "sign", str(tmp_path / "b"), *trust, "--key", keys[0], status=1
    )
    table = sortline("keys", "status", *trust)
    assert "2 of 3" in table
    assert "DEVELOPMENT" not in table
    dev = ["--trust", str(tmp_path / "dev")]
    assert "DEVELOPMENT KEYS" in sortline("keys", "init", "--development", *dev)
    assert "DEVELOPMENT KEYS" in sortline("keys", "status", *dev)
