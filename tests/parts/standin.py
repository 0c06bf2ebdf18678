"""A stand-in for the signing service: `safe-session` against every answer that a service can give.

Its certificates are made by `ssh-keygen -s`, not by our encoder.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.parts import keys
from tests.parts.keys import Key

TOKEN = "sgn_a-token-that-nobody-else-has"


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Asked:
    """One request as it came over the wire."""

    line: str
    headers: dict[str, str]
    raw_body: bytes

    @property
    def body(self) -> dict[str, object]:
        said: dict[str, object] = json.loads(self.raw_body)
        return said


Handler = Callable[[Asked], bytes]


def http(status: int, body: object, *headers: str, kind: str = "application/json") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.0 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def problem(status: int, detail: str, hint: str = "", *headers: str, code: str = "some_code") -> bytes:
    body = {
        "type": "about:blank",
        "title": "x",
        "status": status,
        "detail": detail,
        "code": code,
        "hint": hint,
    }
    return http(status, body, *headers, kind="application/problem+json")


class Standin:
    """Answers each connection with what `handler` returns, then closes it. `asked` is what came, in order.

    Its address is its own from the start, and refuses connections until it is entered as a context manager.
    """

    def __init__(self, handler: Handler, *, unix: Path | None = None) -> None:
        self.handler = handler
        self.asked: list[Asked] = []
        self.broken_off = 0  # answers that the other side did not take to the end
        self._socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(str(unix) if unix else ("127.0.0.1", 0))
        self.address = f"unix:{unix}" if unix else f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.wrap: ssl.SSLContext | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._socket.listen(16)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._socket.accept()
            except OSError:
                return
            with link:
                link.settimeout(20)
                try:
                    self._answer(self.wrap.wrap_socket(link, server_side=True) if self.wrap else link)
                except OSError:
                    self.broken_off += 1

    def _answer(self, link: socket.socket) -> None:
        with link:
            if self.wrap is None and link.recv(1, socket.MSG_PEEK) == b"\x16":  # a TLS handshake, which HTTP is not
                link.sendall(b"HTTP/1.1 400 X\r\nContent-Length: 0\r\n\r\n")
                return
            asked = self._read(link)
            self.asked.append(asked)
            link.sendall(self.handler(asked))

    def _read(self, link: socket.socket) -> Asked:
        with link.makefile("rb") as stream:
            line = stream.readline().decode().strip()
            headers = {}
            while text := stream.readline().decode().strip():
                name, _, value = text.partition(":")
                headers[name.lower()] = value.strip()
            return Asked(line, headers, stream.read(int(headers.get("content-length", "0"))))


class Signer:
    """A handler that certifies whatever key it is sent, by `ssh-keygen -s`."""

    def __init__(self, folder: Path, ca: Key, **how: object) -> None:
        self.folder = folder
        self.ca = ca
        self.principals: Sequence[str] = ("llmops",)
        self.validity = "-1m:+15m"
        self.serial = 4711
        self.options: Sequence[str] = ()  # more words for ssh-keygen
        self.expires_in = 900
        self.host = False
        self.key: str = ""  # certifies this one instead, if set
        for name, value in how.items():
            setattr(self, name, value)
        self.count = 0

    def certify(self, public_line: str) -> str:
        self.count += 1
        public = self.folder / f"asked-{self.count}.pub"
        public.write_text(public_line + "\n")
        flags = ["-h"] if self.host else []
        who = ",".join(self.principals)
        keys.ssh_keygen(
            "-q", "-s", self.ca.private, "-I", "deploy-agent", *flags, "-n", who, "-V", self.validity,
            "-z", str(self.serial), *self.options, public,
        )  # fmt: skip
        return public.with_name(f"asked-{self.count}-cert.pub").read_text().strip()

    def __call__(self, asked: Asked) -> bytes:
        return http(201, self.issue(asked))

    def issue(self, asked: Asked) -> dict[str, object]:
        return {
            "certificate": self.certify(self.key or str(asked.body["public_key"])),
            "serial": str(self.serial),
            "key_id": "deploy-agent",
            "identity": "deploy-agent",
            "role": asked.line.split()[1].rpartition("/")[2],
            "principals": list(self.principals),
            "valid_after": "2026-11-22T14:01:41Z",
            "valid_before": "2026-11-22T14:17:11Z",
            "expires_in": self.expires_in,
            "ca_fingerprint": self.ca.fingerprint,
        }


@dataclass
class Client:
    """Runs the real `safe-session` in a process of its own, in an environment that holds nothing of this user's."""

    folder: Path
    token_file: Path
    runtime: Path  # short enough for the path of a socket in it, which pytest's own folders are not
    _started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            with process:
                process.kill()
        shutil.rmtree(self.runtime, onerror=_unless_gone)  # what a killed one leaves is removed by its own shell, too

    def environment(self, address: str, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "SAFE_SESSION_ADDR": address,
            "SAFE_SESSION_TOKEN_FILE": str(self.token_file),
            "SAFE_SESSION_ROLE": "llmops",
            "TZ": "UTC",
        } | more

    def start(self, address: str, *words: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "signer.safe_session", *words],
            env=self.environment(address, **more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def run(self, address: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(address, *words, **more)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(list(words), process.returncode, out, err)

    def left_behind(self) -> list[Path]:
        return list(self.runtime.iterdir())


def _unless_gone(_call: object, _path: str, why: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(why[1], FileNotFoundError):
        raise why[1]


def make_client(folder: Path) -> Client:
    token_file = folder / "token"
    token_file.write_text(TOKEN + "\n")
    token_file.chmod(0o600)
    return Client(folder, token_file, Path(tempfile.mkdtemp(prefix="xdg-", dir="/tmp")))
