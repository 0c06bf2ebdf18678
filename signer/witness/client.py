"""Asks a witness to cosign a log's newest checkpoint (c2sp.org/tlog-witness, the log's side). Knows no HTTP library.

A witness may lie, be behind, be ahead or know another history: what it answers is compared with the log itself, and a
cosignature counts only if it verifies by the witness's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from signer.errors import BadNote, BadProof, SignerError, Unavailable
from signer.ledger.checkpoint import (
    Checkpoint,
    Note,
    Signature,
    VerifierKey,
    check_cosignature,
    encode_base64,
    parse_checkpoint,
    parse_note,
    parse_signatures,
    parse_size,
)
from signer.ledger.tree import check_consistency
from signer.units import plain
from signer.witness.state import Log

TRIES: Final = 4  # requests to one witness in one round: its size may change while it is asked
MAX_ANSWER: Final = 128 * 1024  # bytes
CLOCK_TOLERANCE: Final = 300  # seconds between the time of a cosignature and this host's clock
_MAX_SIZE_TEXT: Final = 32  # bytes


class WitnessAhead(SignerError):
    """A witness knows a larger checkpoint of the log than the one that it was asked to cosign."""


class OtherHistory(SignerError):
    """A witness holds a checkpoint, signed by the log's key, that the log does not go on from: `evidence`."""

    def __init__(self, code: str, text: str, hint: str, evidence: Note) -> None:
        super().__init__(code, text, hint)
        self.evidence = evidence


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class Remote(Protocol):
    """A witness over HTTP, asked by POST with a body, else by GET. `name` is its address.

    Raises `Unavailable` without a whole answer.
    """

    @property
    def name(self) -> str: ...
    def ask(self, path: str, body: bytes | None = None) -> Answer: ...


class Source(Protocol):
    """The log that is cosigned: its newest signed checkpoint, and proofs that one size goes on from another."""

    @property
    def log(self) -> Log: ...
    def checkpoint(self) -> Note: ...
    def proof(self, old: int, new: int) -> Sequence[bytes]: ...


@dataclass(frozen=True, slots=True)
class Cosignature:
    """A witness's signature line on a checkpoint, made `at` (seconds since 1970).

    `was_behind`: the witness did not know any more what it had cosigned before.
    """

    line: Signature
    at: int
    was_behind: bool = False


def ask_witness(remote: Remote, key: VerifierKey, source: Source, note: Note, known: int, now: int) -> Cosignature:
    """Has a witness cosign `note`, a checkpoint of the source; `known` is the size that it cosigned last, 0 if unknown.

    1 send the checkpoint, with a proof from the size that the witness is thought to have
    2 409: it has another size: send again with a proof from that one, a few times
    3 200: the cosignature must verify, and be of now
    4 refused, or ahead of the log: compare its newest checkpoint with the log

    Raises `OtherHistory` if the log was rewritten or cut off since a checkpoint that the witness holds, `WitnessAhead`
    if it has meanwhile a newer one, `BadNote` for a wrong cosignature, and `Unavailable`.
    """
    wanted = parse_checkpoint(note.text)
    old, told = min(known, wanted.size), -1
    for _ in range(TRIES):
        proof = source.proof(old, wanted.size) if 0 < old < wanted.size else ()
        answer = remote.ask("/add-checkpoint", render_request(old, proof, note))
        if answer.status == 200:
            return _read_cosignature(answer.body, note, key, now, was_behind=-1 < told < known)
        if answer.status == 409:
            told = _read_size(remote, answer.body)
            if told == old:
                raise _faulty(remote, f"it answers 409 with the size {told} that it was asked with")
            if told > wanted.size:
                raise _compare(remote, key, source, wanted)
            old = told
        elif answer.status == 422:
            raise _compare(remote, key, source, wanted)
        else:
            raise _not_taken(remote, answer)
    raise _faulty(remote, f"it answered 409 {TRIES} times, each time with another size")


def render_request(old: int, proof: Sequence[bytes], note: Note) -> bytes:
    """The body of `POST /add-checkpoint`: old size, proof, and the signed checkpoint."""
    lines = [f"old {old}", *map(encode_base64, proof), ""]
    return "".join(f"{line}\n" for line in lines).encode() + note.render()


def _read_size(remote: Remote, body: bytes) -> int:
    try:
        text = body.decode("ascii")
        if len(body) > _MAX_SIZE_TEXT or not text.endswith("\n"):
            raise ValueError("it is no line")
        return parse_size(text[:-1])
    except ValueError:
        raise _faulty(remote, "its answer 409 does not have the size that it knows") from None


def _read_cosignature(body: bytes, note: Note, key: VerifierKey, now: int, *, was_behind: bool) -> Cosignature:
    """The cosignature by `key` among the lines of an answer; raises `BadNote`."""
    try:
        lines = parse_signatures(body.decode())
    except UnicodeDecodeError:
        raise BadNote("note_malformed", "the witness's answer is not UTF-8", "check the address of --to") from None
    at = check_cosignature(Note(note.text, lines), key)
    if abs(at - now) > CLOCK_TOLERANCE:
        raise BadNote(
            "cosignature_time_wrong",
            f"{key.name} dates its cosignature {abs(at - now)} s {'after' if at > now else 'before'} this host's clock",
            f"correct the clock of this host or of the witness; {CLOCK_TOLERANCE} s are allowed",
        )
    line = next(one for one in lines if (one.name, one.key_id) == (key.name, key.key_id))
    return Cosignature(line, at, was_behind)


def _compare(remote: Remote, key: VerifierKey, source: Source, wanted: Checkpoint) -> SignerError:
    """Why a witness refuses: its newest checkpoint, if the log's key signed it, against the log as it is now."""
    theirs, held = _newest_of(remote, key, source.log)
    ours = parse_checkpoint(source.checkpoint().text)
    if held.size > ours.size:
        return _other_history(remote, theirs, held, f"the ledger ends with event {ours.size}")
    try:
        proof = source.proof(held.size, ours.size) if 0 < held.size < ours.size else ()
        check_consistency(held.size, held.root, ours.size, ours.root, proof)
    except BadProof:
        return _other_history(remote, theirs, held, "the ledger's first events are other ones now")
    if held.size > wanted.size:
        text = f"{remote.name} has cosigned a newer checkpoint of this ledger already, of {held.size} events"
        return WitnessAhead("witness_ahead", text, "repeat the command: another one was faster")
    return _faulty(remote, "it refuses a checkpoint that goes on from its own")


def _other_history(remote: Remote, theirs: Note, held: Checkpoint, what: str) -> OtherHistory:
    return OtherHistory(
        "ledger_differs_from_witness",
        f"{what}, but {remote.name} holds a checkpoint of {held.size} other events, signed by the ledger key",
        "keep ledger and witness unchanged, and see runbooks/ledger.md: the ledger was rewritten or cut off, or "
        "restored without `signer ledger restore`",
        theirs,
    )


def _newest_of(remote: Remote, key: VerifierKey, log: Log) -> tuple[Note, Checkpoint]:
    """The newest checkpoint that a witness holds of the log, checked; raises `Unavailable` if it shows none."""
    answer = remote.ask(f"/{log.origin_hash}/checkpoint")
    if answer.status != 200:
        raise _faulty(remote, f"it refuses the checkpoint, and does not show its own (status {answer.status})")
    try:
        note = parse_note(answer.body)
        log.check(note)
        check_cosignature(note, key)
        found = parse_checkpoint(note.text)
    except BadNote as error:
        raise _faulty(remote, f"it refuses the checkpoint, and its own is not one: {error.text}") from None
    if found.origin != log.origin:
        raise _faulty(remote, "it refuses the checkpoint, and shows one of another log")
    return note, found


def _faulty(remote: Remote, what: str) -> Unavailable:
    return Unavailable(
        "witness_faulty", f"{remote.name} is not a faithful witness: {what}", "tell those who run it; use another one"
    )


def _not_taken(remote: Remote, answer: Answer) -> Unavailable:
    said = plain(answer.body[:200].decode(errors="replace")).strip()
    hint = {
        403: "give those who run the witness the present line of `signer ledger key`",
        404: "have the witness started with --log and the line of `signer ledger key`",
    }.get(answer.status, "see the log of the witness; the timer tries again")
    return Unavailable("witness_refused", f"{remote.name} answers {answer.status}: {said}", hint)
