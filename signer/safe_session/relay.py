"""Passes the messages between ssh and the private agent on, and notes how each login went.

Status 255 of ssh is also that of a connection that broke, and of a host that was not found. What ssh asks the agent
tells them apart: OpenSSH binds the connection to the session and lists the keys once it comes to authentication, and
asks for a signature only after the host has accepted the certificate.
"""

# ruff: noqa: PTH108
# (pathlib costs more to import than everything here)

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import _thread
import os

from signer.errors import BadFormat, Unavailable
from signer.safe_session.agent import read_message
from signer.safe_session.command import HANDLED_SIGNALS

_REQUEST_IDENTITIES = 11  # SSH_AGENTC_REQUEST_IDENTITIES
_SIGN_RESPONSE = 14  # SSH_AGENT_SIGN_RESPONSE
# SSH_AGENTC_EXTENSION and the name of OpenSSH's extension (PROTOCOL.agent, section 1); ssh sends it since 8.9.
_SESSION_BIND = b"\x1b\x00\x00\x00\x18session-bind@openssh.com"
_MAX_CONNECTIONS = 512
_STACK = 256 * 1024  # bytes; a thread for each connection
_BACKLOG = 128


class _Login:
    """What one connection has asked the agent for."""

    def __init__(self) -> None:
        self.is_bound = self.lists_keys = self.is_signed = False

    def is_refused(self) -> bool:
        return self.is_bound and self.lists_keys and not self.is_signed


class AgentRelay:
    """Listens at `path` for the agent at `agent`; use as a context manager. Raises `Unavailable`."""

    def __init__(self, agent: str, path: str) -> None:
        self.path = path
        self._agent = agent
        self._logins: set[_Login] = set()  # of the open connections
        self._was_refused = False  # by a host whose connection is closed
        self._lock = _thread.allocate_lock()
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        before = os.umask(0o177)  # only this user's processes connect, as to the agent's own socket
        try:
            self._listener.bind(path)
            self._listener.listen(_BACKLOG)
        except OSError as error:
            self._listener.close()
            reason = (error.strerror or "unknown reason").lower()
            raise Unavailable("no_agent", f"cannot listen beside the private ssh-agent: {reason}") from None
        finally:
            os.umask(before)
        _thread.stack_size(_STACK)
        # A thread that blocked no signal would take those that `command.run` blocks: a Ctrl-C right after the command
        # began would end this process instead of the command.
        before = _signal.pthread_sigmask(_signal.SIG_BLOCK, HANDLED_SIGNALS)
        try:
            _thread.start_new_thread(self._accept, ())  # which inherits what is blocked, as do those that it starts
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, before)

    def __enter__(self) -> AgentRelay:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._listener.shutdown(_socket.SHUT_RDWR)
            os.unlink(self.path)
        except OSError:
            pass  # the private folder is gone already
        self._listener.close()

    def was_refused(self) -> bool:
        """True if some host came to authentication and did not accept the certificate."""
        with self._lock:
            return self._was_refused or any(login.is_refused() for login in self._logins)

    def _accept(self) -> None:
        while True:
            try:
                descriptor, _ = self._listener._accept()  # type: ignore[attr-defined]  # what `socket.accept` calls
            except OSError:
                return
            client, login = _socket.socket(fileno=descriptor), _Login()
            with self._lock:
                has_room = len(self._logins) < _MAX_CONNECTIONS
                if has_room:
                    self._logins.add(login)
            if has_room:
                _thread.start_new_thread(self._pass_on, (client, login))
            else:
                client.close()

    def _pass_on(self, client: _socket.socket, login: _Login) -> None:
        """One request and one reply at a time, as the agent itself answers them (RFC 9987 section 3)."""
        agent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            agent.connect(self._agent)
            while request := read_message(client):
                agent.sendall(request)
                if not (reply := read_message(agent)):
                    return
                if request.startswith(_SESSION_BIND, 4):
                    login.is_bound = True
                elif request[4] == _REQUEST_IDENTITIES:
                    login.lists_keys = True
                elif reply[4:5] == bytes([_SIGN_RESPONSE]):
                    login.is_signed = True
                client.sendall(reply)
        except (OSError, BadFormat):
            pass  # either side has ended, or speaks another protocol
        finally:
            client.close()
            agent.close()
            with self._lock:
                self._was_refused = self._was_refused or login.is_refused()
                self._logins.discard(login)
