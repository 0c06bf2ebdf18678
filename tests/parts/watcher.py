"""Reads a ledger's events one after the other and says which of the product's promises one of them breaks.

It shares nothing with the core but the hash of an entry: what it knows, it has read.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from signer.authority.core import CLOCK_TOLERANCE
from signer.ledger.chain import GENESIS, entry_hash
from signer.model import BACKDATE, ActiveFreeze, Entry, Role
from signer.policy.decide import Policy


class Watcher:
    """Reads each new event once, keeps what it means, and says which promise it breaks."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies  # by digest
        self.seen = 0
        self.hash = GENESIS
        self.newest_ms = self.guard_ms = 0
        self.issued: dict[int, dict[str, Any]] = {}
        self.withheld: set[int] = set()
        self.frozen: dict[str, ActiveFreeze] = {}
        self.last_serial = 0
        self.held: defaultdict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
        self.counts: Counter[str] = Counter()

    def look(self, entries: list[Entry]) -> None:
        """Takes the entries that follow those seen before; an `AssertionError` names the broken promise."""
        for entry in entries:
            if entry.time_ms > self.newest_ms:  # entries of one batch have one time, and were decided before it
                self.guard_ms, self.newest_ms = self.newest_ms, entry.time_ms
            self._chained(entry)
            body = json.loads(entry.body)
            self.counts[entry.kind] += 1
            match entry.kind:
                case "certificate.issued":
                    self._issued(entry, body)
                case "certificate.withheld":
                    serial = int(body["serial"])
                    assert serial in self.issued, "withheld and never issued"
                    assert serial not in self.withheld, "withheld twice"
                    self.withheld.add(serial)
                case "freeze.set":
                    facts = body["reason"], entry.actor, entry.time_ms // 1000, body.get("until")
                    self.frozen[body["scope"]] = ActiveFreeze(*facts)
                case "freeze.lifted":
                    del self.frozen[body["scope"]]

    def _chained(self, entry: Entry) -> None:
        self.seen += 1
        assert entry.seq == self.seen, "an entry is missing or comes twice"
        assert entry.prev == self.hash, "the chain is broken"
        digest = entry_hash(entry.seq, entry.time_ms, entry.kind, entry.actor, entry.body, entry.prev)
        assert entry.hash == digest, "an entry does not have its hash"
        assert entry.time_ms >= self.newest_ms, "an entry's time runs backwards"
        self.hash = entry.hash

    def _issued(self, entry: Entry, body: dict[str, Any]) -> None:
        serial, now = int(body["serial"]), body["valid_after"] + BACKDATE
        assert serial > self.last_serial, "a serial does not rise"
        self.last_serial = serial
        assert self.guard_ms // 1000 - now <= CLOCK_TOLERANCE, "granted with a clock far behind the ledger"
        frozen = {"all", f"role:{body['role']}", f"identity:{body['identity']}"} & self.frozen.keys()
        assert not frozen, f"granted although {frozen} is frozen"
        policy = self.policies[body["policy"]]
        self._within_policy(body, policy, now)
        self._within_limits(body, policy.roles[body["role"]], now)
        self.held[body["identity"], body["role"]].append((serial, now, body["valid_before"]))
        self.issued[serial] = body

    def check_release(self, body: dict[str, Any]) -> None:
        """When somebody gets a certificate some time after its record."""
        frozen = {"all", f"role:{body['role']}", f"identity:{body['identity']}"} & self.frozen.keys()
        assert not frozen, f"released although {frozen} is frozen"

    @staticmethod
    def _within_policy(body: dict[str, Any], policy: Policy, now: int) -> None:
        who, role = policy.identities[body["identity"]], policy.roles[body["role"]]
        assert role.name in who.roles, "a role that is not the identity's"
        names = {name.replace("{identity}", who.name) for name in role.principals}
        assert body["principals"], "no principals"
        assert set(body["principals"]) <= names, f"principals {body['principals']}, {names} allowed"
        assert 0 < body["valid_before"] - now <= role.max_ttl, "outside max_ttl"
        assert body["key_type"] in role.key_types, "a key type that is not allowed"
        assert set(body["extensions"]) <= role.allowed_extensions, f"extensions {body['extensions']}"
        good = any(token.identity == who.name and token.expires > now for token in policy.tokens.values())
        assert good, "no token of the identity is good any more"
        wanted = {"force-command": "/usr/bin/deploy", "source-address": "192.0.2.7/32"} if role.name == "narrow" else {}
        assert body["critical_options"] == wanted, "pinned options are not as pinned"
        assert body["reason"] or not role.reason_required, "no reason"

    def _within_limits(self, body: dict[str, Any], role: Role, now: int) -> None:
        held = [item for item in self.held[body["identity"], role.name] if item[0] not in self.withheld]
        if role.limits.per_minute is not None:
            assert sum(now - 60 < at <= now for _, at, _ in held) < role.limits.per_minute, "too many in a minute"
        if role.limits.live is not None:
            assert sum(end > now for _, _, end in held) < role.limits.live, "too many live"
