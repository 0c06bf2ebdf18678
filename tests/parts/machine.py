"""A throwaway copy of this machine, for commands that change a machine: they run as root, with the paths they name.

Namespaces of its own over this machine's files. Whatever is written goes to a tmpfs and is gone at the end; /run and
/dev/shm are empty; processes and network are its own: loopback, and the addresses of `others` on it, by name. Names of
`hosts` are this same copy, with an sshd on port 22 that lets root in by a key; logins come from 127.0.0.2, which stands
for another machine.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.parts.eventually import eventually
from tests.parts.keys import make_key

_INIT: Final = r"""
set -e
top=$1; shift
mount -t tmpfs -o mode=755 none "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" overlay "$top/root"
mount -t proc proc "$top/root/proc"
mount --rbind /dev "$top/root/dev"
mount --rbind /sys "$top/root/sys"
mount -t tmpfs -o mode=755 none "$top/root/run"
mount -t tmpfs -o mode=1777 none "$top/root/dev/shm"
ip link set lo up
for address in "$@"; do ip address add "$address/32" dev lo; done
# And not chroot: whoever enters the namespace, as `podman exec` does, would be in this machine's own files.
mkdir "$top/root/run/before"
cd "$top/root" && pivot_root . run/before
umount --lazy /run/before
: >/run/ready
trap 'exit 0' TERM
while :; do sleep 60 & wait $! || :; done
"""
# What a block exports, and its folder, are the next one's.
_BLOCK: Final = r"""
set -euo pipefail
cd /root
if [ -e /run/shell ]; then . /run/shell; fi
trap '{ export -p; printf "cd %q\n" "$PWD"; } >/run/shell' EXIT
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a script ended; `out` has stdout and stderr."""

    status: int
    out: str


class Machine:
    """The copy; `with` ends all of its processes."""

    def __init__(self, folder: Path, hosts: Sequence[str], others: Mapping[str, str]) -> None:
        self._folder = folder
        self._hosts, self._others = hosts, others

    def __enter__(self) -> Self:
        self._namespaces = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child",
             "bash", "-c", _INIT, "init", str(self._folder), *self._others.values()],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self._init = eventually(self._find_init, "the copy of this machine is ready")
            self._start_sshd()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._namespaces.kill()
        self._namespaces.wait()

    def _find_init(self) -> int:
        assert self._namespaces.poll() is None, "the copy of this machine ended"
        children = Path(f"/proc/{self._namespaces.pid}/task/{self._namespaces.pid}/children").read_text().split()
        if not children or not Path(f"/proc/{children[0]}/root/run/ready").exists():
            return 0
        return int(children[0])

    def path(self, name: str) -> Path:
        """Where this machine sees a file of the copy."""
        return Path(f"/proc/{self._init}/root{name}")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # a link would lead to a file of this machine
            path.unlink()
        path.write_text(text)
        path.chmod(mode)

    def read(self, name: str) -> str:
        return self.path(name).read_text()

    def run(self, script: str, stdin: str = "", terminal: bool = False, timeout: float = 120) -> Ran:
        """Runs lines of a shell as root, after those of earlier calls in the same shell. `terminal`: on a pty."""
        self.write("/run/block", _BLOCK + script)
        command = ["bash", "/run/block"]
        if terminal:
            command = ["script", "-qec", shlex.join(command), "/dev/null"]
        with tempfile.TemporaryFile() as out:  # and no pipe, which what runs on in the background would hold open
            done = subprocess.run(
                ["nsenter", "-t", str(self._init), "-m", "-n", "-p", "--root", "--wd", *command],
                input=stdin.encode(), stdout=out, stderr=out, timeout=timeout,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                     "LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb")},
            )  # fmt: skip
            out.seek(0)
            return Ran(done.returncode, out.read().decode(errors="replace"))

    def _start_sshd(self) -> None:
        """sshd of Debian on port 22; root's own key and the host's are known."""
        keys = [make_key(self._folder.with_name("keys"), "ed25519", name) for name in ("login", "host")]
        login, host = keys
        lines = [f"127.0.0.1 localhost {' '.join(self._hosts)}", *(f"{at} {name}" for name, at in self._others.items())]
        self.write("/etc/hosts", "\n".join(lines) + "\n")
        self.write("/etc/ssh/login", login.private.read_text(), 0o600)
        self.write("/etc/ssh/keys", login.public_line + "\n")
        self.write("/etc/ssh/ssh_host_ed25519_key", host.private.read_text(), 0o600)
        self.write("/etc/ssh/ssh_host_ed25519_key.pub", host.public_line + "\n")
        self.write("/etc/ssh/ssh_known_hosts", f"{','.join(self._hosts).lower()} {host.public_line}\n")
        self.write("/etc/ssh/ssh_config", "IdentityFile /etc/ssh/login\nBatchMode yes\nBindAddress 127.0.0.2\n")
        self.write(
            "/etc/ssh/sshd_config",
            "Include /etc/ssh/sshd_config.d/*.conf\nHostKey /etc/ssh/ssh_host_ed25519_key\nUsePAM no\n"
            "AuthorizedKeysFile /etc/ssh/keys\nStrictModes no\nSubsystem sftp /usr/lib/openssh/sftp-server\n",
        )
        self._run_sshd()

    def _run_sshd(self) -> None:
        started = self.run("mkdir -p /run/sshd && /usr/sbin/sshd -E /var/log/sshd")
        assert started.status == 0, started.out
