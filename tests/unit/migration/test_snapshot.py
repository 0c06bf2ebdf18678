"""A snapshot is taken only if it is whole: every sum in it agrees, and nothing else is in it. No half file stays."""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import tarfile
import zlib
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import SignerError
from signer.migration.decommission import snapshot as subject
from signer.migration.decommission.snapshot import (
    BadSnapshot,
    Origin,
    check_origin,
    check_snapshot,
    copy_snapshot,
    store_snapshot,
)

STATE = b"logical/8a351c82-914c-50d3-64f0-d9b0b6e23e10/config/ca" + b"encrypted by Vault " * 100
SSH = "8a351c82-914c-50d3-64f0-d9b0b6e23e10"
SERVERS = b'{"Servers":[{"Suffrage":0,"ID":"one","Address":"10.0.0.1:8201"}]}'
META = b'{"Version":1,"ID":"bolt-snapshot","Index":53,"Term":3,"Peers":null,"Configuration":%s,"Size":%d}' % (
    SERVERS,
    len(STATE),
)
OURS = Origin(frozenset({("one", "10.0.0.1:8201")}), 53, SSH)


def sums_of(files: dict[str, bytes]) -> bytes:
    return "".join(f"{sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


FILES = {"meta.json": META, "state.bin": STATE}
WHOLE = {**FILES, "SHA256SUMS": sums_of(FILES), "SHA256SUMS.sealed": b"\x0a\xb4\x01sealed"}


def tarred(files: list[tuple[str, bytes]], *, kind: bytes = tarfile.REGTYPE, form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    return gzip.compress(tarred(list(files.items())))


GOOD = packed(WHOLE)


def checked(folder: Path, content: bytes, expected: str = "", *, must_be_raft: bool = True) -> subject.Snapshot:
    path = folder / "given.snap"
    path.write_bytes(content)
    return check_snapshot(path, expected, must_be_raft=must_be_raft)


def refused(folder: Path, content: bytes, expected: str = "", *, must_be_raft: bool = True) -> str:
    with pytest.raises(BadSnapshot) as error:
        checked(folder, content, expected, must_be_raft=must_be_raft)
    return error.value.code


def test_a_whole_one_is_taken(tmp_path: Path) -> None:
    found = checked(tmp_path, GOOD, sha256(GOOD).hexdigest())
    assert (found.size, found.index, found.sha256) == (len(GOOD), 53, sha256(GOOD).hexdigest())
    assert found.as_json()["inner_checksums"] == "every inner checksum matches"


def test_one_without_sealed_sums_is_taken(tmp_path: Path) -> None:
    assert (
        checked(tmp_path, packed({name: WHOLE[name] for name in ("meta.json", "state.bin", "SHA256SUMS")})).index == 53
    )


def test_one_of_another_checksum_is_not(tmp_path: Path) -> None:
    assert refused(tmp_path, GOOD, "0" * 64) == "snapshot_differs"


EDITED = {
    "state": {**WHOLE, "state.bin": STATE[:-1] + b"!"},
    "meta": {**WHOLE, "meta.json": META.replace(b"53", b"54")},
    "sums": {**WHOLE, "SHA256SUMS": WHOLE["SHA256SUMS"].replace(b"  state.bin", b"  other.bin")},
    "sums twice": {**WHOLE, "SHA256SUMS": WHOLE["SHA256SUMS"] * 2},
    "no sums": FILES,
    "no state": {name: content for name, content in WHOLE.items() if name != "state.bin"},
    "half of the sums": {**WHOLE, "SHA256SUMS": WHOLE["SHA256SUMS"].splitlines(keepends=True)[0]},
    "meta of another state": {**FILES, "meta.json": META.replace(b'"Size":', b'"Size":1')},
    "meta that is no JSON": {**FILES, "meta.json": b"{"},
    "meta that is a list": {**FILES, "meta.json": b"[" * 5000},
}


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_one_is_damaged(tmp_path: Path, what: str) -> None:
    files = EDITED[what]
    if what.startswith("meta "):  # its own sum agrees; what it says does not
        files = {**files, "SHA256SUMS": sums_of(files)}
    assert refused(tmp_path, packed(files)) == "snapshot_damaged"


@pytest.mark.parametrize("size", [0, 5, 30, len(GOOD) // 2, len(GOOD) - 9, len(GOOD) - 1])
def test_one_that_ends_too_early_is_truncated(tmp_path: Path, size: int) -> None:
    assert refused(tmp_path, GOOD[:size]) == "snapshot_truncated"


def test_a_tar_that_ends_too_early_is_truncated(tmp_path: Path) -> None:
    whole = tarred(list(WHOLE.items()))
    assert refused(tmp_path, gzip.compress(whole[:4096])) == "snapshot_truncated"


OTHERS = {
    "text": b"not a snapshot at all" * 99,
    "a tar": tarred(list(WHOLE.items())),
    "packed text": gzip.compress(b"x" * 5000),
    "another file in it": packed({**WHOLE, "../../etc/passwd": b"x"}),
    "links": gzip.compress(tarred([("state.bin", b"")], kind=tarfile.SYMTYPE)),
    "pax": gzip.compress(tarred([("state.bin" + "x" * 200, b"")], form=tarfile.PAX_FORMAT)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_file_is_of_another_form(tmp_path: Path, what: str) -> None:
    assert refused(tmp_path, OTHERS[what]) == "snapshot_of_another_form"


@pytest.mark.parametrize(
    "after", [b"x", b"\0" * 5000 + b"x", gzip.compress(b"more", mtime=0)], ids=["x", "far", "gzip"]
)
def test_what_follows_the_end_is_damage(tmp_path: Path, after: bytes) -> None:
    assert refused(tmp_path, GOOD + after) == "snapshot_damaged"
    assert refused(tmp_path, gzip.compress(tarred(list(WHOLE.items())) + after)) == "snapshot_damaged"


def test_a_file_twice_is_damage(tmp_path: Path) -> None:
    assert refused(tmp_path, gzip.compress(tarred([*WHOLE.items(), ("state.bin", STATE)]))) == "snapshot_damaged"


def test_a_size_that_is_none_is_damage(tmp_path: Path) -> None:
    header = bytearray(tarred([("SHA256SUMS", b"")])[:512])
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert refused(tmp_path, gzip.compress(bytes(header) + bytes(1024))) == "snapshot_damaged"


def test_a_bomb_of_small_files_is_not_unpacked(tmp_path: Path) -> None:
    assert refused(tmp_path, packed({**WHOLE, "SHA256SUMS": b"0" * (subject.MAX_SMALL + 1)})) == "snapshot_damaged"


@given(place=st.integers(0, len(GOOD) - 1), flip=st.integers(1, 255))
def test_one_changed_byte_is_found_or_changes_nothing_inside(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    """The header of gzip has a time, and deflate has bits, that change nothing of what is unpacked."""
    edited = bytearray(GOOD)
    edited[place] ^= flip
    folder = tmp_path_factory.mktemp("snapshot")
    if _unpacked(bytes(edited)) == _unpacked(GOOD):
        assert checked(folder, bytes(edited)).index == 53
    else:
        assert refused(folder, bytes(edited)).startswith("snapshot_")


def _unpacked(content: bytes) -> bytes | None:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return None


@given(st.binary(max_size=600))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("snapshot")
    assert refused(folder, content).startswith("snapshot_")
    assert refused(folder, gzip.compress(content)).startswith("snapshot_")


@pytest.mark.parametrize("how", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_unreadable(tmp_path: Path, how: str) -> None:
    path = tmp_path / "given"
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    with pytest.raises(BadSnapshot) as error:
        check_snapshot(path)
    assert error.value.code == "snapshot_unreadable"


# --- another storage's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", OTHERS)
def test_of_another_storage_the_operators_checksum_vouches(tmp_path: Path, what: str) -> None:
    content = OTHERS[what]
    found = checked(tmp_path, content, sha256(content).hexdigest(), must_be_raft=False)
    assert (found.index, found.as_json()["inner_checksums"]) == (None, "no inner checksums: not a raft snapshot")
    assert refused(tmp_path, content, "0" * 64, must_be_raft=False) == "snapshot_differs"


def test_a_damaged_raft_snapshot_is_refused_whatever_the_storage(tmp_path: Path) -> None:
    edited = packed(EDITED["state"])
    assert refused(tmp_path, edited, sha256(edited).hexdigest(), must_be_raft=False) == "snapshot_damaged"


# --- whose it is, and of when ----------------------------------------------------------------------------------------

OTHER_VAULTS = {
    "another node": (replace(OURS, servers=frozenset({("two", "10.0.0.1:8201")})), "snapshot_of_another_vault"),
    "another address": (replace(OURS, servers=frozenset({("one", "10.0.0.2:8201")})), "snapshot_of_another_vault"),
    "one node more": (replace(OURS, servers=OURS.servers | {("two", "b:8201")}), "snapshot_of_another_vault"),
    "no raft": (replace(OURS, servers=frozenset()), "snapshot_of_another_vault"),
    "another mount": (replace(OURS, mount=SSH.replace("8", "9")), "snapshot_of_another_vault"),
    "no mount": (replace(OURS, mount=""), "snapshot_of_another_vault"),
    "written since": (replace(OURS, index=54), "snapshot_old"),
}


@pytest.mark.parametrize("what", OTHER_VAULTS)
def test_audit_5_a_whole_snapshot_of_another_vault_or_another_day_is_refused(tmp_path: Path, what: str) -> None:
    origin, code = OTHER_VAULTS[what]
    found = checked(tmp_path, GOOD)
    check_origin(found, OURS)
    for refusing in (
        lambda: check_origin(found, origin),
        lambda: store_snapshot(GOOD, tmp_path / "run.snap", origin),
        lambda: copy_snapshot(tmp_path / "given.snap", tmp_path / "run.snap", "", origin, 0, must_be_raft=True),
    ):
        with pytest.raises(BadSnapshot) as error:
            refusing()
        assert error.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["given.snap"]


def test_audit_5_a_mount_is_found_wherever_it_stands_in_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "_PIECE", 64)
    for at in range(130):
        state = b"." * at + STATE
        files = {"state.bin": state, "meta.json": META.replace(b'"Size":%d' % len(STATE), b'"Size":%d' % len(state))}
        assert checked(tmp_path, packed({**files, "SHA256SUMS": sums_of(files)})).mounts == {SSH}, at


def test_audit_5_the_operators_file_of_another_storage_is_not_older_than_the_cutover(tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_bytes(b"a database dump")
    os.utime(path, (1000, 1000))
    expected = sha256(b"a database dump").hexdigest()
    none = Origin(frozenset(), 0, SSH)
    assert copy_snapshot(path, tmp_path / "run.snap", expected, none, 1000, must_be_raft=False).index is None
    for act in (
        lambda: check_origin(check_snapshot(path, expected, must_be_raft=False), none, 1001),
        lambda: copy_snapshot(path, tmp_path / "other.snap", expected, none, 1001, must_be_raft=False),
    ):
        with pytest.raises(BadSnapshot) as error:
            act()
        assert error.value.code == "snapshot_old"


# --- storing ---------------------------------------------------------------------------------------------------------


def test_a_stored_one_is_there_for_its_owner_alone(tmp_path: Path) -> None:
    target = tmp_path / "snapshots" / "run.snap"
    before = os.umask(0)
    try:
        assert store_snapshot(GOOD, target, OURS).index == 53
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert stat.S_IMODE(target.parent.stat().st_mode) == 0o700
    assert target.read_bytes() == GOOD
    assert [path.name for path in target.parent.iterdir()] == ["run.snap"]


def test_a_damaged_one_is_not_stored(tmp_path: Path) -> None:
    target = tmp_path / "snapshots" / "run.snap"
    with pytest.raises(BadSnapshot):
        store_snapshot(GOOD[:-9], target, OURS)
    assert list(target.parent.iterdir()) == []


def test_a_stored_one_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "run.snap"
    target.write_bytes(b"of before")
    with pytest.raises(SignerError) as error:
        store_snapshot(GOOD, target, OURS)
    assert error.value.code == "snapshot_unwritable"
    assert target.read_bytes() == b"of before"


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".run.snap.part").write_bytes(GOOD[:99])
    assert store_snapshot(GOOD, tmp_path / "run.snap", OURS).index == 53
    assert [path.name for path in tmp_path.iterdir()] == ["run.snap"]


def test_a_copy_is_the_operators_file_or_none(tmp_path: Path) -> None:
    given_file, target = tmp_path / "given.snap", tmp_path / "snapshots" / "run.snap"
    given_file.write_bytes(GOOD)
    assert copy_snapshot(given_file, target, sha256(GOOD).hexdigest(), OURS, 0, must_be_raft=True).index == 53
    assert target.read_bytes() == GOOD
    with pytest.raises(BadSnapshot) as error:
        copy_snapshot(given_file, tmp_path / "other.snap", "0" * 64, OURS, 0, must_be_raft=True)
    assert error.value.code == "snapshot_differs"
    assert not (tmp_path / "other.snap").exists()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        del descriptor
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SignerError) as error:
        store_snapshot(GOOD, tmp_path / "run.snap", OURS)
    assert error.value.code == "snapshot_unwritable"
    assert error.value.hint == "free disk space for the evidence directory, then apply the same plan again"
    assert list(tmp_path.iterdir()) == []
