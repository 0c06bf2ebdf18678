"""The commands of README and the runbooks, as they stand there, on a throwaway copy of this machine.

`tests/parts/document_walk.py` has the blocks and their order. Here is what the text around them leaves to the reader:
the policy, the settings, and stand-ins for what the pages mark as missing here.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.parts import missing
from tests.parts.booted import BootedMachine
from tests.parts.command_blocks import CommandBlock, read_command_blocks
from tests.parts.container import CONTAINERS_CONF, Engine
from tests.parts.document_walk import CONTAINER_WALK, HOST_DAY, WALK, Line, Reboot, Step, Stop
from tests.parts.documents import ROOT, blocks, document
from tests.parts.machine import Machine
from tests.parts.passkeys import SoftPasskey

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES: Final = ("HOST", "NEW", "edge1", "laptop", "signer-host")
PATIENCE: Final = 200  # seconds for a block

# `systemctl` beside containers, for which this machine's control groups do not do under systemd: it only takes note.
_SYSTEMCTL: Final = '#!/bin/sh\necho "systemctl $*" >>/run/systemctl\n'
# `editor`: a person who puts the fingerprint and two tokens into the first policy of the page.
_EDITOR: Final = r"""#!/bin/bash
set -euo pipefail
policy=$(cat /run/first-policy)
fingerprint=$(ssh-keygen -l -f /run/signer-ca/ca | cut -d ' ' -f 2)
policy=${policy//SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA/$fingerprint}
digit=0
for name in deploy-agent operator; do
    file=/root/$name.token
    if [ ! -e "$file" ]; then (umask 077; signer token new "$name" --expires 90d >"$file" 2>/dev/null); fi
    sha=$(tr -d '\n' <"$file" | sha256sum | cut -d ' ' -f 1)
    policy=${policy//$(printf "$digit%.0s" {1..64})/$sha}
    digit=1
done
cp /root/deploy-agent.token /root/.signer-token
printf '%s\n' "$policy" | sed 's/"freeze", /"freeze", "hosts", /' >"$1"
"""
# podman's own storage is read; what it writes is on the copy's tmpfs.
_STORAGE: Final = """\
[storage]
driver = "overlay"
graphroot = "/run/storage"
runroot = "/run/containers/storage"
[storage.options]
additionalimagestores = ["/var/lib/containers/storage"]
"""
_ENGINE: Final = """\
lock_type = "file"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
_NOTICES: Final = f"""\
[channels.hook]
kind = "webhook"
url = "http://127.0.0.1:9/"
secret = "whsec_{"YWJj" * 11}"
"""
_BACKUP: Final = "services: {safe-session-api: {volumes: ['/backup/signer:/backup']}}\n"


@contextmanager
def copy_of_this_machine(kind: type[Machine]) -> Iterator[Machine]:
    if reason := missing.root() or missing.sshd() or missing.curl_and_jq():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="documents-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("machine", "keys"):
            (folder / part).mkdir()
        with kind(folder / "machine", NAMES, {"signer.example": "10.0.0.5"}) as running:
            prepare(running)
            yield running


def prepare(machine: Machine) -> None:
    """This tree in /opt/signer, the stand-ins, and what a host has before the day begins."""
    (first_policy,) = blocks(document("runbooks/install/first-policy.md"), "toml")
    machine.write("/run/first-policy", first_policy)
    machine.write("/run/boot.ini", blocks(document("runbooks/install/container.md"), "ini")[0])
    machine.write("/run/reach.ini", blocks(document("runbooks/install/reach.md"), "ini")[0])
    machine.write("/run/enrolment.json", json.dumps(SoftPasskey().enrolment))
    machine.write("/run/notices.toml", _NOTICES)
    machine.write("/usr/local/bin/editor", _EDITOR, 0o755)
    ran = machine.run("rm -rf /var/lib/signer /etc/signer")
    assert ran.status == 0, ran.out
    if not isinstance(machine, BootedMachine):
        ran = machine.run(f"rm -rf /opt/signer; mkdir -p /opt/signer; mount --bind {ROOT} /opt/signer")
        assert ran.status == 0, ran.out
    machine.write("/opt/signer/scripts/setup-venv", "#!/bin/sh\n# The environment of the tests is there.\n", 0o755)


@missing.needs_systemd
def test_each_block_of_the_walk_runs_as_it_stands() -> None:
    with copy_of_this_machine(BootedMachine) as machine:
        walk(machine, WALK)


@missing.needs_systemd
def test_the_day_on_a_host() -> None:
    """The first step is README's few commands, from an empty host to a login with `signer init`."""
    with copy_of_this_machine(BootedMachine) as machine:
        began = time.monotonic()
        walk(machine, HOST_DAY[:1])
        print(f"from an empty host to a login: {time.monotonic() - began:.1f} s")
        walk(machine, HOST_DAY[1:])


@pytest.mark.long
@missing.needs_podman
@missing.needs_podman_compose
def test_the_day_in_a_container(engine: Engine) -> None:
    """The image is that of the other tests: its steps are done, so that the build needs no registry."""
    assert engine.built
    with copy_of_this_machine(Machine) as machine:
        machine.write("/usr/local/bin/systemctl", _SYSTEMCTL, 0o755)
        machine.write("/etc/containers/storage.conf", _STORAGE)
        machine.write("/etc/containers/containers.conf", CONTAINERS_CONF + _ENGINE)
        machine.write("/run/backup.yaml", _BACKUP)
        walk(machine, CONTAINER_WALK)


def walk(machine: Machine, steps: Sequence[Step]) -> None:
    """Runs the steps of a day in their order."""
    found = read_command_blocks()
    for step in steps:
        if isinstance(step, Reboot):
            assert isinstance(machine, BootedMachine)
            machine.reboot(in_order=step.in_order)
        elif isinstance(step, Line):
            run(machine, step.text, step.text, shows=step.shows)
        else:
            (block,) = [block for block in found if step.is_of(block)]
            check(machine, step, block)


def run(machine: Machine, script: str, name: str, typed: str = "", terminal: bool = False, shows: str = "") -> None:
    """Runs lines that must end well and print what `shows` says."""
    ran = machine.run(script, typed, terminal, PATIENCE)
    assert ran.status == 0, f"{name}\n{script}\n-> {ran.status}\n{ran.out}"
    assert re.search(shows, ran.out), f"{name}\nnothing of {shows!r} in\n{ran.out}"


def check(machine: Machine, stop: Stop, block: CommandBlock) -> None:
    """Runs a block, and what is before and after it."""
    name, text = str(block), block.text
    if stop.before:
        run(machine, stop.before, name)
    for placeholder, value in stop.fill:
        assert placeholder in text
        text = text.replace(placeholder, value)
    if stop.serves:
        text = f"{text.rstrip()} >/var/log/service 2>&1 </dev/null &\necho $! >/run/service.pid"
    typed = machine.read("/root/.signer-token") if stop.typed == "TOKEN" else stop.typed
    run(machine, text, name, typed, bool(typed) and not stop.piped, stop.shows)
    if stop.after:
        run(machine, stop.after, name)
