"""`signer witness serve` as a process."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.parts import ports
from tests.parts.service import ROOT

NAME = "witness.example"
TYPE = {"Content-Type": "text/plain"}


class WitnessProcess:
    """A witness of one log, by its verifier key, with its state in a folder."""

    def __init__(self, folder: Path, log: str) -> None:
        self.folder = folder
        self.log = log
        self.port = ports.free_port()
        self.log_file = folder.with_suffix(".log")
        self._running: subprocess.Popen[bytes] | None = None

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "signer", "witness", *words, "--state", str(self.folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    def start(self) -> None:
        command = [sys.executable, "-m", "signer", "witness", "serve", "--name", NAME, "--log", self.log]
        command += ["--state", str(self.folder), "--listen", f"{ports.LOOPBACK}:{self.port}"]
        with self.log_file.open("ab") as log:
            self._running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        ports.wait_until(lambda: ports.accepts(self.port), self._running, self.log_file.read_text, seconds=60)

    def connect(self) -> socket.socket:
        return socket.create_connection((ports.LOOPBACK, self.port), 30)

    def end(self, number: signal.Signals) -> int:
        """Its exit status after a signal."""
        assert self._running is not None
        self._running.send_signal(number)
        return self._running.wait(60)

    @property
    def address(self) -> str:
        return f"http://{ports.LOOPBACK}:{self.port}"

    @property
    def vkey(self) -> str:
        return self.run("key", "--name", NAME).stdout.strip()

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(ports.LOOPBACK, self.port, timeout=60)
        try:
            connection.request(method, path, body, TYPE)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
