"""The exit statuses of `safe-session`: numbers of sysexits.h, so that a program knows what to do next.

Everything from 64 to 78 means that the command was not run. 1 and 2 are never used: they are the command's own.
"""

from __future__ import annotations

from signer.errors import BadSettings, NotAuthenticated, NotFound, Refused, SignerError, Unavailable

USAGE = 64  # EX_USAGE: the command line is not valid
NOT_REACHABLE = 69  # EX_UNAVAILABLE: no usable answer from the service, or a program of this host is missing
INTERNAL = 70  # EX_SOFTWARE: an error of safe-session itself
NOT_WRITTEN = 74  # EX_IOERR: --help or another result cannot be written
LATER = 75  # EX_TEMPFAIL: a human has not decided yet, or a limit is reached
REFUSED = 77  # EX_NOPERM: refused, denied, expired or frozen
SETTINGS = 78  # EX_CONFIG: an environment variable or the token file is missing or wrong
NOT_EXECUTABLE = 126  # as of a shell
NO_COMMAND = 127  # as of a shell
INTERRUPTED = 130  # Ctrl-C before the command was started
SIGNALLED = 128  # plus the signal's number


class UsageError(SignerError):
    """The command line is not valid; nothing was done."""

    def __init__(self, text: str, hint: str = "see `safe-session --help`") -> None:
        super().__init__("usage", text, hint)


class NoCommand(SignerError):
    """The command does not exist, or cannot be executed (`status` says which)."""

    def __init__(self, text: str, hint: str, status: int = NO_COMMAND) -> None:
        super().__init__("no_command", text, hint)
        self.status = status


class NotWritten(Unavailable):
    """A result cannot be written to stdout."""

    def __init__(self, reason: str) -> None:
        super().__init__("output_failed", f"the result cannot be written: {reason}", "check where stdout leads")


class Internal(SignerError):
    """An error of this program; `text` names the place."""

    def __init__(self, text: str) -> None:
        super().__init__("fault_of_ours", text, "report this line with the command that led to it")


class Limited(Refused):
    """A limit of the role or of the service is reached; the same request succeeds later."""


# Codes of the service's own, by the state of a request that is over.
_OVER = {
    "denied": "request_denied",
    "expired": "request_expired",
    "issued": "request_issued",
    "lapsed": "request_lapsed",
    "withdrawn": "request_withdrawn",
}


class StillPending(SignerError):
    """No human has decided yet. `facts` are what the JSON line shows of the request."""


class RequestOver(Refused):
    """A request to humans ended without a certificate. `state` says how: denied, expired, withdrawn, lapsed, issued."""

    def __init__(self, state: str, text: str, hint: str, facts: dict[str, object]) -> None:
        super().__init__(_OVER[state], text, hint, facts)
        self.state = state


# The first that fits; anything else means that there was no usable answer.
_BY_TYPE: tuple[tuple[type[SignerError], int, str], ...] = (
    (UsageError, USAGE, "usage"),
    (NoCommand, NO_COMMAND, "no_command"),
    (BadSettings, SETTINGS, "settings"),
    (Limited, LATER, "limited"),
    (StillPending, LATER, "pending"),
    (Refused, REFUSED, "refused"),
    (NotAuthenticated, REFUSED, "refused"),
    (NotFound, REFUSED, "refused"),
    (NotWritten, NOT_WRITTEN, "not_written"),
    (Internal, INTERNAL, "internal"),
)


def judge(error: SignerError) -> tuple[int, str]:
    """The exit status of an error, and the word for it in the JSON of `--json` (`state`)."""
    found = ((status, state) for kind, status, state in _BY_TYPE if isinstance(error, kind))
    status, state = next(found, (NOT_REACHABLE, "unreachable"))
    if isinstance(error, NoCommand):
        status = error.status
    elif isinstance(error, RequestOver):
        state = error.state
    elif error.code == "frozen":
        state = "frozen"
    return status, state
