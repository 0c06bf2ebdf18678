"""What hosts fetch: the revocation list, a statement of its freshness, and other small files, each with a signature.

The keeper's part of it: it notices that the ledger asks for another list, has that list built by another process
(`list_builder.py`), signs it and puts it where the api reads it, SIGNER_RUN_DIR/published. A statement is signed only
while the published list is the current one: whatever is wrong here, statements stop, and hosts raise an alarm because
the last one gets old. Nothing here holds up signing, and no failure ends the keeper.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

from signer.errors import SignerError, Unavailable
from signer.files import identity_of, read_bounded, write_atomically
from signer.protocol.log_limit import LogLimit
from signer.service.list_builder import Built, not_written, write_public
from signer.ssh.krl import MAX_LIST, krl_version
from signer.ssh.sshsig import sign_armored
from signer.units import timestamp

LIST_NAME: Final = "krl"
LIST_NAMESPACE: Final = "krl.v1@signer"
STATEMENT_NAME: Final = "krl.statement"
STATEMENT_NAMESPACE: Final = "krl-statement.v1@signer"
HOSTS_NAME: Final = "known_hosts"
PUBLISHER_NAME: Final = "krl.publisher"  # the public half of the publishing key, which hosts pin
CANDIDATE_NAME: Final = ".krl.new"
LAST_NAME: Final = "publishing.last"  # in SIGNER_DATA_DIR: which list was published last
RENEWED_EVERY: Final = 60.0  # seconds; hosts raise an alarm at 900
OVERDUE_AFTER: Final = 180  # seconds of age of a statement, after which readiness warns
FIRST_PAUSE: Final = 2.0  # seconds before what failed is tried again; each time twice as long
LONGEST_PAUSE: Final = 60.0
LOOK_EVERY: Final = 0.1  # seconds between two looks for what is due, while no other version is wanted
_MAX_LAST: Final = 4096  # bytes


class Key(Protocol):
    """The publishing key (`ServiceKey` in `ca/service_key.py`)."""

    @property
    def line(self) -> str: ...
    @property
    def raw_public(self) -> bytes: ...
    def sign(self, message: bytes) -> bytes: ...


class Builder(Protocol):
    """Builds a list into the file `CANDIDATE_NAME` (`list_builder.py`)."""

    @property
    def is_busy(self) -> bool: ...
    def start(self) -> None: ...
    def collect(self) -> Built | SignerError | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SignedFile:
    """A small file that is signed again each minute, and at once when its version changes.

    `version` is None while it is not known whether the content is current: then nothing is signed. `render` returns the
    content for a time in seconds since 1970, which must be part of it, so that an old copy cannot pass for a new one.
    """

    name: str
    namespace: str
    version: Callable[[], int | None]
    render: Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class ListState:
    """What is published: its version, None before the first list; when it was last known to be current, in seconds
    since 1970; the version that the ledger asks for, None while that cannot be read; and what failed last."""

    version: int | None
    as_of: int
    wanted: int | None
    failure: SignerError | None = None

    @property
    def newest(self) -> int | None:
        """The version that hosts should have."""
        return self.version if self.wanted is None else self.wanted

    @property
    def is_current(self) -> bool:
        """True if hosts that fetch now get everything that was revoked."""
        return self.version is not None and self.version == self.wanted

    @property
    def is_behind(self) -> bool:
        """True if the ledger is known to ask for another version than the published one."""
        return self.version is not None and self.version != self.newest

    def warnings(self, now: int) -> list[str]:
        """What should not stay as it is, for whoever looks whether the service is ready; `now` in seconds."""
        if self.failure is not None:
            return [f"the revocation list is not up to date: {self.failure.text}"]
        if self.version is not None and now - self.as_of > OVERDUE_AFTER:
            return [f"the revocation list was last known to be current {now - self.as_of} s ago"]
        return []


class Publisher:
    """Keeps the files in `folder` current. `turn` is called in each round of the keeper's loop and never blocks long.

    `list_version` returns the version of the list that the ledger asks for, None while the ledger cannot be read.
    `last` is a file that outlives restarts: hosts refuse another list of a version that they have, as a release with
    another encoder would make. Then `renumber` records an event that gives the list a new version.
    """

    def __init__(
        self,
        folder: Path,
        key: Key,
        builder: Builder,
        list_version: Callable[[], int | None],
        lines: LogLimit,
        others: Sequence[SignedFile] = (),
        *,
        last: Path,
        renumber: Callable[[], SignerError | None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._key = key
        self._builder = builder
        self._list_version = list_version
        self._lines = lines
        self._last = last
        self._renumber = renumber
        self._clock = clock
        self._monotonic = monotonic
        self._list: Built | None = None  # the one that is published
        self._list_file: tuple[int, int] | None = None  # device and inode of it
        self._began = 0  # when the current build began, in seconds since 1970
        self._asked = 0  # the version that was wanted then
        self._as_of = 0
        self._failure: SignerError | None = None
        self._pause = FIRST_PAUSE
        self._not_before = 0.0  # monotonic seconds
        self._statement_file = SignedFile(STATEMENT_NAME, STATEMENT_NAMESPACE, self._current_version, self._statement)
        self._others = tuple(others)
        self._retries: dict[str, float] = {}  # by name of another file: monotonic seconds
        self._signed: dict[str, tuple[int, float]] = {}  # by name: which version, and when (monotonic seconds)
        self._wanted: list[int | None] = []  # the versions at the last look
        self._look_at = 0.0  # monotonic seconds of the next one

    # --- the keeper's loop --------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Does what is due: in each round what a new version or a build asks for, and the rest every `LOOK_EVERY`."""
        is_building = self._builder.is_busy
        if is_building:
            self._collect()
        now, wanted = self._monotonic(), [self._list_version(), *(file.version() for file in self._others)]
        if now < self._look_at and wanted == self._wanted and not is_building:
            return
        self._wanted, self._look_at = wanted, now + LOOK_EVERY
        if now < self._not_before:
            return
        try:
            if self._needs_list() and not self._builder.is_busy:
                self._open_folder()
                self._began, self._asked = int(self._clock()), self._list_version() or 0
                self._builder.start()
            self._renew(self._statement_file, now)
        except (SignerError, OSError) as error:
            self._fail(error)
        for file in self._others:
            if now >= self._retries.get(file.name, 0.0):
                self._renew_other(file, now)

    def _renew_other(self, file: SignedFile, now: float) -> None:
        """As `_renew`, for a file that does not hold up the list when it fails."""
        try:
            self._renew(file, now)
        except (SignerError, OSError) as error:
            failure = not_written(error) if isinstance(error, OSError) else error
            self._lines.warn(f"{file.name} not published", f"{file.name} is not renewed: {failure.text}")
            self._retries[file.name] = now + FIRST_PAUSE

    def _collect(self) -> None:
        """Publishes the list that was built, if it is ready."""
        result = self._builder.collect()
        if isinstance(result, SignerError):
            self._fail(result)
        elif result is not None:
            try:
                self._publish_list(result)
            except (SignerError, OSError) as error:
                self._fail(error)

    def state(self) -> ListState:
        version = None if self._list is None else self._list.version
        return ListState(version, self._as_of, self._list_version(), self._failure)

    def built(self) -> tuple[int, int | None]:
        """The version of the published list, and when the first certificate on it expires, as `Core.tick` takes it."""
        return (0, None) if self._list is None else (self._list.version, self._list.changes_at)

    def close(self) -> None:
        """Ends a build."""
        self._builder.close()

    # --- the list -----------------------------------------------------------------------------------------------

    def _needs_list(self) -> bool:
        wanted = self._list_version()
        return wanted is not None and (self._list is None or self._list.version != wanted)

    def _current_version(self) -> int | None:
        """The version of the published list while it is the one that is wanted."""
        return None if self._list is None or self._list.version != self._list_version() else self._list.version

    def _publish_list(self, built: Built) -> None:
        """Signs the list that was built and publishes it, with a statement as of the time when its build began."""
        candidate = self._folder / CANDIDATE_NAME
        content = read_bounded(candidate, MAX_LIST)
        if sha256(content).hexdigest() != built.sha256 or krl_version(content) != built.version:
            raise Unavailable("list_differs", "the revocation list changed after it was built", "see who may write it")
        if built.version < self._asked or (self._list is not None and built.version <= self._list.version):
            text = f"version {built.version} of the revocation list was built where {self._asked} was to be"
            raise Unavailable("list_older", text, "restart the keeper if its ledger was replaced")
        if self._differs_from_last(built):
            self._lines.warn("list renumbered", f"version {built.version} of the revocation list has other bytes now")
            if (failure := self._renumber()) is not None:
                raise failure
            return
        statement = render_statement(built, self._began)
        self._replace(
            {
                f"{LIST_NAME}.sig": self._sign(content, LIST_NAMESPACE),
                STATEMENT_NAME: statement,
                f"{STATEMENT_NAME}.sig": self._sign(statement, STATEMENT_NAMESPACE),
                PUBLISHER_NAME: f"{self._key.line}\n".encode(),
            },
            {LIST_NAME: candidate},
        )
        self._list, self._list_file = built, identity_of(self._folder / LIST_NAME)
        self._as_of = self._began
        self._signed[STATEMENT_NAME] = built.version, self._monotonic()
        self._failure, self._pause, self._not_before = None, FIRST_PAUSE, 0.0
        self._remember(built)

    def _differs_from_last(self, built: Built) -> bool:
        """True if another list was published under this version, as far as `last` says."""
        try:
            known = json.loads(read_bounded(self._last, _MAX_LAST))
            return bool(known["version"] == built.version != 0 and known["sha256"] != built.sha256)
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def _remember(self, built: Built) -> None:
        """Notes the list in `last`; one that cannot be written, as on a full disk, is only missed after an upgrade."""
        content = json.dumps({"version": built.version, "sha256": built.sha256}).encode() + b"\n"
        try:
            if not self._last.exists() or read_bounded(self._last, _MAX_LAST) != content:
                write_atomically(self._last, content, 0o600)
        except OSError as error:
            self._lines.warn("list not remembered", f"{self._last.name} cannot be written: {error.strerror}")

    def _statement(self, as_of: int) -> bytes:
        assert self._list is not None, "a statement is about a published list"  # noqa: S101
        return render_statement(self._list, as_of)

    # --- files --------------------------------------------------------------------------------------------------

    def _renew(self, file: SignedFile, now: float) -> None:
        """Signs and writes a file if it is due; `now` is in monotonic seconds."""
        version = file.version()
        if version is None:
            return
        signed = self._signed.get(file.name)
        if signed is not None and signed[0] == version and now < signed[1] + RENEWED_EVERY:
            return
        if file.name == STATEMENT_NAME and identity_of(self._folder / LIST_NAME) != self._list_file:
            self._list, self._look_at = None, 0.0  # somebody removed it: the next turn has it built again
            return
        as_of = int(self._clock())
        content = file.render(as_of)
        self._open_folder()
        self._replace({file.name: content, f"{file.name}.sig": self._sign(content, file.namespace)})
        self._signed[file.name] = version, now
        if file.name == STATEMENT_NAME:
            self._as_of = as_of
            self._failure, self._pause = None, FIRST_PAUSE

    def _sign(self, content: bytes, namespace: str) -> bytes:
        return sign_armored(content, namespace, self._key.raw_public, self._key.sign).encode()

    def _replace(self, contents: Mapping[str, bytes], ready: Mapping[str, Path] | None = None) -> None:
        """Replaces files, all at nearly the same time; `ready` are written already. Raises `OSError`.

        A host that fetches in between finds files that do not belong together, and fetches again. Nothing is synced:
        a keeper that starts writes every file again.
        """
        renames = dict(ready or {})
        try:
            for name, content in contents.items():
                first = self._folder / f".{name}.new"
                renames[name] = first
                write_public(first, content)
            for name, first in renames.items():
                first.rename(self._folder / name)
        except OSError:
            for first in renames.values():
                with suppress(OSError):
                    first.unlink(missing_ok=True)
            raise

    def _open_folder(self) -> None:
        """Makes the folder if it is not there, with the group of SIGNER_RUN_DIR, in which the api is."""
        parent = self._folder.parent.stat()
        mode = 0o750 | parent.st_mode & stat.S_ISGID
        try:
            facts = self._folder.lstat()
        except FileNotFoundError:
            # The mode is right from the start: a chmod by a user who is not in the group clears the set-group-id bit.
            before = os.umask(0o027)
            try:
                self._folder.mkdir(0o750)
            finally:
                os.umask(before)
            facts = self._folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or stat.S_IMODE(facts.st_mode) != mode or facts.st_uid != os.geteuid():
            raise Unavailable(
                "published_folder_unusable",
                f"{self._folder.name} in SIGNER_RUN_DIR has mode {stat.S_IMODE(facts.st_mode):04o}"
                f" and owner {facts.st_uid}",
                "remove it: the keeper makes it again",
            )

    def _fail(self, error: SignerError | OSError) -> None:
        """Keeps what is published, and tries again after a pause."""
        self._failure = failure = not_written(error) if isinstance(error, OSError) else error
        self._lines.warn("list not published", f"{failure.text} ({failure.code}); {failure.hint}")
        self._not_before = self._monotonic() + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


def render_statement(published: Built, as_of: int) -> bytes:
    """The statement that the list was the current one at `as_of`, in seconds since 1970."""
    text = f'{{"as_of":"{timestamp(as_of)}","sha256":"{published.sha256}","version":{published.version}}}\n'
    return text.encode()
