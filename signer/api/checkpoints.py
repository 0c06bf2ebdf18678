"""The routes of the ledger's checkpoints in Flask, which need no token: whoever keeps one can verify the ledger."""

from __future__ import annotations

from typing import Final

from flask import Flask, Response

from signer.api.native import json_response, read_query
from signer.protocol.client import KeeperClient
from signer.protocol.replies import ConsistencyProof, SignedCheckpoint, expect

SIZES: Final = ("from", "to")


def register(app: Flask, keeper: KeeperClient) -> None:
    """Adds the routes to `app`."""

    def checkpoint() -> Response:
        note = expect(SignedCheckpoint, keeper.ask({"op": "checkpoint"})).note
        return Response(note, 200, {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"})

    def proof() -> Response:
        return json_response(expect(ConsistencyProof, keeper.ask({"op": "proof", **read_query(SIZES)})))

    app.add_url_rule("/api/ledger/checkpoint", "GET checkpoint", checkpoint, methods=["GET"])
    app.add_url_rule("/api/ledger/proof", "GET proof", proof, methods=["GET"])
