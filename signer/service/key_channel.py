"""A channel that passes the opened CA key file to a keeper that may no longer open it.

At a reload the launcher, still root, opens the file without reading it and sends the descriptor through a socket that
only the keeper inherits. The keeper makes all checks, on the descriptor. No byte of the key passes the channel. What
children send the other way is in `supervisor.py`.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from signer.files import held, open_unread

_ERRNO: Final = struct.Struct("i")  # why the file could not be opened; 0 with a descriptor
_DESCRIPTOR: Final = struct.Struct("i")


def make_channel() -> tuple[socket.socket, socket.socket]:
    """The launcher's and the child's end; both are non-blocking and not inheritable."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setblocking(False)
    return ours, theirs


def hand_over(channel: socket.socket, path: Path) -> None:
    """Opens the file; sends its descriptor or the reason of the failure. Raises `OSError` if sending fails."""
    try:
        descriptor = open_unread(path)
    except OSError as error:
        channel.send(_ERRNO.pack(error.errno or 0))
        return
    with held(descriptor):
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(descriptor))
        channel.sendmsg([_ERRNO.pack(0)], [rights])


def take_over(channel: socket.socket) -> int | None:
    """The newest descriptor, None if none was sent; raises the `OSError` with which the launcher failed."""
    newest: int | OSError | None = None
    with suppress(BlockingIOError):  # no more messages
        while message := _receive(channel):
            if isinstance(newest, int):
                os.close(newest)
            newest = message[0]
    if isinstance(newest, OSError):
        raise newest
    return newest


def _receive(channel: socket.socket) -> tuple[int | OSError] | None:
    """One message; None if the launcher closed the channel. Raises `BlockingIOError` if there is no message."""
    # Not `socket.recv_fds`: it ignores its flags (Python 3.11), and the descriptor would be inheritable.
    room = socket.CMSG_LEN(_DESCRIPTOR.size)
    data, sent, _, _ = channel.recvmsg(_ERRNO.size, room, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    for _, _, descriptor in sent:
        return (_DESCRIPTOR.unpack(descriptor)[0],)
    number = _ERRNO.unpack(data)[0]
    return (OSError(number, os.strerror(number)),)
