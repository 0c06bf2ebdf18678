"""Values for unit tests: one good default for everything, and a test changes the one field that it is about.

Nothing here starts a process or touches a disk. `MemoryStore` is a ledger that fails on demand; what it holds is made
by the product's own chain, so use the real one where the chain itself is tested.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from itertools import pairwise
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from signer.authority.approvals import Signatures
from signer.authority.core import Answer, Core
from signer.ca.backends import Backend, FileBackend
from signer.errors import BadSignature, NotFound, SignerError, Unavailable
from signer.ledger.chain import GENESIS, chain
from signer.ledger.lookups import Lookup, Reader
from signer.ledger.reader import IssuedEvent, Recent
from signer.ledger.tree import complete_root, consistency_proof, leaf_hash
from signer.model import (
    BACKDATE,
    ActiveFreeze,
    Activity,
    Caller,
    Entry,
    Event,
    EventFilter,
    Filter,
    Grant,
    Head,
    Identity,
    Issued,
    Limits,
    PublicKey,
    Role,
    SignRequest,
    UsageCounts,
)
from signer.policy.decide import Policy
from signer.policy.file import parse_policy
from signer.policy.tokens import render_token, token_digest
from signer.protocol.commands import Sign
from signer.protocol.replies import Reply, decode_reply
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import parse_public_key
from signer.ssh.signing import Obtained
from signer.ssh.sshsig import SshSignature
from signer.ssh.wire import string
from tests.parts.fido import fill_fido_keys

NOW = 1_800_000_000  # 2027-01-15T08:00:00Z
NO_USAGE = UsageCounts()


# --- keys --------------------------------------------------------------------------------------------------------


@cache
def public_line(kind: str = "ssh-ed25519", name: str = "user") -> str:
    """`type base64` of a key that is the same in every run (RSA: in this run)."""
    seed = sha256(f"{kind} {name}".encode()).digest()
    if kind.startswith("sk-"):
        donor = "ssh-ed25519" if "ed25519" in kind else "ecdsa-sha2-nistp256"
        inner = base64.b64decode(public_line(donor, name).split()[1])
        blob = string(kind.encode()) + inner[len(string(donor.encode())) :] + string(b"ssh:")
        return f"{kind} {base64.b64encode(blob).decode()}"
    if kind == "ssh-ed25519":
        return _render(Ed25519PrivateKey.from_private_bytes(seed))
    if kind.startswith("ssh-rsa"):
        bits = int(kind.partition("/")[2] or 3072)
        return _render(rsa.generate_private_key(65537, bits))
    curves: dict[str, ec.EllipticCurve] = {"256": ec.SECP256R1(), "384": ec.SECP384R1(), "521": ec.SECP521R1()}
    return _render(ec.derive_private_key(int.from_bytes(seed, "big") >> 1, curves[kind[-3:]]))


def _render(key: Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def public_key(kind: str = "ssh-ed25519", name: str = "user") -> PublicKey:
    return parse_public_key(public_line(kind, name))


class PretendKey:
    """A CA key whose signature is a hash: fast, and it raises when `fails` is set."""

    def __init__(self, name: str = "ca") -> None:
        public = public_key("ssh-ed25519", name)
        self.kind, self.blob, self.fingerprint = public.kind, public.blob, public.fingerprint
        self.public = public
        self.fails: Exception | None = None
        self.signed: list[bytes] = []

    def sign(self, data: bytes) -> bytes:
        if self.fails is not None:
            raise self.fails
        self.signed.append(data)
        return string(b"ssh-ed25519") + string(sha256(data).digest() * 2)


# --- who, what, and the answer -------------------------------------------------------------------------------------


def role(**changes: Any) -> Role:
    good: dict[str, Any] = {
        "name": "llmops",
        "principals": ("llmops", "backup", "{identity}"),
        "default_principals": ("llmops",),
        "default_ttl": 900,
        "max_ttl": 1800,
        "key_types": frozenset({"ssh-ed25519", "ssh-rsa", "sk-ssh-ed25519@openssh.com"}),
        "rsa_min_bits": 3072,
        "allowed_extensions": frozenset({"permit-pty", "permit-port-forwarding"}),
        "default_extensions": ("permit-pty",),
        "allowed_critical_options": frozenset(),
        "force_command": None,
        "source_address": None,
        "verify_required": False,
        "no_touch_required": False,
        "allow_key_id": False,
        "reason_required": False,
        "approval": None,
        "limits": Limits(),
    }
    return Role(**{**good, **changes})


def identity(**changes: Any) -> Identity:
    good: dict[str, Any] = {
        "name": "deploy-agent",
        "kind": "agent",
        "groups": frozenset(),
        "roles": frozenset({"llmops"}),
        "may": frozenset(),
    }
    return Identity(**{**good, **changes})


def ask(**changes: Any) -> SignRequest:
    return SignRequest(**{"role": "llmops", "public_key": public_line(), **changes})


def grant(**changes: Any) -> Grant:
    good: dict[str, Any] = {
        "identity": "deploy-agent",
        "kind": "agent",
        "role": "llmops",
        "public_key": public_key(),
        "key_id": "deploy-agent:llmops",
        "principals": ("backup", "llmops"),
        "ttl": 900,
        "backdate": 30,
        "critical_options": (("force-command", "/usr/bin/deploy"), ("source-address", "192.0.2.7/32")),
        "extensions": ("permit-pty",),
        "reason": "ticket 812",
        "address": "192.0.2.7",
    }
    return Grant(**{**good, **changes})


# --- policy ----------------------------------------------------------------------------------------------------------


@cache
def token(name: str) -> str:
    """The token of an identity called `name`."""
    return render_token(sha256(name.encode()).digest())


POLICY = """
[ca]
fingerprint = "{ca}"

[roles.llmops]
principals = ["llmops", "{identity}"]
default_principals = ["llmops"]
default_ttl = "15m"
max_ttl = "30m"
key_types = ["ssh-ed25519", "ssh-rsa"]
extensions = { allowed = ["permit-pty"], default = ["permit-pty"] }

[identities.deploy-agent]
kind = "agent"
roles = ["llmops"]
tokens = [{ sha256 = "{token:deploy-agent}", expires = 2099-01-01T00:00:00Z }]

[identities.operator]
kind = "human"
groups = ["operators"]
roles = ["llmops"]
may = ["approve", "freeze", "hosts", "revoke", "ledger.read", "operate"]
approval_keys = [{ kind = "ssh", key = "{fido:operator}" }]
tokens = [{ sha256 = "{token:operator}", expires = 2099-01-01T00:00:00Z }]

[identities.stranger]
kind = "agent"
tokens = [{ sha256 = "{token:stranger}", expires = 2099-01-01T00:00:00Z }]
"""


def policy_text(text: str = POLICY, ca: str = "") -> str:
    """A policy text with `{ca}`, `{token:NAME}` and `{fido:NAME}` filled in."""
    text = fill_fido_keys(text.replace("{ca}", ca or PretendKey().fingerprint))
    return re.sub(r"\{token:([^}]+)\}", lambda found: token_digest(token(found[1])), text)


def policy(text: str = POLICY, *swaps: tuple[str, str]) -> Policy:
    """The standard policy, with each of `swaps` (old text, new text) made; the old text must be there."""
    for old, new in swaps:
        assert old in text, old
        text = text.replace(old, new)
    return parse_policy(policy_text(text).encode())


def role_lines(*lines: str) -> tuple[str, str]:
    """A swap for `policy` that adds lines to role llmops."""
    return 'key_types = ["ssh-ed25519", "ssh-rsa"]', "\n".join(['key_types = ["ssh-ed25519", "ssh-rsa"]', *lines])


# --- the core, with a clock, a key and a ledger in the test's hand ---------------------------------------------------


def names_in(entry: Entry) -> list[str]:
    """Who made an event, and the identity that its body names."""
    body = json.loads(entry.body)
    scope = str(body.get("scope", "")).removeprefix("identity:")
    return [entry.actor, str(body.get("identity", "")), scope]


class MemoryStore:
    """A ledger in memory. `fail` makes the next commits fail: before anything is kept, or after all is on disk."""

    base = 0  # nothing is archived

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.fail: str = ""
        self.rows: dict[int, Issued] = {}
        self.frozen: dict[str, ActiveFreeze] = {}

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        if self.fail == "read":
            raise Unavailable("ledger_unavailable", "the disk is full", "free space")
        new = list(chain(events, self.head(), now_ms))
        if self.fail == "before":
            raise Unavailable("ledger_unavailable", "the disk is full", "free space")
        for entry in new:
            self._keep(entry)
        if self.fail == "after":
            raise Unavailable("ledger_unavailable", "the answer of the disk was lost", "wait")
        return new

    def _keep(self, entry: Entry) -> None:
        self.entries.append(entry)
        body = json.loads(entry.body)
        if entry.kind == "certificate.issued":
            serial = int(body["serial"])
            assert serial not in self.rows, "a serial was recorded twice"
            self.rows[serial] = Issued(
                serial=serial,
                backend=body["backend"],
                seq=entry.seq,
                identity=body["identity"],
                role=body["role"],
                principals=tuple(body["principals"]),
                fingerprint=body["fingerprint"],
                key_id=body["key_id"],
                valid_after=body["valid_after"],
                valid_before=body["valid_before"],
                withheld=False,
            )
        elif entry.kind == "certificate.withheld":
            serial = int(body["serial"])
            self.rows[serial] = replace(self.rows[serial], withheld=True)
        elif entry.kind == "freeze.set":
            facts = body["reason"], entry.actor, entry.time_ms // 1000, body.get("until")
            self.frozen[body["scope"]] = ActiveFreeze(*facts)
        elif entry.kind == "freeze.lifted":
            del self.frozen[body["scope"]]

    def _readable(self) -> None:
        if self.fail == "read":
            raise Unavailable("ledger_unavailable", "the disk is gone", "mend it")

    def head(self) -> Head:
        self._readable()
        if not self.entries:
            return Head(0, GENESIS, 0)
        last = self.entries[-1]
        return Head(last.seq, last.hash, last.time_ms)

    def recent(self, since: int) -> list[Recent]:
        self._readable()
        return [
            Recent(
                row.identity,
                row.role,
                max(self.entries[row.seq - 1].time_ms // 1000, row.valid_after + BACKDATE),
                row.valid_before,
            )
            for row in reversed(self.rows.values())
            if row.valid_before > since and not row.withheld
        ]

    def last_serial(self) -> int:
        self._readable()
        return max(self.rows, default=0)

    def last_ca(self) -> str | None:
        self._readable()
        for entry in reversed(self.entries):
            body = json.loads(entry.body)
            found = {
                "ca.rotated": body.get("to"),
                "keeper.started": body.get("compared_with") or body.get("ca"),
                "certificate.issued": body.get("ca") if body.get("backend") == "local" else None,
            }.get(entry.kind)
            if found not in (None, "vault"):
                return str(found)
        return None

    def has_vault_serial(self, serial: int) -> bool:
        self._readable()
        return serial in self.rows and self.rows[serial].backend == "vault"

    def freezes(self) -> dict[str, ActiveFreeze]:
        self._readable()
        return dict(self.frozen)

    def host_events(self) -> list[Entry]:
        self._readable()
        return [entry for entry in self.entries if entry.kind.startswith("host.")]

    def operation_events(self) -> list[Entry]:
        self._readable()
        return [entry for entry in self.entries if entry.kind == "operation.recorded"]

    def revocation_events(self) -> list[Entry]:
        self._readable()
        kinds = ("ca.rotated", "certificates.revoked", "keeper.started", "ledger.restored", "list.published")
        return [entry for entry in self.entries if entry.kind in kinds]

    def first_since(self, time_ms: int) -> int:
        return next((entry.seq for entry in self.entries if entry.time_ms >= time_ms), len(self.entries) + 1)

    def withheld_since(self, first: int) -> set[int]:
        return {serial for serial, row in self.rows.items() if row.withheld}

    def issued_between(self, first: int, before: int, identities: Collection[str] | None = None) -> list[IssuedEvent]:
        found = []
        for entry in self.entries:
            body = json.loads(entry.body)
            if entry.kind == "certificate.issued" and first <= entry.seq < before:
                facts = body["serial"], body["backend"], body["ca"], body["fingerprint"], body["valid_before"]
                issued = IssuedEvent(entry.seq, entry.time_ms // 1000, entry.actor, int(facts[0]), *facts[1:])
                if identities is None or issued.identity in identities:
                    found.append(issued)
        return found

    def asked(self, since: int) -> list[Entry]:
        self._readable()
        kinds = ("approval.", "waiver.", "freeze.")
        return [
            entry
            for entry in self.entries
            if (entry.kind.startswith(kinds) and entry.time_ms >= since * 1000) or entry.kind.startswith("incident.")
        ]

    def certificates(self, wanted: Filter) -> list[Issued]:
        self._readable()
        rows = [row for row in reversed(self.rows.values()) if wanted.identity in (None, row.identity)]
        if wanted.active_at is not None:
            rows = [row for row in rows if row.valid_before > wanted.active_at and not row.withheld]
        if wanted.before is not None:
            rows = [row for row in rows if row.seq < wanted.before]
        return rows[: wanted.limit]

    def consistency(self, old: int, new: int) -> list[bytes]:
        hashes = [leaf_hash(bytes.fromhex(entry.hash)) for entry in self.entries]
        return consistency_proof(old, new, lambda level, index: complete_root(hashes[index << level :][: 1 << level]))

    def events_after(self, after: int, limit: int) -> list[Entry]:
        self._readable()
        return self.entries[after : after + limit]

    def matching_events(self, wanted: EventFilter) -> list[Entry]:
        self._readable()
        return [
            entry
            for entry in reversed(self.entries)
            if wanted.takes(entry.kind)
            and wanted.identity in (None, *names_in(entry))
            and (wanted.since is None or entry.time_ms >= wanted.since)
            and (wanted.before is None or entry.seq < wanted.before)
        ][: wanted.limit]

    def activity(self, bounds: Sequence[int]) -> list[Activity]:
        self._readable()
        found = []
        for start, end in pairwise(bounds):
            within = [entry for entry in self.entries if start <= entry.time_ms < end]
            kinds = Counter(entry.kind for entry in within)
            repeats = sum(json.loads(entry.body)["count"] for entry in within if entry.kind == "refusals.repeated")
            issued = kinds["certificate.issued"] - kinds["certificate.withheld"]
            found.append(Activity(issued, kinds["request.refused"] + repeats))
        return found

    def operations(self, evidence: str | None, before: int | None, limit: int) -> list[Entry]:
        self._readable()
        return [
            entry
            for entry in reversed(self.entries)
            if entry.kind == "operation.recorded"
            and (evidence is None or json.loads(entry.body)["evidence"] == evidence)
            and (before is None or entry.seq < before)
        ][:limit]

    def page(self, wanted: Filter) -> tuple[list[Issued], int | None]:
        return self.certificates(wanted), None

    def certificate(self, serial: int) -> tuple[Issued, Entry] | None:
        self._readable()
        row = self.rows.get(serial)
        return None if row is None else (row, self.entry(row.seq))

    def entry(self, seq: int) -> Entry:
        if not 0 < seq <= len(self.entries):
            raise NotFound("unknown_entry", "no such entry")
        return self.entries[seq - 1]

    def kinds(self) -> list[str]:
        """The kind of every event, oldest first."""
        return [entry.kind for entry in self.entries]

    def bodies(self, kind: str) -> list[dict[str, Any]]:
        """The bodies of all events of a kind."""
        return [json.loads(entry.body) for entry in self.entries if entry.kind == kind]


class FakeSignatures(Signatures):
    """Signatures as plain text: key, flags and what was signed. Tests of the real ones are in `tests/unit/ssh`."""

    @staticmethod
    def make(
        line: str, statement: bytes, *, present: bool = True, verified: bool = False, counter: int | None = None
    ) -> str:
        flags = [present, verified, counter]
        return json.dumps({"key": line, "statement": statement.decode(), "flags": flags})

    def key(self, armored: str) -> PublicKey:
        return parse_public_key(self._open(armored)["key"])

    def verify(self, armored: str, statement: bytes, key: PublicKey) -> SshSignature:
        found = self._open(armored)
        if found["statement"] != statement.decode() or parse_public_key(found["key"]) != key:
            raise BadSignature("signature_wrong", "the signature is not over this statement")
        return SshSignature(key.fingerprint, *found["flags"])

    @staticmethod
    def _open(armored: str) -> dict[str, Any]:
        try:
            found = json.loads(armored)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise BadSignature("signature_malformed", "the signature cannot be read")
        return found


@dataclass
class Bench:
    """A core with everything that it was given, and a way to ask it one thing."""

    policy: Policy = field(default_factory=policy)
    store: MemoryStore = field(default_factory=MemoryStore)
    key: PretendKey = field(default_factory=PretendKey)
    now: float = NOW
    faults: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = self.restart()

    def restart(self) -> Core:
        """Another keeper on the same ledger."""
        nonces = iter(range(1, 2**40))
        make: Callable[[int], bytes] = lambda count: next(nonces).to_bytes(count, "big")  # noqa: E731
        self.core = Core(
            policy=self.policy,
            backend=self.make_backend(),
            ledger=self.store,
            clock=lambda: self.now,
            random=make,
            report=self.faults.append,
            signatures=FakeSignatures(),
        )
        self.core.begin({})
        return self.core

    def make_backend(self) -> Backend:
        """Who signs; subclasses have another one."""
        return FileBackend(self.key)

    def finish(self, *results: tuple[Any, Obtained | SignerError]) -> list[Any]:
        """The replies for what a slow signer was to make, in order."""
        replies = dict(self.core.finish(results))
        return [fields_of(replies[index]) for index in range(len(results))]

    def ask(self, *commands: Any) -> list[Any]:
        """The replies to one batch, in the order of its commands; lookups are answered from the store."""
        replies = dict(self.core.run(commands))
        return [fields_of(looked_up(replies[index], self.store)) for index in range(len(commands))]

    def sign(self, who: str = "deploy-agent", **changes: Any) -> Any:
        """The reply to one sign request."""
        return self.ask(sign(who, **changes))[0]


def caller(who: str | None = "deploy-agent", address: str | None = "192.0.2.7", request_id: str = "r-1") -> Caller:
    """A caller with the token of `who`, with none for None."""
    return Caller(None if who is None else token(who), address, request_id)


def sign(who: str = "deploy-agent", **changes: Any) -> Sign:
    """A sign request; `changes` are to its `SignRequest`."""
    asked = ask(**changes)
    return Sign(caller(who), asked.role, asked)


def looked_up(reply: Answer, reader: Reader) -> object:
    """The reply to a lookup; anything else as it is."""
    if not isinstance(reply, Lookup):
        return reply
    try:
        return decode_reply(reply.answer(reader))
    except SignerError as error:
        return error


def fields_of(reply: object) -> Any:
    """A reply as the JSON that a client of the native API reads; anything else as it is."""
    return json.loads(reply.as_json()) if isinstance(reply, Reply) else reply


def certificate_of(reply: object) -> bytes:
    """The certificate's bytes in a reply that has one."""
    reply = fields_of(reply)
    assert isinstance(reply, dict), reply
    return base64.b64decode(str(reply["certificate"]).split()[1])


def fingerprint_of_line(line: str) -> str:
    return fingerprint_of(base64.b64decode(line.split()[1]))


def rotations(bodies: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """From which CA key to which, of the bodies of `ca.rotated` events, whose public keys are those of `to`."""
    found = []
    for body in bodies:
        assert fingerprint_of_line(body["public_key"]) == body["to"]
        found.append({"from": body["from"], "to": body["to"]})
    return found
