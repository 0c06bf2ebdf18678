"""The host kit under systemd: which unit is reloaded, what arms the rollback, and how hard the timer's service is.

systemd is not process 1 of a throwaway host. Stand-ins for `systemctl` and `systemd-run` do what the real ones would
with a real sshd, and write down what they were asked; the unit files are read by the real `systemd-analyze`.
"""

from __future__ import annotations

import re
import subprocess
from typing import Final

import pytest

from tests.parts import missing
from tests.parts.kit_hosts import DROP_IN, KIT, PROGRAMS, STATE, KitHost, KitHosts
from tests.parts.list_server import ListServer

UNITS: Final = "/etc/systemd/system"
SERVICE, TIMER = "safe-session-host-update.service", "safe-session-host-update.timer"
SYSTEMCTL: Final = """\
#!/bin/sh
echo "systemctl $*" >>/run/asked
case "$*" in
    "-q is-active safe-session-host-rollback-"*) test -e /run/armed ;;
    "-q is-active "*) grep -qx "$3" /run/active ;;
    "reload "*) kill -HUP "$(cat /run/sshd.pid)" ;;
    "-q stop safe-session-host-rollback-"*) rm /run/armed ;;
esac
"""
SYSTEMD_RUN: Final = """\
#!/bin/sh
echo "systemd-run $*" >>/run/asked
touch /run/armed
for word; do case $word in --on-active=*) seconds=${word#*=} ;; esac; done
while [ "$1" != "${1#--}" ]; do shift; done
setsid sh -c 'sleep "$1"; shift; test -e /run/armed && exec "$@"' sh "$seconds" "$@" >/dev/null 2>&1 </dev/null &
"""


def give_systemd(host: KitHost, *active: str) -> None:
    host.write("/run/systemd/system/.there", "")
    host.write("/run/active", "".join(f"{unit}\n" for unit in active))
    host.write("/usr/local/sbin/systemctl", SYSTEMCTL, 0o755)
    host.write("/usr/local/sbin/systemd-run", SYSTEMD_RUN, 0o755)


@pytest.mark.parametrize("unit", ["ssh.service", "sshd.service"])
def test_the_active_unit_is_reloaded_after_the_rollback_is_armed(host: KitHost, unit: str) -> None:
    give_systemd(host, unit, "ssh.socket")
    before = host.snapshot()
    said = host.install("--rollback-after", "600")
    assert said.ok, said.out + said.err
    assert f"systemctl reload {unit}" in said.out
    asked = host.read("/run/asked").splitlines()
    (armed,) = (at for at, line in enumerate(asked) if line.startswith("systemd-run "))
    assert "--on-active=600" in asked[armed]
    assert armed < asked.index(f"systemctl reload {unit}")
    assert asked.index("systemctl daemon-reload") < asked.index(f"systemctl start {TIMER}")
    assert host.path(f"{UNITS}/timers.target.wants/{TIMER}").is_symlink()
    assert not host.exists("/etc/cron.d/safe-session-host")
    # What the timer starts, before its time.
    (command,) = re.findall(rf"({PROGRAMS}/rollback) --if (\S+)$", asked[armed])
    assert not host.run(command[0], "--if", "another").out
    assert host.run(command[0], "--if", command[1]).ok
    assert not host.exists(STATE)
    assert host.read("/run/asked").splitlines().count(f"systemctl reload {unit}") == 2
    assert host.snapshot() == before
    assert host.login().ok


def test_with_a_socket_unit_alone_nothing_is_reloaded(hosts: KitHosts) -> None:
    """As on Ubuntu 24.04 before the first login: sshd does not run, and the next login starts it."""
    host = hosts.new()
    give_systemd(host, "ssh.socket")
    said = host.install()
    assert said.ok, said.out + said.err
    assert "a socket unit starts sshd for the next login" in said.out
    assert "systemctl reload" not in host.read("/run/asked")
    host.start_sshd()
    confirmed = host.confirm(said.code)
    assert confirmed.ok, confirmed.err
    assert not host.exists("/run/armed")
    assert host.exists(DROP_IN)
    assert host.run(f"{PROGRAMS}/uninstall").ok
    assert f"systemctl -q stop {TIMER}" in host.read("/run/asked")


@missing.needs_systemd_analyze
def test_the_units_are_whole_and_hard(quiet_host: KitHost) -> None:
    for name in (SERVICE, TIMER):
        quiet_host.write(f"{UNITS}/{name}", (KIT / name).read_text())
    for name in ("update", "rollback"):
        quiet_host.write(f"{PROGRAMS}/{name}", (KIT / name).read_text(), 0o755)
    verified = quiet_host.run("systemd-analyze", "verify", f"{UNITS}/{SERVICE}", f"{UNITS}/{TIMER}")
    assert (verified.status, verified.err) == (0, "")
    said = quiet_host.run("systemd-analyze", "security", "--offline=true", "--no-pager", f"{UNITS}/{SERVICE}")
    level = re.search(rf"Overall exposure level for {SERVICE}: ([\d.]+)", said.out)
    assert level, said.out + said.err
    assert float(level[1]) <= 2.5


def calls_of(group: str) -> set[str]:
    """The system calls of one of systemd's groups, with those of the groups in it."""
    shown = subprocess.run(["systemd-analyze", "syscall-filter", group], capture_output=True, text=True).stdout
    names = {line.strip() for line in shown.splitlines()[1:] if line.strip() and not line.strip().startswith("#")}
    inner = {name for name in names if name.startswith("@")}
    return (names - inner).union(*(calls_of(name) for name in inner))


@missing.needs_strace
@missing.needs_systemd_analyze
def test_an_update_makes_no_system_call_that_its_unit_forbids(hosts: KitHosts) -> None:
    """A filter that is too narrow shows on a real systemd only, where it ends every update."""
    allowed: set[str] = set()
    for value in re.findall(r"^SystemCallFilter=(.*)$", (KIT / SERVICE).read_text(), re.MULTILINE):
        words = value.removeprefix("~").split()
        named = set[str]().union(*(calls_of(word) if word.startswith("@") else {word} for word in words))
        allowed = allowed - named if value.startswith("~") else allowed | named
    host = hosts.new()
    host.write("/etc/ssh/own-revoked", f"{hosts.keys.user.public_line}\n")
    host.write("/etc/ssh/sshd_config.d/50-own.conf", "RevokedKeys /etc/ssh/own-revoked\n")
    host.start_sshd()
    server = ListServer(hosts.folder, hosts.keys.ca, hosts.keys.publisher)
    try:
        server.publish(1)
        host.installed("--url", server.url, "--publisher", f"{host.folder}/publisher.pub")
        server.publish(2, "serial: 7")
        said = host.run("strace", "-f", "-o", "/run/calls", f"{PROGRAMS}/update")
    finally:
        server.close()
    assert said.ok, said.err
    used = set(re.findall(r"^\d+ +(\w+)\(", host.read("/run/calls"), re.MULTILINE))
    assert used >= {"execve", "connect", "fsync"}
    assert used - allowed == set()


def test_without_systemd_cron_runs_it(hosts: KitHosts) -> None:
    host = hosts.new()
    host.path("/etc/cron.d").mkdir(exist_ok=True)
    said = host.install()
    assert said.ok, said.out + said.err
    (line,) = [line for line in host.read("/etc/cron.d/safe-session-host").splitlines() if not line.startswith("#")]
    assert line == f"* * * * * root {PROGRAMS}/update --cron"
    assert not host.exists(f"{UNITS}/{TIMER}")
    assert host.run(f"{PROGRAMS}/rollback", "--now").ok
    assert not host.exists("/etc/cron.d/safe-session-host")
