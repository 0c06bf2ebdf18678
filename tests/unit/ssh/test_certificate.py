"""Certificates as bytes: what is written reads back, and nothing reads that an encoder would not have written."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from signer.errors import BadFormat
from signer.ssh.certificate import (
    MAX_CERTIFICATE,
    CertificateFields,
    append_signature,
    decode_certificate,
    decode_unsigned,
    encode_unsigned,
)
from signer.ssh.publickey import KEY_PARTS, parse_public_key
from signer.ssh.wire import string
from tests.parts import builders
from tests.parts.keys import KINDS, SK_KINDS, KeyRing, sign_with_ssh_keygen

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def options(values: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[tuple[str, str], ...]]:
    return st.dictionaries(TEXT, values, max_size=5).map(
        lambda found: tuple(sorted(found.items(), key=lambda item: item[0]))
    )


FIELDS = st.builds(
    CertificateFields,
    key_kind=st.shared(st.sampled_from(sorted(KEY_PARTS)), key="kind"),
    key=st.shared(st.sampled_from(sorted(KEY_PARTS)), key="kind").map(
        lambda kind: base64.b64decode(builders.public_line(kind).split()[1])
    ),
    nonce=st.binary(max_size=64),
    serial=st.integers(0, 2**64 - 1),
    cert_type=st.integers(0, 2**32 - 1),
    key_id=TEXT,
    principals=st.lists(TEXT, max_size=8).map(tuple),
    valid_after=st.integers(0, 2**64 - 1),
    valid_before=st.integers(0, 2**64 - 1),
    critical_options=options(TEXT),
    extensions=options(st.just("")),
    ca_key=st.binary(max_size=64),
)


def fields(**changes: Any) -> CertificateFields:
    public = builders.public_key()
    good = CertificateFields(
        key_kind=public.kind,
        key=public.blob,
        nonce=bytes(range(32)),
        serial=4711,
        cert_type=1,
        key_id="deploy-agent:llmops",
        principals=("backup", "llmops"),
        valid_after=1_800_000_000,
        valid_before=1_800_000_900,
        critical_options=(("force-command", "/usr/bin/deploy"), ("verify-required", "")),
        extensions=(("permit-port-forwarding", ""), ("permit-pty", "")),
        ca_key=builders.public_key(name="ca").blob,
    )
    return replace(good, **changes)


@given(FIELDS)
def test_what_is_written_reads_back(wanted: CertificateFields) -> None:
    unsigned = encode_unsigned(wanted)
    assert decode_unsigned(unsigned) == wanted
    assert decode_certificate(append_signature(unsigned, b"signature")) == (wanted, unsigned, b"signature")


@given(st.binary(max_size=200))
@example(encode_unsigned(fields())[:-1])
@example(encode_unsigned(fields()) + b"\0")
def test_no_bytes_raise_anything_but_bad_format(data: bytes) -> None:
    for decode in (decode_unsigned, decode_certificate):
        with pytest.raises(BadFormat):
            decode(data)


@given(st.integers(0, len(encode_unsigned(fields())) - 1), st.integers(1, 255))
def test_what_reads_after_a_byte_was_changed_is_what_those_bytes_say(at: int, flip: int) -> None:
    """No two texts read as the same certificate: else one could be checked and the other one signed."""
    data = bytearray(encode_unsigned(fields()))
    data[at] ^= flip
    try:
        read = decode_unsigned(bytes(data))
    except BadFormat:
        return
    assert read != fields()
    assert encode_unsigned(read) == bytes(data)


@pytest.mark.parametrize("cut", range(1, 400, 7))
def test_a_certificate_that_ends_early_is_refused(cut: int) -> None:
    with pytest.raises(BadFormat):
        decode_unsigned(encode_unsigned(fields())[:-cut])


@pytest.mark.parametrize(
    "changes",
    [
        {"critical_options": (("b", ""), ("a", ""))},
        {"critical_options": (("a", "1"), ("a", "2"))},
        {"extensions": (("permit-pty", ""), ("permit-pty", ""))},
        {"extensions": (("permit-pty", ""), ("permit-X11-forwarding", ""))},
        {"principals": tuple(f"p{number}" for number in range(257))},
    ],
)
def test_options_out_of_order_twice_or_too_many_principals_do_not_read(changes: dict[str, Any]) -> None:
    with pytest.raises(BadFormat):
        decode_unsigned(encode_unsigned(fields(**changes)))


def test_256_principals_read() -> None:
    names = tuple(f"p{number}" for number in range(256))
    assert decode_unsigned(encode_unsigned(fields(principals=names))).principals == names


def test_an_option_has_one_form_only() -> None:
    """A flag is an empty value, not a value that holds an empty string."""
    flag = string(b"verify-required") + string(b"")
    other = string(b"verify-required") + string(string(b""))
    written = encode_unsigned(fields(critical_options=(("verify-required", ""),)))
    assert string(flag) in written
    with pytest.raises(BadFormat, match="empty"):
        decode_unsigned(written.replace(string(flag), string(other)))


def test_an_option_with_a_second_value_is_refused() -> None:
    good, bad = string(b"x") + string(string(b"y")), string(b"x") + string(string(b"y") + string(b"z"))
    written = encode_unsigned(fields(critical_options=(("x", "y"),)))
    with pytest.raises(BadFormat, match="after the last"):
        decode_unsigned(written.replace(string(good), string(bad)))


def test_a_reserved_field_with_something_in_it_is_refused() -> None:
    written = encode_unsigned(fields())
    tail = string(fields().ca_key)
    with pytest.raises(BadFormat, match="reserved"):
        decode_unsigned(written[: -len(tail) - 4] + string(b"x") + tail)


def test_a_certificate_of_a_kind_that_we_do_not_make_is_refused() -> None:
    written = encode_unsigned(fields())
    for kind in (b"ssh-dss-cert-v01@openssh.com", b"ssh-ed25519", b"ssh-rsa-cert-v00@openssh.com", b"\xff"):
        with pytest.raises(BadFormat):
            decode_unsigned(written.replace(string(b"ssh-ed25519-cert-v01@openssh.com"), string(kind)))


def test_a_certificate_of_more_than_a_quarter_megabyte_is_not_read() -> None:
    with pytest.raises(BadFormat, match="at most"):
        decode_certificate(append_signature(encode_unsigned(fields()), b"s" * MAX_CERTIFICATE))


@pytest.mark.parametrize("kind", [*KINDS, *SK_KINDS])
def test_what_ssh_keygen_signs_is_read_and_written_again_byte_for_byte(keyring: KeyRing, kind: str) -> None:
    user, ca = keyring(kind), keyring("ed25519", "ca")
    path = sign_with_ssh_keygen(
        ca,
        user,
        principals=("backup", "llmops"),
        serial=2**63,
        key_id="a key id",
        options=("force-command=/usr/bin/deploy", "source-address=192.0.2.0/24", "no-port-forwarding"),
        name=f"oracle-{kind}",
    )
    blob = base64.b64decode(path.read_text().split()[1])
    read, unsigned, signature = decode_certificate(blob)
    assert encode_unsigned(read) == unsigned
    assert append_signature(unsigned, signature) == blob
    assert read.key == user.blob
    assert read.ca_key == ca.blob
    assert (read.serial, read.key_id, read.principals) == (2**63, "a key id", ("backup", "llmops"))
    assert dict(read.critical_options) == {"force-command": "/usr/bin/deploy", "source-address": "192.0.2.0/24"}
    assert "permit-port-forwarding" not in dict(read.extensions)
    assert dict(read.extensions)["permit-pty"] == ""
    assert parse_public_key(base64.b64encode(read.key).decode()).kind == read.key_kind
