"""cutover.toml: what is read, what is refused, and that all of it is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.errors import BadFile
from signer.migration.config import KEY_FOLDER_VARIABLE, KEY_VARIABLE, load_cutover_file, parse_cutover_file
from tests.parts.cutover_file import GOOD, REMOVAL


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(BadFile) as refused:
        parse_cutover_file(text.encode())
    return refused.value.problems


def test_a_whole_file_is_read_with_its_defaults() -> None:
    found = parse_cutover_file((GOOD + REMOVAL).encode())
    assert found.compose.key_file == Path("/run/signer-ca/ca")
    assert found.compose.environment[KEY_FOLDER_VARIABLE] == "/run/signer-ca", "compose mounts the folder"
    assert (found.vault.mount, found.compose.service, found.smoke[0].port) == ("ssh", "safe-session-api", 22)
    assert found.smoke[0].trusted_ca_file is None
    assert found.decommission is not None
    assert found.decommission.soak == 72 * 3600
    assert found.decommission.remove_data_command == ()


def test_without_its_last_section_nothing_is_decommissioned() -> None:
    assert parse_cutover_file(GOOD.encode()).decommission is None


def test_the_digest_is_that_of_the_bytes() -> None:
    assert parse_cutover_file(GOOD.encode()).digest != parse_cutover_file((GOOD + "\n").encode()).digest


@pytest.mark.parametrize(
    "old, new, told",
    [
        ('evidence_dir = "/var/lib/safe-session/evidence"', 'evidence_dir = "evidence"', "evidence_dir"),
        ('project  = "safe-session"', 'project = "../x"', "compose.project"),
        ('command  = ["podman-compose"]', "command = []", "compose.command"),
        (KEY_VARIABLE, "ANOTHER", KEY_VARIABLE),
        ('"/run/signer-ca/ca"', '"ca"', KEY_VARIABLE),
        ("environment = { ", f'environment = {{ {KEY_FOLDER_VARIABLE} = "/run", ', "is not the directory of"),
        ("[preflight]", "[preflght]", "did you mean preflight"),
        ('address     = "http://127.0.0.1:8222"', 'address = "127.0.0.1"', "signer.address"),
        ('address    = "http://127.0.0.1:8200"', 'address = "http://u:p@v:8200"', "vault.address"),
        ('roles      = ["llmops"]', "roles = []", "vault.roles"),
        ('host = "rs2000.example"', 'host = "-oProxyCommand=x"', "smoke.0.host"),
        ('user = "llmops"', 'user = "-l"', "smoke.0.user"),
        ('host = "rs2000.example"', 'host = "rs2000.example"\nport = 0', "smoke.0.port"),
        ('host = "rs2000.example"', "", "smoke.0.host"),
        ("environment = { ", 'environment = { X_TOKEN = "hvs.CAESIJabcdefghijklmnop", ', "looks like a secret"),
        ("environment = { ", 'environment = { VAULT_TOKEN = "abcdefgh", ', "looks like a secret"),
    ],
)
def test_a_fault_is_told_with_its_place(old: str, new: str, told: str) -> None:
    assert old in GOOD
    assert any(told in problem for problem in problems_of(GOOD.replace(old, new, 1)))


def test_all_faults_are_told_at_once() -> None:
    bad = GOOD.replace('"/root/token"', '"token"').replace('mount = "ssh"', "").replace('engine   = "podman"', "")
    told = " ".join(problems_of(bad))
    assert "signer.token_file" in told
    assert "compose.engine" in told


def test_two_targets_of_one_name_are_refused() -> None:
    again = GOOD[GOOD.index("[[smoke]]") :]
    assert any("another target" in problem for problem in problems_of(GOOD + again))


def test_a_snapshot_file_needs_its_checksum() -> None:
    told = problems_of(GOOD + REMOVAL + 'snapshot_file = "/root/snap"\n')
    assert any("snapshot_sha256" in problem for problem in told)


@pytest.mark.parametrize("raw", [b"\xff", b"a = [" * 5000, b"x" * 300_000, b""])
def test_a_file_that_is_no_toml_of_ours_is_refused_with_a_sentence(raw: bytes) -> None:
    with pytest.raises(BadFile) as refused:
        parse_cutover_file(raw)
    assert refused.value.code == "cutover_file_refused"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadFile) as refused:
            load_cutover_file(path)
        assert refused.value.code == "cutover_file_unreadable"


def test_what_a_decommission_knows_of_vaults_nodes_and_of_its_log() -> None:
    text = GOOD + REMOVAL + 'other_nodes = ["http://127.0.0.1:8201/"]\naudit_log_prefix = "vault: "\n'
    span = "2026-11-22T03:00:00Z/2026-11-22T06:25:00.5Z"
    found = parse_cutover_file((text + f'audit_gaps = ["{span}"]\n').encode()).decommission
    assert found is not None
    assert (found.other_nodes, found.audit_log_prefix) == (("http://127.0.0.1:8201",), "vault: ")
    assert found.audit_gaps == ((1_795_316_400, 1_795_328_701),)


@pytest.mark.parametrize(
    "span",
    [
        "", "2026-11-22T03:00:00Z", "a/b", "2026-11-22T03:00:00/2026-11-22T06:00:00",
        "2026-11-22T06:00:00Z/2026-11-22T03:00:00Z", "2026-11-22T03:00:00Z/2026-11-22T06:00:00Z/2026-11-22T07:00:00Z",
    ],
)  # fmt: skip
def test_a_gap_of_another_form_is_refused(span: str) -> None:
    with pytest.raises(BadFile) as refused:
        parse_cutover_file((GOOD + REMOVAL + f'audit_gaps = ["{span}"]\n').encode())
    assert "audit_gaps" in str(refused.value.facts)
