"""Console sessions: what a browser holds instead of an operator's token. Pure; all of it is gone with the keeper.

A session may look, deny, freeze and withdraw, and pass on the assertion of a passkey, which approves by itself. It
never signs, claims, lifts, revokes or records. The keeper keeps the SHA-256 of its credential; the rights are those of
the identity now, never more than when it signed in. Times are whole seconds since 1970.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from signer.errors import NotAuthenticated, Refused
from signer.model import CONSOLE_PREFIX, Assertion, Caller, Event, Identity, Token
from signer.policy.decide import Policy
from signer.policy.tokens import ID_DIGITS, token_digest
from signer.protocol import commands

SECRET_BYTES: Final = 32  # of randomness in a credential
IDLE: Final = 15 * 60  # seconds without a command of the human's
LONGEST: Final = 8 * 3600  # seconds, also of a session in use
MAX_OF_IDENTITY: Final = 8  # the oldest one makes room
MAX_SESSIONS: Final = 1_000  # of all identities; the one that was used longest ago makes room
SIGN_INS: Final = 10  # of an identity in `WINDOW`
WINDOW: Final = 60  # seconds in which sign-ins count
CLOCK_TOLERANCE: Final = 60  # seconds by which the clock may be set back before sessions end
RIGHTS: Final = frozenset({"approve", "freeze", "ledger.read"})  # those that may be of use in a session
_LOOK: Final = (
    commands.Query
    | commands.ShowRequest
    | commands.ListRequests
    | commands.ListWaivers
    | commands.ListIncidents
    | commands.ListHostKeys
    | commands.Explain
)
_SAFE: Final = commands.Deny | commands.Withdraw | commands.EndWaiver | commands.Freeze | commands.SignOut
Why = Literal["signed_out", "idle", "expired", "policy", "frozen", "replaced"]


@dataclass(slots=True)
class Session:
    """One session. `token` is the digest of the token that it was begun with, `may` what the identity might then."""

    id: str
    identity: str
    token: str
    may: frozenset[str]
    began: int
    ends: int
    used: int


class ConsoleSessions:
    """The sessions by the SHA-256 of their credentials."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}  # oldest first
        self._begun: dict[str, deque[int]] = {}  # times of sign-ins by identity, those of the last `WINDOW`

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(
        self, secret: bytes, identity: Identity, token: Token, caller: Caller, now: int
    ) -> tuple[str, Session, list[Event]]:
        """The credential of a new session of a human who has shown a token, the session, and the events to record.

        `secret` is `SECRET_BYTES` of randomness. Raises `Refused` for agents, workloads, and too many sign-ins.
        """
        if identity.kind != "human":
            text = f"{identity.name} is not a human, and the console is for humans"
            raise Refused("console_needs_human", text, "sign in with the token of a human")
        self._check_rate(identity.name, now)
        events = [self._end(digest, "replaced") for digest in self._without_room(identity.name)]
        credential = CONSOLE_PREFIX + base64.urlsafe_b64encode(secret).decode().rstrip("=")
        digest = token_digest(credential)
        ends = min(now + LONGEST, token.expires)
        session = Session(digest[:ID_DIGITS], identity.name, token.sha256, identity.may, now, ends, now)
        self._sessions[digest] = session
        self._begun.setdefault(identity.name, deque()).append(now)
        body: dict[str, object] = {
            "session": session.id,
            "until": ends,
            "address": caller.address or "",
            "request_id": caller.request_id,
        }
        return credential, session, [*events, Event("console.signed_in", identity.name, body)]

    def _check_rate(self, name: str, now: int) -> None:
        for known, times in list(self._begun.items()):
            while times and not now - WINDOW < times[0] <= now:
                times.popleft()
            if not times:
                del self._begun[known]
        if len(self._begun.get(name, ())) >= SIGN_INS:
            raise Refused(
                "sign_ins_limited",
                f"{name} has signed in {SIGN_INS} times within {WINDOW} s",
                f"wait {WINDOW} s; if it was not you, remove the token from policy.toml",
                {"retry_after_s": WINDOW},
            )

    def _without_room(self, name: str) -> Iterable[str]:
        """The digests of sessions that make room for a new one of this identity."""
        own = [digest for digest, session in self._sessions.items() if session.identity == name]
        if len(own) >= MAX_OF_IDENTITY:
            return own[:1]
        if len(self._sessions) >= MAX_SESSIONS:
            return [min(self._sessions, key=lambda digest: self._sessions[digest].used)]
        return ()

    def authenticate(self, caller: Caller, policy: Policy, now: int) -> tuple[Identity, Token]:
        """The identity of a session, with no more rights than a session has, and a token's entry that stands for it.

        Raises `NotAuthenticated`. Unless the caller is unattended, the session is no longer idle.
        """
        digest = token_digest(caller.token or "")
        session = self._sessions.get(digest)
        if session is None or _why_over(session, policy, now) is not None:
            raise _ended()
        if not caller.is_unattended:
            session.used = max(session.used, now)
        identity = policy.identities[session.identity]
        return replace(identity, may=identity.may & RIGHTS), Token(identity.name, digest, session.ends)

    def end(self, credential: str) -> Event:
        """Ends a session whose human signs out; returns the event to record. Raises `NotAuthenticated`."""
        digest = token_digest(credential)
        if digest not in self._sessions:
            raise _ended()
        return self._end(digest, "signed_out")

    def end_frozen(self, scope: str) -> list[Event]:
        """Ends the sessions of an identity that is frozen by name; returns the events to record."""
        frozen = [digest for digest, item in self._sessions.items() if scope == f"identity:{item.identity}"]
        return [self._end(digest, "frozen") for digest in frozen]

    def end_over(self, policy: Policy, now: int) -> list[Event]:
        """Ends the sessions that are idle, expired, or that the policy no longer admits; returns the events."""
        over = [(digest, _why_over(session, policy, now)) for digest, session in self._sessions.items()]
        return [self._end(digest, why) for digest, why in over if why is not None]

    def _end(self, digest: str, why: Why) -> Event:
        session = self._sessions.pop(digest)
        return Event("console.signed_out", session.identity, {"session": session.id, "why": why})


def is_session(credential: str | None) -> bool:
    """Whether a credential is that of a console session, in force or not."""
    return credential is not None and credential.startswith(CONSOLE_PREFIX)


def check_command(command: commands.Command) -> None:
    """Raises `Refused` for a command that no session may send."""
    if isinstance(command, _LOOK | _SAFE):
        return
    if isinstance(command, commands.Approve) and isinstance(command.signature, Assertion):  # which proves itself
        return
    raise Refused(
        "not_by_console",
        "a console session reads, denies, freezes and withdraws; it does nothing else",
        "use the command line with your token",
    )


def _ended() -> NotAuthenticated:
    return NotAuthenticated("session_ended", "the console session has ended", "sign in again")


def _why_over(session: Session, policy: Policy, now: int) -> Why | None:
    """Why a session is over; None while it is not. Time that goes back does not revive one."""
    if now >= session.ends or now < session.used - CLOCK_TOLERANCE:
        return "expired"
    if now - session.used >= IDLE:
        return "idle"
    token, identity = policy.tokens.get(session.token), policy.identities.get(session.identity)
    if token is None or token.identity != session.identity or now >= token.expires:
        return "policy"
    if identity is None or identity.kind != "human" or not session.may <= identity.may:
        return "policy"
    return None
