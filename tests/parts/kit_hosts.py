"""Throwaway hosts for the host kit: namespaces of their own over this machine's files, and a real sshd inside.

A `KitHost` sees /etc, /usr/local and /var/lib of this machine through overlays whose upper halves are on a tmpfs, an
empty /run, /home and /tmp, and its own processes alone. So the kit runs with its production paths, and what it leaves
behind is what the upper halves hold. Loopback is this machine's: logins come from 127.0.0.1, which is the host's own
address, or from 127.0.0.2, which stands for another machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.parts import ports
from tests.parts.eventually import eventually
from tests.parts.keys import Key, make_key, sign_with_ssh_keygen

KIT: Final = Path(__file__).parents[2] / "scripts" / "host"
PROGRAMS: Final = "/usr/local/libexec/safe-session-host"
STATE: Final = "/var/lib/safe-session-host"
FOLDER: Final = "/etc/ssh/safe-session"
DROP_IN: Final = "/etc/ssh/sshd_config.d/00-safe-session.conf"
INCLUDE: Final = "Include /etc/ssh/sshd_config.d/*.conf\n"
OUTSIDE: Final = "127.0.0.2"
ACCOUNT: Final = "llmops"
_OVER: Final = ("etc", "usr/local", "var/lib")

_INIT: Final = r"""
set -e
top=$1 kit=$2
mount -t tmpfs -o mode=755 none "$top"
cp -a "$kit" "$top/kit"
for name in etc usr/local var/lib; do
    mkdir -p "$top/upper/$name" "$top/work/$name"
    mount -t overlay -o "lowerdir=/$name,upperdir=$top/upper/$name,workdir=$top/work/$name" overlay "/$name"
done
mkdir "$top/run" "$top/home"
mount --bind "$top/home" /home
mount -t tmpfs -o mode=1777 none /tmp
# The last one: what this machine has in /run is gone then, and top may lie there.
mkdir "$top/run/sshd" && chmod 755 "$top/run/sshd"
mount --bind "$top/run" /run
: >"$top/ready"
trap 'exit 0' TERM
while :; do sleep 60 & wait $! || :; done
"""


@dataclass(frozen=True)
class Said:
    """How a command on the host ended."""

    status: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def code(self) -> str:
        """What `install` prints for `install --confirm`."""
        found = re.search(r"--confirm ([0-9a-f]{10})$", self.out, re.MULTILINE)
        assert found, self.out + self.err
        return found[1]

    def failed(self) -> set[str]:
        """The codes of the checks that failed."""
        return set(re.findall(r"^FAIL  (\w+)", self.out, re.MULTILINE))


@dataclass(frozen=True)
class Keys:
    """The keys of all hosts: CA, publishing key, host key, a user's key and one that is in authorized_keys."""

    ca: Key
    publisher: Key
    host: Key
    user: Key
    other: Key

    @classmethod
    def make(cls, folder: Path) -> Keys:
        return cls(*(make_key(folder, "ed25519", name) for name in ("ca", "publisher", "host", "user", "other")))

    def certificate(self, folder: Path, **choices: object) -> Path:
        """A certificate of the user's key, as `sign_with_ssh_keygen` makes it."""
        shutil.copyfile(self.user.public, folder / "id.pub")
        copied = Key("ed25519", self.user.private, folder / "id.pub")
        return sign_with_ssh_keygen(choices.pop("ca", self.ca), copied, **choices)  # type: ignore[arg-type]


class KitHost:
    """One host. Its sshd listens on `port` once `start_sshd()` was called."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.folder = folder
        self.keys = keys
        self.port = 0
        self._namespaces = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc", "--kill-child",
             "bash", "-c", _INIT, "init", str(folder), str(KIT)],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._init = eventually(self._find_init, "the namespaces are ready")
        self.write("/etc/ssh/ssh_host_ed25519_key", keys.host.private.read_text(), 0o600)
        self.write("/etc/passwd", f"{Path('/etc/passwd').read_text()}{ACCOUNT}:x:7001:7001::/home/{ACCOUNT}:/bin/sh\n")
        self.write("/etc/shadow", f"{Path('/etc/shadow').read_text()}{ACCOUNT}:*:19000:0:99999:7:::\n", 0o600)
        for account in (ACCOUNT, "root"):
            self.run("mkdir", "-p", f"/home/{account}/.ssh")
            self.write(f"/home/{account}/.ssh/authorized_keys", f"{keys.other.public_line}\n")
        self.configure()

    def _find_init(self) -> int:
        """The namespaces' first process, as this machine counts it, once all is mounted."""
        assert self._namespaces.poll() is None, "a host's namespaces ended"
        children = Path(f"/proc/{self._namespaces.pid}/task/{self._namespaces.pid}/children").read_text().split()
        if not children or not Path(f"/proc/{children[0]}/root{self.folder}/ready").exists():
            return 0
        return int(children[0])

    def close(self) -> None:
        """Ends every process of the host; its file systems go with it."""
        self._namespaces.kill()
        self._namespaces.wait()

    # --- files ---------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """Where this machine sees a file of the host."""
        return Path(f"/proc/{self._init}/root{name}")

    def write(self, name: str, text: str | bytes, mode: int = 0o644) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)

    def read(self, name: str) -> str:
        return self.path(name).read_text()

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def configure(self, *, first: str = "", include: str = INCLUDE, last: str = "") -> None:
        """sshd_config, from Debian's: `first` above all, `last` below all; `include` in its place."""
        if self.port == 0:
            self.port = ports.free_port()
        self.write(
            "/etc/ssh/sshd_config",
            f"{first}{include}Port {self.port}\nListenAddress {ports.LOOPBACK}\nHostKey /etc/ssh/ssh_host_ed25519_key\n"
            "UsePAM no\nKbdInteractiveAuthentication no\nX11Forwarding yes\nPrintMotd no\nPrintLastLog no\n"
            "AuthorizedKeysFile /home/%u/.ssh/authorized_keys\nStrictModes no\nLogLevel VERBOSE\n"
            f"AcceptEnv LANG LC_*\nSubsystem sftp /usr/lib/openssh/sftp-server\n{last}",
        )

    def snapshot(self) -> Mapping[str, tuple[object, ...]]:
        """Kind, rights, owner and content of everything that differs from this machine, folders' times apart."""
        found: dict[str, tuple[object, ...]] = {}
        for name in _OVER:
            top = self.path(f"{self.folder}/upper/{name}")
            for path in sorted(top.rglob("*")):
                facts = path.lstat()
                seen = f"/{name}/{path.relative_to(top)}"
                if stat.S_ISDIR(facts.st_mode) and Path(seen).is_dir():
                    continue  # an overlay copies the folders that were looked at for writing
                if stat.S_ISCHR(facts.st_mode) and not Path(seen).exists():
                    continue  # an overlay's own mark for what was removed; it was never there below
                content = ""
                if stat.S_ISREG(facts.st_mode):
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                elif stat.S_ISLNK(facts.st_mode):
                    content = os.readlink(path)  # noqa: PTH115 - as it is written
                found[seen] = (facts.st_mode, facts.st_uid, facts.st_gid, content)
        return found

    # --- commands ------------------------------------------------------------------------------------------------

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", "-t", str(self._init), "-m", "-p", "--wd=/", *arguments]

    def run(self, *arguments: str, timeout: float = 60) -> Said:
        """Runs a command as root on the host, without a terminal."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            timeout=timeout,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def kit(self, program: str, *arguments: str) -> Said:
        """Runs a program of the kit as it was copied to the host."""
        return self.run(f"{self.folder}/kit/{program}", *arguments)

    def install_arguments(self, *more: str, principals: Sequence[str] = (f"{ACCOUNT}=llmops",)) -> list[str]:
        self.write(f"{self.folder}/ca.pub", f"# the CA\n{self.keys.ca.public_line}\n")
        self.write(f"{self.folder}/publisher.pub", f"{self.keys.publisher.public_line}\n")
        chosen = [part for pair in principals for part in ("--principals", pair)]
        return ["--ca", f"{self.folder}/ca.pub", *chosen, *more]

    def install(self, *more: str, principals: Sequence[str] = (f"{ACCOUNT}=llmops",)) -> Said:
        return self.kit("install", *self.install_arguments(*more, principals=principals))

    def confirm(self, code: str, *, source: str = OUTSIDE) -> Said:
        """Gives the code in a new login as root; from the host's own address with `source="127.0.0.1"`."""
        return self.login(f"{PROGRAMS}/install --confirm {shlex.quote(code)}", account="root", source=source)

    def installed(self, *more: str) -> None:
        """Installs and confirms; sshd must run."""
        said = self.install(*more)
        assert said.ok, said.out + said.err
        confirmed = self.confirm(said.code)
        assert confirmed.ok, confirmed.out + confirmed.err

    # --- sshd ----------------------------------------------------------------------------------------------------

    def start_sshd(self) -> None:
        """Returns when sshd accepts connections. It is a daemon, as on a host without systemd."""
        said = self.run("/usr/sbin/sshd", "-E", f"{self.folder}/sshd.log")
        assert said.ok, said.err
        eventually(lambda: ports.accepts(self.port), "sshd accepts connections")

    def stop_sshd(self) -> None:
        self.run("sh", "-c", "kill $(cat /run/sshd.pid)")
        eventually(lambda: not ports.accepts(self.port), "sshd is gone")

    def login(
        self,
        command: str = "true",
        *,
        key: Key | None = None,
        certificate: Path | None = None,
        account: str = ACCOUNT,
        source: str = OUTSIDE,
        options: Sequence[str] = (),
    ) -> Said:
        """Logs in over ssh: with the key that is in authorized_keys, with another one, or with a certificate."""
        chosen = ["-i", str((key or self.keys.other).private)]
        if certificate is not None:
            chosen = ["-i", str((key or self.keys.user).private), f"-oCertificateFile={certificate}"]
        fixed = {
            "BindAddress": source, "IdentitiesOnly": "yes", "IdentityAgent": "none", "BatchMode": "yes",
            "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "GlobalKnownHostsFile": "/dev/null",
            "PreferredAuthentications": "publickey", "LogLevel": "ERROR", "ConnectTimeout": "20",
        }  # fmt: skip
        done = subprocess.run(
            ["ssh", "-F", "none", "-p", str(self.port), "-l", account, *chosen, *options,
             *(f"-o{name}={value}" for name, value in fixed.items()), ports.LOOPBACK, command],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        return Said(done.returncode, done.stdout, done.stderr)


def hosts_install(host: KitHost, *more: str, source: str = OUTSIDE) -> subprocess.CompletedProcess[str]:
    """Runs `signer hosts install` for the host, over ssh as root, as somebody with a ControlMaster."""
    settings: Mapping[str, object] = {
        "Port": host.port, "BindAddress": source, "IdentityFile": host.keys.other.private, "IdentitiesOnly": "yes",
        "IdentityAgent": "none", "BatchMode": "yes", "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null",
        "GlobalKnownHostsFile": "/dev/null", "LogLevel": "ERROR", "ControlMaster": "auto",
        "ControlPath": host.folder / "mux", "ControlPersist": "60",
    }  # fmt: skip
    options = [word for name, value in settings.items() for word in ("--ssh-option", f"{name}={value}")]
    command = [sys.executable, "-m", "signer", "hosts", "install", f"root@{ports.LOOPBACK}", "--ca"]
    command += [str(host.keys.ca.public), "--principals", f"{ACCOUNT}=llmops", *options, *more]
    environ = {"PATH": os.environ["PATH"], "HOME": str(host.folder)}
    return subprocess.run(command, capture_output=True, text=True, cwd=KIT.parents[1], env=environ, timeout=120)


class KitHosts:
    """Makes hosts below one folder, and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = Keys.make(folder)
        self._made: list[KitHost] = []

    def new(self) -> KitHost:
        folder = self.folder / f"host-{len(self._made)}"
        folder.mkdir(mode=0o755)
        self._made.append(KitHost(folder, self.keys))
        return self._made[-1]

    def close(self) -> None:
        for host in self._made:
            host.close()


@contextmanager
def kit_hosts() -> Iterator[KitHosts]:
    """Hosts below a folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="signer-kit-", dir="/var/tmp"))
    folder.chmod(0o755)
    hosts = KitHosts(folder)
    try:
        yield hosts
    finally:
        hosts.close()
        with suppress(OSError):
            shutil.rmtree(folder)


def why_not_here() -> str:
    """Why no such host can be made on this machine; empty if one can."""
    if os.getuid() != 0:
        return "not root"
    overlay = "mount -t overlay -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w overlay /etc"
    tried = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc", "sh", "-c",
         f"mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w && {overlay}"],
        capture_output=True,
    )  # fmt: skip
    return "" if tried.returncode == 0 else "no overlays: this root may not mount any"
