"""The launcher: binds the api's sockets, starts keeper and api, each as its own user, and restarts them.

It never reads a key: on SIGHUP it opens the key file for a keeper that is no longer root.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from signer.errors import BadSettings, Unavailable, write_hint
from signer.files import open_name
from signer.hardening import check_users, die_with_parent, look_up_user, peer_process
from signer.service.key_channel import hand_over, make_channel
from signer.service.listeners import bind_listeners, check_listeners
from signer.settings import Settings

log = logging.getLogger("signer.serve")

READY_WITHIN: Final = 15.0  # seconds for a keeper's first start
API_STOPS_WITHIN: Final = 3.0  # seconds; the keeper stops after the api, so that every accepted request is answered
KEEPER_STOPS_WITHIN: Final = 2.0
RESTART_PAUSE: Final = (0.0, 0.2, 0.5, 1.0)  # seconds before a restart, by the number of failed starts in a row
POLL_INTERVAL: Final = 0.02  # seconds between two checks of the children
STABLE_AFTER: Final = 2.0  # seconds of running after which the api counts as started
_SHARED_MODE: Final = 0o2750  # of the run directory with two users
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS")


@dataclass(slots=True)
class _Child:
    """A process that is restarted whenever it ends."""

    name: str
    argv: Sequence[str]
    user: str | None
    is_up: Callable[[_Child], bool]
    key_file: Path | None = None  # opened and passed to it on each SIGHUP
    descriptors: tuple[int, ...] = ()  # passed to it at each start
    process: subprocess.Popen[bytes] | None = None
    channel: socket.socket | None = None
    started: float = 0.0
    came_up: bool = False
    failures: int = 0
    due: float = 0.0

    def start(self) -> None:
        ids: dict[str, object] = {}
        if self.user is not None:
            entry = look_up_user(self.user)
            ids = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        argv = [*self.argv]
        theirs = None
        if self.key_file is not None:
            if self.channel is not None:
                self.channel.close()
            # A new channel for each start, without unread messages of the last keeper.
            self.channel, theirs = make_channel()
            argv += ["--key-channel", str(theirs.fileno())]
        environment = {
            name: value for name, value in os.environ.items() if name.startswith("SIGNER_") or name in _PASSED_ON
        }
        self.process = subprocess.Popen(
            argv,
            pass_fds=[*self.descriptors, *([theirs.fileno()] if theirs is not None else [])],
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - the launcher has one thread
            **ids,  # type: ignore[call-overload]
        )
        if theirs is not None:
            theirs.close()
        self.started = time.monotonic()
        self.came_up = False

    def reload(self) -> None:
        """Passes the current key file, then sends SIGHUP."""
        if self.channel is not None and self.key_file is not None and self.is_running():
            try:
                hand_over(self.channel, self.key_file)
            except OSError as error:
                log.warning("the key file could not be passed to the %s: %s", self.name, error.strerror)
        self.send_signal(signal.SIGHUP)

    def update(self) -> None:
        """Notes whether the start succeeded, which decides the pause before a restart."""
        self.came_up = self.came_up or self.is_up(self)

    def send_signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def schedule_restart(self) -> None:
        """Logs the end of the process and schedules its restart."""
        assert self.process is not None, "only a child that was started can end"  # noqa: S101
        self.failures = 0 if self.came_up else self.failures + 1
        pause = RESTART_PAUSE[min(self.failures, len(RESTART_PAUSE) - 1)]
        log.warning("%s ended with status %s, restarting it", self.name, self.process.returncode)
        self.process, self.due = None, time.monotonic() + pause

    def stop(self, within: float) -> None:
        """Sends SIGTERM, and SIGKILL after `within` seconds."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop within %.0f s and was killed", self.name, within)
            self.process.kill()
            self.process.wait()


def run_service(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; raises `SignerError` if the service cannot start."""
    for warning in settings.warnings:
        log.warning("%s", warning)
    _check_users(settings)
    listeners = bind_listeners(settings)  # before anything else: it needs root, and a port may be taken
    check_listeners(listeners, settings)
    _prepare_directories(settings)
    as_root = os.geteuid() == 0
    keeper = _Child(
        "keeper",
        (sys.executable, "-P", "-m", "signer", "keeper"),
        None,
        lambda child: _listens(child, settings),
        settings.ca_key_file if settings.reads_key_file else None,
    )
    numbers = tuple(listener.fileno() for listener in listeners)
    passed = [word for number in numbers for word in ("--listener", str(number))]
    api = _Child(
        "api",
        (sys.executable, "-P", "-m", "signer", "api", *passed),
        settings.api_user if as_root else None,
        _is_stable,
        descriptors=numbers,
    )
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _frame: stopping.append(got))
    signal.signal(signal.SIGHUP, lambda _got, _frame: keeper.reload())
    try:
        keeper.start()
        _wait_until_ready(keeper, stopping)
        api.start()
        log.warning("serving on %s", ", ".join(map(str, settings.listen)))
        _supervise((keeper, api), stopping)
    finally:
        api.stop(API_STOPS_WITHIN)
        keeper.stop(KEEPER_STOPS_WITHIN)
        _close(listeners, settings)


def _close(listeners: list[socket.socket], settings: Settings) -> None:
    """Stops to listen, and removes the unix sockets."""
    for listener, listen in zip(listeners, settings.listen, strict=True):
        listener.close()
        if listen.path is not None:
            listen.path.unlink(missing_ok=True)


def _supervise(children: tuple[_Child, ...], stopping: list[int]) -> None:
    while not stopping:
        for child in children:
            if child.is_running():
                child.update()
            elif child.process is not None:
                child.schedule_restart()
            if child.process is None and time.monotonic() >= child.due:
                child.start()
        _reap_orphans(children)
        time.sleep(POLL_INTERVAL)


def _reap_orphans(children: tuple[_Child, ...]) -> None:
    """Reaps orphans that this process adopted, as process 1 of a container does."""
    ours = {child.process.pid for child in children if child.process is not None}
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # no children
            return
        if ended is None or ended.si_pid in ours:  # `_supervise` handles its own children
            return
        os.waitpid(ended.si_pid, 0)


def _wait_until_ready(keeper: _Child, stopping: list[int]) -> None:
    """Returns when the keeper accepts connections; raises `Unavailable` if it ends, or does not in time."""
    deadline = time.monotonic() + READY_WITHIN
    while not stopping and not keeper.came_up:
        if not keeper.is_running():
            raise Unavailable("keeper_refused_to_start", "the keeper did not start", "fix the problem above")
        if time.monotonic() > deadline:
            raise Unavailable("keeper_too_slow", f"the keeper was not ready within {READY_WITHIN:.0f} s", "see its log")
        time.sleep(POLL_INTERVAL)
        keeper.update()


def _listens(keeper: _Child, settings: Settings) -> bool:
    """True if this keeper accepts connections; the socket may belong to another service."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(settings.socket))
        except OSError:
            return False
        pid = peer_process(probe).pid
    return keeper.process is not None and pid == keeper.process.pid


def _is_stable(api: _Child) -> bool:
    return time.monotonic() - api.started > STABLE_AFTER


def _check_users(settings: Settings) -> None:
    """Raises `BadSettings` unless both users are usable; logs a warning if one of them is root."""
    check_users(settings.keeper_user, settings.api_user)
    for name, user in _users(settings):
        if user is not None and look_up_user(user).pw_uid == 0:
            log.warning("%s is root: a compromise of that process compromises the host", name)


def _users(settings: Settings) -> tuple[tuple[str, str | None], ...]:
    return (("SIGNER_KEEPER_USER", settings.keeper_user), ("SIGNER_API_USER", settings.api_user))


def _prepare_directories(settings: Settings) -> None:
    """Creates the data and run directories and sets their owners and modes.

    With two users, the run directory is set-group-id to the api's group, which the socket inherits. Root in a
    container may only change owners and users: owners are set last, and root joins the group to reach the socket.
    """
    _make_directory(settings.data_dir, 0o700)
    _make_directory(settings.run_dir, 0o700)
    if os.geteuid() != 0 or settings.keeper_user is None or settings.api_user is None:
        return
    keeper, api = look_up_user(settings.keeper_user), look_up_user(settings.api_user)
    shared = keeper.pw_uid != api.pw_uid
    try:
        for path in _ledger_files(settings.data_dir, keeper.pw_uid):
            _give(path, keeper.pw_uid, keeper.pw_gid)
        _set_owner(settings.data_dir, keeper.pw_uid, keeper.pw_gid)
        if shared:
            os.setgroups([api.pw_gid])
            if stat.S_IMODE(settings.run_dir.stat().st_mode) != _SHARED_MODE:
                settings.run_dir.chmod(_SHARED_MODE)
        _set_owner(settings.run_dir, keeper.pw_uid, api.pw_gid if shared else keeper.pw_gid)
    except OSError as error:
        raise BadSettings(
            "directory_unusable",
            f"{error.filename or 'the run directory'} cannot be prepared: {error.strerror}",
            f"{write_hint(error, 'it')}; root needs CAP_CHOWN and CAP_SETGID",
        ) from None


def _ledger_files(folder: Path, owner: int) -> list[Path]:
    """The ledger's own files in a folder; none if `owner` already owns it and root may not read it."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith(("ledger.", "views."))]
    except PermissionError:
        if folder.stat().st_uid != owner:
            raise
        return []


def _give(path: Path, uid: int, gid: int) -> None:
    """Changes the owner of a regular file with one name; leaves a link to anything else as it is.

    The keeper's user may put names into its folder, and this process is root.
    """
    descriptor = open_name(path)
    try:
        facts = os.fstat(descriptor)
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 and (facts.st_uid, facts.st_gid) != (uid, gid):
            os.chown(f"/proc/self/fd/{descriptor}", uid, gid)
    finally:
        os.close(descriptor)


def _set_owner(path: Path, uid: int, gid: int) -> None:
    facts = path.lstat()
    if (facts.st_uid, facts.st_gid) != (uid, gid):  # a read-only file system refuses even a chown to the same owner
        os.chown(path, uid, gid, follow_symlinks=False)


def _make_directory(path: Path, mode: int) -> None:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise BadSettings(
            "directory_unusable",
            f"{path} cannot be created: {error.strerror}",
            write_hint(error, "its parent directory"),
        ) from None
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise BadSettings("directory_unusable", f"{path} is not a directory", "use another path")
