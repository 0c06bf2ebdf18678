"""Runs the session's command as a terminal user expects: its signals, its exit status, nothing of ours in its way."""

# ruff: noqa: PTH112
# (pathlib costs more to import than everything here)

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not `signal`: its enums cost 8 ms
import os

from signer.errors import SignerError

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from types import FrameType

_FROM_KEYBOARD = (_signal.SIGINT, _signal.SIGQUIT)
_TO_PASS_ON = (_signal.SIGTERM, _signal.SIGHUP)

# What ssh is told before the user's own words; ssh keeps the first value it hears, so these beat ~/.ssh/config.
SSH_OPTIONS = (
    # The session's key is in our agent and in no other, and no file is tried.
    ("IdentityAgent", "SSH_AUTH_SOCK"),
    ("IdentityFile", "none"),
    # `IdentitiesOnly yes` is common in configurations and would keep ssh from asking our agent.
    ("IdentitiesOnly", "no"),
    ("PubkeyAuthentication", "yes"),
    # Keys that the configuration still names are no certificates: never offered, even if ours is refused.
    ("PubkeyAcceptedAlgorithms", "ssh-ed25519-cert-v01@openssh.com"),
    # No password and no GSSAPI instead of the certificate; keyboard-interactive stays, as it may be a second factor.
    ("PreferredAuthentications", "publickey,keyboard-interactive"),
    # A shared master is a login that was made with something else, and one that we make would outlive the certificate.
    ("ControlPath", "none"),
    # The private agent stays here unless the user says -A in this very command.
    ("ForwardAgent", "no"),
)


class Ended(BaseException):
    """A signal asked us to end before the command was started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class NoCommand(SignerError):
    """The command cannot be executed."""


def end_on_signals() -> None:
    """Until the command runs, SIGTERM and SIGHUP raise `Ended`; what our parent had us ignore (nohup) stays ignored."""
    for number in _TO_PASS_ON:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, _raise_ended)


def _raise_ended(number: int, _frame: FrameType | None) -> None:
    raise Ended(number)


def ssh_command(words: list[str]) -> list[str]:
    """`words` as the user wrote them, behind our options."""
    return ["ssh", *(part for name, value in SSH_OPTIONS for part in ("-o", f"{name}={value}")), *words]


def find_command(name: str) -> str:
    """The file that `name` stands for, as the shell would find it. Looked up before anything is asked for, so that a
    typing error costs no certificate. Raises `NoCommand`."""
    if "/" in name:
        return name
    for folder in os.environ.get("PATH", os.defpath).split(":"):
        path = f"{folder or '.'}/{name}"
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise NoCommand("no_command", f"no such command: {name}", "check its name and PATH")


def run(path: str, command: list[str], agent_socket: str) -> int:
    """Runs `command` from the file `path` with the agent, waits, returns its status: 0 to 255, 128+n for signal n.

    Ctrl-C and Ctrl-\\ come to both from the terminal: the command decides, we wait. SIGTERM and SIGHUP are passed on.
    Raises `NoCommand`.
    """
    environment = {**os.environ, "SSH_AUTH_SOCK": agent_socket}
    environment.pop("SSH_AGENT_PID", None)
    everyday = (*_FROM_KEYBOARD, *_TO_PASS_ON)
    heeded = [number for number in everyday if _signal.getsignal(number) != _signal.SIG_IGN]
    # Held back until there is a child to pass them on to.
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, everyday)
    try:
        child = os.posix_spawn(
            path,
            command,
            environment,
            # Python ignores SIGPIPE and SIGXFSZ for itself; `yes | head` must still end.
            setsigdef=(*heeded, _signal.SIGPIPE, _signal.SIGXFSZ),
            setsigmask=before,
        )
        for number in heeded:
            _signal.signal(number, _signal.SIG_IGN)
        for number in set(heeded).intersection(_TO_PASS_ON):
            _signal.signal(number, lambda number, _frame: os.kill(child, number))
    except OSError as error:
        raise NoCommand(
            "no_command",
            f"cannot run {command[0]}: {(error.strerror or 'unknown reason').lower()}",
            "check its name and mode",
        ) from None
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
    return _wait(child)


def _wait(child: int) -> int:
    # Not reaped before the handlers are gone: its number cannot be another process's when a late signal is passed on.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    for number in _TO_PASS_ON:
        _signal.signal(number, _signal.SIG_IGN)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status
