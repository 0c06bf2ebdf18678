"""Parses the command line of `safe-session` and separates its own options from the command. Pure.

Not argparse: it would have to know every ssh option to find the start of the remote command, and its import takes
longer than the whole request to the signing service.
"""

from __future__ import annotations

from signer.safe_session.command import has_terminal
from signer.safe_session.statuses import UsageError

# ssh's options that take a value, from the getopt string in ssh.c (OpenSSH 8.5 to 10.x). Needed to find the
# host in `ssh -p 22 host`. With an option that a later ssh adds, write option and value as one word.
_SSH_OPTIONS_WITH_VALUE = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
# ssh answers these itself and connects to nothing: version, supported algorithms, configuration, control of a master.
_ANSWERED_BY_SSH = frozenset("VQGO")
_VALUES = {
    "--role": "role",
    "--reason": "reason",
    "--ttl": "ttl",
    "--principal": "principals",
    "--wait": "wait",
    "--for": "wait",
    "--sign-key": "sign_key",
}
_FLAGS = {"--json": "json", "--no-wait": "no_wait", "--exact": "exact"}
_TAKES_ID = ("wait", "withdraw")
_QUESTIONS = ("whoami", "requests", *_TAKES_ID)
_WRITE_ONE = "write `safe-session ssh HOST` or `safe-session exec -- COMMAND`"
_LONGEST_NUMBER = 9  # digits of a duration
_SECONDS = {"s": 1, "m": 60, "h": 3600}
# Each logs in when it starts and stays connected, so that its session outlives the certificate. Others, such as git
# with submodules or Ansible, may log in again after minutes.
_LOGS_IN_ONCE = frozenset({"ssh", "scp", "sftp", "rsync"})
SHORT_TTL = 120  # seconds; ends soon, as a role's `limits.live` counts what has not ended


class Invocation:
    """A parsed command line. `verb` is ssh, exec, a question of `_QUESTIONS`, help or version; `command` holds the
    words after it without safe-session's own options: the words for ssh, or the whole command of exec. `asks_ssh` is
    true for a question that ssh answers without a login, which needs no certificate. `remote` are the words of ssh's
    remote command, and `sets_persist` says that ssh's options have a ControlPersist. `wait` is in seconds, None if not
    given; `request` is the id that `wait` and `withdraw` are for."""

    def __init__(self) -> None:
        self.verb = ""
        self.command: list[str] = []
        self.role = ""
        self.reason = ""
        self.ttl = ""
        self.principals: list[str] = []
        self.wait: int | None = None
        self.sign_key = ""
        self.request = ""
        self.remote: list[str] = []
        self.json = self.no_wait = self.exact = self.sets_persist = False
        self.verbose = False
        self.asks_ssh = False

    def take_option(self, words: list[str], at: int) -> int:
        """Reads the option at `words[at]`; returns the index after it. Raises `UsageError`."""
        name, equals, value = words[at].partition("=")
        if words[at] in ("-h", "--help", "--version"):
            self.verb = "version" if words[at] == "--version" else "help"
            return len(words)
        if words[at] == "-v" and self.verb in ("", "exec"):
            self.verbose = True
            return at + 1
        if name in _FLAGS:
            if equals:
                raise UsageError(f"{name} takes no value")
            setattr(self, _FLAGS[name], True)
            return at + 1
        if name not in _VALUES or (name == "--for" and self.verb != "wait"):
            raise UsageError(f"unknown option {name}")
        if not equals:
            at += 1
            value = words[at] if at < len(words) else ""
            if value.startswith("--"):
                raise UsageError(f"{name} has no value", f"write {name}=VALUE if the value begins with --")
        if not value:
            raise UsageError(f"{name} has no value")
        self._take_value(name, value)
        return at + 1

    def _take_value(self, name: str, value: str) -> None:
        if name == "--principal":
            self.principals.append(value)
            return
        if getattr(self, _VALUES[name]) not in ("", None):
            raise UsageError(f"{name} is given twice")
        if _VALUES[name] == "wait":
            self.wait = read_duration(name, value, smallest=0)
            return
        if name == "--ttl":
            read_duration(name, value)
        setattr(self, _VALUES[name], value)

    def short_ttl(self) -> int:
        """Seconds to request where the command line says nothing of a lifetime and one login is all that is made; 0
        otherwise, for the role's default."""
        logs_in_once = self.verb == "ssh" or (
            self.verb == "exec" and self.command[0].rpartition("/")[2] in _LOGS_IN_ONCE
        )
        return SHORT_TTL if logs_in_once and not self.ttl else 0

    def force_command(self) -> str:
        """What `--exact` requests as the certificate's force-command: the remote command as ssh sends it."""
        return " ".join(self.remote) if self.exact else ""

    def is_for_program(self) -> bool:
        """True if a program reads what is said: it gets JSON of a request to humans, and does not wait for them."""
        return self.no_wait or not has_terminal()

    def check(self) -> None:
        """Raises `UsageError` for options that do not go together."""
        if self.no_wait and self.wait:
            raise UsageError("--wait and --no-wait exclude each other")
        if not self.exact:
            return
        if self.verb != "ssh":
            raise UsageError("--exact is an option of `ssh`", "write `safe-session ssh --exact HOST COMMAND`")
        if not self.remote:
            raise UsageError("--exact needs a remote command", "write `safe-session ssh --exact HOST COMMAND`")


def parse_arguments(words: list[str], invocation: Invocation | None = None) -> Invocation:
    """Parses the words after `safe-session` into `invocation`, which after an error holds what was read before it.
    Raises `UsageError`."""
    invocation = invocation or Invocation()
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at = invocation.take_option(words, at)
        if invocation.verb:
            return invocation
    if at == len(words):
        raise UsageError("no command given", _WRITE_ONE)
    invocation.verb = words[at]
    if invocation.verb == "ssh":
        _split_ssh(invocation, words[at + 1 :])
    elif invocation.verb == "exec":
        _split_exec(invocation, words[at + 1 :])
    elif invocation.verb in _QUESTIONS:
        _read_question(invocation, words[at + 1 :])
    else:
        raise UsageError(f"unknown command {invocation.verb}", _WRITE_ONE)
    if invocation.verb not in ("help", "version"):
        invocation.check()
    return invocation


def _read_question(invocation: Invocation, words: list[str]) -> None:
    """Reads the words after `whoami`, `requests`, `wait` or `withdraw`: an id for the last two, and options."""
    verb = invocation.verb
    at = 0
    while at < len(words):
        word = words[at]
        if word.startswith("-"):
            at = invocation.take_option(words, at)
            if invocation.verb != verb:
                return
            continue
        if verb not in _TAKES_ID or invocation.request:
            raise UsageError(f'unexpected argument "{word}"')
        invocation.request = word
        at += 1
    if verb in _TAKES_ID and not invocation.request:
        raise UsageError("no request given", f"write `safe-session {verb} ID`; `safe-session requests` lists them")


def _split_ssh(invocation: Invocation, words: list[str]) -> None:
    """Reads the words as ssh's getopt loop does: options, host, options again; the first other word or `--` after the
    host begins the remote command. The remote command is not parsed, so `ssh host grep --role x` is safe.
    """
    host_seen = False
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            invocation.command += words[at:]
            invocation.remote = words[at + (1 if host_seen else 2) :]
            host_seen = host_seen or at + 1 < len(words)
            break
        if word.startswith("--"):
            at = invocation.take_option(words, at)
            if invocation.verb != "ssh":
                return
            continue
        if len(word) > 1 and word[0] == "-":
            invocation.command.append(word)
            options = _options_in(word)
            invocation.asks_ssh = invocation.asks_ssh or not _ANSWERED_BY_SSH.isdisjoint(options)
            value = word[1 + len(options) :]
            if not value and options[-1] in _SSH_OPTIONS_WITH_VALUE:
                at += 1
                if at == len(words):
                    raise UsageError(f"ssh option {word} has no value")
                value = words[at]
                invocation.command.append(value)
            if options[-1] == "o" and value.lstrip().lower().startswith("controlpersist"):
                invocation.sets_persist = True
        elif not host_seen:
            host_seen = True
            invocation.command.append(word)
        else:
            invocation.command += words[at:]
            invocation.remote = words[at:]
            break
        at += 1
    if not host_seen and not invocation.asks_ssh:
        raise UsageError("no host given", "write `safe-session ssh [ssh options] HOST [COMMAND]`")


def _options_in(cluster: str) -> str:
    """The option letters of a word: `tp` for `-tp` (the next word is the value of p) and for `-tp22`."""
    for place, letter in enumerate(cluster[1:], start=2):
        if letter in _SSH_OPTIONS_WITH_VALUE:
            return cluster[1:place]
    return cluster[1:]


def _split_exec(invocation: Invocation, words: list[str]) -> None:
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            at += 1
            break
        if not word.startswith("-"):
            break
        at = invocation.take_option(words, at)
        if invocation.verb != "exec":
            return
    invocation.command = words[at:]
    if not invocation.command or not invocation.command[0]:
        raise UsageError("no command given", "write `safe-session exec -- COMMAND`")


def read_duration(name: str, text: str, *, smallest: int = 1) -> int:
    """The seconds in whole seconds, or in a number with s, m or h. Raises `UsageError`, which names the option."""
    number = text[:-1] if text[-1] in _SECONDS else text
    if number.isascii() and number.isdigit() and len(number) <= _LONGEST_NUMBER and int(number) >= smallest:
        return int(number) * _SECONDS.get(text[-1], 1)
    raise UsageError(f"{name} {text} is not a duration", "write it as 15m, 1h or 900 (seconds)")
