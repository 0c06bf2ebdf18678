"""A small web server with a revocation list: what a host of `tests.parts.kit_hosts` fetches."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from tests.parts import ports
from tests.parts.keys import Key, ssh_keygen

LIST_SPACE: Final = "krl.v1@signer"
STATEMENT_SPACE: Final = "krl-statement.v1@signer"


class ListServer:
    """Serves `files` below `url`, with an ETag each. `requests` holds what was asked: path and headers."""

    def __init__(self, folder: Path, ca: Key, publisher: Key) -> None:
        self._folder = folder
        self._ca = ca
        self._publisher = publisher
        self.files: dict[str, bytes] = {}
        self.newest = 0  # for tests that share a server: the highest version that any of them took
        self.requests: list[tuple[str, dict[str, str], int]] = []
        self.before: dict[str, Callable[[], object]] = {}  # called once, before that file is answered
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.before.pop(self.path.removeprefix("/api/"), lambda: None)()
                content = server.files.get(self.path.removeprefix("/api/"))
                status = 404 if content is None else 200
                etag = f'"{hashlib.sha256(content or b"").hexdigest()}"'
                if content is not None and self.headers.get("If-None-Match") == etag:
                    status = 304
                server.requests.append(
                    (self.path, {name.lower(): value for name, value in self.headers.items()}, status)
                )
                self.send_response(status)
                body = (content or b"") if status == 200 else b""
                self.send_header("ETag", etag)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """A test's output is for the test."""

        self._server = ThreadingHTTPServer((ports.LOOPBACK, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{ports.LOOPBACK}:{self._server.server_address[1]}/api"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def krl(self, version: int, *specification: str) -> bytes:
        """A list by `ssh-keygen -k`, from the lines of its specification (`serial: 7`, `id: name`)."""
        path, lines = self._folder / "made.krl", self._folder / "specification"
        path.unlink(missing_ok=True)
        lines.write_text("".join(f"{line}\n" for line in specification))
        ssh_keygen("-q", "-k", "-f", path, "-z", str(version), "-s", self._ca.public, lines)
        return path.read_bytes()

    def statement(self, version: int, content: bytes, *, age: timedelta = timedelta(0)) -> bytes:
        as_of = (datetime.now(UTC) - age).strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = {"as_of": as_of, "sha256": hashlib.sha256(content).hexdigest(), "version": version}
        return json.dumps(fields, separators=(",", ":")).encode()

    def sign(self, content: bytes, namespace: str, *, key: Key | None = None) -> bytes:
        command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str((key or self._publisher).private), "-n", namespace]
        return subprocess.run(command, input=content, capture_output=True, check=True).stdout

    def publish(self, version: int, *specification: str, age: timedelta = timedelta(0)) -> bytes:
        """Serves a whole, good list; returns it."""
        content = self.krl(version, *specification)
        self.serve(content, self.statement(version, content, age=age))
        return content

    def serve(self, content: bytes, statement: bytes) -> None:
        """Serves these bytes, signed as they should be."""
        self.files = {
            "krl": content,
            "krl.sig": self.sign(content, LIST_SPACE),
            "krl.statement": statement,
            "krl.statement.sig": self.sign(statement, STATEMENT_SPACE),
        }

    def asked(self, name: str) -> Sequence[tuple[dict[str, str], int]]:
        """Headers and status of each request for a file."""
        return [(headers, status) for path, headers, status in self.requests if path == f"/api/{name}"]
