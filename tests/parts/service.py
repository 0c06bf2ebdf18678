"""The real service, launcher and all, out of a temporary folder on a loopback port."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from signer.policy.tokens import render_token, token_digest
from tests.parts import ports
from tests.parts.fido import fill_fido_keys
from tests.parts.keys import Key
from tests.parts.processes import children, command_line

ROOT = Path(__file__).parents[2]

# One role and four identities that most tests can use; `{ca}` is the CA's fingerprint, `{token:NAME}` a digest.
STANDARD_POLICY = """
[ca]
fingerprint = "{ca}"

[roles.llmops]
principals = ["llmops"]
default_principals = ["llmops"]
default_ttl = "15m"
max_ttl = "30m"
key_types = ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa", "sk-ssh-ed25519@openssh.com"]
extensions = { allowed = ["permit-pty"], default = ["permit-pty"] }

[identities.deploy-agent]
kind = "agent"
roles = ["llmops"]
tokens = [{ sha256 = "{token:deploy-agent}", expires = 2099-01-01T00:00:00Z }]

[identities.ci]
kind = "workload"
roles = ["llmops"]
tokens = [{ sha256 = "{token:ci}", expires = 2099-01-01T00:00:00Z }]

[identities.operator]
kind = "human"
groups = ["operators"]
roles = ["llmops"]
may = ["approve", "freeze", "hosts", "ledger.read", "operate"]
approval_keys = [{ kind = "ssh", key = "{fido:operator}" }]
tokens = [{ sha256 = "{token:operator}", expires = 2099-01-01T00:00:00Z }]

[identities.stranger]
kind = "agent"
tokens = [{ sha256 = "{token:stranger}", expires = 2099-01-01T00:00:00Z }]
"""


class Tokens(dict[str, str]):
    """A token for every identity that is asked for, made at the first asking."""

    def __missing__(self, identity: str) -> str:
        self[identity] = render_token(os.urandom(32))
        return self[identity]


def fill_policy(text: str, ca_fingerprint: str, tokens: Tokens) -> str:
    """A policy text with its `{ca}`, `{token:NAME}` and `{fido:NAME}` filled in."""
    text = fill_fido_keys(text.replace("{ca}", ca_fingerprint))
    while (at := text.find("{token:")) >= 0:
        name = text[at + len("{token:") : text.index("}", at)]
        text = text.replace(f"{{token:{name}}}", token_digest(tokens[name]))
    return text


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Service:
    """`signer serve` with a policy and a CA key. Use as a context manager, or through the fixture `start_service`."""

    def __init__(
        self, folder: Path, ca: Key, policy: str = STANDARD_POLICY, *, environ: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.ca = ca
        self.tokens = Tokens()
        self.port = ports.free_port()
        self.policy_file = folder / "policy.toml"
        self.key_file = folder / "ca"
        self.data_dir, self.run_dir, self.log_file = folder / "data", folder / "run", folder / "log"
        self.write_policy(policy)
        self.key_file.write_bytes(ca.private.read_bytes())
        self.key_file.chmod(0o400)
        self.program = ["-m", "signer", "serve"]  # for Python
        self.stderr: int | None = None  # a descriptor for the log, instead of `log_file`
        self._environ = dict(environ or {})
        self._process: subprocess.Popen[bytes] | None = None

    def write_policy(self, policy: str) -> None:
        """Replaces policy.toml; a running service takes it at `reload()`."""
        self.policy_file.write_text(fill_policy(policy, self.ca.fingerprint, self.tokens))
        self.policy_file.chmod(0o644)  # whatever the umask: a policy that others may write is refused

    @property
    def address(self) -> str:
        return f"http://{ports.LOOPBACK}:{self.port}"

    @property
    def socket(self) -> Path:
        """The keeper's own socket."""
        return self.run_dir / "keeper.sock"

    def environment(self) -> dict[str, str]:
        """What `signer` commands of this service need in their environment."""
        as_root = {"SIGNER_KEEPER_USER": "root", "SIGNER_API_USER": "root"} if os.geteuid() == 0 else {}
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "SIGNER_POLICY_FILE": str(self.policy_file),
            "SIGNER_CA_KEY_FILE": str(self.key_file),
            "SIGNER_CA_KEY_OWNER": f"{os.geteuid()}:{os.getegid()}",
            "SIGNER_DATA_DIR": str(self.data_dir),
            "SIGNER_RUN_DIR": str(self.run_dir),
            "SIGNER_LISTEN": f"{ports.LOOPBACK}:{self.port}",
            **as_root,
            **self._environ,
        }

    def token_file(self, identity: str) -> Path:
        """A file with the identity's token, as `safe-session` wants it."""
        path = self.folder / f"token-{identity}"
        path.touch(0o600)
        path.write_text(self.tokens[identity] + "\n")
        return path

    def client_environment(self, identity: str, role: str = "llmops") -> dict[str, str]:
        """What `safe-session` needs in its environment to ask this service."""
        return {
            "SAFE_SESSION_ADDR": self.address,
            "SAFE_SESSION_TOKEN_FILE": str(self.token_file(identity)),
            "SAFE_SESSION_ROLE": role,
        }

    def start(self) -> Service:
        """Returns when /readyz says yes."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *self.program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log if self.stderr is None else self.stderr,
                env=self.environment(),
            )
        try:
            ports.wait_until(self._is_serving, self._process, self.log)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> int:
        """SIGTERM and wait; the exit status."""
        assert self._process is not None
        process, self._process = self._process, None
        ports.stop(process)
        return process.returncode

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self.stop()

    @property
    def pid(self) -> int:
        """The launcher's process."""
        assert self._process is not None
        return self._process.pid

    def keeper_pid(self) -> int | None:
        """The keeper's process, None while there is none."""
        for child in children(self.pid):
            if b"keeper" in command_line(child).split(b"\0"):
                return child
        return None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def _is_serving(self) -> bool:
        """Ready, and the launcher knows it: an api that ends before that is one that did not start."""
        return self.is_ready() and (self.stderr is not None or "signer: serving on " in self.log())

    def is_ready(self) -> bool:
        try:
            return self.ask("GET", "/readyz").status == 200
        except OSError:
            return False

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        identity: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10,
    ) -> Answer:
        """One request on a connection of its own; `body` is sent as it is if bytes, else as JSON."""
        connection = http.client.HTTPConnection(ports.LOOPBACK, self.port, timeout=timeout)
        try:
            sent = dict(headers or {})
            if identity is not None:
                sent["Authorization"] = f"Bearer {self.tokens[identity]}"
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def sign(
        self, public_line: str, *, identity: str = "deploy-agent", role: str = "llmops", **fields: object
    ) -> Answer:
        """A native sign request."""
        return self.ask("POST", f"/api/sign/{role}", {"public_key": public_line, **fields}, identity=identity)

    def command(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs `signer ARGV` with this service's settings."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "signer", *argv],
            env=self.environment(),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )


class StartService(Protocol):
    """The fixture `start_service`."""

    def __call__(
        self, policy: str = ..., *, ca_kind: str = ..., environ: Mapping[str, str] | None = ...
    ) -> Service: ...
