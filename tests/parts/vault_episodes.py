"""A core whose grants Vault signs: one request at a time, and random steps with the promises checked after each."""

from __future__ import annotations

from typing import Any

from signer.authority.certificates import PendingSignature
from signer.authority.core import Core
from signer.authority.vault_certificates import PendingCertificate
from signer.ca.backends import Backend, VaultBackend
from signer.errors import ForeignCertificate, SignerError, Unavailable
from signer.model import BACKDATE, Entry, Grant, PublicKey, Returned
from signer.protocol.commands import Sign
from signer.protocol.replies import Reply
from signer.ssh.publickey import parse_public_key
from tests.parts import builders
from tests.parts.episodes import BY_DIGEST, POLICIES, Episode
from tests.parts.fake_vault import ForeignCa
from tests.parts.watcher import Watcher

CA = ForeignCa()


class NoVault:
    """A client that the core must not call: the keeper does."""

    def sign(self, grant: Grant) -> Returned:
        raise AssertionError("the core asked Vault itself")

    def known_ca(self) -> PublicKey:
        return parse_public_key(CA.line)

    def check_ready(self) -> None:
        """Always ready."""


def backend(compared_with: PublicKey | None = None) -> VaultBackend:
    return VaultBackend(NoVault(), compared_with)


DOWN = Unavailable("vault_down", "Vault cannot be reached", "start Vault")


class Bench(builders.Bench):
    """A core without a key."""

    def make_backend(self) -> Backend:
        return backend()

    def send(self, who: str = "deploy-agent", **changes: Any) -> PendingCertificate:
        """The grant that one sign request gives out."""
        forward = self.sign(who, **changes)
        assert isinstance(forward, PendingCertificate), forward
        return forward

    def finish_one(self, forward: PendingCertificate, result: Returned | SignerError) -> Any:
        return self.finish((forward, result))[0]


def made(forward: PendingCertificate, **changes: Any) -> Returned:
    """What Vault makes of it."""
    return Returned(CA.certify(CA.fields(forward.grant, forward.asked_at, **changes)), CA.blob)


def code(reply: object) -> str:
    assert isinstance(reply, SignerError), reply
    return reply.code


SPOILED: tuple[dict[str, Any], ...] = (
    {"principals": ("root",)},
    {"principals": ()},
    {"cert_type": 2},
    {"valid_before": 2**40},
    {"valid_after": 0},
    {"key": builders.public_key(name="mallory").blob},
    {"extensions": (("permit-agent-forwarding", ""),)},
    {"critical_options": (("force-command", "/bin/sh"),)},
    {"key_id": "a\nb"},
    {"ca_key": ForeignCa(name="mallory").blob},
)


class VaultWatcher(Watcher):
    """What differs: serials are Vault's, and what was granted first may be recorded last."""

    def _issued(self, entry: Entry, body: dict[str, Any]) -> None:
        serial, asked_at = int(body["serial"]), body["valid_after"] + BACKDATE
        assert serial not in self.issued, "a serial comes twice"
        assert body["backend"] == "vault"
        frozen = {"all", f"role:{body['role']}", f"identity:{body['identity']}"} & self.frozen.keys()
        assert not frozen, f"released although {frozen} is frozen"
        policy = self.policies[body["policy"]]
        self._within_policy(body, policy, asked_at)
        held = self.held[body["identity"], body["role"]]
        held.append((serial, asked_at, body["valid_before"]))
        limits = policy.roles[body["role"]].limits
        for _, at, _ in held:
            if limits.per_minute is not None and asked_at <= at:
                assert sum(at - 60 < other <= at for _, other, _ in held) <= limits.per_minute, "too many in a minute"
        self.issued[serial] = body


class VaultEpisode(Episode):
    """A core whose grants Vault signs, sooner, later or wrongly."""

    def __init__(self, seed: str, store: Any) -> None:
        self.out: list[PendingCertificate] = []
        super().__init__(seed, store)
        self.watcher = VaultWatcher(BY_DIGEST)

    def start(self) -> Core:
        self.out.clear()  # a keeper that ended knows nothing of what it had sent
        return super().start()

    def make_backend(self) -> Backend:
        return backend()

    def swap_policy(self) -> None:
        self.core.use_policy(self.rng.choice(POLICIES))

    def batch(self) -> None:
        commands = [self.command() for _ in range(self.rng.choice((1, 1, 2, 3, 5, 8)))]
        self.commands += len(commands)
        answered = set()
        for index, reply in self.core.run(commands):
            answered.add(index)
            assert not isinstance(reply, PendingSignature), "Vault signs"
            if isinstance(reply, PendingCertificate):
                self.out.append(reply)
            else:
                assert not (isinstance(commands[index], Sign) and isinstance(reply, Reply)), "released by itself"
                found = self.look_up(reply)
                self.count(type(commands[index]).__name__, found)
                self.check_reply(commands[index], found)
        assert answered == set(range(len(commands))), "a command got no reply"
        if self.rng.random() < 0.8:
            self.come_back()

    def come_back(self) -> None:
        back = [forward for forward in self.out if self.rng.random() < 0.7]
        self.out = [forward for forward in self.out if forward not in back]
        self.rng.shuffle(back)
        spoiled: set[int] = set()
        results: list[tuple[PendingCertificate, Returned | SignerError]] = []
        for index, forward in enumerate(back):
            result, is_good = self.result(forward)
            results.append((forward, result))
            if not is_good:
                spoiled.add(index)
        answered = set()
        for index, reply in self.core.finish(results):
            answered.add(index)
            assert not (index in spoiled and isinstance(reply, Reply)), "a bad certificate was released"
            self.count("Released", reply)
            self.check_reply(back[index].command, reply)
        assert answered == set(range(len(back))), "a grant got no reply"
        self.faults[:] = [fault for fault in self.faults if not isinstance(fault, ForeignCertificate)]

    def result(self, forward: PendingCertificate) -> tuple[Returned | SignerError, bool]:
        roll = self.rng.random()
        if roll < 0.1:
            return DOWN, False
        if roll < 0.2:
            change = self.rng.choice(SPOILED)
            if change.get("critical_options") == forward.grant.critical_options:
                return DOWN, False
            return made(forward, **change), False
        if roll < 0.23 and self.watcher.issued:
            return made(forward, serial=self.rng.choice(list(self.watcher.issued))), False
        return made(forward, serial=self.rng.randrange(2**64)), True
