"""Clients that wait for a decision: which requests are such, and what wakes them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from signer.api.waiting import RECONNECT_AFTER, Waiters, wait_call
from signer.protocol.replies import Changes, encode_reply
from signer.settings import load_settings

PROXIES = load_settings({}).proxies
NAME, OTHER = "r-abcdefghij", "r-zzzzzzzzzz"


@pytest.mark.parametrize(
    "method, path, query, is_one",
    [
        ("GET", f"/api/requests/{NAME}", "wait=50", True),
        ("GET", f"/api/requests/{NAME}", "wait=1", True),
        ("GET", f"/api/requests/{NAME}", "wait=51", False),
        ("GET", f"/api/requests/{NAME}", "wait=0", False),
        ("GET", f"/api/requests/{NAME}", "wait=5&wait=5", False),
        ("GET", f"/api/requests/{NAME}", "", False),
        ("GET", f"/api/requests/{NAME}/claim", "wait=5", False),
        ("GET", "/api/requests/r-1", "wait=5", False),
        ("GET", "/api/requests/r-ABCDEFGHIJ", "wait=5", False),
        ("POST", f"/api/requests/{NAME}", "wait=5", False),
    ],
)
def test_a_client_waits_only_for_a_request_and_only_as_long_as_allowed(
    method: str, path: str, query: str, is_one: bool
) -> None:
    environ = {"REQUEST_METHOD": method, "RAW_PATH": path, "QUERY_STRING": query, "REMOTE_ADDR": "127.0.0.1"}
    assert (wait_call(environ, PROXIES) is not None) is is_one


class Keeper:
    """The other end of a `watch` connection, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "k"
        self.now = 100.0
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.waiters = Waiters(self.path, lambda: self.now)

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(5)
        assert connection.recv(1000) == b'1 {"op": "watch"}\n'
        return connection


def run(folder: Path, story: Callable[[Keeper], Awaitable[None]]) -> None:
    async def tell() -> None:
        keeper = Keeper(folder)
        try:
            await story(keeper)
        finally:
            keeper.waiters.close()
            keeper.listener.close()

    asyncio.run(tell())


async def pause() -> None:
    for _ in range(20):
        await asyncio.sleep(0.005)


def changes(*names: str) -> bytes:
    return b"1 " + encode_reply(Changes(requests=list(names)))


@pytest.mark.unix_socket
def test_a_change_wakes_those_who_wait_for_it_and_an_unnamed_one_wakes_all(tmp_path: Path) -> None:
    async def story(keeper: Keeper) -> None:
        own, other = keeper.waiters.add(NAME), keeper.waiters.add(OTHER)
        with keeper.accept() as connection:
            connection.send(changes(NAME))
            await asyncio.wait_for(own.wait(), 5)
            assert not other.is_set()
            own.clear()
            connection.send(changes())
            await asyncio.wait_for(asyncio.gather(own.wait(), other.wait()), 5)
            keeper.waiters.remove(NAME, own)
            keeper.waiters.remove(OTHER, other)
            connection.send(changes(NAME))  # nobody waits any more
            await pause()

    run(tmp_path, story)


@pytest.mark.unix_socket
@pytest.mark.parametrize("end", [b"", b"2 " + encode_reply(Changes(requests=[])), b"1 junk", b"1 Error\n{}"])
def test_a_connection_that_ends_or_lies_is_opened_again_after_a_pause(tmp_path: Path, end: bytes) -> None:
    async def story(keeper: Keeper) -> None:
        own = keeper.waiters.add(NAME)
        with keeper.accept() as connection:
            if end:
                connection.send(end)
            else:
                connection.close()
            await pause()
            assert not own.is_set()
            keeper.waiters.chores()
            keeper.listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                keeper.listener.accept()
        keeper.now += RECONNECT_AFTER
        keeper.waiters.chores()
        with keeper.accept() as connection:
            connection.send(changes())
            await asyncio.wait_for(own.wait(), 5)

    run(tmp_path, story)


@pytest.mark.unix_socket
def test_a_keeper_that_is_away_is_looked_for_again(tmp_path: Path) -> None:
    async def story(keeper: Keeper) -> None:
        keeper.listener.close()
        keeper.waiters.add(NAME)
        keeper.waiters.chores()
        keeper.path.unlink()
        keeper.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keeper.listener.bind(str(keeper.path))
        keeper.listener.listen()
        keeper.now += RECONNECT_AFTER
        keeper.waiters.chores()
        keeper.accept().close()
        await pause()

    run(tmp_path, story)
