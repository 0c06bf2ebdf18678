"""Reads `SIGNER_*` environment variables into `Settings` and reports all problems at once.

`SETTINGS` lists names, defaults and meanings; runbooks/reference/settings.md is generated from it.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import pwd
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, get_type_hints
from urllib.parse import urlsplit

from signer.address import check_url
from signer.errors import BadSettings

# name, default, meaning
SETTINGS: Final = (
    ("SIGNER_MODE", "local", "`local`: the CA key signs; `vault`; `shadow`: Vault, compared with it"),
    ("SIGNER_POLICY_FILE", "/etc/signer/policy.toml", "who may get what"),
    ("SIGNER_CA_KEY_SOURCE", "file", "where the CA key is: `file` or `agent` (an ssh-agent)"),
    ("SIGNER_CA_KEY_FILE", "/run/signer-ca/ca", "the CA key, rendered there by the operator"),
    ("SIGNER_CA_KEY_OWNER", "root:root", "the `user:group` that must own the CA key file"),
    ("SIGNER_CA_AGENT_SOCKET", "/run/signer-agent/agent.sock", "the socket of that ssh-agent"),
    ("SIGNER_DATA_DIR", "/var/lib/signer", "where the ledger lives"),
    ("SIGNER_LEDGER_ORIGIN", "", "name of the ledger for witnesses; by default one made from its first event"),
    ("SIGNER_RUN_DIR", "/run/signer", "where the keeper's socket lives"),
    ("SIGNER_LISTEN", "127.0.0.1:8222", "comma list of `host:port`, `[v6]:port`, `unix:/path` of the API"),
    (
        "SIGNER_SOCKET_GROUP",
        "",
        "group, or its number, that may connect to the API's unix sockets, besides their owner",
    ),
    ("SIGNER_MOUNTS", "ssh", "comma list of Vault mount names that are served"),
    ("SIGNER_WORKERS", "1", "processes of the API"),
    ("SIGNER_THREADS", "16", "threads of each process of the API"),
    ("SIGNER_TLS_CERT_FILE", "", "certificate chain, to serve TLS"),
    ("SIGNER_TLS_KEY_FILE", "", "private key of that certificate"),
    ("SIGNER_TRUSTED_PROXIES", "", "comma list of CIDR blocks whose X-Forwarded-For is believed"),
    ("SIGNER_TRUSTED_PROXY_USERS", "", "comma list of local users whose X-Forwarded-For is believed on a unix socket"),
    ("SIGNER_KEEPER_USER", "", "user of the keeper; needed when started as root"),
    ("SIGNER_API_USER", "", "user of the API; needed when started as root"),
    ("SIGNER_CONSOLE_URL", "", "address by which people open the console, such as https://signer.example.org"),
    ("SIGNER_NOTICES_FILE", "", "file of notice channels; unset: no notices are sent"),
    ("SIGNER_NOTICES_USER", "", "user of the notices process; required when started as root with channels"),
    ("SIGNER_NOTICES_DIR", "/var/lib/signer-notices", "directory of its socket and record of sent notices"),
    ("SIGNER_VAULT_ADDR", "", "address of Vault or OpenBao; needed where it signs"),
    ("SIGNER_VAULT_TOKEN_FILE", "", "file with a token that may sign there; needed where it signs"),
    ("SIGNER_VAULT_MOUNT", "ssh", "mount of its SSH engine"),
    ("SIGNER_VAULT_CA_FILE", "", "certificates that vouch for its TLS, if not the public ones"),
)
PREFIX: Final = "SIGNER_"
MODES: Final = ("local", "vault", "shadow")
KEY_SOURCES: Final = ("file", "agent")
NOTICES_SOCKET: Final = "notices.sock"
MAX_SOCKET_PATH: Final = 107  # bytes; sun_path of unix(7)
# For `signer ca render` only; the service does not read them.
INFISICAL_SETTINGS: Final = (
    ("INFISICAL_SITE_URL", "https://app.infisical.com", "address of Infisical"),
    ("INFISICAL_CLIENT_ID", "", "client id of the machine identity"),
    ("INFISICAL_CLIENT_SECRET_FILE", "", "file with its client secret, 0400 or 0600; never a value"),
    ("INFISICAL_PROJECT_ID", "", "project that holds the CA key"),
    ("INFISICAL_ENVIRONMENT", "prod", "environment in that project"),
    ("INFISICAL_SECRET_PATH", "/", "folder in that environment"),
    ("INFISICAL_SECRET_NAME", "SAFE_SESSION_CA_KEY", "name of the secret"),
)
FINGERPRINT_SETTING: Final = ("SIGNER_CA_FINGERPRINT", "", "fingerprint that a rendered key must have")
SHORTEST_PREFIX: Final = 7  # of a network of proxies: fc00::/7 and 10.0.0.0/8 are the largest private ones
MAX_WORKERS: Final = 32
MAX_THREADS: Final = 256
MAX_ORIGIN: Final = 200  # characters; a name in a signed note has 255 bytes, and a restored ledger needs some of them
_ORIGIN: Final = re.compile(rf"[!-*,-~]{{1,{MAX_ORIGIN}}}", re.ASCII)
_MOUNT: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]*[A-Za-z0-9_])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the API listens: a socket path, or an address (without brackets) and a port."""

    path: Path | None
    host: str
    port: int

    def is_private(self) -> bool:
        """True for a unix socket and for loopback addresses, which other machines cannot reach."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Proxies(NamedTuple):
    """Whose X-Forwarded-For is believed: networks, and ids of local users on a unix socket."""

    networks: tuple[Network, ...] = ()
    users: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Settings:
    """The service's settings, each with the function that reads it, which raises `ValueError`."""

    mode: Annotated[str, _one_of(MODES, "a mode")]
    policy_file: AbsolutePath
    ca_key_source: Annotated[str, _one_of(KEY_SOURCES, "a source of the CA key")]
    ca_key_file: AbsolutePath
    ca_key_owner: Annotated[str, _owner]
    ca_agent_socket: Annotated[Path, _socket_path]
    data_dir: AbsolutePath
    ledger_origin: Annotated[str | None, _origin]
    run_dir: AbsolutePath
    listen: Annotated[tuple[Listen, ...], _listen]
    socket_group: OptionalText
    mounts: Annotated[tuple[str, ...], _mounts]
    workers: Annotated[int, _count(MAX_WORKERS)]
    threads: Annotated[int, _count(MAX_THREADS)]
    tls_cert_file: OptionalPath
    tls_key_file: OptionalPath
    trusted_proxies: Annotated[tuple[Network, ...], _networks]
    trusted_proxy_users: Annotated[frozenset[int], _users]
    keeper_user: OptionalText
    api_user: OptionalText
    console_url: Annotated[str | None, _console_url]
    notices_file: OptionalPath
    notices_user: OptionalText
    notices_dir: Annotated[Path, _notices_dir]
    vault_addr: Annotated[str | None, _vault_address]
    vault_token_file: OptionalPath
    vault_mount: Annotated[str, _mount]
    vault_ca_file: OptionalPath
    warnings: tuple[str, ...] = ()

    @property
    def proxies(self) -> Proxies:
        return Proxies(self.trusted_proxies, self.trusted_proxy_users)

    @property
    def socket(self) -> Path:
        return self.run_dir / "keeper.sock"

    @property
    def users(self) -> dict[str, str | None]:
        """The user of each process of the service, by its setting; that of notices only if they are sent."""
        found = {"SIGNER_KEEPER_USER": self.keeper_user, "SIGNER_API_USER": self.api_user}
        return found if self.notices_file is None else {**found, "SIGNER_NOTICES_USER": self.notices_user}

    @property
    def notices_socket(self) -> Path:
        """The socket of the process that sends notices, to which the keeper connects."""
        return self.notices_dir / NOTICES_SOCKET

    @property
    def published(self) -> Path:
        """The folder of the files that hosts fetch, written by the keeper and read by the api."""
        return self.run_dir / "published"

    @property
    def has_ca_key(self) -> bool:
        """True if there is a local CA key, to sign or for comparison."""
        return self.mode != "vault"

    @property
    def reads_key_file(self) -> bool:
        """True if the local CA key is loaded from its file."""
        return self.has_ca_key and self.ca_key_source == "file"

    @property
    def asks_vault(self) -> bool:
        return self.mode != "local"


def load_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`; raises `BadSettings` with every problem."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, default, _ in SETTINGS:
        field = name.removeprefix("SIGNER_").lower()
        try:
            values[field] = _READERS[field](environ.get(name) or default)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if (environ.get("SIGNER_TLS_CERT_FILE") or "") and not (environ.get("SIGNER_TLS_KEY_FILE") or ""):
        problems.append("SIGNER_TLS_KEY_FILE: is missing beside SIGNER_TLS_CERT_FILE")
    if (environ.get("SIGNER_TLS_KEY_FILE") or "") and not (environ.get("SIGNER_TLS_CERT_FILE") or ""):
        problems.append("SIGNER_TLS_CERT_FILE: is missing beside SIGNER_TLS_KEY_FILE")
    if (mode := environ.get("SIGNER_MODE")) in ("vault", "shadow"):
        needed = ("SIGNER_VAULT_ADDR", "SIGNER_VAULT_TOKEN_FILE")
        problems += [f"{name}: is missing, and mode {mode} needs it" for name in needed if not environ.get(name)]
    if not problems:
        settings = Settings(**values, warnings=tuple(_unknown(environ)))
        exposed = [listen for listen in settings.listen if not listen.is_private()]
        if not exposed or settings.tls_cert_file or names_proxies(settings.trusted_proxies):
            return settings
        problems.append(
            f"SIGNER_LISTEN: {exposed[0]} is beyond loopback, which would send tokens in the clear;"
            " set SIGNER_TLS_CERT_FILE and SIGNER_TLS_KEY_FILE, or SIGNER_TRUSTED_PROXIES"
        )
    raise refused(problems)


def refused(problems: Sequence[str]) -> BadSettings:
    """The error that lists all problems of the environment."""
    text = f"the settings have {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return BadSettings("settings_refused", text, "correct them in the environment", tuple(problems))


def names_proxies(networks: tuple[Network, ...]) -> bool:
    """True if these are networks of proxies; not if one of them is most of the Internet."""
    fourth = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    sixth = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    lengths = [network.prefixlen for network in ipaddress.collapse_addresses(fourth)]
    lengths += [network.prefixlen for network in ipaddress.collapse_addresses(sixth)]
    return bool(lengths) and min(lengths) >= SHORTEST_PREFIX


def _unknown(environ: Mapping[str, str]) -> list[str]:
    names = [name.removeprefix(PREFIX) for name, _, _ in (*SETTINGS, FINGERPRINT_SETTING)]
    warnings = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and (word := name.removeprefix(PREFIX)) not in names:
            near = difflib.get_close_matches(word, names, 1)
            warnings.append(f"{name} is not a setting" + (f", did you mean {PREFIX}{near[0]}" if near else ""))
    return warnings


def _one_of(words: tuple[str, ...], what: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text[:40]!a} is not {what}; use one of {', '.join(words)}")
        return text

    return read


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError(f"{text[:80]!a} is not an absolute path")
    return path


def _socket_path(text: str) -> Path:
    path = _absolute(text)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(f"has {len(os.fsencode(path))} bytes; the path of a socket has {MAX_SOCKET_PATH} at most")
    return path


def _optional_path(text: str) -> Path | None:
    return _absolute(text) if text else None


def _owner(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]+:[A-Za-z0-9._-]+", text) is None:
        raise ValueError(f"{text[:80]!a} is not user:group")
    return text


def _listen(text: str) -> tuple[Listen, ...]:
    listens = tuple(parse_listen(part.strip()) for part in text.split(","))
    if len(set(listens)) < len(listens):
        raise ValueError("an address is listed twice")
    return listens


def parse_listen(text: str) -> Listen:
    """One address of SIGNER_LISTEN; raises `ValueError`."""
    if text.startswith("unix:"):
        return Listen(_absolute(text.removeprefix("unix:")), "", 0)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+)):(\d{1,5})", text)
    if match is None or not 0 < int(match[3]) < 65_536:
        raise ValueError(f"{text[:80]!a} is not host:port, [v6]:port or unix:/path")
    return Listen(None, match[1] or match[2], int(match[3]))


def _mounts(text: str) -> tuple[str, ...]:
    return tuple(_mount(part) for part in text.split(","))


def _mount(text: str) -> str:
    mount = text.strip().strip("/")
    if _MOUNT.fullmatch(mount) is None or mount.split("/")[0] in ("sys", "auth"):
        raise ValueError(f"{mount[:40]!a} is not a mount name")
    return mount


def _vault_address(text: str) -> str | None:
    if not text:
        return None
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.username is not None or url.query:
        raise ValueError("is not an address such as https://vault.example:8200")
    return url_for_tokens(text)


def url_for_tokens(text: str) -> str:
    """An address without the slash at its end; raises `ValueError` unless a token may be sent to it."""
    try:
        check_url(text, "it")
    except BadSettings as error:
        raise ValueError(f"{error.text.removeprefix('it ')}; {error.hint}") from None
    return text.rstrip("/")


def _console_url(text: str) -> str | None:
    """An address without query and fragment; a message carries it, so it may be plain http to any machine."""
    if not text:
        return None
    try:
        url = urlsplit(text)
        host, _ = url.hostname, url.port
    except ValueError:
        host, url = None, urlsplit("")
    is_address = url.scheme in ("http", "https") and bool(host) and url.username is None
    if not is_address or url.query or url.fragment or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("is not an address such as https://signer.example.org")
    return text.rstrip("/").removesuffix("/console")


def _notices_dir(text: str) -> Path:
    return _socket_path(f"{text.rstrip('/')}/{NOTICES_SOCKET}").parent


def _count(most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise ValueError(f"{text[:40]!a} is not a whole number from 1 to {most}")
        return int(text)

    return read


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def _users(text: str) -> frozenset[int]:
    ids = set()
    for name in (part.strip() for part in text.split(",") if part.strip()):
        try:
            ids.add(int(name) if name.isascii() and name.isdigit() else pwd.getpwnam(name).pw_uid)
        except KeyError:
            raise ValueError(f"there is no user {name[:64]!a} on this host") from None
    return frozenset(ids)


def _origin(text: str) -> str | None:
    if text and _ORIGIN.fullmatch(text) is None:
        raise ValueError(f"{text[:80]!a} is not 1 to {MAX_ORIGIN} printable ASCII characters without spaces and +")
    return text or None


def _optional_text(text: str) -> str | None:
    return text or None


AbsolutePath = Annotated[Path, _absolute]
OptionalPath = Annotated[Path | None, _optional_path]
OptionalText = Annotated[str | None, _optional_text]
# Of each field that is a setting, by its name.
_READERS: Final[dict[str, Callable[[str], object]]] = {
    field: hint.__metadata__[0]
    for field, hint in get_type_hints(Settings, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
