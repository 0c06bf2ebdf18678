"""The claim secret of a request to humans: whoever has it, and the token, gets the certificate once it is approved.

A request outlives the command that asked, and its certificate is made for a key that exists only then. The service
knows the secret's SHA-256; the secret is kept in a private folder in memory, from where the same command takes it
later. It is never printed, passed as an argument or put into an environment.
"""

# ruff: noqa: PTH102, PTH104, PTH106, PTH108
# (pathlib costs more to import than everything here)

from __future__ import annotations

import ctypes
import os
import stat
import time

from signer.safe_session.agent import runtime_folder
from signer.safe_session.keypair import sha256

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from signer.safe_session.arguments import Invocation
    from signer.safe_session.settings import Settings

_FOLDER = "safe-session-claims"  # in XDG_RUNTIME_DIR
_SECRET_SIZE = 32
_HEX = frozenset("0123456789abcdef")
_MAX_FILE = 200  # bytes: the secret in hex, a space, the request's id, a line end
_IN_MEMORY = (0x01021994, 0x858458F6)  # TMPFS_MAGIC and RAMFS_MAGIC of statfs(2): never written to a disk
_STALE = 2 * 24 * 3600  # seconds; the service forgets a request after one day


class Claim:
    """The secret of one ask. `request` is the id of the request that it opens, "" if it was not kept before."""

    def __init__(self, path: str, secret: bytes, request: str = "") -> None:
        self._path = path
        self._secret = secret
        self.request = request

    @property
    def is_kept(self) -> bool:
        """True if a later command finds the secret."""
        return bool(self.request)

    def digest(self) -> str:
        """SHA-256 of the secret in hex: what the request is bound to."""
        return sha256(self._secret).hex()

    def secret(self) -> str:
        """The secret in hex: for the claim alone."""
        return self._secret.hex()

    def keep(self, request: str) -> bool:
        """Writes the secret of `request`; false if another command has kept one for the same ask meanwhile.

        `is_kept` stays false where there is no private folder in memory.
        """
        if not self._path or not _prepare_folder(os.path.dirname(self._path)):  # noqa: PTH120
            return True
        temporary = f"{self._path}.{os.urandom(4).hex()}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, f"{self.secret()} {request}\n".encode("ascii"))
            finally:
                os.close(descriptor)
            try:
                os.link(temporary, self._path)  # unlike a rename, never over another one
            except FileExistsError:
                if _read(self._path):
                    return False
                os.rename(temporary, self._path)  # what is there is no secret of this user's
        except OSError:
            return True
        finally:
            _remove(temporary)
        self.request = request
        return True

    def drop(self) -> None:
        """Removes what was kept: the certificate has been issued, or the request is over."""
        if self.is_kept:
            if _read(self._path) == (self._secret, self.request):
                _remove(self._path)
            self.request = ""


def load_claim(settings: Settings, invocation: Invocation) -> Claim:
    """The secret that an earlier command kept for the same ask, otherwise a new one that is not kept yet."""
    folder = runtime_folder()
    path = f"{folder}/{_FOLDER}/{_name(settings, invocation)}" if folder else ""
    if path and (found := _read(path)):
        return Claim(path, *found)
    return Claim(path, os.urandom(_SECRET_SIZE))


def _name(settings: Settings, invocation: Invocation) -> str:
    """The file's name: the same for the same ask of the same service with the same token, and for no other."""
    server = settings.server
    words = [server.address.text, server.token, settings.role, invocation.ttl, str(invocation.short_ttl())]
    words += [invocation.reason, invocation.force_command(), *invocation.principals]
    parts = [word.encode(errors="surrogateescape") for word in words]
    return sha256(b"".join(b"%d:%s," % (len(part), part) for part in parts)).hex()[:32]


def _read(path: str) -> tuple[bytes, str] | None:
    """Secret and request's id in a file of this user's; None if there is none, or not a valid one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        is_private = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
        text = os.read(descriptor, _MAX_FILE).decode("ascii", "replace") if is_private else ""
    except OSError:
        return None
    finally:
        os.close(descriptor)
    secret, _, request = text.strip().partition(" ")
    if len(secret) != 2 * _SECRET_SIZE or not _HEX.issuperset(secret) or not is_request_id(request):
        _remove(path)
        return None
    return bytes.fromhex(secret), request


def is_request_id(text: object) -> bool:
    """True for what may be an id: it becomes a part of a path."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= 40
        and text.isascii()
        and all(letter.islower() or letter.isdigit() or letter == "-" for letter in text)
    )


def _prepare_folder(folder: str) -> bool:
    """Makes the folder, and removes secrets that open nothing any more; false unless it is private and in memory."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass  # of an earlier request
    except OSError:
        return False
    try:
        facts = os.lstat(folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            return False
        if not _is_in_memory(folder):
            os.rmdir(folder)
            return False
        oldest = time.time() - _STALE
        for name in os.listdir(folder):  # noqa: PTH208
            if os.lstat(f"{folder}/{name}").st_mtime < oldest:
                _remove(f"{folder}/{name}")
    except OSError:
        return False
    return True


def _is_in_memory(folder: str) -> bool:
    """True on tmpfs or ramfs: what is written there is in no backup, and gone after a restart."""
    status = (ctypes.c_long * 32)()  # struct statfs has 120 bytes; its first member is f_type
    if ctypes.CDLL(None).statfs(os.fsencode(folder), ctypes.byref(status)):
        return False
    return status[0] & 0xFFFFFFFF in _IN_MEMORY


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # another command has removed it
