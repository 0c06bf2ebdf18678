"""Random commands to a core, with the promises checked after each."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import pytest

from signer.authority.certificates import PendingSignature
from signer.authority.core import CLOCK_TOLERANCE, Core, ReplyOrError
from signer.authority.vault_certificates import PendingCertificate
from signer.ca.backends import Backend, FileBackend
from signer.errors import BadFile, SignerError, Unavailable
from signer.ledger.fold import fold_all
from signer.ledger.lookups import FindCertificates, Lookup, Reader
from signer.ledger.pages import CertificateReader
from signer.ledger.store import Ledger
from signer.model import ActiveFreeze, Entry, Filter, Issued
from signer.protocol.commands import (
    Command,
    Explain,
    Freeze,
    ListCertificates,
    ListFreezes,
    ListRoles,
    ShowHead,
    Sign,
    Unfreeze,
)
from signer.protocol.replies import CertificatePage, Reply, decode_reply
from signer.ssh.certificate import decode_certificate, encode_unsigned
from tests.parts import builders
from tests.parts.builders import MemoryStore, PretendKey
from tests.parts.watcher import Watcher

TEXT = (
    builders.POLICY
    + """
[roles.narrow]
principals = ["{identity}", "backup"]
default_principals = ["{identity}"]
default_ttl = "20s"
max_ttl = "90s"
key_types = ["ssh-ed25519"]
source_address = "caller"
force_command = "/usr/bin/deploy"
limits = { per_minute = 7, live = 5 }

[roles.busy]
principals = ["llmops"]
default_principals = ["llmops"]
default_ttl = "1s"
max_ttl = "5m"
key_types = ["ssh-ed25519", "ssh-rsa"]
reason_required = true
limits = { per_minute = 20 }

[identities.second]
kind = "workload"
roles = ["narrow", "busy"]
tokens = [{ sha256 = "{token:second}", expires = 2027-01-15T10:00:00Z }]
"""
)


MORE_ROLES = ('roles = ["llmops"]', 'roles = ["llmops", "narrow", "busy"]')


POLICIES = (
    builders.policy(TEXT, MORE_ROLES),
    builders.policy(TEXT, MORE_ROLES, ("live = 5", "live = 2"), ('max_ttl = "30m"', 'max_ttl = "16m"')),
    builders.policy(TEXT, MORE_ROLES, ('principals = ["{identity}", "backup"]', 'principals = ["{identity}"]')),
)


BY_DIGEST = {policy.digest: policy for policy in POLICIES}


ANOTHER_PIN = builders.policy(TEXT.replace("{ca}", PretendKey("another").fingerprint))


NAMES = ("deploy-agent", "operator", "second", "stranger")


ROLES = ("llmops", "narrow", "busy", "none")


SCOPES = ("all", "role:narrow", "role:busy", "identity:second", "identity:deploy-agent", "identity:nobody")


KEYS = (builders.public_line(), builders.public_line(name="other"), builders.public_line("ssh-rsa/2048"), "junk", "")


class Failing(Protocol):
    """A ledger that a test can look into, and that fails as `fail` says."""

    fail: str

    def entries_after(self, seq: int) -> list[Entry]: ...
    def lookups(self) -> Reader: ...
    def tables(self) -> tuple[dict[int, Issued], dict[str, ActiveFreeze]]: ...


class Memory(MemoryStore):
    def lookups(self) -> Reader:
        return self

    def entries_after(self, seq: int) -> list[Entry]:
        return self.entries[seq:]

    def tables(self) -> tuple[dict[int, Issued], dict[str, ActiveFreeze]]:
        return self.rows, self.frozen


class Disk(Ledger):
    """SQLite whose transaction is broken off before, amid or after its COMMIT."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fail = ""
        self.folder = folder
        self.pages = CertificateReader(folder)
        self.folds = random.Random(1)

    def lookups(self) -> Reader:
        return self.pages

    def commit(self, events: Any, now_ms: int) -> list[Entry]:
        if self.fail == "before":
            self._reset()
            raise Unavailable("ledger_unavailable", "the disk is full")
        if self.fail == "read":  # amid: a full file, in SQLite's own words
            pages = self.connection().execute("PRAGMA page_count").fetchone()[0]
            self.connection().execute(f"PRAGMA max_page_count = {pages}")
        entries = super().commit(events, now_ms)
        if self.fail == "after":
            self._reset()
            raise Unavailable("ledger_unavailable", "the answer was lost")
        return entries

    def entries_after(self, seq: int) -> list[Entry]:
        newer = "SELECT seq, time, kind, actor, body, prev, hash FROM events WHERE seq > ? ORDER BY seq"
        return [Entry(*row) for row in self.query(newer, (seq,))]

    def tables(self) -> tuple[dict[int, Issued], dict[str, ActiveFreeze]]:
        if self.folds.random() < 0.3:  # else the reader folds in memory what is missing
            with suppress(Unavailable):
                fold_all(self)
        return {row.serial: row for row in self.pages.certificates(Filter(limit=10**6))}, self.freezes()


class Episode:
    """One core from its first start through restarts to its end, driven by one random number generator."""

    def __init__(self, seed: str, store: Any) -> None:
        self.rng = random.Random(seed)
        self.store = store
        self.now = float(builders.NOW + self.rng.choice((0, 0, 7_000, 7_150)))  # at times near the end of a token
        self.key = PretendKey()
        self.faults: list[Exception] = []
        self.watcher = Watcher(BY_DIGEST)
        self.released: set[int] = set()
        self.replies: Counter[str] = Counter()
        self.commands = 0
        self.core = self.start()

    def start(self) -> Core:
        self.core = Core(
            policy=self.rng.choice(POLICIES),
            backend=self.make_backend(),
            ledger=self.store,
            clock=self.clock,
            random=self.rng.randbytes,
            report=self.faults.append,
        )
        self.core.begin({})
        return self.core

    def make_backend(self) -> Backend:
        """Who signs; subclasses have another one."""
        return FileBackend(self.key)

    def count(self, name: str, reply: ReplyOrError) -> None:
        self.replies[reply.code if isinstance(reply, SignerError) else name] += 1

    def clock(self) -> float:
        """Moves on while it is read, as clocks do; at times it is set, even in the middle of a batch."""
        self.now += self.rng.random() * 0.05
        if self.rng.random() < 0.001:
            self.now += self.rng.choice((-50, -5, 3, 20, 130))
        return self.now

    def step(self) -> None:
        roll = self.rng.random()
        self.store.fail = self.rng.choice(("before", "after", "read")) if roll < 0.06 else ""
        self.key.fails = RuntimeError("the token is gone") if 0.05 < roll < 0.09 else None
        if roll > 0.995:
            self.core = self.start()
        elif roll > 0.98:
            self.swap_policy()
        elif roll > 0.93:
            self.core.tick()
        elif roll > 0.89 or (self.clock_is_behind() and roll > 0.6):
            self.set_clock()
        else:
            self.batch()
        self.check()

    def clock_is_behind(self) -> bool:
        return self.watcher.newest_ms / 1000 - self.now > CLOCK_TOLERANCE

    def set_clock(self) -> None:
        if self.clock_is_behind() and self.rng.random() < 0.9:
            self.now = self.watcher.newest_ms / 1000 + self.rng.choice((-60, -10, 1))  # somebody has set it right
        else:
            self.now += self.rng.choice((-3600, -90, -30, -10, 0.5, 5, 5, 5, 10, 30, 61)) * self.rng.random()

    def swap_policy(self) -> None:
        if self.rng.random() < 0.3:
            before = self.core.policy
            with pytest.raises(BadFile):
                self.core.use_policy(ANOTHER_PIN)
            assert self.core.policy is before
        else:
            self.core.use_policy(self.rng.choice(POLICIES))

    def batch(self) -> None:
        commands = [self.command() for _ in range(self.rng.choice((1, 1, 2, 3, 5, 8)))]
        self.commands += len(commands)
        answered = set()
        for index, reply in self.core.run(commands):
            assert index not in answered
            answered.add(index)
            assert not isinstance(reply, PendingSignature | PendingCertificate), "the key signs at once"
            found = self.look_up(reply)
            self.replies[found.code if isinstance(found, SignerError) else type(commands[index]).__name__] += 1
            self.check_reply(commands[index], found)
        assert answered == set(range(len(commands))), "a command got no reply"

    def look_up(self, reply: ReplyOrError | Lookup) -> ReplyOrError:
        """The reply; a page is complete as of now, however far the views are."""
        if not isinstance(reply, Lookup):
            return reply
        fail, self.store.fail = self.store.fail, ""
        try:
            found = decode_reply(reply.answer(self.store.lookups()))
        finally:
            self.store.fail = fail
        if isinstance(reply, FindCertificates):
            assert isinstance(found, CertificatePage)
            self.watcher.look(self.store.entries_after(self.watcher.seen))
            wanted = [
                (str(serial), "withheld" if serial in self.watcher.withheld else "")
                for serial, body in reversed(self.watcher.issued.items())
                if reply.wanted.identity in (None, body["identity"])
                and (
                    reply.wanted.active_at is None
                    or (serial not in self.watcher.withheld and body["valid_before"] > reply.now)
                )
            ]
            shown = [(row.serial, row.status if row.status == "withheld" else "") for row in found.certificates]
            assert shown == wanted[: reply.wanted.limit], "a page lacks what was recorded before it"
        return found

    def command(self) -> Command:
        who = self.rng.choices((*NAMES, None), (8, 4, 6, 1, 1))[0]
        caller = builders.caller(who, self.rng.choice(("192.0.2.7", None)) if self.rng.random() < 0.1 else "192.0.2.7")
        match self.rng.choices(range(7), (80, 6, 1, 6, 3, 3, 2))[0]:
            case 0 | 1 as which:
                asked = builders.ask(
                    role=self.rng.choices(ROLES, (8, 8, 8, 1))[0],
                    public_key=self.rng.choices(KEYS, (40, 8, 1, 1, 1))[0],
                    principals=self.rng.choices(
                        (None, ("llmops",), ("backup",), (), ("root", "llmops")), (9, 2, 2, 1, 1)
                    )[0],
                    ttl=self.rng.choices((None, 1, 30, 90, 900, 0, 10**6), (18, 1, 3, 3, 1, 1, 1))[0],
                    reason=self.rng.choices((None, "ticket 812", "\x1b[31m"), (1, 8, 1))[0],
                    extensions=self.rng.choices(
                        ((), (("permit-pty", ""),), (("permit-port-forwarding", ""),)), (28, 1, 1)
                    )[0],
                    critical_options=self.rng.choices(((), (("force-command", "/bin/sh"),)), (30, 1))[0],
                )
                return Sign(caller, asked.role, asked) if which == 0 else Explain(caller, asked.role, asked)
            case 2:
                seconds = self.rng.choice([None, None, 60, 600])
                return Freeze(builders.caller("operator"), self.rng.choice(SCOPES), "drill", seconds)
            case 3:
                return Unfreeze(builders.caller("operator"), self.rng.choice((*self.watcher.frozen, "all")))
            case 4:
                return ListCertificates(caller, Filter(limit=20), active=self.rng.random() < 0.5)
            case 5:
                return self.rng.choice((ListFreezes(caller), ListRoles(caller), ShowHead(caller)))
            case _:
                return Freeze(caller, self.rng.choice(SCOPES), "not mine to freeze")

    def check_reply(self, command: Command, reply: object) -> None:
        """At the moment when the caller gets it."""
        self.watcher.look(self.store.entries_after(self.watcher.seen))
        if isinstance(command, Sign) and isinstance(reply, Reply):
            self.check_released(builders.certificate_of(reply))
        elif isinstance(command, Freeze) and isinstance(reply, Reply):
            assert self.watcher.counts["freeze.set"], "a freeze was confirmed that no event records"
        elif isinstance(command, Unfreeze) and getattr(reply, "code", "") == "not_frozen":
            lifted_later = self.watcher.counts["freeze.set"]
            assert command.scope not in self.watcher.frozen or lifted_later

    def check_released(self, certificate: bytes) -> None:
        fields, unsigned, _ = decode_certificate(certificate)
        record = self.watcher.issued.get(fields.serial)
        assert record is not None, "released and not recorded"
        assert record["to_be_signed_sha256"] == sha256(unsigned).hexdigest()
        assert unsigned == encode_unsigned(fields)
        assert fields.serial not in self.released, "released twice"
        assert fields.serial not in self.watcher.withheld
        self.released.add(fields.serial)
        assert list(fields.principals) == record["principals"]
        assert (fields.valid_after, fields.valid_before) == (record["valid_after"], record["valid_before"])
        assert dict(fields.critical_options) == record["critical_options"]
        assert [name for name, _ in fields.extensions] == record["extensions"]

    def check(self) -> None:
        """After every step: the tables say what the events say."""
        fail, self.store.fail = self.store.fail, ""
        self.watcher.look(self.store.entries_after(self.watcher.seen))
        rows, frozen = self.store.tables()
        assert frozen == self.watcher.frozen
        assert len(rows) == len(self.watcher.issued)
        if self.commands % 16 == 0:
            assert {serial for serial, row in rows.items() if row.withheld} == self.watcher.withheld
        self.store.fail = fail
        assert not [fault for fault in self.faults if not isinstance(fault, RuntimeError)], self.faults
