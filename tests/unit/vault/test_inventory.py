"""The inventory asks for names alone, ends whatever Vault says, and calls unread what it could not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import SignerError, Unavailable
from signer.vault import inventory as vaultinventory
from signer.vault.inventory import AuditDevice, Server, Unread, read_inventory

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIC7yDX6KxUav4GMpN8yks0rWG3+iHBE0o+KvXaNowHOH"
FORBIDDEN = Unavailable("vault_forbidden", "no")
MOUNTS = {
    "ssh/": {"type": "ssh", "options": {}, "uuid": "u-ssh"},
    "old/": {"type": "kv", "options": None},
    "new/": {"type": "kv", "options": {"version": "2"}},
    "sys/": {"type": "system", "uuid": "u-sys"},
}
ANSWERS: dict[str, Any] = {
    "GET sys/seal-status": {
        "version": "2.7.2",
        "cluster_id": "c",
        "storage_type": "raft",
        "type": "shamir",
        "sealed": False,
    },
    "GET sys/mounts": {"data": MOUNTS},
    "GET sys/auth": {"data": {"token/": {"type": "token"}}},
    "GET sys/audit": {"data": {"file/": {"type": "file", "options": {"file_path": "/a.log", "prefix": "p: "}}}},
    "GET sys/leader": {"ha_enabled": True, "is_self": True, "raft_committed_index": 36, "raft_applied_index": 35},
    "GET sys/storage/raft/configuration": {
        "data": {"config": {"servers": [{"node_id": "one", "address": "10.0.0.1:8201", "leader": True}]}}
    },
    "GET sys/ha-status": {
        "data": {
            "nodes": [
                {"api_address": "http://v1:8200", "cluster_address": "https://10.0.0.1:8201", "active_node": True}
            ]
        }
    },
    "LIST old/": {"data": {"keys": ["a/", "top"]}},
    "LIST old/a/": {"data": {"keys": ["b/"]}},
    "LIST old/a/b/": {"data": {"keys": ["deep"]}},
    "LIST new/metadata/": {"data": {"keys": ["x/"]}},
    "LIST new/metadata/x/": {"data": {"keys": ["y"]}},
    "LIST ssh/roles": {"data": {"keys": ["llmops"]}},
    "GET ssh/roles/llmops": {"data": {"max_ttl": 1800}},
    "LIST ssh/issuers": {"data": {"key_info": {"i": {"public_key": KEY}}, "keys": ["i"]}},
    "GET sys/mounts/ssh/tune": {"data": {"max_lease_ttl": 2764800}},
    "LIST sys/policies/acl": {"data": {"keys": ["root", "default"]}},
    "LIST identity/entity/id": {"data": {"keys": ["e1", "e2"]}},
    "LIST sys/leases/lookup/": {"data": {"keys": ["auth/"]}},
    "LIST sys/leases/lookup/auth/": {"data": {"keys": ["l1", "l2"]}},
    "LIST auth/token/accessors": {"data": {"keys": ["t1", "t2", "t3"]}},
    "GET auth/token/lookup-self": {"data": {"accessor": "t1", "ttl": 0, "num_uses": 0, "orphan": True}},
    "POST sys/capabilities-self": {"data": {path: ["root"] for path, _ in vaultinventory._needed("ssh")}},
    "POST sys/audit-hash/file": {"data": {"hash": "hmac-sha256:t1"}},
}


class Vault:
    """Answers as told; what it was not told about is not there."""

    def __init__(self, **changes: Any) -> None:
        self.answers = {**ANSWERS, **changes}
        self.asked: list[str] = []

    def call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, within: float = 1
    ) -> dict[str, Any]:
        del body, within
        self.asked.append(f"{method} {path}")
        answer = self.answers.get(f"{method} {path}", Unavailable("vault_mount_missing", "none"))
        if isinstance(answer, SignerError):
            raise answer
        return answer  # type: ignore[no-any-return]

    def find(self, method: str, path: str, *, within: float = 1) -> dict[str, Any] | None:
        if f"{method} {path}" not in self.answers and not path.startswith("sys/namespaces"):
            self.asked.append(f"{method} {path}")
            return None
        return self.call(method, path, within=within)


def test_everything_is_counted_down_to_the_last_folder() -> None:
    found = read_inventory(Vault(), "ssh", clock=lambda: 1.5)
    assert {entries.mount: entries.names for entries in found.kv} == {"old/": ("a/b/deep", "top"), "new/": ("x/y",)}
    assert {entries.mount: entries.version for entries in found.kv} == {"old/": 1, "new/": 2}
    assert (found.entities, found.leases, found.tokens, found.policies) == (2, 2, 3, ("default", "root"))
    assert (found.ssh[0].roles[0].max_ttl, len(found.ssh[0].issuers), found.ssh[0].max_lease) == (1800, 1, 2764800)
    assert found.own_token is not None
    assert (found.own_token.hashes, found.own_token.lacks) == (("t1", "hmac-sha256:t1"), ())
    assert (found.at, found.unread, found.namespaces) == (1, (), ())


def test_where_the_data_lie_and_how_the_log_is_written_is_told() -> None:
    found = read_inventory(Vault(), "ssh")
    assert (found.uuid_of("ssh"), found.uuid_of("none"), found.index) == ("u-ssh", "", 36)
    assert found.servers == (Server("one", "10.0.0.1:8201", "http://v1:8200"),)
    assert found.audit_devices == (AuditDevice("file/", "file", "p: ", "json", "/a.log"),)


def test_audit_5_every_node_of_either_source_is_told() -> None:
    """A node of raft's that is down, and a standby of another storage."""
    two = {"config": {"servers": [{"node_id": "one", "address": "a:8201"}, {"node_id": "two", "address": "b:8201"}]}}
    nodes = [{"api_address": "http://a", "cluster_address": "https://a:8201", "active_node": True}]
    standby = {"api_address": "http://c", "cluster_address": "https://c:8201", "active_node": False}
    found = read_inventory(
        Vault(**{"GET sys/storage/raft/configuration": {"data": two}, "GET sys/ha-status": {"data": {"nodes": nodes}}}),
        "ssh",
    )
    assert found.servers == (Server("one", "a:8201", "http://a"), Server("two", "b:8201", ""))
    of_consul = {"GET sys/seal-status": {**ANSWERS["GET sys/seal-status"], "storage_type": "consul"}}
    found = read_inventory(Vault(**of_consul, **{"GET sys/ha-status": {"data": {"nodes": [*nodes, standby]}}}), "ssh")
    assert (found.index, found.servers) == (0, (Server("", "a:8201", "http://a"), Server("", "c:8201", "http://c")))


PARTIAL: dict[str, dict[str, Any]] = {
    "GET sys/mounts": {"data": {}},
    "GET sys/auth": {"data": {}},
    "LIST sys/policies/acl": {"data": {"keys": ["mine"]}},
    "LIST auth/token/accessors": {"data": {"keys": ["t9"]}},
    "GET sys/storage/raft/configuration": {"data": {"config": {"servers": []}}},
    "GET sys/ha-status": {"data": {"nodes": []}},
}


@pytest.mark.parametrize("place", PARTIAL)
def test_audit_5_an_answer_without_what_every_vault_has_proves_nothing(place: str) -> None:
    found = read_inventory(Vault(**{place: PARTIAL[place]}), "ssh")
    assert found.unread == (Unread(place.split(" ")[1], "vault_answer_incomplete"),)


def test_audit_5_a_mount_list_without_the_built_in_ones_is_incomplete_though_it_names_the_ssh_mount() -> None:
    found = read_inventory(Vault(**{"GET sys/mounts": {"data": {"ssh/": {"type": "ssh"}}}}), "ssh")
    assert (found.mounts, found.unread[0].code) == ((), "vault_answer_incomplete")


@pytest.mark.parametrize("option", ["filter", "exclude", "fallback"])
def test_audit_5_a_device_that_leaves_entries_out_is_told(option: str) -> None:
    devices = {"file/": {"type": "file", "options": {option: "x"}}}
    assert read_inventory(Vault(**{"GET sys/audit": {"data": devices}}), "ssh").audit_devices[0].is_partial


def test_audit_5_the_token_must_be_able_to_ask_for_a_signature() -> None:
    """Otherwise "forbidden" is all that it hears after the mount is gone, and it would hear that before as well."""
    found = read_inventory(Vault(), "ssh", ("llmops", "web"))
    assert found.own_token is not None
    assert found.own_token.lacks == ("ssh/sign/llmops", "ssh/sign/web")


def test_no_value_is_ever_asked_for() -> None:
    vault = Vault()
    read_inventory(vault, "ssh")
    of_kv = [asked for asked in vault.asked if asked.split(" ")[1].startswith(("old/", "new/"))]
    assert len(of_kv) == 5
    assert all(asked.startswith("LIST ") for asked in of_kv)
    assert not [asked for asked in of_kv if "/data/" in asked]


UNREADABLE = {*ANSWERS, "LIST sys/namespaces"} - {"GET sys/seal-status", "POST sys/audit-hash/file"}


@pytest.mark.parametrize("place", sorted(UNREADABLE))
def test_what_is_forbidden_is_unread_and_never_empty(place: str) -> None:
    found = read_inventory(Vault(**{place: FORBIDDEN}), "ssh")
    assert [unread.code for unread in found.unread] == ["vault_forbidden"]
    assert found.unread[0].what.split(" ")[0] in (place.split(" ")[1], "auth/token/lookup-self")


@pytest.mark.parametrize("answer", [{}, {"data": None}, {"data": []}, {"data": {"keys": "a"}}, {"data": {"keys": [1]}}])
@pytest.mark.parametrize("place", ["LIST old/a/", "LIST auth/token/accessors", "LIST ssh/roles", "LIST sys/namespaces"])
def test_an_answer_of_another_form_is_unread(place: str, answer: dict[str, Any]) -> None:
    found = read_inventory(Vault(**{place: answer}), "ssh")
    assert found.unread == (Unread(place.split(" ")[1], "vault_answer_malformed"),)


def test_a_number_without_end_is_unread() -> None:
    found = read_inventory(Vault(**{"GET ssh/roles/llmops": {"data": {"max_ttl": float("inf")}}}), "ssh")
    assert found.unread == (Unread("ssh/roles/llmops", "vault_answer_malformed"),)


def test_an_audit_device_that_does_not_tell_hashes_is_no_matter() -> None:
    found = read_inventory(Vault(**{"POST sys/audit-hash/file": FORBIDDEN}), "ssh")
    assert found.unread == ()
    assert found.own_token is not None
    assert found.own_token.hashes == ("t1", "")


def test_namespaces_are_told() -> None:
    found = read_inventory(Vault(**{"LIST sys/namespaces": {"data": {"keys": ["team/"]}}}), "ssh")
    assert found.namespaces == ("team/",)


def test_an_old_vault_without_issuers_tells_its_one_ca_key() -> None:
    missing = Unavailable("vault_mount_missing", "none")
    found = read_inventory(
        Vault(**{"LIST ssh/issuers": missing, "GET ssh/config/ca": {"data": {"public_key": KEY}}}), "ssh"
    )
    assert (len(found.ssh[0].issuers), found.unread) == (1, ())


def test_a_sealed_vault_has_no_inventory() -> None:
    with pytest.raises(Unavailable, match="sealed"):
        read_inventory(Vault(**{"GET sys/seal-status": {"sealed": True}}), "ssh")


class Endless(Vault):
    """Every folder holds another one."""

    def find(self, method: str, path: str, *, within: float = 1) -> dict[str, Any] | None:
        if path.startswith("old/"):
            self.asked.append(path)
            return {"data": {"keys": ["again/", "entry"]}}
        return super().find(method, path, within=within)


def test_folders_without_end_are_left_at_some_depth() -> None:
    vault = Endless()
    found = read_inventory(vault, "ssh")
    assert {unread.code for unread in found.unread} == {"too_deep"}
    assert len([path for path in vault.asked if path.startswith("old/")]) == vaultinventory.MAX_DEPTH + 1


def test_names_without_end_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaultinventory, "MAX_ENTRIES", 10)
    found = read_inventory(Vault(**{"LIST old/": {"data": {"keys": [f"n{n}" for n in range(11)]}}}), "ssh")
    assert found.unread == (Unread("old/", "too_many"),)


def test_a_vault_that_takes_for_ever_leaves_the_rest_unread() -> None:
    ticks = iter(range(0, 100_000, 40))
    found = read_inventory(Vault(), "ssh", monotonic=lambda: float(next(ticks)))
    assert {unread.code for unread in found.unread} == {"too_slow"}
    assert found.own_token is None


WORDS = st.sampled_from(["data", "keys", "type", "x/"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["keys", "key_info", "max_ttl", "max_lease_ttl", "ttl", "accessor", "num_uses", "hash", "old/"]
)


@given(st.dictionaries(st.sampled_from(sorted(ANSWERS)), st.dictionaries(FIELDS, JSON, max_size=4)))
def test_whatever_vault_says_there_is_an_inventory(answers: dict[str, Any]) -> None:
    told: dict[str, Any] = {place: {"data": data} for place, data in answers.items()}
    told["GET sys/seal-status"] = ANSWERS["GET sys/seal-status"]
    assert read_inventory(Vault(**told), "ssh").version == "2.7.2"
