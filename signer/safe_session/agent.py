"""A private ssh-agent for one session: started early, given one key, gone when the session is over, however it ends.

`ssh-agent -a SOCKET sh -c ...` starts the agent, then runs a shell as the agent's parent. The shell prints the agent's
pid, which tells that the socket is ready, and waits for the end of a pipe that only this process holds open. So:

- this process ends the session: it kills and reaps both;
- this process is killed, even with -9: the pipe ends, the shell kills the agent and removes the folder at once;
- the shell is killed too: the agent notices within 10 s that its parent is gone (ssh-agent's own watch).

PR_SET_PDEATHSIG would be simpler, but the kernel clears it for set-group-id programs, and Debian's ssh-agent is one.
"""

# ruff: noqa: PTH102, PTH106, PTH108, PTH120
# (pathlib costs more to import than everything here)

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not `signal`: its enums cost 8 ms
import _socket
import os
import stat

from signer.errors import Unavailable
from signer.ssh.agent import check_reply, reply_length

_WATCH = (
    'echo "$SSH_AGENT_PID"; read -r _; kill "$SSH_AGENT_PID"; rm -f -- "$SSH_AUTH_SOCK"; rmdir -- "${SSH_AUTH_SOCK%/*}"'
)
_ANYWHERE = "/tmp"  # noqa: S108 -- for a folder made by mkdir(2), 0700, with a random name
_LONGEST_PLACE = 107 - len("/safe-session-0123456789abcdef/agent")  # sun_path of unix(7)
_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_FOR_REPLY = 5.0
_PATH_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._/")


class PrivateAgent:
    """Starts at once, is waited for in `add`; use as a context, or call `end`. `socket` is its path."""

    def __init__(self) -> None:
        self._folder = f"{_private_place()}/safe-session-{os.urandom(8).hex()}"
        self.socket = f"{self._folder}/agent"
        self._agent = 0
        # Close-on-exec, as Python does: were the writing end to leak into the session's command, the shell would
        # not see us die.
        watched, self._lifeline = os.pipe()
        self._news, told = os.pipe()
        try:
            os.mkdir(self._folder, 0o700)
            self._shell = os.posix_spawnp(
                "ssh-agent",
                ["ssh-agent", "-a", self.socket, "sh", "-c", _WATCH],
                # The user's own variables are no business of the agent's.
                {"PATH": os.environ.get("PATH", os.defpath)},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, watched, 0),
                    (os.POSIX_SPAWN_DUP2, told, 1),
                    (os.POSIX_SPAWN_DUP2, told, 2),
                ],
                # Away from the terminal: its Ctrl-C is for the command, and would end the shell and so the agent.
                setsid=True,
                setsigdef=(_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGPIPE),
                setsigmask=(),
            )
        except OSError as error:
            self._close_pipes()
            self._remove_folder()
            missing = isinstance(error, FileNotFoundError)
            raise Unavailable(
                "no_agent",
                f"cannot start ssh-agent: {(error.strerror or 'unknown reason').lower()}",
                "install OpenSSH's client (Debian: apt install openssh-client)" if missing else "",
            ) from None
        finally:
            os.close(watched)
            os.close(told)

    def __enter__(self) -> PrivateAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def add(self, message: bytearray) -> None:
        """Sends one message of `signer.ssh.agent` once the agent listens. Raises `Unavailable` or `BadFormat`."""
        self._wait_until_ready()
        link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            link.settimeout(_SECONDS_FOR_REPLY)
            link.connect(self.socket)
            link.sendall(message)
            check_reply(_receive(link, reply_length(_receive(link, 4))))
        except OSError as error:
            raise Unavailable(
                "agent_lost",
                f"lost the private ssh-agent: {(error.strerror or 'no reply').lower()}",
                "try again",
            ) from None
        finally:
            link.close()

    def _wait_until_ready(self) -> None:
        said = b""
        while not said.endswith(b"\n"):
            piece = os.read(self._news, 512)
            if not piece:
                break
            said += piece
        if not said.strip().isdigit():
            reason = said.decode("utf-8", "replace").strip() or "it said nothing"
            raise Unavailable(
                "no_agent", f"ssh-agent did not start: {reason}", f"check {os.path.dirname(self._folder)}"
            )
        self._agent = int(said)

    def end(self) -> None:
        """Ends and reaps agent and shell, removes the folder. Nothing it finds already gone is an error."""
        if self._agent:
            # The agent is an orphan once the shell is gone. Where process 1 reaps nothing, as in many containers,
            # it would stay a zombie, one for each login; so it becomes our child.
            from ctypes import CDLL  # late: the agent starts while newkey.py imports it

            CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            _kill_and_reap(self._shell, self._agent)
        else:
            # Not ready yet, so the agent's pid is unknown: the end of its pipe makes the shell do it.
            os.close(self._lifeline)
            self._lifeline = -1
            os.waitpid(self._shell, 0)
        self._close_pipes()
        self._remove_folder()

    def _close_pipes(self) -> None:
        for end in (self._lifeline, self._news):
            if end >= 0:
                os.close(end)
        self._lifeline = self._news = -1

    def _remove_folder(self) -> None:
        try:
            os.unlink(self.socket)
        except OSError:
            pass  # the agent removed it itself
        try:
            os.rmdir(self._folder)
        except OSError:
            pass  # somebody put a file in, or took it away: not ours to force


def _private_place() -> str:
    """XDG_RUNTIME_DIR if it is what its specification says (ours, 0700), and short and plain enough for the path of a
    socket; else /tmp, where the folder's random name and mode 0700 do the work."""
    place = os.environ.get("XDG_RUNTIME_DIR", "")
    if place.startswith("/") and len(place) <= _LONGEST_PLACE and _PATH_LETTERS.issuperset(place):
        try:
            facts = os.lstat(place)
        except OSError:
            return _ANYWHERE
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077:
            return place
    return _ANYWHERE


def _kill_and_reap(*pids: int) -> None:
    """In this order: the shell first, so that the agent becomes our child before we wait for it."""
    for pid in pids:
        try:
            os.kill(pid, _signal.SIGKILL)
        except ProcessLookupError:
            pass  # gone by itself
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass  # reaped, or never our child


def _receive(link: _socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = link.recv(count - len(data))
        if not piece:
            raise ConnectionError
        data += piece
    return data
