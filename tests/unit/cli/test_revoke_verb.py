"""`signer revoke` says how many hosts have the new list, and succeeds where that cannot be known."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from signer.api_client import ApiClient
from signer.errors import Refused, SignerError, Unavailable
from signer.service.hosts_seen import Fetch
from signer.service.overview import hosts_reply
from signer.service.publisher import ListState
from tests.parts.answering import answer_commands
from tests.parts.command import Ran, run

REVOKE = ("revoke", "--serial", "4711", "--reason", "INC-812", "--yes", "--token-file", "operator.token")
VERSION = 2  # of the list with this revocation: the ledger's second event


@pytest.fixture(autouse=True)
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_commands(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)


def hosts_with(monkeypatch: pytest.MonkeyPatch, newest: int, *seen: tuple[int, int]) -> None:
    """`/api/hosts` knows list `newest`, and hosts with a version and the seconds since they fetched it."""
    now = int(time.time())
    fetches = [Fetch(f"edge{number}", version, now - ago, "") for number, (version, ago) in enumerate(seen)]
    reply = hosts_reply(ListState(newest, now, newest), fetches).model_dump()
    monkeypatch.setattr(ApiClient, "hosts", lambda _client: reply)


def revoked(*more: str) -> Ran:
    ran = run(*REVOKE, *more)
    assert ran.status == 0, ran.err
    return ran


def test_hosts_that_have_the_list_are_counted_and_those_not_seen_lately_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts_with(monkeypatch, VERSION, (VERSION, 5), (VERSION - 1, 5), (VERSION - 1, 5), (VERSION, 7_200))
    assert f"1 of 3 hosts seen in the last 15 minutes have version {VERSION} or a newer one\n" in revoked().out


def test_hosts_with_the_list_before_do_not_count_while_the_service_still_calls_it_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts_with(monkeypatch, VERSION - 1, (VERSION - 1, 5), (VERSION - 1, 5))
    assert json.loads(revoked("--json").out)["hosts"] == {"seen": 2, "current": 0}


def test_hosts_with_a_list_made_since_have_the_revocation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_with(monkeypatch, VERSION + 1, (VERSION + 1, 5))
    assert json.loads(revoked("--json").out)["hosts"] == {"seen": 1, "current": 1}


def test_without_a_host_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_with(monkeypatch, VERSION)
    assert "no host fetched the list in the last 15 minutes\n" in revoked().out
    hosts_with(monkeypatch, VERSION)
    assert json.loads(revoked("--json").out)["hosts"] == {"seen": 0, "current": 0}


@pytest.mark.parametrize(
    "error",
    [
        Refused("right_missing", "ann lacks the right ledger.read", "ask an operator"),
        Unavailable("service_down", "cannot reach the signing service", "check it"),
    ],
)
def test_it_succeeds_where_the_hosts_cannot_be_read(monkeypatch: pytest.MonkeyPatch, error: SignerError) -> None:
    def fail(_client: ApiClient) -> None:
        raise error

    monkeypatch.setattr(ApiClient, "hosts", fail)
    out = revoked().out
    assert out.startswith(f"revoked by serial 4711: list version {VERSION}\n")
    assert f" have version {VERSION} is not known: {error.text}\n" in out
    assert json.loads(revoked("--json").out)["hosts"] is None
