"""A stand-in for Vault's SSH engine that can be slow, broken or hostile, and a CA whose certificates can say anything.

It speaks the calls that our client makes, as recorded from OpenBao 2.7.2; whatever else is asked of it is answered with
418 and kept as a violation. Its error answers repeat the token, as the worst server would. It lives in the test's own
process: a test changes its attributes at any time.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace

from signer.model import Grant
from signer.ssh.certificate import USER_CERTIFICATE, CertificateFields, append_signature, encode_unsigned
from signer.ssh.publickey import certificate_kind, parse_public_key
from signer.ssh.wire import mpint, string

TOKEN = "hvs.the-token-of-signer-8d1f"
MOUNT = "ssh"
FOREVER = 120  # seconds; longer than any test waits


# What is sent at once, and what then comes in pieces.
_DRIPS: dict[str, tuple[bytes, bytes] | tuple[bytes, bytes, int]] = {
    "drip headers": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x" * 10_000),
    "drip a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n", b" " * 10_000),
    "drip without end": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b" " * 10_000),
    "continue for ever": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 25),
}


class ForeignCa:
    """Another CA's key: signs whatever it is given."""

    def __init__(self, kind: str = "ssh-ed25519", name: str = "vault") -> None:
        seed = sha256(f"{kind} {name}".encode()).digest()
        self.kind = kind
        self.algorithm = kind  # of its signatures
        self._key: Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
        if kind == "ssh-ed25519":
            self._key = Ed25519PrivateKey.from_private_bytes(seed)
        elif kind == "ssh-rsa":
            self._key, self.algorithm = rsa.generate_private_key(65537, 3072), "rsa-sha2-256"
        else:
            self._key = ec.derive_private_key(int.from_bytes(seed, "big") >> 1, ec.SECP256R1())
        self.line = self._key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        self.blob = base64.b64decode(self.line.split()[1])

    def sign(self, data: bytes) -> bytes:
        """A signature blob."""
        if isinstance(self._key, Ed25519PrivateKey):
            raw = self._key.sign(data)
        elif isinstance(self._key, rsa.RSAPrivateKey):
            digest = {"rsa-sha2-256": SHA256(), "rsa-sha2-512": SHA512(), "ssh-rsa": SHA1()}[self.algorithm]  # noqa: S303 - it must be refused
            raw = self._key.sign(data, padding.PKCS1v15(), digest)
        else:
            r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(SHA256())))
            raw = mpint(r) + mpint(s)
        return string(self.algorithm.encode()) + string(raw)

    def certify(self, fields: CertificateFields) -> str:
        """The line of a certificate with exactly these fields."""
        unsigned = encode_unsigned(fields)
        whole = append_signature(unsigned, self.sign(unsigned))
        return f"{certificate_kind(fields.key_kind)} {base64.b64encode(whole).decode()}"

    def fields(self, grant: Grant, now: int, **changes: Any) -> CertificateFields:
        """What Vault makes of a grant, with `changes`."""
        return replace(
            CertificateFields(
                key_kind=grant.public_key.kind,
                key=grant.public_key.blob,
                nonce=os.urandom(32),
                serial=int.from_bytes(os.urandom(8), "big"),
                cert_type=USER_CERTIFICATE,
                key_id=f"vault-token-{sha256(grant.public_key.blob).hexdigest()}",
                principals=tuple(sorted(grant.principals)),
                valid_after=now - 30,
                valid_before=now + grant.ttl,
                critical_options=grant.critical_options,
                extensions=grant.extension_fields,
                ca_key=self.blob,
            ),
            **changes,
        )


class FakeVault:
    """The running stand-in; a context manager. What it does next is in its attributes."""

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self._tls = tls
        self.ca = ForeignCa()
        self.published = self.ca.line
        self.tokens = {TOKEN}
        self.renewable = False
        self.fault: dict[str, object] = {}  # by call (`sign`, `ca`, `lookup`, `renew`, or `all`): see `_Handler._fail`
        self.tamper: Callable[[CertificateFields], CertificateFields] = lambda fields: fields
        self.replace_line: Callable[[str], object] = lambda line: line
        self.asked: list[str] = []
        self.violations: list[str] = []
        self._ends = threading.Event()
        self._server: _Server | None = None
        self.port = 0

    @property
    def connections(self) -> int:
        """How many there were since it started."""
        assert self._server is not None, "it was never started"
        return self._server.accepted

    @property
    def address(self) -> str:
        return f"https://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeVault:
        handler = type("Handler", (_Handler,), {"vault": self})
        self._ends.clear()
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        if self._tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None, "it was never started"
        self._ends.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def wait(self, seconds: float) -> bool:
        """False if it was ended meanwhile."""
        return not self._ends.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        self.accepted = 0
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.accepted += 1
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was cut off is the purpose of the exercise."""

    def hang_up(self) -> None:
        """Ends the connections that were kept alive, as a server does that ends."""
        for sock in list(self._open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is gone already


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    vault: FakeVault

    def log_message(self, *_: Any) -> None:
        """Nothing: the test's own output is enough."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or b"{}")
        if self.path.startswith(f"/v1/{MOUNT}/sign/"):
            self._serve("sign", lambda: self._certificate(body))
        elif self.path == "/v1/auth/token/renew-self":
            self._serve("renew", lambda: {"auth": {"client_token": self._token(), "lease_duration": 3}})
        else:
            self._stray()

    def do_GET(self) -> None:
        if self.path == f"/v1/{MOUNT}/config/ca":
            self._serve("ca", lambda: {"data": {"issuer_id": "1", "public_key": self.vault.published + "\n"}})
        elif self.path == "/v1/auth/token/lookup-self":
            facts = {"id": self._token(), "ttl": 3, "renewable": self.vault.renewable}
            self._serve("lookup", lambda: {"data": facts})
        else:
            self._stray()

    def _token(self) -> str:
        return self.headers.get("X-Vault-Token", "")

    def _stray(self) -> None:
        self.vault.violations.append(f"{self.command} {self.path}")
        self._answer(418, {"errors": ["no such call"]})

    def _certificate(self, body: Mapping[str, Any]) -> dict[str, object]:
        vault, now = self.vault, int(time.time())
        key = parse_public_key(body["public_key"])
        fields = CertificateFields(
            key_kind=key.kind,
            key=key.blob,
            nonce=os.urandom(32),
            serial=int.from_bytes(os.urandom(8), "big"),
            cert_type=USER_CERTIFICATE,
            key_id=f"vault-token-{sha256(key.blob).hexdigest()}",
            principals=tuple(sorted(body["valid_principals"].split(","))),
            valid_after=now - 30,
            valid_before=now + int(body["ttl"].removesuffix("s")),
            critical_options=tuple(sorted(body["critical_options"].items())),
            extensions=tuple(sorted(body["extensions"].items())),
            ca_key=vault.ca.blob,
        )
        fields = vault.tamper(fields)
        line = vault.replace_line(vault.ca.certify(fields) + "\n")
        return {"data": {"issuer_id": "1", "serial_number": f"{fields.serial:x}", "signed_key": line}}

    def _serve(self, call: str, make: Callable[[], dict[str, object]]) -> None:
        self.vault.asked.append(call)
        fault = self.vault.fault.get(call, self.vault.fault.get("all"))
        if fault is not None:
            self._fail(fault)
        elif self._token() not in self.vault.tokens:
            self._answer(403, {"errors": ["permission denied"]})
        else:
            envelope = {"request_id": "r", "lease_id": "", "renewable": False, "lease_duration": 0, "data": None}
            self._answer(200, {**envelope, "wrap_info": None, "warnings": None, "auth": None, **make()})

    def _fail(self, fault: object) -> None:
        """A status, alone or with Vault's sentence or a body; bytes are an answer of 200; a text is a way to hang."""
        token = self._token()
        match fault:
            case int():
                self._answer(fault, {"errors": [f"{token} went wrong"]})
            case (int() as status, str() as sentence):
                self._answer(status, {"errors": [sentence]})
            case (int() as status, bytes() as body):
                self._raw(status, body, {"Content-Type": "application/json"})
            case bytes():
                self._raw(200, fault)
            case "hang":
                self.vault.wait(FOREVER)
            case str() if fault in _DRIPS:
                self._drip(*_DRIPS[fault])
            case "huge":
                self._flood()
            case "close":
                self.connection.shutdown(socket.SHUT_RDWR)
            case "redirect":
                self._raw(307, b"", {"Location": f"{self.vault.address}/v1/elsewhere?{token}"})
            case "not http":
                self.wfile.write(f"{token} is not the way\n".encode())
                self.close_connection = True
            case _:
                raise AssertionError(f"no such fault: {fault!r}")

    def _drip(self, first: bytes, data: bytes, pieces: int = 1) -> None:
        self.wfile.write(first)
        for at in range(0, len(data), pieces):
            self.wfile.write(data[at : at + pieces])
            if not self.vault.wait(0.3):
                break
        self.close_connection = True

    def _flood(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2000000000\r\n\r\n")
        for _ in range(2000):
            self.wfile.write(b"[" * 1_000_000)

    def _answer(self, status: int, body: Mapping[str, object]) -> None:
        self._raw(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _raw(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
