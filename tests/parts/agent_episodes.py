"""A core whose key is in an ssh-agent: recorded at once, signed later or never; random steps, each promise checked."""

from __future__ import annotations

from typing import Any

from signer.authority.certificates import PendingSignature
from signer.authority.core import Core
from signer.ca.agent import key_missing, too_slow
from signer.ca.backends import SLOW_AGENT, Backend
from signer.errors import SignerError, Unavailable
from signer.ledger.lookups import Lookup
from signer.model import PublicKey
from signer.protocol.commands import Sign
from signer.protocol.replies import Reply
from signer.ssh.signing import Obtained, SigningKey, SignInPool
from tests.parts import builders
from tests.parts.builders import PretendKey
from tests.parts.episodes import Episode

FAILED = (too_slow(), key_missing("SHA256:x"), Unavailable("keeper_stopping", "the service is stopping"))


class PoolBackend:
    """As `AgentBackend`, without an agent."""

    mode = "local"

    def __init__(self, key: SigningKey) -> None:
        self.use_key(key)

    def use_key(self, key: SigningKey) -> None:
        self.order = SignInPool(key, SLOW_AGENT)

    def public_key(self) -> PublicKey:
        return self.order.local_key

    def check_ready(self) -> None:
        """Always ready."""

    def facts(self) -> dict[str, object]:
        return {}


class Bench(builders.Bench):
    """A core whose certificates are signed later."""

    def make_backend(self) -> Backend:
        return PoolBackend(self.key)

    def send(self, who: str = "deploy-agent", **changes: Any) -> PendingSignature:
        """The certificate of one sign request, recorded and not signed."""
        pending = self.sign(who, **changes)
        assert isinstance(pending, PendingSignature), pending
        return pending

    def finish_one(self, pending: PendingSignature, result: Obtained | SignerError | None = None) -> Any:
        """Its reply; by default the key signs."""
        return self.finish((pending, pending.obtain() if result is None else result))[0]


class AgentEpisode(Episode):
    """A core whose agent signs sooner, later or never, and whose keeper ends with signatures under way."""

    def __init__(self, seed: str, store: Any) -> None:
        self.out: list[tuple[Sign, PendingSignature]] = []
        self.lost: set[int] = set()  # serials whose keeper ended before they were signed
        super().__init__(seed, store)

    def start(self) -> Core:
        self.lost |= {pending.certificate.fields.serial for _, pending in self.out}
        self.out.clear()
        return super().start()

    def make_backend(self) -> Backend:
        return PoolBackend(self.key)

    def batch(self) -> None:
        commands = [self.command() for _ in range(self.rng.choice((1, 1, 2, 3, 5, 8)))]
        self.commands += len(commands)
        answered = set()
        for index, reply in self.core.run(commands):
            answered.add(index)
            command = commands[index]
            if isinstance(reply, PendingSignature):
                assert isinstance(command, Sign)
                self.check_recorded(reply)
                self.out.append((command, reply))
                continue
            assert not isinstance(command, Sign) or isinstance(reply, SignerError), "released without a signature"
            assert isinstance(reply, Reply | SignerError | Lookup)
            found = self.look_up(reply)
            self.count(type(command).__name__, found)
            self.check_reply(command, found)
        assert answered == set(range(len(commands))), "a command got no reply"
        if self.rng.random() < 0.8:
            self.come_back()

    def check_recorded(self, pending: PendingSignature) -> None:
        """When it goes to the agent."""
        self.watcher.look(self.store.entries_after(self.watcher.seen))
        assert pending.certificate.fields.serial in self.watcher.issued, "to be signed and not recorded"

    def come_back(self) -> None:
        back = [item for item in self.out if self.rng.random() < 0.7]
        self.out = [item for item in self.out if item not in back]
        self.rng.shuffle(back)
        results: list[tuple[PendingSignature, Obtained | SignerError]] = []
        for _, pending in back:
            failed = self.rng.random() < 0.15
            results.append((pending, self.rng.choice(FAILED) if failed else PretendKey().sign(b"")))
        answered = set()
        for index, reply in self.core.finish(results):
            answered.add(index)
            (command, pending), result = back[index], results[index][1]
            self.count("Released", reply)
            self.check_reply(command, reply)
            serial = pending.certificate.fields.serial
            if isinstance(reply, Reply):
                assert isinstance(result, bytes), "released without a signature"
                self.watcher.check_release(self.watcher.issued[serial])
            elif self.store.fail == "" and reply.code != "ledger_unavailable":
                assert serial in self.watcher.withheld, f"neither released nor withheld: {reply.code}"
        assert answered == set(range(len(back))), "a certificate got no reply"
