"""A witness's decisions: which checkpoint it cosigns (c2sp.org/tlog-witness). No socket and no HTTP parser.

A witness cosigns a checkpoint only if it goes on from the newest one that it cosigned before, and remembers that before
it answers. One thread calls it, so that no two requests can interleave between check and write.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Final

from signer.errors import BadNote, BadProof, Unavailable
from signer.ledger.checkpoint import (
    Checkpoint,
    Note,
    Signature,
    SignFunction,
    VerifierKey,
    cosign,
    parse_checkpoint,
    parse_hash,
    parse_note,
    parse_size,
)
from signer.ledger.tree import EMPTY_ROOT, check_consistency
from signer.protocol.log_limit import LogLimit
from signer.units import plain
from signer.witness.server import Response
from signer.witness.state import Cosigned, Log, State

MAX_PROOF: Final = 63  # lines (tlog-witness)
SAME_ANSWER: Final = 10  # seconds in which the same checkpoint gets the same cosignature, without a write
CLOCK_STEP: Final = 60  # seconds that the clock may be behind the last cosignature
SIZE_TYPE: Final = "text/x.tlog.size"
_CHECKPOINT_PATH: Final = re.compile(r"/([0-9a-f]{64})/checkpoint", re.ASCII)
log = logging.getLogger("signer.witness")


class _Refusal(Exception):
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Witness:
    """Cosigns the checkpoints of `logs` with `key`, whose private half `sign` uses. `clock` is seconds since 1970."""

    def __init__(
        self,
        state: State,
        logs: Iterable[Log],
        key: VerifierKey,
        sign: SignFunction,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state = state
        self._logs = {one.origin: one for one in logs}
        self._by_hash = {one.origin_hash: one for one in self._logs.values()}
        self._key = key
        self._sign = sign
        self._clock = clock
        self._lines = LogLimit(log)

    def answer(self, method: str, target: str, body: bytes) -> Response:
        try:
            if target == "/add-checkpoint":
                _require(method, "POST")
                return self._add_checkpoint(body)
            if (match := _CHECKPOINT_PATH.fullmatch(target)) is not None:
                _require(method, "GET", "HEAD")
                return self._newest(match[1])
        except _Refusal as refusal:
            return Response.of_text(refusal.status, refusal.text)
        except Unavailable as error:
            self._lines.warn(error.code, f"{error.text} ({error.code}); {error.hint}")
            return Response.of_text(HTTPStatus.SERVICE_UNAVAILABLE, error.text)
        return Response.of_text(HTTPStatus.NOT_FOUND, "this is a witness: POST /add-checkpoint")

    def _newest(self, origin_hash: str) -> Response:
        """The newest cosigned checkpoint of a log (tlog-witness, "Monitor Retrieval Mechanism")."""
        known = self._by_hash.get(origin_hash)
        newest = None if known is None else self._state.newest(known)
        if newest is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, "no checkpoint of this log has been cosigned")
        return Response(HTTPStatus.OK, newest.note.render())

    def _add_checkpoint(self, body: bytes) -> Response:
        """Cosigns a checkpoint, in the specification's order:

        1 read the request                                       400
        2 the origin is known                                    404
        3 the log signed it                                      403
        4 it is a checkpoint, not smaller than the old size      400, 422
        5 the old size is the newest one                         409 and that size
        6 it goes on from the newest one                         422, and the fork is kept
        7 remember it, then answer
        """
        old, proof, note = _read_request(body)  # 1
        known = self._logs.get(note.text.partition("\n")[0])
        if known is None:  # 2
            raise _Refusal(HTTPStatus.NOT_FOUND, "the origin of this checkpoint is not one of this witness's logs")
        try:
            known.check(note)  # 3
        except BadNote as error:
            raise _Refusal(HTTPStatus.FORBIDDEN, error.text) from None
        checkpoint = _read_checkpoint(note.text)  # 4
        if old > checkpoint.size:
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"the old size {old} is above the checkpoint's {checkpoint.size}")
        newest = self._state.newest(known)
        size = newest.checkpoint.size if newest is not None else 0
        if old != size:  # 5
            return Response(HTTPStatus.CONFLICT, f"{size}\n".encode(), SIZE_TYPE)
        self._check_goes_on(known, newest, checkpoint, note, proof)  # 6
        line = self._cosign(known, newest, checkpoint, note)  # 7
        return Response(HTTPStatus.OK, f"{line}\n".encode())

    def _check_goes_on(
        self, known: Log, newest: Cosigned | None, checkpoint: Checkpoint, note: Note, proof: tuple[bytes, ...]
    ) -> None:
        """Refuses a checkpoint that does not go on from the newest one, and keeps it."""
        before = newest.checkpoint if newest is not None else Checkpoint(known.origin, 0, EMPTY_ROOT)
        try:
            check_consistency(before.size, before.root, checkpoint.size, checkpoint.root, proof)
        except BadProof as error:
            # A wrong proof of a right checkpoint looks the same; who compares the two roots later will know.
            if before.size and self._state.keep_refused(known, checkpoint, note):
                log.warning(
                    "REFUSED a checkpoint of %s: size %d, root %s does not go on from size %d, root %s; it is kept",
                    plain(known.origin), checkpoint.size, checkpoint.root.hex(), before.size, before.root.hex(),
                )  # fmt: skip
            text = f"it does not go on from the checkpoint of size {before.size}: {error.text}"
            raise _Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, text) from None

    def _cosign(self, known: Log, newest: Cosigned | None, checkpoint: Checkpoint, note: Note) -> Signature:
        """The cosignature, after the state is on the disk."""
        now = int(self._clock())
        if newest is not None:
            if now < newest.at - CLOCK_STEP:
                raise Unavailable(
                    "witness_clock_behind",
                    f"the witness's clock is {newest.at - now} s behind its last cosignature",
                    "correct the clock",
                )
            now = max(now, newest.at)  # a later statement is never dated before an earlier one
            # The text, not the root alone: what is signed includes extension lines.
            if newest.note.text == note.text and now < newest.at + SAME_ANSWER:
                own = (self._key.name, self._key.key_id)
                return next(line for line in newest.note.signatures if (line.name, line.key_id) == own)
        line = cosign(note.text, now, self._key, self._sign)
        cosigned = Cosigned(checkpoint, known.signatures(note).with_signatures([line]), now)
        self._state.save(known, cosigned)
        return line


def _require(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"use {' or '.join(allowed)}")


def _read_request(body: bytes) -> tuple[int, tuple[bytes, ...], Note]:
    """Old size, proof and note of a request body; refuses everything else."""
    head, blank, rest = body.partition(b"\n\n")
    first, *lines = head.split(b"\n", MAX_PROOF + 2)
    try:
        if not blank or not first.startswith(b"old "):
            raise ValueError("the first line is not `old SIZE`")
        old = parse_size(first.removeprefix(b"old ").decode("ascii"))
        if len(lines) > MAX_PROOF:
            raise ValueError(f"the proof has more than {MAX_PROOF} lines")
        return old, tuple(parse_hash(line.decode("ascii")) for line in lines), parse_note(rest)
    except (BadNote, ValueError) as error:
        text = error.text if isinstance(error, BadNote) else f"the request is malformed: {plain(str(error))}"
        raise _Refusal(HTTPStatus.BAD_REQUEST, text) from None


def _read_checkpoint(text: str) -> Checkpoint:
    try:
        return parse_checkpoint(text, with_extensions=True)
    except BadNote as error:
        is_empty_tree = text.split("\n")[1:2] == ["0"]  # with another root than that of an empty tree
        status = HTTPStatus.UNPROCESSABLE_ENTITY if is_empty_tree else HTTPStatus.BAD_REQUEST
        raise _Refusal(status, error.text) from None
