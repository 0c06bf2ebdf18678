"""What no submission may bring into the repository: a runbook that shows how to end Vault outside its gated section.

The other two merge blockers are tested where they need a real part: no writable secret mount in
`tests/system/container/test_container_compose.py`, no leak of the preflight in
`tests/system/migration/test_preflight_secrecy.py`.
"""

from __future__ import annotations

import pytest

from tests.parts.documents import read_documents
from tests.parts.shown import GATE, shown_commands, ungated_endings

RUNBOOKS = {name: text for name, text in read_documents().items() if name.startswith("runbooks/")}


@pytest.mark.parametrize("name", RUNBOOKS)
def test_no_runbook_ends_vault_outside_the_gated_section(name: str) -> None:
    assert ungated_endings(RUNBOOKS[name]) == []


def test_the_runbooks_are_looked_at() -> None:
    assert RUNBOOKS
    assert all(list(shown_commands(text)) for text in RUNBOOKS.values())


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
        "# Later\n\nNot `{}`: this needs `" + GATE + "`.\n",
        "# Switch\n\nFirst `\n{}`.\n",
        "1. Switch:\n\n   ```sh\n   {}\n   ```\n",
        "> # Switch with `{}`\n",
        "| step | command |\n|---|---|\n| 1 | `{}` |\n",
        "<pre>\n{}\n</pre>\n",
    ],
    ids=[
        "indented",
        "fenced",
        "inline",
        "after the section",
        "before the phrase",
        "inline before the phrase",
        "over a line's end",
        "in a list",
        "in a heading",
        "in a table",
        "in HTML",
    ],
)
def test_a_command_that_ends_vault_is_found(command: str, form: str) -> None:
    assert ungated_endings(form.format(command)) == [command]


@pytest.mark.parametrize("typed", ["$ {}", "$ true\nok\n$ {}", "$ true && \\\n{}", "ok\n$ true\n{}"])
def test_a_command_of_a_session_is_found(typed: str) -> None:
    text = f"# Switch\n\n```text\n{typed.format('systemctl stop vault')}\n```\n"
    assert [command.removeprefix("$ ") for command in ungated_endings(text)] in (
        ["systemctl stop vault"],
        ["true && systemctl stop vault"],
    )


def test_what_was_printed_in_a_session_is_no_command() -> None:
    assert ungated_endings("# Plan\n\n```text\n$ signer plan\n 7  seal Vault\n```\n\n    systemctl stop vault\n") == [
        "systemctl stop vault"
    ]


def test_a_command_over_several_lines_is_found() -> None:
    assert ungated_endings("# Switch\n\n    podman \\\n      stop \\\n      vault\n") == ["podman stop vault"]


@pytest.mark.parametrize(
    "text",
    [
        "# Clean up\n\nOnly with the phrase `" + GATE + "`:\n\n    systemctl stop vault\n",
        "# Clean up (" + GATE + ")\n\n## Data\n\n```\nrm -rf /var/lib/vault\n```\n",
    ],
)
def test_the_gated_section_may_show_it(text: str) -> None:
    assert ungated_endings(text) == []


@pytest.mark.parametrize(
    "command",
    ["vault status", "bao read ssh/config/ca", "systemctl is-active vault", "podman stop safe-session-api", "ls /etc"],
)
def test_other_commands_may_stand_anywhere(command: str) -> None:
    assert ungated_endings(f"# Look\n\n    {command}\n") == []
