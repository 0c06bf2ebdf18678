"""A private ssh-agent for one session. It holds one key and is removed when the session ends for any reason.

`ssh-agent -a SOCKET sh -c ...` starts the agent, then runs a shell as the agent's parent. The shell prints the agent's
pid once the socket is ready, then waits for the end of a pipe that only this process holds open. So:

- at the end of the session this process kills and reaps both;
- if this process is killed, even with -9, the pipe ends, and the shell kills the agent and removes the folder at once;
- if the shell is killed too, the agent exits within 10 s (ssh-agent checks its parent).

PR_SET_PDEATHSIG would be simpler, but the kernel clears it for set-group-id programs, and Debian's ssh-agent is one.
"""

# ruff: noqa: PTH102, PTH106, PTH108, PTH120, PTH208
# (pathlib costs more to import than everything here)

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not `signal`: its enums cost 8 ms
import _socket
import os
import stat

from signer.errors import Unavailable
from signer.ssh.agent import check_reply, reply_length

_WATCH = 'echo "$SSH_AGENT_PID"; read -r _; kill "$SSH_AGENT_PID"; rm -rf -- "${SSH_AUTH_SOCK%/*}"'
_FALLBACK_FOLDER = "/tmp"  # noqa: S108 -- for a folder made by mkdir(2), 0700, with a random name
_MAX_FOLDER = 107 - len("/safe-session-0123456789abcdef/agent")  # sun_path of unix(7)
_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_FOR_REPLY = 5.0
_PIECE = 65536  # bytes read at once
_PATH_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._/")


class PrivateAgent:
    """Starts the agent without waiting; `add` waits. Use as a context manager or call `end`.

    `socket` is its path. Beside it, `programs` and `hosts` are paths for folders of programs and of the list of host
    keys, which end with the session, and `relay` one for the socket that the command gets.
    """

    def __init__(self) -> None:
        self._folder = f"{_private_folder()}/safe-session-{os.urandom(8).hex()}"
        self.socket = f"{self._folder}/agent"
        self.relay = f"{self._folder}/relay"
        self.programs = f"{self._folder}/bin"
        self.hosts = f"{self._folder}/hosts"
        self._agent = 0
        # Close-on-exec (Python's default): the session's command must not inherit the writing end, or the shell would
        # not notice that this process is dead.
        shell_input, self._lifeline = os.pipe()
        self._shell_output, shell_output = os.pipe()
        try:
            os.mkdir(self._folder, 0o700)
            self._shell = os.posix_spawnp(
                "ssh-agent",
                ["ssh-agent", "-a", self.socket, "sh", "-c", _WATCH],
                # The agent does not need the user's own variables.
                {"PATH": os.environ.get("PATH", os.defpath)},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, shell_input, 0),
                    (os.POSIX_SPAWN_DUP2, shell_output, 1),
                    (os.POSIX_SPAWN_DUP2, shell_output, 2),
                ],
                # Its own session: Ctrl-C at the terminal is for the command and must not end the agent.
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
            os.close(shell_input)
            os.close(shell_output)

    def __enter__(self) -> PrivateAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def add(self, message: bytearray) -> None:
        """Sends one message of `signer.ssh.agent` as soon as the agent listens. Raises `Unavailable` or `BadFormat`."""
        self._wait_until_ready()
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            connection.settimeout(_SECONDS_FOR_REPLY)
            connection.connect(self.socket)
            connection.sendall(message)
            reply = read_message(connection)
            if not reply:
                raise ConnectionError
            check_reply(reply[4:])
        except OSError as error:
            raise Unavailable(
                "agent_lost",
                f"lost the private ssh-agent: {(error.strerror or 'no reply').lower()}",
                "try again",
            ) from None
        finally:
            connection.close()

    def _wait_until_ready(self) -> None:
        output = b""
        while not output.endswith(b"\n"):
            piece = os.read(self._shell_output, 512)
            if not piece:
                break
            output += piece
        if not output.strip().isdigit():
            reason = output.decode("utf-8", "replace").strip() or "no error message"
            raise Unavailable(
                "no_agent", f"ssh-agent did not start: {reason}", f"check {os.path.dirname(self._folder)}"
            )
        self._agent = int(output)

    def end(self) -> None:
        """Ends and reaps agent and shell, and removes the folder; a part that is already gone is not an error."""
        if self._agent:
            # The agent is an orphan once the shell is gone. In many containers process 1 reaps nothing, and each login
            # would leave a zombie; so the agent becomes a child of this process.
            from ctypes import CDLL  # late: the agent starts while keypair.py imports it

            CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            _kill_and_reap(self._shell, self._agent)
        else:
            # Not ready: only the shell knows the agent's pid. The end of the pipe makes the shell kill it.
            os.close(self._lifeline)
            self._lifeline = -1
            os.waitpid(self._shell, 0)
        self._close_pipes()
        self._remove_folder()

    def _close_pipes(self) -> None:
        for end in (self._lifeline, self._shell_output):
            if end >= 0:
                os.close(end)
        self._lifeline = self._shell_output = -1

    def _remove_folder(self) -> None:
        for folder in (self.programs, self.hosts):
            try:
                for name in os.listdir(folder):
                    os.unlink(f"{folder}/{name}")
                os.rmdir(folder)
            except OSError:
                pass  # there is none, or the shell has removed it
        try:
            os.unlink(self.socket)
        except OSError:
            pass  # the agent has removed it
        try:
            os.rmdir(self._folder)
        except OSError:
            pass  # not empty, or already removed


def _private_folder() -> str:
    """XDG_RUNTIME_DIR if it is private, if it is short and plain enough for a socket's path, and if programs can run
    there; otherwise /tmp, where the new folder's random name and mode 0700 protect it."""
    folder = runtime_folder()
    if folder and len(folder) <= _MAX_FOLDER and _PATH_LETTERS.issuperset(folder):
        try:
            if not os.statvfs(folder).f_flag & os.ST_NOEXEC:
                return folder
        except OSError:
            return _FALLBACK_FOLDER
    return _FALLBACK_FOLDER


def runtime_folder() -> str:
    """XDG_RUNTIME_DIR if it is the user's and has mode 0700, as its specification demands; otherwise ""."""
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    try:
        facts = os.lstat(folder)
    except (OSError, ValueError):
        return ""
    is_private = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
    return folder if folder.startswith("/") and is_private else ""


def _kill_and_reap(*pids: int) -> None:
    """Kills and reaps in the order given: the shell first, so that the agent is then a child of this process."""
    for pid in pids:
        try:
            os.kill(pid, _signal.SIGKILL)
        except ProcessLookupError:
            pass  # already gone
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass  # already reaped, or not a child of this process


def read_message(connection: _socket.socket) -> bytes:
    """A message of the agent's protocol with its length in front; b"" at the end of the stream.

    Raises `BadFormat` for a length over the protocol's."""
    data = bytearray()
    wanted = 4
    while len(data) < wanted:
        piece = connection.recv(min(_PIECE, wanted - len(data)))
        if not piece:
            return b""
        data += piece
        if len(data) == 4 and wanted == 4:
            wanted += reply_length(bytes(data))
    return bytes(data)
