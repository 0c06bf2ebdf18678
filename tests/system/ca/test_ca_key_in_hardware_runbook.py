"""runbooks/operate/ca-key-in-hardware.md says what its commands print: they are run, in order, with other paths."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.parts import missing, ports
from tests.parts.agents import PIN, SO_PIN
from tests.parts.documents import ROOT, blocks, document
from tests.parts.eventually import eventually
from tests.parts.rotation import KEEPER_USER, why_not_two_users
from tests.parts.service import STANDARD_POLICY, Tokens, fill_policy

RUNBOOK = document("runbooks/operate/ca-key-in-hardware.md")
FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


def shown() -> list[list[tuple[str, list[str]]]]:
    """The commands of each block with the lines that stand below them."""
    blocks = []
    for block in re.findall(r"^```text\n(.*?)^```", RUNBOOK, re.MULTILINE | re.DOTALL):
        found: list[tuple[str, list[str]]] = []
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        blocks.append(found)
    return blocks


@missing.needs_softhsm
@missing.needs_root
def test_the_runbook_shows_what_its_commands_print() -> None:
    if reason := why_not_two_users():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="hardware-") as folder:
        place = Path(folder)
        place.chmod(0o755)
        for name in ("agent", "tokens"):
            (place / name).mkdir(mode=0o700)
            shutil.chown(place / name, KEEPER_USER)
        (place / "softhsm2.conf").write_text(f"directories.tokendir = {place}/tokens\nlog.level = ERROR\n")
        load_key, show_pin = blocks(RUNBOOK, "sh")
        for name, text in (
            ("load-ca-key", load_key),
            ("ca-pin", show_pin),
            ("policy.toml", ""),
            ("credential/ca-pin", PIN),
        ):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text.replace("/etc/signer", folder))
            (place / name).chmod(0o755)
        environ = {
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "SOFTHSM2_CONF": str(place / "softhsm2.conf"),
            "SSH_ASKPASS": str(place / "ca-pin"),  # in place of somebody who types
            "SSH_ASKPASS_REQUIRE": "force",
            "CREDENTIALS_DIRECTORY": str(place / "credential"),  # as systemd says it to the unit
            "SIGNER_POLICY_FILE": str(place / "policy.toml"),
            "SIGNER_DATA_DIR": str(place / "data"),
            "SIGNER_RUN_DIR": str(place / "run"),
            "SIGNER_KEEPER_USER": KEEPER_USER,
            "SIGNER_API_USER": "nobody",
        }
        moved = {"/run/signer-agent": f"{place}/agent", "/etc/signer": folder, "signer-keeper": KEEPER_USER}
        initialise = ["softhsm2-util", "--init-token", "--free", "--label", "ca", "--so-pin", SO_PIN, "--pin", PIN]
        subprocess.run(initialise, env=environ, user=KEEPER_USER, check=True, capture_output=True)
        agent = subprocess.Popen(
            ["ssh-agent", "-D", "-a", f"{place}/agent/agent.sock"],
            env=environ,
            user=KEEPER_USER,
            stdout=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: ports.takes(place / "agent" / "agent.sock"), "the agent listens")
            before: list[str] = []
            for block in shown():
                if any("signer check" in command for command, _ in block):
                    pin(place)
                for command, expected in block:
                    assert said(command, before, moved, environ) == [" ".join(line.split()) for line in expected]
                    if "ssh-add -s" not in command and "pkcs11-tool" not in command:
                        before.append(command)
            check_reboot(place, environ)
        finally:
            agent.kill()
            agent.wait()


def check_reboot(place: Path, environ: dict[str, str]) -> None:
    """An agent that starts empty gets its key by the page's `load-ca-key`, with the PIN of its `ca-pin`."""
    environ = {**environ, "SSH_AUTH_SOCK": f"{place}/agent/agent.sock"}

    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=environ, user=KEEPER_USER, capture_output=True, text=True, timeout=60)

    loaded = ran("ssh-add", "-L").stdout
    assert ran("ssh-add", "-e", "/usr/lib/softhsm/libsofthsm2.so").returncode == 0
    assert ran("ssh-add", "-L").stdout != loaded
    done = ran(f"{place}/load-ca-key")
    assert done.returncode == 0, done.stderr
    assert ran("ssh-add", "-L").stdout == loaded


def pin(place: Path) -> None:
    """What the page says between the blocks: the fingerprint goes into policy.toml."""
    listed = subprocess.run(["ssh-keygen", "-l", "-f", place / "ca.pub"], capture_output=True, text=True, check=True)
    policy = fill_policy(STANDARD_POLICY, listed.stdout.split()[1], Tokens())
    (place / "policy.toml").write_text(policy)
    (place / "policy.toml").chmod(0o644)


def said(command: str, before: list[str], moved: dict[str, str], environ: dict[str, str]) -> list[str]:
    """What a command prints after the earlier ones of the same shell, in the page's paths and with one fingerprint."""
    # The earlier ones again, unseen: they set variables, define a function or write a file anew.
    script = "{ " + "\n".join([*before, ":"]) + "\n} >/dev/null 2>&1\n" + command
    for here, there in moved.items():
        script = script.replace(here, there)
    done = subprocess.run(
        ["bash", "-c", script], input=f"{PIN}\n", env=environ, capture_output=True, text=True, timeout=60
    )
    text = done.stdout + done.stderr
    for here, there in moved.items():
        text = text.replace(there, here) if here != "signer-keeper" else text
    text = FINGERPRINT.sub("SHA256:2yQZh7GFxodBuXtDAaujojCpveLvdBfBW8YGLtaQ5dM", text)
    # Columns are as wide as what else is checked; the number of a slot is the token's.
    return [" ".join(line.split()) for line in text.splitlines() if not line.startswith("Using slot ")]
