"""Vault's audit log: signatures and other clients are found, whatever else is in it; no value of it is told."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import Unavailable
from signer.migration.evidence.redact import Guard
from signer.units import timestamp
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
    return read_audit_log(path, since, own, sleep=lambda _: None)


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


def test_audit_5f1_half_lines_at_both_ends_are_told(tmp_path: Path) -> None:
    whole = lines(entry(1), entry(2), entry(3))
    found = read(tmp_path, whole[50:-40])
    assert (found.entries, found.broken) == (1, 2)
    assert [(one.file, one.number) for one in found.broken_lines] == [("audit.log", 1), ("audit.log", 3)]


@pytest.mark.parametrize("prefix", ["vault-audit: ", "@cee: ", "{"])
def test_audit_5f1_a_prefix_hides_no_signature(tmp_path: Path, prefix: str) -> None:
    """The device's own, one that is recognised, or none of ours: then no line is understood, and each one is told."""
    log = b"".join(prefix.encode() + line for line in lines(entry(1), entry(2)).splitlines(keepends=True))
    (tmp_path / "audit.log").write_bytes(log)
    known = read_audit_log(tmp_path / "audit.log", START, prefixes=("vault-audit: ", "{"))
    assert (known.entries, known.broken, len(known.signatures), len(known.clients)) == (2, 0, 1, 1)
    unknown = read_audit_log(tmp_path / "audit.log", START, prefixes=())
    if prefix == "@cee: ":
        assert unknown == known
    else:
        assert (unknown.entries, unknown.broken) == (0, 2)
        assert unknown.broken_lines[1].number == 2
        assert unknown.broken_lines[0].excerpt.startswith(f'{prefix}{{"time":"2026-11-22T16:34:')


NO_ENTRIES = {
    "text": b"a note of the operator",
    "another form": b'{"time":"2026-11-22T16:34:29Z","level":"info","msg":"audit"}',
    "no request": lines({**entry(1), "request": None})[:-1],
    "no time": lines({**entry(1), "time": None})[:-1],
    "a path of another form": lines({**entry(1), "request": {"path": 7}})[:-1],
    "two on a line": lines(entry(1))[:-1] + lines(entry(2, path="sys/health"))[:-1],
    "XML, as the form jsonx has it": b"<json:object><json:string name='time'>",
}


@pytest.mark.parametrize("what", NO_ENTRIES)
def test_audit_5f1_every_line_that_is_no_entry_is_told(tmp_path: Path, what: str) -> None:
    found = read(tmp_path, lines(entry(1)) + NO_ENTRIES[what] + b"\n" + lines(entry(3)))
    assert (found.entries, found.broken) == (2, 1)
    (told,) = found.broken_lines
    assert (told.file, told.number) == ("audit.log", 2)
    assert 0 < len(told.excerpt) <= 40


def test_audit_5f1_a_request_without_a_path_is_an_entry(tmp_path: Path) -> None:
    """As OpenBao writes one for `/v1/`."""
    assert read(tmp_path, lines({**entry(1), "request": {"operation": "read"}})).broken == 0


@pytest.mark.parametrize("where", [0, 30, 600])
def test_audit_5f1_a_secret_in_a_line_is_masked_whole(tmp_path: Path, where: int) -> None:
    secret = b"hvs.CAESIJ0ijb2FvJlcm9vdC10b2tlbi1vZi12YXVsdA"
    found = read(tmp_path, b"x " * (where // 2) + secret + b" password=hunter2-and-more-4711\n")
    (told,) = found.broken_lines
    assert all(part not in told.excerpt for part in ("CAES", "hunter2"))
    cleaned = Guard().clean
    (tmp_path / "audit.log").write_text('{"client_token":"abc"} X-Vault-Token: short\n')
    (told,) = read_audit_log(tmp_path / "audit.log", 0, clean=cleaned).broken_lines
    assert "short" not in told.excerpt


def test_audit_5f1_a_last_line_that_is_being_written_is_read_again_once(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    half, rest = lines(entry(1))[:99], lines(entry(1))[99:]
    slept: list[float] = []

    def finish(seconds: float) -> None:
        slept.append(seconds)
        with path.open("ab") as log:
            log.write(rest)

    path.write_bytes(lines(entry(0)) + half)
    found = read_audit_log(path, 0, sleep=finish)
    assert (found.entries, found.broken, slept) == (2, 0, [audit_log.READ_AGAIN_AFTER])
    path.write_bytes(lines(entry(0)) + half)
    found = read_audit_log(path, 0, sleep=slept.append)
    assert (found.entries, found.broken, len(slept)) == (1, 1, 2)


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "audit.log").write_bytes(lines(entry(1))[:-1])
    assert read_audit_log(tmp_path / "audit.log", 0, sleep=lambda _: None).entries == 1


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "gz": gzip.compress,
    "lzma": lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE),
}


@pytest.mark.parametrize("name", ["audit.log.1", "audit.log-20261121", "audit-20261121.log", "audit.1.log"])
@pytest.mark.parametrize("kind", PACKERS)
def test_audit_5f1_rotated_files_count_however_they_are_packed_and_named(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / f"{name}.{kind}").write_bytes(PACKERS[kind](lines(entry(1, path="old/sign/r"))))
    found = read(tmp_path, lines(entry(9)))
    assert {signature.mount for signature in found.signatures} == {"old/", "ssh/"}
    assert (found.broken, found.gaps) == (0, ())


@pytest.mark.parametrize("magic", [b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04"])
def test_audit_5f1_what_cannot_be_unpacked_is_an_error_and_not_empty(tmp_path: Path, magic: bytes) -> None:
    (tmp_path / "audit.log.1.zst").write_bytes(magic + b"\x00" * 40)
    with pytest.raises(Unavailable) as refused:
        read(tmp_path, lines(entry(9)))
    assert refused.value.code == "audit_log_packed"
    assert "audit.log.1.zst" in refused.value.text


# --- gaps -----------------------------------------------------------------------------------------------------------

HOUR = 3600


def hours(*at: float) -> bytes:
    """Entries so many hours after the start."""
    return lines(*({**entry(), "time": f"{timestamp(START + int(h * HOUR))[:-1]}.5Z"} for h in at))


def rotated(folder: Path, **files: bytes) -> AuditFacts:
    for name, content in files.items():
        (folder / name.replace("__", ".").replace("_", "-")).write_bytes(content)
    return read_audit_log(folder / "audit.log", START)


def test_audit_5_a_number_that_is_missing_between_rotated_files_is_a_gap(tmp_path: Path) -> None:
    found = rotated(tmp_path, audit__log__3=hours(0, 5), audit__log__1=hours(9, 10), audit__log=hours(10.1))
    (gap,) = found.gaps
    assert (gap.begin, gap.end) == (START + 5 * HOUR, START + 9 * HOUR)
    assert "audit.log.3 and audit.log.1" in gap.why
    rotated(tmp_path, audit__log__2=hours(6))
    assert rotated(tmp_path, audit__log__2=hours(6)).gaps == ()
    (tmp_path / "audit.log.1").unlink()
    (gap,) = rotated(tmp_path, audit__log=hours(9.9)).gaps
    assert "audit.log.2 and audit.log" in gap.why


def test_audit_5_the_first_number_may_be_nought(tmp_path: Path) -> None:
    assert rotated(tmp_path, audit__log__1=hours(0), audit__log__0=hours(9), audit__log=hours(20)).gaps == ()


def test_audit_5_a_long_silence_between_dated_files_is_a_gap(tmp_path: Path) -> None:
    found = rotated(
        tmp_path, audit__log_20261122=hours(0, 10), audit__log_20261124=hours(40, 48), audit__log=hours(48.5)
    )
    (gap,) = found.gaps
    assert (gap.begin, gap.end) == (START + 10 * HOUR, START + 40 * HOUR)
    assert rotated(tmp_path, audit__log_20261123=hours(10.5, 20, 30, 39.5)).gaps == ()


def test_audit_5_a_silence_inside_a_file_or_before_the_cutover_is_none(tmp_path: Path) -> None:
    assert rotated(tmp_path, audit__log_20261122=hours(-90, -80), audit__log=hours(-1, 70)).gaps == ()


def test_a_log_that_is_rotated_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_bytes(lines(entry(1))[:-40])

    def rotate(_: float) -> None:
        if not (tmp_path / "audit.log.1").exists():
            (tmp_path / "audit.log.1").write_bytes(lines(entry(1)))
            path.unlink()
            path.write_bytes(lines(entry(2)))

    found = read_audit_log(path, 0, sleep=rotate)
    assert (found.entries, found.broken) == (2, 0)


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


PACKED = tuple(magic for magic, _ in audit_log._PACKED)
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


@given(st.binary(max_size=300).filter(lambda odd: not odd.startswith(PACKED)))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, odd: bytes) -> None:
    found = read(tmp_path_factory.mktemp("log"), odd + b"\n" + lines(entry(2)))
    assert Signature("ssh/", "llmops", START + 2) in found.signatures


@given(st.binary(max_size=300))
def test_any_bytes_of_a_packed_file_are_refused(tmp_path_factory: pytest.TempPathFactory, odd: bytes) -> None:
    with pytest.raises(Unavailable) as refused:
        read(tmp_path_factory.mktemp("log"), b"\x1f\x8b" + odd)
    assert refused.value.code == "audit_log_unreadable"
