"""The files that hosts fetch, without a token: the keeper publishes them in SIGNER_RUN_DIR, hosts verify signatures.

They are answered in the event loop, from memory while they do not change: a thousand hosts ask each minute. What a host
says of itself in `Signer-Host` is passed on to the keeper once a second, for whoever waits for a revocation.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from signer.api.admission import Peer
from signer.api.problems import render_problem
from signer.api.request import new_request_id
from signer.api.vault.responses import HttpResponse
from signer.errors import BadFormat, SignerError, Unavailable
from signer.files import open_regular
from signer.protocol.client import KeeperClient
from signer.protocol.commands import HOST_NAME, MAX_FETCHES
from signer.ssh.krl import MAX_LIST, krl_version

LIST: Final = "krl"
# Below /api/: content type, and what it is.
FILES: Final[dict[str, tuple[str, str]]] = {
    LIST: ("application/octet-stream", "The revocation list, for sshd's RevokedKeys; honours If-None-Match"),
    "krl.sig": ("text/plain", "Its SSHSIG signature by the publishing key, namespace krl.v1@signer"),
    "krl.statement": ("application/json", "When which list was last known to be the current one"),
    "krl.statement.sig": ("text/plain", "The signature of that, namespace krl-statement.v1@signer"),
    "known_hosts": ("text/plain", "The keys of listed hosts, for ssh's UserKnownHostsFile; renewed each minute"),
    "known_hosts.sig": ("text/plain", "The signature of that, namespace known-hosts.v1@signer"),
    "krl.publisher": ("text/plain", "The publishing key, which hosts pin: a line as in a .pub file"),
}
VERSION_HEADER: Final = "Signer-List-Version"
FETCHES_PER_SECOND: Final = 500  # of all hosts, in one worker; 1,000 hosts that ask each minute make 67
REPORTED_EVERY: Final = 1.0  # seconds
MAX_UNREPORTED: Final = 1_000  # hosts
_ETAG: Final = re.compile(r'(?:W/)?"([0-9a-f]{64})"')


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was read, and what identified it then."""

    identity: tuple[int, ...]
    content: bytes
    sha256: str
    version: int | None  # of a list


class PublishedFiles:
    """The files in `folder`. Safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, _File] = {}

    def name_of(self, environ: Mapping[str, Any]) -> str | None:
        """The file that a request is for; None for every other request."""
        if environ["REQUEST_METHOD"] != "GET":
            return None
        name: str = environ["RAW_PATH"].removeprefix("/api/")
        return name if name in FILES and len(name) < len(environ["RAW_PATH"]) else None

    def response(self, name: str, environ: Mapping[str, Any]) -> HttpResponse:
        """The file, or 304 if the client has it, or the problem that there is none."""
        try:
            file = self._read(name)
        except SignerError as error:
            return HttpResponse(*render_problem(error, new_request_id()))
        headers = [("ETag", f'"{file.sha256}"'), ("Cache-Control", "no-cache")]
        if file.version is not None:
            headers.append((VERSION_HEADER, str(file.version)))
        if file.sha256 in _ETAG.findall(environ.get("HTTP_IF_NONE_MATCH", "")[:1000]):
            return HttpResponse(HTTPStatus.NOT_MODIFIED, headers, b"")
        return HttpResponse(HTTPStatus.OK, [("Content-Type", FILES[name][0]), *headers], file.content)

    def _read(self, name: str) -> _File:
        """The file as it is now, read again only if it was replaced; raises `Unavailable`."""
        path = self._folder / name
        try:
            known, identity = self._files.get(name), _identity(path.stat())
            if known is not None and known.identity == identity:
                return known
            with open_regular(path) as opened:
                identity, content = _identity(os.fstat(opened.fileno())), opened.read(MAX_LIST + 1)
            version = krl_version(content) if name == LIST else None
        except (OSError, BadFormat):
            raise Unavailable(
                "list_not_published",
                f"{name} is not published yet",
                "retry in a minute; if it stays so, see the service's log",
            ) from None
        self._files[name] = file = _File(identity, content, sha256(content).hexdigest(), version)
        return file


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size


class FetchReports:
    """Tells the keeper which hosts have fetched which list, at most `MAX_FETCHES` of them in a second."""

    def __init__(self, keeper: KeeperClient) -> None:
        self._keeper = keeper
        self._unreported: OrderedDict[str, tuple[str, int]] = OrderedDict()  # by host: its address, and the version
        self._due = 0.0
        self._task: asyncio.Task[None] | None = None

    def note(self, name: str, response: HttpResponse, environ: Mapping[str, Any], peer: Peer) -> None:
        """Notes a request for the list by a host that says its name."""
        host: str = environ.get("HTTP_SIGNER_HOST", "")
        if name != LIST or response.status not in (HTTPStatus.OK, HTTPStatus.NOT_MODIFIED):
            return
        if HOST_NAME.fullmatch(host) is None or (
            len(self._unreported) >= MAX_UNREPORTED and host not in self._unreported
        ):
            return
        version = next(int(value) for header, value in response.headers if header == VERSION_HEADER)
        self._unreported[host] = ("" if peer is None else str(peer), version)

    def chores(self) -> None:
        """Sends what is due; call it about ten times a second."""
        loop = asyncio.get_running_loop()
        if not self._unreported or loop.time() < self._due or (self._task is not None and not self._task.done()):
            return
        self._due = loop.time() + REPORTED_EVERY
        fetches = [
            [host, peer, version]
            for host, (peer, version) in (
                self._unreported.popitem(last=False) for _ in range(min(MAX_FETCHES, len(self._unreported)))
            )
        ]
        self._task = loop.create_task(self._send(fetches))

    async def _send(self, fetches: list[list[object]]) -> None:
        # A keeper that is away hears of these hosts in a minute, when they fetch again.
        with suppress(SignerError):
            await self._keeper.ask_async({"op": "seen", "request_id": new_request_id(), "fetches": fetches})
