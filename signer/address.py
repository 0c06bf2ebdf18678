"""The rule of every address that receives a token: https, a unix socket, or plain http to this machine.

`parse_address` reads the service's address, `check_clear_text` is the rule for any other one, `check_peer` repeats it
for the address that a name resolved to. `check_server` also asks the kernel who listens at an address of this machine.
`check_scheme` explains a failed connection. `safe-session` imports this module at every login: it has no slow imports.
"""

from __future__ import annotations

import _socket  # not `socket`: its enums cost 15 ms
import os
from sys import byteorder

from signer.errors import BadSettings, Unavailable

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from collections.abc import Mapping

SERVER_UID = "SAFE_SESSION_SERVER_UID"  # the setting that `server_uids` reads
_PORTS = {"http": 80, "https": 443}
THIS_MACHINE = "localhost"


class Address:
    """The service's address. `scheme` is http, https or unix; unix has `path`, the others `host` and `port`."""

    __slots__ = ("host", "path", "port", "scheme", "text")

    def __init__(self, text: str, scheme: str, host: str = "", port: int = 0, path: str = "") -> None:
        self.text = text
        self.scheme = scheme
        self.host = host
        self.port = port
        self.path = path


def parse_address(text: str, setting: str = "SAFE_SESSION_ADDR") -> Address:
    """`http://host[:port]`, `https://host[:port]` or `unix:/path`, from the setting `setting`.

    Raises `BadSettings`, also for plain http to another machine.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/") and len(rest.encode(errors="surrogateescape")) < 108:
        return Address(text, "unix", host=THIS_MACHINE, path=rest)
    place = rest.removeprefix("//").removesuffix("/")
    host, colon, port = place.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = place, str(_PORTS.get(scheme, 0))
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    well_formed = (
        scheme in _PORTS
        and rest.startswith("//")
        and bare.isascii()
        and bool(bare)
        and all(c.isalnum() or c in ".-_" or (c in ":%" and bare != host) for c in bare)
        and port.isascii()
        and port.isdigit()
        and 0 < int(port[:6]) < 65536
    )
    if not well_formed:
        raise BadSettings(
            "address_malformed",
            f"{setting} is not an address: {text}",
            "write http://127.0.0.1:8222, https://host[:port] or unix:/path",
        )
    check_clear_text(scheme, bare, setting)
    return Address(text, scheme, host=bare, port=int(port))


# --- no token in the clear --------------------------------------------------------------------------------------------


def is_clear_text(scheme: str, host: str) -> bool:
    """True if what is sent to `host` (a name, or a number without brackets) crosses a network unencrypted.

    A name other than `localhost` is another machine, whatever it resolves to now.
    """
    return scheme == "http" and host.lower() != THIS_MACHINE and not is_this_machine(host)


def check_clear_text(scheme: str, host: str, setting: str) -> None:
    """Raises `BadSettings` if a token for `host` would be sent in the clear."""
    if is_clear_text(scheme, host):
        raise BadSettings(
            "token_in_clear",
            f"{setting} is plain http to {host[:80]}, which would send the token in the clear",
            "use an https:// address, or a tunnel that ends at 127.0.0.1",
        )


def check_url(url: str, setting: str) -> None:
    """As `check_clear_text`, for a URL; also raises `BadSettings` for one without scheme or host."""
    from urllib.parse import urlsplit  # late: `safe-session` has no URLs

    try:
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname
    except ValueError:
        scheme, host = "", None
    if not host or scheme not in _PORTS:
        raise BadSettings(
            "address_malformed", f"{setting} is not an address", "write one such as https://vault.example:8200"
        )
    check_clear_text(scheme, host, setting)


def check_peer(scheme: str, number: str, setting: str) -> None:
    """As `check_clear_text`, for the IP address `number` of the other side; raises `Unavailable`."""
    if scheme == "http" and not is_this_machine(number):
        raise Unavailable(
            "token_in_clear",
            f"{setting} leads to {number}, another machine, and plain http would send the token in the clear",
            "use an https:// address, or a tunnel that ends at 127.0.0.1",
        )


def is_this_machine(number: str) -> bool:
    """True if `number` is a loopback address in its usual spelling: 127.x.y.z or ::1."""
    parts = number.split(".")
    return number == "::1" or (
        len(parts) == 4
        and parts[0] == "127"
        and all(part.isascii() and part.isdigit() and len(part) <= 3 and int(part) < 256 for part in parts)
    )


# --- which scheme is spoken -------------------------------------------------------------------------------------------

_SECONDS_FOR_SCHEME = 2.0


def check_scheme(address: Address, setting: str) -> None:
    """Raises `BadSettings` if the service speaks the other one of http and https; called after a failure. Asks it on a
    connection of its own, without the token."""
    if address.scheme == "unix":
        return
    speaks_other = _speaks_http(address) if address.scheme == "https" else _speaks_tls(address)
    if not speaks_other:
        return
    other = "http" if address.scheme == "https" else "https"
    place = address.text.partition("://")[2]
    hint = f"set it to {other}://{place}"
    if other == "http" and is_clear_text("http", address.host):
        hint = "an https:// address is needed to reach another machine: give the service TLS, or use a tunnel"
    text = f"{setting} has the wrong scheme: the service at {place} speaks {other}, not {address.scheme}"
    raise BadSettings("wrong_scheme", text, hint)


def _speaks_http(address: Address) -> bool:
    try:
        connection = _dial(address)
        try:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(16).startswith(b"HTTP/1.")
        finally:
            connection.close()
    except OSError:
        return False


def _speaks_tls(address: Address) -> bool:
    """Nothing is sent but the handshake, so that the certificate need not be verified."""
    import socket
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        plain = socket.socket(fileno=_dial(address).detach())
        plain.settimeout(_SECONDS_FOR_SCHEME)
        context.wrap_socket(plain, server_hostname=address.host).close()
    except OSError as error:
        return type(error).__module__ == "ssl" and "ALERT" in str(getattr(error, "reason", ""))
    return True


def _dial(address: Address) -> _socket.socket:
    """A connected socket, without checks: for what is no secret. Raises `OSError`."""
    found = _socket.getaddrinfo(address.host.encode("ascii"), address.port, 0, _socket.SOCK_STREAM)
    family, kind, protocol, _, place = found[0]
    connection = _socket.socket(family, kind, protocol)
    connection.settimeout(_SECONDS_FOR_SCHEME)
    try:
        connection.connect(place)
    except OSError:
        connection.close()
        raise
    return connection


# --- who listens ------------------------------------------------------------------------------------------------------

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = 16  # bytes of nlmsghdr
_TCP = _socket.IPPROTO_TCP
_LISTEN = 10  # TCP_LISTEN
_UID_AT = _HEADER + 64  # inet_diag_msg.idiag_uid
_ENOENT = 2
# A kernel, sandbox or container without sock_diag refuses in one of these ways: EPERM, EACCES, EINVAL, EPROTONOSUPPORT,
# EOPNOTSUPP, EAFNOSUPPORT.
_NOT_SUPPORTED = frozenset({1, 13, 22, 93, 95, 97})
_ANSWERS_WITHIN = 2.0  # seconds; the kernel answers within 10 microseconds


def server_uids(environ: Mapping[str, str]) -> frozenset[int]:
    """The users whose process may listen at a plain http address: root, this one, and that of SAFE_SESSION_SERVER_UID.

    Raises `BadSettings`.
    """
    uids = {0, os.geteuid()}
    if text := environ.get(SERVER_UID, ""):
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise BadSettings(
                "server_uid_malformed",
                f"{SERVER_UID} is not a user id: {text[:40]}",
                "write the number that `id -u USER` prints for the user that runs the service",
            )
        uids.add(int(text))
    return frozenset(uids)


def check_server(family: int, number: str, port: int, trusted: frozenset[int], setting: str) -> None:
    """Raises `Unavailable` if plain http to this IP address would send the token to another machine, or to the process
    of a user that is not in `trusted`; `NoListener` if nobody listens. For use before connecting and before sending."""
    check_peer("http", number, setting)
    check_listener(family, number, port, trusted, SERVER_UID)


class NoListener(ConnectionRefusedError):
    """No process listens at the address."""

    def __init__(self) -> None:
        super().__init__(111, "connection refused")


def check_listener(family: int, number: str, port: int, trusted: frozenset[int], setting: str) -> None:
    """Raises `Unavailable` unless a user in `trusted` (uids) listens at exactly this address of this machine.

    Any local user may bind the port of a service that is down, and would receive the token. Raises `NoListener` if
    nobody listens. Without sock_diag(7) the listener is unknown, and nothing is raised.
    """
    uid = listener_uid(family, number, port)
    if uid is None or uid in trusted:
        return
    raise Unavailable(
        "listener_not_trusted",
        f"the process that listens at {number} port {port} belongs to uid {uid}, not to the signing service",
        f"find out who it is (`ss -ltnp`); if uid {uid} runs the service, set {setting}={uid}",
    )


def listener_uid(family: int, number: str, port: int) -> int | None:
    """The uid that listens at the address, which is the listener that the kernel would connect to; None without
    sock_diag(7). Raises `NoListener`, or another `OSError` if the kernel's answer is lost."""
    try:
        with _Diagnosis(family, number, port) as kernel:
            kind, answer = kernel.ask(_NLM_F_REQUEST)
            if kind == _SOCK_DIAG_BY_FAMILY and len(answer) >= _UID_AT + 4 and answer[_HEADER + 1] == _LISTEN:
                return int.from_bytes(answer[_UID_AT : _UID_AT + 4], byteorder)
            # A kernel without the module for TCP answers ENOENT, too, but also to the question for all listeners.
            if kind == _NLMSG_ERROR and _error(answer) in _NOT_SUPPORTED:
                return None
            kind, answer = kernel.ask(_NLM_F_REQUEST | _NLM_F_DUMP)
            if kind in (_NLMSG_ERROR, _NLMSG_DONE) and _error(answer) in (*_NOT_SUPPORTED, _ENOENT):
                return None
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return None
        raise
    raise NoListener


def _error(answer: bytes) -> int:
    return -int.from_bytes(answer[_HEADER : _HEADER + 4], byteorder, signed=True)


class _Diagnosis:
    """A netlink socket that asks for the TCP listener at one address (sock_diag(7), struct inet_diag_req_v2)."""

    def __init__(self, family: int, number: str, port: int) -> None:
        source = _socket.inet_pton(family, number).ljust(16, b"\0")
        self._request = (
            bytes((family, _TCP, 0, 0))
            + (1 << _LISTEN).to_bytes(4, byteorder)
            + port.to_bytes(2, "big")
            + bytes(2)
            + source
            + bytes(16 + 4)
            + b"\xff" * 8  # INET_DIAG_NOCOOKIE
        )
        self._socket = _socket.socket(_netlink(), _socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
        self._socket.settimeout(_ANSWERS_WITHIN)

    def __enter__(self) -> _Diagnosis:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, flags: int) -> tuple[int, bytes]:
        """Type and bytes of the kernel's first message."""
        head = (_HEADER + len(self._request)).to_bytes(4, byteorder) + _SOCK_DIAG_BY_FAMILY.to_bytes(2, byteorder)
        self._socket.sendto(head + flags.to_bytes(2, byteorder) + bytes(8) + self._request, (0, 0))
        answer = self._socket.recv(65536)
        return int.from_bytes(answer[4:6], byteorder), answer


def _netlink() -> int:
    family = getattr(_socket, "AF_NETLINK", None)
    if family is None:
        raise OSError(97, "this system has no netlink")
    return int(family)
