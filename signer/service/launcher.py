"""The launcher: binds the api's sockets, starts keeper and api, each as its own user, and keeps both running.

It never reads a key: at a reload it opens the key file for a keeper that is no longer root. A child that ends is
started again, a child that hangs is killed, and each start repeats what the first one prepared. A shortage of
descriptors, processes or memory delays a start and ends nothing.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from signer.errors import BadSettings, SignerError, Unavailable, write_hint
from signer.files import held, identity_of, open_name
from signer.hardening import acting_as, check_users, look_up_user
from signer.service.child import Child, Ids
from signer.service.control import Client, ControlSocket, error_reply
from signer.service.listeners import bind_listener, bind_listeners, check_listeners
from signer.service.supervisor import Supervisor
from signer.settings import Listen, Settings

log = logging.getLogger("signer.serve")

READY_WITHIN: Final = 30.0  # seconds for the first start of each child
# Less than 5 seconds together. The keeper stops after the api, so that every accepted request is answered.
API_STOPS_WITHIN: Final = 2.8  # seconds
KEEPER_STOPS_WITHIN: Final = 2.0
NOTICES_STOPS_WITHIN: Final = 0.1  # after the others, which take longer
HANGS_AFTER: Final = 30.0  # seconds without a sign of life; a commit that begins is one
POLL_INTERVAL: Final = 0.02  # seconds between two looks at the children
NAMES_EVERY: Final = 1.0  # seconds between two looks at the names of the api's sockets
STABLE_AFTER: Final = 2.0  # seconds of running after which the api counts as started
RELOADED_WITHIN: Final = 45.0  # seconds for a reload; an ssh-agent may be slow
_SHARED_MODE: Final = 0o2750  # of the run directory with two users
_PASSED_THROUGH: Final = 0o711  # of a directory in which others may use a name that they know


@dataclass(slots=True)
class _Reload:
    """A reload in progress, and the reports of it that have come."""

    clients: list[Client]
    waits_for: tuple[Child, ...]
    began: float  # monotonic seconds
    pids: dict[str, int]
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)


class _Launcher:
    """The children, and what is done to them until SIGTERM or SIGINT."""

    def __init__(
        self, settings: Settings, ids: dict[str, Ids], listeners: list[socket.socket], hangs_after: float
    ) -> None:
        self._settings = settings
        self.keeper = Child(
            "keeper",
            lambda: (sys.executable, "-P", "-m", "signer", "keeper"),
            None,
            hangs_after,
            prepare=lambda: _prepare_directories(settings, ids),
            key_file=settings.ca_key_file if settings.reads_key_file else None,
        )
        self._listeners = listeners
        self._names = [_identity_of(listen) for listen in settings.listen]
        self._listener_is_lost = False
        self._looked_at_names = 0.0
        self.api = Child(
            "api",
            lambda: (sys.executable, "-P", "-m", "signer", "api", *self._listener_words()),
            ids.get("SIGNER_API_USER"),
            hangs_after,
            STABLE_AFTER,
            descriptors=lambda: [listener.fileno() for listener in self._listeners],
        )
        self._notices = None if settings.notices_file is None else _notices_child(settings, ids, hangs_after)
        self._needed = (self.keeper, self.api)  # without which the service does not start
        self._children = self._needed if self._notices is None else (*self._needed, self._notices)
        self._control = ControlSocket(settings.run_dir, ids.get("SIGNER_KEEPER_USER"))
        self._control_is_lost = False
        self._reload: _Reload | None = None
        self._waiting: list[Client] = []  # for the next reload
        self._is_reload_due = False
        self._supervisor = Supervisor(None, os.environ)
        self._stopping = False

    def serve(self) -> None:
        """Returns after SIGTERM or SIGINT; raises `SignerError` if the first start fails."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_stop)
        signal.signal(signal.SIGHUP, self._note_reload)
        try:
            for child in self._needed:
                self._start_first(child)
            if not self._stopping:
                log.warning("serving on %s", ", ".join(map(str, self._settings.listen)))
                self._supervisor.ready()
            while not self._stopping:
                self._supervise()
                time.sleep(POLL_INTERVAL)
        finally:
            self._control.close()
            if self._notices is not None:
                self._notices.send_signal(signal.SIGTERM)  # it ends while the others do
            self.api.stop(API_STOPS_WITHIN)
            self.keeper.stop(KEEPER_STOPS_WITHIN)
            if self._notices is not None:
                self._notices.stop(NOTICES_STOPS_WITHIN)

    def _note_stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _note_reload(self, _number: int, _frame: object) -> None:
        self._is_reload_due = True

    def _start_first(self, child: Child) -> None:
        """Returns when the child serves, or at SIGTERM; raises `Unavailable` if it ends, or is not ready in time."""
        deadline = time.monotonic() + READY_WITHIN
        while not self._stopping and not child.came_up:
            if child.is_running():
                child.look()
            elif child.process is None and time.monotonic() >= child.due:
                _try_to_start(child)
            elif child.process is not None:
                raise Unavailable(
                    "keeper_refused_to_start" if child is self.keeper else "api_refused_to_start",
                    f"the {child.name} did not start",
                    "fix the problem above",
                )
            if time.monotonic() > deadline:
                raise Unavailable(
                    "keeper_too_slow" if child is self.keeper else "api_too_slow",
                    f"the {child.name} was not ready within {READY_WITHIN:.0f} s",
                    "see its log",
                )
            self._look_at_control()
            time.sleep(POLL_INTERVAL)

    # --- supervision --------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        for child in self._children:
            if child.is_running():
                child.look()
            elif child.process is not None:
                child.note_end()
            if child.process is None and time.monotonic() >= child.due:
                _try_to_start(child)
        _reap_orphans(self._children)
        self._look_at_control()
        if time.monotonic() - self._looked_at_names >= NAMES_EVERY:
            self._looked_at_names = time.monotonic()
            self._look_at_names()
        self._continue_reload()
        self._supervisor.alive()

    def _listener_words(self) -> list[str]:
        return [word for listener in self._listeners for word in ("--listener", str(listener.fileno()))]

    def _look_at_names(self) -> None:
        """Listens again on each unix socket whose name was removed or replaced; the api then starts again with it."""
        for index, listen in enumerate(self._settings.listen):
            if self._names[index] == _identity_of(listen):
                continue
            try:
                fresh = bind_listener(listen, self._settings.socket_group)
            except SignerError as error:
                if not self._listener_is_lost:
                    log.warning("%s was removed or replaced: %s; %s", listen, error.text, error.hint)
                self._listener_is_lost = True
                continue
            log.warning("%s was removed; listening again", listen)
            self._listeners[index].close()
            self._listeners[index], self._names[index] = fresh, _identity_of(listen)
            self._listener_is_lost = False
            self.api.send_signal(signal.SIGTERM)

    def _look_at_control(self) -> None:
        try:
            self._control.ensure()
        except OSError as error:  # no descriptors, or the directory is away: the keeper's next start makes it again
            if not self._control_is_lost:
                log.warning("`signer reload` does not work: %s", error.strerror)
            self._control_is_lost = True
        else:
            self._control_is_lost = False
        for client, operation in self._control.requests():
            if operation == "reload":
                self._waiting.append(client)
                self._is_reload_due = True
            else:
                client.answer(self._status())

    def _status(self) -> dict[str, object]:
        notices = {} if self._notices is None else {"notices": _state_of(self._notices)}
        return {
            "pid": os.getpid(),
            "listen": [str(listen) for listen in self._settings.listen],
            "data_dir": str(self._settings.data_dir),
            "keeper": _state_of(self.keeper),
            "api": _state_of(self.api),
            **notices,
        }

    # --- reloads ------------------------------------------------------------------------------------------------

    def _continue_reload(self) -> None:
        """Starts a reload that is due once every child takes it, and ends one that is done."""
        if self._reload is not None:
            self._collect_reports(self._reload)
        elif self._is_reload_due:
            asked: tuple[Child, ...] = (self.keeper,)
            if self._settings.tls_cert_file is not None:
                asked += (self.api,)
            if self._notices is not None and self._notices.is_running() and self._notices.came_up:
                asked += (self._notices,)
            if all(child.is_running() and child.came_up for child in asked):
                self._is_reload_due = False
                pids = {child.name: child.pid for child in asked}
                self._reload = _Reload(self._waiting, asked, time.monotonic(), pids)
                self._waiting = []
                for child in asked:
                    child.reports.clear()
                    child.reload()
            else:
                self._give_up_waiting()

    def _give_up_waiting(self) -> None:
        latest = time.monotonic() - RELOADED_WITHIN
        for client in [client for client in self._waiting if client.since < latest]:
            self._waiting.remove(client)
            client.answer(_reload_failed("keeper or api is not running"))

    def _collect_reports(self, reload: _Reload) -> None:
        for child in reload.waits_for:
            for message in child.reports:
                began, report = message.get("began"), message.get("report")
                # An earlier reload, which read the files too early, may end meanwhile.
                if isinstance(began, float) and began >= reload.began and isinstance(report, dict):
                    reload.reports[child.name] = report
            child.reports.clear()
        missing = [child for child in reload.waits_for if child.name not in reload.reports]
        if not missing:
            reply: dict[str, object] = dict(reload.reports)
        elif any(child.pid != reload.pids[child.name] for child in missing):
            reply = _reload_failed("a process ended during the reload; it starts with the files as they are now")
        elif time.monotonic() - reload.began > RELOADED_WITHIN:
            reply = _reload_failed(f"the {missing[0].name} did not finish within {RELOADED_WITHIN:.0f} s")
        else:
            return
        for client in reload.clients:
            client.answer(reply)
        self._reload = None


def run_service(settings: Settings, hangs_after: float = HANGS_AFTER) -> None:
    """Serves until SIGTERM or SIGINT; raises `SignerError` if the service cannot start.

    A child is killed and started again after `hangs_after` seconds without a sign of life.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing has been read that could be read again
    for warning in settings.warnings:
        log.warning("%s", warning)
    _check_users(settings)
    listeners = bind_listeners(settings)  # before anything else: it needs root, and a port may be taken
    try:
        check_listeners(listeners, settings)
        ids = look_up_ids(settings)
        _prepare_directories(settings, ids)
        _Launcher(settings, ids, listeners, hangs_after).serve()
    finally:
        _close(listeners, settings)


def _identity_of(listen: Listen) -> tuple[int, int] | None:
    """Of a unix socket's name; None without one."""
    return None if listen.path is None else identity_of(listen.path)


def _close(listeners: list[socket.socket], settings: Settings) -> None:
    """Stops to listen, and removes the unix sockets."""
    for listener, listen in zip(listeners, settings.listen, strict=True):
        listener.close()
        if listen.path is not None:
            listen.path.unlink(missing_ok=True)


def _notices_child(settings: Settings, ids: dict[str, Ids], hangs_after: float) -> Child:
    """The process that sends notices; it gets no descriptor of a key, a ledger or a socket of the api."""
    return Child(
        "notices",
        lambda: (sys.executable, "-P", "-m", "signer", "notices", "run"),
        ids.get("SIGNER_NOTICES_USER"),
        hangs_after,
        STABLE_AFTER,
        prepare=lambda: _prepare_notices(settings, ids.get("SIGNER_NOTICES_USER")),
    )


def _state_of(child: Child) -> dict[str, object]:
    return {"pid": child.pid, "ready": child.came_up}


def _try_to_start(child: Child) -> None:
    try:
        child.start()
    except (OSError, subprocess.SubprocessError) as error:
        child.note_failed_start(getattr(error, "strerror", None) or str(error))
    except SignerError as error:
        child.note_failed_start(error.text)


def _reload_failed(text: str) -> dict[str, object]:
    return error_reply(Unavailable("reload_unfinished", text, "see the service's log, then try again"))


def _reap_orphans(children: tuple[Child, ...]) -> None:
    """Reaps orphans that this process adopted, as process 1 of a container does."""
    ours = {child.pid for child in children}
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # no children
            return
        if ended is None or ended.si_pid in ours:  # `_supervise` handles its own children
            return
        os.waitpid(ended.si_pid, 0)


def look_up_ids(settings: Settings) -> dict[str, Ids]:
    """The ids of the users that are set, if this is root; once, because a lookup fails while descriptors are short."""
    if os.geteuid() != 0:
        return {}
    found = {name: look_up_user(user) for name, user in settings.users.items() if user is not None}
    return {name: Ids(entry.pw_uid, entry.pw_gid) for name, entry in found.items()}


def _check_users(settings: Settings) -> None:
    """Raises `BadSettings` unless all users are usable; logs a warning if one of them is root."""
    check_users(**settings.users)
    for name, user in settings.users.items():
        if user is not None and look_up_user(user).pw_uid == 0:
            log.warning("%s is root: a compromise of that process compromises the host", name)


def _prepare_directories(settings: Settings, ids: dict[str, Ids]) -> None:
    """Creates the data and run directories and sets their owners and modes.

    With two users, the run directory is set-group-id to the api's group, which the socket inherits. Root in a
    container may only change owners and users: owners are set last, and root joins the group to reach the socket.
    """
    _make_directory(settings.data_dir, 0o700)
    _make_directory(settings.run_dir, 0o700)
    keeper, api = ids.get("SIGNER_KEEPER_USER"), ids.get("SIGNER_API_USER")
    if keeper is None or api is None:
        return
    shared = keeper.user != api.user
    try:
        for path in _ledger_files(settings.data_dir, keeper.user):
            _give(path, keeper.user, keeper.group)
        _set_owner(settings.data_dir, keeper.user, keeper.group)
        if shared:
            os.setgroups([api.group])
            if stat.S_IMODE(settings.run_dir.stat().st_mode) != _SHARED_MODE:
                settings.run_dir.chmod(_SHARED_MODE)
        _set_owner(settings.run_dir, keeper.user, api.group if shared else keeper.group)
    except OSError as error:
        raise BadSettings(
            "directory_unusable",
            f"{error.filename or 'the run directory'} cannot be prepared: {error.strerror}",
            f"{write_hint(error, 'it')}; root needs CAP_CHOWN and CAP_SETGID",
        ) from None


def _prepare_notices(settings: Settings, owner: Ids | None) -> None:
    """Creates the directory of the process that sends notices, through which the keeper reaches its socket."""
    _make_directory(settings.notices_dir, _PASSED_THROUGH)
    if owner is None:
        return
    try:
        facts = settings.notices_dir.lstat()
        if stat.S_IMODE(facts.st_mode) != _PASSED_THROUGH:
            _open_to_pass(settings.notices_dir, facts.st_uid)
        _set_owner(settings.notices_dir, owner.user, owner.group)
    except OSError as error:
        raise BadSettings(
            "directory_unusable",
            f"SIGNER_NOTICES_DIR cannot be prepared: {error.strerror}",
            f"{write_hint(error, 'it')}; root needs CAP_CHOWN",
        ) from None


def _open_to_pass(directory: Path, owner: int) -> None:
    """Root in a container may not change the mode of another user's directory, but become that user."""
    try:
        directory.chmod(_PASSED_THROUGH)
    except PermissionError:
        with acting_as(owner):
            directory.chmod(_PASSED_THROUGH)


def _ledger_files(folder: Path, owner: int) -> list[Path]:
    """The keeper's own files in a folder; none if `owner` already owns it and root may not read it."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith(("ledger.", "views.", "publishing."))]
    except PermissionError:
        if folder.stat().st_uid != owner:
            raise
        return []


def _give(path: Path, uid: int, gid: int) -> None:
    """Changes the owner of a regular file with one name; leaves a link to anything else as it is.

    The keeper's user may put names into its folder, and this process is root.
    """
    with held(open_name(path)) as descriptor:
        facts = os.fstat(descriptor)
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 and (facts.st_uid, facts.st_gid) != (uid, gid):
            os.chown(f"/proc/self/fd/{descriptor}", uid, gid)


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
