"""Vault's audit log: signatures and other clients are found, whatever else is in it; no value of it is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import Unavailable
from signer.vault import audit_log
from signer.vault.audit_log import AuditFacts, Client, Signature, read_audit_log

SECRET = "hmac-sha256:5e40fc1b2f-of-a-value"
START = 1_795_365_268  # 2026-11-22T16:34:28Z


def entry(at: int = 0, kind: str = "response", path: str = "ssh/sign/llmops", **changes: Any) -> dict[str, Any]:
    """As OpenBao 2.7.2 writes it, `at` seconds after the start."""
    found = {
        "time": f"2026-11-22T16:{34 + (28 + at) // 60:02}:{(28 + at) % 60:02}.997953031Z",
        "type": kind,
        "auth": {"client_token": SECRET, "accessor": "hmac-sha256:a1", "display_name": "userpass-dave"},
        "request": {"operation": "update", "path": path, "mount_type": "ssh", "data": {"public_key": SECRET}},
        "response": {"data": {"serial_number": SECRET, "signed_key": SECRET}},
    }
    return {**found, **changes}


def lines(*entries: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in entries)


def read(folder: Path, content: bytes, since: int = START - 1, own: frozenset[str] = frozenset()) -> AuditFacts:
    path = folder / "audit.log"
    path.write_bytes(content)
    return read_audit_log(path, since, own)


def test_the_newest_signature_of_each_role_is_told(tmp_path: Path) -> None:
    issued = entry(9, path="team/ssh/issue/web")
    found = read(tmp_path, lines(entry(5), entry(7), entry(3), issued))
    assert found.signatures == (Signature("ssh/", "llmops", START + 7), Signature("team/ssh/", "web", START + 9))
    assert found.last_signature() == Signature("team/ssh/", "web", START + 9)
    assert (found.first_at, found.last_at, found.entries, found.broken) == (START + 3, START + 9, 4, 0)


@pytest.mark.parametrize(
    "refused",
    [
        entry(kind="request"),
        entry(error="1 error occurred: permission denied"),
        entry(response={"data": {"error": SECRET}}),
        entry(path="sys/sign/x"),
        entry(path="auth/ssh/sign/x"),
    ],
)
def test_what_is_no_signature_is_none(tmp_path: Path, refused: dict[str, Any]) -> None:
    assert read(tmp_path, lines(refused)).signatures == ()


def test_an_answer_that_is_not_told_counts_as_a_signature(tmp_path: Path) -> None:
    assert len(read(tmp_path, lines(entry(response={}))).signatures) == 1


def test_clients_since_then_are_told_and_we_are_not_one(tmp_path: Path) -> None:
    ours = entry(8, auth={"accessor": "hmac-sha256:ours", "display_name": "token"})
    login = entry(9, path="auth/userpass/login/dave", response={"auth": {"client_token": SECRET}})
    nobody = entry(9, auth={"token_type": "default"}, error="permission denied")
    log = lines(entry(1), entry(5), entry(6, kind="request"), entry(7), ours, login, nobody)
    found = read(tmp_path, log, since=START + 4, own=frozenset({"hmac-sha256:ours"}))
    assert found.clients == (
        Client("an unknown token", "sign at ssh/", START + 9, 1),
        Client("userpass-dave", "login at auth/userpass/", START + 9, 1),
        Client("userpass-dave", "sign at ssh/", START + 7, 2),
    )


@pytest.mark.parametrize(
    "path, told",
    [
        ("ssh/public_key", "public_key of ssh/"),
        ("team/ssh/config/ca", "config of team/ssh/"),
        ("ssh/issuer/default/public_key", "issuer of ssh/"),
        ("ssh/creds/otp", "creds of ssh/"),
        ("ssh/verify", "verify of ssh/"),
        ("auth/token/renew-self", "renewal of a token or a lease"),
        ("auth/token/renew", "renewal of a token or a lease"),
        ("sys/leases/renew", "renewal of a token or a lease"),
    ],
)
def test_who_only_reads_the_key_or_renews_a_token_uses_vault_too(tmp_path: Path, path: str, told: str) -> None:
    """Such as a host that fetches the line for its sshd, without a token even."""
    request = {"operation": "read", "path": path}
    nobody = entry(5, auth={}, request=request)
    found = read(tmp_path, lines(entry(3, request=request), entry(4, request=request), nobody))
    assert found.clients == (
        Client("an unknown token", told, START + 5, 1),
        Client("userpass-dave", told, START + 4, 2),
    )
    assert found.signatures == ()


@pytest.mark.parametrize(
    "path",
    ["sys/health", "sys/mounts", "auth/token/create", "auth/token/lookup-self", "kv/config/ca", "kv/data/verify"],
)
def test_who_looks_around_or_makes_a_token_uses_vault_for_nothing_that_would_be_missed(
    tmp_path: Path, path: str
) -> None:
    request = {"operation": "read", "path": path, "mount_type": path.split("/", maxsplit=1)[0]}
    assert read(tmp_path, lines(entry(3, request=request))).clients == ()


@pytest.mark.parametrize("looked_at", ["auth/token/accessors", "ssh/roles/llmops"])
def test_an_earlier_plan_of_ours_with_another_token_is_no_client(tmp_path: Path, looked_at: str) -> None:
    """It read the CA's key, and listed all tokens or read a role, as no host would."""
    then = {"accessor": "hmac-sha256:then", "display_name": "token"}
    host = {"accessor": "hmac-sha256:host", "display_name": "token"}
    log = [entry(n, path="ssh/config/ca", auth=who) for n, who in ((3, then), (4, host), (5, host))]
    assert [client.times for client in read(tmp_path, lines(*log)).clients] == [3]
    log.append(entry(6, path=looked_at, auth=then))
    assert read(tmp_path, lines(*log)).clients == (Client("token", "config of ssh/", START + 5, 2),)
    signed = entry(7, auth=then)
    assert Client("token", "sign at ssh/", START + 7, 1) in read(tmp_path, lines(*log, signed)).clients


def test_only_so_many_clients_are_told_apart_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_CLIENTS", 3)
    log = lines(*(entry(n, path="ssh/public_key", auth={"accessor": f"a{n}"}) for n in range(9)))
    assert [(client.name, client.times) for client in read(tmp_path, log).clients] == [
        ("an unknown token", 3),
        ("others", 6),
    ]


@pytest.mark.parametrize("odd", [[], {}, 7, None])
def test_an_accessor_of_another_form_is_nobody_we_know(tmp_path: Path, odd: object) -> None:
    log = lines(entry(2, auth={"accessor": odd}), entry(3, path="auth/token/accessors", auth={"accessor": odd}))
    assert read(tmp_path, log, own=frozenset({""})).clients == (
        Client("an unknown token", "sign at ssh/", START + 2, 1),
    )


def test_rotated_files_are_read_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "audit.log.1").write_bytes(lines(entry(2)))
    (tmp_path / "audit.log-20261121.gz").write_bytes(gzip.compress(lines(entry(1, path="old/sign/r"))))
    (tmp_path / "audit.logger").write_bytes(b"not part of it")
    found = read(tmp_path, lines(entry(30)))
    assert {signature.mount for signature in found.signatures} == {"old/", "ssh/"}
    assert (found.first_at, found.entries, found.broken) == (START + 1, 3, 0)


def test_half_lines_at_both_ends_are_passed_over(tmp_path: Path) -> None:
    whole = lines(entry(1), entry(2), entry(3))
    found = read(tmp_path, whole[50:-40])
    assert (found.entries, found.broken) == (1, 2)


def test_a_last_line_that_is_being_written_counts_once_it_is_whole(tmp_path: Path) -> None:
    assert read(tmp_path, lines(entry(1))[:-1]).entries == 1


def test_a_line_without_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_LINE", 2000)
    found = read(tmp_path, lines(entry(1), {"x": "y" * 9000}, entry(2)))
    assert (found.entries, found.broken) == (2, 1)


def test_more_than_can_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_BYTES", 100)
    with pytest.raises(Unavailable) as refused:
        read(tmp_path, lines(entry(1)))
    assert refused.value.code == "audit_log_too_large"


def test_a_log_that_takes_for_ever_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "audit.log").write_bytes(lines(entry(1), entry(2)))
    ticks = iter((0.0, 1.0, 1000.0))
    with pytest.raises(Unavailable) as refused:
        read_audit_log(tmp_path / "audit.log", 0, monotonic=lambda: next(ticks))
    assert refused.value.code == "audit_log_too_large"


@pytest.mark.parametrize("how", ["missing", "folder", "damaged", "cut off"])
def test_a_log_that_cannot_be_read_is_an_error(tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit.log"
    packed = gzip.compress(lines(*(entry(n) for n in range(9))))
    if how == "folder":
        path.mkdir()
    elif how == "damaged":
        path.write_bytes(packed[:40] + b"\xff\xff\xff\xff" + packed[44:])
    elif how == "cut off":
        path.write_bytes(packed[:-20])
    with pytest.raises(Unavailable) as refused:
        read_audit_log(path, 0)
    assert refused.value.code == "audit_log_unreadable"


def test_nothing_of_a_value_is_told(tmp_path: Path) -> None:
    found = read(tmp_path, lines(entry(1), entry(2, path="auth/userpass/login/x"), {"x": SECRET}) + SECRET.encode())
    assert SECRET not in repr(found)
    assert found.clients


def test_entries_with_their_time_last_are_read_as_well(tmp_path: Path) -> None:
    log = json.dumps(entry(3), sort_keys=True).encode() + b"\n"  # as Vault 1.15 and later write them
    assert read(tmp_path, log).signatures == (Signature("ssh/", "llmops", START + 3),)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(["time", "type", "auth", "request", "response", "error"]), VALUES))
def test_any_json_is_read(tmp_path_factory: pytest.TempPathFactory, odd: dict[str, Any]) -> None:
    found = read(tmp_path_factory.mktemp("log"), lines({**entry(1), **odd}, entry(2)))
    assert found.entries + found.broken == 2
    assert found.last_at >= START + 2


@given(st.binary(max_size=300).filter(lambda odd: not odd.startswith(b"\x1f\x8b")))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, odd: bytes) -> None:
    found = read(tmp_path_factory.mktemp("log"), odd + b"\n" + lines(entry(2)))
    assert Signature("ssh/", "llmops", START + 2) in found.signatures


@given(st.binary(max_size=300))
def test_any_bytes_of_a_packed_file_are_refused(tmp_path_factory: pytest.TempPathFactory, odd: bytes) -> None:
    with pytest.raises(Unavailable) as refused:
        read(tmp_path_factory.mktemp("log"), b"\x1f\x8b" + odd)
    assert refused.value.code == "audit_log_unreadable"
