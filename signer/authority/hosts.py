"""The list of host keys that clients verify hosts by: who changes it, and its bytes. Pure.

A host is added with its names and keys, or removed; each is one event. The list is made from the events alone, and its
version is the `seq` of the newest of them. Its first line also has the time for which it is signed, so that an old
list cannot pass for the current one.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from signer.authority.approvals import check_not_frozen
from signer.authority.queries import require
from signer.errors import BadRequest, NotFound, Refused
from signer.ledger.lookups import fitting
from signer.model import ActiveFreeze, Entry, Event, Identity, KnownHost
from signer.protocol import replies
from signer.protocol.commands import AddHostKeys, ListHostKeys, RemoveHostKeys
from signer.ssh.known_hosts import key_line, known_hosts_lines, parse_host_key, parse_host_name, parse_host_principals
from signer.ssh.publickey import parse_public_key
from signer.units import timestamp

LIST_NAMESPACE: Final = "known-hosts.v1@signer"  # of the signature over the list
MAX_HOSTS: Final = 10_000  # on the list
MAX_LIST_BYTES: Final = 4 * 1024 * 1024 - 1024  # without the first line; a client reads 4 MiB
MAX_PRINCIPALS: Final = 2 * 1024 * 1024  # characters of the principals of all hosts
HOSTS_PER_PAGE: Final = 100  # of the API; a reply holds 384 KiB
_PRINCIPALS_PER_PAGE: Final = 64 * 1024  # characters in JSON, of all hosts but the first; one host may have 33,000
_EVENTS: Final = ("host.added", "host.removed")


@dataclass(slots=True)
class HostList:
    """The hosts by name. `version` is the `seq` of the newest event about them, 0 without any."""

    version: int = 0
    hosts: dict[str, KnownHost] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)  # of each name and address, the host's name
    _size: int = 0  # bytes of all lines
    _principals: int = 0  # characters of all principals
    _lines: bytes | None = None  # rendered when needed

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> HostList:
        """The list that the events make, oldest first."""
        found = cls()
        for entry in entries:
            body = json.loads(entry.body)
            found._drop(body["name"])
            if entry.kind == "host.added":
                names, keys = (body["name"], *body["addresses"]), tuple(body["keys"])
                known = body.get("principals")  # events of the first releases lack them
                principals = None if known is None else tuple(known)
                found._put(KnownHost(names, keys, entry.actor, entry.time_ms // 1000, principals))
            found.version = entry.seq
        return found

    def note(self, entries: Iterable[Entry]) -> None:
        """Takes the version from what was committed."""
        for entry in entries:
            if entry.kind in _EVENTS:
                self.version = entry.seq

    def _put(self, host: KnownHost) -> None:
        self.hosts[host.name] = host
        self._owners |= dict.fromkeys(host.names, host.name)
        self._size += len(known_hosts_lines(host.names, host.keys))
        self._principals += _length(host)
        self._lines = None

    def _drop(self, name: str) -> KnownHost | None:
        host = self.hosts.pop(name, None)
        if host is not None:
            for known in host.names:
                del self._owners[known]
            self._size -= len(known_hosts_lines(host.names, host.keys))
            self._principals -= _length(host)
            self._lines = None
        return host

    def find(self, name: str) -> KnownHost:
        """The host that has this name or address; raises `NotFound` without one, `BadRequest` for a malformed name."""
        name = parse_host_name(name)
        owner = self._owners.get(name)
        if owner is None:
            hint = f"see `signer hosts list`, or add it: `signer hosts add {name} --keys FILE --principals P,...`"
            raise NotFound("unknown_host", f"{name} is not a host of the list", hint)
        return self.hosts[owner]

    def render(self, as_of: int) -> bytes:
        """The list as known_hosts has it, hosts by name, as of a time in seconds since 1970."""
        if self._lines is None:
            hosts = (self.hosts[name] for name in sorted(self.hosts))
            self._lines = "".join(known_hosts_lines(host.names, host.keys) for host in hosts).encode("ascii")
        return f"# {LIST_NAMESPACE} version={self.version} as_of={timestamp(as_of)}\n".encode() + self._lines

    # --- commands -----------------------------------------------------------------------------------------------

    def add(
        self, command: AddHostKeys, identity: Identity, freezes: Mapping[str, ActiveFreeze], now: int
    ) -> tuple[replies.HostKeys, tuple[Event, ...]]:
        """Lists a host; returns the reply, and the event unless it is so already. Raises `Refused`, `BadRequest`."""
        _check_may_change(identity, freezes)
        name, *addresses = dict.fromkeys(map(parse_host_name, (command.name, *command.addresses)))
        keys = tuple(dict.fromkeys(key_line(parse_host_key(line)) for line in command.keys))
        before = self.hosts.get(name)
        principals = None if before is None else before.principals  # new keys change nothing about whom it lets in
        if command.principals is not None:
            principals = parse_host_principals(command.principals)
        host = KnownHost((name, *addresses), keys, identity.name, now, principals)
        for known in host.names:
            owner = self._owners.get(known, name)
            if owner != name:
                raise BadRequest(
                    "host_address_taken",
                    f"{known} belongs to the host {owner}",
                    f"one name has the keys of one host: use `signer hosts remove {owner}`, or leave {known} out",
                )
        is_same = before is not None and (set(before.names), set(before.keys)) == (set(host.names), set(keys))
        if before is not None and is_same and before.principals == principals:
            return host_keys_reply(before), ()
        if before is not None and not is_same and not command.replace:
            raise BadRequest(
                "host_exists",
                f"{name} is listed already",
                "compare its keys with `signer hosts list`, then add it with --replace",
            )
        self._check_room(host)
        self._drop(name)
        self._put(host)
        body: dict[str, object] = {"name": name, "addresses": addresses, "keys": list(keys)}
        if principals is not None:
            body["principals"] = list(principals)
        return host_keys_reply(host), (Event("host.added", identity.name, body),)

    def _check_room(self, host: KnownHost) -> None:
        before = self.hosts.get(host.name)
        size = self._size + len(known_hosts_lines(host.names, host.keys))
        if before is not None:
            size -= len(known_hosts_lines(before.names, before.keys))
        if before is None and len(self.hosts) >= MAX_HOSTS:
            raise _full(f"it has {len(self.hosts)} hosts, and {MAX_HOSTS} is the limit")
        if size > MAX_LIST_BYTES:
            raise _full(f"it would have {size} bytes, and {MAX_LIST_BYTES} is the limit")
        length = self._principals + _length(host) - (0 if before is None else _length(before))
        if length > MAX_PRINCIPALS:
            raise _full(f"its principals would have {length} characters, and {MAX_PRINCIPALS} is the limit")

    def remove(
        self, command: RemoveHostKeys, identity: Identity, freezes: Mapping[str, ActiveFreeze]
    ) -> tuple[replies.HostRemoved, Event]:
        """Takes a host off the list; returns the reply and the event. Raises `Refused`, `BadRequest` or `NotFound`."""
        _check_may_change(identity, freezes)
        name = parse_host_name(command.host)
        if self._drop(name) is None:
            hint = "see `signer hosts list`"
            if name in self._owners:
                hint = f"it is an address of {self._owners[name]}: remove or replace that"
            raise NotFound("unknown_host", f"{name} is not a host of the list", hint)
        return replies.HostRemoved(name=name), Event("host.removed", identity.name, {"name": name})

    def page(self, query: ListHostKeys, identity: Identity) -> replies.HostKeysPage:
        """The hosts after `query.after`, by name. Raises `Refused`."""
        if "hosts" not in identity.may:
            require(identity, "ledger.read")
        names = sorted(self.hosts)
        first = 0 if query.after is None else bisect_right(names, query.after)
        hosts = (self.hosts[name] for name in names[first : first + HOSTS_PER_PAGE])
        # JSON doubles a backslash.
        shown = fitting(
            hosts, lambda host: sum(2 * len(one) + 4 for one in host.principals or ()), _PRINCIPALS_PER_PAGE
        )
        after = shown[-1].name if first + len(shown) < len(names) else None
        return replies.HostKeysPage(version=self.version, hosts=list(map(host_keys_reply, shown)), after=after)


def host_keys_reply(host: KnownHost) -> replies.HostKeys:
    rows = []
    for line in host.keys:
        key = parse_public_key(line)
        rows.append(replies.HostKeyRow(kind=key.kind, bits=key.bits, fingerprint=key.fingerprint))
    return replies.HostKeys(
        name=host.name,
        addresses=list(host.names[1:]),
        keys=rows,
        by=host.by,
        since=timestamp(host.since),
        principals=None if host.principals is None else list(host.principals),
    )


def principals_of(host: KnownHost) -> tuple[str, ...]:
    """The principals that a host lets in; raises `NotFound` if they are not recorded."""
    if host.principals is None:
        raise NotFound(
            "host_principals_unknown",
            f"the principals that {host.name} lets in are not recorded",
            f"record those of its principals files: `signer hosts add {host.name} --keys FILE --principals P,...`",
        )
    return host.principals


def _length(host: KnownHost) -> int:
    """The characters of a host's principals."""
    return sum(map(len, host.principals or ()))


def _check_may_change(identity: Identity, freezes: Mapping[str, ActiveFreeze]) -> None:
    """Raises `Refused` unless a human with the right, who is not frozen by name, changes the list."""
    if identity.kind != "human":
        raise Refused("hosts_need_human", f"{identity.name} is not a human and changes no host's keys", "ask a human")
    require(identity, "hosts")
    check_not_frozen(identity.name, freezes)


def _full(why: str) -> BadRequest:
    return BadRequest("host_list_full", f"the list of hosts is full: {why}", "remove hosts that are gone")
