"""The api's unix sockets: who makes them, who may connect, and what is refused."""

from __future__ import annotations

import grp
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.errors import BadSettings, Unavailable
from signer.service.listeners import bind_listeners
from signer.settings import Settings, load_settings

pytestmark = pytest.mark.unix_socket


def settings(*paths: Path, **more: str) -> Settings:
    return load_settings({"SIGNER_LISTEN": ",".join(f"unix:{path}" for path in paths), **more})


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[list[socket.socket]]:
    made = bind_listeners(settings(tmp_path / "a", tmp_path / "b"))
    yield made
    for listener in made:
        listener.close()


def test_audit_c2_every_address_is_listened_on_and_others_may_not_connect(
    bound: list[socket.socket], tmp_path: Path
) -> None:
    assert [listener.getsockname() for listener in bound] == [str(tmp_path / "a"), str(tmp_path / "b")]
    for name in ("a", "b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o660
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / name))


def test_audit_c2_a_group_that_may_connect_owns_the_socket(tmp_path: Path) -> None:
    group = os.getegid()
    (listener,) = bind_listeners(settings(tmp_path / "a", SIGNER_SOCKET_GROUP=grp.getgrgid(group).gr_name))
    listener.close()
    assert (tmp_path / "a").stat().st_gid == group
    (listener,) = bind_listeners(settings(tmp_path / "b", SIGNER_SOCKET_GROUP=str(group)))
    listener.close()
    assert (tmp_path / "b").stat().st_gid == group
    with pytest.raises(BadSettings) as caught:
        bind_listeners(settings(tmp_path / "c", SIGNER_SOCKET_GROUP="nosuchgroup"))
    assert caught.value.code == "group_unknown"


def test_a_socket_that_nobody_listens_on_is_replaced(bound: list[socket.socket], tmp_path: Path) -> None:
    for listener in bound:
        listener.close()
    for listener in bind_listeners(settings(tmp_path / "a", tmp_path / "b")):
        with listener, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(listener.getsockname()))
            assert client.getpeername() == listener.getsockname()


@pytest.mark.parametrize("taken", ["a listener", "a file", "a folder"])
def test_what_is_there_is_not_replaced_and_nothing_stays_bound(
    taken: str, bound: list[socket.socket], tmp_path: Path
) -> None:
    path = tmp_path / ("a" if taken == "a listener" else "other")
    if taken == "a file":
        path.write_text("precious")
    elif taken == "a folder":
        path.mkdir()
    with pytest.raises(Unavailable) as caught:
        bind_listeners(settings(tmp_path / "fresh", path))
    assert caught.value.code == ("listen_in_use" if taken == "a listener" else "listen_failed")
    assert str(path) in caught.value.text
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(tmp_path / "fresh"))
    assert path.exists()
