"""The process that builds a revocation list from the ledger and reads it back, and the keeper's end of it.

A list is read back by this program's reader and by `ssh-keygen`, whose reader is the one that hosts use, and compared
with what was meant: sshd refuses every key while its list cannot be loaded. That takes up to a second for a large list,
so it happens outside the keeper's loop. The process holds no key; it writes the list for the keeper, which signs it.

`python -m signer.service.list_builder DATA_DIR FILE` is the process.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from signer.errors import BadFormat, SignerError, Unavailable, write_hint
from signer.files import undone_by, write_new
from signer.hardening import serve_parent_only
from signer.ledger.reader import LedgerReader
from signer.ledger.revoked import read_list
from signer.service.scheduling import stay_on
from signer.ssh.krl import MAX_LIST, RevocationList, check_listing, decode_krl, encode_krl
from signer.subprocesses import NoSuchCommand, run

BUILT_WITHIN: Final = 120.0  # seconds; a list of 100,000 scattered serials takes 1 on an idle machine
ENDS_WITHIN: Final = 0.2  # seconds for a process that was killed
READ_BACK_WITHIN: Final = 60.0  # seconds for ssh-keygen
FILE_MODE: Final = 0o640  # the api's user reads it through the folder's group
_MAX_LISTING: Final = 64 * 1024 * 1024  # bytes that ssh-keygen may print; a serial takes 29 at most
_MAX_REPLY: Final = 8192  # bytes
_PASSED_ON: Final = ("PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS")


class Built(msgspec.Struct, frozen=True, tag="built"):
    """A list that is in the file: its version, the hex SHA-256 of its bytes, and when the first certificate on it
    expires (seconds since 1970; None: never)."""

    version: int
    sha256: str
    changes_at: int | None = None


class _Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why there is no list."""

    code: str
    text: str
    hint: str


class ListBuilder:
    """Has lists built by a process, one at a time. Never blocks."""

    def __init__(
        self, data_dir: Path, file: Path, selector: selectors.BaseSelector, processors: Collection[int] = ()
    ) -> None:
        self._command = [sys.executable, "-P", "-m", "signer.service.list_builder", str(data_dir), str(file)]
        self._selector = selector
        self._processors = processors  # as of `HelperProcess`
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: list[subprocess.Popen[bytes]] = []
        self._reply = b""
        self._started = 0.0

    @property
    def is_busy(self) -> bool:
        """True while a list is being built."""
        return self._process is not None

    def start(self) -> None:
        """Starts to build; raises `Unavailable` if no process can be started."""
        self._killed = [process for process in self._killed if process.poll() is None]
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/", env=environment
            )
        except OSError as error:
            raise _not_built(f"no process can be started: {error.strerror}") from None
        if self._processors:
            stay_on(self._processors, process.pid)
        assert process.stdout is not None, "it is a pipe"  # noqa: S101
        os.set_blocking(process.stdout.fileno(), False)
        self._process, self._reply, self._started = process, b"", time.monotonic()
        self._selector.register(process.stdout, selectors.EVENT_READ, self)

    def collect(self) -> Built | SignerError | None:
        """What became of the list; None while it is being built."""
        process = self._process
        if process is None:
            return None
        assert process.stdout is not None, "it is a pipe"  # noqa: S101
        try:
            piece = os.read(process.stdout.fileno(), _MAX_REPLY)
        except BlockingIOError:
            if time.monotonic() < self._started + BUILT_WITHIN:
                return None
            self.close()
            return _not_built(f"it took longer than {BUILT_WITHIN:.0f} s")
        self._reply += piece
        if piece and len(self._reply) < _MAX_REPLY:
            return None
        reply = self._reply
        self.close()
        return _read_result(reply)

    def close(self) -> None:
        """Ends the process. It is not waited for any longer: on a disk that hangs it does not end."""
        if (process := self._process) is not None:
            assert process.stdout is not None, "it is a pipe"  # noqa: S101
            self._selector.unregister(process.stdout)
            process.stdout.close()
            process.kill()
            self._process = None
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDS_WITHIN)
                return
            self._killed.append(process)


def _read_result(reply: bytes) -> Built | SignerError:
    try:
        found = msgspec.json.decode(reply, type=Built | _Failed)
    except msgspec.DecodeError:
        return _not_built("the process ended without a result")
    return found if isinstance(found, Built) else Unavailable(found.code, found.text, found.hint)


def _not_built(why: str) -> Unavailable:
    hint = "see the service's log; hosts keep the last list until the next one is built"
    return Unavailable("list_not_built", f"the revocation list cannot be built: {why}", hint)


def not_written(error: OSError) -> Unavailable:
    """The error for a folder that does not take the list."""
    text = f"the revocation list cannot be written: {error.strerror}"
    return Unavailable("list_not_written", text, write_hint(error, "SIGNER_RUN_DIR"))


def write_public(path: Path, content: bytes) -> None:
    """Writes a file for the api, in the place of one that an earlier run left; raises `OSError`."""
    path.unlink(missing_ok=True)
    write_new(path, content, FILE_MODE, is_synced=False)
    path.chmod(FILE_MODE)  # whatever the umask


# --- the process ------------------------------------------------------------------------------------------------------


def build(revoked: RevocationList, file: Path, environment: Mapping[str, str]) -> Built:
    """Writes the list to `file`, whole and read back, or not at all; raises `Unavailable`."""
    content = encode_krl(revoked)
    if len(content) > MAX_LIST:
        raise _not_built(f"it would have {len(content)} bytes, and hosts read {MAX_LIST}")
    try:
        write_public(file, content)
    except OSError as error:
        raise not_written(error) from None
    with undone_by(partial(file.unlink, missing_ok=True)):
        check_readable(file, revoked, environment)
    return Built(revoked.version, sha256(content).hexdigest())


def check_readable(file: Path, meant: RevocationList, environment: Mapping[str, str]) -> None:
    """Raises `Unavailable` unless this program and `ssh-keygen` both read the list that is meant from the file."""
    try:
        if decode_krl(file.read_bytes()) != meant:
            raise BadFormat("bad_format", "it does not read as the list that was meant")
        done = run(
            ["ssh-keygen", "-Qlf", str(file)],
            environment={"PATH": environment.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"},
            within=READ_BACK_WITHIN,
            most=_MAX_LISTING,
        )
        if done.status is None:
            raise BadFormat("bad_format", f"ssh-keygen did not read it within {READ_BACK_WITHIN:.0f} s")
        if done.status != 0 or not done.is_whole:
            said = (done.err.strip().splitlines() or ["nothing"])[-1]
            raise BadFormat("bad_format", f"ssh-keygen ends with status {done.status} and says {said[:120]!a}")
        check_listing(done.out, meant)
    except NoSuchCommand as error:
        text = f"a revocation list is not published without ssh-keygen to read it back: {error.text}"
        raise Unavailable("ssh_keygen_missing", text, "install openssh-client") from None
    except (BadFormat, OSError) as error:
        why = error.text if isinstance(error, SignerError) else str(error.strerror)
        raise Unavailable(
            "list_differs", f"the revocation list is not published: {why}", "keep the ledger, and report it as a bug"
        ) from None


def main(data_dir: Path, file: Path) -> None:
    """The process. It ends with the keeper, not by the signals that a terminal or systemd sends to both."""
    serve_parent_only()
    reply: Built | _Failed
    try:
        with closing(LedgerReader(data_dir)) as reader:
            found = read_list(reader)
        reply = msgspec.structs.replace(build(found.revoked, file, os.environ), changes_at=found.changes_at)
    except SignerError as error:
        reply = _Failed(error.code, error.text, error.hint)
    with suppress(BrokenPipeError):  # the keeper has given up
        os.write(sys.stdout.fileno(), msgspec.json.encode(reply))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
