"""HTTP calls through `requests` with bounded time and memory.

The time limit of `requests` applies to each read, so a server that sends a byte a second can hold a thread for days.
Here one limit covers the whole call: a watcher thread shuts the connection down at the deadline.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import requests
import urllib3.connection
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from signer.address import check_peer

MAX_BODY: Final = 1024 * 1024  # bytes
CONNECT_WITHIN: Final = 1.0  # seconds; also for the TLS handshake
LOOK_EVERY: Final = 0.2  # seconds between two checks of the deadlines
Connect = Callable[[float], socket.socket]
_calls = threading.local()  # .now: the call that this thread makes


class _Call:
    """One or more requests of one thread under one deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.is_over = False
        self.sock: socket.socket | None = None

    def end(self) -> None:
        """Shuts the connection down, which wakes the waiting thread."""
        self.is_over = True
        if self.sock is not None:
            with suppress(OSError):  # already closed
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # the socket below TLS: no TLS close handshake


class Watch:
    """Ends the calls of all threads at their deadlines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[_Call] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="http-watch", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Requests of this thread inside the block fail with `requests.exceptions.Timeout` after the deadline."""
        call = _Call(time.monotonic() + seconds)
        _calls.now = call
        with self._lock:
            self._running.add(call)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(call)
            _calls.now = None

    def _look(self) -> None:
        while not self._stop.wait(LOOK_EVERY):
            with self._lock:  # held while ending, so that a later call of the same thread is not hit
                for call in self._running:
                    if time.monotonic() >= call.deadline:
                        call.end()

    def close(self) -> None:
        """Ends every running call and the watcher thread."""
        self._stop.set()
        with self._lock:
            for call in self._running:
                call.end()
        self._thread.join()


class Watched:
    """A client whose calls end at their deadlines. For use in a `with` statement, which ends its watcher thread."""

    def __init__(self) -> None:
        self._watch = Watch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._watch.close()


class _Noted(urllib3.connection.HTTPConnection):
    """Tells the call of this thread its socket."""

    def connect(self) -> None:
        super().connect()
        _calls.now.sock = self.sock

    def request(self, *args: Any, **options: Any) -> None:
        _calls.now.sock = self.sock  # a kept-alive connection does not connect again
        super().request(*args, **options)


def _pools_of(connect: Connect | None, *, carries_secrets: bool) -> dict[str, type[HTTPConnectionPool]]:
    """Pools by scheme, whose connections use the sockets that `connect` returns, if there is one."""

    class Connection(_Noted):
        def _new_conn(self) -> socket.socket:
            return super()._new_conn() if connect is None else connect(float(self.timeout or CONNECT_WITHIN))

    class PlainConnection(Connection):
        def connect(self) -> None:
            super().connect()
            if carries_secrets and self.sock.family != socket.AF_UNIX:  # a name may have become another machine's
                check_peer("http", str(self.sock.getpeername()[0]), f"http://{self.host}")

    class TlsConnection(Connection, urllib3.connection.HTTPSConnection):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = PlainConnection

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = TlsConnection

    return {"http": Pool, "https": TlsPool}


class _Adapter(HTTPAdapter):
    """Reads the whole body, up to its limit, so that no caller reads from the network."""

    def __init__(self, max_body: int, pools: Mapping[str, type[HTTPConnectionPool]], *, cuts_body: bool) -> None:
        self._max_body = max_body  # bytes
        self._cuts_body = cuts_body
        self._pools = pools
        super().__init__(pool_connections=1, pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def send(self, request: requests.PreparedRequest, *_: Any, **options: Any) -> requests.Response:
        call: _Call = _calls.now
        remaining = call.deadline - time.monotonic()
        if remaining <= 0:
            raise requests.exceptions.ReadTimeout("no time is left", request=request)
        limits = {**options, "stream": True, "timeout": (min(CONNECT_WITHIN, remaining), remaining)}
        try:
            response = super().send(request, **limits)
            with closing(response):
                body = response.raw.read(self._max_body + 1, decode_content=False)
        except (HTTPError, OSError) as error:  # exceptions of `requests` are also OSErrors
            if call.is_over:
                raise requests.exceptions.ReadTimeout("the time was up", request=request) from None
            if isinstance(error, requests.exceptions.RequestException):
                raise
            raise requests.exceptions.ConnectionError(type(error).__name__, request=request) from None
        if call.is_over:  # a shutdown may look like the end of the body
            raise requests.exceptions.ReadTimeout("the time was up", request=request)
        if self._cuts_body:
            body = body[: self._max_body]
        elif len(body) > self._max_body:
            raise requests.exceptions.ContentDecodingError("the body is too large", request=request)
        if response.raw.length_remaining and not self._cuts_body:  # urllib3 tells only whoever reads once more
            raise requests.exceptions.ConnectionError("the body was cut off", request=request)
        response.raw = io.BytesIO(body)
        return response


def new_session(
    tls_ca_file: Path | None = None,
    max_body: int = MAX_BODY,
    connect: Connect | None = None,
    *,
    carries_secrets: bool = True,
    cuts_body: bool = False,
) -> requests.Session:
    """A session for one thread, for use inside `Watch.within`. Ignores the environment, including proxies.

    An answer of more than `max_body` bytes is an error, or cut off if `cuts_body`. `connect(seconds)` returns a
    connected socket; exceptions other than `OSError` pass through unchanged. Unless it `carries_secrets`, plain http
    may go to another machine.
    """
    session = requests.Session()
    session.trust_env = False
    if tls_ca_file is not None:
        session.verify = str(tls_ca_file)
    session.headers["Accept-Encoding"] = "identity"
    pools = _pools_of(connect, carries_secrets=carries_secrets)
    for prefix in ("http://", "https://"):
        session.mount(prefix, _Adapter(max_body, pools, cuts_body=cuts_body))
    return session
