"""The backends: mode, order, public key and readiness of whoever signs."""

from __future__ import annotations

import logging

import pytest

from signer.ca.agent import CaAgent
from signer.ca.backends import SLOW_AGENT, SLOW_VAULT, AgentBackend, Backend, FileBackend, VaultBackend
from signer.errors import SignerError, Unavailable
from signer.model import Grant, PublicKey, Returned
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.signing import CertifyInPool, SignAtOnce, SignInPool
from tests.parts import builders
from tests.parts.agents import FakeAgent
from tests.parts.builders import PretendKey

OURS, NEW = PretendKey(), PretendKey("new")
VAULTS = builders.public_key(name="vault")


class Client:
    """A client of Vault that is ready as long as `fault` is None."""

    def __init__(self) -> None:
        self.fault: SignerError | None = None

    def sign(self, _grant: Grant) -> Returned:
        return Returned("a line", b"a key")

    def known_ca(self) -> PublicKey:
        if self.fault is not None:
            raise self.fault
        return VAULTS

    def check_ready(self) -> None:
        if self.fault is not None:
            raise self.fault


def test_the_key_of_a_file_signs_at_once() -> None:
    backend: Backend = FileBackend(OURS)
    assert isinstance(backend.order, SignAtOnce)
    assert (backend.mode, backend.public_key(), backend.order.local_key) == ("local", OURS.public, OURS.public)
    assert backend.facts() == {"ca": OURS.fingerprint, "mode": "local"}
    backend.check_ready()
    backend.use_key(NEW)
    assert (backend.public_key(), backend.order.local_key) == (NEW.public, NEW.public)


def test_vault_makes_certificates_and_a_local_key_only_compares() -> None:
    client = Client()
    vault, shadow = VaultBackend(client), VaultBackend(client, OURS.public)
    backends: tuple[Backend, ...] = (vault, shadow)
    assert [backend.mode for backend in backends] == ["vault", "shadow"]
    assert [backend.public_key() for backend in backends] == [VAULTS, VAULTS]
    assert [backend.order.local_key for backend in backends] == [None, OURS.public]
    assert vault.facts() == {"ca": "vault", "mode": "vault"}
    assert shadow.facts() == {"ca": "vault", "mode": "shadow", "compared_with": OURS.fingerprint}
    shadow.use_key(NEW)
    assert isinstance(shadow.order, CertifyInPool)
    assert type(shadow.order.local_key) is PublicKey, "the public half alone"
    assert (shadow.mode, shadow.order.local_key, shadow.public_key()) == ("shadow", NEW.public, VAULTS)
    client.fault = Unavailable("vault_down", "Vault cannot be reached")
    for call in (vault.check_ready, shadow.public_key):
        with pytest.raises(Unavailable):
            call()


@pytest.mark.unix_socket
def test_a_key_in_an_agent_signs_in_the_pool() -> None:
    with FakeAgent() as fake:
        backend = agent_backend(fake)
        seen: Backend = backend
        assert isinstance(seen.order, SignInPool)
        assert (seen.mode, seen.public_key().blob) == ("local", fake.ca.blob)
        assert seen.facts()["key_source"] == "agent"
        backend.use_key(NEW)
        assert seen.public_key() == NEW.public


def agent_backend(fake: FakeAgent) -> AgentBackend:
    agent = CaAgent(fake.socket)
    return AgentBackend(agent, agent.find_key(fingerprint_of(fake.ca.blob)))


def state(backend: AgentBackend) -> str:
    try:
        backend.check_ready()
    except SignerError as error:
        return error.code
    return "ready"


@pytest.mark.unix_socket
def test_a_look_finds_what_is_wrong_with_an_agent_and_that_it_is_well_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with FakeAgent() as fake:
        backend = agent_backend(fake)
        assert state(backend) == "ready"
        fake.held = [VAULTS.blob]
        assert state(backend) == "ready", "no request is sent"
        for _ in range(3):
            backend.look_once()
            assert state(backend) == "ca_agent_key_missing"
        fake.reply = lambda _message: None
        backend.look_once()
        assert state(backend) == "ca_agent_down"
        fake.reply, fake.held = fake.honest, [VAULTS.blob, fake.ca.blob]
        backend.look_once()
        assert state(backend) == "ready"
    told = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert told == ["the ssh-agent cannot sign", "the ssh-agent cannot sign", "the ssh-agent can sign"]


@pytest.mark.unix_socket
def test_an_agent_that_lists_its_key_and_does_not_sign_is_not_ready_until_it_signs() -> None:
    with FakeAgent() as fake:
        backend = agent_backend(fake)
        key = backend.order.key
        fake.reply = lambda message: b"\x05" if message[0] == 13 else fake.honest(message)
        with pytest.raises(Unavailable):
            key.sign(b"data")
        assert state(backend) == "ca_agent_refused"
        backend.look_once()
        assert state(backend) == "ca_agent_refused", "it was asked to sign, not only for its list"
        fake.reply = fake.honest
        backend.look_once()
        assert state(backend) == "ready"
        count = len(fake.messages)
        backend.look_once()
        assert [message[0] for message in fake.messages[count:]] == [11], "a key that signs is not asked to"


def test_callers_of_a_slow_signer_wait_within_a_deadline_and_are_told_in_words_without_secrets() -> None:
    fault = RuntimeError("with a token in it")
    for slow, name, deadline in ((SLOW_VAULT, "vault", 5.0), (SLOW_AGENT, "ca_agent", 3.0)):
        assert slow.deadline == deadline
        errors = slow.busy(64), slow.late(), slow.failed(fault), slow.stopping()
        assert [error.code for error in errors] == [f"{name}_busy", f"{name}_slow", f"{name}_failed", "keeper_stopping"]
        assert "token" not in "".join(f"{error.text}{error.hint}" for error in errors).replace("its token", "")
        assert "64" in errors[0].text
