"""Lists the content of a Vault: names and counts, never values. KV entries are listed, never read.

An unreadable path is recorded as `Unread`; an inventory with one is incomplete and does not prove absence. Limited in
time, entries and depth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol, TypeVar

from signer.errors import BadFormat, SignerError, Unavailable
from signer.ssh.publickey import parse_public_key
from signer.vault.errors import sealed

MAX_ENTRIES: Final = 100_000  # names of one kind
MAX_DEPTH: Final = 64  # nested folders
WITHIN: Final = 120.0  # seconds in total
CALL_WITHIN: Final = 10.0
BUILTIN: Final = frozenset({"cubbyhole", "identity", "system", "ns_cubbyhole", "ns_identity", "ns_system"})
KV_TYPES: Final = frozenset({"kv", "generic"})  # `generic` is an old name of version 1
RAFT_CONFIGURATION: Final = "sys/storage/raft/configuration"
_LEAVES_OUT: Final = ("filter", "exclude", "fallback")  # options of audit devices
SNAPSHOT: Final = "sys/storage/raft/snapshot"
_MISSING: Final = "vault_mount_missing"
_T = TypeVar("_T")


class VaultReader(Protocol):
    """The methods of `VaultAdmin` that the inventory uses."""

    def call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, within: float = CALL_WITHIN
    ) -> dict[str, Any]: ...
    def find(self, method: str, path: str, *, within: float = CALL_WITHIN) -> dict[str, Any] | None: ...


@dataclass(frozen=True, slots=True)
class Unread:
    what: str
    code: str


@dataclass(frozen=True, slots=True)
class Mount:
    """A secrets engine or an auth method. `version` is that of a KV engine, otherwise 0; `path` ends with a slash.

    `uuid` names its data in Vault's storage.
    """

    path: str
    type: str
    version: int = 0
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class AuditDevice:
    """An audit device. `form` is its option `format`; `file_path` is "" unless it writes to a file.

    `is_partial` means that its options leave entries out.
    """

    path: str
    type: str
    prefix: str = ""
    form: str = "json"
    file_path: str = ""
    is_partial: bool = False


@dataclass(frozen=True, slots=True)
class Server:
    """A member of Vault's cluster. `node` is raft's, `api` an address for clients by `sys/ha-status`.

    Each is "" if its source does not have the server. `cluster` is host and port, which both sources have.
    """

    node: str
    cluster: str
    api: str


@dataclass(frozen=True, slots=True)
class KvEntries:
    """Names of all entries of a KV mount with their folders; in version 2 deleted entries are included."""

    mount: str
    version: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SshRole:
    """`max_ttl` is seconds; 0 if the mount's limit applies."""

    name: str
    max_ttl: int


@dataclass(frozen=True, slots=True)
class SshEngine:
    """An SSH mount. `issuers` are fingerprints of CA keys; `max_lease` (seconds) limits roles without a `max_ttl`."""

    mount: str
    roles: tuple[SshRole, ...]
    issuers: tuple[str, ...]
    max_lease: int


@dataclass(frozen=True, slots=True)
class OwnToken:
    """The token in use. `ttl` is seconds, 0 if it never expires; `uses` is 0 if unlimited; `lacks` are denied paths.

    A token with a parent (`is_orphan` False) expires with it. `hashes` is its accessor as audit devices write it.
    """

    accessor: str
    ttl: int
    uses: int
    is_orphan: bool
    lacks: tuple[str, ...]
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The inventory at one time (seconds since the epoch, local clock).

    `index` is the index of raft's last write before that time, 0 for another storage.
    """

    at: int
    version: str
    cluster: str
    storage: str
    seal: str
    namespaces: tuple[str, ...]
    mounts: tuple[Mount, ...]
    kv: tuple[KvEntries, ...]
    ssh: tuple[SshEngine, ...]
    auth_methods: tuple[Mount, ...]
    policies: tuple[str, ...]
    entities: int
    leases: int
    tokens: int
    audit_devices: tuple[AuditDevice, ...]
    own_token: OwnToken | None
    unread: tuple[Unread, ...]
    servers: tuple[Server, ...] = ()
    index: int = 0

    def uuid_of(self, mount: str) -> str:
        """The uuid of a mount, "" if it is not known; `mount` may lack its slash."""
        return next((one.uuid for one in self.mounts if one.path == f"{mount.strip('/')}/"), "")

    def as_json(self) -> dict[str, Any]:
        """The inventory for JSON, without the accessor of the token in use."""
        own = self.own_token
        fields = {**asdict(self), "kv": [{**asdict(one), "count": len(one.names)} for one in self.kv]}
        fields["own_token"] = (
            None if own is None else {"ttl": own.ttl, "orphan": own.is_orphan, "lacks": list(own.lacks)}
        )
        return fields


def read_inventory(
    vault: VaultReader,
    ssh_mount: str,
    roles: Sequence[str] = (),
    *,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> Inventory:
    """Reads the inventory; raises `SignerError` only if Vault is down or sealed. Writes nothing.

    `ssh_mount` is the mount to be disabled, `roles` those that must not sign after that; `own_token` shows whether the
    token may do both.
    """
    state = vault.call("GET", "sys/seal-status", within=CALL_WITHIN)
    if state.get("sealed") is not False:
        raise sealed()
    reader = _InventoryReader(vault, monotonic)
    storage = _text(state, "storage_type")
    index = reader.index(storage)
    servers = reader.servers(storage)
    mounts = reader.mounts("sys/mounts", {"sys/": ("system", "ns_system")})
    audit = reader.audit_devices()
    own = reader.own_token(ssh_mount, roles, tuple(device.path for device in audit))
    return Inventory(
        at=int(clock()),
        version=_text(state, "version"),
        cluster=_text(state, "cluster_id"),
        storage=storage,
        seal=_text(state, "type"),
        namespaces=reader.keys("sys/namespaces", may_lack=True),
        mounts=mounts,
        kv=tuple(reader.entries(mount) for mount in mounts if mount.type in KV_TYPES),
        ssh=tuple(reader.engine(mount.path) for mount in mounts if mount.type == "ssh"),
        auth_methods=reader.mounts("sys/auth", {"token/": ("token", "ns_token")}),
        policies=tuple(sorted(reader.keys("sys/policies/acl", must_have="default"))),
        entities=len(reader.keys("identity/entity/id")),
        leases=len(reader.below("sys/leases/lookup/", "leases")),
        tokens=len(reader.keys("auth/token/accessors", must_have=own.accessor if own else "")),
        audit_devices=audit,
        own_token=own,
        unread=tuple(reader.unread),
        servers=servers,
        index=index,
    )


class _OutOfTime(Exception):
    """The time for the whole inventory is over."""


class _InventoryReader:
    """Reads from Vault and records what it cannot read."""

    def __init__(self, vault: VaultReader, monotonic: Callable[[], float]) -> None:
        self._vault = vault
        self._monotonic = monotonic
        self._deadline = monotonic() + WITHIN
        self.unread: list[Unread] = []

    def _ask(self, what: str, otherwise: _T, ask: Callable[[], _T]) -> _T:
        """The result of `ask`; after an error, records it and returns `otherwise`."""
        try:
            return ask()
        except _OutOfTime:
            self.unread.append(Unread(what, "too_slow"))
        except SignerError as error:
            self.unread.append(Unread(what, error.code))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # JSON in an unexpected form
            self.unread.append(Unread(what, "vault_answer_malformed"))
        return otherwise

    @property
    def _left(self) -> float:
        """Seconds for the next call; raises `_OutOfTime`."""
        if (left := self._deadline - self._monotonic()) <= 0:
            raise _OutOfTime
        return min(left, CALL_WITHIN)

    def _data(self, path: str, body: Mapping[str, object] | None = None) -> Any:
        """The data of a GET, or with a body of a POST."""
        return self._vault.call("GET" if body is None else "POST", path, body, within=self._left)["data"]

    def keys(self, path: str, *, must_have: str = "", may_lack: bool = False) -> tuple[str, ...]:
        """The names that a LIST returns; empty if there are none, or no such path, which Vault `may_lack`.

        Without `must_have` the answer is incomplete.
        """

        def ask() -> tuple[str, ...]:
            try:
                names = _keys(self._vault.find("LIST", path, within=self._left))
            except SignerError as error:
                if may_lack and error.code == _MISSING:
                    return ()
                raise
            if must_have and must_have not in names:
                raise _incomplete()
            return names

        return self._ask(path, (), ask)

    def mounts(self, path: str, must_have: Mapping[str, tuple[str, ...]]) -> tuple[Mount, ...]:
        """The mounts that `path` lists; an answer without the built-in ones of `must_have` is incomplete."""

        def ask() -> tuple[Mount, ...]:
            found = []
            for name, facts in sorted(self._data(path).items()):
                kind, options = str(facts["type"]), facts.get("options") or {}
                version = (2 if str(options.get("version", "1")) == "2" else 1) if kind in KV_TYPES else 0
                found.append(Mount(name, kind, version, str(facts.get("uuid") or "")))
            types = {mount.path: mount.type for mount in found}
            if any(types.get(name) not in kinds for name, kinds in must_have.items()):
                raise _incomplete()
            return tuple(found)

        return self._ask(path, (), ask)

    def audit_devices(self) -> tuple[AuditDevice, ...]:
        """The audit devices, with the options that decide how their log is read."""

        def device(name: str, facts: Mapping[str, Any]) -> AuditDevice:
            options = {str(key): str(value) for key, value in (facts.get("options") or {}).items()}
            return AuditDevice(
                name,
                str(facts["type"]),
                options.get("prefix", ""),
                options.get("format", "") or "json",
                options.get("file_path", options.get("path", "")),
                any(options.get(key) for key in _LEAVES_OUT),
            )

        return self._ask(
            "sys/audit", (), lambda: tuple(device(*one) for one in sorted(self._data("sys/audit").items()))
        )

    def index(self, storage: str) -> int:
        """Raft's last index; 0 for another storage."""
        if storage != "raft":
            return 0

        def ask() -> int:
            state = self._vault.call("GET", "sys/leader", within=self._left)
            return max(_count(state["raft_applied_index"]), _count(state["raft_committed_index"]))

        return self._ask("sys/leader", 0, ask)

    def servers(self, storage: str) -> tuple[Server, ...]:
        """All members of the cluster, from both sources; the one that answers is among them."""

        def members() -> dict[str, str]:
            servers = self._data(RAFT_CONFIGURATION)["config"]["servers"]
            if not servers:
                raise _incomplete()
            return {str(one["address"]): str(one["node_id"]) for one in servers}

        def active() -> dict[str, str]:
            nodes = self._data("sys/ha-status")["nodes"]
            # As raft's configuration has an address: `https://10.0.0.2:8201` without its scheme.
            at = [str(one["cluster_address"]).rpartition("://")[2].rstrip("/") for one in nodes]
            if not any(one["active_node"] is True for one in nodes):
                raise _incomplete()
            return {where: str(one["api_address"]) for where, one in zip(at, nodes, strict=True)}

        none: dict[str, str] = {}
        raft = self._ask(RAFT_CONFIGURATION, none, members) if storage == "raft" else none
        ha = self._ask("sys/ha-status", none, active)
        return tuple(Server(raft.get(at, ""), at, ha.get(at, "")) for at in sorted({*raft, *ha}))

    def entries(self, mount: Mount) -> KvEntries:
        """The names of all entries. Uses only LIST, for version 2 below `metadata`."""
        start = mount.path + ("metadata/" if mount.version == 2 else "")
        return KvEntries(mount.path, mount.version, self.below(start, mount.path))

    def below(self, start: str, what: str) -> tuple[str, ...]:
        """Names of all entries below a folder, without folders; records folders that cannot be listed."""
        found: list[str] = []
        waiting = [(start, 0)]
        while waiting:
            folder, depth = waiting.pop()
            for name in self.keys(folder):
                if not name.endswith("/"):
                    found.append((folder + name).removeprefix(start))
                elif depth >= MAX_DEPTH:
                    self.unread.append(Unread(f"{folder}{name}", "too_deep"))
                else:
                    waiting.append((folder + name, depth + 1))
            if len(found) + len(waiting) > MAX_ENTRIES:
                self.unread.append(Unread(what, "too_many"))
                break
        return tuple(sorted(found))

    def engine(self, mount: str) -> SshEngine:
        """An SSH mount: its roles with their lifetimes, its CA keys, and its limit or the server's."""
        roles = []
        for name in sorted(self.keys(path := f"{mount}roles")):
            at = f"{path}/{name}"
            roles.append(SshRole(name, self._ask(at, 0, lambda: int(self._data(at).get("max_ttl") or 0))))  # noqa: B023 - called at once
        issuers, tune = self._issuers(mount), f"sys/mounts/{mount}tune"
        return SshEngine(
            mount, tuple(roles), issuers, self._ask(tune, 0, lambda: int(self._data(tune)["max_lease_ttl"]))
        )

    def _issuers(self, mount: str) -> tuple[str, ...]:
        """Fingerprints of the CA keys; for a Vault without issuers, that of the mount's single key."""

        def ask() -> tuple[str, ...]:
            try:
                answer = self._vault.find("LIST", f"{mount}issuers", within=self._left)
                known = {} if answer is None else answer["data"]["key_info"]
                lines = [facts["public_key"] for facts in known.values()]
            except SignerError as error:
                if error.code != _MISSING:
                    raise
                one = self._vault.find("GET", f"{mount}config/ca", within=self._left)
                lines = [] if one is None else [one["data"]["public_key"]]
            try:
                return tuple(sorted(parse_public_key(str(line)).fingerprint for line in lines))
            except BadFormat:
                raise ValueError("not a key") from None

        return self._ask(f"{mount}issuers", (), ask)

    def own_token(self, ssh_mount: str, roles: Sequence[str], devices: tuple[str, ...]) -> OwnToken | None:
        """The token in use: its lifetime and the rights that it lacks for the removal of Vault."""

        def ask() -> OwnToken:
            data = self._data("auth/token/lookup-self")
            needed = tuple(_needed(ssh_mount, roles))
            may = self._data("sys/capabilities-self", {"paths": [path for path, _ in needed]})
            lacks = tuple(path for path, right in needed if not {right, "root"} & set(may.get(path, ())))
            accessor = str(data["accessor"])
            hashes = (
                accessor,
                *(self._hashed(device, accessor) for device in devices),
            )  # in clear: hmac_accessor=false
            return OwnToken(accessor, int(data["ttl"]), int(data["num_uses"]), data["orphan"] is True, lacks, hashes)

        return self._ask("auth/token/lookup-self", None, ask)

    def _hashed(self, device: str, accessor: str) -> str:
        """The accessor as that audit device writes it; "" if the token may not ask."""
        before = len(self.unread)
        path = f"sys/audit-hash/{device.rstrip('/')}"
        found = self._ask(device, "", lambda: str(self._data(path, {"input": accessor})["hash"]))
        del self.unread[before:]  # the only effect is that signer's own requests count as another client's
        return found


def _needed(ssh_mount: str, roles: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Paths that the removal of Vault uses, with the required capability."""
    yield f"sys/mounts/{ssh_mount.strip('/')}", "delete"
    for role in roles:
        yield f"{ssh_mount.strip('/')}/sign/{role}", "update"  # to be told that it does not exist, not "forbidden"
    yield "auth/token/accessors/", "list"
    yield "auth/token/revoke-accessor", "update"
    yield "sys/seal", "sudo"
    yield SNAPSHOT, "read"


def _keys(answer: Mapping[str, Any] | None) -> tuple[str, ...]:
    if answer is None:
        return ()
    names = answer["data"]["keys"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names must be strings")
    return tuple(name for name in names if name)


def _incomplete() -> Unavailable:
    """The error for an answer that lacks what every Vault has: it does not prove that anything is absent."""
    return Unavailable(
        "vault_answer_incomplete",
        "Vault's answer lacks an entry that every Vault has",
        "check the admin token's policies",
    )


def _count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("not an index")
    return value


def _text(state: Mapping[str, Any], name: str) -> str:
    value = state.get(name)
    return value if isinstance(value, str) else ""
