"""`SIGNER_MODE=shadow`, whole: a real OpenBao signs, a real sshd lets in, and what our key would differ in is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from signer.protocol import replies
from tests.parts import missing
from tests.parts.builders import rotations
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.openbao import OpenBao
from tests.parts.rotation import API_USER, KEEPER_USER, why_not_two_users
from tests.parts.service import STANDARD_POLICY, Service
from tests.parts.sshd import StartSshd
from tests.parts.vault_mode import RIGHTS, no_secret_in, recorded, write_token

# Roles of policy.toml that say the same, and what each is in Vault.
ROLES: dict[str, dict[str, object]] = {
    "llmops": {},
    "short": {"ttl": "5m", "max_ttl": "5m"},
    "bare": {"allowed_extensions": "permit-port-forwarding", "default_extensions": {}},
    "late": {"not_before_duration": "1s"},
}


def policy() -> str:
    text = STANDARD_POLICY.replace(
        'kind = "agent"\nroles = ["llmops"]', f'kind = "agent"\nroles = {json.dumps([*ROLES])}'
    )
    start = text.index("[roles.llmops]")
    table = text[start : text.index("[identities")]
    others = [table.replace("[roles.llmops]", f"[roles.{name}]") for name in ROLES if name != "llmops"]
    return text[:start] + "".join(others) + text[start:]


@pytest.fixture
def start_shadow(keyring: KeyRing, bao: OpenBao) -> Iterator[Callable[[], tuple[Service, str]]]:
    """The service in mode shadow in front of OpenBao, and its token there; under two users where that can be."""
    with contextlib.ExitStack() as running:

        def start() -> tuple[Service, str]:
            # Not in pytest's own folder: each pytest that starts makes that one private to root again.
            place = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="shadow-")))
            place.chmod(0o755)
            mount, token_file = place.name, place / "vault-token"
            bao.enable_ssh(mount)
            for name, fields in ROLES.items():
                bao.write_role(name, mount, **fields)
            token = bao.token_for(RIGHTS.format(mount=mount), name=mount)
            write_token(token_file, token)
            environ = {
                "SIGNER_MODE": "shadow",
                "SIGNER_VAULT_ADDR": bao.address,
                "SIGNER_VAULT_TOKEN_FILE": str(token_file),
                "SIGNER_VAULT_MOUNT": mount,
            }
            if not why_not_two_users():
                shutil.chown(token_file, KEEPER_USER)
                environ |= {"SIGNER_KEEPER_USER": KEEPER_USER, "SIGNER_API_USER": API_USER}
            service = Service(place / "service", keyring("ed25519", "ca"), policy(), environ=environ)
            service.folder.chmod(0o755)
            service.policy_file.chmod(0o644)
            return running.enter_context(service), token

        yield start


def events(service: Service, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in service.command("ledger", "export").stdout.splitlines()]
    return [row["body"] for row in rows if row["kind"] == kind]


def shadow_metrics(service: Service) -> dict[tuple[str, ...], float]:
    """Name without `signer_shadow_`, then role and field, to value."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(service.ask("GET", "/metrics", identity="operator").body.decode()):
        for sample in family.samples:
            if sample.name.startswith("signer_shadow_"):
                labels = [sample.labels[name] for name in ("role", "field") if name in sample.labels]
                found[sample.name.removeprefix("signer_shadow_"), *labels] = sample.value
    return found


@missing.needs_bao
@missing.needs_sshd
def test_vaults_certificate_logs_in_and_each_difference_of_its_roles_is_told(
    start_shadow: Callable[[], tuple[Service, str]], start_sshd: StartSshd, keyring: KeyRing
) -> None:
    service, token = start_shadow()
    bundle = service.ask("GET", "/api/ca").body.decode().splitlines()
    ready = service.ask("GET", "/readyz")
    replies.Ready.model_validate_json(ready.body)
    assert ready.json()["mode"] == "shadow"
    assert [line.split()[-1] for line in bundle] == [ready.json()[f"{whose}ca_fingerprint"] for whose in ("", "local_")]
    assert [line.split()[-2] for line in bundle] == ["vault", "current"]
    assert ready.json()["local_ca_fingerprint"] == service.ca.fingerprint

    user = keyring("ed25519", "user")
    answer = service.sign(user.public_line)
    assert answer.status == 201, answer.body
    certificate = service.folder / "user-cert.pub"
    certificate.write_text(answer.json()["certificate"] + "\n")
    assert start_sshd(bundle[0]).login("true", identity=user.private, certificate=certificate).ok
    assert not start_sshd(bundle[1]).login("true", identity=user.private, certificate=certificate).ok

    statuses = {name: service.sign(user.public_line, role=name).status for name in ROLES if name != "llmops"}
    assert statuses == {"short": 500, "bare": 500, "late": 201}
    told = {(body["role"], body["field"]): body for body in events(service, "shadow.difference")}
    assert {at: body["severity"] for at, body in told.items()} == {
        ("llmops", "key_id"): "note",
        ("short", "refused"): "error",
        ("bare", "refused"): "error",
        ("late", "key_id"): "note",
        ("late", "lifetime"): "note",
    }
    assert (told["late", "lifetime"]["ours"], told["late", "lifetime"]["vault"]) == ("15m30s", "15m1s")
    assert told["short", "refused"]["vault"].startswith("vault_refused: ")
    assert told["llmops", "key_id"]["serial"] == answer.json()["serial"]
    counted: dict[tuple[str, ...], float] = {("differences_total", *at): 1 for at in told}
    assert shadow_metrics(service) == counted | {("compared_total", "llmops"): 1, ("compared_total", "late"): 1}
    rows = recorded(service)
    assert rows.keys() == {answer.json()["serial"], told["late", "lifetime"]["serial"]}
    assert {row["backend"] for row in rows.values()} == {"vault"}
    assert service.command("ledger", "verify").returncode == 0
    no_secret_in(service, token, service.tokens["deploy-agent"])


@missing.needs_bao
def test_check_looks_at_both_and_sighup_takes_another_key_to_compare_with(
    start_shadow: Callable[[], tuple[Service, str]], keyring: KeyRing
) -> None:
    service, token = start_shadow()
    found = {row["code"]: row["outcome"] for row in json.loads(service.command("check", "--json").stdout)["checks"]}
    assert found["vault_token"] == found["vault_ca"] == found["ca_key_pin"] == found["ca_key_self_test"] == "ok"
    refused = service.command("ca", "bundle")
    assert (refused.returncode, "in mode shadow hosts must trust Vault" in refused.stderr) == (1, True)

    old, service.ca = service.ca, keyring("ecdsa256", "new-ca")
    service.write_policy(policy())
    service.key_file.unlink()
    service.key_file.write_bytes(service.ca.private.read_bytes())
    service.key_file.chmod(0o400)
    os.kill(service.pid, signal.SIGHUP)

    def compared() -> Any:
        return service.ask("GET", "/readyz").json()["local_ca_fingerprint"]

    eventually(lambda: compared() == service.ca.fingerprint, "the new key is compared with")
    assert rotations(events(service, "ca.rotated")) == [{"from": old.fingerprint, "to": service.ca.fingerprint}]
    answer = service.sign(keyring("ed25519", "user").public_line)
    assert answer.status == 201, answer.body
    assert answer.json()["ca_fingerprint"] == service.ask("GET", "/readyz").json()["ca_fingerprint"]
    assert shadow_metrics(service)["compared_total", "llmops"] == 1
    no_secret_in(service, token)
