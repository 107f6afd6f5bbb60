"""Decides who may have a certificate: tokens, first certificates, renewals, revocations. Kept in the database.

Rules: a token works once, for the agent it names, within its hour, and only its hash is kept; an answer that was lost
is given again to the same key, to no other; a renewal proves the old key and brings a new one; after its end it also
needs a person's approval; a revocation is final. The brokers' files are written after the commit, and again by the
upkeep, so a crash in between only delays them.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import CursorResult, Engine, func, update
from sqlmodel import Session, col, select

from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.identities import Certificate, EnrolmentToken, Identity, IdentityState
from control_plane.identity.authority import Authority
from control_plane.identity.certificates import (
    AGENT_URI,
    RENEW_AFTER,
    agent_of,
    certificate_pem,
    issue_client,
    key_fingerprint,
    read_certificate,
    read_request,
    serial_text,
    signed,
)
from models.errors import ConflictError, InputError
from models.identity import Enrolled, RenewalRequest, Token, parse_token, renewal_statement
from models.topics import check_agent_id

TOKEN_LIFE: Final = timedelta(hours=1)
APPROVAL_LIFE: Final = timedelta(hours=24)
RESERVED: Final = ("control-plane", "broker")
"""Beginning of the names of the site's own clients, because some brokers distinguish roles by name alone."""


class Enrolment:
    """Issues and revokes identities.

    Args:
        engine: The database.
        authority: The authority that signs.
        new_secret: 192 random bits as 32 base64url characters.
        broker: Host and port of the MQTT broker as agents reach it.
        publish: Called after every change of the trusted identities.
        trust_root: Root metadata for the signatures of bundles; empty when there is none.
    """

    def __init__(
        self,
        engine: Engine,
        authority: Authority,
        *,
        new_secret: Callable[[], str],
        broker: tuple[str, int] = ("", 0),
        publish: Callable[[], object] = lambda: None,
        trust_root: Callable[[], str] = lambda: "",
    ) -> None:
        self._engine, self._new_secret, self._broker = engine, new_secret, broker
        self._authority, self.publish, self._trust_root = authority, publish, trust_root

    @property
    def authority(self) -> Authority:
        """The authority as it is now."""
        self._authority = self._authority.follow()
        return self._authority

    # -- what people do ---------------------------------------------------------------------------------------

    def invite(self, agent_id: str, *, actor: str, now: datetime) -> Token:
        """Makes a one-time token; older unused ones of the agent end.

        Raises:
            InputError: `agent.bad_id`, `identity.reserved_name`.
        """
        check_agent_id(agent_id)
        if agent_id.startswith(RESERVED):
            raise InputError(
                "identity.reserved_name",
                "This name belongs to the site's own programs.",
                expected=f"a name that does not begin with {' or '.join(RESERVED)}",
                got=agent_id,
            )
        token = Token(agent_id, self._new_secret(), self.authority.pin)
        with writing(self._engine) as session:
            if session.get(Identity, agent_id) is None:
                session.add(Identity(agent_id=agent_id, created_at=now))
                session.flush()
            _end_tokens(session, agent_id, now)
            session.add(
                EnrolmentToken(
                    secret_sha256=token.secret_sha256,
                    agent_id=agent_id,
                    created_at=now,
                    created_by=actor,
                    expires_at=now + TOKEN_LIFE,
                )
            )
            audit(session, actor, "identity.invite", agent_id, {}, now)
            session.commit()
        return token

    def revoke(self, agent_id: str, *, reason: str, actor: str, now: datetime) -> int:
        """Ends an agent's identity at once; returns how many certificates it had.

        Raises:
            InputError: `agent.unknown`.
        """
        with writing(self._engine) as session:
            identity = _identity(session, agent_id)
            identity.state = IdentityState.REVOKED
            identity.renewal_approved_until = identity.renewal_asked_at = None
            session.add(identity)
            _end_tokens(session, agent_id, now)
            revoked = _revoke_certificates(session, agent_id, reason, now)
            agent = session.get(Agent, agent_id)
            if agent is not None:
                agent.online = False  # its last will is not stored any more
                session.add(agent)
            audit(session, actor, "identity.revoke", agent_id, {"reason": reason, "certificates": revoked}, now)
            session.commit()
        self.publish()
        return revoked

    def approve_renewal(self, agent_id: str, *, actor: str, now: datetime) -> None:
        """Lets an agent whose certificate is past its time renew it once, within a day.

        Raises:
            InputError: `agent.unknown`.
            ConflictError: `identity.revoked`.
        """
        with writing(self._engine) as session:
            identity = _identity(session, agent_id)
            if identity.state is IdentityState.REVOKED:
                raise _revoked(agent_id)
            identity.renewal_approved_until = now + APPROVAL_LIFE
            session.add(identity)
            audit(session, actor, "identity.approve-renewal", agent_id, {}, now)
            session.commit()

    # -- what agents do ---------------------------------------------------------------------------------------

    def enrol(self, token_text: str, csr_pem: str, *, now: datetime) -> Enrolled:
        """Returns the first certificate, for a token.

        Raises:
            InputError: `identity.bad_token`, `identity.bad_request`.
            ConflictError: `identity.token_refused`, `identity.key_reused`.
        """
        token, key = parse_token(token_text), read_request(csr_pem)
        key_sha256 = key_fingerprint(key)
        authority = self.authority
        with writing(self._engine) as session:
            # One statement decides which request uses the token, also among concurrent ones.
            taken = session.execute(
                update(EnrolmentToken)
                .where(
                    col(EnrolmentToken.secret_sha256) == token.secret_sha256,
                    col(EnrolmentToken.agent_id) == token.agent,
                    col(EnrolmentToken.used_at).is_(None),
                    col(EnrolmentToken.expires_at) > now,
                )
                .values(used_at=now, key_sha256=key_sha256)
            )
            if _count(taken) == 0:
                return self._repeat(session, authority, token, key_sha256, now)
            _check_new_key(session, key_sha256)
            identity = _identity(session, token.agent)
            identity.state = IdentityState.ENROLLED
            identity.renewal_approved_until = identity.renewal_asked_at = None
            session.add(identity)
            _revoke_certificates(session, token.agent, "replaced by a new enrolment", now)
            row = _issue(session, authority, token.agent, key, now, renewed=False)
            audit(session, token.agent, "identity.enrol", token.agent, {"serial": row.serial}, now)
            session.commit()
        self.publish()
        return self._answer(authority, row)

    def _repeat(self, session: Session, authority: Authority, token: Token, key_sha256: str, now: datetime) -> Enrolled:
        """Refuses a token that was used, is too old or was never issued; the key that used it gets its answer again."""
        known = session.get(EnrolmentToken, token.secret_sha256)
        if known is not None and known.agent_id == token.agent and known.expires_at > now:
            row = _certificate_of_key(session, key_sha256)
            if known.key_sha256 == key_sha256 and row is not None and row.revoked_at is None:
                return self._answer(authority, row)
        raise ConflictError(
            "identity.token_refused",
            "This token was used, is too old, or was never given; make a new one with `sortline agents enrol`.",
            expected="an unused token, within its hour, for its own agent",
            got=token.agent,
        )

    def renew(self, request: RenewalRequest, *, now: datetime) -> Enrolled:
        """Returns a new certificate for a new key, by proof of the old one.

        Raises:
            InputError: `identity.bad_certificate`, `identity.bad_request`.
            ConflictError: `identity.proof_refused`, `identity.revoked`, `identity.too_early`,
                `identity.approval_needed`, `identity.key_reused`.
        """
        authority = self.authority
        old, old_key = read_certificate(request.certificate_pem)
        agent_id = agent_of(old) if authority.issued(old) else ""
        statement = renewal_statement(request.certificate_pem, request.csr_pem)
        if not agent_id or not signed(old_key, request.signature, statement):
            raise ConflictError(
                "identity.proof_refused",
                "The old certificate is not ours, or the request is not signed by its key.",
                expected="a certificate of this site and the signature of its key",
            )
        key = read_request(request.csr_pem)
        key_sha256 = key_fingerprint(key)
        with writing(self._engine) as session:
            identity, known = session.get(Identity, agent_id), session.get(Certificate, serial_text(old))
            revoked = known is not None and known.revoked_at is not None
            if identity is None or identity.state is not IdentityState.ENROLLED or revoked:
                raise _revoked(agent_id)
            repeated = _certificate_of_key(session, key_sha256)
            if repeated is not None and repeated.agent_id == agent_id and repeated.renewed:
                return self._answer(authority, repeated)
            _check_new_key(session, key_sha256)
            _check_time(session, authority, identity, old, now)
            row = _issue(session, authority, agent_id, key, now, renewed=True)
            audit(session, agent_id, "identity.renew", agent_id, {"serial": row.serial}, now)
            session.commit()
        self.publish()
        return self._answer(authority, row)

    def _answer(self, authority: Authority, row: Certificate) -> Enrolled:
        host, port = self._broker
        return Enrolled(
            agent=row.agent_id,
            certificate_pem=row.pem,
            ca_pem=authority.anchors_pem.decode(),
            not_before_s=int(row.issued_at.timestamp()),
            not_after_s=int(row.not_after.timestamp()),
            renew_after_s=int((row.issued_at + RENEW_AFTER).timestamp()),
            broker_host=host,
            broker_port=port,
            trust_root=self._trust_root(),
        )

    # -- what others ask --------------------------------------------------------------------------------------

    def identities(self, now: datetime) -> list[dict[str, Any]]:
        """Returns every identity with its newest good certificate, for people."""
        with reading(self._engine) as session:
            found = session.exec(select(Identity).order_by(col(Identity.agent_id))).all()
            good = select(Certificate.agent_id, func.max(Certificate.not_after), func.count()).where(
                col(Certificate.revoked_at).is_(None)
            )
            newest = {row[0]: (row[1], row[2]) for row in session.exec(good.group_by(col(Certificate.agent_id)))}
        answer = []
        for one in found:
            until, count = newest.get(one.agent_id, (None, 0))
            state = str(one.state)
            if one.state is IdentityState.ENROLLED and until is not None and until < now:
                state = "expired"
            answer.append(
                {
                    "agent": one.agent_id,
                    "state": state,
                    "certificate_until": until.isoformat() if until else None,
                    "certificates": count,
                    "approval_asked_at": one.renewal_asked_at.isoformat() if one.renewal_asked_at else None,
                    "approved_until": one.renewal_approved_until.isoformat() if one.renewal_approved_until else None,
                }
            )
        return answer

    def admitted(self, now: datetime) -> tuple[list[str], list[tuple[str, datetime]]]:
        """Returns the agents that brokers admit, and the revoked certificates that have not expired yet."""
        with reading(self._engine) as session:
            enrolled = select(Identity.agent_id).where(col(Identity.state) == IdentityState.ENROLLED)
            agents = list(session.exec(enrolled.order_by(col(Identity.agent_id))))
            gone = select(Certificate.serial, Certificate.revoked_at).where(
                col(Certificate.revoked_at).is_not(None), col(Certificate.not_after) > now
            )
            rows = session.exec(gone.order_by(col(Certificate.serial))).all()
        return agents, [(serial, at) for serial, at in rows if at is not None]


def _check_time(
    session: Session, authority: Authority, identity: Identity, old: x509.Certificate, now: datetime
) -> None:
    """Refuses a renewal that is too early, unless the issuer was replaced, or late and not approved by a person."""
    if now > old.not_valid_after_utc:
        if identity.renewal_approved_until is None or identity.renewal_approved_until < now:
            identity.renewal_asked_at = now
            session.add(identity)
            session.commit()
            raise ConflictError(
                "identity.approval_needed",
                f"The certificate is past its time; approve with `sortline agents approve {identity.agent_id}`.",
                expected="an approval",
                got=f"expired {old.not_valid_after_utc:%Y-%m-%d}",
            )
        identity.renewal_approved_until = identity.renewal_asked_at = None
        session.add(identity)
        return
    due = old.not_valid_before_utc + RENEW_AFTER
    if now < due and old.issuer == authority.issuing.subject:
        raise ConflictError(
            "identity.too_early", "The certificate is young.", expected=f"after {due:%Y-%m-%d %H:%M}Z", got=now
        )


def _issue(
    session: Session,
    authority: Authority,
    agent_id: str,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    *,
    renewed: bool,
) -> Certificate:
    certificate = issue_client(authority.issuer, key, agent_id, AGENT_URI + agent_id, now)
    row = Certificate(
        serial=serial_text(certificate),
        agent_id=agent_id,
        key_sha256=key_fingerprint(key),
        issued_at=now,
        not_after=certificate.not_valid_after_utc,
        renewed=renewed,
        pem=(certificate_pem(certificate) + authority.chain_pem).decode(),
    )
    session.add(row)
    session.flush()
    return row


def _identity(session: Session, agent_id: str) -> Identity:
    identity = session.get(Identity, agent_id)
    if identity is None:
        raise InputError(
            "agent.unknown", "No such agent was ever enrolled.", expected="an enrolled agent", got=agent_id[:80]
        )
    return identity


def _certificate_of_key(session: Session, key_sha256: str) -> Certificate | None:
    return session.exec(select(Certificate).where(col(Certificate.key_sha256) == key_sha256).limit(1)).first()


def _check_new_key(session: Session, key_sha256: str) -> None:
    """Refuses a key that was certified before, such as a copied key or that of a revoked certificate."""
    if _certificate_of_key(session, key_sha256) is not None:
        raise ConflictError("identity.key_reused", "This key has a certificate.", expected="a new key", got=key_sha256)


def _revoked(agent_id: str) -> ConflictError:
    return ConflictError(
        "identity.revoked",
        "This identity was revoked or never given; enrol the agent again.",
        expected="an enrolled agent",
        got=agent_id,
    )


def _end_tokens(session: Session, agent_id: str, now: datetime) -> None:
    session.execute(
        update(EnrolmentToken)
        .where(col(EnrolmentToken.agent_id) == agent_id, col(EnrolmentToken.expires_at) > now)
        .values(expires_at=now)
    )


def _revoke_certificates(session: Session, agent_id: str, reason: str, now: datetime) -> int:
    done = session.execute(
        update(Certificate)
        .where(
            col(Certificate.agent_id) == agent_id,
            col(Certificate.revoked_at).is_(None),
            col(Certificate.not_after) > now,
        )
        .values(revoked_at=now, revoked_because=reason[:200])
    )
    return _count(done)


def _count(done: Any) -> int:
    return int(done.rowcount) if isinstance(done, CursorResult) else 0
