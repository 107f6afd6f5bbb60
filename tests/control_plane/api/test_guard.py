"""The guard before every route checks tokens, origins, addresses, sizes and methods."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from control_plane.app import create_app
from control_plane.cli import main
from control_plane.config import ControlPlaneConfig, ServerConfig
from control_plane.guard import MAX_DOCUMENT_BYTES, Tokens
from models.errors import ConfigError
from tests.simulators.plane import make_services

WRITE, READ = "0123456789abcdef-write", "0123456789abcdef-read"


def make(tmp_path: Path, **server: object) -> TestClient:
    services = make_services(tmp_path / "plane", server=ServerConfig(**server))  # type: ignore[arg-type]
    return TestClient(create_app(services), base_url="http://127.0.0.1", follow_redirects=False)


@pytest.fixture
def guarded(guarded_plane: TestClient) -> TestClient:
    """A client without cookies of a control plane where a token is set; no test changes anything there."""
    guarded_plane.cookies.clear()
    return guarded_plane


@pytest.fixture(scope="module")
def guarded_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    tmp_path = tmp_path_factory.mktemp("guarded")
    for name, token in (("write", WRITE), ("read", READ)):
        (tmp_path / name).write_text(f"{token}\n")
    with make(tmp_path, token_file=str(tmp_path / "write"), read_token_file=str(tmp_path / "read")) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


READABLE = (
    "/api/v1/agents",
    "/api/v1/audit",
    "/metrics",
    "/version",
    "/openapi.json",
    "/",
    "/models",
    "/docs",
    "/events",
)


@pytest.mark.parametrize("path", READABLE)
def test_where_a_token_is_set_reading_needs_one_too(guarded: TestClient, path: str) -> None:
    answer = guarded.head(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.head(path, headers=bearer("nonsense")).status_code == 401
    for token in (READ, WRITE):
        assert guarded.head(path, headers=bearer(token)).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/static/style.css", "/login"])
def test_probes_and_the_login_page_stay_open(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


def test_the_read_token_changes_nothing(guarded: TestClient, tmp_path: Path) -> None:
    body = {"name": "x", "root": str(tmp_path)}
    for headers, status in (({}, 401), (bearer(READ), 401), (bearer(WRITE), 201)):
        assert guarded.post("/api/v1/datasets", json=body, headers=headers).status_code == status
    assert guarded.put("/api/v1/agents/x/labels", json={"labels": {}}, headers=bearer(READ)).status_code == 401


def test_a_browser_logs_in_once_and_reads_from_then_on(guarded: TestClient, tmp_path: Path) -> None:
    page = guarded.get("/models", headers={"accept": "text/html"})
    assert page.status_code == 401
    assert 'name="target" value="/models"' in page.text
    assert "unsafe" not in page.headers["content-security-policy"]
    wrong = guarded.post("/login", data={"token": "nonsense", "target": "/models"})
    assert wrong.status_code == 401
    assert "not known" in wrong.text
    for token in (READ, WRITE):
        answer = guarded.post("/login", data={"token": token, "target": "/models"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/models")
        cookie = answer.headers["set-cookie"]
        assert token not in cookie
        assert {"HttpOnly", "SameSite=lax", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert guarded.get("/models").status_code == 200
    assert guarded.get("/api/v1/agents").status_code == 200
    body = {"name": "x", "root": str(tmp_path)}
    assert guarded.post("/api/v1/datasets", json=body).status_code == 401, "the cookie reads and changes nothing"


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", ""])
def test_the_login_page_leads_nowhere_else(guarded: TestClient, target: str) -> None:
    answer = guarded.post("/login", data={"token": READ, "target": target})
    assert answer.headers["location"] == "/"


def test_a_cookie_ends_with_its_token() -> None:
    before, after = Tokens(WRITE, READ), Tokens(f"{WRITE}2", READ)
    assert before.may_read("", before.cookie)
    assert not after.may_read("", before.cookie)
    assert not before.may_read("", "")
    assert not before.may_read("")
    assert Tokens().may_read("")
    assert Tokens().may_change("")


def test_a_read_token_alone_or_a_short_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("x")
    for server in (
        ServerConfig(read_token_file=str(tmp_path / "short")),
        ServerConfig(token_file=str(tmp_path / "short")),
        ServerConfig(token_file=str(tmp_path / "none")),
    ):
        with pytest.raises(ConfigError) as caught:
            _ = ControlPlaneConfig(server=server).token
        assert caught.value.code == "server.no_token"


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stripped", [False, True])
def test_behind_a_proxy_with_a_prefix_pages_find_their_files(tmp_path: Path, stripped: bool) -> None:
    with make(tmp_path, public_url="https://plant.example:8443/sort/line") as client:
        prefix = "" if stripped else "/sort/line"
        page = client.get(f"{prefix}/models", headers={"host": "plant.example:8443"})
        assert page.status_code == 200
        links = set(re.findall(r'(?:src|href|action)="(/[^"]*)"', page.text))
        assert links
        assert all(link.startswith("/sort/line/") for link in links)
        for link in links:
            inside = link.removeprefix("/sort/line") if stripped else link
            assert client.get(inside).status_code == 200, link


def test_the_public_address_may_act_and_no_other(tmp_path: Path) -> None:
    with make(tmp_path, public_url="https://plant.example:8443") as client:
        for origin, status in (
            ("https://plant.example:8443", 201),
            ("http://127.0.0.1", 201),
            ("https://plant.example", 403),
            ("http://plant.example:8443", 403),
            ("https://evil.example", 403),
            ("null", 403),
            ("", 403),
        ):
            body = {"name": "x", "root": str(tmp_path)}
            answer = client.post("/api/v1/datasets", json=body, headers={"origin": origin})
            assert answer.status_code == status, origin
        assert client.get("/healthz", headers={"host": "plant.example:8443"}).status_code == 200
        assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    "url", ["plant.example", "ftp://plant.example", "https://", "https://a.example/x?y", "https://u@a"]
)
def test_a_public_address_that_is_none_is_refused_at_the_start(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, public_url=url)
    assert caught.value.code == "server.bad_public_url"


# -- bodies and methods -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    tmp_path = tmp_path_factory.mktemp("client")
    with make(tmp_path, max_body_bytes=1024 * 1024) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/api/v1/versions", 1024 * 1024),
        ("/api/v1/datasets", MAX_DOCUMENT_BYTES),
        ("/api/v1/trust/set", MAX_DOCUMENT_BYTES),
    ],
)
def test_a_body_without_a_length_ends_at_the_limit(client: TestClient, path: str, limit: int) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while taken < 64 * 1024 * 1024:
            taken += 65_536
            yield b" " * 65_536

    answer = client.post(path, content=endless(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "api.oversize")
    assert answer.json()["expected"] == f"<= {limit} bytes"


@pytest.mark.parametrize("length", ["9" * 12, "9" * 30, "-1", "x", "1e9"])
def test_a_length_that_is_none_or_too_large_is_refused_at_once(client: TestClient, length: str) -> None:
    answer = client.post("/api/v1/datasets", content=b"{}", headers={"content-length": length})
    assert answer.status_code == 413


def test_head_is_get_without_a_body(client: TestClient) -> None:
    for path in ("/", "/healthz", "/api/v1/agents", "/static/style.css", "/metrics"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers["x-content-type-options"] == "nosniff"
    assert client.head("/none").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/none", 404, "api.unknown_path"),
        ("GET", "/api/v1/rollouts/abc", 404, "api.unknown_path"),
        ("GET", f"/api/v1/rollouts/{10**25}", 404, "api.unknown_path"),
        ("GET", f"/api/v1/jobs/{10**25}", 404, "api.unknown_path"),
        ("POST", "/api/v1/rollouts/1/dance", 404, "api.unknown_path"),
        ("GET", "/api/v1/agents/a%00b", 404, "api.unknown_path"),
        ("DELETE", "/api/v1/agents", 405, "api.wrong_method"),
        ("GET", "/api/v1/agents/none", 404, "agent.unknown"),
        ("GET", "/api/v1/windows?bundle=a%00b", 422, "api.malformed"),
        ("GET", "/api/v1/windows?limit=-1", 422, "api.malformed"),
        ("GET", f"/api/v1/windows?limit={10**25}", 422, "api.malformed"),
        ("GET", f"/api/v1/audit?before={10**25}", 422, "api.malformed"),
        ("GET", "/api/v1/training-runs?limit=-1", 422, "api.malformed"),
    ],
)
def test_a_missing_object_is_404_and_a_malformed_request_422(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path, json={} if method == "POST" else None)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "x", "root": "a\\u0000b"}',
        '{"name": "x", "root": "a\\ud800b"}',
        '{"model": "x", "min_items": ' + "9" * 25 + "}",
        '{"model": "x", "min_items": ' + "9" * 5000 + "}",
        '{"model": "x", "trial_s": NaN}',
        '{"model": "x", "abortConfig": {"a": Infinity}}',
        '{"model": "x", "abortConfig": {"a": [' + "9" * 25 + "]}}",
        '{"model": "x", "abortConfig": ' + '{"a":' * 40 + "1" + "}" * 41,
        '{"model": "x", "selector": "' + "[" * 100_000 + '"}',
        "[" * 100_000,
        '{"name": "x"',
        "\xff",
    ],
)
def test_a_value_that_no_column_can_hold_is_the_callers_mistake(client: TestClient, body: str) -> None:
    path = "/api/v1/datasets" if '"root"' in body else "/api/v1/rollouts"
    answer = client.post(path, content=body.encode("latin-1"), headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["code"] == "api.malformed"


def test_an_unknown_name_in_a_body_is_no_missing_route(client: TestClient) -> None:
    answer = client.post("/api/v1/rollouts", json={"model": "none"})
    assert (answer.status_code, answer.json()["code"]) == (422, "registry.unknown_version")
    assert client.get("/api/v1/versions/none").status_code == 404


def test_the_audit_trail_is_read_to_its_oldest_entry(client: TestClient, tmp_path: Path) -> None:
    for number in range(7):
        client.post("/api/v1/datasets", json={"name": f"d{number}", "root": str(tmp_path)})
    seen: list[int] = []
    page = client.get("/api/v1/audit?limit=3").json()
    while True:
        seen += [entry["id"] for entry in page["entries"]]
        client.post("/api/v1/datasets", json={"name": f"later{len(seen)}", "root": str(tmp_path)})
        if page["next"] is None:
            break
        page = client.get(f"/api/v1/audit?limit=3&before={page['next']}").json()
    assert seen == list(range(seen[0], 0, -1)), "no entry twice, none left out, whatever was added meanwhile"


def test_the_command_reads_with_a_token_of_the_environment(monkeypatch, capsys) -> None:
    monkeypatch.setenv("SORTLINE__SERVER__PORT", "9")
    assert main(["agents", "list"]) == 4
    assert "http://127.0.0.1:9" in capsys.readouterr().err
    monkeypatch.setenv("SORTLINE_URL", "http://127.0.0.1:10")
    assert main(["agents", "list"]) == 4
    assert "http://127.0.0.1:10" in capsys.readouterr().err


def test_every_refusal_is_a_document_with_a_code(guarded: TestClient) -> None:
    for answer in (guarded.get("/api/v1/agents"), guarded.post("/api/v1/agents", json={})):
        assert set(json.loads(answer.text)) >= {"code", "message"}
