"""Routes and commands of alarms, `/metrics`, and what the configuration shows of receivers."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi.testclient import TestClient

from control_plane.alarms.acting import get_alarm
from control_plane.alarms.raising import Look
from control_plane.app import create_app
from control_plane.cli import main
from control_plane.client import Client
from control_plane.database.engine import writing
from control_plane.database.tables.alarms import AlarmDecision, DecisionState
from control_plane.database.tables.columns import utc_now
from control_plane.detection.finding import Cause, Finding, Level, Severity
from control_plane.services import Services
from tests.control_plane.alarms.test_raising import NOW, finding

DIRT = finding(evidence={"before": {"sharpness": 1.0}, "after": {"sharpness": 0.6}}, lots=("B-1",), items=4000)


@pytest.fixture
def client(services: Services) -> TestClient:
    return TestClient(create_app(services), base_url="http://127.0.0.1")


def rise(services: Services, *findings: Finding) -> None:
    with writing(services.engine) as session:
        services.alarms.watcher.register.apply(session, Look(findings, frozenset(), utc_now()))
        session.commit()


def post(client: TestClient, path: str, key: str = "", **body: Any) -> dict[str, Any]:
    answer = client.post(f"/api/v1/alarms/{path}", json=body, headers={"Idempotency-Key": key} if key else {})
    found: dict[str, Any] = answer.json()
    return found | {"status": answer.status_code}


def test_a_list_is_filtered_and_paged(client: TestClient, services: Services) -> None:
    rise(
        services, *[finding(f"line-{n}") for n in range(5)], finding("line-0", Cause.FROZEN, severity=Severity.CRITICAL)
    )
    post(client, "1/resolve", actor="ida")

    def ids(query: str) -> list[int]:
        return [alarm["id"] for alarm in client.get(f"/api/v1/alarms?{query}").json()["alarms"]]

    assert ids("") == [6, 5, 4, 3, 2]
    assert ids("state=all") == [6, 5, 4, 3, 2, 1]
    assert ids("state=resolved") == [1]
    assert ids("severity=critical") == ids("cause=frozen") == [6]
    assert ids("line=line-3") == [4]
    assert ids("site=south") == []
    first = client.get("/api/v1/alarms?limit=2").json()
    assert (len(first["alarms"]), first["next"]) == (2, 5)
    assert ids("limit=2&before=5") == [4, 3]
    assert client.get("/api/v1/alarms?state=odd").json()["code"] == "alarm.bad_filter"
    assert client.get("/api/v1/alarms/99").status_code == 404


def test_people_answer_over_the_api_and_a_repeated_request_is_answered_not_refused(
    client: TestClient, services: Services
) -> None:
    rise(services, DIRT)
    shown = client.get("/api/v1/alarms/1").json()
    assert (shown["actions"], shown["evidence"]["after"]) == (["acknowledge", "silence", "resolve"], {"sharpness": 0.6})
    answers = [post(client, "1/acknowledge", "k", reason="I go", actor="ida") for _ in range(2)]
    assert [(a["status"], a["state"], a["owner"]) for a in answers] == [(200, "acknowledged", "ida")] * 2
    assert post(client, "1/acknowledge", "k", reason="other", actor="ida")["code"] == "api.key_reused"
    assert post(client, "1/acknowledge", actor="omar")["code"] == "alarm.not_allowed"
    said = post(client, "1/comments", text="grease", actor="ida")
    assert [(c["actor"], c["text"]) for c in said["comments"]] == [("ida", "grease")]
    assert post(client, "1/comments", text=" ")["code"] == "alarm.bad_comment"
    assert post(client, "1/owner", owner="omar")["owner"] == "omar"
    assert post(client, "1/silence", minutes=30, actor="omar")["state"] == "silenced"
    assert post(client, "1/silence", until="2020-01-01T00:00:00Z")["code"] == "alarm.bad_silence"
    assert post(client, "1/silence", until="2020-01-01T00:00:00")["code"] == "api.malformed"
    assert post(client, "1/resolve", reason="wiped", actor="omar")["resolved_by"] == "omar"
    assert client.get("/api/v1/alarms/1").json()["actions"] == []


def test_a_request_is_confirmed_or_declined(client: TestClient, services: Services) -> None:
    rise(services, DIRT)
    with writing(services.engine) as session:
        for state in (DecisionState.AWAITING_CONFIRMATION, DecisionState.WITHHELD):
            session.add(AlarmDecision(alarm_id=1, request="samples", state=state, at=NOW))
        session.commit()
    found = post(client, "1/requests/1/confirm", actor="ida")
    assert [(d["state"], d["decided_by"]) for d in found["decisions"]] == [("requested", "ida"), ("withheld", "")]
    assert post(client, "1/requests/2/decline", actor="ida")["code"] == "decision.settled"
    assert post(client, "1/requests/9/decline", actor="ida")["status"] == 404


def test_metrics_count_alarms_by_severity_cause_and_state(client: TestClient, services: Services) -> None:
    assert "# TYPE sortline_alarms_active gauge" in client.get("/metrics").text
    rise(services, DIRT, finding("line-2"))
    post(client, "2/acknowledge", actor="ida")
    text = client.get("/metrics").text
    for state in ("open", "acknowledged"):
        labels = f'cause="camera-dirty",severity="warning",state="{state}"'
        assert f"sortline_alarms_active{{{labels}}} 1.0" in text


def test_the_worst_alarm_of_a_line_is_the_most_severe_then_the_oldest(services: Services) -> None:
    rise(services, finding(), finding(cause=Cause.FROZEN, severity=Severity.CRITICAL))
    rise(services, finding(cause=Cause.FLICKER, severity=Severity.CRITICAL), finding("line-2"))
    rise(services, finding("", level=Level.SITE))
    assert dict(services.alarms.worst()) == {
        "line-1": (2, "critical", "frozen"),
        "line-2": (4, "warning", "camera-dirty"),
    }


class Local(Client):
    """The command line's client over the application in this process."""

    http: TestClient

    def _send(self, method: str, path: str, options: dict[str, Any]) -> Any:
        return self.http.request(method, path, **options)


def test_the_commands_do_what_the_routes_do(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Local.http = client
    monkeypatch.setattr(sys.modules["control_plane.cli.alarms"], "Client", Local)
    rise(services, DIRT)
    assert main(["alarms", "list"]) == 0
    assert "Wipe the lens of line-1." in capsys.readouterr().out
    for words in (["ack", "1"], ["comment", "1", "grease"], ["own", "1", "omar"], ["silence", "1", "--minutes", "5"]):
        assert main(["alarms", *words, "--actor", "ida"]) == 0
    capsys.readouterr()
    assert main(["alarms", "show", "1"]) == 0
    out = capsys.readouterr().out
    assert "ida: grease" in out
    assert "omar" in out
    assert main(["alarms", "resolve", "1", "--reason", "wiped"]) == 0
    assert main(["alarms", "ack", "1"]) == 3
    assert "alarm.not_allowed" in capsys.readouterr().err
    assert main(["alarms", "list", "--state", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alarms"][0]["state"] == "resolved"


def test_no_secret_of_a_receiver_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        '[[alarms.webhooks]]\nname = "chat"\nurl = "https://u:pw@chat.example/services/T0/secretpath"\n'
        'proxy = "http://me:pw2@proxy:3128"\n'
    )
    assert main(["config", "show", "--config", str(file), "--json"]) == 0
    out = capsys.readouterr().out
    assert "chat.example" in out
    assert not {"secretpath", "pw@", "pw2"} & set(out.replace(":", " ").replace("/", " ").split())
    assert "secretpath" not in out
    assert "pw2" not in out


def test_what_receivers_get_holds_no_evidence_and_fits_the_topic(client: TestClient, services: Services) -> None:
    rise(services, DIRT)
    with writing(services.engine) as session:
        found = services.alarms._announcer._describe(get_alarm(session, 1))
    assert "evidence" not in found
    assert len(msgspec.json.encode(found)) < 64 * 1024
