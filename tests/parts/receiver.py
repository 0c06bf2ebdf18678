"""A receiver of notices on loopback: checks each webhook's signature, and misbehaves on demand.

Written from Standard Webhooks 1.0 alone; it shares no code with the product.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from tests.parts import ports
from tests.parts.eventually import eventually

KEY: Final = bytes(range(32))
SECRET: Final = "whsec_" + base64.b64encode(KEY).decode()


@dataclass(frozen=True)
class Got:
    """One request that arrived; header names in lower case. `at` is in seconds since 1970."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    status: int  # that it was answered with

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def json(self) -> Any:
        return json.loads(self.body)

    def is_signed(self, key: bytes = KEY) -> bool:
        """Whether the signature is right, and not older than five minutes."""
        signed = f"{self.id}.{self.headers['webhook-timestamp']}.".encode() + self.body
        right = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        is_new = abs(self.at - int(self.headers["webhook-timestamp"])) < 300
        return is_new and f"v1,{right}" in self.headers["webhook-signature"].split(" ")


class Receiver:
    """Answers `status` with `headers` after `before()`; `got` holds all requests in their order."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = b""
        self.before: Callable[[], object] = lambda: None
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.got.append(Got(self.path, headers, body, time.time(), receiver.status))
                receiver.before()
                self.send_response(receiver.status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(receiver.body)))
                self.end_headers()
                self.wfile.write(receiver.body)

            def log_message(self, *_: object) -> None:
                """A test's output is for the test."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A sender that was killed is part of the tests."""

        self._server = Server((ports.LOOPBACK, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{ports.LOOPBACK}:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def taken(self) -> list[Got]:
        """The requests that were answered with 200."""
        return [one for one in self.got if one.status == 200]

    def wait_for(self, text: str, *, path: str = "/hook") -> Got:
        """The last request for `path` that was taken and has this text in its body."""

        def look() -> list[Got]:
            return [one for one in self.taken() if one.path == path and text in one.body.decode()]

        return eventually(look, f"a notice with {text!r}")[-1]
