"""Witnesses and the signing service over HTTP, as `client.py` uses them."""

from __future__ import annotations

import binascii
import json
from collections.abc import Sequence
from typing import Final

import requests

from signer.api_client import ApiClient
from signer.errors import BadNote, Unavailable
from signer.http import Watched, new_session
from signer.ledger.checkpoint import MAX_NOTE, Note, parse_hash, parse_note
from signer.witness.client import MAX_ANSWER, Answer
from signer.witness.state import Log

ANSWERS_WITHIN: Final = 10.0  # seconds for one request
_MAX_PROOF: Final = 16 * 1024  # bytes


class HttpWitness(Watched):
    """A witness at `http://…` or `https://…`; nothing secret is sent, so plain http may cross a network.

    Follows no redirect. Raises `Unavailable` without a whole answer within `ANSWERS_WITHIN`.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.name = address
        self._base = address.rstrip("/")

    def ask(self, path: str, body: bytes | None = None) -> Answer:
        method = "GET" if body is None else "POST"
        session = new_session(max_body=MAX_ANSWER, carries_secrets=False)
        headers = {"Connection": "close", "User-Agent": "signer", "Content-Type": "text/plain; charset=utf-8"}
        try:
            with self._watch.within(ANSWERS_WITHIN):
                answer = session.request(method, self._base + path, data=body, headers=headers, allow_redirects=False)
            return Answer(answer.status_code, answer.content)
        except (requests.exceptions.RequestException, ValueError) as error:
            why = "no answer in time" if isinstance(error, requests.exceptions.Timeout) else "no whole answer"
            raise Unavailable(
                "witness_unreachable", f"{self.name} cannot be asked: {why}", "is it up, and is --to its address?"
            ) from None
        finally:
            session.close()


class ServiceLog:
    """The ledger behind a signing service; checks that its key signed each checkpoint. Raises `BadNote` too."""

    def __init__(self, api: ApiClient, log: Log) -> None:
        self._api = api
        self.log = log

    def checkpoint(self) -> Note:
        """The newest checkpoint; raises `BadNote` if the ledger's key did not sign it."""
        note = parse_note(self._api.file("ledger/checkpoint", MAX_NOTE))
        self.log.check(note)
        return note

    def proof(self, old: int, new: int) -> Sequence[bytes]:
        """The consistency proof of two sizes; whoever uses it verifies it."""
        try:
            reply = json.loads(self._api.file(f"ledger/proof?from={old}&to={new}", _MAX_PROOF))
            return [parse_hash(text) for text in reply["hashes"]]
        except (ValueError, TypeError, KeyError, binascii.Error):
            raise BadNote("proof_malformed", "the service's proof is malformed", "fetch it again") from None
