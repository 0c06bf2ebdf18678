"""The launcher's control socket, and how `signer reload` and `signer check` ask it.

The socket is `launcher.sock` in SIGNER_RUN_DIR, mode 0600, owned by the keeper's user. One request and one reply a
connection, each a JSON object. The launcher answers root, its own user and the keeper's user (SO_PEERCRED), and needs
no other credential: a request names nothing but an operation.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from signer.errors import SignerError, Unavailable
from signer.files import identity_of, undone_by
from signer.hardening import acting_as, look_up_user, peer_process
from signer.service.child import Ids
from signer.service.supervisor import MAX_MESSAGE
from signer.settings import Settings

NAME: Final = "launcher.sock"
MAX_CLIENTS: Final = 8
MAX_REQUEST: Final = 1024  # bytes
ASKS_WITHIN: Final = 5.0  # seconds from a connection to its request
ANSWERED_WITHIN: Final = 60.0  # seconds for a reply; the launcher gives up on a reload before
_BACKLOG: Final = 8
OPERATIONS: Final = ("reload", "status")
_NOT_ALLOWED: Final = SignerError("launcher_not_yours", "this user may not control the service", "run this as root")
_MALFORMED: Final = SignerError("launcher_request_malformed", "the request is not valid", "use the version that runs")


@dataclass(eq=False)
class Client:
    """One connection to the control socket."""

    connection: socket.socket
    since: float  # monotonic seconds
    is_allowed: bool

    def answer(self, reply: dict[str, object]) -> None:
        """Sends the reply and closes the connection; a client that is gone misses it."""
        with suppress(OSError):
            self.connection.send(json.dumps(reply, ensure_ascii=False).encode(errors="replace"))
        self.connection.close()


class ControlSocket:
    """The launcher's side; no method blocks."""

    def __init__(self, run_dir: Path, owner: Ids | None) -> None:
        self._path = run_dir / NAME
        self._owner_id = None if owner is None else owner.user
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None  # device and inode of the socket's name
        self._clients: list[Client] = []
        self._allowed = {0, os.geteuid(), os.geteuid() if owner is None else owner.user}

    def ensure(self) -> None:
        """Listens, also if the name of the socket was removed or replaced meanwhile; raises `OSError`."""
        if self._listener is not None and self._identity == identity_of(self._path):
            return
        self._close_listener()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with undone_by(listener.close):
            listener.setblocking(False)
            # The directory is the keeper's, and root in a container may not write there.
            with acting_as(self._owner_id):
                self._path.unlink(missing_ok=True)
                former = os.umask(0o177)
                try:
                    listener.bind(str(self._path))
                finally:
                    os.umask(former)
            listener.listen(_BACKLOG)
            self._identity = identity_of(self._path)
        self._listener = listener

    def requests(self) -> Iterator[tuple[Client, str]]:
        """The operations that were asked for since the last call."""
        self._accept()
        for client in list(self._clients):
            try:
                data = client.connection.recv(MAX_REQUEST)
            except BlockingIOError:
                if time.monotonic() - client.since > ASKS_WITHIN:
                    self._drop(client)
                continue
            except OSError:
                data = b""
            self._clients.remove(client)
            operation = _operation(data)
            if not client.is_allowed:  # answered only now: a close before the request is read would lose the answer
                client.answer(error_reply(_NOT_ALLOWED))
            elif operation is None:
                client.answer(error_reply(_MALFORMED))
            else:
                yield client, operation

    def _accept(self) -> None:
        if self._listener is None:
            return
        for _ in range(MAX_CLIENTS):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody waits, or descriptors are short: they wait in the queue
                return
            connection.setblocking(False)
            if len(self._clients) >= MAX_CLIENTS:
                self._drop(self._clients[0])
            is_allowed = peer_process(connection).uid in self._allowed
            self._clients.append(Client(connection, time.monotonic(), is_allowed))

    def _drop(self, client: Client) -> None:
        self._clients.remove(client)
        client.connection.close()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = self._identity = None

    def close(self) -> None:
        """Stops to listen and removes the socket's name."""
        for client in list(self._clients):
            self._drop(client)
        is_ours = self._identity is not None and self._identity == identity_of(self._path)
        self._close_listener()
        if is_ours:
            with suppress(OSError), acting_as(self._owner_id):  # a stale name is replaced at the next start
                self._path.unlink(missing_ok=True)


def ask_launcher(settings: Settings, operation: str) -> dict[str, Any]:
    """The reply of the launcher of SIGNER_RUN_DIR; raises `Unavailable`, or the error that it sent.

    Root in a container may not use a socket of another user, and asks as the keeper's user then.
    """
    path = settings.run_dir / NAME
    try:
        try:
            reply = _ask(path, operation)
        except PermissionError:
            if os.geteuid() != 0 or settings.keeper_user is None:
                raise
            with acting_as(look_up_user(settings.keeper_user).pw_uid):
                reply = _ask(path, operation)
    except PermissionError:
        raise Unavailable(
            "launcher_not_yours",
            f"user {os.geteuid()} may not use {path}",
            "run this as root or as the keeper's user, with the environment of the service",
        ) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise Unavailable(
            "launcher_not_running",
            f"no `signer serve` listens on {path}",
            "set SIGNER_RUN_DIR to that of the service; systemd units: `systemctl reload signer-keeper signer-api`",
        ) from None
    except TimeoutError:
        raise _silent(f"did not answer within {ANSWERED_WITHIN:.0f} s") from None
    except OSError as error:
        raise _silent(f"did not answer: {error.strerror}") from None
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise _silent("sent no valid answer")
    if isinstance(fault := reply.get("error"), dict):
        raise Unavailable(str(fault.get("code")), str(fault.get("text")), str(fault.get("hint")))
    return reply


def _ask(path: Path, operation: str) -> Any:
    path.lstat()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(ANSWERED_WITHIN)
        connection.connect(str(path))
        connection.send(json.dumps({"op": operation}).encode())
        answer = connection.recv(MAX_MESSAGE * 2)
    if not answer:
        raise _silent("ended before it answered")
    return json.loads(answer)


def _silent(how: str) -> Unavailable:
    return Unavailable("launcher_silent", f"`signer serve` {how}", "see the service's log")


def find_running(settings: Settings) -> str | None:
    """What serves in SIGNER_RUN_DIR, in words; None if nothing does, or this user cannot see it."""
    try:
        status = ask_launcher(settings, "status")
    except SignerError:
        return _find_keeper(settings)
    return f"`signer serve`, process {status.get('pid')}"


def _find_keeper(settings: Settings) -> str | None:
    """A keeper without launcher, as systemd starts it."""
    try:
        settings.socket.lstat()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
            probe.settimeout(1)
            probe.connect(str(settings.socket))
            return f"the keeper, process {peer_process(probe).pid}"
    except OSError:
        return None


def _operation(data: bytes) -> str | None:
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        return None
    operation = request.get("op") if isinstance(request, dict) else None
    return operation if isinstance(operation, str) and operation in OPERATIONS else None


def error_reply(error: SignerError) -> dict[str, object]:
    return {"error": error.as_json()}
