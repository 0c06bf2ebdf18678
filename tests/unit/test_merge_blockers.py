"""What no submission may bring into the repository: a runbook that shows how to end Vault outside its gated section.

The other two merge blockers are tested where they need a real part: no writable secret mount in
`tests/real/test_container_compose.py`, no leak of the preflight in `tests/real/test_preflight_secrecy.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GATE = "m04-vault-destructive-cleanup-approved"

_VAULT = r"(?<![A-Za-z0-9])(?:vault|openbao|bao)(?![A-Za-z0-9])"
# How a service, its data or what it knows is ended, in the command lines of engines, systems and Vault itself.
_ENDING = re.compile(
    r"\b(?:stop|kill|pkill|killall|rm|rmi|rmdir|unlink|shred|truncate|down|disable|mask|delete|destroy|purge|remove|uninstall"
    r"|prune|seal|step-down|revoke\w*|wipe\w*|umount|drop|autoremove|--remove-orphans|scale\s+\S+=0|mkfs\S*|dd)\b|-X\s*DELETE"
)
# These end Vault's key or role whether or not they name Vault.
_ALWAYS = re.compile(
    rf"{_VAULT}\s+(?:secrets\s+disable|operator\s+seal|delete|token\s+revoke|lease\s+revoke|kv\s+destroy)"
)


def commands(text: str) -> Iterator[tuple[bool, str]]:
    """Each command that a runbook shows, and whether the section that holds it is gated.

    A section is gated when its heading's own text, or that of a section around it, names the phrase before the first
    command. Commands are the lines of code blocks, fenced or indented, and what stands in backquotes.
    """
    gates: list[tuple[int, bool]] = []
    fence, command = "", ""
    shown_here = False
    for line in text.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
            continue
        heading = re.match(r"(#+) ", line)
        if heading and not fence:
            level = len(heading[1])
            gates = [gate for gate in gates if gate[0] < level]
            gates.append((level, GATE in line))
            shown_here = False
            continue
        if fence or re.match(r"(?: {4}|\t)", line):
            command += line.strip().removesuffix("\\") + " "
            if line.rstrip().endswith("\\"):
                continue
            yield any(is_open for _, is_open in gates), " ".join(command.split())
            command, shown_here = "", True
            continue
        for inline in re.findall(r"`([^`]+)`", line):
            if inline != GATE:
                yield any(is_open for _, is_open in gates), inline
        if GATE in line and gates and not shown_here:
            gates[-1] = (gates[-1][0], True)


def ends_vault(command: str) -> bool:
    bare = re.sub(r"#.*", "", command)
    return bool(_ALWAYS.search(bare) or (re.search(_VAULT, bare, re.IGNORECASE) and _ENDING.search(bare)))


def violations(text: str) -> list[str]:
    return [command for is_gated, command in commands(text) if not is_gated and ends_vault(command)]


RUNBOOKS = sorted((ROOT / "runbooks").glob("**/*.md"))


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.name)
def test_no_runbook_ends_vault_outside_the_gated_section(path: Path) -> None:
    assert violations(path.read_text()) == []


def test_the_runbooks_are_looked_at() -> None:
    assert RUNBOOKS
    assert all(list(commands(path.read_text())) for path in RUNBOOKS)


@pytest.mark.parametrize(
    "command",
    [
        "systemctl stop vault",
        "sudo systemctl disable --now vault.service",
        "podman rm -f vault",
        "docker compose -f vault.yaml down",
        "podman volume rm vault_data",
        "rm -rf /var/lib/vault",
        "vault secrets disable ssh",
        "bao operator seal",
        "vault delete ssh/roles/llmops",
        "curl -X DELETE http://127.0.0.1:8200/v1/sys/mounts/ssh -H X-Vault-Token:x",
        "kubectl delete statefulset vault",
        "pkill -f 'vault server'",
        "apt-get purge openbao",
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        "# Switch\n\n    {}\n",
        "# Switch\n\n```sh\n{}\n```\n",
        "# Switch\n\nThen `{}`.\n",
        "# Clean up: " + GATE + "\n\n    true\n\n# Later\n\n    {}\n",
        "# Later\n\n    {}\n\nThis needs `" + GATE + "`.\n",
    ],
    ids=["indented", "fenced", "inline", "after the section", "before the phrase"],
)
def test_a_command_that_ends_vault_is_found(command: str, form: str) -> None:
    assert violations(form.format(command)) == [command]


def test_a_command_over_several_lines_is_found() -> None:
    assert violations("# Switch\n\n    podman \\\n      stop \\\n      vault\n") == ["podman stop vault"]


@pytest.mark.parametrize(
    "text",
    [
        "# Clean up\n\nOnly with the phrase `" + GATE + "`:\n\n    systemctl stop vault\n",
        "# Clean up (" + GATE + ")\n\n## Data\n\n```\nrm -rf /var/lib/vault\n```\n",
    ],
)
def test_the_gated_section_may_show_it(text: str) -> None:
    assert violations(text) == []


@pytest.mark.parametrize(
    "command",
    ["vault status", "bao read ssh/config/ca", "systemctl is-active vault", "podman stop safe-session-api", "ls /etc"],
)
def test_other_commands_may_stand_anywhere(command: str) -> None:
    assert violations(f"# Look\n\n    {command}\n") == []
