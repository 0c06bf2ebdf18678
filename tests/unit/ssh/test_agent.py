"""Agent messages are what OpenSSH's own ssh-add sends, byte for byte."""

from __future__ import annotations

import base64
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from signer.errors import BadFormat, Unavailable
from signer.ssh import agent
from tests.parts.keys import Key, KeyRing, make_key, sign_with_ssh_keygen


def what_ssh_add_sends(key: Key, *arguments: str) -> list[bytes]:
    """The messages, lengths included, that ssh-add sends to an agent that agrees to everything."""
    messages = []
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()

        def serve() -> None:
            link, _ = listener.accept()
            with link, link.makefile("rb") as stream:
                while head := stream.read(4):
                    messages.append(head + stream.read(int.from_bytes(head, "big")))
                    link.sendall(b"\0\0\0\1\6")

        thread = threading.Thread(target=serve)
        thread.start()
        subprocess.run(
            ["ssh-add", *arguments, key.private],
            env={"SSH_AUTH_SOCK": f"{folder}/s", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            check=True,
        )
        thread.join(5)
    return messages


def halves(key: Key) -> tuple[bytes, bytes]:
    loaded = load_ssh_private_key(key.private.read_bytes(), None)
    assert isinstance(loaded, Ed25519PrivateKey)
    return loaded.private_bytes_raw(), loaded.public_key().public_bytes_raw()


@pytest.mark.unix_socket
def test_adding_a_certificate_is_byte_for_byte_what_ssh_add_sends(tmp_path: Path, keyring: KeyRing) -> None:
    key = make_key(tmp_path, "ed25519", comment="deploy-agent")
    line = sign_with_ssh_keygen(keyring("ed25519", "ca"), key).read_text()
    seed, public = halves(key)
    ours = agent.render_add_ed25519_certificate(
        base64.b64decode(line.split()[1]), seed, public, comment="deploy-agent", lifetime=900
    )
    theirs = what_ssh_add_sends(key, "-t", "900")
    assert bytes(ours) in theirs


def test_the_message_is_one_buffer_that_its_owner_can_wipe() -> None:
    message = agent.render_add_ed25519_certificate(b"c", b"\x07" * 32, b"\x08" * 32, comment="c", lifetime=1)
    assert isinstance(message, bytearray)
    assert message.count(b"\x07" * 32) == 1
    assert int.from_bytes(message[:4], "big") == len(message) - 4


@pytest.mark.parametrize(
    "seed,public,lifetime",
    [
        (b"", bytes(32), 1),
        (bytes(31), bytes(32), 1),
        (bytes(33), bytes(32), 1),
        (bytes(32), bytes(31), 1),
        (bytes(32), bytes(32), 0),
        (bytes(32), bytes(32), -1),
        (bytes(32), bytes(32), 2**32),
    ],
)
def test_a_key_of_the_wrong_size_or_without_an_end_is_not_rendered(seed: bytes, public: bytes, lifetime: int) -> None:
    with pytest.raises(BadFormat):
        agent.render_add_ed25519_certificate(b"c", seed, public, comment="", lifetime=lifetime)


def test_yes_is_accepted() -> None:
    agent.check_reply(b"\x06")


def test_no_is_an_agent_that_refused() -> None:
    with pytest.raises(Unavailable) as caught:
        agent.check_reply(b"\x05")
    assert caught.value.code == "agent_refused"


@pytest.mark.parametrize("body", [b"", b"\x06\x06", b"\x0c\0\0\0\0", b"\x1c"])
def test_any_other_reply_is_no_reply(body: bytes) -> None:
    with pytest.raises(BadFormat):
        agent.check_reply(body)


@pytest.mark.parametrize("head", [b"", b"\0\0\0", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\4\0\1"])
def test_a_reply_without_a_sensible_length_is_refused(head: bytes) -> None:
    with pytest.raises(BadFormat):
        agent.reply_length(head)


def test_a_reply_may_be_as_long_as_the_protocol_allows() -> None:
    assert agent.reply_length(b"\0\4\0\0") == 256 * 1024
