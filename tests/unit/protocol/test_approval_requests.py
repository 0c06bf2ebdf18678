"""Messages about requests, waivers and incidents: each is its command, and a malformed body is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from signer.errors import BadRequest
from signer.model import Caller
from signer.protocol.commands import (
    Approve,
    Claim,
    CloseIncident,
    Command,
    Deny,
    EndWaiver,
    ListIncidents,
    ListRequests,
    ListWaivers,
    ShowRequest,
    Sign,
    Withdraw,
    read_command,
)

CALLER = Caller("t", "192.0.2.7", "r-1")
NAME = "r-abcdefghij"
SECRET = "5e" * 32
UNTIL = "2026-11-29T12:00:00Z"


def read(op: str, body: object = None, **header: Any) -> Command:
    fields = {"op": op, "token": "t", "address": "192.0.2.7", "request_id": "r-1", **header}
    return read_command(fields, b"" if body is None else json.dumps(body).encode(), lambda _caller: None)


def fault(op: str, body: object = None, **header: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        read(op, body, **header)
    return f"{caught.value.code}: {caught.value.text}"


def test_each_operation_is_its_command() -> None:
    waiver = {"until": UNTIL, "uses": 5}
    for found, expected in (
        (read("request", request=NAME), ShowRequest(CALLER, NAME)),
        (read("requests"), ListRequests(CALLER, None, None, None)),
        (
            read("requests", state="pending", identity="ci", before=NAME),
            ListRequests(CALLER, "pending", "ci", NAME),
        ),
        (read("claim", {"public_key": "k", "claim_secret": SECRET}, request=NAME), Claim(CALLER, NAME, "k", SECRET)),
        (read("claim", request=NAME), Claim(CALLER, NAME, "", None)),
        (read("approve", {"signature": "s"}, request=NAME), Approve(CALLER, NAME, "s", None)),
        (
            read("approve", {"signature": "s", "waiver": waiver}, request=NAME),
            Approve(CALLER, NAME, "s", (UNTIL, 5)),
        ),
        (read("deny", {"reason": "no"}, request=NAME), Deny(CALLER, NAME, "no")),
        (read("deny", request=NAME), Deny(CALLER, NAME, "")),
        (read("withdraw", request=NAME), Withdraw(CALLER, NAME)),
        (read("waivers"), ListWaivers(CALLER)),
        (read("end_waiver", {"reason": "enough"}, waiver="w-1"), EndWaiver(CALLER, "w-1", "enough")),
        (read("incidents"), ListIncidents(CALLER, False)),
        (read("incidents", state="all"), ListIncidents(CALLER, True)),
        (read("close_incident", {"reference": "4a1f09c"}, incident="i-1"), CloseIncident(CALLER, "i-1", "4a1f09c")),
    ):
        assert found == expected


MALFORMED: list[tuple[str, object, dict[str, Any], str]] = [
    ("request", None, {}, "request"),
    ("request", None, {"request": ["r"]}, "request"),
    ("requests", None, {"state": "open"}, "state"),
    ("claim", {"public_key": 1}, {"request": NAME}, "public_key"),
    ("claim", {"claim_secret": SECRET[:-1]}, {"request": NAME}, "claim_secret"),
    ("claim", {"claim_secret": SECRET.upper()}, {"request": NAME}, "claim_secret"),
    ("claim", {"secret": SECRET}, {"request": NAME}, "secret"),
    ("approve", {}, {"request": NAME}, "signature"),
    ("approve", {"signature": "x" * 16_385}, {"request": NAME}, "signature"),
    ("approve", {"signature": "s", "waiver": {"until": UNTIL}}, {"request": NAME}, "waiver.uses"),
    ("approve", {"signature": "s", "waiver": {"until": UNTIL, "uses": "5"}}, {"request": NAME}, "waiver.uses"),
    ("approve", {"signature": "s", "waiver": {"until": UNTIL, "uses": 1.5}}, {"request": NAME}, "waiver.uses"),
    ("approve", {"signature": "s", "waiver": {"until": UNTIL, "uses": True}}, {"request": NAME}, "waiver.uses"),
    ("approve", {"signature": "s", "waiver": {"until": "noon", "uses": 5}}, {"request": NAME}, "waiver.until"),
    ("approve", {"signature": "s", "decision": "approve"}, {"request": NAME}, "decision"),
    ("deny", {"reason": "x" * 501}, {"request": NAME}, "reason"),
    ("deny", {"reason": "a\x1b[2J"}, {"request": NAME}, "reason"),
    ("withdraw", {"reason": "x"}, {"request": NAME}, "reason"),
    ("end_waiver", {}, {}, "waiver"),
    ("close_incident", {}, {"incident": "i-1"}, "reference"),
    ("close_incident", {"reference": "a\nb"}, {"incident": "i-1"}, "reference"),
    ("sign", {"claim_sha256": SECRET[:-1]}, {"role": "prod"}, "claim_sha256"),
]


@pytest.mark.parametrize("op, body, header, named", MALFORMED)
def test_a_malformed_body_is_refused_by_the_name_of_its_field(
    op: str, body: object, header: dict[str, Any], named: str
) -> None:
    if op == "sign":  # its errors are for authenticated callers only
        command = read(op, body, **header)
        assert isinstance(command, Sign)
        assert isinstance(command.request, BadRequest)
        assert named in command.request.text
        return
    assert named in fault(op, body, **header)


def test_a_secret_is_not_in_the_repr_of_a_command() -> None:
    assert SECRET not in repr(read("claim", {"claim_secret": SECRET}, request=NAME))
