"""The actor of a request is decided in one place, and nothing is approved without a name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from control_plane.database.audit import actor_name, same_actor
from models.errors import InputError
from tests.simulators.plane import make_client, make_services


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    services = make_services(tmp_path / "plane")
    with make_client(services) as found:
        yield found
    services.engine.dispose()


def last(client: TestClient) -> dict[str, object]:
    entry: dict[str, object] = client.get("/api/v1/audit?limit=1").json()["entries"][0]
    return entry


def add(client: TestClient, name: str, body: dict[str, object], query: str = "", **headers: str) -> int:
    folder = {"name": name, "root": "/tmp"}
    return client.post(f"/api/v1/datasets{query}", json=folder | body, headers=headers).status_code


def test_the_header_wins_over_the_body_and_the_body_over_the_query(client: TestClient) -> None:
    assert add(client, "a", {}) == 201
    assert last(client)["actor"] == "api"
    assert add(client, "b", {}, "?actor=query") == 201
    assert last(client)["actor"] == "query"
    assert add(client, "c", {"actor": "  Ann \t Smith "}, "?actor=query") == 201
    assert last(client)["actor"] == "Ann Smith"
    assert add(client, "d", {"actor": "body"}, **{"x-sortline-actor": "header"}) == 201
    assert last(client)["actor"] == "header"


@pytest.mark.parametrize("name", ["a\x1bb", "a\x00b", "x" * 65])
def test_a_name_that_cannot_be_shown_is_refused(client: TestClient, name: str) -> None:
    answer = client.post("/api/v1/datasets", json={"name": "x", "root": "/tmp", "actor": name})
    assert (answer.status_code, answer.json()["code"]) == (422, "api.bad_actor")


def test_a_field_of_another_type_is_the_schemas_business(client: TestClient) -> None:
    answer = client.post("/api/v1/datasets", json={"name": "x", "root": "/tmp", "actor": 3})
    assert (answer.status_code, answer.json()["code"]) == (422, "api.malformed")


@pytest.mark.parametrize("name", [None, "", "  ", "\u200b", "api"])
def test_nothing_is_approved_without_a_name(client: TestClient, name: str | None) -> None:
    body = {} if name is None else {"actor": name}
    answer = client.post("/api/v1/rollouts/1/approve", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "api.no_actor")


def test_names_are_compared_without_blanks_and_case() -> None:
    for other in ("alice", "Alice", " alice ", "ALICE", "al\u200bice"):
        assert same_actor("alice", other)
    assert not same_actor("alice", "alicia")
    assert actor_name("  a   b ") == "a b"
    with pytest.raises(InputError, match="not usable"):
        actor_name("a\x07")
