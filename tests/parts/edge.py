"""Client connections of the HTTP edge without sockets: bytes go in, bytes come out."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from signer.api.edge import Api, ClientConnection, Connections, EdgeServer, Phase, make_config
from signer.protocol.log_limit import LogLimit

log = logging.getLogger("test.edge")
Asgi = Callable[..., Awaitable[None]]


class FakeTransport(asyncio.Transport):
    """The other side of a connection; takes everything, unless it `is_full`."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = bytearray()
        self.protocol: ClientConnection | None = None
        self.is_full = False
        self.has_ended = self.is_paused = self.is_lost = False

    def write(self, data: Any) -> None:
        self.taken += data
        if self.is_full and self.protocol is not None:
            self.protocol.pause_writing()

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            if self.protocol is not None:
                self.protocol.connection_lost(None)

    def is_closing(self) -> bool:
        return self.is_lost

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_ended = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert (high, low) == (0, 0)

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class _AsgiAlone:
    """What the server asks of an application that is a bare ASGI callable."""

    def sign_at_once(self, *_request: object) -> bool:
        return False


class Clients:
    """The connections of a worker that serves `app`; belongs to a running loop."""

    def __init__(self, app: Asgi, most: int = 1000, lines: LogLimit | None = None) -> None:
        config = make_config(app)
        config.load()
        self.registry = Connections(most, 75, lines or LogLimit(log))
        api = app if hasattr(app, "sign_at_once") else _AsgiAlone()
        self.server = EdgeServer(config, self.registry, cast(Api, api))

    def connect(self, peer: str = "192.0.2.7") -> tuple[ClientConnection, FakeTransport]:
        """A new connection."""
        transport = FakeTransport()
        sock = cast(socket.socket, None)  # only a handshake of TLS needs it
        connection = ClientConnection(self.server.config, self.server, sock, (peer, 4711), peer, None)
        transport.protocol = connection
        self.registry.add(connection)
        connection.connection_made(transport)
        return connection, transport


async def settle(connection: ClientConnection) -> None:
    """Returns when the connection waits for its client."""
    deadline = time.monotonic() + 10
    while connection.phase is Phase.BUSY and not connection.transport.is_closing():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def exchange(app: Asgi, pieces: Iterable[bytes], lines: LogLimit | None = None) -> tuple[bytes, Phase]:
    """What a new connection answers to those pieces, and what it waits for then."""

    async def run() -> tuple[bytes, Phase]:
        connection, transport = Clients(app, lines=lines).connect()
        for piece in pieces:
            connection.data_received(piece)
        await settle(connection)
        return bytes(transport.taken), connection.phase

    return asyncio.run(run())
