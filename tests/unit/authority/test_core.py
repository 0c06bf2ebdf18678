"""What the core promises, one promise a test; `test_core_random.py` mixes them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from signer.errors import BadRequest, CertificateMismatch, SignerError, Unavailable
from signer.model import Entry, Event
from signer.protocol.commands import Explain, Freeze, RecordOperation, ShowCaller, ShowHead, Sign, Unfreeze
from signer.protocol.operations import OperationBody, OperationName
from signer.ssh.certificate import decode_certificate
from tests.parts import builders
from tests.parts.builders import NOW, Bench, caller, certificate_of, policy, role_lines, sign


def code_of(reply: Any) -> str:
    """The code of a reply that is an error."""
    assert isinstance(reply, SignerError), reply
    return reply.code


def serial_of(reply: Any) -> int:
    return decode_certificate(certificate_of(reply))[0].serial


# --- recorded before released -------------------------------------------------------------------------------------


def test_a_certificate_is_in_the_ledger_before_the_key_is_touched() -> None:
    bench = Bench()
    seen: list[list[str]] = []
    sign_really = bench.key.sign

    def look(data: bytes) -> bytes:
        seen.append(bench.store.kinds())
        return sign_really(data)

    bench.key.sign = look  # type: ignore[method-assign]
    bench.ask(sign(), sign())
    issued = ["keeper.started", "certificate.issued", "certificate.issued"]
    assert seen == [issued, issued]


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_commit_that_fails_releases_nothing_and_its_serials_are_not_used_again(how: str) -> None:
    bench = Bench()
    first = serial_of(bench.sign())
    bench.store.fail = how
    replies = bench.ask(sign(), sign("operator"), sign(principals=("root",)))
    assert [code_of(reply) for reply in replies] == ["ledger_unavailable"] * 3
    assert len(bench.key.signed) == 1
    bench.store.fail = ""
    assert serial_of(bench.sign()) > first + 2


def test_serials_go_on_after_a_restart() -> None:
    bench = Bench()
    serials = [serial_of(bench.sign()) for _ in range(3)]
    bench.restart()
    assert [*serials, serial_of(bench.sign())] == [1, 2, 3, 4]


def test_a_signature_that_fails_is_recorded_as_withheld_and_no_longer_counts_as_live() -> None:
    bench = Bench(policy=policy(builders.POLICY, role_lines("limits = { live = 1 }")))
    bench.key.fails = RuntimeError("the token is gone")
    reply = bench.sign()
    assert code_of(reply) == "signing_failed"
    assert bench.store.kinds()[-2:] == ["certificate.issued", "certificate.withheld"]
    assert bench.store.bodies("certificate.withheld") == [{"serial": "1", "error": "RuntimeError"}]
    assert bench.faults == [bench.key.fails]
    assert "token is gone" not in str(reply)
    bench.key.fails = None
    assert serial_of(bench.sign()) == 2
    assert code_of(bench.sign()) == "too_many_live"


def test_a_signature_that_fails_does_not_stop_the_rest_of_its_batch() -> None:
    bench = Bench()
    answers = iter([RuntimeError("once"), None, RuntimeError("twice")])
    sign_really = bench.key.sign

    def sometimes(data: bytes) -> bytes:
        bench.key.fails = next(answers)
        return sign_really(data)

    bench.key.sign = sometimes  # type: ignore[method-assign]
    first, second, third = bench.ask(sign(), sign(), sign())
    assert (code_of(first), serial_of(second), code_of(third)) == ("signing_failed", 2, "signing_failed")
    assert [row.withheld for row in bench.store.rows.values()] == [True, False, True]


def test_a_withheld_serial_that_cannot_be_recorded_as_such_still_counts_as_live() -> None:
    bench = Bench(policy=policy(builders.POLICY, role_lines("limits = { live = 1 }")))
    bench.key.fails = RuntimeError("gone")
    commit_really = bench.store.commit

    def commit_issued_only(events: Any, now_ms: int) -> Any:
        if events[0].kind == "certificate.withheld":
            raise Unavailable("ledger_unavailable", "the disk is full")
        return commit_really(events, now_ms)

    bench.store.commit = commit_issued_only  # type: ignore[method-assign]
    assert code_of(bench.sign()) == "signing_failed"
    bench.key.fails = None
    assert code_of(bench.sign()) == "too_many_live"


def test_a_certificate_is_what_its_record_says() -> None:
    bench = Bench()
    fields, _, _ = decode_certificate(certificate_of(bench.sign(principals=("deploy-agent", "llmops"), ttl=60)))
    body = bench.store.bodies("certificate.issued")[0]
    assert body["serial"] == str(fields.serial) == "1"
    assert body["principals"] == ["deploy-agent", "llmops"] == list(fields.principals)
    assert (body["valid_after"], body["valid_before"]) == (NOW - 30, NOW + 60)
    assert (fields.valid_after, fields.valid_before) == (NOW - 30, NOW + 60)
    assert body["key_id"] == fields.key_id == "deploy-agent:llmops"
    assert body["policy"] == bench.policy.digest
    assert body["ca"] == bench.key.fingerprint


def test_a_draft_that_is_not_the_grant_is_never_signed_and_told_to_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def disobey(*_: object) -> None:
        raise CertificateMismatch("certificate_differs_from_grant", "the certificate differs from its grant: serial")

    monkeypatch.setattr("signer.authority.certificates.check_matches_grant", disobey)
    assert code_of(bench.sign()) == "certificate_differs_from_grant"
    assert bench.key.signed == []
    assert [type(fault) for fault in bench.faults] == [CertificateMismatch]
    monkeypatch.undo()
    assert serial_of(bench.sign()) == 2


# --- one batch ----------------------------------------------------------------------------------------------------


class Poison:
    """A caller whose fields raise what nobody expects."""

    request_id = "r-1"
    address = None

    local_user = None

    @property
    def token(self) -> str:
        raise ZeroDivisionError("poison")


def test_one_poisonous_command_does_not_stop_its_batch() -> None:
    bench = Bench()
    poison: Any = ShowHead(Poison())  # type: ignore[arg-type]
    first, second, third = bench.ask(sign(), poison, sign("operator"))
    assert (serial_of(first), code_of(second), serial_of(third)) == (1, "internal_error", 2)
    assert [type(fault) for fault in bench.faults] == [ZeroDivisionError]


def test_an_event_that_cannot_be_written_does_not_end_the_keeper() -> None:
    bench = Bench()
    failure = bench.core.record([Event("x", "keeper", {"a float": 0.5})])
    assert failure is not None
    assert failure.code == "internal_error"
    assert [type(fault) for fault in bench.faults] == [ValueError]
    assert serial_of(bench.sign()) == 1


def test_a_batch_is_recorded_in_one_transaction() -> None:
    bench = Bench()
    sizes: list[int] = []
    commit_really = bench.store.commit

    def count(events: Any, now_ms: int) -> Any:
        sizes.append(len(events))
        return commit_really(events, now_ms)

    bench.store.commit = count  # type: ignore[method-assign]
    bench.ask(sign(), sign("operator"), sign(principals=("root",)), ShowCaller(caller()))
    assert sizes == [3]


def test_a_command_without_anything_to_record_is_answered_while_the_ledger_fails() -> None:
    bench = Bench()
    bench.store.fail = "before"
    whoami, refused = bench.ask(ShowCaller(caller()), sign())
    assert isinstance(whoami, dict)
    assert whoami["identity"] == "deploy-agent"
    assert code_of(refused) == "ledger_unavailable"


def test_audit_an_event_that_cannot_be_recorded_fails_its_own_request_only() -> None:
    bench = Bench()
    unwritable = RecordOperation(caller("operator"), OperationBody(operation="cutover", outcome="applied"))
    commit, sizes = bench.store.commit, list[int]()

    def strict(events: Sequence[Event], now_ms: int) -> list[Entry]:
        sizes.append(len(events))
        if any(event.kind == "operation.recorded" for event in events):
            raise ValueError("an event cannot hold a float")
        return commit(events, now_ms)

    bench.store.commit = strict  # type: ignore[method-assign]
    first, wrong, refused, last = bench.ask(sign(), unwritable, sign(principals=("root",)), sign("operator"))
    assert (serial_of(first), serial_of(last)) == (1, 2)
    assert code_of(wrong) == "internal_error"
    assert code_of(refused) == "principal_not_allowed"
    assert sizes == [4, 1, 1, 1, 1]
    assert bench.store.kinds().count("certificate.issued") == 2
    assert {type(fault) for fault in bench.faults} == {ValueError}


def test_an_unfreeze_is_not_answered_by_one_that_never_reached_the_disk() -> None:
    bench = Bench()
    bench.ask(Freeze(caller("operator"), "all", "drill"))
    bench.store.fail = "before"
    unfreeze = Unfreeze(caller("operator"), "all")
    assert [code_of(reply) for reply in bench.ask(unfreeze, unfreeze)] == ["ledger_unavailable"] * 2
    bench.store.fail = ""
    assert code_of(bench.sign()) == "frozen"


# --- who asks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token,code",
    [
        (None, "token_missing"),
        ("", "token_missing"),
        ("hvs.CAESI", "token_unknown"),
        (builders.token("nobody"), "token_unknown"),
        (builders.token("deploy-agent")[:-1] + "!", "token_mistyped"),
    ],
)
def test_without_a_good_token_nothing_is_told(token: str | None, code: str) -> None:
    bench = Bench()
    stranger = replace(caller(), token=token)
    commands: list[Any] = [
        Sign(stranger, "llmops", builders.ask()),
        Sign(stranger, "no-such-role", BadRequest("field_malformed", "field ttl: bad")),
        Explain(stranger, "llmops", builders.ask()),
        Freeze(stranger, "all", "drill"),
        ShowHead(stranger),
    ]
    assert {code_of(reply) for reply in bench.ask(*commands)} == {code}
    assert bench.store.rows == {}


def test_a_token_is_good_until_the_second_in_which_it_expires() -> None:
    expiry = NOW + 100
    bench = Bench(policy=policy(builders.POLICY, ("2099-01-01T00:00:00Z }]\n\n[identities.operator]",
                                                  "2027-01-15T08:01:40Z }]\n\n[identities.operator]")))  # fmt: skip
    bench.now = expiry - 0.001
    assert serial_of(bench.sign()) == 1
    bench.now = float(expiry)
    assert code_of(bench.sign()) == "token_expired"


def test_the_digest_that_decides_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    compared: list[tuple[str, str]] = []

    def never_equal(one: str, other: str) -> bool:
        compared.append((one, other))
        return False

    monkeypatch.setattr("signer.policy.decide.hmac.compare_digest", never_equal)
    assert code_of(bench.sign()) == "token_unknown"
    known = bench.policy.tokens
    assert compared
    assert all(one in known and other in known for one, other in compared)


def test_faults_are_told_in_the_order_that_vault_clients_expect() -> None:
    bad_body = BadRequest("field_malformed", "field ttl: bad")
    bench = Bench()
    who = caller("stranger")
    order = [
        (Sign(caller(None), "llmops", bad_body), "token_missing"),
        (Sign(who, "llmops", bad_body), "role_not_granted"),
        (Sign(who, "no-such-role", bad_body), "field_malformed"),
        (Sign(who, "no-such-role", builders.ask()), "unknown_role"),
        (sign(public_key="", principals=("root",)), "public_key_missing"),
        (sign(public_key="junk", ttl=10**6), None),
    ]
    for command, code in order:
        reply = bench.ask(command)[0]
        assert isinstance(reply, SignerError)
        if code is not None:
            assert reply.code == code
        else:
            assert reply.code.startswith("public_key_")


# --- the clock ----------------------------------------------------------------------------------------------------


def test_a_clock_more_than_60_seconds_behind_the_ledger_signs_nothing_and_says_by_how_much() -> None:
    bench = Bench()
    bench.sign()
    bench.now = NOW - 60.0
    assert serial_of(bench.sign()) == 2
    bench.now = NOW - 61.0
    reply = bench.sign()
    assert code_of(reply) == "clock_behind"
    assert "61 s behind" in str(reply)
    bench.restart()
    assert code_of(bench.sign()) == "clock_behind"
    bench.now = float(NOW)
    assert serial_of(bench.sign()) == 3


def test_nothing_is_recorded_of_a_request_that_the_clock_refuses() -> None:
    bench = Bench()
    bench.sign()
    bench.now = NOW - 300.0
    before = len(bench.store.entries)
    bench.sign()
    assert len(bench.store.entries) == before


def test_readiness_tells_a_clock_that_is_behind() -> None:
    bench = Bench()
    bench.core.check_ready()
    bench.now = NOW - 61.0
    with pytest.raises(Unavailable, match="61 s behind"):
        bench.core.check_ready()


# --- limits -------------------------------------------------------------------------------------------------------


LIMITED = policy(builders.POLICY, role_lines("limits = { per_minute = 3, live = 5 }"))


@pytest.mark.parametrize("restarts", [False, True])
def test_the_limit_per_minute_counts_the_last_60_seconds_also_after_a_restart(restarts: bool) -> None:
    bench = Bench(policy=LIMITED)
    for second in range(3):
        bench.now = float(NOW + second)
        serial_of(bench.sign())
    if restarts:
        bench.restart()
    bench.now = NOW + 59.9
    assert code_of(bench.sign()) == "rate_limited"
    bench.now = NOW + 60.0
    serial_of(bench.sign())
    assert code_of(bench.sign()) == "rate_limited"


@pytest.mark.parametrize("restarts", [False, True])
def test_the_limit_of_live_certificates_counts_until_they_expire_also_after_a_restart(restarts: bool) -> None:
    bench = Bench(policy=LIMITED)
    for number in range(5):
        bench.now = float(NOW + number * 30)
        serial_of(bench.sign())
    if restarts:
        bench.restart()
    bench.now = NOW + 899.0
    assert code_of(bench.sign()) == "too_many_live"
    bench.now = NOW + 900.0
    serial_of(bench.sign())
    assert code_of(bench.sign()) == "too_many_live"


def test_limits_hold_within_one_batch_and_are_each_identitys_own() -> None:
    bench = Bench(policy=LIMITED)
    replies = bench.ask(*[sign() for _ in range(5)], sign("operator"))
    assert [isinstance(reply, dict) for reply in replies] == [True] * 3 + [False] * 2 + [True]


def test_a_clock_that_was_ahead_for_a_moment_does_not_lift_a_limit() -> None:
    bench = Bench(policy=LIMITED)
    for _ in range(3):
        serial_of(bench.sign())
    bench.now = NOW + 86_400.0
    bench.ask(Explain(caller(), "llmops", builders.ask()))  # records nothing, so the clock guard does not notice
    bench.now = float(NOW)
    assert code_of(bench.sign()) == "rate_limited"


@pytest.mark.parametrize("reads_state", ["a start", "a health check"])
def test_a_clock_that_was_ahead_when_the_state_was_read_does_not_lift_a_limit(reads_state: str) -> None:
    """Found by 100,000 random commands, seed 1011165973."""
    bench = Bench(policy=LIMITED)
    for _ in range(3):
        serial_of(bench.sign(ttl=1))
    bench.store.fail = "before"
    bench.ask(Freeze(caller("operator"), "role:llmops", "drill"))  # after a failure the state is read again
    bench.store.fail = ""
    bench.now = NOW + 119.0
    if reads_state == "a start":
        bench.restart()
    else:
        bench.core.check_ready()
    bench.now = NOW + 59.0
    assert code_of(bench.sign(ttl=1)) == "rate_limited"


def test_a_batch_that_was_not_recorded_counts_towards_no_limit() -> None:
    bench = Bench(policy=LIMITED)
    bench.store.fail = "before"
    bench.ask(sign(), sign(), sign())
    bench.store.fail = ""
    assert [isinstance(bench.sign(), dict) for _ in range(4)] == [True, True, True, False]


def test_audit_a_refusal_whose_record_failed_is_recorded_by_the_next_one() -> None:
    bench = Bench()
    bench.store.fail = "before"
    assert bench.sign(principals=("root",)).code == "ledger_unavailable"
    bench.store.fail = ""
    assert bench.sign(principals=("root",)).code == "principal_not_allowed"
    (body,) = bench.store.bodies("request.refused")
    assert body["code"] == "principal_not_allowed"


def test_audit_counts_of_refusals_whose_record_failed_are_recorded_later() -> None:
    bench = Bench()
    for _ in range(4):
        bench.sign(principals=("root",))
    bench.now += 60
    bench.store.fail = "before"
    bench.core.tick()
    bench.store.fail = ""
    bench.core.tick()
    (body,) = bench.store.bodies("refusals.repeated")
    assert body["count"] == 3


def test_the_core_knows_whether_a_cutover_is_in_force_also_after_a_restart() -> None:
    bench = Bench()

    def record(operation: OperationName) -> list[int | None]:
        bench.ask(RecordOperation(caller("operator"), OperationBody(operation=operation, outcome="applied")))
        before = bench.core.cut_over()
        bench.restart()
        bench.core.check_ready()
        return [before, bench.core.cut_over()]

    assert record("cutover") == [NOW, NOW]
    assert record("rollback") == [None, None]
