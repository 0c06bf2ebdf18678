"""A whole platform as it is before a cutover, real in every part: what cutover and decommission work on.

OpenBao with raft storage in a container, our service in another one as the compose file starts it (mode vault), hosts
that trust both CAs, the rendered CA key on a tmpfs, the files with their tokens, and cutover.toml. `reset()` brings it
back to that from wherever a test left it. The programs `podman` and `podman-compose` in `bin` are the real ones with
the settings that this machine needs; asked for containers by label they answer with those of this platform alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from signer.api_client import ApiClient
from signer.migration.config import KEY_VARIABLE
from tests.parts.contained_bao import ContainedBao
from tests.parts.container import BASE_FILE, FOLDER_VARIABLE, OVERLAY_FILE, Contained, ContainerEngine, Ended, Engine
from tests.parts.eventually import eventually
from tests.parts.keys import make_key
from tests.parts.platform_files import CUTOVER_MAY, POLICY, SERVICE_MAY, SSH_HOST, facts, render_toml
from tests.parts.ports import LOOPBACK
from tests.parts.service import ROOT
from tests.parts.sshd import Login, Sshd, run

CUTOVER_PHRASE: Final = "m04-vault-runtime-cutover-approved"
DECOMMISSION_PHRASE: Final = "m04-vault-destructive-cleanup-approved"
TARGETS: Final = ("rs2000", "edge1")
_PODMAN: Final = """\
#!/bin/sh
case "$1 $*" in
    *label=com.docker.compose.project=*) ;;
    ps*) set -- "$@" --filter label=com.docker.compose.project={project} ;;
esac
exec {podman} "$@"
"""
# Compose, and for docker the engine as well.
_COMPOSE: Final = """\
#!/bin/sh
case " $* " in *" up --detach "*) if [ -x {at_up} ]; then {at_up}; fi ;; esac
exec {compose} "$@"
"""


class Platform:
    """Use as a context manager. `memory` must be a folder of root's on a tmpfs, with nobody else's above it."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        memory: Path,
        *,
        targets: Sequence[str] = TARGETS,
        ttl: str = "15m",
        max_ttl: str = "30m",
        service_engine: ContainerEngine | None = None,
    ) -> None:
        """`ttl` is how long certificates live unless somebody asks for another time: Vault outlives its last one.

        The service runs with `service_engine`, which is `engine` if none is given; Vault with `engine`.
        """
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.engine = engine
        self.lives = {"ttl": ttl, "max_ttl": max_ttl}
        self.folder = folder
        self.memory = memory
        self.bao = ContainedBao(engine, folder / "openbao")
        self.service = Contained(
            service_engine or engine, folder / "service",
            make_key(folder, "ed25519", "ca", comment="safe-session-ca"), local=False,
            vault=(self.bao.address, "ssh", "none"),
        )  # fmt: skip
        self.ca = self.service.ca
        self.key_file = memory / "signer-ca" / "ca"
        self.service.key_file.unlink()
        self.service.key_file = self.key_file
        self.base, self.overlay = folder / "safe-session.yaml", folder / "safe-session-local-ca.yaml"
        self.service.variables |= {KEY_VARIABLE: str(self.key_file), FOLDER_VARIABLE: str(self.key_file.parent)}
        self.service.files = (self.base,)
        self.vault_ca_line = ""
        self.evidence_dir = folder / "evidence"
        self.config = folder / "cutover.toml"
        self.tokens = {name: folder / f"token-{name}" for name in ("cutover", "admin")}
        host_key = make_key(folder, "ed25519", "host")
        self.targets = {name: Sshd(folder / name, self.ca.public_line, host_key=host_key.private) for name in targets}
        self._started: list[subprocess.Popen[str]] = []
        self._clients: dict[str, dict[str, str]] = {}
        self._host_line = " ".join(host_key.public_line.split()[:2])
        self._running = ExitStack()
        self._at_up = folder / "bin" / "at-up"
        self._write_programs()

    # --- its life ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Platform:
        try:
            self._write_files()
            self._running.enter_context(self.bao)
            self._prepare_vault()
            for name, sshd in self.targets.items():
                self._running.enter_context(sshd)
                sshd.known_hosts.write_text(f"[{LOOPBACK}]:{sshd.port} {self._host_line}\n")
                self.trust(name)
            self._write_ssh_config()
            self.write_config()
            self._running.callback(self._remove_containers)
            self.service.start()
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end_started()
        self._running.close()

    def reset(self) -> None:
        """Back to mode vault with nothing done yet; the service's ledger stays."""
        self._end_started()
        self.engine.run("umount", "--lazy", str(self.evidence_dir))
        shutil.rmtree(self.evidence_dir, ignore_errors=True)
        self._write_files()
        self._mend_vault()
        for name in self.targets:
            self.trust(name)
        self.write_config()
        if self.mode() != "vault":
            self.start_service()

    def _write_files(self) -> None:
        shutil.copyfile(BASE_FILE, self.base)
        shutil.copyfile(OVERLAY_FILE, self.overlay)
        self.key_file.parent.mkdir(mode=0o700, exist_ok=True)
        self.key_file.unlink(missing_ok=True)
        self.key_file.write_bytes(self.ca.private.read_bytes())
        self.key_file.chmod(0o400)
        policy = POLICY.replace("{ttl}", self.lives["ttl"]).replace("{max_ttl}", self.lives["max_ttl"])
        self.service.write_policy(policy)
        self.service.policy_file.chmod(0o644)

    def _remove_containers(self) -> None:
        """The service's and its trial's, after whatever still works on them has been ended."""
        mark = f"\0SIGNER_COMPOSE_PROJECT={self.service.project}".encode()
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # no process, or none that is still there
                if mark in b"\0" + (folder / "environ").read_bytes() and "conmon" not in (folder / "comm").read_text():
                    os.kill(int(folder.name), signal.SIGKILL)
        for project in (self.service.project, f"{self.service.project}-trial"):
            self.service.engine.remove_project(project)

    def _write_ssh_config(self) -> None:
        """For `ssh -F ssh_config NAME`, as people type it."""
        texts = [
            SSH_HOST.format(name=name, host=LOOPBACK, port=one.port, user=one.user, known_hosts=one.known_hosts)
            for name, one in self.targets.items()
        ]
        (self.folder / "ssh_config").write_text("".join(texts))

    def _write_programs(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        compose = self.service.engine.compose_command[0]
        for name, text in {
            "podman": _PODMAN.format(podman=shutil.which("podman"), project=self.service.project),
            Path(compose).name: _COMPOSE.format(compose=shutil.which(compose), at_up=self._at_up),
            "signer": f'#!/bin/sh\nexec {sys.executable} -P -m signer "$@"\n',
            "safe-session": f'#!/bin/sh\nexec {sys.executable} -P -m signer.safe_session "$@"\n',
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)

    # --- Vault ---------------------------------------------------------------------------------------------------

    def _prepare_vault(self) -> None:
        self.vault_ca_line = self.bao.enable_ssh("ssh")
        self.bao.write_role(**self.lives)
        self.new_vault_tokens()

    def new_vault_tokens(self) -> None:
        """Fresh tokens for the service, the cutover and the administrator, in their files."""
        service = self.bao.token_for(SERVICE_MAY, "safe-session")
        path = self.service.token_path
        fresh = path.with_name("fresh")
        fresh.write_text(service)
        shutil.copystat(path, fresh)
        os.chown(fresh, path.stat().st_uid, path.stat().st_gid)
        fresh.replace(path)
        for name, token in {
            "cutover": self.bao.token_for(CUTOVER_MAY, "safe-session-cutover"),
            "admin": self.bao.root_token,
        }.items():
            self.tokens[name].touch(0o600)
            self.tokens[name].write_text(f"{token}\n")

    def _mend_vault(self) -> None:
        """As it was at the start; a new one if its SSH engine is gone or its root token revoked."""
        if not self.bao.is_running():
            self.bao.resume()
        elif self.bao.call("GET", "sys/health").status == 503:
            self.bao.unseal()
        if self.bao.call("GET", "ssh/config/ca").status != 200 or self._other_mounts():
            self.bao.stop()
            self.bao.start()
            self._prepare_vault()
        self.bao.must("DELETE", "ssh/roles/llmops")
        self.bao.write_role(**self.lives)
        self.new_vault_tokens()

    def _other_mounts(self) -> set[str]:
        found = self.bao.must("GET", "sys/mounts")["data"]
        return set(found) - {"ssh/", "cubbyhole/", "identity/", "sys/"}

    def widen_vault_role(self, principal: str = "root") -> None:
        """Somebody lets the role in Vault have another principal."""
        self.bao.write_role(allowed_users=f"llmops,{principal}", **self.lives)

    def revoke_vault_token(self, name: str = "cutover") -> None:
        """The token in that file is worth nothing from here on, as if it had expired."""
        self.bao.must("POST", "auth/token/revoke", {"token": self.tokens[name].read_text().strip()})

    def hide_secret(self, marker: str, mount: str = "archive") -> None:
        """A second KV mount with a secret three folders deep, whose value is `marker`."""
        self.bao.must("POST", f"sys/mounts/{mount}", {"type": "kv", "options": {"version": "2"}})
        path = f"{mount}/data/old/deep/er/secret"
        eventually(
            lambda: self.bao.call("POST", path, {"data": {"password": marker}}).status == 200, "the KV mount is ready"
        )

    # --- hosts ---------------------------------------------------------------------------------------------------

    def trust(self, name: str) -> None:
        """The host trusts both CAs."""
        self._at_up.unlink(missing_ok=True)
        self.targets[name].trust([self.vault_ca_line, self.ca.public_line])

    def untrust(self, name: str) -> None:
        """The host trusts Vault's CA alone."""
        self.targets[name].trust([self.vault_ca_line])

    def untrust_at_up(self, name: str) -> None:
        """The host trusts Vault's CA alone from when compose brings the service up: after all checks."""
        folder = self.targets[name].folder
        (folder / "vaults").write_text(f"{self.vault_ca_line}\n")
        self._at_up.write_text(f"#!/bin/sh\ncd {folder} && cp vaults fresh && mv fresh trusted_ca\n")
        self._at_up.chmod(0o755)

    def login(
        self,
        name: str,
        command: str = "echo logged-in",
        *,
        identity: str = "deploy-agent",
        nice: bool = False,
        options: Sequence[str] = (),
    ) -> Login:
        """A login as people have it: through `safe-session ssh`; `nice`: with what processor time others leave."""
        sshd = self.targets[name]
        ssh = ("ssh", *sshd.ssh_options(), LOOPBACK, command)
        argv = [sys.executable, "-P", "-m", "signer.safe_session", *options, *ssh]
        if identity not in self._clients:
            self._clients[identity] = self.environment() | self.service.client_environment(identity)
        return run([*(["nice", "-n", "19"] if nice else []), *argv], environment=self._clients[identity], timeout=100)

    def can_log_in(self) -> bool:
        """True if all hosts can be logged in to."""
        return all(self.login(name).out == "logged-in\n" for name in self.targets)

    # --- the service ---------------------------------------------------------------------------------------------

    def compose(self, *argv: str, with_overlay: bool = False) -> Ended:
        files = (self.base, self.overlay) if with_overlay else (self.base,)
        return self.service.engine.compose(files, "-p", self.service.project, *argv, environ=self.service.variables)

    def start_service(self) -> None:
        """In mode vault, whatever runs now."""
        self.compose("down", "--timeout", "2")
        self.service.start()

    def ready(self) -> Mapping[str, Any]:
        """What /readyz says; empty if nothing answers."""
        try:
            found: Mapping[str, Any] = json.loads(self.service.ask("GET", "/readyz").body)
        except (OSError, ValueError):
            return {}
        return found

    def mode(self) -> str:
        """The mode of the running service, empty if it is not ready."""
        found = self.ready()
        return str(found.get("mode", "")) if self.service.is_ready() else ""

    def wait_for_mode(self, mode: str) -> None:
        eventually(lambda: self.mode() == mode, f"the service is ready in mode {mode}", seconds=90)

    def break_overlay(self) -> None:
        """With the overlay a container can be made, but its service does not start: its certificate is not there."""
        place, files = "SIGNER_MODE: local\n", ("SIGNER_TLS_CERT_FILE", "SIGNER_TLS_KEY_FILE")
        more = "".join(f"      {name}: /run/signer-tls/{name[-8:-5].lower()}\n" for name in files)
        text = self.overlay.read_text()
        assert place in text
        self.overlay.write_text(text.replace(place, place + more))

    # --- the operator --------------------------------------------------------------------------------------------

    def write_config(self, **changes: object) -> Path:
        """cutover.toml; `changes` are as for `facts`."""
        self.config.write_text(render_toml(*facts(self, changes)))
        return self.config

    def environment(self) -> dict[str, str]:
        """What a command of the operator finds around it."""
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            **self.engine.settings,
            **self.service.engine.settings,
        }

    def command(self, *words: str) -> list[str]:
        """The command line of `signer WORDS`."""
        return [sys.executable, "-P", "-m", "signer", *words]

    def signer(self, *words: str, typed: str = "", env: Mapping[str, str] | None = None, timeout: float = 110) -> Ended:
        """Runs `signer WORDS` as the operator does, without a terminal."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment() | dict(env or {}),
            cwd=self.folder,
            input=typed,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """A command of the operator, not waited for; in a session of its own."""
        process = subprocess.Popen(
            command,
            env=self.environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def _end_started(self) -> None:
        """A test that failed did not wait for them."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def plan(self, operation: str = "cutover") -> str:
        """Makes a plan that can be applied; its file."""
        name = f"{operation}.json"
        done = self.signer(operation, "plan", "--config", self.config.name, "--out", name)
        assert done.status == 0, done.err
        return name

    def apply(self, plan: str, phrase: str = CUTOVER_PHRASE) -> Ended:
        """Applies it with that phrase."""
        return self.signer(plan.removesuffix(".json"), "apply", plan, "--approve", phrase)

    def status(self) -> dict[str, Any]:
        """What `signer cutover status` says."""
        done = self.signer("cutover", "status", "--config", self.config.name, "--json")
        assert done.status == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        return found

    def rollback(self, reason: str = "a test") -> Ended:
        return self.signer("cutover", "rollback", "--config", self.config.name, "--reason", reason)

    def verify_evidence(self) -> Ended:
        """`signer evidence verify` of the newest run."""
        newest = max(path.parent for path in self.evidence_dir.glob("*-*/SHA256SUMS"))
        return self.signer("evidence", "verify", str(newest), "--config", self.config.name)

    def operations(self) -> list[dict[str, Any]]:
        """What the service's ledger holds of operations, newest first."""
        with self._api() as api:
            return api.operations()

    def certificates(self, **filters: str) -> list[dict[str, Any]]:
        """What it holds of certificates, newest first."""
        with self._api() as api:
            return list(api.certificates(**filters))

    def _api(self) -> ApiClient:
        return ApiClient(self.service.address, self.service.folder / "token-operator")

    def container(self) -> str:
        """The identity of the service's container: another one after each change."""
        return str(self.service.inspect()["Id"])

    def fill_evidence_disk(self, size: str = "64k") -> None:
        """The evidence directory is a file system of its own, with hardly any room; `reset` takes it away."""
        self.evidence_dir.mkdir(mode=0o700, exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(self.evidence_dir)], check=True
        )


def make_memory(folder: Path) -> bool:
    """Makes `folder`, root's alone, on a tmpfs; False if it is on a disk, as no file system may be mounted here."""
    folder.mkdir(mode=0o755, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "none", str(folder)], capture_output=True)
    return done.returncode == 0


def remove_memory(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)
    shutil.rmtree(folder)
