"""A throwaway copy of this machine with systemd as process 1, which can be rebooted.

As `machine.Machine`, but what was written is there after a reboot, save in /run and /dev/shm, and this tree is in
/opt/signer. Of this machine's own units only those that systemd cannot do without are started. It needs the unified
hierarchy of control groups: `missing.needs_systemd`.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from tests.parts.documents import ROOT
from tests.parts.eventually import eventually
from tests.parts.machine import Machine

_BOOT: Final = r"""
set -e
root=$1/root tree=$2; shift 2
mkdir -p "$root" "${root%/*}/upper" "${root%/*}/work"
mount -t overlay -o "lowerdir=/,upperdir=${root%/*}/upper,workdir=${root%/*}/work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 none "$root/dev"
for name in null zero full random urandom tty; do
    : >"$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/pts" "$root/dev/shm" "$root/dev/mqueue"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=1777 none "$root/dev/shm"
mount --rbind /sys "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 none "$root/run"
rm -rf "$root/opt/signer"
mkdir -p "$root/opt/signer"
mount --bind "$root$tree" "$root/opt/signer" # and what is written there is not in this tree
# Units have a /tmp of their own, where this tree may be.
echo /opt/signer >"$root/run/editable.pth"
for path in "$root"/opt/signer/.venv/lib/python3*/site-packages/__editable__.signer-*.pth; do
    mount --bind "$root/run/editable.pth" "$path"
done
ip link set lo up
for address in "$@"; do ip address add "$address/32" dev lo; done
mkdir "$root/run/before"
cd "$root" && pivot_root . run/before
umount --lazy /run/before
mount --make-rshared / # credentials reach a unit by a mount of systemd's
if [ ! -e /etc/signer-test ]; then
    rm -f /etc/systemd/system/*.wants/*
    mkdir -p /etc/tmpfiles.d
    : >/etc/tmpfiles.d/tmp.conf # at boot nothing of /tmp is removed
    : >/etc/signer-test
fi
: >/run/ready
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --show-status=0
"""


def unified_hierarchy() -> Path | None:
    """Where this machine has the control groups of version 2; None if nowhere."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    return None


class BootedMachine(Machine):
    """The copy; `with` boots it, and ends all of its processes."""

    def __init__(self, folder: Path, hosts: Sequence[str], others: Mapping[str, str]) -> None:
        super().__init__(folder, hosts, others)
        hierarchy = unified_hierarchy()
        assert hierarchy is not None
        self._group = hierarchy / f"signer-test-{os.getpid()}"

    def __enter__(self) -> Self:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", self._folder], check=True)
        try:
            self._boot()
            self._start_sshd()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._power_off()
        subprocess.run(["umount", "--lazy", self._folder], check=True)

    def reboot(self, *, in_order: bool = True) -> None:
        """Ends everything and starts again: by systemd, or as a power cut does."""
        if in_order:
            self.run("systemctl poweroff --no-block")
            self._namespaces.wait(100)
        self._power_off()
        self._boot()
        self._run_sshd()

    def _run_sshd(self) -> None:
        """Debian's own unit; its log is the journal's."""
        started = self.run("systemctl enable --now ssh")
        assert started.status == 0, started.out

    def _boot(self) -> None:
        self._group.mkdir(exist_ok=True)
        enter = f'echo $$ >"{self._group}/cgroup.procs" && exec "$@"'
        self._namespaces = subprocess.Popen(
            ["bash", "-c", enter, "enter", "unshare", "--mount", "--propagation", "private", "--net", "--pid",
             "--cgroup", "--uts", "--ipc", "--fork", "--kill-child", "bash", "-c", _BOOT, "init",
             str(self._folder), str(ROOT), *self._others.values()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self._init = eventually(self._find_init, "the copy of this machine is ready")
            eventually(self._is_up, "systemd has started what is enabled", seconds=200)
        except BaseException:
            self._power_off()
            raise

    def _is_up(self) -> bool:
        done = self.run("systemctl is-system-running || true")
        return done.out.strip() in ("running", "degraded")

    def _power_off(self) -> None:
        self._namespaces.kill()
        self._namespaces.wait()
        eventually(self._remove_groups, "the copy's control groups are gone")

    def _remove_groups(self) -> bool:
        for folder, _, _ in os.walk(self._group, topdown=False):
            try:
                Path(folder).rmdir()
            except OSError:
                return False  # a process of it has not ended yet
        return not self._group.exists()


@contextmanager
def booted_machine() -> Iterator[BootedMachine]:
    """A copy in a folder of its own, with one host, HOST."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="booted-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("machine", "keys"):
            (folder / part).mkdir()
        with BootedMachine(folder / "machine", ("HOST",), {}) as running:
            yield running
