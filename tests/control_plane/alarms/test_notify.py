"""Messages about alarms reach receivers that fail, hang and come back: at least once, in order, with an end."""

import base64
import hashlib
import hmac
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlmodel import select

from control_plane.alarms.details import facts_of
from control_plane.alarms.notify import Announcer, Courier
from control_plane.alarms.raising import Look, Register
from control_plane.alarms.senders import Mail, Topic, Webhook
from control_plane.config import AlarmsConfig, ControlPlaneConfig, MailConfig, WebhookConfig
from control_plane.database.engine import reading, writing
from control_plane.database.tables.alarms import AlarmDelivery, DeliveryState
from control_plane.detection.finding import Finding, Severity
from control_plane.services import Services
from models.errors import ConfigError, ConflictError, UnavailableError
from tests.control_plane.alarms.test_raising import CONFIG, NOW, finding
from tests.simulators.alarm_receivers import HookServer, hook_server, mail_server

ROOT = Path(__file__).resolve().parents[3]
PAYLOAD = {"schema_version": 1, "event": "raised", "at": NOW.isoformat()}


def hook(server: HookServer, **changes: Any) -> Webhook:
    return Webhook(WebhookConfig(**({"name": "desk", "url": server.url, "timeout_s": 5.0} | changes)))


class Desk:
    """A plant with receivers: raises alarms and delivers, at times of its own."""

    def __init__(self, services: Services, *senders: Any, **config: Any) -> None:
        self.services, self.senders, self.counters = services, senders, Counter[str]()
        settings = msgspec.structs.replace(CONFIG, **config)
        announcer = Announcer(senders, lambda alarm: facts_of(alarm) | {"url": ""})
        self.register = Register(settings, announce=announcer.announce, levels=announcer.levels)
        self.courier = Courier(services.engine, senders, settings, self.counters)

    def look(self, at_s: float, *findings: Finding) -> None:
        with writing(self.services.engine) as session:
            now = NOW + timedelta(seconds=at_s)
            self.register.apply(session, Look(findings, frozenset({"line-1", "line-2"}), now))
            session.commit()

    def deliver(self, at_s: float, sender: int = 0) -> int:
        return self.courier.deliver(self.senders[sender], NOW + timedelta(seconds=at_s))

    def rows(self) -> list[AlarmDelivery]:
        with reading(self.services.engine) as session:
            return list(session.exec(select(AlarmDelivery).order_by(AlarmDelivery.id)))


def test_a_receiver_that_is_away_gets_everything_once_it_is_back_in_order(services: Services) -> None:
    with hook_server(503, 500, "cut") as server:
        desk = Desk(services, hook(server))
        desk.look(0, finding())
        desk.look(5, finding(severity=Severity.CRITICAL))
        assert [desk.deliver(at_s) for at_s in (6, 12, 23)] == [0, 0, 0]
        assert [row.attempts for row in desk.rows()] == [3, 0], "what follows waits for what it follows"
        assert desk.deliver(24) == 0, "not before its time"
        assert desk.deliver(100) == 1
        assert desk.deliver(101) == 1
        assert server.events == ["raised", "raised", "raised", "raised", "worsened"]
        keys = [headers["webhook-id"] for headers, _ in server.got]
        assert len(set(keys[:4])) == 1
        assert keys[4] != keys[0]
        assert [row.state for row in desk.rows()] == [DeliveryState.DELIVERED] * 2
        assert desk.deliver(1000) == 0


@pytest.mark.parametrize("way", ["hang", "trickle"])
def test_a_receiver_that_never_ends_its_answer_is_left_in_time(services: Services, way: str) -> None:
    with hook_server(way) as server:
        desk = Desk(services, hook(server, timeout_s=0.3))
        desk.look(0, finding())
        assert desk.deliver(0) == 0
        assert "desk does not take messages now" in desk.rows()[0].error
        assert desk.courier.deliver(hook(server, timeout_s=30.0), NOW + timedelta(seconds=100)) == 1


def test_nothing_listens_there(services: Services) -> None:
    with hook_server() as server:
        gone = hook(server)
    desk = Desk(services, gone)
    desk.look(0, finding())
    assert desk.deliver(0) == 0
    assert desk.rows()[0].state is DeliveryState.WAITING


@pytest.mark.slow
def test_the_waits_double_up_to_the_longest_and_have_an_end(services: Services) -> None:
    with hook_server(*[503] * 50) as server:
        desk = Desk(services, hook(server), first_retry_s=5.0, longest_retry_s=60.0, give_up_after_s=600.0)
        desk.look(0, finding())
        attempts = []
        for at_s in range(1200):
            before = len(server.got)
            desk.deliver(at_s)
            attempts += [at_s] if len(server.got) > before else []
            if desk.rows()[0].state is DeliveryState.GIVEN_UP:
                break
        waits = [after - before for before, after in pairwise(attempts)]
        assert waits[:5] == [5, 10, 20, 40, 60]
        assert set(waits[5:]) == {60}
        assert desk.rows()[0].state is DeliveryState.GIVEN_UP
        assert desk.counters["alarm_delivery_given_up"] == 1
        assert desk.deliver(2000) == 0


def test_one_refused_message_does_not_hold_up_other_alarms(services: Services) -> None:
    with hook_server(400) as server:
        desk = Desk(services, hook(server))
        desk.look(0, finding(), finding("line-2"))
        assert desk.deliver(1) == 1
        assert [row.state for row in desk.rows()] == [DeliveryState.WAITING, DeliveryState.DELIVERED]


def test_a_message_is_signed_as_standard_webhooks_has_it(tmp_path: Path) -> None:
    key = os.urandom(24)
    secret = tmp_path / "secret"
    secret.write_text(f"whsec_{base64.b64encode(key).decode()}\n")
    with hook_server() as server:
        sender = Webhook(
            WebhookConfig(name="desk", url=server.url, secret_file=str(secret)), clock=lambda: 1_700_000_000.9
        )
        sender.send("alarm-1", "raised", PAYLOAD)
        headers, body = server.got[0]
    assert msgspec.json.decode(body) == PAYLOAD
    assert (headers["webhook-id"], headers["idempotency-key"]) == ("alarm-1", "alarm-1")
    assert headers["webhook-timestamp"] == "1700000000"
    content = b"alarm-1.1700000000." + body
    expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


def test_a_redirect_is_not_followed() -> None:
    with hook_server(302) as server, pytest.raises(ConflictError) as caught:
        hook(server).send("k", "raised", PAYLOAD)
    assert (caught.value.code, caught.value.got, len(server.got)) == ("alarms.refused", 302, 1)


def mail(port: int, **changes: Any) -> Mail:
    values = {"name": "quality", "host": "127.0.0.1", "port": port, "security": "plain", "timeout_s": 5.0}
    return Mail(MailConfig(**(values | {"sender": "a@plant.example", "recipients": ("q@plant.example",)} | changes)))


def test_mail_waits_for_its_server_and_says_what_to_do_first(services: Services) -> None:
    with mail_server("451 try again later") as server:
        desk = Desk(services, mail(server.port))
        odd = "Wipe the lens\r\nBcc: all@plant.example"
        desk.look(0, finding(action=odd, lots=("B-1182",)))
        assert [desk.deliver(0), desk.deliver(60)] == [0, 1]
    text = server.messages[1]
    head, _, body = text.partition("\n\n")
    assert "Subject: [warning] line-1: camera-dirty raised" in head
    assert "Bcc" not in head
    assert "Message-ID: <alarm-" in head
    assert body.startswith("Wipe the lens\\r\\nBcc: all@plant.example")
    assert "Lots: B-1182" in body


@pytest.mark.parametrize(
    ("answer", "recipients", "family"),
    [
        ("554 no", "250 ok", ConflictError),
        ("250 ok", "550 unknown", ConflictError),
        ("250 ok", "450 busy", UnavailableError),
        ("hang", "250 ok", UnavailableError),
    ],
)
def test_a_mail_server_that_does_not_take_it(answer: str, recipients: str, family: type[Exception]) -> None:
    payload = PAYLOAD | {"alarm": ALARM}
    with mail_server(answer) as server:
        server.recipients = recipients
        sender = mail(server.port, timeout_s=0.5 if answer == "hang" else 30.0)
        with pytest.raises(family):
            sender.send("k", "raised", payload)


ALARM = {
    "id": 1,
    "line": "line-1",
    "site": "north",
    "lane": None,
    "severity": "warning",
    "cause": "x",
    "action": "Do.",
    "state": "open",
    "reason": "",
    "effect": 0.1,
    "effect_unit": "",
    "items": 3,
    "raised_at": "t",
    "seen_at": "t",
    "seen": 1,
    "lots": [],
    "cost": {"per_h": 12.5, "basis": "b"},
    "url": "",
}


def test_receivers_hear_of_their_severity_and_level_and_of_the_end_of_what_they_heard(services: Services) -> None:
    desk = Desk(
        services,
        Topic(lambda _: True, name="all"),
        Topic(lambda _: True, name="critical-only", severity="critical"),
        Topic(lambda _: True, name="boss", severity="warning", after_escalations=1),
    )
    desk.look(0, finding())
    desk.look(301, finding())
    desk.look(302)
    desk.look(400)
    told = [(row.receiver, row.event) for row in desk.rows()]
    assert told == [
        ("all", "raised"),
        ("all", "escalated"),
        ("boss", "escalated"),
        ("all", "resolved"),
        ("boss", "resolved"),
    ]


def test_a_broker_that_does_not_confirm_gets_it_again(services: Services) -> None:
    sent: list[bytes] = []
    desk = Desk(services, Topic(lambda payload: sent.append(payload) or len(sent) > 1))
    desk.look(0, finding())
    assert [desk.deliver(0), desk.deliver(60)] == [0, 1]
    first, second = (msgspec.json.decode(payload) for payload in sent)
    assert first == second
    assert first["key"] == desk.rows()[0].key


def test_a_receiver_with_a_defect_loses_nothing(services: Services) -> None:
    class Broken(Topic):
        def send(self, key: str, event: str, payload: dict[str, Any]) -> None:
            raise ZeroDivisionError

    desk = Desk(services, Broken(lambda _: True))
    desk.look(0, finding())
    with pytest.raises(ZeroDivisionError):
        desk.deliver(0)
    assert (desk.rows()[0].attempts, desk.rows()[0].state) == (1, DeliveryState.WAITING)


DYING = """
import os, signal, sys
from datetime import timedelta
from control_plane.alarms.notify import Courier
from control_plane.alarms.senders import Webhook
from control_plane.config import AlarmsConfig, WebhookConfig
from control_plane.database.engine import open_database
from collections import Counter
from tests.control_plane.alarms.test_raising import NOW

class Dying(Webhook):
    def send(self, key, event, payload):
        super().send(key, event, payload)
        os.kill(os.getpid(), signal.SIGKILL)

sender = Dying(WebhookConfig(name="desk", url=sys.argv[2]))
Courier(open_database(sys.argv[1]), [sender], AlarmsConfig(), Counter()).deliver(sender, NOW)
"""


@pytest.mark.slow
def test_a_process_killed_between_sending_and_noting_sends_again_under_the_same_key(services: Services) -> None:
    with hook_server() as server:
        desk = Desk(services, hook(server))
        desk.look(0, finding())
        url = services.config.database_url
        done = subprocess.run([sys.executable, "-c", DYING, url, server.url], check=False, cwd=ROOT, timeout=120)
        assert done.returncode == -signal.SIGKILL
        assert (desk.rows()[0].state, desk.rows()[0].attempts) == (DeliveryState.WAITING, 1)
        assert desk.deliver(60) == 1
        keys = [headers["webhook-id"] for headers, _ in server.got]
    assert len(keys) == 2
    assert len(set(keys)) == 1


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"webhooks": (WebhookConfig(name="a", url="ftp://x"),)}, "alarms.bad_receiver"),
        ({"webhooks": (WebhookConfig(name="a", url="http://x"),) * 2}, "alarms.bad_receiver"),
        ({"webhooks": (WebhookConfig(name="mqtt", url="http://x"),)}, "alarms.bad_receiver"),
        ({"webhooks": (WebhookConfig(name="a", url="http://x", secret_file="/none"),)}, "alarms.no_secret"),
        ({"mails": (MailConfig(name="a", host="h", sender="s", recipients=("r@x",)),)}, "alarms.bad_receiver"),
    ],
)
def test_receivers_that_cannot_work_are_refused_at_the_start(config: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ControlPlaneConfig(alarms=AlarmsConfig(**config)).alarms.check()
    assert caught.value.code == code
