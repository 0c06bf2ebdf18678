"""Revocation lists: OpenSSH reads what we write, and we read what OpenSSH writes; broken ones are refused."""

from __future__ import annotations

import os
import subprocess
from base64 import b64decode, b64encode
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signer.errors import BadFormat
from signer.ssh.certificate import CertificateFields, encode_unsigned
from signer.ssh.krl import (
    ANY_CA,
    MAX_BITMAP,
    MAX_SERIAL,
    Range,
    RevocationList,
    decode_krl,
    encode_krl,
    group_serials,
    merge_ranges,
)
from signer.ssh.wire import string, uint32, uint64
from tests.parts.keys import Key, KeyRing

DATE = 1_790_000_000
HEAD = b"SSHKRL\n\0" + uint32(1) + uint64(1) + uint64(DATE) + uint64(0) + string(b"") + string(b"")
SERIALS = st.integers(1, 400) | st.integers(1, 40_000) | st.integers(1, MAX_SERIAL)
RANGES = st.lists(
    st.builds(
        lambda first, more: (first, min(first + more, MAX_SERIAL)), SERIALS, st.integers(0, 3) | st.integers(0, 900)
    )
)
FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])  # each starts ssh-keygen


def blob_of(key: Key) -> bytes:
    return b64decode(key.public_line.split()[1])


def revoked_by_openssh(folder: Path, data: bytes, ca: Key, serials: list[int], key_id: str = "anna") -> list[bool]:
    """What `ssh-keygen -Q` says of a certificate by that CA (Ed25519) with each of these serials."""
    signs = load_ssh_private_key(ca.private.read_bytes(), None)
    assert isinstance(signs, Ed25519PrivateKey)
    (folder / "krl").write_bytes(data)
    key = string(b"ssh-ed25519") + string(os.urandom(32))
    names = []
    for number, serial in enumerate(serials):
        fields = CertificateFields(
            "ssh-ed25519", key, b"n" * 32, serial, 1, key_id, ("llmops",), 0, 2**63, (), (), blob_of(ca)
        )
        unsigned = encode_unsigned(fields)
        certificate = unsigned + string(string(b"ssh-ed25519") + string(signs.sign(unsigned)))
        name = folder / f"{number}-cert.pub"
        name.write_text(f"ssh-ed25519-cert-v01@openssh.com {b64encode(certificate).decode()} x\n")
        names.append(str(name))
    done = subprocess.run(
        ["ssh-keygen", "-Qf", str(folder / "krl"), *names], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(serials), done.stderr
    assert done.returncode == any(line.endswith("REVOKED") for line in lines), done.stderr
    return [line.endswith("REVOKED") for line in lines]


def made_by_openssh(folder: Path, ca: Key, lines: str, version: int = 7) -> bytes:
    (folder / "spec").write_text(lines)
    made = folder / "made"
    made.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-kf", str(made), "-s", str(ca.public), "-z", str(version), str(folder / "spec")],
        check=True,
        capture_output=True,
    )
    return made.read_bytes()


def edges(ranges: tuple[Range, ...]) -> list[int]:
    """Serials at both ends of each range, inside and outside; at most 60."""
    near = {at + by for first, last in ranges[:12] for at in (first, last) for by in (-1, 0, 1)}
    return sorted(serial for serial in near | {1, 2} if 0 < serial <= MAX_SERIAL)[:60]


@given(RANGES)
def test_what_is_written_is_what_is_read(ranges: list[Range]) -> None:
    revoked = RevocationList(3, DATE, "of a test", {b"ca": merge_ranges(ranges)})
    assert decode_krl(encode_krl(revoked)) == revoked


@FEW
@given(ranges=RANGES)
def test_openssh_refuses_the_same_serials(tmp_path: Path, keyring: KeyRing, ranges: list[Range]) -> None:
    ca = keyring("ed25519", "ca")
    part = merge_ranges(ranges)
    asked = edges(part)
    data = encode_krl(RevocationList(1, DATE, certificates={blob_of(ca): part}))
    assert revoked_by_openssh(tmp_path, data, ca, asked) == [
        any(first <= serial <= last for first, last in part) for serial in asked
    ]


@FEW
@given(ranges=RANGES)
def test_a_list_of_openssh_means_the_same_here(tmp_path: Path, keyring: KeyRing, ranges: list[Range]) -> None:
    ca, user = keyring("ed25519", "ca"), keyring("ed25519", "user")
    small = [(first, last) for first, last in ranges if last < 2**63]
    lines = (
        "".join(f"serial: {first}-{last}\n" if first < last else f"serial: {first}\n" for first, last in small)
        + f"sha256: {user.public_line}\n"
    )
    read = decode_krl(made_by_openssh(tmp_path, ca, lines))
    assert read.version == 7
    assert read.certificates.get(blob_of(ca), ()) == merge_ranges(small)
    assert read.sha256 == {sha256(blob_of(user)).digest()}


def test_keys_and_whole_cas_are_revoked_by_openssh(tmp_path: Path, keyring: KeyRing) -> None:
    ca, other, user = keyring("ed25519", "ca"), keyring("ed25519", "other"), keyring("ed25519", "user")
    by_any = RevocationList(1, DATE, certificates={ANY_CA: ((5, 5),)})
    assert revoked_by_openssh(tmp_path, encode_krl(by_any), ca, [5, 6]) == [True, False]
    by_ca = RevocationList(1, DATE, sha256=frozenset({sha256(blob_of(ca)).digest()}))
    assert revoked_by_openssh(tmp_path, encode_krl(by_ca), ca, [5]) == [True]
    assert revoked_by_openssh(tmp_path, encode_krl(by_ca), other, [5]) == [False]
    by_key = encode_krl(RevocationList(1, DATE, sha256=frozenset({sha256(blob_of(user)).digest()})))
    (tmp_path / "krl").write_bytes(by_key)
    told = subprocess.run(
        ["ssh-keygen", "-Qf", str(tmp_path / "krl"), str(user.public)], capture_output=True, check=False
    )
    assert told.stdout.endswith(b"REVOKED\n")


@pytest.mark.parametrize("kind", ["key", "sha1", "id"])
def test_what_no_list_of_signer_has_is_refused(tmp_path: Path, keyring: KeyRing, kind: str) -> None:
    ca, user = keyring("ed25519", "ca"), keyring("ed25519", "user")
    made = made_by_openssh(tmp_path, ca, f"{kind}: {'anna' if kind == 'id' else user.public_line}\n")
    with pytest.raises(BadFormat, match="the list has a section of type"):
        decode_krl(made)


def test_an_empty_list_has_44_bytes_and_revokes_nothing(tmp_path: Path, keyring: KeyRing) -> None:
    data = encode_krl(RevocationList(1, DATE))
    assert len(data) == 44
    assert revoked_by_openssh(tmp_path, data, keyring("ed25519", "ca"), [1]) == [False]


def test_a_dense_list_never_has_a_bitmap_that_openssh_cannot_load(tmp_path: Path, keyring: KeyRing) -> None:
    """`ssh-keygen -k` writes one bitmap for these, and then refuses to load it."""
    ca = keyring("ed25519", "ca")
    every_other = tuple((serial, serial) for serial in range(1, 4 * MAX_BITMAP, 2))
    data = encode_krl(RevocationList(1, DATE, certificates={blob_of(ca): every_other}))
    assert len(data) < 9_000  # a list would have 262 kB
    at_ends = [MAX_BITMAP - 1, MAX_BITMAP, MAX_BITMAP + 1, MAX_BITMAP + 2]
    assert revoked_by_openssh(tmp_path, data, ca, at_ends) == [True, False, True, False]


NEAR_SERIALS = st.lists(st.integers(0, 60) | st.integers(2**64 - 30, MAX_SERIAL), max_size=120)
RUN = st.builds(lambda first, count: range(first, first + count), st.integers(1, 5_000), st.integers(1, 300))


@given(NEAR_SERIALS | st.lists(RUN, max_size=6).map(lambda runs: [serial for run in runs for serial in run]))
def test_serials_are_grouped_as_they_are_merged_one_by_one(serials: list[int]) -> None:
    grouped = group_serials(serials)
    assert [serial for first, last in grouped for serial in range(first, last + 1)] == sorted(set(serials))
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(grouped))


@pytest.mark.parametrize(
    "step, most",
    [(1, 200), (3, 60_000), (1_000, 800_200), (2**40, 800_200)],
    ids=["range", "bitmap", "far", "list"],
)
def test_a_hundred_thousand_serials_fit(step: int, most: int) -> None:
    ranges = merge_ranges(group_serials(range(1, 100_000 * step, step)))
    revoked = RevocationList(1, DATE, certificates={b"ca": ranges})
    data = encode_krl(revoked)
    assert len(data) <= most
    assert decode_krl(data) == revoked


@pytest.mark.parametrize("bad", [(0, 5), (6, 5), (1, MAX_SERIAL + 1)])
def test_an_invalid_range_is_refused(bad: Range) -> None:
    with pytest.raises(BadFormat, match="not a range of serials"):
        merge_ranges([bad])


def section(kind: int, data: bytes) -> bytes:
    return bytes((kind,)) + string(data)


def about_certificates(kind: int, data: bytes) -> bytes:
    return section(1, string(b"ca") + string(b"") + section(kind, data))


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "ends before"),
        (HEAD[:-1], "ends before"),
        (b"SSHKRL\n\1" + HEAD[8:], "not a revocation list"),
        (HEAD[:8] + uint32(2) + HEAD[12:], "not a revocation list"),
        (HEAD[:28] + uint64(1) + HEAD[36:], "flags 0x1"),
        (HEAD + section(4, b""), "section of type 4"),
        (HEAD + section(9, b""), "section of type 9"),
        (HEAD + section(5, string(b"short")), "5 bytes instead of 32"),
        (HEAD + section(2, string(b"")), "section of type 2"),
        (HEAD + about_certificates(0x20, b"1234567"), "ends before"),
        (HEAD + about_certificates(0x20, uint64(0)), "not a range"),
        (HEAD + about_certificates(0x21, uint64(5) + uint64(4)), "not a range"),
        (HEAD + about_certificates(0x21, uint64(5) + uint64(6) + b"x"), "after the last value"),
        (HEAD + about_certificates(0x22, uint64(1) + string(b"\x01" + bytes(MAX_BITMAP // 8))), "longer than"),
        (HEAD + about_certificates(0x22, uint64(1) + string(b"\x80")), "negative"),
        (HEAD + about_certificates(0x22, uint64(MAX_SERIAL) + string(b"\x02")), "not a range"),
        (HEAD + about_certificates(0x24, b""), "type 0x24"),
        (HEAD + section(255, string(b"new@example") + b"\1" + string(b"")), "section of type 255"),
        (HEAD + b"\1", "ends before"),
    ],
)  # fmt: skip
def test_what_sshd_would_not_load_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadFormat, match=why):
        decode_krl(data)


def test_a_list_whose_bitmaps_would_fill_the_memory_is_refused() -> None:
    bitmap = section(0x22, uint64(1) + string(b"\x55" * (MAX_BITMAP // 8)))
    data = HEAD + section(1, string(b"ca") + string(b"") + bitmap * 70)
    assert len(data) < 150_000
    with pytest.raises(BadFormat, match="more than 500000 ranges"):
        decode_krl(data)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_a_list_or_refused(data: bytes) -> None:
    for start in (b"", HEAD, HEAD + section(1, data)):
        try:
            read = decode_krl(start + data)
        except BadFormat:
            continue
        assert decode_krl(encode_krl(read)) == read
