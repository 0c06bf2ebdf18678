"""What the log's side does with a witness that does not speak as it should, over real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from signer.errors import Unavailable
from signer.witness import remote as remote_module
from signer.witness.client import MAX_ANSWER, Answer
from signer.witness.remote import HttpWitness
from tests.parts import ports

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


@contextmanager
def peer(answer: Callable[[socket.socket], None]) -> Iterator[tuple[HttpWitness, list[bytes]]]:
    """A server whose connections are answered so, a link to it, and the first bytes of each connection."""
    heads: list[bytes] = []
    with socket.create_server((ports.LOOPBACK, 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    heads.append(connection.recv(65536))
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with HttpWitness(f"http://{ports.LOOPBACK}:{listener.getsockname()[1]}/") as link:
                yield link, heads
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def sending(*parts: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)

    return answer


def test_an_answer_is_passed_on_and_no_secret_is_sent() -> None:
    with peer(sending(HEAD % 2, b"ok")) as (link, heads):
        assert link.ask("/add-checkpoint", b"old 0\n") == Answer(200, b"ok")
        assert link.ask("/x/checkpoint") == Answer(200, b"ok")
    assert heads[0].startswith(b"POST /add-checkpoint HTTP/1.1\r\n")
    assert heads[1].startswith(b"GET /x/checkpoint HTTP/1.1\r\n")
    assert not any(b"authorization" in head.lower() for head in heads)


def test_a_redirect_is_not_followed() -> None:
    redirect = b"HTTP/1.1 307 T\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with peer(sending(redirect)) as (link, heads):
        assert link.ask("/add-checkpoint", b"") == Answer(307, b"")
    assert len(heads) == 1


@pytest.mark.parametrize(
    "parts",
    [
        (b"",),
        (HEAD % 10, b"half"),
        (HEAD % (MAX_ANSWER + 1), b"x" * (MAX_ANSWER + 1)),
        (b"\x00" * 100,),
    ],
    ids=["nothing", "half", "too large", "no http"],
)
def test_without_a_whole_answer_it_is_unreachable(parts: tuple[bytes, ...]) -> None:
    with peer(sending(*parts)) as (link, _), pytest.raises(Unavailable) as caught:
        link.ask("/x")
    assert caught.value.code == "witness_unreachable"


def test_one_that_hangs_or_drips_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "ANSWERS_WITHIN", 0.5)
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(HEAD % 1000)
        while not over.wait(0.1):
            try:
                connection.sendall(b"x")
            except OSError:
                return

    def hang(_: socket.socket) -> None:
        over.wait(30)

    for answer in (drip, hang):
        with peer(answer) as (link, _):
            with pytest.raises(Unavailable) as caught:
                link.ask("/x")
            over.set()
        over.clear()
        assert "no answer in time" in caught.value.text


def test_nobody_there_is_unreachable() -> None:
    with HttpWitness(f"http://{ports.LOOPBACK}:{ports.free_port()}") as link, pytest.raises(Unavailable):
        link.ask("/x")
