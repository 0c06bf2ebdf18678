"""Approved requests where signing takes time: Vault signs, or an ssh-agent, and the world changes meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from signer.authority.certificates import PendingSignature
from signer.authority.vault_certificates import PendingCertificate
from signer.ca.backends import Backend
from signer.errors import SignerError
from signer.units import timestamp
from tests.parts import vault_episodes
from tests.parts.agent_episodes import PoolBackend
from tests.parts.asking import Asking, change_identity
from tests.parts.builders import public_line
from tests.parts.vault_episodes import DOWN, made


class VaultAsking(Asking):
    """Where Vault signs."""

    def make_backend(self) -> Backend:
        return vault_episodes.backend()

    def start(self, reply: Any) -> PendingCertificate:
        assert isinstance(reply, PendingCertificate), reply
        return reply


class AgentAsking(Asking):
    """Where an ssh-agent signs."""

    def make_backend(self) -> Backend:
        return PoolBackend(self.key)


@pytest.fixture
def bench() -> VaultAsking:
    return VaultAsking()


def code(reply: object) -> str:
    assert isinstance(reply, SignerError), reply
    return reply.code


def test_a_request_is_used_up_when_its_certificate_is_recorded(bench: VaultAsking) -> None:
    shown = bench.request()
    bench.approve(shown)
    pending = bench.start(bench.request())
    assert code(bench.request()) == "request_issued", "one approval, one certificate, also while Vault is asked"
    assert code(bench.claim(shown)) == "request_issued"
    assert bench.show(shown["request"])["state"] == "approved"
    (reply,) = bench.finish((pending, made(pending)))
    assert reply["role"] == "prod"
    assert bench.issued()[0]["request"] == shown["request"]
    assert bench.show(shown["request"])["state"] == "issued"


def test_a_request_can_be_claimed_again_when_vault_did_not_sign(bench: VaultAsking) -> None:
    shown = bench.bound()
    bench.approve(shown)
    pending = bench.start(bench.claim(shown))
    assert bench.finish((pending, DOWN)) == [DOWN]
    again = bench.start(bench.claim(shown))
    assert "certificate" in bench.finish((again, made(again)))[0]
    assert len(bench.issued()) == 1


MEANWHILE: dict[str, tuple[Any, str]] = {
    "the approver is frozen": (lambda b, s: b.freeze("identity:ben"), "approval_lost"),
    "the approver loses the right": (
        lambda b, s: b.use(change_identity(b.policy, "ben", may=frozenset())),
        "approval_lost",
    ),
    "the asker withdraws": (lambda b, s: b.withdraw(s), "request_withdrawn"),
    "the asker is frozen": (lambda b, s: b.freeze("identity:agent-7"), "frozen"),
}


@pytest.mark.parametrize("change, refused", MEANWHILE.values(), ids=MEANWHILE)
def test_what_changes_while_vault_is_asked_counts(bench: VaultAsking, change: Any, refused: str) -> None:
    shown = bench.bound()
    bench.approve(shown, "ben")
    pending = bench.start(bench.claim(shown))
    change(bench, shown)
    assert code(bench.finish((pending, made(pending)))[0]) == refused
    assert bench.issued() == []


def test_uses_of_a_waiver_count_while_vault_is_asked(bench: VaultAsking) -> None:
    terms = {"until": timestamp(int(bench.now) + 600), "uses": 1}
    bench.approve(bench.request(), waiver=terms)
    first = bench.start(bench.request())
    other = public_line(name="another")
    second = bench.start(bench.request(public_key=other))
    assert bench.request(public_key=public_line(name="third"))["state"] == "pending"
    name = bench.waivers("anna")
    assert name == []
    assert bench.finish((second, DOWN)) == [DOWN]
    third = bench.start(bench.request(public_key=other))
    bench.finish((first, made(first, serial=1)), (third, made(third, serial=2)))
    assert [record["waiver"] is not None for record in bench.issued()] == [False, True]


def test_a_waiver_that_ends_while_vault_is_asked_covers_nothing(bench: VaultAsking) -> None:
    terms = {"until": timestamp(int(bench.now) + 600), "uses": 3}
    shown = bench.request()
    bench.approve(shown, waiver=terms)
    pending = bench.start(bench.request(public_key=public_line(name="another")))
    bench.end_waiver("w-" + shown["request"][2:])
    assert code(bench.finish((pending, made(pending)))[0]) == "waiver_ended"
    assert bench.issued() == []


def test_a_certificate_of_an_agent_is_withheld_if_its_approver_is_frozen_meanwhile() -> None:
    bench = AgentAsking()
    shown = bench.request()
    bench.approve(shown, "ben")
    pending = bench.request()
    assert isinstance(pending, PendingSignature)
    bench.freeze("identity:ben")
    (reply,) = bench.finish((pending, bench.key.sign(pending.certificate.unsigned)))
    assert code(reply) == "approval_lost"
    assert bench.store.bodies("certificate.withheld")[0]["error"] == "approval_lost"
