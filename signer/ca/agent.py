"""The CA key in an ssh-agent: finds it by its fingerprint and has it sign. No byte of a private key comes here.

Each call opens its own connection, whose other end must belong to root or to the keeper's user, and ends within
`ANSWERS_WITHIN`. The agent's replies are foreign bytes: bounded, read in linear time, and a signature leaves this
module only if it verifies with the key and has the algorithm that was asked for. Thread-safe; never called
in the loop.
"""

from __future__ import annotations

import binascii
import os
import socket
import time
from pathlib import Path
from typing import Final

from signer.errors import BadFormat, Unavailable
from signer.hardening import peer_process
from signer.model import PublicKey
from signer.ssh.agent import (
    read_identities,
    read_signature,
    render_request_identities,
    render_sign_request,
    reply_length,
)
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import check_ca_kind, parse_public_key
from signer.ssh.signature import check_signature
from signer.ssh.wire import Reader

ANSWERS_WITHIN: Final = 3.0  # seconds for a connection, from its opening to the whole reply
MAX_SIGNATURE_REPLY: Final = 8 * 1024  # bytes; a signature of RSA-16384 has 2 KiB
SELF_TEST: Final = b"signer self-test"  # signed to see whether a key can sign
# Of a signature, by the kind of key; others are called like their kind.
_ALGORITHMS: Final = {"ssh-rsa": "rsa-sha2-512"}


class AgentKey:
    """One key of an agent. `kind` and `blob` are its public key, `fingerprint` its `SHA256:…`."""

    def __init__(self, agent: CaAgent, public: PublicKey) -> None:
        self._agent = agent
        self.public = public
        self.kind, self.blob, self.fingerprint = public.kind, public.blob, public.fingerprint

    def __repr__(self) -> str:
        return f"AgentKey({self.kind}, {self.fingerprint})"

    def sign(self, data: bytes) -> bytes:
        """The SSH signature blob over `data`, verified; raises `Unavailable`."""
        signature = self._agent.request_signature(self.blob, data)
        expected = _ALGORITHMS.get(self.kind, self.kind)
        try:
            if Reader(signature).string() != expected.encode():
                raise BadFormat("bad_signature", "another algorithm than the one asked for")
            check_signature(self.blob, data, signature)
        except BadFormat:
            raise Unavailable(
                "ca_agent_wrong_signature",
                f"the ssh-agent's signature is not a valid {expected} signature of the key {self.fingerprint}",
                "find out what answers at SIGNER_CA_AGENT_SOCKET",
            ) from None
        return signature


class CaAgent:
    """The agent at the socket `path`, which must belong to root or to the user with the number `owner`."""

    def __init__(self, path: Path, owner: int | None = None) -> None:
        self._path = str(path)
        self._owner = os.geteuid() if owner is None else owner

    def find_key(self, fingerprint: str) -> AgentKey:
        """The key with this fingerprint, after a self-test.

        Raises `Unavailable`, or `BadKeyFile` if the key may not be a CA key.
        """
        for blob in self.identities():
            if fingerprint_of(blob) == fingerprint:
                key = AgentKey(self, _read_ca_key(blob))
                key.sign(SELF_TEST)
                return key
        raise key_missing(fingerprint)

    def identities(self) -> list[bytes]:
        """The public key blobs and certificates that the agent lists; raises `Unavailable`."""
        try:
            return read_identities(self._exchange(render_request_identities()))
        except BadFormat:
            raise _malformed() from None

    def request_signature(self, key: bytes, data: bytes) -> bytes:
        """The agent's signature blob over `data`, unverified; raises `Unavailable`."""
        try:
            return read_signature(self._exchange(render_sign_request(key, data), MAX_SIGNATURE_REPLY))
        except BadFormat:
            raise _malformed() from None

    def _exchange(self, message: bytes, largest: int | None = None) -> bytes:
        """One message and the body of its reply, on a connection of their own. Raises `Unavailable` or `BadFormat`."""
        deadline = time.monotonic() + ANSWERS_WITHIN
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ANSWERS_WITHIN)
                connection.connect(self._path)
                self._check_owner(connection)
                connection.sendall(message)
                length = reply_length(_receive(connection, 4, deadline))
                if largest is not None and length > largest:
                    raise _malformed()
                return _receive(connection, length, deadline)
        except (TimeoutError, BlockingIOError):  # the latter: its queue of connections is full
            raise too_slow() from None
        except OSError as error:
            raise Unavailable(
                "ca_agent_down",
                f"the ssh-agent of the CA key cannot be reached: {(error.strerror or 'no reply').lower()}",
                "start it, and check SIGNER_CA_AGENT_SOCKET",
            ) from None

    def _check_owner(self, connection: socket.socket) -> None:
        uid = peer_process(connection).uid
        if uid not in (0, self._owner):
            raise Unavailable(
                "ca_agent_not_trusted",
                f"the ssh-agent of the CA key runs as user {uid}, not as root or the keeper's user",
                "run it as the user of SIGNER_KEEPER_USER",
            )


def key_missing(fingerprint: str) -> Unavailable:
    return Unavailable(
        "ca_agent_key_missing",
        f"the ssh-agent does not hold the CA key {fingerprint}",
        "add it: ssh-add FILE, or ssh-add -s PROVIDER for a token",
    )


def too_slow() -> Unavailable:
    return Unavailable(
        "ca_agent_slow", f"the ssh-agent did not answer within {ANSWERS_WITHIN:.0f} s", "check the agent and its token"
    )


def _malformed() -> Unavailable:
    return Unavailable(
        "ca_agent_malformed", "the reply is not one of an ssh-agent", "find out what answers at SIGNER_CA_AGENT_SOCKET"
    )


def _read_ca_key(blob: bytes) -> PublicKey:
    try:
        key = parse_public_key(binascii.b2a_base64(blob, newline=False).decode())
    except BadFormat:
        raise _malformed() from None
    check_ca_kind(key.kind, key.bits)
    return key


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly `count` bytes before `deadline` (monotonic seconds); raises `OSError`."""
    data = bytearray()
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError
        data += piece
    return bytes(data)
