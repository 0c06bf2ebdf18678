"""Runs the session's command with the signals and the exit status that a user at a terminal expects."""

# ruff: noqa: PTH112
# (pathlib costs more to import than everything here)

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not `signal`: its enums cost 8 ms
import os

from signer.safe_session.statuses import NOT_EXECUTABLE, SIGNALLED, NoCommand

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from types import FrameType

_KEYBOARD_SIGNALS = (_signal.SIGINT, _signal.SIGQUIT)
_FORWARDED_SIGNALS = (_signal.SIGTERM, _signal.SIGHUP)
HANDLED_SIGNALS = (*_KEYBOARD_SIGNALS, *_FORWARDED_SIGNALS)

# Options in front of the user's own words; ssh keeps the first value of each, so these override ~/.ssh/config.
SSH_OPTIONS = (
    # Only the private agent holds the session's key; ssh tries no key files.
    ("IdentityAgent", "SSH_AUTH_SOCK"),
    ("IdentityFile", "none"),
    # `IdentitiesOnly yes` is common in configurations and would keep ssh from asking the private agent.
    ("IdentitiesOnly", "no"),
    ("PubkeyAuthentication", "yes"),
    # ssh never offers plain keys that the configuration names, even if the server refuses the certificate.
    ("PubkeyAcceptedAlgorithms", "ssh-ed25519-cert-v01@openssh.com"),
    # No password or GSSAPI instead of the certificate; keyboard-interactive may be a second factor.
    ("PreferredAuthentications", "publickey,keyboard-interactive"),
    # A shared connection may use another credential, and one opened here would outlive the certificate.
    ("ControlPath", "none"),
    # The private agent is not forwarded unless this command has -A.
    ("ForwardAgent", "no"),
)
# Where no terminal is, unless the command line has a ControlPersist of its own (with -M and -S).
NO_PERSIST = ("ControlPersist", "no")


class EndedBySignal(BaseException):
    """A signal arrived before the command was started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_on_signals() -> None:
    """Makes SIGTERM and SIGHUP raise `EndedBySignal` until the command runs, unless they are ignored (nohup)."""
    for number in _FORWARDED_SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, _raise_ended)


def _raise_ended(number: int, _frame: FrameType | None) -> None:
    raise EndedBySignal(number)


def has_terminal() -> bool:
    """True if somebody reads stderr; otherwise a program reads, which waits for the end of all that is written."""
    return os.isatty(2)


def ssh_command(words: list[str], *, may_persist: bool = True) -> list[str]:
    """The ssh command: `SSH_OPTIONS`, then `words` unchanged. Without `may_persist` no master connection outlives it,
    which would hold the standard streams of whoever waits for their end."""
    return ["ssh", *option_words(may_persist=may_persist), *words]


def option_words(*, may_persist: bool) -> list[str]:
    options = SSH_OPTIONS if may_persist else (*SSH_OPTIONS, NO_PERSIST)
    return [part for name, value in options for part in ("-o", f"{name}={value}")]


def find_command(name: str, *, required: bool = True) -> str:
    """The path of the command `name`, found as the shell finds it. Called before the request, so that a mistyped name
    does not cost a certificate. Raises `NoCommand`, or returns "" unless `required`."""
    if "/" in name:
        return name
    for folder in os.environ.get("PATH", os.defpath).split(":"):
        path = f"{folder or '.'}/{name}"
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    if not required:
        return ""
    raise NoCommand(f"no such command: {name}", "check its name and PATH")


def session_environment(agent_socket: str, programs: str) -> dict[str, str]:
    """The environment of the session's command: the private agent, and the folder `programs` first on PATH."""
    environment = {**os.environ, "SSH_AUTH_SOCK": agent_socket}
    environment.pop("SSH_AGENT_PID", None)
    environment["PATH"] = f"{programs}:{environment.get('PATH', os.defpath)}"
    return environment


def run(path: str, command: list[str], environment: dict[str, str]) -> int:
    """Runs `command` from the file `path` and returns its exit status: 0 to 255, 128+n for signal n.

    The terminal sends Ctrl-C and Ctrl-\\ to both processes; this one ignores them and waits. SIGTERM and SIGHUP are
    passed on.
    Raises `NoCommand`.
    """
    handled = [number for number in HANDLED_SIGNALS if _signal.getsignal(number) != _signal.SIG_IGN]
    # Blocked until there is a child to pass them on to; other threads must block them already.
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, HANDLED_SIGNALS)
    try:
        woken, wake = os.pipe()
        child = os.posix_spawn(
            path,
            command,
            environment,
            # Python ignores SIGPIPE and SIGXFSZ for itself; `yes | head` must still end.
            setsigdef=(*handled, _signal.SIGPIPE, _signal.SIGXFSZ),
            setsigmask=before,
        )
        for number in handled:
            if number in _KEYBOARD_SIGNALS:
                _signal.signal(number, _signal.SIG_IGN)
            else:  # not ignored first: that would discard one that is blocked so far
                _signal.signal(number, lambda number, _frame: os.kill(child, number))
    except OSError as error:
        raise NoCommand(
            f"cannot run {command[0]}: {(error.strerror or 'unknown reason').lower()}",
            "check its name and mode",
            *(() if isinstance(error, FileNotFoundError) else (NOT_EXECUTABLE,)),
        ) from None
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
    return _wait(child, woken, wake)


def _wait(child: int, woken: int, wake: int) -> int:
    """The exit status. A signal that arrives just before a system call does not interrupt it, and its handler would run
    when the child has ended; so each one also writes a byte to `wake`, and this waits for bytes at `woken`."""
    os.set_blocking(wake, False)
    _signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGCHLD, lambda _number, _frame: None)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGCHLD,))
    # Reaped only after the handlers are gone, so that a late signal cannot reach another process with the same pid.
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        os.read(woken, 512)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    _signal.set_wakeup_fd(-1)
    os.close(woken)
    os.close(wake)
    for number in _FORWARDED_SIGNALS:
        _signal.signal(number, _signal.SIG_IGN)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else SIGNALLED - status
