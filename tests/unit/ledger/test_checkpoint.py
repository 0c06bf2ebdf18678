"""Signed notes, checkpoints and cosignatures: the examples of c2sp.org, and every form that is not the one form."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadNote
from signer.ledger.checkpoint import (
    COSIGNATURE_KIND,
    MAX_NAME,
    MAX_NOTE,
    MAX_SIGNATURES,
    MAX_TIME,
    NOTE_KIND,
    Checkpoint,
    Note,
    Signature,
    VerifierKey,
    check_cosignature,
    check_note,
    cosign,
    cosigned_message,
    decode_base64,
    encode_base64,
    parse_checkpoint,
    parse_note,
    parse_signatures,
    parse_vkey,
    sign_note,
)
from signer.ledger.tree import EMPTY_ROOT, MAX_SIZE

# c2sp.org/signed-note, "Verifier keys", and golang.org/x/mod/sumdb/note, which the format comes from.
FOO = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
FOO_NOTE = (
    "This is an example message.\n\n— example.com/foo"
    " Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)
NEUMANN = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
NEUMANN_NOTE = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
# c2sp.org/tlog-cosignature, whose example says when it was cosigned: 1679315147. Nobody has its keys.
COSIGNED = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa"
    " Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "— witness.example.com/w1"
    " jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)
# c2sp.org/tlog-witness: two keys with one name sign a checkpoint; a witness's answer, of two more.
TWICE = (
    "— example.com/behind-the-sofa"
    " Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "— example.com/behind-the-sofa"
    " opLqBQsREYCgu6xQkYQwJr9fo45a62DN9EdmHXnZdXNqlcVGlCum2Wks+49/V6267UEjw6QUXTS5Rovnzv++qbSzm9Q=\n"
)
# c2sp.org/signed-note: a note whose text has an empty line in it.
POEM = (
    "Ognuno sta solo sul cuor della terra\ntrafitto da un raggio di sole:\n\ned è subito sera.\n\n"
    "— quasimodo.example/salvatore"
    " NnugSzTjtVAewIS+Z/iJhUPeFDkO/5QQ2i5ddnGITLlC+EhfLW9oJKONrMouFSQU0xMcXxj99ihAQwaqP3ZekRwNtIc=\n"
)

LOG = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WITNESS = Ed25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
LOG_KEY = VerifierKey("signer.example.org/ledger", NOTE_KIND, LOG.public_key().public_bytes_raw())
WITNESS_KEY = VerifierKey("witness.example.org/w1", COSIGNATURE_KIND, WITNESS.public_key().public_bytes_raw())
CHECKPOINT = Checkpoint("signer.example.org/ledger", 4711, bytes(range(100, 132)))
AT = 1_800_000_000


@pytest.fixture
def note() -> Note:
    """A checkpoint that the log and a witness signed."""
    text = CHECKPOINT.text
    return Note(text, (sign_note(text, LOG_KEY, LOG.sign), cosign(text, AT, WITNESS_KEY, WITNESS.sign)))


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(BadNote) as caught:
        action()
    return caught.value.code


# --- examples of the specifications -------------------------------------------------------------------------------


@pytest.mark.parametrize("vkey, text", [(FOO, FOO_NOTE), (NEUMANN, NEUMANN_NOTE)])
def test_signed_notes_of_the_specification_verify(vkey: str, text: str) -> None:
    key, note = parse_vkey(vkey), parse_note(text.encode())
    assert str(key) == vkey
    assert note.render() == text.encode()
    check_note(note, key)
    changed = parse_note(text.replace("is", "is not", 1).encode())
    assert code_of(lambda: check_note(changed, key)) == "note_signature_wrong"


@pytest.mark.parametrize(
    "vkey",
    [
        "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8",
        "fake.log.origin/log+527eabb8+AddT9PtBhhNAsDYZ0V0euiRbXuvrLsw4L6vKARfipnmz",
        "test-witness+26349ef0+BIQDFTUlktisMqJzWn8qhteWrRr4dLcQ9R37T+8LQyQF",
    ],
)
def test_verifier_keys_of_other_programs_have_the_id_that_they_say(vkey: str) -> None:
    key = parse_vkey(vkey)
    assert str(key) == vkey
    assert key.kind == (COSIGNATURE_KIND if "witness" in vkey else NOTE_KIND)


def test_the_checkpoint_of_the_specification_is_read_with_its_cosignature() -> None:
    note = parse_note(COSIGNED.encode())
    assert note.render() == COSIGNED.encode()
    found = parse_checkpoint(note.text)
    assert (found.origin, found.size) == ("example.com/behind-the-sofa", 20_852_163)
    assert found.text == note.text
    log, witness = note.signatures
    assert log.key_id == bytes.fromhex("033de0ae")
    assert (witness.name, len(witness.data), int.from_bytes(witness.data[:8])) == (
        "witness.example.com/w1",
        72,
        1_679_315_147,
    )
    assert cosigned_message(note.text, 1_679_315_147) == (
        b"cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n20852163\n"
        b"CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    )


def test_two_keys_with_one_name_and_an_empty_line_in_the_text_are_no_fault() -> None:
    assert len(parse_signatures(TWICE)) == 2
    note = parse_note(POEM.encode())
    assert note.text.endswith("\n\ned è subito sera.\n")
    assert note.render() == POEM.encode()


# --- signatures ---------------------------------------------------------------------------------------------------


def test_what_is_signed_verifies_after_a_round_trip(note: Note) -> None:
    read = parse_note(note.render())
    assert read == note
    check_note(read, LOG_KEY)
    assert check_cosignature(read, WITNESS_KEY) == AT
    assert parse_checkpoint(read.text) == CHECKPOINT


def test_another_key_name_or_kind_has_not_signed(note: Note) -> None:
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    for key in (
        replace(LOG_KEY, key=other),
        replace(LOG_KEY, name="signer.example.org/other"),
        replace(LOG_KEY, kind=COSIGNATURE_KIND),
    ):
        assert code_of(lambda key=key: check_note(note, key)) == "note_not_signed"  # type: ignore[misc]
    assert code_of(lambda: check_cosignature(note, replace(WITNESS_KEY, kind=NOTE_KIND))) == "note_not_signed"
    assert code_of(lambda: check_cosignature(Note(note.text, ()), WITNESS_KEY)) == "note_not_signed"


def test_every_changed_field_makes_both_signatures_wrong(note: Note) -> None:
    for changed in (
        replace(CHECKPOINT, origin="signer.example.org/ledges"),
        replace(CHECKPOINT, size=4712),
        replace(CHECKPOINT, root=bytes(32)),
        replace(CHECKPOINT, extensions=("more",)),
    ):
        bent = Note(changed.text, note.signatures)
        assert code_of(lambda bent=bent: check_note(bent, LOG_KEY)) == "note_signature_wrong"  # type: ignore[misc]
        assert code_of(lambda bent=bent: check_cosignature(bent, WITNESS_KEY)) == "note_signature_wrong"  # type: ignore[misc]


def test_a_cosignature_of_another_time_or_length_is_wrong(note: Note) -> None:
    good = note.signatures[1]
    for data in (
        (AT + 1).to_bytes(8) + good.data[8:],
        (MAX_TIME + 1).to_bytes(8) + WITNESS.sign(cosigned_message(note.text, MAX_TIME + 1)),
        good.data[:-1],
        good.data + b"\0",
        good.data[8:],
        good.data[:1],
    ):
        bent = Note(note.text, (replace(good, data=data),))
        assert code_of(lambda bent=bent: check_cosignature(bent, WITNESS_KEY)) == "note_signature_wrong"  # type: ignore[misc]


def test_a_log_s_signature_is_never_taken_for_a_witness_s(note: Note) -> None:
    """The header line of cosigned messages keeps one apart from the other, even by one key with one name."""
    both = replace(LOG_KEY, kind=COSIGNATURE_KIND)
    moved = Note(note.text, (Signature(both.name, both.key_id, AT.to_bytes(8) + note.signatures[0].data),))
    assert code_of(lambda: check_cosignature(moved, both)) == "note_signature_wrong"


def test_a_newer_signature_of_a_key_replaces_the_older_one(note: Note) -> None:
    newer = cosign(note.text, AT + 60, WITNESS_KEY, WITNESS.sign)
    found = note.with_signatures([newer])
    assert len(found.signatures) == 2
    assert check_cosignature(parse_note(found.render()), WITNESS_KEY) == AT + 60


# --- what is refused ----------------------------------------------------------------------------------------------

ROOT = encode_base64(CHECKPOINT.root)
LINE = str(sign_note(CHECKPOINT.text, LOG_KEY, LOG.sign))


def _payload(length: int) -> str:
    return encode_base64(bytes(length))


@pytest.mark.parametrize(
    "data",
    [
        "",
        "\n",
        "\n\n",
        CHECKPOINT.text,
        f"{CHECKPOINT.text}\n",  # no signature
        f"{CHECKPOINT.text}{LINE}\n",  # no empty line
        f"\n{LINE}\n",  # no text
        f"{CHECKPOINT.text}\n{LINE}",  # cut off
        f"{CHECKPOINT.text}\n{LINE}\n\n",  # a trailing line
        f"{CHECKPOINT.text}\n{LINE}\nmore\n",
        f"{CHECKPOINT.text}\n{LINE}\n ",
        f"{CHECKPOINT.text}\n{LINE}\n{LINE}\n",  # two signatures of one key
        f"{CHECKPOINT.text}\n{LINE}\n{LINE[:-8]}AAAAAAA=\n",
        f"{CHECKPOINT.text}\n{LINE} \n",
        f"{CHECKPOINT.text}\n{LINE} more\n",
        f"{CHECKPOINT.text}\n {LINE}\n",
        f"{CHECKPOINT.text}\n{LINE.replace('—', '-')}\n",
        f"{CHECKPOINT.text}\n{LINE.replace('— ', '—')}\n",
        f"{CHECKPOINT.text}\n{LINE}\r\n",
        f"{CHECKPOINT.text}\n{LINE}\n".replace("\n", "\r\n"),
        f"\ufeff{CHECKPOINT.text}\n— \u00a0a {_payload(68)}\n",
        f"{CHECKPOINT.text}\n— a+b {_payload(68)}\n",
        f"{CHECKPOINT.text}\n—  {_payload(68)}\n",
        f"{CHECKPOINT.text}\n— a\u2003b {_payload(68)}\n",
        f"{CHECKPOINT.text}\n— {'a' * (MAX_NAME + 1)} {_payload(68)}\n",
        f"{CHECKPOINT.text}\n— a {_payload(4)}\n",
        f"{CHECKPOINT.text}\n— a \n",
        f"{CHECKPOINT.text}\n— a {_payload(68).rstrip('=')}\n",  # base64 in another form
        f"{CHECKPOINT.text}\n— a {_payload(67)[:-1]}B\n",
        f"{CHECKPOINT.text}\n— a {_payload(68)[:-2]}B=\n",
        f"{CHECKPOINT.text}\n— a {_payload(67)}=\n",
        f"{CHECKPOINT.text}\n— a {_payload(66)[:-4]}-_==\n",
        f"{CHECKPOINT.text}\n— a {_payload(33)} {_payload(33)}\n",
        f"{CHECKPOINT.text}\n— a ä{_payload(68)}\n",
        f"a\x00b\n\n{LINE}\n",
        f"a\tb\n\n{LINE}\n",
        f"a\x1bb\n\n{LINE}\n",
        "a\n\n" + "".join(f"— {number} {_payload(68)}\n" for number in range(MAX_SIGNATURES + 1)),
    ],
)
def test_a_note_in_any_other_form_is_refused(data: str) -> None:
    assert code_of(lambda: parse_note(data.encode())) == "note_malformed"


def test_bytes_that_are_not_utf_8_and_too_many_of_them_are_refused() -> None:
    for data in (b"\xff\n\n" + LINE.encode() + b"\n", b"\xed\xa0\x80\n\n" + LINE.encode() + b"\n"):
        assert code_of(lambda data=data: parse_note(data)) == "note_malformed"  # type: ignore[misc]
    whole = f"{'a' * (MAX_NOTE - len(LINE.encode()) - 3)}\n\n{LINE}\n".encode()
    assert len(whole) == MAX_NOTE
    assert parse_note(whole).render() == whole
    assert code_of(lambda: parse_note(b"a" + whole)) == "note_malformed"


def test_as_many_signatures_as_a_verifier_must_accept_are_accepted() -> None:
    """c2sp.org/signed-note: at least 16, and one after quantum computers has up to nearly 5 kB."""
    block = "".join(f"— witness.example/{number} {_payload(4 + 8 + 4_900)}\n" for number in range(16))
    assert len(parse_note(f"{CHECKPOINT.text}\n{block}".encode()).signatures) == 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "a\n1\n",
        f"a\n1\n{ROOT}",
        f"\n1\n{ROOT}\n",
        f"a\n\n{ROOT}\n",
        f"a\n1\n{ROOT}\n\n",
        f"a\n1\n{ROOT}\nmore\n",  # a trailing line
        f"a\n01\n{ROOT}\n",
        f"a\n+1\n{ROOT}\n",
        f"a\n-1\n{ROOT}\n",
        f"a\n 1\n{ROOT}\n",
        f"a\n1 \n{ROOT}\n",
        f"a\n1_0\n{ROOT}\n",
        f"a\n٣\n{ROOT}\n",
        f"a\n1.0\n{ROOT}\n",
        f"a\n{MAX_SIZE + 1}\n{ROOT}\n",
        f"a\n{'9' * 5_000}\n{ROOT}\n",
        f"a\n0\n{ROOT}\n",  # not the root of an empty tree
        f"a\n1\n{ROOT[:-1]}\n",
        f"a\n1\n{ROOT[:-2]}/=\n",
        f"a\n1\n{_payload(31)}\n",
        f"a\n1\n{_payload(33)}\n",
        f"a\n1\n{CHECKPOINT.root.hex()}\n",
        f"{'a' * (MAX_NAME + 1)}\n1\n{ROOT}\n",
    ],
)
def test_a_checkpoint_in_any_other_form_is_refused(text: str) -> None:
    assert code_of(lambda: parse_checkpoint(text)) == "checkpoint_malformed"


def test_lines_that_another_log_adds_are_read_on_request() -> None:
    text = f"{CHECKPOINT.text}more\nand more\n"
    found = parse_checkpoint(text, with_extensions=True)
    assert found == replace(CHECKPOINT, extensions=("more", "and more"))
    assert found.text == text
    assert code_of(lambda: parse_checkpoint(f"{text}\n", with_extensions=True)) == "checkpoint_malformed"


def test_the_largest_and_the_empty_tree_are_read() -> None:
    for one in (replace(CHECKPOINT, size=MAX_SIZE), Checkpoint("a", 0, EMPTY_ROOT)):
        assert parse_checkpoint(one.text) == one


@pytest.mark.parametrize(
    "vkey",
    [
        "",
        "a",
        FOO[:-1],
        FOO + "A",
        FOO.replace("530d903a", "530d903b"),
        FOO.replace("530d903a", "530D903A"),
        FOO.replace("530d903a", "30d903a"),
        FOO.replace("example.com/foo", ""),
        FOO.replace("example.com/foo", "example.com /foo"),
        FOO.replace("example.com/foo", "example.com/bar"),
        f"{FOO}\n",
        f" {FOO}",
        f"{'a' * 400}+{FOO}",
        "\ud800+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
        "a+00000000+",
        "a+00000000+" + encode_base64(b"\x01" + bytes(31)),
        "a+00000000+" + encode_base64(b"\x02" + bytes(32)),
        "a+00000000+" + encode_base64(b"\x06" + bytes(1312)),
        NEUMANN.replace("TW", "T+"),
    ],
)
def test_a_verifier_key_in_any_other_form_is_refused(vkey: str) -> None:
    assert code_of(lambda: parse_vkey(vkey)) == "vkey_malformed"


@given(st.binary(max_size=300))
def test_no_bytes_of_a_stranger_do_more_than_be_refused(data: bytes) -> None:
    for action in (
        lambda: parse_note(data).render(),
        lambda: parse_note(CHECKPOINT.text.encode() + b"\n" + data).render(),
        lambda: parse_checkpoint(data.decode("latin-1")),
        lambda: parse_vkey(data.decode("latin-1")),
    ):
        try:
            found = action()
        except BadNote:
            continue
        if isinstance(found, bytes):
            assert found in (data, CHECKPOINT.text.encode() + b"\n" + data)


@given(st.text(max_size=40), st.integers(1, MAX_SIZE), st.binary(min_size=32, max_size=32))
def test_a_checkpoint_that_is_read_is_written_as_it_was(origin: str, size: int, root: bytes) -> None:
    text = Checkpoint(origin, size, root).text
    try:
        found = parse_checkpoint(text)
    except BadNote:
        assert not origin or "\n" in origin
        return
    assert found.text == text


@given(st.binary(max_size=80))
def test_base64_has_one_form(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    assert decode_base64(text) == data
    for other in (text + "=", text + "\n", " " + text, text.rstrip("=") + "==="):
        if other != text:
            with pytest.raises(ValueError, match="base64"):
                decode_base64(other)
