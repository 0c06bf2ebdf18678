"""What crosses the keeper's socket backwards: every shape comes back as it was, and nothing else is read."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from signer.authority.queries import recorded_reply
from signer.errors import Refused, SignerError
from signer.model import Entry
from signer.protocol import replies
from signer.protocol.replies import (
    Certificate,
    CertificateWithWarnings,
    Explanation,
    FreezeState,
    Ready,
    Reply,
    decode_reply,
    encode_reply,
    expect,
)

CERTIFICATE = Certificate(
    certificate="ssh-ed25519-cert-v01@openssh.com AAAA",
    serial="18446744073709551615",
    key_id="ci:llmops",
    identity="ci",
    role="llmops",
    principals=["llmops", "ü\u2028"],
    valid_after="2026-11-22T14:02:11Z",
    valid_before="2026-11-22T14:17:11Z",
    expires_in=900,
    ca_fingerprint="SHA256:x",
)


@pytest.mark.parametrize(
    "reply",
    [
        CERTIFICATE,
        CertificateWithWarnings(certificate=CERTIFICATE, warnings=["a\nb"]),
        Explanation(identity="ci", role="llmops", granted=True, rules=[]),
        FreezeState(scope="all", frozen=False),
        Ready(ready=True, ca_fingerprint="f", policy="p", mode="local"),
    ],
    ids=lambda reply: type(reply).__name__,
)
def test_a_reply_comes_back_as_it_was(reply: Reply) -> None:
    message = encode_reply(reply)
    assert decode_reply(message) == reply
    assert encode_reply(decode_reply(message)) == message


def test_a_field_that_was_not_set_is_left_out() -> None:
    assert set(json.loads(Explanation(identity="ci", role="r", granted=True, rules=[]).as_json())) == {
        "identity",
        "role",
        "granted",
        "rules",
    }


def test_an_error_comes_back_with_its_code_and_facts() -> None:
    with pytest.raises(SignerError) as caught:
        decode_reply(encode_reply(Refused("frozen", "all is frozen", "ask", {"role": "llmops", "n": [1, None]})))
    error = caught.value
    assert (error.code, error.text, error.hint) == ("frozen", "all is frozen", "ask")
    assert error.facts == {"role": "llmops", "n": [1, None]}


def test_no_answer_is_a_keeper_that_is_gone() -> None:
    with pytest.raises(SignerError) as caught:
        decode_reply(b"")
    assert caught.value.code == "keeper_gone"


@pytest.mark.parametrize(
    "message",
    [
        b'{"reply": {}}',
        b"Reply\n{}",
        b'object\n{"scope":"all","frozen":true}',
        b"FreezeState\n",
        b'FreezeState\n{"scope":"all"}',
        b'FreezeState\n{"scope":"all","frozen":1}',
        b'FreezeState\n{"scope":"all","frozen":true,"more":1}',
        b'FreezeState\n{"scope":"all","frozen":true} {}',
        b"Freezes\n[]",
        b'Error\n{"code":"frozen"}',
        b'freezestate\n{"scope":"all","frozen":true}',
    ],
)
def test_an_unknown_shape_and_fields_that_do_not_fit_are_refused(message: bytes) -> None:
    with pytest.raises(SignerError) as caught:
        decode_reply(message)
    assert caught.value.code == "reply_malformed"


def test_a_reply_of_another_shape_than_the_expected_one_is_refused() -> None:
    assert expect(Certificate, CERTIFICATE) is CERTIFICATE
    with pytest.raises(SignerError) as caught:
        expect(Ready, CERTIFICATE)
    assert caught.value.code == "reply_malformed"


def test_a_reply_cannot_be_changed_or_made_with_the_wrong_types() -> None:
    with pytest.raises(ValidationError):
        CERTIFICATE.serial = "1"
    with pytest.raises(ValidationError):
        FreezeState(scope="all", frozen="yes")  # type: ignore[arg-type]


def test_every_shape_can_be_read_but_parts_of_shapes_cannot() -> None:
    shapes = {value for value in vars(replies).values() if isinstance(value, type) and issubclass(value, Reply)}
    parts = {replies.Rule, replies.CertificateRow, replies.OperationRow, replies.FreezeRow, replies.Extensions}
    parts |= {replies.RevocationRow, replies.HitRow, replies.HitCount}
    parts |= {replies.LedgerState, replies.LiveCertificates, replies.TokenEnd}
    parts |= {replies.Binding, replies.FrozenFields, replies.WaiverTerms, replies.ApprovalRow, replies.Denial}
    parts |= {replies.HostKeyRow, replies.HostRow, replies.ListStatus}
    parts |= {replies.NextSteps, replies.WaiverRow, replies.Closing}
    parts |= {replies.PasskeyRow, replies.ToldRow, replies.LedgerEntry}
    parts |= {replies.ActivityRow, replies.LiveOfIdentity, replies.MarkRow, replies.IdentityRow}
    parts |= {replies.GrantedRole, replies.ApprovalTerms, replies.ApprovalKeyRow}
    assert set(replies._SHAPES.values()) == shapes - parts - {Reply}


@pytest.mark.parametrize(
    "error",
    [
        Refused("frozen", "\ud800", "h"),
        Refused("frozen", "t", "\udcff"),
        Refused("frozen", "t", "h", {"a": "\ud800"}),
        Refused("frozen", "t", "h", {"a": object()}),
    ],
)
def test_an_error_that_cannot_be_encoded_is_an_internal_error_and_ends_nothing(error: SignerError) -> None:
    with pytest.raises(SignerError) as caught:
        decode_reply(encode_reply(error))
    assert caught.value.code == "internal_error"


def test_a_record_with_more_fields_than_this_release_knows_is_shown_without_them() -> None:
    texts = {"operation": "teleport", "outcome": "beamed", "plan": "", "evidence": "", "reason": ""}
    body = {**texts, "address": "", "request_id": "r", "later": 1}
    known = recorded_reply([Entry(1, 0, "operation.recorded", "a", json.dumps(body), "", "h")])
    assert isinstance(known, replies.OperationDetails)
    assert (known.operation, known.outcome) == ("teleport", "beamed")
