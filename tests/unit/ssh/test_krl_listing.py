"""A listing of `ssh-keygen -Qlf` is compared in full with the list that was meant."""

from __future__ import annotations

import subprocess
from base64 import b64decode
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signer.errors import BadFormat
from signer.ssh.krl import (
    ANY_CA,
    MAX_SERIAL,
    RevocationList,
    check_listing,
    encode_krl,
    merge_ranges,
)
from tests.parts.builders import public_line

CAS = [b64decode(public_line(name=name).split()[1]) for name in ("ca", "other-ca")]
RANGES = st.lists(
    st.builds(lambda first, more: (first, min(first + more, MAX_SERIAL)), st.integers(1, MAX_SERIAL), st.integers(0, 9))
    | st.builds(lambda first, more: (first, first + more), st.integers(1, 300), st.integers(0, 3)),
    max_size=40,
).map(merge_ranges)
LISTS = st.builds(
    RevocationList,
    version=st.integers(0, 2**64 - 1),
    date=st.integers(0, 2**32),
    comment=st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    certificates=st.dictionaries(st.sampled_from([ANY_CA, *CAS]), RANGES),
    sha256=st.frozensets(st.binary(min_size=32, max_size=32), max_size=3),
)


def listing(folder: Path, revoked: RevocationList) -> str:
    path = folder / "krl"
    path.write_bytes(encode_krl(revoked))
    done = subprocess.run(["ssh-keygen", "-Qlf", path], capture_output=True, text=True, check=True)
    return done.stdout


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(meant=LISTS)
def test_what_openssh_shows_of_our_lists_is_what_was_meant(tmp_path: Path, meant: RevocationList) -> None:
    check_listing(listing(tmp_path, meant), meant)


FULL = RevocationList(7, 0, "c", {CAS[0]: ((1, 3), (9, 9)), ANY_CA: ((5, 5),)}, frozenset({sha256(b"k").digest()}))


def test_each_missing_and_each_added_line_is_noticed(tmp_path: Path) -> None:
    shown = listing(tmp_path, FULL)
    check_listing(shown, FULL)
    lines = shown.splitlines()
    said = [number for number, line in enumerate(lines) if line and not line.startswith(("# Generated", "# Comment"))]
    assert len(said) == 7
    for number in said:
        with pytest.raises(BadFormat):
            check_listing("\n".join(lines[:number] + lines[number + 1 :]), FULL)
    for line in (
        "serial: 20",
        "id: x",
        f"# hash SHA1:{'0' * 40}",
        f"hash: SHA256:{'0' * 64}",
        f"# CA key ssh-ed25519 SHA256:{'A' * 43}",
        "x: y",
    ):
        with pytest.raises(BadFormat):
            check_listing(f"{shown}{line}\n", FULL)
