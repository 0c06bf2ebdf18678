"""The service's address for clients: http to this machine, https, or a unix socket. Pure.

`safe-session` imports this module at every login, so it has no slow imports.
"""

from __future__ import annotations

from signer.errors import BadSettings

_PORTS = {"http": 80, "https": 443}


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
    """`http://host[:port]`, `https://host[:port]` or `unix:/path`, from the setting `setting`. Raises `BadSettings`."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/") and len(rest.encode(errors="surrogateescape")) < 108:
        return Address(text, "unix", host="localhost", path=rest)
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
    return Address(text, scheme, host=bare, port=int(port))


def is_this_machine(number: str) -> bool:
    """True if an IP address is this machine's; only there a token may be sent in the clear."""
    return number.startswith("127.") or number == "::1"
