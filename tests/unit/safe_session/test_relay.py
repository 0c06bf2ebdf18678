"""What stands between ssh and the private agent passes on whole messages, and ends when either side does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.safe_session.relay import AgentRelay

pytestmark = pytest.mark.unix_socket

REQUEST = b"\0\0\0\1\x0b"  # SSH_AGENTC_REQUEST_IDENTITIES
REPLY = b"\0\0\0\5\x0c\0\0\0\0"  # no identities


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[socket.socket]:
    """Where the relay finds its agent; a test answers as it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent"))
        listener.listen()
        listener.settimeout(10)
        yield listener


@pytest.fixture
def client(agent: socket.socket, tmp_path: Path) -> Iterator[socket.socket]:
    """A connection to the relay, as of ssh."""
    with (
        AgentRelay(str(agent.getsockname()), str(tmp_path / "relay")),
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.settimeout(10)
        connection.connect(str(tmp_path / "relay"))
        yield connection


def test_a_request_in_pieces_reaches_the_agent_whole_and_its_reply_the_client(
    agent: socket.socket, client: socket.socket
) -> None:
    for piece in (REQUEST[:2], REQUEST[2:]):
        client.sendall(piece)
    with agent.accept()[0] as asked:
        assert asked.recv(100) == REQUEST
        asked.sendall(REPLY)
        assert client.recv(100) == REPLY


@pytest.mark.parametrize("reply", [b"", REPLY[:6]])
def test_an_agent_that_ends_before_its_reply_ends_the_connection(
    agent: socket.socket, client: socket.socket, reply: bytes
) -> None:
    """ssh waits for a reply without a limit, so a login would hang."""
    client.sendall(REQUEST)
    with agent.accept()[0] as asked:
        assert asked.recv(100) == REQUEST
        asked.sendall(reply)
    assert client.recv(100) == b""


def test_what_is_no_message_ends_the_connection(agent: socket.socket, client: socket.socket) -> None:
    client.sendall(b"\0\0\0\0")
    with agent.accept()[0] as asked:
        assert client.recv(100) == b""
        assert asked.recv(100) == b""
