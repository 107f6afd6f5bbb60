"""The receivers of alarms: a webhook, a mail server, a topic of the broker. Each attempt ends within its time.

Webhooks are signed as Standard Webhooks 1.0 prescribes, so that receivers can verify them with a library they have: the
signature is HMAC-SHA256 over `id.timestamp.body`. `webhook-id` is the idempotency key, the same in every attempt;
`webhook-timestamp` is that of the attempt, so that a receiver can refuse what was recorded and is played again.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any, Final

import httpx2
import msgspec

from control_plane.config import MailConfig, WebhookConfig, read_secret
from models.errors import ConflictError, SortlineError, UnavailableError
from models.text import visible

_PREFIX: Final = "whsec_"
_LATER: Final = frozenset({408, 425, 429})
"""Answers by which a server says that it cannot take anything now; those from 500 on as well."""


def key_of(secret: str) -> bytes:
    """Returns the signing key of a secret: what `whsec_` encodes in base64, or the text itself."""
    if secret.startswith(_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            pass
    return secret.encode()


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Returns `v1,` and the base64 of the HMAC-SHA256 over `id.timestamp.body` (Standard Webhooks 1.0)."""
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


@dataclass(frozen=True, slots=True)
class Webhook:
    """Posts JSON to an address; see `Sender`."""

    config: WebhookConfig
    clock: Callable[[], float] = time.time

    @property
    def name(self) -> str:
        """Its name among the receivers."""
        return self.config.name

    @property
    def severity(self) -> str:
        """Least severity that it hears of."""
        return self.config.severity

    @property
    def after_escalations(self) -> int:
        """Escalations from which it hears of an alarm."""
        return self.config.after_escalations

    def send(self, key: str, event: str, payload: dict[str, Any]) -> None:
        """Posts one message; any answer of 200 to 299 is a receipt, redirects are not followed.

        Raises:
            UnavailableError: `alarms.no_answer`.
            ConflictError: `alarms.refused`.
        """
        body, timestamp = msgspec.json.encode(payload), int(self.clock())
        headers = {
            "content-type": "application/json",
            "user-agent": "sortline-alarms",
            "idempotency-key": key,
            "webhook-id": key,
            "webhook-timestamp": str(timestamp),
            "x-sortline-event": event,
        }
        if secret := read_secret(self.config.secret_file):
            headers["webhook-signature"] = signature(key_of(secret), key, timestamp, body)
        try:
            status = asyncio.run(self._post(headers, body))
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, TimeoutError, ssl.SSLError) as error:
            raise _no_answer(self.name, error) from error
        if status in _LATER or status >= 500:
            raise _no_answer(self.name, f"status {status}")
        if not 200 <= status < 300:
            raise ConflictError("alarms.refused", f"{self.name} refused the message.", expected="2xx", got=status)

    async def _post(self, headers: dict[str, str], body: bytes) -> int:
        # The limit is on the whole attempt: a receiver that answers one byte at a time ends as well.
        async with (
            asyncio.timeout(self.config.timeout_s),
            httpx2.AsyncClient(
                timeout=self.config.timeout_s, trust_env=False, proxy=self.config.proxy or None
            ) as client,
            client.stream("POST", self.config.url, headers=headers, content=body) as answer,
        ):
            return int(answer.status_code)


@dataclass(frozen=True, slots=True)
class Mail:
    """Sends e-mail over one server; see `Sender`."""

    config: MailConfig

    @property
    def name(self) -> str:
        """Its name among the receivers."""
        return self.config.name

    @property
    def severity(self) -> str:
        """Least severity that it hears of."""
        return self.config.severity

    @property
    def after_escalations(self) -> int:
        """Escalations from which it hears of an alarm."""
        return self.config.after_escalations

    def send(self, key: str, event: str, payload: dict[str, Any]) -> None:
        """Sends one message; the server's acceptance of its text is the receipt.

        Raises:
            UnavailableError: `alarms.no_answer`.
            ConflictError: `alarms.refused`: the server takes no message from this sender or to these recipients.
        """
        message = mail_of(key, event, payload, sender=self.config.sender, recipients=self.config.recipients)
        try:
            with (
                _smtp(self.config) as (server, socket_of),
                _deadline(socket_of, self.config.timeout_s),
            ):
                if self.config.security == "starttls":
                    server.starttls(context=ssl.create_default_context())
                if self.config.username:
                    server.login(self.config.username, read_secret(self.config.password_file))
                server.send_message(message)
        except smtplib.SMTPResponseException as error:
            words = visible(f"{error.smtp_code} {_words(error.smtp_error)}")
            if 500 <= error.smtp_code < 600:
                raise ConflictError("alarms.refused", f"{self.name} refused the message.", got=words) from error
            raise _no_answer(self.name, words) from error
        except smtplib.SMTPRecipientsRefused as error:
            codes = sorted({code for code, _ in error.recipients.values()})
            if codes and codes[-1] < 500:
                raise _no_answer(self.name, f"recipients deferred: {codes}") from error
            raise ConflictError("alarms.refused", f"{self.name} takes none of the recipients.", got=codes) from error
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise _no_answer(self.name, error) from error


@contextmanager
def _smtp(config: MailConfig) -> Iterator[tuple[smtplib.SMTP, Callable[[], socket.socket | None]]]:
    """Opens a connection, and closes it without a farewell that could take long."""
    if config.security == "tls":
        context = ssl.create_default_context()
        server: smtplib.SMTP = smtplib.SMTP_SSL(config.host, config.port, timeout=config.timeout_s, context=context)
    else:
        server = smtplib.SMTP(config.host, config.port, timeout=config.timeout_s)
    try:
        yield server, lambda: server.sock
    finally:
        server.close()


@contextmanager
def _deadline(socket_of: Callable[[], socket.socket | None], seconds: float) -> Iterator[None]:
    """Shuts the connection down after so many seconds in all: the time-out of a socket counts from each byte anew."""

    def shut() -> None:
        if (found := socket_of()) is not None:
            try:
                found.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # closed already

    timer = threading.Timer(seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _words(text: object) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def mail_of(key: str, event: str, payload: dict[str, Any], *, sender: str, recipients: tuple[str, ...]) -> EmailMessage:
    """Returns the e-mail of an event: what to do first, then what was found; its Message-ID is the idempotency key."""
    alarm = payload["alarm"]
    subject = alarm["line"] or alarm["site"] or "the fleet"
    lane = "" if alarm["lane"] is None else f", lane {alarm['lane']}"
    message = EmailMessage(policy=SMTP)
    message["Subject"] = visible(f"[{alarm['severity']}] {subject}{lane}: {alarm['cause']} {event}")[:200]
    message["From"], message["To"] = sender, ", ".join(recipients)
    message["Message-ID"] = f"<{key}@sortline>"
    message["Auto-Submitted"] = "auto-generated"
    # All messages of one alarm stand together in a mail program.
    message["References"] = f"<alarm-{alarm['id']}.{alarm['raised_at']}@sortline>"
    lines = [
        visible(alarm["action"]),
        "",
        f"State: {alarm['state']}" + (f" ({visible(alarm['reason'])})" if alarm["reason"] else ""),
        f"Effect: {alarm['effect']:.4g} {visible(alarm['effect_unit'])}, {alarm['items']} items",
        f"Raised: {alarm['raised_at']}, seen last: {alarm['seen_at']}, in {alarm['seen']} looks",
    ]
    if alarm["lots"]:
        lines.append(f"Lots: {visible(', '.join(alarm['lots'][-10:]))}")
    if alarm["cost"]:
        lines.append(f"Cost of waiting: {alarm['cost']['per_h']:,.2f} per hour ({visible(alarm['cost']['basis'])})")
    lines += ["", alarm["url"]] if alarm["url"] else []
    message.set_content("\n".join(lines) + "\n")
    return message


@dataclass(frozen=True, slots=True)
class Topic:
    """Publishes on the broker that the agents use; see `Sender`.

    Attributes:
        publish: Publishes a payload with QoS 1; returns whether the broker confirmed it in time.
    """

    publish: Callable[[bytes], bool]
    name: str = "mqtt"
    severity: str = "info"
    after_escalations: int = 0

    def send(self, key: str, event: str, payload: dict[str, Any]) -> None:
        """Publishes one message; the broker's confirmation is the receipt.

        Raises:
            UnavailableError: `alarms.no_answer`.
        """
        del event
        try:
            confirmed = self.publish(msgspec.json.encode(payload | {"key": key}))
        except (SortlineError, OSError, ValueError, RuntimeError) as error:
            raise _no_answer(self.name, error) from error
        if not confirmed:
            raise _no_answer(self.name, "the broker has not confirmed it")


def _no_answer(name: str, reason: object) -> UnavailableError:
    words = str(reason) or type(reason).__name__
    return UnavailableError("alarms.no_answer", f"{name} does not take messages now.", got=visible(words)[:300])
