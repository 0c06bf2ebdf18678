"""The sockets that the api listens on: bound before root is given up, and kept while the api restarts.

`signer serve` binds them and keeps them open; natively systemd does (`signer-api.socket`). `signer api` gets them as
descriptors. What a socket is bound to decides whether it needs TLS or a named proxy, not what a setting says.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from signer.errors import BadSettings, Unavailable
from signer.files import undone_by
from signer.settings import Listen, Settings, names_proxies

BACKLOG: Final = 1024
_UNIX_MODE: Final = 0o660
_FIRST_OF_SYSTEMD: Final = 3  # sd_listen_fds(3)


def bind_listeners(settings: Settings) -> list[socket.socket]:
    """Listens on every address of SIGNER_LISTEN; raises `Unavailable` or `BadSettings`, and then listens on none."""
    with contextlib.ExitStack() as bound:
        listeners = [bound.enter_context(bind_listener(listen, settings.socket_group)) for listen in settings.listen]
        bound.pop_all()
        return listeners


def adopt_listeners(descriptors: Iterable[int], environ: Mapping[str, str]) -> list[socket.socket]:
    """The listening sockets that a parent passed: by number, or by systemd's LISTEN_FDS; raises `BadSettings`."""
    numbers = [*descriptors]
    if environ.get("LISTEN_PID") == str(os.getpid()) and environ.get("LISTEN_FDS", "").isdecimal():
        numbers += range(_FIRST_OF_SYSTEMD, _FIRST_OF_SYSTEMD + int(environ["LISTEN_FDS"]))
    listeners = []
    for number in numbers:
        try:
            listener = socket.socket(fileno=number)
            if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError
        except OSError:
            raise BadSettings(
                "listener_unusable",
                f"descriptor {number} is not a listening socket",
                "fix signer-api.socket, or start `signer serve`",
            ) from None
        listener.set_inheritable(False)
        listeners.append(listener)
    return listeners


def check_listeners(listeners: Iterable[socket.socket], settings: Settings) -> None:
    """Raises `BadSettings` for a socket that other hosts reach, without TLS and without a named proxy."""
    if settings.tls_cert_file is not None or names_proxies(settings.trusted_proxies):
        return
    for listener in listeners:
        name = listener.getsockname()
        if listener.family != socket.AF_UNIX and not ipaddress.ip_address(name[0].partition("%")[0]).is_loopback:
            raise BadSettings(
                "listener_exposed",
                f"the socket at {Listen(None, name[0], name[1])} is beyond loopback and would take tokens in the clear",
                "set SIGNER_TLS_CERT_FILE and SIGNER_TLS_KEY_FILE, or name the proxies in SIGNER_TRUSTED_PROXIES",
            )


def bind_listener(listen: Listen, group: str | None) -> socket.socket:
    """Listens on one address; raises `Unavailable` or `BadSettings`."""
    try:
        if listen.path is not None:
            return _bind_unix(listen.path, group)
        listener = _make_tcp(listen)
        with undone_by(listener.close):
            listener.bind((listen.host, listen.port))
            listener.listen(BACKLOG)
        return listener
    except OSError as error:
        raise _cannot_listen(listen, error) from None


def _cannot_listen(listen: Listen, error: OSError) -> Unavailable:
    text = f"cannot listen on {listen}: {error.strerror}"
    is_socket = listen.path is None or listen.path.is_socket()  # a file in the way is not in use
    if error.errno == errno.EADDRINUSE and is_socket:
        return Unavailable("listen_in_use", text, "stop what listens there (`ss -lp`), or set another SIGNER_LISTEN")
    return Unavailable("listen_failed", text, "fix the address or the directory, or set another SIGNER_LISTEN")


def try_to_bind(listen: Listen, group: str | None) -> None:
    """Binds the address for a moment, without listening; raises as `bind_listeners` does.

    A unix socket is bound under another name in the same directory.
    """
    try:
        if listen.path is None:
            with _make_tcp(listen) as probe:
                probe.bind((listen.host, listen.port))
            return
        if group is not None:
            _group_id(group)
        if os.path.lexists(listen.path) and not _is_stale(listen.path):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        trial = listen.path.with_name(f".{os.getpid()}.check")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.bind(str(trial))
            trial.unlink()
    except OSError as error:
        raise _cannot_listen(listen, error) from None


def _make_tcp(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return listener


def _bind_unix(path: Path, group: str | None) -> socket.socket:
    """A unix socket for its owner and the group; replaces one that nobody listens on. Raises `OSError`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with undone_by(listener.close):
        if _is_stale(path):
            path.unlink()
        former = os.umask(0o777 & ~_UNIX_MODE)
        try:
            listener.bind(str(path))
        finally:
            os.umask(former)
        if group is not None:
            os.chown(path, -1, _group_id(group))
        path.chmod(_UNIX_MODE)
        listener.listen(BACKLOG)
    return listener


def _is_stale(path: Path) -> bool:
    """True for a socket on which nobody listens."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # such as a full queue: somebody listens
            return False
    return False


def _group_id(group: str) -> int:
    """The number of a group, which may be given itself: a container does not know its host's names."""
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise BadSettings(
            "group_unknown", f"there is no group {group[:64]!a} on this host", "create it, or set another one"
        ) from None
