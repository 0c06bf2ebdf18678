"""The command line of `safe-session`: what is ours, and what goes to the command untouched. Pure.

Not argparse: it would have to know every ssh option to find where the remote command begins, and it costs more
to import than the whole request to the signing service.
"""

from __future__ import annotations

from signer.errors import SignerError

# ssh's options that take a value, from the getopt string in ssh.c (OpenSSH 8.5 to 10.x). Needed to tell the host in
# `ssh -p 22 host` from the value in front of it. An option that a later ssh adds must be written in one word here.
_SSH_OPTIONS_WITH_VALUE = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
_OURS_WITH_VALUE = ("--role", "--reason", "--ttl", "--principal")


class Usage(SignerError):
    """The command line cannot be understood; nothing was done."""

    def __init__(self, text: str, hint: str = "see `safe-session --help`") -> None:
        super().__init__("usage", text, hint)


class Invocation:
    """What the command line asks for. `verb` is ssh, exec, help or version; `command` is what follows it without
    our options: ssh's own words, or the whole command of exec."""

    __slots__ = ("command", "principals", "reason", "role", "ttl", "verb", "verbose")

    def __init__(self) -> None:
        self.verb = ""
        self.command: list[str] = []
        self.role = ""
        self.reason = ""
        self.ttl = ""
        self.principals: list[str] = []
        self.verbose = False

    def take_own(self, words: list[str], at: int) -> int:
        """Reads our long option at `words[at]`, returns the index after it. Raises `Usage` if it is none of ours."""
        name, equals, value = words[at].partition("=")
        if words[at] in ("--help", "--version"):
            self.verb = name[2:]
            return len(words)
        if name not in _OURS_WITH_VALUE:
            raise Usage(f"unknown option {name}")
        if not equals:
            at += 1
            value = words[at] if at < len(words) else ""
            if value.startswith("--"):
                raise Usage(f"{name} has no value", f"write {name}=VALUE if the value begins with --")
        if not value:
            raise Usage(f"{name} has no value")
        if name == "--principal":
            self.principals.append(value)
            return at + 1
        if getattr(self, name[2:]):
            raise Usage(f"{name} is given twice")
        setattr(self, name[2:], value)
        return at + 1


def parse_arguments(words: list[str]) -> Invocation:
    """The words after `safe-session`. Raises `Usage`."""
    asked = Invocation()
    at = 0
    while at < len(words) and words[at].startswith("-"):
        if words[at] == "-h":
            asked.verb = "help"
            return asked
        if words[at] == "-v":
            asked.verbose = True
            at += 1
        else:
            at = asked.take_own(words, at)
            if asked.verb:
                return asked
    if at == len(words):
        raise Usage("no command given", "write `safe-session ssh HOST` or `safe-session exec -- COMMAND`")
    asked.verb = words[at]
    if asked.verb == "ssh":
        _split_ssh(asked, words[at + 1 :])
    elif asked.verb == "exec":
        _split_exec(asked, words[at + 1 :])
    else:
        raise Usage(f"unknown command {asked.verb}", "write `safe-session ssh HOST` or `safe-session exec -- COMMAND`")
    if asked.ttl:
        check_ttl(asked.ttl)
    return asked


def _split_ssh(asked: Invocation, words: list[str]) -> None:
    """Walks the words as ssh's own getopt loop does: options, host, options again, and the first other word or `--`
    after the host begins the remote command. From there on nothing is looked at, so `ssh host grep --role x` is safe.
    """
    host_seen = False
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            asked.command += words[at:]
            host_seen = host_seen or at + 1 < len(words)
            break
        if word.startswith("--"):
            at = asked.take_own(words, at)
            if asked.verb != "ssh":
                return
            continue
        if len(word) > 1 and word[0] == "-":
            asked.command.append(word)
            if _value_follows(word):
                at += 1
                if at == len(words):
                    raise Usage(f"ssh option {word} has no value")
                asked.command.append(words[at])
        elif not host_seen:
            host_seen = True
            asked.command.append(word)
        else:
            asked.command += words[at:]
            break
        at += 1
    if not host_seen:
        raise Usage("no host given", "write `safe-session ssh [ssh options] HOST [COMMAND]`")


def _value_follows(cluster: str) -> bool:
    """Whether ssh takes the next word as the value of this one: `-p` and `-tp` yes, `-p22` and `-tt` no."""
    for place, letter in enumerate(cluster[1:], start=2):
        if letter in _SSH_OPTIONS_WITH_VALUE:
            return place == len(cluster)
    return False


def _split_exec(asked: Invocation, words: list[str]) -> None:
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            at += 1
            break
        if word == "-v":
            asked.verbose = True
            at += 1
        elif word == "-h":
            asked.verb = "help"
            return
        elif word.startswith("-"):
            at = asked.take_own(words, at)
            if asked.verb != "exec":
                return
        else:
            break
    asked.command = words[at:]
    if not asked.command or not asked.command[0]:
        raise Usage("no command given", "write `safe-session exec -- COMMAND`")


def check_ttl(text: str) -> None:
    """Whole seconds, or a number with s, m or h. The service decides whether it is allowed."""
    number = text[:-1] if text[-1] in "smh" else text
    if not (number.isascii() and number.isdigit() and len(number) <= 9 and int(number) > 0):
        raise Usage(f"--ttl {text} is no time", "write it as 15m, 1h or 900 (seconds)")
