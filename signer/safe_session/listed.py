"""Is the host that ssh is about to reach on the verified list of host keys? If so, ssh gets options for it.

ssh itself says which name it looks up (`ssh -G`), because aliases, ports, `HostKeyAlias` and canonical names are its
configuration's. The scripts of `wrappers.py` import this module in every ssh that a session starts, so that it imports
nothing but C modules.
"""

# ruff: noqa: PTH123
# (pathlib costs more to import than everything here)

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not `signal`: its enums cost 8 ms
import _socket
import os

_PORT = "22"
_LARGEST_ANSWER = 256 * 1024  # bytes of `ssh -G`


class Question:
    """A running `ssh -G`, which resolves `words`, those of ssh's command line after its name. `ssh` is its path."""

    def __init__(self, ssh: str, words: list[str]) -> None:
        self._output, output = os.pipe()
        try:
            self._child = os.posix_spawn(
                ssh,
                ["ssh", "-G", *words],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
                setsigdef=(_signal.SIGINT, _signal.SIGQUIT, _signal.SIGPIPE, _signal.SIGXFSZ),
            )
        except OSError:
            self._child = 0  # the real ssh cannot be started either, and says why
        finally:
            os.close(output)

    def names(self) -> tuple[str, ...]:
        """The name that ssh looks up in known_hosts, in each way to write it; none if ssh gave no answer."""
        answer = b""
        while len(answer) <= _LARGEST_ANSWER and (piece := os.read(self._output, 16384)):
            answer += piece
        os.close(self._output)
        if self._child:
            os.waitpid(self._child, 0)
            self._child = 0
        return looked_up(answer.decode("utf-8", "replace"))

    def drop(self) -> None:
        """Ends `ssh -G`, whose answer is not needed any more."""
        os.close(self._output)
        if self._child:
            os.kill(self._child, _signal.SIGKILL)
            os.waitpid(self._child, 0)


def looked_up(answer: str) -> tuple[str, ...]:
    """The names in an answer of `ssh -G`, lower case as ssh looks them up."""
    found: dict[str, str] = {}
    for line in answer.split("\n"):
        key, _, value = line.partition(" ")
        if key in ("hostname", "port", "hostkeyalias"):
            found.setdefault(key, value.strip().lower())
    if alias := found.get("hostkeyalias"):
        return (alias,)
    if not (host := found.get("hostname", "").removeprefix("[").removesuffix("]")):
        return ()
    names = dict.fromkeys((host, _canonical(host)))
    port = found.get("port", _PORT)
    return tuple(names if port == _PORT else (f"[{name}]:{port}" for name in names))


def _canonical(host: str) -> str:
    """An IPv6 address as the list has it; any other name unchanged."""
    try:
        return _socket.inet_ntop(_socket.AF_INET6, _socket.inet_pton(_socket.AF_INET6, host))
    except (OSError, ValueError):
        return host


def host_options(names: tuple[str, ...], known_hosts: str) -> list[str]:
    """Options for ssh's command line, if the list in the file `known_hosts` has one of the names.

    A listed host is accepted with its listed keys only: neither the user's files nor the system's add to them. Without
    a name the options are strict, too: a host that may be listed is never accepted unseen.
    """
    if names and not is_listed(names, known_hosts):
        return []
    settings = (
        ("UserKnownHostsFile", known_hosts),
        ("GlobalKnownHostsFile", "/dev/null"),
        ("KnownHostsCommand", "none"),
        ("StrictHostKeyChecking", "yes"),
        # Each of these accepts a key without the file, or asks for more names than the list has.
        ("VerifyHostKeyDNS", "no"),
        ("NoHostAuthenticationForLocalhost", "no"),
        ("CheckHostIP", "no"),
        # ssh writes nothing into the file.
        ("UpdateHostKeys", "no"),
    )
    return [part for name, value in settings for part in ("-o", f"{name}={value}")]


def is_listed(names: tuple[str, ...], known_hosts: str) -> bool:
    """Whether a line of the file is about one of the names; a name that is no ASCII is in no list."""
    with open(known_hosts, "rb") as file:
        content = file.read()
    for name in names:
        wanted = name.encode("utf-8", "replace")
        if wanted in content:  # looks at each byte once, where most hosts have one line in thousands
            for line in content.split(b"\n"):
                if line[:1] not in (b"", b"#") and wanted in line.partition(b" ")[0].split(b","):
                    return True
    return False
