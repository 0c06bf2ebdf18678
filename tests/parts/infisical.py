"""A stand-in for Infisical, in a process of its own: the compiled SDK holds Python's lock while it waits.

It speaks the two calls that were recorded from a real one (universal-auth login, raw secret) and holds whoever asks to
them: path, query, bearer and body must be exactly those, anything else is answered with 418 and kept as a
`violation`. What it should do next stands in a file that it reads for each request, so that a test can change it any
time. Its error answers repeat every secret it knows, as the worst server would.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.parts import ports

CLIENT_ID = "3f0c8b1e-signer-on-rs2000"
CLIENT_SECRET = "cs-7d41f0aa93e1b6c2-client-secret"
ACCESS_TOKEN = "eyJhbGciOiJIUzI1NiJ9.access-token-5b2e.signature"
PROJECT = "64f1c0de-project"
ENVIRONMENT = "prod"
FOLDER = "/safe session/ca"
NAME = "SAFE_SESSION_CA_KEY"

LOGIN_PATH = "/api/v1/auth/universal-auth/login"
SECRET_PATH = f"/api/v3/secrets/raw/{NAME}"
SECRET_QUERY = {
    "environment": ENVIRONMENT,
    "include_imports": "false",
    "secretPath": FOLDER,
    "type": "shared",
    "workspaceId": PROJECT,
}
FOREVER = 300  # seconds; longer than any test

_REASONS = {400: "BadRequest", 401: "UnauthorizedError", 403: "PermissionDenied", 404: "NotFound", 429: "RateLimit"}


class Infisical:
    """The running stand-in; a context manager. `folder` holds its file of orders and its record of requests."""

    def __init__(self, folder: Path, *, tls: tuple[Path, Path] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._orders = folder / "orders.json"
        self._record = folder / "requests.jsonl"
        self._log = folder / "log"
        self.secret_file = folder / "client-secret"
        self.secret_file.write_text(CLIENT_SECRET + "\n")
        self.secret_file.chmod(0o400)
        self.tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.holds("")

    def holds(self, value: str | None, *, login: object = None, secret: object = None) -> None:
        """What the next requests find: the secret's value, and how each call goes wrong (see `_Handler._fault`)."""
        fresh = self._orders.with_suffix(".fresh")
        fresh.write_text(json.dumps({"value": value, "login": login, "secret": secret}))
        fresh.rename(self._orders)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{'localhost' if self.tls else ports.LOOPBACK}:{self.port}"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every request so far: method, path, and what was wrong with it (empty if nothing)."""
        return [json.loads(line) for line in self._record.read_text().splitlines()] if self._record.exists() else []

    @property
    def violations(self) -> list[str]:
        return [wrong for request in self.requests for wrong in request["violations"]]

    def environ(self, fingerprint: str) -> dict[str, str]:
        """The settings of `signer ca render` for this server."""
        return {
            "INFISICAL_SITE_URL": self.url,
            "INFISICAL_CLIENT_ID": CLIENT_ID,
            "INFISICAL_CLIENT_SECRET_FILE": str(self.secret_file),
            "INFISICAL_PROJECT_ID": PROJECT,
            "INFISICAL_ENVIRONMENT": ENVIRONMENT,
            "INFISICAL_SECRET_PATH": FOLDER,
            "INFISICAL_SECRET_NAME": NAME,
            "SIGNER_CA_FINGERPRINT": fingerprint,
        }

    def __enter__(self) -> Infisical:
        self.port = self.port or ports.free_port()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.parts.infisical",
                    str(self.port),
                    str(self.folder),
                    *map(str, self.tls or ()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
            )
        ports.wait_until(lambda: ports.accepts(self.port), self._process, self._log.read_text)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None, "it was never started"
        self._process.kill()  # requests that hang are no reason to wait
        self._process.wait()


class _Handler(BaseHTTPRequestHandler):
    """One request of the SDK."""

    folder: Path

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        wrong = self._compare("path", self.path, LOGIN_PATH)
        try:
            wrong += self._compare("body", json.loads(body), {"clientId": CLIENT_ID, "clientSecret": CLIENT_SECRET})
        except ValueError:
            wrong.append("the body is no JSON")
        token = {"accessToken": ACCESS_TOKEN, "expiresIn": 7200, "accessTokenMaxTTL": 43200, "tokenType": "Bearer"}
        self._finish("login", wrong, token)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        wrong = self._compare("path", url.path, SECRET_PATH)
        wrong += self._compare("query", dict(parse_qsl(url.query, keep_blank_values=True)), SECRET_QUERY)
        wrong += self._compare("bearer", self.headers.get("Authorization"), f"Bearer {ACCESS_TOKEN}")
        secret = {
            "id": "1f7a",
            "_id": "1f7a",
            "workspace": PROJECT,
            "environment": ENVIRONMENT,
            "version": 3,
            "type": "shared",
            "secretKey": NAME,
            "secretValue": self._orders["value"],
            "secretComment": "",
            "skipMultilineEncoding": False,
        }
        self._finish("secret", wrong, {"secret": secret})

    @property
    def _orders(self) -> dict[str, Any]:
        orders: dict[str, Any] = json.loads((self.folder / "orders.json").read_text())
        return orders

    @staticmethod
    def _compare(what: str, found: object, expected: object) -> list[str]:
        return [] if found == expected else [f"{what}: {found!r} instead of {expected!r}"]

    def _finish(self, call: str, wrong: list[str], answer: Mapping[str, object]) -> None:
        fact = {"method": self.command, "path": self.path, "violations": wrong, "agent": self.headers.get("User-Agent")}
        with (self.folder / "requests.jsonl").open("a") as record:
            record.write(json.dumps(fact) + "\n")
        if wrong:
            self._answer(418, {"statusCode": 418, "message": "; ".join(wrong), "error": "Teapot"})
            return
        fault = self._orders[call]
        if fault is None:
            self._answer(200, answer)
        else:
            self._fault(fault)

    def _fault(self, fault: object) -> None:
        """A number is a status whose body tells all secrets; a text is one of the ways to fail that have no status."""
        url = f"https://user:{CLIENT_SECRET}@{self.headers.get('Host')}/"
        told = f"{CLIENT_SECRET} {ACCESS_TOKEN} {url} {self._orders['value']}"
        match fault:
            case int():
                self._answer(fault, {"statusCode": fault, "message": told, "error": _REASONS.get(fault, "Internal")})
            case "hang":
                time.sleep(FOREVER)
            case "hang in the body":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                time.sleep(FOREVER)
            case "drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(FOREVER):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
            case "close":
                self.connection.shutdown(socket.SHUT_RDWR)
            case "not http":
                self.wfile.write(f"{told}\n".encode())
            case "not json":
                self._answer(200, f"<html>{told}</html>")
            case "other json":
                self._answer(200, {"told": told})
            case "to another host":
                self.send_response(307)
                self.send_header("Location", f"http://user:{CLIENT_SECRET}@{ports.LOOPBACK}:1/")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case _:
                raise AssertionError(f"no such fault: {fault!r}")

    def _answer(self, status: int, body: object) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        print(self.command, self.path, code, flush=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        print("a caller went away", type(sys.exception()).__name__, flush=True)


def _serve(port: int, folder: Path, tls: list[str]) -> None:
    handler = type("Handler", (_Handler,), {"folder": folder})
    server = _Server((ports.LOOPBACK, port), handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


if __name__ == "__main__":
    os.umask(0o077)
    _serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
