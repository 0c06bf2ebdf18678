"""What a command says when the launcher's socket is there and no launcher answers on it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from signer.errors import Unavailable
from signer.service.control import NAME, ask_launcher
from signer.settings import load_settings

pytestmark = pytest.mark.unix_socket


@pytest.mark.parametrize(
    "answer, text",
    [
        (b"", "`signer serve` ended before it answered"),
        (b"not JSON", "`signer serve` sent no valid answer"),
        (b"[]", "`signer serve` sent no valid answer"),
    ],
)
def test_a_launcher_that_ends_or_talks_nonsense_is_said_so(tmp_path: Path, answer: bytes, text: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / NAME))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(100)
                if answer:
                    client.send(answer)

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(Unavailable) as failed:
            ask_launcher(load_settings({"SIGNER_RUN_DIR": str(tmp_path)}), "status")
        server.join(10)
    assert (failed.value.code, failed.value.text) == ("launcher_silent", text)


def test_a_launcher_that_takes_no_more_connections_is_not_running(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / NAME))
    with pytest.raises(Unavailable, match="no `signer serve` listens") as failed:
        ask_launcher(load_settings({"SIGNER_RUN_DIR": str(tmp_path)}), "status")
    assert failed.value.code == "launcher_not_running"
