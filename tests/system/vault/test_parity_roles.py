"""Vault's roles taken over by `signer policy import-vault`, and both sides asked: a real OpenBao and our service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.api_client import ApiClient
from signer.errors import SignerError
from signer.migration.parity import ParityReport, check_parity
from signer.policy.file import load_policy
from signer.vault.admin import VaultAdmin
from tests.parts.keys import KeyRing
from tests.parts.openbao import OpenBao
from tests.parts.parity_sides import CUTOVER
from tests.parts.service import Service, StartService

MOUNT = "parity-roles"
IDENTITY = """
[identities.deploy-agent]
kind = "agent"
roles = [{roles}]
tokens = [{{ sha256 = "{{token:deploy-agent}}", expires = 2099-01-01T00:00:00Z }}]
"""
# Roles as people have them; each but `odd-…` can be taken over whole or stricter.
ROLES: dict[str, dict[str, Any]] = {
    "llmops": {"allowed_user_key_lengths": {"ed25519": [0], "ecdsa-sha2-nistp256": [0], "rsa": [3072]}},
    "many": {
        "allowed_users": "llmops, deploy,admin",
        "default_user": "llmops,deploy",
        "allowed_extensions": "permit-pty,permit-port-forwarding,permit-user-rc",
        "allow_user_key_ids": True,
        "allowed_critical_options": "source-address,force-command",
    },
    "forced": {
        "default_critical_options": {"force-command": "/usr/bin/deploy --now", "source-address": "10.0.0.0/8"},
        "allowed_extensions": "",
        "default_extensions": {},
        "not_before_duration": "10s",
        "ttl": 0,
        "max_ttl": 0,
    },
    "loose": {
        "allowed_users": "*",
        "allowed_extensions": "*",
        "allow_host_certificates": True,
        "allowed_domains": "example.com",
        "allow_subdomains": True,
        "allow_empty_principals": True,
        "key_id_format": '{{role_name}} "quoted"',
    },
    "odd-template": {"allowed_users": "{{identity.entity.name}}", "allowed_users_template": True, "default_user": ""},
}
# What hvac's create_role sends besides what it was told.
HVAC: dict[str, Any] = {
    "port": 22, "key_bits": 1024, "cidr_list": "", "exclude_cidr_list": "", "allowed_users_template": "",
    "key_option_specs": "", "allowed_domains": "", "algorithm_signer": "", "install_script": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def vault(bao: OpenBao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultAdmin]:
    bao.enable_ssh(MOUNT)
    for name, fields in ROLES.items():
        bao.write_role(name, MOUNT, **fields)
    bao.write_role("hvac", MOUNT, **HVAC)
    with VaultAdmin(bao.address, token_file(tmp_path_factory.mktemp("token"), bao.root_token)) as admin:
        yield admin


def token_file(folder: Path, token: str) -> Path:
    path = folder / "token"
    path.touch(0o600)
    path.write_text(token)
    return path


def imported(service: Service, bao: OpenBao, *arguments: str) -> Any:
    """What `signer policy import-vault --json` says."""
    ran = service.command(
        "policy", "import-vault", "--address", bao.address, "--mount", MOUNT, "--json",
        "--token-file", str(token_file(service.folder, bao.root_token)), *arguments,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def compare(service: Service, vault: VaultAdmin, *roles: str, samples: int = 20) -> ParityReport:
    with ApiClient(service.address, service.token_file("deploy-agent")) as api:
        return check_parity(
            load_policy(service.policy_file),
            vault,
            MOUNT,
            lambda role, body: str(api.sign(role, body)["certificate"]),
            roles,
            samples,
        )


@pytest.fixture(scope="module")
def policy(bao: OpenBao, vault: VaultAdmin, keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-vault wrote, who may ask filled in as its comments say."""
    assert vault.roles(MOUNT)
    ca = keyring("ed25519", "ca")
    facts = imported(Service(tmp_path_factory.mktemp("import"), ca), bao, "--fingerprint", ca.fingerprint)
    names = ", ".join(f'"{role["name"]}"' for role in facts["roles"] if role["carried"])
    return str(facts["policy"]) + IDENTITY.format(roles=names)


@pytest.fixture(scope="module")
def taken_over(policy: str, keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Our service, with that policy."""
    with Service(tmp_path_factory.mktemp("service"), keyring("ed25519", "ca"), policy) as service:
        yield service


def test_roles_that_were_taken_over_give_what_vault_gives_or_less(taken_over: Service, vault: VaultAdmin) -> None:
    roles = ["llmops", "many", "forced", "loose", "hvac"]
    report = compare(taken_over, vault, *roles, samples=70)
    assert report.is_parity, report.errors
    assert [role.principals for role in report.roles][:2] == [
        "llmops -> llmops, none added",
        "deploy, llmops -> deploy, llmops, none added",
    ]
    assert report.sample_count == 70
    for role in report.roles:
        granted = [sample for sample in role.samples if sample.outcome == "granted"]
        assert len(granted) == len(role.samples), [sample.as_json() for sample in role.samples]
    assert {sample.sample.key_type for sample in report.roles[1].samples} == set(
        load_policy(taken_over.policy_file).roles["many"].key_types
    )
    json.dumps(report.as_json())


def test_what_cannot_be_taken_over_is_told_with_its_role(taken_over: Service, bao: OpenBao) -> None:
    facts = imported(taken_over, bao)
    lost = {(one["role"], one["text"].split(":")[0]) for one in facts["not_carried"]}
    assert lost >= {
        ("odd-template", "the whole role"),
        ("odd-template", "allowed_users_template"),
        ("loose", "allow_host_certificates"),
        ("loose", "allowed_domains"),
        ("loose", "key_id_format"),
        ("forced", "not_before_duration"),
    }
    assert [len(role["fields"]) for role in facts["roles"]] == [27] * len(facts["roles"])


def test_the_file_is_written_once(taken_over: Service, bao: OpenBao, tmp_path: Path) -> None:
    out = tmp_path / "imported.toml"
    facts = imported(taken_over, bao, "--role", "llmops", "--out", str(out))
    assert out.read_text() == facts["policy"]
    again = taken_over.command(
        "policy", "import-vault", "--address", bao.address, "--mount", MOUNT, "--out", str(out),
        "--token-file", str(taken_over.folder / "token"),
    )  # fmt: skip
    assert (again.returncode, "the file exists already" in again.stderr) == (1, True)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"default_user": "llmops,root", "allowed_users": "llmops,root"}, "default_user"),
        ({"ttl": "5m", "max_ttl": "10m"}, "max_ttl"),
        ({"default_extensions": {}}, "default_extensions"),
        ({"default_critical_options": {"source-address": "10.0.0.0/8"}}, "default_critical_options.source-address"),
    ],
)
def test_a_role_that_was_changed_in_vault_since_is_no_parity(
    change: dict[str, Any], field: str, taken_over: Service, vault: VaultAdmin, bao: OpenBao
) -> None:
    bao.write_role("llmops", MOUNT, **{**ROLES["llmops"], **change})
    try:
        report = compare(taken_over, vault, "llmops", samples=4)
    finally:
        bao.write_role("llmops", MOUNT, **ROLES["llmops"])
    assert field in [difference.field for difference in report.errors]
    shown = [difference.field for sample in report.roles[0].samples for difference in sample.differences]
    assert set(shown) & {"principals", "lifetime", "outcome", "extensions", "critical_options.source-address"}


def test_a_principal_that_is_added_here_is_no_parity(
    policy: str, vault: VaultAdmin, start_service: StartService
) -> None:
    before, table, after = policy.partition("[roles.llmops]")
    wider = after.replace('principals = ["llmops"]', 'principals = ["llmops", "root"]', 1)
    report = compare(start_service(before + table + wider), vault, "llmops")
    assert "signer adds root: principals may never widen" in [difference.why for difference in report.errors]
    assert "granted by signer only" in [sample.outcome for sample in report.roles[0].samples]
    assert report.summary.startswith("llmops -> llmops, root added")


def test_the_command_asks_a_service_in_mode_local_itself(taken_over: Service, bao: OpenBao, vault: VaultAdmin) -> None:
    assert vault.roles(MOUNT)
    tokens = taken_over.token_file("deploy-agent"), token_file(taken_over.folder, bao.root_token)
    config = taken_over.folder / "cutover.toml"
    text = CUTOVER.replace("http://127.0.0.1:8222", taken_over.address).replace("http://127.0.0.1:8200", bao.address)
    text = text.replace("/root/token", str(tokens[0])).replace("/root/vault-token", str(tokens[1]))
    text = text.replace("POLICY", str(taken_over.policy_file)).replace('"ssh"', f'"{MOUNT}"').replace("ROLE", "many")
    config.write_text(text)
    ran = taken_over.command("cutover", "parity", "--config", str(config), "--samples", "5")
    assert ran.returncode == 0, ran.stderr
    assert "deploy, llmops -> deploy, llmops, none added" in ran.stdout
    assert ran.stdout.endswith("(5 samples, 0 errors; signed locally by the running service)\n")


def test_the_roles_limits_hold_for_samples_too(policy: str, vault: VaultAdmin, start_service: StartService) -> None:
    service = start_service(policy.replace("[roles.llmops]", "[roles.llmops]\nlimits = { live = 3 }", 1))
    first, again = (compare(service, vault, "llmops").roles[0] for _ in range(2))
    assert (len(first.samples), first.left_out) == (3, "17 of 20 left out: the role's limits allow 3")
    assert again.left_out == "19 of 20 left out: too_many_live, its limit is used up"


@pytest.mark.parametrize(
    "act, code",
    [
        (lambda vault: vault.roles("no-such-mount"), "vault_mount_missing"),
        (lambda vault: vault.role(MOUNT, "no-such-role"), "vault_role_missing"),
        (lambda vault: vault.sign(MOUNT, "llmops", {"public_key": "x"}), "vault_refused"),
        (lambda vault: vault.sign(MOUNT, "no-such-role", {"public_key": "x"}), "vault_role_missing"),
        (lambda vault: vault.call("GET", "sys/../sys/mounts"), "vault_answer_malformed"),
    ],
    ids=["mount", "role", "refused", "sign", "dots"],
)
def test_what_vault_does_not_have_has_a_code(act: Any, code: str, vault: VaultAdmin) -> None:
    with pytest.raises(SignerError) as caught:
        act(vault)
    assert caught.value.code == code


def test_a_token_that_may_not_is_told_what_it_lacks(vault: VaultAdmin, bao: OpenBao, tmp_path: Path) -> None:
    poor = token_file(tmp_path, bao.token_for(f'path "{MOUNT}/roles" {{ capabilities = ["list"] }}', "parity-poor"))
    with VaultAdmin(bao.address, poor) as admin:
        assert "llmops" in admin.roles(MOUNT)
        assert admin.mount_ttls(MOUNT) is None
        with pytest.raises(SignerError) as caught:
            admin.role(MOUNT, "llmops")
    assert caught.value.code == "vault_forbidden"
    assert f"read on {MOUNT}/roles/llmops" in caught.value.hint
    assert vault.mount_ttls(MOUNT) is not None


def test_a_vault_that_is_down_is_told_so(tmp_path: Path) -> None:
    with VaultAdmin("http://127.0.0.1:9", token_file(tmp_path, "t")) as admin, pytest.raises(SignerError) as caught:
        admin.check_ready()
    assert caught.value.code == "vault_down"
