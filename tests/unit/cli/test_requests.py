"""The operator's side of an approval: what is signed is computed from what is shown, and all of it is shown."""

from __future__ import annotations

from typing import Any

import pytest

from signer.cli.requests import describe, read_request
from signer.cli.ssh_signing import choose_key
from signer.errors import BadFormat, Unavailable
from signer.ssh.publickey import parse_public_key
from signer.ssh.statement import request_digest
from tests.parts.fido import FidoKey
from tests.parts.keys import KeyRing

FROZEN: dict[str, Any] = {
    "id": "r-k3v9q2m7xa", "nonce": "ab" * 16, "asked": "2026-11-29T11:00:00Z", "expires": "2026-11-29T12:00:00Z",
    "policy": "0" * 64, "identity": "deploy-agent", "kind": "agent", "role": "production", "key_id": "deploy-agent:x",
    "principals": ["llmops"], "critical_options": {}, "extensions": {"permit-pty": ""}, "ttl": 900,
    "reason": "ticket 4711", "address": "192.0.2.7", "binding": {"claim_sha256": "cd" * 32},
}  # fmt: skip
NOW = 1_795_950_000


def reply_of(frozen: dict[str, Any], /, **other: Any) -> dict[str, Any]:
    known = {"request": frozen["id"], "state": "pending", "digest": request_digest(frozen), "frozen": frozen}
    return {**known, "expires": frozen["expires"], "needs": 1, "approvals": [], "may_approve": ["anna"], **other}


def shown_lines(frozen: dict[str, Any], **other: Any) -> str:
    return "\n".join(describe(read_request(reply_of(frozen, **other)), "with nothing", NOW))


def test_a_request_is_read_with_the_digest_of_its_fields() -> None:
    shown = read_request(reply_of(FROZEN), "r-k3v9q2m7xa")
    assert (shown.id, shown.state, shown.digest) == ("r-k3v9q2m7xa", "pending", request_digest(FROZEN))


@pytest.mark.parametrize("field", sorted(FROZEN))
def test_a_digest_of_other_fields_is_noticed_before_anything_is_signed(field: str) -> None:
    """The service shows one request and has another signed: the digest sent along is that of the other one."""
    value = FROZEN[field]
    other = (
        {**value, "x": "y"} if isinstance(value, dict) else [*value, "root"] if isinstance(value, list) else value * 2
    )
    with pytest.raises(BadFormat) as caught:
        read_request(reply_of(FROZEN, digest=request_digest({**FROZEN, field: other})))
    assert caught.value.code == "approval_request_differs"


@pytest.mark.parametrize(
    "reply",
    [reply_of(FROZEN, request="r-another222"), reply_of({**FROZEN, "id": "r-another222"})],
    ids=["told", "frozen"],
)
def test_another_request_than_the_one_asked_for_is_noticed(reply: dict[str, Any]) -> None:
    with pytest.raises(BadFormat) as caught:
        read_request(reply, "r-k3v9q2m7xa")
    assert caught.value.code == "approval_request_differs"


@pytest.mark.parametrize(
    "reply",
    [
        {},
        reply_of(FROZEN, frozen=None),
        reply_of(FROZEN, state="granted"),
        reply_of({**FROZEN, "ttl": "900"}),
        reply_of({**FROZEN, "principals": ["llmops", 7]}),
        reply_of({**FROZEN, "critical_options": {"force-command": None}}),
        reply_of({key: value for key, value in FROZEN.items() if key != "role"}),
    ],
)
def test_what_is_no_request_is_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(BadFormat) as caught:
        read_request(reply)
    assert caught.value.code == "bad_approval_request"


def test_every_field_that_is_signed_is_shown_also_one_that_this_release_does_not_know() -> None:
    text = shown_lines({**FROZEN, "hosts": ["db1", "db2"]})
    shown = [
        "r-k3v9q2m7xa", "ab" * 16, "deploy-agent (agent)", "production", "192.0.2.7", "llmops", "ticket 4711",
        "permit-pty", "Valid: 15m", "cd" * 32, "0" * 64, "hosts: ['db1', 'db2']", 'Key ID: "deploy-agent:x"',
    ]  # fmt: skip
    assert [value for value in shown if value not in text] == []


def test_an_invalid_time_is_refused() -> None:
    with pytest.raises(BadFormat, match="the service sent an invalid time") as caught:
        shown_lines(FROZEN, expires="soon")
    assert caught.value.code == "bad_approval_request"


@pytest.mark.parametrize(
    "told, line",
    [
        ([{"channel": "ops", "kind": "ntfy", "state": "taken"}], "told        ops (ntfy): taken"),
        (["ops", 5, None, {"channel": "ops", "kind": "ntfy", "state": "taken"}], "told        ops (ntfy): taken"),
        ([{"channel": "ops", "kind": "ntfy", "state": "taken", "people": 5}], "told        ops (ntfy): taken"),
        ([{"channel": ["ops"], "kind": "ntfy", "state": "taken"}], "told        ['ops'] (ntfy): taken"),
        ([5], "told        nobody"),
    ],
)
def test_malformed_rows_of_who_was_told_are_left_out(told: list[Any], line: str) -> None:
    assert line in shown_lines(FROZEN, told=told).splitlines()


@pytest.mark.parametrize(
    "reply, line",
    [
        ({"approvals": 5}, "approvals   needs 1, none yet, may approve: anna"),
        ({"approvals": ["anna", {"by": "anna", "key": "K"}]},
         "approvals   needs 1, given by anna with K, may approve: anna"),
        ({"approvals": [{"by": "anna", "key": "K", "waiver": {}}]},
         "approvals   needs 1, given by anna with K, waiver until None, may approve: anna"),
        ({"may_approve": 5}, "approvals   needs 1, none yet"),
    ],
)  # fmt: skip
def test_malformed_rows_of_who_approved_are_left_out(reply: dict[str, Any], line: str) -> None:
    assert line in shown_lines(FROZEN, **reply).splitlines()


def test_a_forced_command_comes_first_and_its_absence_is_said() -> None:
    assert "opens every host that accepts principal llmops, for any command" in shown_lines(FROZEN)
    forced = shown_lines({**FROZEN, "critical_options": {"force-command": "/usr/bin/deploy"}})
    assert "runs only `/usr/bin/deploy` on every host that accepts principal llmops" in forced


def test_the_only_fido_key_of_an_agent_is_chosen_before_all_plain_ones(keyring: KeyRing) -> None:
    plain = [parse_public_key(keyring("ed25519", name).public_line) for name in ("user", "ca")]
    fido = parse_public_key(FidoKey().line)
    assert choose_key([plain[0]]) == plain[0]
    assert choose_key([*plain, fido]) == fido
    unclear = "approval_key_unclear"
    for keys, code in (([], "approval_key_not_found"), (plain, unclear), ([fido] * 2, unclear)):
        with pytest.raises(Unavailable) as caught:
            choose_key(keys)
        assert caught.value.code == code
