"""Reads and checks the settings of `safe-session` from the environment and the token file."""

# ruff: noqa: PTH112
# (pathlib costs more to import than everything here)

from __future__ import annotations

import os
import stat

from signer.address import parse_address, server_uids
from signer.errors import BadSettings
from signer.safe_session.http import Server

# Root creates the folder of the socket, so nobody else can listen there. Where a host has no such folder, the service
# listens on TCP only.
DEFAULT_ADDR = "unix:/run/signer-api/api.sock"
_DEFAULT_FOLDER = "/run/signer-api"
_DEFAULT_TCP_ADDR = "http://127.0.0.1:8222"
_LARGEST_TOKEN_FILE = 4096
_LARGEST_PUBLISHERS_FILE = 4096
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # editors on Windows write it
_BYTE_ORDER_MARKS_16 = (b"\xff\xfe", b"\xfe\xff")


class Settings:
    """The service's address with the token; the role to request, "" where a command needs none; and the public keys
    that may sign the list of host keys, each as `type base64`: none if the user has pinned none."""

    def __init__(self, server: Server, role: str, publishers: list[str]) -> None:
        self.server = server
        self.role = role
        self.publishers = publishers


def load_settings(role: str, *, needs_role: bool = True) -> Settings:
    """The settings in `os.environ`; `role` from the command line overrides SAFE_SESSION_ROLE. Raises `BadSettings`."""
    address = parse_address(os.environ.get("SAFE_SESSION_ADDR") or default_address())
    trusted = server_uids(os.environ)
    role = role or os.environ.get("SAFE_SESSION_ROLE", "")
    if needs_role and not role:
        raise BadSettings("role_missing", "no role given", "give --role, or set SAFE_SESSION_ROLE")
    path = os.environ.get("SAFE_SESSION_TOKEN_FILE", "")
    if not path:
        raise BadSettings(
            "token_file_missing",
            "SAFE_SESSION_TOKEN_FILE is not set",
            "put your token into a file with mode 0600 and set SAFE_SESSION_TOKEN_FILE to its path",
        )
    pinned = os.environ.get("SAFE_SESSION_PUBLISHERS_FILE", "") if needs_role else ""
    publishers = load_publishers(pinned) if pinned else []
    return Settings(Server(address, load_token(path), trusted), role, publishers)


def default_address() -> str:
    """The service on this host: its socket if the folder for it is there, otherwise its port."""
    return DEFAULT_ADDR if os.path.isdir(_DEFAULT_FOLDER) else _DEFAULT_TCP_ADDR


def load_publishers(path: str) -> list[str]:
    """The public keys in the file at `path`, lines as `signer hosts key` prints them. Whoever can write the file
    decides which hosts are genuine, so that only its owner, the user or root, may. Raises `BadSettings`.
    """
    hint = "set SAFE_SESSION_PUBLISHERS_FILE to a file with the line that `signer hosts key` prints"
    descriptor = _open(path, "publishers", hint)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o022 or facts.st_uid not in (0, os.geteuid()):
            raise BadSettings(
                "publishers_file_not_private",
                f"others may change the publishers file {path} (owner {facts.st_uid}, mode"
                f" {stat.S_IMODE(facts.st_mode):04o})",
                f"make it your own file or root's, chmod 0644 {path}, and compare its key with the operator's",
            )
        raw = os.read(descriptor, _LARGEST_PUBLISHERS_FILE + 1)
    finally:
        os.close(descriptor)
    lines = [line.split() for line in raw.split(b"\n") if line.strip() and line.strip()[:1] != b"#"]
    is_good = all(
        len(words) > 1 and words[0] == b"ssh-ed25519" and len(words[1]) == 68 and not words[1].translate(None, _BASE64)
        for words in lines
    )
    if not lines or not is_good or len(raw) > _LARGEST_PUBLISHERS_FILE:
        raise BadSettings(
            "publishers_file_content",
            f"the publishers file {path} does not contain Ed25519 public keys alone, one a line",
            "the file must contain the line that `signer hosts key` prints",
        )
    return [f"{words[0].decode()} {words[1].decode()}" for words in lines]


def _open(path: str, kind: str, hint: str) -> int:
    """The descriptor of a file that is to be read; raises `BadSettings`."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "the path is malformed"
        text = f"cannot read the {kind} file {path} (SAFE_SESSION_{kind.upper()}_FILE): {reason.lower()}"
        raise BadSettings(
            "token_file_unreadable" if kind == "token" else "publishers_file_unreadable", text, hint
        ) from None


def load_token(path: str) -> str:
    """The token in the file at `path`. The checks use the open descriptor, so that they apply to the file that is read.
    Follows links, because Kubernetes mounts secrets as links. Raises `BadSettings`, never with the file's content.
    """
    descriptor = _open(path, "token", "set SAFE_SESSION_TOKEN_FILE to the file that holds your token")
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise BadSettings(
                "token_file_kind",
                f"the token file {path} (SAFE_SESSION_TOKEN_FILE) is not a regular file",
                "name the file that holds your token",
            )
        if facts.st_mode & 0o077:
            raise BadSettings(
                "token_file_mode",
                f"the token file {path} (SAFE_SESSION_TOKEN_FILE) is accessible to other users "
                f"(mode {stat.S_IMODE(facts.st_mode):04o})",
                f"chmod 0600 {path}, and ask for a new token if other users have an account on this host",
            )
        raw = os.read(descriptor, _LARGEST_TOKEN_FILE + 1)
    finally:
        os.close(descriptor)
    if len(raw) > _LARGEST_TOKEN_FILE:
        raise BadSettings(
            "token_file_size",
            f"the token file {path} (SAFE_SESSION_TOKEN_FILE) is larger than {_LARGEST_TOKEN_FILE} bytes",
            "name the file that holds your token",
        )
    words = raw.removeprefix(_BYTE_ORDER_MARK).split()
    # One printable word, so that the file cannot add header lines to the request.
    if len(words) != 1 or not all(0x21 <= byte <= 0x7E for byte in words[0]):
        fault = "does not contain exactly one token" if words else "is empty"
        if raw.startswith(_BYTE_ORDER_MARKS_16):
            fault = "is UTF-16 text"
        raise BadSettings(
            "token_file_content",
            f"the token file {path} (SAFE_SESSION_TOKEN_FILE) {fault}",
            "the file must contain only the token, as ASCII or UTF-8",
        )
    return words[0].decode("ascii")
