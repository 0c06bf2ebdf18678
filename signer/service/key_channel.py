"""How the CA key file comes, opened, to a keeper that may no longer open it.

The launcher is still root: on SIGHUP it opens the file, never reads it, and passes the descriptor on through a socket
that only this keeper has inherited. All checks are the keeper's, on the descriptor. No key byte passes through here.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from signer.files import open_unread

_ERRNO: Final = struct.Struct("i")  # why the file could not be opened, 0 when a descriptor comes along

_DESCRIPTOR: Final = struct.Struct("i")


def make_channel() -> tuple[socket.socket, socket.socket]:
    """The launcher's end and the keeper's. Neither is inherited unless asked for; neither ever waits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setblocking(False)
    return ours, theirs


def adopt_channel(number: int) -> socket.socket:
    """The keeper's end, by the number of the descriptor that it inherited."""
    channel = socket.socket(fileno=number)
    channel.set_inheritable(False)
    return channel


def hand_over(channel: socket.socket, path: Path) -> None:
    """Sends the file as it is now, or why it cannot be opened. Raises `OSError` if the keeper takes no message."""
    try:
        descriptor = open_unread(path)
    except OSError as error:
        channel.send(_ERRNO.pack(error.errno or 0))
        return
    try:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(descriptor))
        channel.sendmsg([_ERRNO.pack(0)], [rights])
    finally:
        os.close(descriptor)


def take_over(channel: socket.socket) -> int | None:
    """The descriptor that was sent last, None if nothing was sent since; raises the `OSError` of the launcher."""
    newest: int | OSError | None = None
    with suppress(BlockingIOError):  # all was read
        while message := _receive(channel):
            if isinstance(newest, int):
                os.close(newest)
            newest = message[0]
    if isinstance(newest, OSError):
        raise newest
    return newest


def _receive(channel: socket.socket) -> tuple[int | OSError] | None:
    """One message; None when the launcher is gone. Raises `BlockingIOError` when there is none."""
    # Not `socket.recv_fds`: it leaves out the flags that it is given (Python 3.11), and the file would be inheritable.
    room = socket.CMSG_LEN(_DESCRIPTOR.size)
    data, sent, _, _ = channel.recvmsg(_ERRNO.size, room, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    for _, _, descriptor in sent:
        return (_DESCRIPTOR.unpack(descriptor)[0],)
    number = _ERRNO.unpack(data)[0]
    return (OSError(number, os.strerror(number)),)
