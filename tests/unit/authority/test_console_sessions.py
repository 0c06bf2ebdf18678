"""Console sessions: who gets one, what it may, and everything that ends it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.authority.console_sessions import (
    CLOCK_TOLERANCE,
    IDLE,
    LONGEST,
    MAX_OF_IDENTITY,
    MAX_SESSIONS,
    RIGHTS,
    SIGN_INS,
    WINDOW,
    ConsoleSessions,
    check_command,
)
from signer.errors import BadRequest, NotAuthenticated, Refused, SignerError
from signer.model import Assertion, Caller, Filter, Identity, Revocation, Token
from signer.policy.decide import Policy
from signer.protocol import commands
from signer.protocol.commands import (
    Approve,
    Claim,
    CloseIncident,
    Freeze,
    RecordOperation,
    Revoke,
    ShowCaller,
    Sign,
    SignIn,
    SignOut,
    Unfreeze,
)
from tests.parts.builders import NOW, POLICY, Bench, caller, identity, policy, sign, token

ANNA = identity(name="anna", kind="human", may=frozenset({"approve", "freeze", "ledger.read", "operate", "revoke"}))
TOKEN = Token("anna", "a" * 64, NOW + 365 * 86_400)
HUMANS = tuple(replace(ANNA, name=name) for name in ("anna", "ben", "carl"))


def policy_of(*identities: Identity, tokens: dict[str, Token] | None = None) -> Policy:
    known = {TOKEN.sha256: TOKEN} if tokens is None else tokens
    return Policy("d", None, {}, {item.name: item for item in identities}, known)  # type: ignore[arg-type]


BASE = policy_of(ANNA)


def begin(sessions: ConsoleSessions, now: int = NOW, who: Identity = ANNA, secret: bytes = b"s" * 32) -> Caller:
    used = replace(TOKEN, identity=who.name)
    credential, _, _ = sessions.begin(secret, who, used, Caller(None, "192.0.2.7", "r-1"), now)
    return Caller(credential, None, "r-2")


def ends(sessions: ConsoleSessions, held: Caller, policy: Policy, now: int) -> bool:
    try:
        sessions.authenticate(held, policy, now)
    except NotAuthenticated:
        return True
    return False


def test_a_session_has_only_rights_to_look_and_to_stop() -> None:
    sessions = ConsoleSessions()
    found, stands_for = sessions.authenticate(begin(sessions), BASE, NOW)
    assert found.name == "anna"
    assert found.may == {"approve", "freeze", "ledger.read"} == RIGHTS
    assert (stands_for.identity, stands_for.expires) == ("anna", NOW + LONGEST)


def test_the_keeper_keeps_no_credential() -> None:
    sessions = ConsoleSessions()
    credential, session, events = sessions.begin(b"\xff" * 32, ANNA, TOKEN, Caller("sgn_x", "192.0.2.7", "r-1"), NOW)
    assert credential == "console_" + "_" * 42 + "8"
    kept = f"{sessions._sessions} {session!r} {events}"
    assert credential not in kept
    assert credential[8:] not in kept
    ((event),) = events
    assert (event.kind, event.actor) == ("console.signed_in", "anna")
    assert event.body == {
        "session": sha256(credential.encode()).hexdigest()[:12],
        "until": NOW + LONGEST,
        "address": "192.0.2.7",
        "request_id": "r-1",
    }


@pytest.mark.parametrize("kind", ["agent", "workload"])
def test_only_humans_sign_in(kind: Any) -> None:
    sessions = ConsoleSessions()
    with pytest.raises(Refused) as refused:
        begin(sessions, who=replace(ANNA, kind=kind))
    assert refused.value.code == "console_needs_human"
    assert len(sessions) == 0


def test_a_session_ends_when_nobody_uses_it() -> None:
    sessions = ConsoleSessions()
    held = begin(sessions)
    assert not ends(sessions, held, BASE, NOW + IDLE - 1)
    assert not ends(sessions, held, BASE, NOW + 2 * IDLE - 2)
    assert ends(sessions, held, BASE, NOW + 3 * IDLE - 2)


def test_what_a_page_asks_by_itself_keeps_no_session_alive() -> None:
    sessions = ConsoleSessions()
    held = begin(sessions)
    by_itself = msgspec.structs.replace(held, is_unattended=True)
    for second in range(0, IDLE, 10):
        assert not ends(sessions, by_itself, BASE, NOW + second)
    assert ends(sessions, by_itself, BASE, NOW + IDLE)
    assert ends(sessions, held, BASE, NOW + IDLE)


def test_a_session_ends_after_eight_hours_of_use() -> None:
    sessions = ConsoleSessions()
    held = begin(sessions)
    for second in range(0, LONGEST, 600):
        assert not ends(sessions, held, BASE, NOW + second)
    assert not ends(sessions, held, BASE, NOW + LONGEST - 1)
    assert ends(sessions, held, BASE, NOW + LONGEST)


def test_a_session_ends_with_its_token() -> None:
    sessions = ConsoleSessions()
    credential, session, _ = sessions.begin(b"s" * 32, ANNA, replace(TOKEN, expires=NOW + 60), caller(), NOW)
    assert session.ends == NOW + 60
    assert ends(sessions, Caller(credential, None, "r-1"), BASE, NOW + 60)


def test_a_session_ends_when_the_clock_is_set_back() -> None:
    sessions = ConsoleSessions()
    held = begin(sessions)
    assert not ends(sessions, held, BASE, NOW - CLOCK_TOLERANCE)
    assert ends(sessions, held, BASE, NOW - CLOCK_TOLERANCE - 1)


@pytest.mark.parametrize(
    "changed",
    [
        policy_of(),
        policy_of(ANNA, tokens={}),
        policy_of(ANNA, tokens={TOKEN.sha256: replace(TOKEN, identity="ben")}),
        policy_of(ANNA, tokens={TOKEN.sha256: replace(TOKEN, expires=NOW + 1)}),
        policy_of(replace(ANNA, kind="agent")),
        policy_of(replace(ANNA, may=ANNA.may - {"freeze"})),
    ],
    ids=["identity gone", "token gone", "token moved", "token ends", "human no more", "right taken"],
)
def test_a_policy_that_takes_what_it_was_begun_with_ends_a_session(changed: Policy) -> None:
    sessions = ConsoleSessions()
    held = begin(sessions)
    assert ends(sessions, held, changed, NOW + 1)
    ((event),) = sessions.end_over(changed, NOW + 1)
    assert (event.kind, event.actor, event.body["why"]) == ("console.signed_out", "anna", "policy")
    assert ends(sessions, held, BASE, NOW + 1)  # the old policy again does not revive it


def test_a_policy_that_gives_more_does_not_end_a_session() -> None:
    sessions = ConsoleSessions()
    held = begin(sessions)
    assert not ends(sessions, held, policy_of(replace(ANNA, may=ANNA.may | {"hosts"})), NOW)


def test_the_oldest_session_of_an_identity_makes_room() -> None:
    sessions = ConsoleSessions()
    held = [begin(sessions, NOW + 60 * at, secret=bytes([at]) * 32) for at in range(MAX_OF_IDENTITY + 2)]
    now = NOW + 60 * len(held)
    assert [ends(sessions, one, BASE, now) for one in held] == [True] * 2 + [False] * MAX_OF_IDENTITY
    assert len(sessions) == MAX_OF_IDENTITY


def test_sessions_are_bounded_in_all() -> None:
    sessions = ConsoleSessions()
    for at in range(MAX_SESSIONS + 5):
        begin(sessions, NOW, replace(ANNA, name=f"human{at}"), at.to_bytes(32, "big"))
    assert len(sessions) == MAX_SESSIONS


def test_sign_ins_are_bounded_for_one_identity_and_cost_no_other_anything() -> None:
    sessions = ConsoleSessions()
    for at in range(SIGN_INS):
        begin(sessions, NOW + at, secret=bytes([at]) * 32)
    with pytest.raises(Refused) as limited:
        begin(sessions, NOW + SIGN_INS)
    assert (limited.value.code, limited.value.facts) == ("sign_ins_limited", {"retry_after_s": WINDOW})
    begin(sessions, NOW + SIGN_INS, HUMANS[1])
    begin(sessions, NOW + WINDOW, secret=b"t" * 32)


@dataclass
class Model:
    """What the sessions should be, in the plainest form."""

    began: dict[str, tuple[str, int]] = field(default_factory=dict)  # credential: identity, time
    used: dict[str, int] = field(default_factory=dict)

    def works(self, credential: str, now: int) -> bool:
        if credential not in self.began:
            return False
        return now < self.began[credential][1] + LONGEST and now - self.used[credential] < IDLE

    def tick(self, now: int) -> None:
        self.began = {held: item for held, item in self.began.items() if self.works(held, now)}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("begin"), st.integers(0, 2)),
            st.tuples(st.sampled_from(["use", "look", "end"]), st.integers(0, 30)),
            st.tuples(st.just("freeze"), st.integers(0, 2)),
            st.tuples(st.just("wait"), st.integers(1, IDLE + 10)),
            st.tuples(st.just("tick"), st.just(0)),
        ),
        max_size=60,
    )
)
def test_a_session_works_exactly_while_nothing_has_ended_it(steps: list[tuple[str, int]]) -> None:
    """Against a model: no order of sign-ins, uses, ends, freezes and pauses revives a session or ends another's."""
    tokens = {f"{name.name:0<64}": Token(f"{name.name}", f"{name.name:0<64}", NOW + 10**9) for name in HUMANS}
    known = policy_of(*HUMANS, tokens=tokens)
    sessions, model, now, given_out = ConsoleSessions(), Model(), NOW, list[str]()
    begun = 0
    for step, number in steps:
        if step == "wait":
            now += number
        elif step == "begin":
            who = HUMANS[number]
            begun += 1
            now += WINDOW // SIGN_INS + 1  # so that none is refused
            credential, _, events = sessions.begin(
                begun.to_bytes(32, "big"), who, tokens[f"{who.name:0<64}"], caller(), now
            )
            assert events[-1].kind == "console.signed_in"
            own = [held for held, (name, _) in model.began.items() if name == who.name]
            # An ended one that nobody has noticed yet may still take a place: that ends no one's session early.
            if len(events) > 1:
                model.began.pop(own[0])
            given_out.append(credential)
            model.began[credential], model.used[credential] = (who.name, now), now
        elif step == "freeze":
            name = HUMANS[number].name
            sessions.end_frozen(f"identity:{name}")
            model.began = {held: item for held, item in model.began.items() if item[0] != name}
        elif step == "tick":
            sessions.end_over(known, now)
            model.tick(now)
        elif given_out:
            credential = given_out[number % len(given_out)]
            held = Caller(credential, None, "r-1", is_unattended=step == "look")
            name = model.began.get(credential, ("", 0))[0]
            if not model.works(credential, now):
                assert ends(sessions, held, known, now)
                continue
            assert sessions.authenticate(held, known, now)[0].name == name
            if step != "look":
                model.used[credential] = now
            if step == "end":
                assert sessions.end(credential).actor == name
                del model.began[credential]
        for name in (human.name for human in HUMANS):
            assert sum(item.identity == name for item in sessions._sessions.values()) <= MAX_OF_IDENTITY


ALLOWED = {
    "Approve", "Deny", "EndWaiver", "Explain", "Freeze", "SignOut", "Withdraw",
    "ListCertificates", "ListEntries", "ListFreezes", "ListHostKeys", "ListIncidents", "ListOperations", "ListRequests",
    "ListEvents", "ListIdentities", "ListLive", "ShowActivity", "ShowIdentity",
    "ListRevocations", "ListRoles", "ListWaivers", "PreviewRevocation", "ShowCaller", "ShowCertificate", "ShowHead",
    "ShowRequest", "ShowRole",
}  # fmt: skip
FORBIDDEN = {
    "AddHostKeys", "Claim", "CloseIncident", "RecordOperation", "RemoveHostKeys", "Revoke", "Sign", "SignIn",
    "Unauthenticated", "Unfreeze",
}  # fmt: skip


def test_each_command_is_either_for_a_session_or_not() -> None:
    """A new command has to be put into one of the lists; what lets something happen belongs into the second."""
    known = {item.__name__ for item in _flat(commands.Command)}
    assert known == ALLOWED | FORBIDDEN
    assert not ALLOWED & FORBIDDEN


def _flat(union: Any) -> list[type]:
    parts = getattr(union, "__args__", None)
    return [union] if parts is None else [item for part in parts for item in _flat(part)]


EMPTY = BadRequest("body_malformed", "")
FORBIDDEN_COMMANDS = (
    sign(),
    Claim(caller(), "r-aaaaaaaaaa", "", None),
    CloseIncident(caller(), "i-aaaaaaaaaa", "abc"),
    RecordOperation(caller(), EMPTY),
    Revoke(caller(), Revocation("identity", "deploy-agent"), "x"),
    SignIn(caller()),
    Unfreeze(caller(), "all"),
    Approve(caller(), "r-aaaaaaaaaa", "-----BEGIN SSH SIGNATURE-----", None),
    commands.AddHostKeys(caller(), "host", (), (), False),
    commands.RemoveHostKeys(caller(), "host"),
)


@pytest.mark.parametrize("command", FORBIDDEN_COMMANDS, ids=lambda command: type(command).__name__)
def test_a_session_sends_no_command_that_lets_something_happen(command: Any) -> None:
    with pytest.raises(Refused) as refused:
        check_command(command)
    assert refused.value.code == "not_by_console"


def test_a_session_passes_on_what_a_passkey_signed() -> None:
    check_command(Approve(caller(), "r-aaaaaaaaaa", Assertion("a", "b", "c", "d"), None))
    check_command(commands.ListCertificates(caller(), Filter(), False))


# --- in the core -----------------------------------------------------------------------------------------------------


@dataclass
class Signed:
    """A bench with a session of the operator's."""

    bench: Bench = field(default_factory=Bench)

    def __post_init__(self) -> None:
        (reply,) = self.bench.ask(SignIn(caller("operator")))
        self.credential = str(reply["credential"])
        self.caller = Caller(self.credential, "192.0.2.7", "r-5")

    def ask(self, command: Any, *more: Any) -> Any:
        return self.bench.ask(command(self.caller, *more))[0]

    def is_over(self) -> bool:
        reply = self.ask(ShowCaller)
        if isinstance(reply, SignerError):
            assert reply.code == "session_ended"
            return True
        assert reply["identity"] == "operator"
        return False


def test_signing_in_and_out_is_recorded_and_no_event_has_the_credential() -> None:
    signed = Signed()
    shown = signed.ask(ShowCaller)
    assert shown["may"] == ["approve", "freeze", "ledger.read"]
    assert shown["expires_in"] == LONGEST
    assert signed.ask(SignOut) == {"identity": "operator"}
    assert signed.is_over()
    store = signed.bench.store
    assert store.kinds()[1:3] == ["console.signed_in", "console.signed_out"]
    assert store.bodies("console.signed_out")[0]["why"] == "signed_out"
    recorded = "".join(entry.body for entry in store.entries)
    assert signed.credential not in recorded
    assert token("operator") not in recorded


def test_a_session_is_refused_what_it_may_not_and_the_refusal_names_the_human() -> None:
    signed = Signed()
    for command in FORBIDDEN_COMMANDS:
        (refusal,) = signed.bench.ask(msgspec.structs.replace(command, caller=signed.caller))
        assert isinstance(refusal, Refused)
        assert refusal.code == "not_by_console"
    assert "certificate.issued" not in signed.bench.store.kinds()
    refused = [entry for entry in signed.bench.store.entries if entry.kind == "request.refused"]
    assert {entry.actor for entry in refused} == {"operator"}


def test_a_token_is_no_session() -> None:
    bench = Bench()
    (refusal,) = bench.ask(SignOut(caller("operator")))
    assert (type(refusal), refusal.code) == (NotAuthenticated, "session_ended")


def test_no_session_for_a_wrong_token_or_an_agent() -> None:
    bench = Bench()
    assert bench.ask(SignIn(caller("deploy-agent")))[0].code == "console_needs_human"
    assert bench.ask(SignIn(caller("nobody")))[0].code == "token_unknown"
    assert bench.ask(SignIn(caller(None)))[0].code == "token_missing"
    assert len(bench.core.sessions) == 0


def test_a_session_is_gone_with_the_keeper() -> None:
    signed = Signed()
    signed.bench.core = signed.bench.restart()
    assert signed.is_over()


def test_a_session_ends_when_its_human_is_frozen_by_name_and_no_new_one_begins() -> None:
    signed = Signed()
    other = Caller(token("operator"), None, "r-9")
    assert not isinstance(signed.bench.ask(Freeze(other, "all", "drill"))[0], SignerError)
    assert not signed.is_over()
    signed.bench.ask(Freeze(other, "identity:operator", "laptop is gone"))
    assert signed.is_over()
    assert signed.bench.store.bodies("console.signed_out") == [{"session": _id(signed), "why": "frozen"}]
    assert signed.bench.ask(SignIn(other))[0].code == "frozen"


def test_revoking_an_identity_ends_its_session() -> None:
    bench = Bench(policy(POLICY, ("[identities.stranger]", _SECOND + "[identities.stranger]")))
    signed = Signed(bench)
    second = Caller(token("second"), None, "r-9")
    (reply,) = bench.ask(Revoke(second, Revocation("identity", "operator"), "gone"))
    assert reply["frozen"] is True
    assert signed.is_over()


_SECOND = """
[identities.second]
kind = "human"
may = ["freeze", "revoke"]
tokens = [{ sha256 = "{token:second}", expires = 2099-01-01T00:00:00Z }]

"""


def test_a_reload_without_the_token_ends_a_session_and_records_it() -> None:
    signed = Signed()
    without = policy(POLICY, ("{token:operator}", "{token:another}"))
    assert signed.bench.core.use_policy(without) is None
    assert signed.bench.store.kinds()[-2:] == ["policy.loaded", "console.signed_out"]
    assert signed.is_over()


def test_an_idle_session_ends_by_the_clock_and_that_is_recorded() -> None:
    signed = Signed()
    signed.bench.now += IDLE
    signed.bench.core.tick()
    assert json.loads(signed.bench.store.entries[-1].body) == {"session": _id(signed), "why": "idle"}
    assert signed.is_over()


def test_a_sign_in_that_is_not_recorded_gives_no_credential() -> None:
    bench = Bench()
    bench.store.fail = "before"
    (reply,) = bench.ask(SignIn(caller("operator")))
    assert isinstance(reply, SignerError)
    assert reply.code == "ledger_unavailable"


def test_thousands_of_wrong_credentials_fill_no_ledger_and_shut_nobody_out() -> None:
    signed = Signed()
    before = len(signed.bench.store.entries)
    for number in range(3_000):
        wrong = Caller(f"console_{number:043}", "198.51.100.9", "r-7")
        assert signed.bench.ask(ShowCaller(wrong))[0].code == "session_ended"
        assert signed.bench.ask(SignIn(Caller(f"sgn_{number:049}", "198.51.100.9", "r-7")))[0].code.startswith("token_")
    assert len(signed.bench.store.entries) - before <= 4
    assert not signed.is_over()
    assert len(signed.bench.core.sessions) == 1


def _id(signed: Signed) -> str:
    return sha256(signed.credential.encode()).hexdigest()[:12]


def test_a_sign_request_of_the_same_human_still_needs_the_token() -> None:
    signed = Signed()
    (reply,) = signed.bench.ask(Sign(signed.caller, "llmops", sign().request))
    assert reply.code == "not_by_console"
    (reply,) = signed.bench.ask(Sign(caller("operator"), "llmops", sign().request))
    assert reply["identity"] == "operator"
