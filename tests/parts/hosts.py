"""Prepared hosts for the preflight script: real files with real owners below a folder of root's, and what is around.

A `Host` is ready in every respect; a test changes what its sentence says and runs the script. The script runs with its
production paths: in a mount namespace of its own, files of the host's folder lie over /etc/passwd, /etc/ssh/sshd_config
and the like. `docker`, `podman`, `podman-compose` and `timedatectl` are small programs in the host's `bin`, which say
what tests/data/preflight holds; a real one takes part when a test removes the small one. Every run checks that nothing
in the host's folder has changed, and that nothing the script said holds a line of the key.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.parts.keys import Key, make_key

SCRIPT: Final = Path(__file__).parents[2] / "scripts" / "cutover" / "safe-session-local-ca-preflight.sh"
DATA: Final = Path(__file__).parents[1] / "data" / "preflight"
KEY_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE"
FOLDER_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR"  # what compose reads; the script sets it
SERVICE: Final = "safe-session-api"

_COMPOSE: Final = f"""#!/bin/sh
here=${{0%/*}}
if [ "$1" = version ] || [ "$2" = version ]; then cat "$here/../compose-version" 2>/dev/null; exit 0; fi
if [ -e "$here/../compose-fails" ]; then echo 'cannot do that' >&2; exit 3; fi
if [ -z "${{{FOLDER_VARIABLE}:-}}" ] && [ ! -e "$here/../compose-default" ]; then
    cat "$here/../compose-message" >&2
    exit 1
fi
cat "$here/../merged.yaml"
"""
_ENGINE: Final = """#!/bin/sh
here=${0%/*}
if [ -e "$here/../engine-fails" ]; then exit 125; fi
case $1 in
    --version) cat "$here/../engine-version" ;;
    ps) if [ -e "$here/../container.txt" ]; then echo f2dbb08864b4; fi ;;
    inspect)
        if [ -e "$here/../container-ends" ]; then rm "$here/../container-ends"; exit 125; fi
        cat "$here/../container.txt"
        ;;
    image) [ "$5" = "$(cat "$here/../image")" ] ;;
    compose) exit 125 ;;
    *) echo "no answer recorded for $*" >&2; exit 99 ;;
esac
"""
_PODMAN_COMPOSE: Final = "podman-compose version 1.6.0\npodman version 4.3.1\n"
_DOCKER_COMPOSE: Final = "Docker Compose version v2.40.3\n"
_PASSWD: Final = """\
root:x:0:0:root:{home}/root:/bin/bash
sshd:x:104:65534::/run/sshd:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
llmops:x:1001:1001::{home}/llmops:/bin/sh
"""


@dataclass(frozen=True)
class Line:
    """One check as the script told it."""

    status: str
    code: str
    detail: str
    next: str = ""


@dataclass(frozen=True)
class Told:
    """What the script said: its checks, its last line, and all of it as it came."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[Line]:
        """The checks, from the text."""
        found: list[Line] = []
        for text in self.stdout.splitlines()[:-1]:
            if text.startswith("      "):
                found[-1] = Line(found[-1].status, found[-1].code, found[-1].detail, text.strip())
            else:
                status, code, *detail = text.split(maxsplit=2)
                found.append(Line(status, code, *detail))
        return found

    @property
    def summary(self) -> str:
        """The last line."""
        return self.stdout.splitlines()[-1]

    def codes(self, *statuses: str) -> set[str]:
        """The codes of the checks that ended with one of `statuses`."""
        return {line.code for line in self.lines if line.status in statuses}

    def detail(self, code: str) -> str:
        """What is said about `code`; all of it, if it came more than once."""
        return "\n".join(line.detail for line in self.lines if line.code == code)


@dataclass
class Host:
    """A host below `folder` whose key lies below `memory`, a folder on a tmpfs; both are root's, also above them."""

    folder: Path
    memory: Path
    ca: Key
    arguments: list[str] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    over: dict[str, Path] = field(default_factory=dict)
    _key: Path = Path("/nonexistent")

    @classmethod
    def prepare(cls, folder: Path, memory: Path, ca: Key, host_key: Key) -> Host:
        """A host that is ready, with podman and podman-compose; `ca` is copied, its public half trusted."""
        host = cls(folder, memory, ca)
        for name in ("bin", "etc", "home/root/.ssh", "home/llmops/.ssh", "overlays"):
            (folder / name).mkdir(parents=True)
        host.key = memory / "safe-session" / "ca"
        host.key.parent.mkdir()
        host.put_key(ca.private.read_bytes())
        shutil.copyfile(DATA / "base.yaml", folder / "overlays" / "safe-session.yaml")
        shutil.copyfile(DATA / "overlay.yaml", folder / "overlays" / "local-ca.yaml")
        host.arguments += ["--base", str(folder / "overlays" / "safe-session.yaml")]
        host.arguments += ["--overlay", str(folder / "overlays" / "local-ca.yaml")]
        host.use_podman()
        host.program("timedatectl", "#!/bin/sh\necho yes\n")
        (folder / "etc" / "host_key").write_bytes(host_key.private.read_bytes())
        (folder / "etc" / "host_key").chmod(0o600)
        (folder / "etc" / "host_key.pub").write_text(f"{host_key.public_line}\n")
        (folder / "etc" / "ca.pub").write_text(f"# the CA\n{ca.public_line}\n")
        (folder / "etc" / "principals").write_text("llmops\n")
        host.configure_sshd()
        host.lay_over("/etc/passwd", _PASSWD.format(home=folder / "home"))
        if Path("/run/systemd/timesync").is_dir():  # what this machine's own time service says does not count
            (folder / "timesync").mkdir()
            host.over["/run/systemd/timesync"] = folder / "timesync"
        return host

    @property
    def key(self) -> Path:
        """Where the key is, and where the script is told to look for it unless a test says otherwise."""
        return self._key

    @key.setter
    def key(self, path: Path) -> None:
        self._key = path
        self.environ[KEY_VARIABLE] = str(path)

    def put_key(self, content: bytes, mode: int = 0o400) -> None:
        """A new key file with this content."""
        self.key.unlink(missing_ok=True)
        self.key.write_bytes(content)
        self.key.chmod(mode)

    def use_podman(self) -> None:
        """podman and podman-compose, as recorded."""
        self.program("podman", _ENGINE)
        self.program("podman-compose", _COMPOSE)
        self.program("docker", "#!/bin/sh\nexit 1\n")
        self._say("podman version 4.3.1", "podman")

    def use_docker(self) -> None:
        """docker with its compose plugin, as recorded."""
        self.program("docker", '#!/bin/sh\nif [ "$1" = compose ]; then shift; exec "${0%/*}/docker-compose" "$@"; fi\n'
                     + _ENGINE.partition("\n")[2])  # fmt: skip
        self.program("docker-compose", _COMPOSE)
        self._say("Docker version 28.2.2, build e6534b4", "docker")

    def _say(self, version: str, engine: str) -> None:
        compose = {"podman": "podman-compose.yaml", "docker": "docker-compose.yaml"}[engine]
        self.write("engine-version", f"{version}\n")
        self.write("compose-version", {"podman": _PODMAN_COMPOSE, "docker": _DOCKER_COMPOSE}[engine])
        self.write("image", "localhost/signer:test")
        self.write("compose-message", f"required variable {FOLDER_VARIABLE} is missing a value: name the folder\n")
        folder = str(self.key.parent)
        self.write("merged.yaml", (DATA / compose).read_text().replace("KEYDIR", folder))
        self.write("container.txt", (DATA / f"container-{engine}.txt").read_text().replace("KEYDIR", folder))

    def program(self, name: str, text: str) -> None:
        """A small program that stands for a real one."""
        path = self.folder / "bin" / name  # run as /usr/local/sbin/NAME
        path.write_text(text.replace("${0%/*}", str(path.parent)))
        path.chmod(0o755)

    def write(self, name: str, text: str) -> Path:
        """A file of the host."""
        path = self.folder / name
        path.write_text(text)
        return path

    def change(self, name: str, before: str, after: str) -> None:
        """Replaces a text that must be in a file of the host."""
        text = (self.folder / name).read_text()
        assert before in text, f"{name} does not hold {before!r}"
        (self.folder / name).write_text(text.replace(before, after))

    def lay_over(self, place: str, text: str) -> None:
        """While the script runs, `place`, which must exist, has this content."""
        path = self.folder / "etc" / place.replace("/", "-").strip("-")
        path.write_text(text)
        self.over[place] = path

    def configure_sshd(self, *lines: str, ca_file: str = "ca.pub", principals: str = "principals") -> None:
        """The host's sshd_config; `lines` come first, and the first one of a kind counts."""
        folder = self.folder / "etc"
        text = [*lines, f"HostKey {folder / 'host_key'}", f"TrustedUserCAKeys {folder / ca_file}"]
        self.lay_over("/etc/ssh/sshd_config", "\n".join([*text, f"AuthorizedPrincipalsFile {folder / principals}", ""]))

    def lay_over_run(self, *files: str) -> None:
        """While the script runs, /run holds these empty files and what sshd needs, and nothing else."""
        (self.folder / "run" / "sshd").mkdir(parents=True)
        for name in files:
            path = self.folder / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        self.over = {"/run": self.folder / "run"} | {
            place: path for place, path in self.over.items() if not place.startswith("/run/")
        }

    def authorize(self, account: str, line: str, name: str = "authorized_keys") -> None:
        """Puts a line into the account's authorized_keys."""
        path = self.folder / "home" / account / ".ssh" / name
        with path.open("a") as file:
            file.write(f"{line}\n")

    def command(self, *arguments: str, bash: tuple[str, ...] = (), under: tuple[str, ...] = ()) -> list[str]:
        """The command line that runs the script on this host, `under` another program if one is named."""
        over = {"/usr/local/sbin": self.folder / "bin", **self.over}  # first on the script's own PATH
        mounts = [str(part) for place, path in over.items() for part in (path, place)]
        mount = 'set -e; while [ "$1" != -- ]; do mount --no-mtab --bind "$1" "$2"; shift 2; done; shift; exec "$@"'
        script = [*under, "/bin/bash", "-p", *bash, str(SCRIPT), *self.arguments, *arguments]
        return ["unshare", "-m", "--propagation", "private", "sh", "-c", mount, "sh", *mounts, "--", *script]

    def sshd_accepts(self, certificate: Path, account: str = "llmops") -> bool:
        """Whether this host's sshd, the real one, takes the certificate for the account; its key is withheld."""
        known = self.folder / "known_hosts"
        known.write_text(f"host {(self.folder / 'etc' / 'host_key.pub').read_text()}")
        options = {
            "ProxyCommand": f"/usr/sbin/sshd -i -E {self.folder}/sshd.log",
            "HostKeyAlias": "host",
            "UserKnownHostsFile": str(known),
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "IdentityFile": "none",
            "CertificateFile": str(certificate),
            "PreferredAuthentications": "publickey",
        }
        line = ["ssh", "-v", "-F", "none", *(f"-o{name}={value}" for name, value in options.items()), f"{account}@host"]
        script = self.command()
        mounted = script[: script.index("--", script.index("sh")) + 1]
        done = subprocess.run([*mounted, *line, "true"], capture_output=True, text=True, cwd="/", timeout=60)
        assert "Authentications that can continue" in done.stderr, done.stderr
        return "Server accepts key" in done.stderr

    def environment(self) -> dict[str, str]:
        """The whole environment of a run."""
        return {"PATH": f"{self.folder / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin", **self.environ}

    def run(self, *arguments: str, bash: tuple[str, ...] = ()) -> Told:
        """Runs the script; checks that it left everything as it was and gave nothing of the key away."""
        before = self.snapshot()
        done = subprocess.run(
            self.command(*arguments, bash=bash),
            capture_output=True,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            cwd="/",
            timeout=100,
        )
        assert self.snapshot() == before
        told = Told(done.returncode, done.stdout.decode("ascii"), done.stderr.decode(errors="replace"))
        assert not self.secrets_in(done.stdout + done.stderr)
        return told

    def secrets(self) -> list[bytes]:
        """Every line of the key file; none if there is no file."""
        return [line for line in self.key.read_bytes().splitlines() if len(line) > 8] if self.key.is_file() else []

    def secrets_in(self, text: bytes) -> list[bytes]:
        """The lines of the key, or halves of them, that the text holds."""
        return [part for line in self.secrets() for part in (line[:32], line[-32:]) if part in text]

    def snapshot(self) -> Mapping[str, tuple[object, ...]]:
        """Content, rights, owner and times of everything below the host's folders."""
        found = {}
        for top in (self.folder, self.memory):
            for path in (top, *sorted(top.rglob("*"))):
                facts = path.lstat()
                content = ""
                if stat.S_ISREG(facts.st_mode):
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                elif stat.S_ISLNK(facts.st_mode):
                    content = os.readlink(path)  # noqa: PTH115 - as it is written
                found[str(path)] = (
                    facts.st_mode, facts.st_uid, facts.st_gid, facts.st_nlink, facts.st_mtime_ns, facts.st_ctime_ns,
                    facts.st_ino, content,
                )  # fmt: skip
        return found


def make_place(name: str) -> Path:
    """A folder for hosts where root owns everything above it, which /tmp is not; for the caller to remove."""
    place = Path("/var/lib") / f"signer-preflight-{name}"
    place.mkdir(mode=0o755)
    (place / "memory").mkdir()
    return place


def why_not_here() -> str:
    """Why no host can be prepared on this machine; empty if one can."""
    if os.getuid() != 0:
        return "not root"
    tried = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return "" if tried.returncode == 0 else "no mounts: this root may not make any"


def make_keys(folder: Path) -> tuple[Key, Key]:
    """A CA key and a host key."""
    return make_key(folder, "ed25519", "ca", comment="ca of the platform"), make_key(folder, "ed25519", "host")
