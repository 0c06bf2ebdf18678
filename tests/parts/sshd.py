"""A real `sshd` on a loopback port, out of a temporary folder, that lets the current user in by certificate."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.parts import keys, missing, ports


@dataclass(frozen=True)
class Login:
    """How an `ssh` command ended: its exit status (255: no login) and what it printed."""

    status: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.status == 0


class Sshd:
    """One sshd. `trusted_ca` are the lines of TrustedUserCAKeys, `principals` those that open the current account.

    Use as a context manager, or through the fixture `start_sshd`. `extra` are sshd_config lines that come first and
    so win. sshd reads both files at each login: `trust()` and `allow()` change them under a running one.
    """

    def __init__(
        self,
        folder: Path,
        trusted_ca: str | Sequence[str],
        *,
        principals: Sequence[str] = ("llmops",),
        extra: Sequence[str] = (),
        host_key: Path | None = None,
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.port = 0
        self.log_file = folder / "sshd.log"
        self.known_hosts = folder / "known_hosts"
        self._extra = tuple(extra)
        self._host_key = host_key or keys.make_key(folder, "ed25519", "host").private
        self._process: subprocess.Popen[bytes] | None = None
        self.trust(trusted_ca)
        self.allow(principals)

    def trust(self, trusted_ca: str | Sequence[str]) -> None:
        lines = [trusted_ca] if isinstance(trusted_ca, str) else trusted_ca
        self._replace("trusted_ca", lines)

    def allow(self, principals: Sequence[str]) -> None:
        self._replace("principals", principals)

    def _replace(self, name: str, lines: Sequence[str]) -> None:
        fresh = self.folder / f".{name}"
        fresh.write_text("".join(f"{line.strip()}\n" for line in lines))
        fresh.replace(self.folder / name)

    def _configuration(self) -> str:
        lines = [
            *self._extra,
            f"ListenAddress {ports.LOOPBACK}:{self.port}",
            f"HostKey {self._host_key}",
            f"TrustedUserCAKeys {self.folder / 'trusted_ca'}",
            f"AuthorizedPrincipalsFile {self.folder / 'principals'}",
            "AuthorizedKeysFile none",
            "AuthenticationMethods publickey",
            "PermitRootLogin prohibit-password",
            "StrictModes no",  # the folder is under /tmp
            "UsePAM no",
            "PidFile none",
            "LogLevel VERBOSE",
            "PerSourcePenalties no" if _has_penalties() else "",  # newer ones slow down a source of failed logins
            "MaxStartups 100",
            "PrintMotd no",
            "PrintLastLog no",
            "Subsystem sftp internal-sftp",
            f"SetEnv HOME={self.folder}",  # what the machine's owner has in .bashrc is none of a test's business
        ]
        return "".join(f"{line}\n" for line in lines)

    def start(self) -> Sshd:
        """Returns when sshd accepts connections."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for attempt in range(3):
            self.port = ports.free_port()
            configuration = self.folder / "sshd_config"
            configuration.write_text(self._configuration())
            command = [str(missing.SSHD), "-D", "-f", str(configuration), "-E", str(self.log_file)]
            # sshd wants to be called by its absolute path, and ends its sessions when its group is gone.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                ports.wait_until(lambda: ports.accepts(self.port), self._process, self.log)
            except RuntimeError:
                if attempt == 2 or "Address already in use" not in self.log():
                    raise
            else:
                break
        return self

    def stop(self) -> None:
        if self._process is not None:
            ports.stop(self._process)
            self._process = None

    def __enter__(self) -> Sshd:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def host_public(self) -> Path:
        """The file with the public half of its host key."""
        return self._host_key.with_name(f"{self._host_key.name}.pub")

    def log(self) -> str:
        """All that sshd logged so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def ssh_options(self) -> list[str]:
        """Options that bring any `ssh` (also inside `safe-session ssh` or `bao ssh`) here and nowhere else."""
        settings = {
            "Port": str(self.port),
            "User": self.user,
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "UpdateHostKeys": "no",
            "BatchMode": "yes",
            "PreferredAuthentications": "publickey",
            "LogLevel": "ERROR",
            "ConnectTimeout": "10",
        }
        return ["-F", "none", *(f"-o{name}={value}" for name, value in settings.items())]

    def login(
        self,
        command: str = "true",
        *,
        identity: Path | None = None,
        certificate: Path | None = None,
        agent: str | Path | None = None,
        options: Sequence[str] = (),
        timeout: float = 30,
    ) -> Login:
        """Runs `ssh 127.0.0.1 command` with that private key and certificate, or with the agent at that socket.

        `options` come before all others, so they win. Nothing of the calling user's keys or agent is offered.
        """
        arguments = ["ssh", *options, *self.ssh_options()]
        if identity is not None:
            arguments += ["-i", str(identity), "-oIdentitiesOnly=yes"]
        elif agent is not None:
            arguments += ["-oIdentityFile=none"]
        if certificate is not None:
            arguments += [f"-oCertificateFile={certificate}"]
        arguments += [f"-oIdentityAgent={agent if agent is not None else 'none'}", ports.LOOPBACK, command]
        return run(arguments, timeout=timeout)


class StartSshd(Protocol):
    """The fixture `start_sshd`: an sshd that trusts these CA lines and is stopped after the test."""

    def __call__(
        self,
        trusted_ca: str | Sequence[str],
        *,
        principals: Sequence[str] = ("llmops",),
        extra: Sequence[str] = (),
    ) -> Sshd: ...


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float = 30) -> Login:
    """Runs `command` without standard input; with `environment` in place of this process's if given."""
    done = subprocess.run(
        list(command),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env=None if environment is None else dict(environment),
    )
    return Login(done.returncode, done.stdout, done.stderr)


def _has_penalties() -> bool:
    """OpenSSH 9.8 and later know PerSourcePenalties; earlier ones refuse to start with it."""
    said = subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr
    number = said.partition("OpenSSH_")[2].partition("p")[0]
    major, _, minor = number.partition(".")
    return (int(major), int(minor)) >= (9, 8)
