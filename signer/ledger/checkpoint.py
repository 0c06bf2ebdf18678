"""Checkpoints of a log as signed notes, and cosignatures of witnesses on them: bytes to values and back. Pure.

Formats: c2sp.org/signed-note (Ed25519, type 0x01), c2sp.org/tlog-checkpoint, c2sp.org/tlog-cosignature (Ed25519, type
0x04). Parsers accept only what the renderers here would write, so a note has one form. Whoever signs passes a function
from a message to the 64 bytes of its Ed25519 signature; no private key comes here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from signer.errors import BadNote
from signer.ledger.tree import EMPTY_ROOT, HASH_BYTES, MAX_SIZE
from signer.units import render_duration

NOTE_KIND: Final = 0x01  # Ed25519 over the note's text
COSIGNATURE_KIND: Final = 0x04  # Ed25519 over time and text
MAX_NOTE: Final = 128 * 1024  # bytes; 16 signatures of 5 kB, which a verifier must accept, are 110 kB
MAX_SIGNATURES: Final = 64
MAX_NAME: Final = 255  # bytes of an origin or a key name
MAX_TIME: Final = 2**63 - 1  # seconds since 1970
CLOCK_TOLERANCE: Final = 300  # seconds by which a witness's clock may be ahead
_KEY_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_DASH: Final = "\u2014 "
_CONTROLS: Final = re.compile(r"[\x00-\x09\x0b-\x1f]")
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_KEY_ID: Final = re.compile(r"[0-9a-f]{8}", re.ASCII)

SignFunction = Callable[[bytes], bytes]


# --- keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key that notes are checked with: `name`, `kind` (`NOTE_KIND`, `COSIGNATURE_KIND`), `key` (32 bytes)."""

    name: str
    kind: int
    key: bytes

    @property
    def key_id(self) -> bytes:
        """The four bytes that a signature line names the key by."""
        return sha256(self.name.encode() + b"\n" + bytes([self.kind]) + self.key).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{encode_base64(bytes([self.kind]) + self.key)}"


def parse_vkey(text: str) -> VerifierKey:
    """The key of a line `NAME+ID+BASE64` (signed-note, "Verifier keys"); raises `BadNote` (`vkey_malformed`)."""
    parts = text.split("+", 2)
    if len(parts) != 3 or len(text) > MAX_NAME + 100:
        raise _bad_vkey("it does not have the form NAME+ID+KEY")
    name, key_id, encoded = parts
    if not is_key_name(name):
        raise _bad_vkey("its name is empty, too long, or has a space in it")
    try:
        material = decode_base64(encoded)
    except ValueError:
        raise _bad_vkey("its last part is not base64") from None
    if material[:1] not in (bytes([NOTE_KIND]), bytes([COSIGNATURE_KIND])):
        raise _bad_vkey("it is not an Ed25519 key of a log (type 1) or of a witness (type 4)")
    if len(material) != 1 + _KEY_BYTES:
        raise _bad_vkey(f"its key has {len(material) - 1} bytes instead of {_KEY_BYTES}")
    found = VerifierKey(name, material[0], material[1:])
    if _KEY_ID.fullmatch(key_id) is None or bytes.fromhex(key_id) != found.key_id:
        raise _bad_vkey("its ID is not the one of its name and key")
    return found


def _bad_vkey(why: str) -> BadNote:
    return BadNote("vkey_malformed", f"the verifier key is malformed: {why}", "copy the whole line NAME+ID+KEY")


def is_key_name(name: str) -> bool:
    """True for a name of a key in a note: not empty, at most 255 bytes, without spaces, controls and `+`."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < length <= MAX_NAME and "+" not in name and not any(c.isspace() or c < " " or c == "\x7f" for c in name)


# --- signed notes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line: the name and the ID (4 bytes) of its key, and what that key signed, as it was found."""

    name: str
    key_id: bytes
    data: bytes

    def __str__(self) -> str:
        return f"{_DASH}{self.name} {encode_base64(self.key_id + self.data)}"


@dataclass(frozen=True, slots=True)
class Note:
    """A note as it was parsed, no signature checked. `text` ends with a newline."""

    text: str
    signatures: tuple[Signature, ...]

    def render(self) -> bytes:
        """The note as bytes, which `parse_note` reads back."""
        return "".join((self.text, "\n", *(f"{line}\n" for line in self.signatures))).encode()

    def with_signatures(self, more: Iterable[Signature]) -> Note:
        """The note with more signatures at its end; one of a key that has signed replaces the older one."""
        found = {(line.name, line.key_id): line for line in (*self.signatures, *more)}
        return Note(self.text, tuple(found.values()))


def parse_note(data: bytes) -> Note:
    """The note in `data`, whole; raises `BadNote` (`note_malformed`).

    Refuses what the specification does: other bytes than UTF-8, control characters, anything after the last signature
    line, base64 in another form; and what makes one note two: a second signature of one key, no signature at all.
    """
    if len(data) > MAX_NOTE:
        raise _bad_note(f"it has more than {MAX_NOTE} bytes")
    try:
        whole = data.decode()
    except UnicodeDecodeError:
        raise _bad_note("it is not UTF-8") from None
    if _CONTROLS.search(whole):
        raise _bad_note("it has a control character in it")
    text, blank, block = whole.rpartition("\n\n")
    if not blank or not text:
        raise _bad_note("no empty line separates its text from its signatures")
    return Note(f"{text}\n", parse_signatures(block))


def parse_signatures(block: str) -> tuple[Signature, ...]:
    """The signature lines of a note, as a witness answers with them, too; raises `BadNote` (`note_malformed`)."""
    *lines, rest = block.split("\n")
    if rest or not lines:
        raise _bad_note("it does not end with a signature line")
    if len(lines) > MAX_SIGNATURES:
        raise _bad_note(f"it has {len(lines)} signatures, above the limit of {MAX_SIGNATURES}")
    found = tuple(_parse_signature(line) for line in lines)
    if len({(line.name, line.key_id) for line in found}) < len(found):
        raise _bad_note("it has two signatures of one key")
    return found


def _parse_signature(line: str) -> Signature:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not space or not is_key_name(name):
        raise _bad_note("a signature line does not have the form — NAME SIGNATURE")
    try:
        payload = decode_base64(encoded)
    except ValueError:
        raise _bad_note("a signature is not base64 in its one form") from None
    if len(payload) < 5:
        raise _bad_note("a signature is cut off")
    return Signature(name, payload[:4], payload[4:])


def sign_note(text: str, key: VerifierKey, sign: SignFunction) -> Signature:
    """The signature line of a log's key; `sign` is that of the private half of `key`."""
    return Signature(key.name, key.key_id, sign(text.encode()))


def check_note(note: Note, key: VerifierKey) -> None:
    """Raises `BadNote` unless the log's key signed the note: `note_not_signed`, `note_signature_wrong`."""
    _verify(key, _signature_of(note, key).data, note.text.encode())


def _signature_of(note: Note, key: VerifierKey) -> Signature:
    for line in note.signatures:
        if (line.name, line.key_id) == (key.name, key.key_id):
            return line
    raise BadNote(
        "note_not_signed",
        f"the note has no signature by {key.name} with key ID {key.key_id.hex()}",
        "check that this is the right note, and the right verifier key",
    )


def _verify(key: VerifierKey, signature: bytes, message: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key.key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise _wrong_signature(key) from None


def _wrong_signature(key: VerifierKey) -> BadNote:
    return BadNote(
        "note_signature_wrong",
        f"the signature by {key.name} does not verify",
        "someone changed the note or forged the signature: keep it, and fetch the note again",
    )


def _bad_note(why: str) -> BadNote:
    return BadNote("note_malformed", f"the signed note is malformed: {why}", "take it unchanged from where it is made")


# --- cosignatures -----------------------------------------------------------------------------------------------------


def cosigned_message(text: str, at: int) -> bytes:
    """What a witness signs: `text` of a checkpoint at a time in seconds since 1970 (tlog-cosignature)."""
    return f"cosignature/v1\ntime {at:d}\n{text}".encode()


def cosign(text: str, at: int, key: VerifierKey, sign: SignFunction) -> Signature:
    """The signature line of a witness for a checkpoint's text, at a time in seconds since 1970."""
    return Signature(key.name, key.key_id, at.to_bytes(8) + sign(cosigned_message(text, at)))


def check_cosignature(note: Note, key: VerifierKey) -> int:
    """When the witness's key signed the checkpoint, in seconds since 1970.

    Raises `BadNote`: `note_not_signed`, `note_signature_wrong`. The caller decides how old a cosignature may be.
    """
    data = _signature_of(note, key).data
    at = int.from_bytes(data[:8])
    if len(data) != 8 + _SIGNATURE_BYTES or at > MAX_TIME:
        raise _wrong_signature(key)
    _verify(key, data[8:], cosigned_message(note.text, at))
    return at


# --- checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a log goes: its `origin`, its `size` in entries, and the root over them, 32 bytes.

    `extensions` are further lines, which other people's logs may have; nobody can audit them.
    """

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in (self.origin, self.size, encode_base64(self.root), *self.extensions))


def parse_checkpoint(text: str, *, with_extensions: bool = False) -> Checkpoint:
    """The checkpoint in the text of a note; raises `BadNote` (`checkpoint_malformed`).

    Lines after the third are refused unless `with_extensions`.
    """
    *lines, rest = text.split("\n")
    if rest or len(lines) < 3 or not all(lines):
        raise _bad_checkpoint("its text is not three lines")
    origin, size, root, *extensions = lines
    if extensions and not with_extensions:
        raise _bad_checkpoint(f"its text has {len(lines)} lines instead of three")
    if len(origin.encode()) > MAX_NAME:
        raise _bad_checkpoint(f"its origin has more than {MAX_NAME} bytes")
    try:
        found = Checkpoint(origin, parse_size(size), parse_hash(root), tuple(extensions))
    except ValueError as error:
        raise _bad_checkpoint(str(error)) from None
    if found.size == 0 and found.root != EMPTY_ROOT:
        raise _bad_checkpoint("its root is not that of an empty tree")
    return found


def parse_size(text: str) -> int:
    """A number of leaves in decimal, without leading zeros; raises `ValueError`."""
    if _DECIMAL.fullmatch(text) is None or int(text) > MAX_SIZE:
        raise ValueError("its size is not a whole number in decimal")
    return int(text)


def parse_hash(text: str) -> bytes:
    """The 32 bytes of a hash in base64; raises `ValueError`."""
    try:
        digest = decode_base64(text)
    except ValueError:
        raise ValueError("a hash is not base64 in its one form") from None
    if len(digest) != HASH_BYTES:
        raise ValueError(f"a hash has {len(digest)} bytes instead of {HASH_BYTES}")
    return digest


def _bad_checkpoint(why: str) -> BadNote:
    return BadNote("checkpoint_malformed", f"the checkpoint is malformed: {why}", "take it unchanged from the log")


# --- base64 -----------------------------------------------------------------------------------------------------------


def encode_base64(data: bytes) -> str:
    """RFC 4648 section 4, with padding."""
    return base64.b64encode(data).decode()


def decode_base64(text: str) -> bytes:
    """The bytes of a text that `encode_base64` writes; raises `ValueError` for any other form of them."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise ValueError("it is not base64") from None
    if encode_base64(data) != text:  # bits behind the end that are not 0
        raise ValueError("it is not base64 in its one form")
    return data


# --- saved checkpoints ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Demand:
    """What a saved checkpoint must have: so many cosignatures by `witnesses`, none older than `max_age` seconds."""

    witnesses: tuple[VerifierKey, ...] = ()
    quorum: int = 0
    max_age: int | None = None


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that a ledger's key has signed, and when each witness has cosigned it (seconds since 1970)."""

    checkpoint: Checkpoint
    cosigned: dict[str, int]


def read_saved(
    data: bytes, origins: Sequence[str], keys: Sequence[VerifierKey], demand: Demand, now: int
) -> SavedCheckpoint:
    """The checkpoint in a file, if it is of a log with one of `origins` and has what `demand` asks for.

    `keys` are those of the log under any name. A signature by a known key that does not verify refuses the whole file,
    whoever else has signed it. `audit.verify` compares the root with the events. Raises `BadNote`.
    """
    note = parse_note(data)
    found = parse_checkpoint(note.text)
    if found.origin not in origins:
        raise BadNote(
            "checkpoint_of_another_log",
            f"the checkpoint is one of {found.origin!a}, this ledger is {origins[-1]}",
            "take a checkpoint of this ledger, and the same SIGNER_LEDGER_ORIGIN; if both are right, the ledger was "
            "rewritten from its first event",
        )
    own = [VerifierKey(found.origin, key.kind, key.key) for key in keys]
    signed = {(line.name, line.key_id) for line in note.signatures}
    mine = [key for key in own if (key.name, key.key_id) in signed]
    if not mine:
        raise BadNote(
            "note_not_signed",
            "no key that this ledger has recorded signed the checkpoint",
            "take a checkpoint of this ledger; if it is one, the ledger was rewritten with another key",
        )
    for key in mine:
        check_note(note, key)
    cosigned: dict[str, int] = {}
    for witness in demand.witnesses:
        if (witness.name, witness.key_id) in signed:
            cosigned[str(witness)] = check_cosignature(note, witness)
    _check_demand(cosigned, demand, now)
    return SavedCheckpoint(found, {text.split("+")[0]: at for text, at in cosigned.items()})


def _check_demand(cosigned: dict[str, int], demand: Demand, now: int) -> None:
    possible = [at for at in cosigned.values() if at <= now + CLOCK_TOLERANCE]
    if len(possible) < demand.quorum:
        future = len(cosigned) - len(possible)
        raise BadNote(
            "checkpoint_not_cosigned",
            f"{len(possible)} of {len(demand.witnesses)} witnesses have cosigned the checkpoint, {demand.quorum} must"
            + (f"; {future} did at a time that is still to come" if future else ""),
            "take a newer checkpoint from `signer ledger witness`, or ask the witness why it refused",
        )
    if demand.max_age is None:
        return
    young = [at for at in possible if at >= now - demand.max_age]
    if len(young) < demand.quorum:
        newest = sorted(possible)[-demand.quorum]
        raise BadNote(
            "checkpoint_too_old",
            f"the checkpoint was cosigned {render_duration(max(now - newest, 1))} ago, "
            f"above the limit of {render_duration(demand.max_age)}",
            "take a newer one; if the service offers none, its witness refuses or does not see it",
        )
