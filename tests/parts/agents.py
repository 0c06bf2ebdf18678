"""SSH agents for tests: OpenSSH's own, one whose keys are in a SoftHSM token, and stand-ins: one that answers wrongly,
one that holds FIDO keys.

Sockets live in a folder of their own under /tmp, because a socket's path must be short.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from signer.ssh.wire import string, uint32
from tests.parts.eventually import eventually
from tests.parts.fake_vault import ForeignCa
from tests.parts.fido import FidoKey
from tests.parts.keys import Key

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "271828"
SO_PIN = "31415926"


class Agent:
    """OpenSSH's ssh-agent. A context manager; `kill` and `start` end and restart it at the same socket.

    With a `socket` it is one that somebody else started, and is only spoken to; with a `folder` it listens there.
    """

    def __init__(
        self,
        *options: str,
        environ: dict[str, str] | None = None,
        user: str | int | None = None,
        socket: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self._is_ours = socket is None and folder is None
        self.folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="agent-")) if self._is_ours else folder or Path()
        if user is not None:
            shutil.chown(self.folder, user)
        self._user = user
        self.socket = socket or self.folder / ("s" if self._is_ours else "agent.sock")
        self._options = options
        self._environ = {"PATH": os.environ["PATH"], **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Agent:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._is_ours:
            shutil.rmtree(self.folder)

    def start(self) -> Agent:
        """Returns when it listens."""
        self.socket.unlink(missing_ok=True)
        command = ["ssh-agent", "-D", "-a", str(self.socket), *self._options]
        self._process = subprocess.Popen(command, env=self._environ, stdout=subprocess.DEVNULL, user=self._user)
        eventually(lambda: self.ssh_add("-l").returncode in (0, 1), "the agent answers")
        return self

    def ssh_add(self, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ssh-add", *arguments],
            env={**self._environ, "SSH_AUTH_SOCK": str(self.socket), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def add(self, *keys: Key) -> None:
        for key in keys:
            done = self.ssh_add("-q", key.private)
            assert done.returncode == 0, done.stderr

    def remove(self, key: Key) -> None:
        done = self.ssh_add("-q", "-d", key.public)
        assert done.returncode == 0, done.stderr

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """It accepts connections and answers none, until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class SoftHsm:
    """A SoftHSM token in a folder, with one P-256 key, and the agent that reaches it through PKCS#11."""

    def __init__(self, folder: Path) -> None:
        tokens = folder / "tokens"
        tokens.mkdir(parents=True)
        configuration = folder / "softhsm2.conf"
        configuration.write_text(f"directories.tokendir = {tokens}\nlog.level = ERROR\n")
        self.environ = {"SOFTHSM2_CONF": str(configuration)}
        self._run("softhsm2-util", "--init-token", "--free", "--label", "ca", "--so-pin", SO_PIN, "--pin", PIN)
        make = ("--login", "--pin", PIN, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "ca", "--id", "01")
        self._run("pkcs11-tool", "--module", str(SOFTHSM), *make)
        self._answer = folder / "askpass"
        self._answer.write_text(f"#!/bin/sh\necho {PIN}\n")
        self._answer.chmod(0o700)

    def _run(self, *command: str) -> None:
        environ = {"PATH": os.environ["PATH"], **self.environ}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def load_into(self, agent: Agent) -> str:
        """The public line of the key, as the agent lists it."""
        done = agent.ssh_add(
            "-s", SOFTHSM, env={"SSH_ASKPASS": str(self._answer), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}
        )
        assert done.returncode == 0, done.stderr
        (line,) = agent.ssh_add("-L").stdout.splitlines()
        return " ".join(line.split()[:2])


class FakeAgent:
    """A stand-in that speaks the protocol, and does otherwise when a test says so. Its key is a `ForeignCa`.

    `reply` makes the body of each reply from the body of a message; None hangs up, an empty one keeps silent.
    """

    def __init__(self, kind: str = "ssh-ed25519", name: str = "ca") -> None:
        self.ca = ForeignCa(kind, name)
        if kind == "ssh-rsa":
            self.ca.algorithm = "rsa-sha2-512"
        self.held = [self.ca.blob]
        self.messages: list[bytes] = []
        self.reply: Callable[[bytes], bytes | None] = self.honest
        self.pieces = 0  # bytes at a time, with a pause after each; 0: all at once
        self.pause = 0.1
        self._folder = tempfile.TemporaryDirectory(dir="/tmp", prefix="agent-")
        self.socket = Path(self._folder.name) / "s"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ends = threading.Event()
        self._thread = threading.Thread()

    def __enter__(self) -> FakeAgent:
        self._listener.bind(str(self.socket))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # close() alone does not wake accept()
        self._thread.join()
        self._listener.close()
        self._folder.cleanup()

    def honest(self, message: bytes) -> bytes:
        """The reply of an agent that does as it should."""
        if message[0] == 11:
            return b"\x0c" + uint32(len(self.held)) + b"".join(string(key) + string(b"comment") for key in self.held)
        return b"\x0e" + string(self.ca.sign(data_of(message)))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._try_to_serve, args=(connection,), daemon=True).start()

    def _try_to_serve(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except OSError:
            return  # the client has given up, which is what the test is about

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while head := stream.read(4):
                message = stream.read(int.from_bytes(head, "big"))
                self.messages.append(message)
                body = self.reply(message)
                if body is None:
                    return
                if not body:
                    self._ends.wait(30)
                    return
                self._send(connection, string(body))

    def _send(self, connection: socket.socket, data: bytes) -> None:
        step = self.pieces or len(data)
        for at in range(0, len(data), step):
            connection.sendall(data[at : at + step])
            if self.pieces and self._ends.wait(self.pause):
                return


class FidoAgent(FakeAgent):
    """An ssh-agent that holds FIDO keys; a context manager."""

    def __init__(self, *keys: FidoKey) -> None:
        super().__init__()
        self._keys = {key.blob: key for key in keys}
        self.held = list(self._keys)

    def honest(self, message: bytes) -> bytes:
        if message[0] == 13:  # SSH_AGENTC_SIGN_REQUEST
            blob = message[5 : 5 + int.from_bytes(message[1:5], "big")]
            return b"\x0e" + string(self._keys[blob].sign(data_of(message)))
        return super().honest(message)


def data_of(message: bytes) -> bytes:
    """The data of a sign request."""
    size = int.from_bytes(message[1:5], "big")
    at = 5 + size
    return message[at + 4 : at + 4 + int.from_bytes(message[at : at + 4], "big")]
