"""Does an SSH signature verify? Held against signatures of another hand, and against every way to spoil one."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadFormat
from signer.ssh.sshsig import check_signature
from signer.ssh.wire import Reader, mpint, string
from tests.parts.fake_vault import ForeignCa

KINDS = ("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256")
DATA = b"what is signed"


@cache
def ca_of(kind: str) -> ForeignCa:
    return ForeignCa(kind)


def is_good(key: bytes, data: bytes, signature: bytes) -> bool:
    try:
        check_signature(key, data, signature)
    except BadFormat:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_of_the_key_over_the_data_is_good(kind: str) -> None:
    ca = ca_of(kind)
    assert is_good(ca.blob, DATA, ca.sign(DATA))


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_or_another_key_is_not(kind: str) -> None:
    ca, other = ca_of(kind), ForeignCa(kind, "other")
    assert not is_good(ca.blob, DATA + b".", ca.sign(DATA))
    assert not is_good(other.blob, DATA, ca.sign(DATA))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_anywhere_in_the_signature_spoils_it(kind: str) -> None:
    ca = ca_of(kind)
    signature = ca.sign(DATA)
    for at in range(len(signature)):
        spoiled = bytearray(signature)
        spoiled[at] ^= 1
        assert not is_good(ca.blob, DATA, bytes(spoiled)), at


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_with_something_after_it_or_cut_short_is_refused(kind: str) -> None:
    ca = ca_of(kind)
    signature = ca.sign(DATA)
    assert not is_good(ca.blob, DATA, signature + b"\0")
    for end in range(len(signature)):
        assert not is_good(ca.blob, DATA, signature[:end]), end


def test_rsa_signs_with_sha2_and_never_with_sha1() -> None:
    ca = ForeignCa("ssh-rsa")
    for algorithm, good in (("rsa-sha2-256", True), ("rsa-sha2-512", True), ("ssh-rsa", False)):
        ca.algorithm = algorithm
        assert is_good(ca.blob, DATA, ca.sign(DATA)) is good


def test_a_signature_under_the_name_of_another_algorithm_is_refused() -> None:
    for ca in map(ca_of, KINDS):
        raw = ca.sign(DATA)[len(string(ca.algorithm.encode())) :]
        for name in ("ssh-ed25519", "rsa-sha2-256", "rsa-sha2-512", "ecdsa-sha2-nistp256", "ssh-dss", ""):
            if name != ca.algorithm:
                assert not is_good(ca.blob, DATA, string(name.encode()) + raw), (ca.kind, name)


def test_a_key_of_a_kind_that_no_ca_has_is_refused() -> None:
    signature = ca_of("ssh-ed25519").sign(DATA)
    for kind in (b"ssh-dss", b"sk-ssh-ed25519@openssh.com", b"", b"\xff"):
        assert not is_good(string(kind) + string(b"x" * 32), DATA, signature)


def test_numbers_that_are_no_key_are_refused() -> None:
    blob = string(b"ssh-rsa") + mpint(0) + mpint(0)
    assert not is_good(blob, DATA, ca_of("ssh-rsa").sign(DATA))
    point = string(b"ecdsa-sha2-nistp256") + string(b"nistp256") + string(b"\x04" + b"\0" * 64)
    assert not is_good(point, DATA, ca_of("ecdsa-sha2-nistp256").sign(DATA))


@given(key=st.binary(max_size=200), signature=st.binary(max_size=200))
def test_nothing_else_comes_of_any_bytes(key: bytes, signature: bytes) -> None:
    assert not is_good(key, DATA, signature)


@given(rest=st.binary(max_size=120), kind=st.sampled_from(KINDS), signature=st.binary(max_size=120))
def test_nothing_else_comes_of_bytes_with_the_right_names(rest: bytes, kind: str, signature: bytes) -> None:
    name = string(ca_of(kind).algorithm.encode())
    assert not is_good(string(kind.encode()) + rest, DATA, name + signature)
    assert not is_good(ca_of(kind).blob, DATA, name + signature)


def test_something_after_the_numbers_of_an_ecdsa_signature_is_refused() -> None:
    """sshd refuses it, too; a certificate with it would be of no use."""
    ca = ca_of("ecdsa-sha2-nistp256")
    reader = Reader(ca.sign(DATA))
    name, numbers = reader.string(), reader.string()
    assert is_good(ca.blob, DATA, string(name) + string(numbers))
    assert not is_good(ca.blob, DATA, string(name) + string(numbers + b"\0"))
