"""`signer publish` and `signer hosts key`: what hosts fetch, for another web server, and the key that signs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE
from signer.cli.connection import Service, address_option
from signer.cli.parser import verb
from signer.errors import BadFile, BadFormat, NotFound, SignerError, Unavailable, write_hint
from signer.files import read_bounded, write_atomically

if TYPE_CHECKING:
    from signer.api_client import ApiClient
    from signer.model import PublicKey

_MOST_LIST: Final = 4 * 1024 * 1024  # bytes
_MOST: Final = 1024 * 1024  # bytes of any other file
_MODE: Final = 0o644
_PUBLISHER: Final = "krl.publisher"
# In the order in which they are written: a host that fetches in between finds a pair that does not match, and retries.
_SIGNED: Final = (("krl", "krl.v1@signer"), ("krl.statement", "krl-statement.v1@signer"))
_OPTIONAL: Final = (("known_hosts", "known-hosts.v1@signer"),)


@verb("hosts key", "signer hosts key >publisher.pub")
@address_option
def hosts_key(*, address: str | None, as_json: bool) -> None:
    """Prints the public key that signs the revocation list, as the host kit pins it (`--publisher`). It never
    changes, unless SIGNER_DATA_DIR is lost. Needs no token."""
    line, key = publishing_key(address)
    facts = {"public_key": line.strip(), "fingerprint": key.fingerprint}
    output.show_result(facts, line.strip(), as_json=as_json, exactly=True)


def publishing_key(address: str | None) -> tuple[str, PublicKey]:
    """The line of the service's publishing key, and the key."""
    with Service(address).open_public() as api:
        line = api.file(_PUBLISHER, _MOST).decode(errors="replace")
    return line, _parse(line)


def trusted_lines(address: str | None) -> bytes:
    """The CA lines that the service publishes for hosts to trust."""
    with Service(address).open_public() as api:
        return api.file("ca", _MOST)


@verb(
    "publish", "signer publish /var/www/signer", "signer publish /srv/www/signer --address https://signer.example:8222"
)
@click.argument("folder", metavar="DIR", type=FILE, help="a folder that the web server shows")
@click.option(
    "--publisher", type=FILE, metavar="FILE", help="the publishing key; default: the one in DIR, at first the service's"
)
@address_option
def publish(*, folder: Path, publisher: Path | None, address: str | None, as_json: bool) -> None:
    """Fetches the CA bundle, the revocation list, its statement of freshness, their signatures and, where there
    is one, the list of host keys, verifies them and writes those that changed to DIR. Hosts use the URL of DIR
    in place of the service's `/api`. Run it each minute, by a timer: hosts raise an alarm when the statement is
    older than 15 minutes. Needs no token."""
    if not folder.is_dir():
        raise BadFile("folder_missing", f"{folder} is not a directory", "create it, and let the web server show it")
    pinned = _read_pinned(publisher or folder / _PUBLISHER, must_exist=publisher is not None)
    with Service(address).open_public() as api:
        try:
            fetched = _fetch(api, pinned)
        except BadFormat:  # another list may have been published between two requests
            fetched = _fetch(api, pinned)
    _check_not_older(folder, fetched)
    changed = [name for name, content in fetched.files.items() if _write(folder / name, content)]
    facts = {"version": fetched.version, "as_of": fetched.as_of, "changed": changed}
    text = f"version {fetched.version}, as of {fetched.as_of}; files written: {', '.join(changed) or 'none'}"
    output.show_result(facts, text, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """Files that belong together, by name, in the order in which they are written; and what the statement says."""

    files: Mapping[str, bytes]
    version: int
    as_of: str


def _fetch(api: ApiClient, pinned: str | None) -> _Fetched:
    """What the service publishes, verified; raises `BadFormat` if it does not belong together."""
    files = {"ca": api.file("ca", _MOST), _PUBLISHER: api.file(_PUBLISHER, _MOST)}
    line = files[_PUBLISHER].decode(errors="replace")
    key = _parse(line if pinned is None else pinned)
    if key.blob != _parse(line).blob:
        raise SignerError(
            "publisher_changed",
            f"the service publishes with the key {_parse(line).fingerprint}, not with {key.fingerprint}",
            "find out why; if it is right, pin the new key on every host, and name it with --publisher",
        )
    for name, namespace in _SIGNED:
        files |= _fetch_signed(api, name, namespace, key)
    for name, namespace in _OPTIONAL:
        try:
            files |= _fetch_signed(api, name, namespace, key)
        except NotFound:
            continue
    version, digest, as_of = _read_statement(files["krl.statement"])
    if digest != sha256(files["krl"]).hexdigest():
        raise _inconsistent("the statement is about another revocation list")
    return _Fetched(files, version, as_of)


def _fetch_signed(api: ApiClient, name: str, namespace: str, key: PublicKey) -> dict[str, bytes]:
    from signer.ssh.sshsig import verify

    content, signature = api.file(name, _MOST_LIST), api.file(f"{name}.sig", _MOST)
    try:
        verify(signature.decode("ascii", "replace"), content, namespace, key)
    except BadFormat as fault:
        raise _inconsistent(f"{name} is not signed by the publishing key: {fault.text}") from None
    return {name: content, f"{name}.sig": signature}


def _read_statement(content: bytes) -> tuple[int, str, str]:
    """Version, digest and time; only called for what the publishing key has signed."""
    try:
        fields: dict[str, Any] = json.loads(content)
        return int(fields["version"]), str(fields["sha256"]), str(fields["as_of"])
    except (ValueError, KeyError, TypeError):
        raise _inconsistent("the statement cannot be read") from None


def _check_not_older(folder: Path, fetched: _Fetched) -> None:
    """Raises `Unavailable` if DIR has a newer list of the same key."""
    try:
        known = _read_statement(read_bounded(folder / "krl.statement", _MOST))
        same_key = read_bounded(folder / _PUBLISHER, _MOST) == fetched.files[_PUBLISHER]
    except (OSError, BadFormat):
        return
    if same_key and (fetched.version, fetched.as_of) < (known[0], known[2]):
        text = f"the service publishes version {fetched.version} as of {fetched.as_of}; DIR has {known[0]}, {known[2]}"
        raise Unavailable("published_older", text, "see whether the service was restored from a backup")


def _inconsistent(what: str) -> BadFormat:
    return BadFormat("published_inconsistent", what, "retry; if it stays so, see the service's log")


def _read_pinned(path: Path, *, must_exist: bool) -> str | None:
    try:
        return read_bounded(path, _MOST, follow_links=True).decode(errors="replace")
    except FileNotFoundError:
        if not must_exist:
            return None
        raise BadFile("file_unreadable", f"{path} does not exist", "name a file that is there") from None
    except OSError as error:
        raise BadFile(
            "file_unreadable", f"{path} cannot be read: {error.strerror}", "name a file that you may read"
        ) from None


def _parse(line: str) -> PublicKey:
    from signer.ssh.publickey import parse_public_key

    return parse_public_key(line.strip())


def _write(path: Path, content: bytes) -> bool:
    """Replaces the file as a whole if its content differs; whether it did."""
    try:
        if path.exists() and path.read_bytes() == content:
            return False
        write_atomically(path, content, _MODE)
        path.chmod(_MODE)  # whatever the umask: the web server must read it
    except OSError as error:
        raise BadFile(
            "published_not_written", f"{path} cannot be written: {error.strerror}", write_hint(error, str(path.parent))
        ) from None
    return True
