"""What a command prints on a terminal of a given width."""

from __future__ import annotations

import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from fcntl import ioctl


def shown_on_terminal(argv: Sequence[str | os.PathLike[str]], environ: Mapping[str, str], columns: int) -> str:
    """All that it prints, with the line ends of a pipe; fails if it has not ended a minute after its output."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(argv, env=environ, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        parts = []
        while part := _read(leader):
            parts.append(part)
        process.wait(60)
    os.close(leader)
    return b"".join(parts).decode().replace("\r\n", "\n")


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # EIO: nothing holds the other end any more
        return b""
