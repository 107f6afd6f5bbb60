"""The API and the pages: clean answers, guarded changes, errors that name what came, pages that work offline."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from control_plane.cli import main
from control_plane.config import ControlPlaneConfig, ServerConfig, load_control_plane_config
from control_plane.database.engine import reading
from control_plane.database.tables.columns import utc_now
from control_plane.pages import charts
from control_plane.services import Services
from models.bundle import pack, read_bundle
from models.errors import ConfigError
from models.messages import Event, Live, Phase, Presence, encode
from models.profile import FeatureCounter
from models.topics import Channel, agent_topic
from tests.control_plane.fleet.test_fleet import BOOT, batch, reported, window
from tests.simulators.plane import make_client, make_services, release, withdraw
from tests.simulators.processes import wait_until
from tests.simulators.tiny_bundle import tiny_bundle


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


@pytest.fixture
def client(services: Services) -> Iterator[TestClient]:
    with make_client(services) as found:
        yield found


def fill(services: Services, client: TestClient, root: Path) -> str:
    """A registered bundle, and an agent that runs it and has sent windows."""
    bundle = tiny_bundle(root)
    answer = client.post("/api/v1/versions?actor=test", content=pack(root))
    assert answer.status_code == 201
    release(services, bundle.digest)
    counter = FeatureCounter(bundle.profile)
    features, nulls, _ = counter.take()
    packed = features.astype("<u4").tobytes()
    facts = {"active": bundle.digest, "phase": Phase.COMMITTED, "labels": {"site": "<b>north</b>", "line": "1"}}
    messages = [
        (Channel.PRESENCE, encode(Presence(online=True, boot_id=BOOT))),
        (Channel.REPORTED, encode(reported(**facts))),
        (
            Channel.BATCH,
            batch(
                window(
                    bundle=bundle.digest,
                    items=0,
                    classes={},
                    outlets={},
                    lanes=(0,),
                    features=packed,
                    nulls=nulls,
                ),
                Event(at_ms=1, code="bundle.committed", message="<script>x</script>"),
            ),
        ),
    ]
    for channel, payload in messages:
        services.ingest.take(agent_topic("line-1", channel), payload)
    live = Live(boot_id=BOOT, at_ms=1, items_per_s=17.5, classes={"sound": 9})
    services.intake.put(agent_topic("line-1", Channel.LIVE), encode(live))
    return bundle.digest


def test_the_document_describes_every_route_with_a_tag(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for route in methods.values():
            assert route.get("tags"), path
            assert route.get("description"), path
    assert {"/api/v1/datasets", "/api/v1/training-runs", "/api/v1/models", "/api/v1/rollouts"} <= set(document["paths"])


def test_a_bundle_goes_in_and_comes_out_the_same(client: TestClient, services: Services, tmp_path: Path) -> None:
    digest = fill(services, client, tmp_path / "b")
    assert client.get("/api/v1/versions/tiny").json()["bundle"] == digest
    got = client.get("/api/v1/versions/tiny:1/bundle")
    assert got.headers["x-sortline-digest"] == digest
    assert got.content == pack(tmp_path / "b")
    broken = pack(tmp_path / "b")[:-30_000]
    answer = client.post("/api/v1/versions", content=broken)
    assert answer.status_code == 422
    assert answer.json()["code"].startswith("bundle.")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/api/v1/agents/none", None, 404, "agent.unknown"),
        ("GET", "/api/v1/rollouts/9", None, 404, "rollout.unknown"),
        ("GET", "/api/v1/versions/none", None, 404, "registry.unknown_version"),
        ("GET", "/api/v1/jobs/9", None, 404, "job.unknown"),
        ("POST", "/api/v1/rollouts", {"model": "none"}, 422, "registry.unknown_version"),
        ("POST", "/api/v1/rollouts", {"model": "x", "wvaes": [1]}, 422, "api.malformed"),
        ("POST", "/api/v1/datasets", {"name": "../x", "root": "/"}, 422, "api.malformed"),
        ("POST", "/api/v1/datasets", {"name": "x", "root": "/none"}, 422, "dataset.missing"),
        ("POST", "/api/v1/training-runs", {"dataset": "x", "name": "y"}, 422, "dataset.unknown"),
        ("POST", "/api/v1/jobs/3/cancel", {}, 404, "job.unknown"),
        ("GET", "/api/v1/windows?limit=0", None, 422, "api.malformed"),
    ],
)
def test_errors_name_what_was_wrong(
    client: TestClient, method: str, path: str, body: object, status: int, code: str
) -> None:
    answer = client.request(method, path, json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["message"]


def test_other_sites_and_other_names_cannot_act_here(client: TestClient, tmp_path: Path) -> None:
    body = {"name": "x", "root": str(tmp_path)}
    assert client.post("/api/v1/datasets", json=body, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/api/v1/agents", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/api/v1/datasets", json=body, headers={"origin": "http://127.0.0.1"}).status_code == 201
    assert client.post("/api/v1/datasets", json=body, headers={"content-length": "9" * 12}).status_code == 413


def test_with_a_token_changes_and_reading_need_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef-token\n")
    services = make_services(tmp_path / "plane", token_file=str(path))
    body = {"name": "x", "root": str(tmp_path)}
    with make_client(services) as client:
        assert client.post("/api/v1/datasets", json=body).status_code == 401
        assert client.post("/api/v1/datasets", json=body, headers={"authorization": "Bearer wrong"}).status_code == 401
        right = {"authorization": "Bearer 0123456789abcdef-token"}
        assert client.post("/api/v1/datasets", json=body, headers=right).status_code == 201
        assert client.get("/api/v1/datasets").status_code == 401
        assert client.get("/api/v1/datasets", headers=right).status_code == 200


def test_the_network_is_not_served_without_a_token() -> None:
    with pytest.raises(ConfigError) as caught:
        _ = ControlPlaneConfig(server=ServerConfig(host="0.0.0.0")).token
    assert caught.value.code == "server.no_token"
    with pytest.raises(ConfigError, match="did you mean server"):
        load_control_plane_config(None, {"sever": {}}, {})


def test_probes_and_metrics(client: TestClient, services: Services, tmp_path: Path) -> None:
    fill(services, client, tmp_path / "b")
    health = client.get("/healthz").json()
    assert health["status"] == "ok"
    assert health["trust"].startswith("development keys")
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["checks"]["database"] == "ok"
    with reading(services.engine) as session:
        services.signer.look(session, utc_now())
    text = client.get("/metrics").text
    assert re.search(r'^sortline_trust_fill_ratio\{part="set"\} 0\.0\d', text, re.MULTILINE)
    assert 'sortline_agent_state{agent="line-1",sortline_agent_state="good"} 1.0' in text
    assert re.search(r'^sortline_fleet_messages_total\{what="stored"\} 2\.0', text, re.MULTILINE)
    for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE):
        assert name.startswith("sortline_"), name


def test_an_agent_that_runs_a_withdrawn_bundle_is_not_good(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    digest = fill(services, client, tmp_path / "b")
    assert client.get("/api/v1/agents").json()[0]["state"] == "good"
    assert "not released" not in client.get("/").text
    withdraw(services, digest)
    found = client.get("/api/v1/agents").json()[0]
    assert (found["state"], found["released"]) == ("check", False)
    assert "not released" in found["reason"]
    assert "not released" in client.get("/").text


@pytest.mark.parametrize("path", ["/", "/agents/line-1", "/models", "/models/tiny", "/rollouts", "/training", "/docs"])
def test_pages_render_under_a_strict_policy_and_load_nothing_from_elsewhere(
    client: TestClient, services: Services, tmp_path: Path, path: str
) -> None:
    empty = client.get(path) if path != "/agents/line-1" else None
    fill(services, client, tmp_path / "b")
    client.post("/api/v1/rollouts", json={"model": "tiny"})
    page = client.get(path)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    for text in filter(None, (page.text, empty and empty.text)):
        assert not re.search(r"<script(?![^>]*\bsrc=)", text)
        assert not re.search(r"\son\w+=|style=", text)
        assert not re.search(r"(src|href)=\"(https?:)?//", text)
        assert "<b>north</b>" not in text
        assert "<script>x" not in text
    for asset in set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)):
        assert client.get(asset).status_code == 200


def test_the_row_of_an_agent_carries_its_ages(client: TestClient, services: Services, tmp_path: Path) -> None:
    fill(services, client, tmp_path / "b")
    text = client.get("/").text
    ages = [int(value) for value in re.findall(r'data-at="(\d+)"', text)]
    assert len(ages) == 2
    assert all(value > 1_700_000_000_000 for value in ages)


def test_an_agents_page_shows_its_ejectors_and_what_its_camera_missed(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    digest = fill(services, client, tmp_path / "b")
    seen = window(
        bundle=digest,
        shots={"fired": 41, "close": 3},
        ejectors={"0/reject/missed": 3, "0/reject/fired": 41, "0/<b>/fired": 1, "nonsense": 7},
        lead_ms={"0/reject": 33.9},
        camera={"camera.frozen": 1, "blind_mm": 2290},
    )
    services.ingest.take(agent_topic("line-1", Channel.BATCH), batch(seen, first=2))
    wait_until(lambda: client.get("/api/v1/agents/line-1").json().get("shots"), "the window")
    status = client.get("/api/v1/agents/line-1").json()
    assert (status["lead_ms"], status["camera"]["camera.frozen"]) == ({"0/reject": 33.9}, 1)
    text = client.get("/agents/line-1").text
    assert "lane 0, reject: 41 fired, 3 missed, lead 34 ms" in text
    assert "fired 41, close 3" in text
    assert "camera.frozen 1" in text
    assert "<b>" not in text


def test_charts_stay_whole_without_data() -> None:
    assert "Not enough" in charts.lines([("p50", [])], budget=50.0, marks=[])
    assert "no verdicts" in charts.mix({}, [])
    assert 'width="64.0"' in charts.meter(9.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["bundle", "show", "/none"], 1, "bundle.wrong_files"),
        (["agents", "list", "--server", "http://127.0.0.1:9"], 4, "server.unreachable"),
        (["train", "--data", "/none", "--name", "x", "--output", "/tmp/never"], 1, "dataset.missing"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], status: int, text: str, capfd) -> None:
    assert main(arguments) == status
    assert text in capfd.readouterr().err


def test_the_command_hands_on_the_exit_status_of_what_it_ran(tmp_path: Path, capfd) -> None:
    assert main(["broker", "run", "--data-dir", str(tmp_path)]) == 1
    assert "broker.bad_tls" in capfd.readouterr().err


def test_the_command_shows_a_bundle_as_json(tmp_path: Path, capsys) -> None:
    import json

    digest = tiny_bundle(tmp_path / "b").digest
    assert main(["bundle", "show", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == digest
    assert main(["bundle", "pack", str(tmp_path / "b"), str(tmp_path / "b.tar")]) == 0
    assert main(["bundle", "unpack", str(tmp_path / "b.tar"), str(tmp_path / "c")]) == 0
    assert read_bundle(tmp_path / "c").digest == digest
    assert main(["bundle", "verify", str(tmp_path / "c")]) == 0
