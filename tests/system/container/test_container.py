"""The service in real containers, as the compose files start it: in mode vault, and with the overlay in mode local."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.container import API_ID, KEEPER_ID, Contained, Engine
from tests.parts.eventually import eventually
from tests.parts.keys import Key, KeyRing
from tests.parts.openbao import OpenBao
from tests.parts.rotation import ca_lines
from tests.parts.service import STANDARD_POLICY, fill_policy
from tests.parts.sshd import Sshd, StartSshd

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(900)]

MAY_SIGN = """
path "{mount}/sign/*" {{ capabilities = ["update"] }}
path "{mount}/config/ca" {{ capabilities = ["read"] }}
path "auth/token/lookup-self" {{ capabilities = ["read"] }}
path "auth/token/renew-self" {{ capabilities = ["update"] }}
"""


@pytest.fixture(scope="module")
def local(engine: Engine, keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contained]:
    """Base and overlay: our own key signs. Tests leave it running and ready."""
    ca = keyring("ed25519", "ca")
    with Contained(engine, tmp_path_factory.mktemp("container") / "local", ca, local=True) as running:
        yield running


NewKey = Callable[..., Key]


@pytest.fixture
def user(new_key: NewKey) -> Key:
    return new_key("ed25519", "user")


def log_in(sshd: Sshd, service: Contained, user: Key) -> str:
    """Gets a certificate and logs in with it; its serial."""
    answer = service.sign(user.public_line)
    assert answer.status == 201, answer.body
    certificate = user.private.with_name("user-cert.pub")
    certificate.write_text(answer.json()["certificate"] + "\n")
    login = sshd.login("echo it-is-$((40 + 2))", identity=user.private, certificate=certificate)
    assert (login.out.strip(), login.status) == ("it-is-42", 0), login.err
    return str(answer.json()["serial"])


# --- both modes ------------------------------------------------------------------------------------------------------


def test_a_certificate_of_the_local_ca_opens_an_sshd(local: Contained, start_sshd: StartSshd, user: Key) -> None:
    assert local.ask("GET", "/readyz").json()["mode"] == "local"
    log_in(start_sshd(local.ca.public_line), local, user)


def test_hosts_get_the_revocation_list_from_the_container(local: Contained) -> None:
    """ssh-keygen of the image has read it back, and the api's user reads what the keeper's user wrote."""
    eventually(lambda: local.ask("GET", "/api/krl").status == 200, "a list is published")
    assert local.ask("GET", "/api/krl.statement").json()["version"] == 0
    assert local.ask("GET", "/api/krl.publisher").body.startswith(b"ssh-ed25519 ")
    published = ("/run/signer/published", "/run/signer/published/krl")
    owners = local.inside("stat", "-c", "%U:%G:%a", *published, user="signer-keeper")
    assert owners.out.split() == ["signer-keeper:signer-api:2750", "signer-keeper:signer-api:640"], owners.err


def test_the_base_alone_has_vault_sign_and_its_certificate_opens_an_sshd(
    engine: Engine, bao: OpenBao, keyring: KeyRing, tmp_path: Path, start_sshd: StartSshd, user: Key
) -> None:
    ca, mount = keyring("ed25519", "ca"), "container-ssh"
    bao.enable_ssh(mount, private_key=ca.private.read_text(), public_key=ca.public_line)
    bao.write_role(mount=mount)
    token = bao.token_for(MAY_SIGN.format(mount=mount), "container")
    with Contained(engine, tmp_path / "vault", ca, local=False, vault=(bao.address, mount, token)) as service:
        assert service.ask("GET", "/readyz").json()["mode"] == "vault"
        log_in(start_sshd(ca.public_line), service, user)
        assert not any("/run/signer-ca" in mount["Destination"] for mount in service.inspect()["Mounts"])
        assert token not in told_outside(service)
        assert service.stop() == 0


# --- protection inside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attempt",
    [
        "echo x > /run/signer-ca/ca",
        "chmod 0666 /run/signer-ca/ca",
        "chown 8222 /run/signer-ca/ca",
        "rm -f /run/signer-ca/ca",
        "mv /run/signer-ca/ca /run/signer-ca/old",
        "ln -f /run/signer-ca/ca /run/signer-ca/other",
        "truncate -s 0 /run/signer-ca/ca",
    ],
)
def test_not_even_an_almighty_root_inside_changes_the_key(local: Contained, attempt: str) -> None:
    before = (local.key_file.read_bytes(), local.key_file.stat())
    done = local.inside("sh", "-c", attempt, almighty=True)
    assert done.status != 0
    assert re.search("Read-only file system|busy|Invalid cross-device", done.err), done.err
    assert (local.key_file.read_bytes(), local.key_file.stat()) == before


@pytest.mark.parametrize("user", ["signer-api", "signer-keeper", "nobody"])
@pytest.mark.parametrize("read", ["cat /run/signer-ca/ca", "head -c1 /proc/1/root/run/signer-ca/ca"])
def test_nobody_but_root_reads_the_key(local: Contained, user: str, read: str) -> None:
    done = local.inside(*read.split(), user=user)
    assert done.status != 0
    assert "Permission denied" in done.err
    assert done.out == ""


def test_root_itself_reads_it_so_the_refusals_are_about_the_user(local: Contained) -> None:
    assert local.inside("cat", "/run/signer-ca/ca").out == local.ca.private.read_text()


@pytest.mark.parametrize(
    "attempt",
    [
        "ls /var/lib/signer",
        "cat /proc/{keeper}/mem",
        "cat /proc/{keeper}/environ",
        "ls /proc/{keeper}/fd",
        "kill {keeper}",
    ],
)
def test_the_api_user_gets_at_nothing_of_the_keepers(local: Contained, attempt: str) -> None:
    done = local.inside("sh", "-c", attempt.format(keeper=local.keeper().number), user="signer-api")
    assert done.status != 0
    assert re.search("Permission denied|not permitted", done.err), done.err


@pytest.mark.parametrize("folder", ["/", "/etc", "/etc/signer", "/opt/signer", "/usr/bin", "/var/lib", "/root"])
def test_the_root_file_system_cannot_be_written(local: Contained, folder: str) -> None:
    done = local.inside("touch", f"{folder}/new", almighty=True)
    assert "Read-only file system" in done.err


def test_keeper_and_api_are_two_users_without_powers(local: Contained) -> None:
    found = local.processes()
    launcher = found[1]
    assert launcher.uid == 0
    assert powers(launcher.status["CapEff"]) == {"chown", "kill", "setgid", "setuid"}
    users: dict[str, int] = {}
    for number, one in found.items():
        assert one.status["NoNewPrivs"] == ["1"]
        if number != 1:
            users[re.split(r" -m signer[ .]", one.command)[1].split()[0]] = one.uid
            assert powers(one.status["CapEff"]) == powers(one.status["CapPrm"]) == set()
            assert one.status["Groups"] == []
    helpers = {"service.query_reader": KEEPER_ID, "service.view_writer": KEEPER_ID}
    assert users == {"keeper": KEEPER_ID, **helpers, "api": API_ID}


def powers(mask: list[str]) -> set[str]:
    """Capabilities by name (linux/capability.h); one we do not know is told by its number."""
    names = {0: "chown", 1: "dac_override", 2: "dac_read_search", 3: "fowner", 5: "kill", 6: "setgid", 7: "setuid"}
    value = int(mask[0], 16)
    return {names.get(bit, str(bit)) for bit in range(64) if value >> bit & 1}


@pytest.mark.parametrize("power", ["CHOWN", "KILL", "SETGID", "SETUID"])
def test_every_power_it_is_given_is_needed(engine: Engine, local: Contained, tmp_path: Path, power: str) -> None:
    """Without one of them it does not start, or it cannot stop its children."""
    powers_left = ",".join({"CHOWN", "KILL", "SETGID", "SETUID"} - {power})
    name = f"{local.project}-without-{power.lower()}"
    try:
        engine.podman(
            "run", "--detach", "--name", name, "--read-only", "--network", "host", "--cap-drop", "all",
            "--cap-add", powers_left, "--security-opt", "no-new-privileges", "--tmpfs", "/run/signer:mode=0750",
            "--volume", f"{name}:/var/lib/signer", "--volume", f"{local.policy_file.parent}:/etc/signer:ro",
            "--volume", f"{local.key_file.parent}:/run/signer-ca:ro", "--env", "SIGNER_LISTEN=unix:/dev/shm/api",
            engine.image,
        )  # fmt: skip
        if power == "KILL":
            eventually(lambda: "serving on" in log_of(engine, name), "it serves")
            engine.podman("stop", "--time", "5", name)
        else:
            eventually(lambda: not json.loads(engine.podman("inspect", name))[0]["State"]["Running"], "it gave up")
        assert json.loads(engine.podman("inspect", name))[0]["State"]["ExitCode"] != 0, log_of(engine, name)
    finally:
        engine.run("podman", "rm", "--force", "--time", "0", name)
        engine.run("podman", "volume", "rm", "--force", name)


def log_of(engine: Engine, name: str) -> str:
    done = engine.run("podman", "logs", name)
    return done.out + done.err


# --- what can be seen from outside -----------------------------------------------------------------------------------


def told_outside(service: Contained) -> str:
    """All that engine and host tell about a running service to whoever asks."""
    engine = service.engine
    said = [
        engine.control("inspect", service.name),
        engine.control("history", "--no-trunc", engine.image),
        engine.control("image", "inspect", engine.image),
        service.log(),
    ]
    said += [one.environment + one.command for one in service.processes().values()]
    return "\n".join(said)


def test_no_key_material_in_inspect_history_log_environment_or_command_lines(local: Contained, user: Key) -> None:
    assert local.sign(user.public_line).status == 201
    said = told_outside(local)
    assert "SIGNER_MODE=local" in said  # it is the right text that is searched
    for line in local.ca.private.read_text().splitlines()[1:-1]:
        assert line not in said
    assert "PRIVATE KEY" not in said
    assert local.tokens["deploy-agent"] not in said


def test_the_engine_mounts_secrets_read_only_and_writes_to_the_ledgers_volume_alone(local: Contained) -> None:
    facts = local.inspect()
    writable = {mount["Destination"] for mount in facts["Mounts"] if mount["RW"]}
    assert writable == {"/var/lib/signer"}
    assert {mount["Destination"] for mount in facts["Mounts"] if not mount["RW"]} == {
        "/etc/signer", "/run/signer-ca", "/run/signer-vault",
    }  # fmt: skip
    assert facts["HostConfig"]["ReadonlyRootfs"] is True
    assert facts["HostConfig"]["Privileged"] is False


# --- its life ----------------------------------------------------------------------------------------------------


def test_the_health_check_tells_ready_from_not_ready(local: Contained) -> None:
    assert local.engine.run("podman", "healthcheck", "run", local.name).status == 0
    launcher, keeper = local.processes()[1].pid, local.keeper().pid
    os.kill(launcher, signal.SIGSTOP)  # or there would be another keeper at once
    try:
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: local.ask("GET", "/readyz").status == 503, "the keeper is gone")
        assert local.engine.run("podman", "healthcheck", "run", local.name).status != 0
    finally:
        os.kill(launcher, signal.SIGCONT)
    eventually(local.is_ready, "the keeper is back")
    assert local.inside("env", "SIGNER_LISTEN=unix:/nowhere", "ready").status == 1
    assert local.inside("env", "SIGNER_LISTEN=127.0.0.1:1", "ready").status == 1


def test_a_killed_keeper_comes_back_with_its_ledger(local: Contained, user: Key) -> None:
    before = int(local.sign(user.public_line).json()["serial"])
    killed = local.keeper()
    assert local.inside("sh", "-c", f"kill -9 {killed.number}").status == 0
    eventually(lambda: local.is_ready() and local.keeper().pid != killed.pid, "another keeper is ready")
    assert local.keeper().uid == KEEPER_ID
    assert int(local.sign(user.public_line).json()["serial"]) == before + 1


def test_sighup_takes_a_policy_file_that_was_replaced(local: Contained, user: Key) -> None:
    """By rename, as editors and git do it: the folder is mounted, not the file."""

    def replace(policy: str) -> None:
        fresh = local.policy_file.with_name("fresh")
        fresh.write_text(fill_policy(policy, local.ca.fingerprint, local.tokens))
        fresh.chmod(0o644)
        fresh.replace(local.policy_file)
        local.engine.control("kill", "--signal", "HUP", local.name)

    def asked() -> int:
        return local.sign(user.public_line, ttl="20m").status

    replace(STANDARD_POLICY.replace('max_ttl = "30m"', 'max_ttl = "16m"'))
    eventually(lambda: asked() == 403, "the shorter lifetime is in force")
    replace(STANDARD_POLICY)
    eventually(lambda: asked() == 201, "the longer one is back")


def test_a_rendered_key_is_taken_by_sighup_and_by_reload(
    engine: Engine, keyring: KeyRing, tmp_path: Path, user: Key
) -> None:
    """By rename, as `signer ca render` does it: the folder is mounted. There by SIGHUP, back by command."""
    old, new = keyring("ed25519", "ca"), keyring("ed25519", "next-ca")
    with Contained(engine, tmp_path / "rotates", old, local=True) as service:
        service.write_policy(STANDARD_POLICY.replace('fingerprint = "{ca}"', ca_lines(old, new)))

        def render(key: Key) -> None:
            fresh = service.key_file.with_name(".ca.new")
            fresh.write_bytes(key.private.read_bytes())
            fresh.chmod(0o400)
            fresh.replace(service.key_file)

        def in_use() -> object:
            return service.ask("GET", "/readyz").json()["ca_fingerprint"]

        render(new)
        engine.podman("kill", "--signal", "HUP", service.name)
        eventually(lambda: in_use() == new.fingerprint, "the new key signs")
        render(old)
        ran = service.inside("signer", "reload")
        assert (ran.status, old.fingerprint in ran.out) == (0, True), ran.out + ran.err
        assert in_use() == old.fingerprint
        assert service.sign(user.public_line).status == 201


def test_no_zombie_is_left_of_a_killed_api(local: Contained) -> None:
    (arbiter, *workers) = sorted(
        (one for one in local.processes().values() if " -m signer api " in one.command), key=lambda one: one.number
    )
    os.kill(arbiter.pid, signal.SIGKILL)
    eventually(lambda: not any(Path(f"/proc/{one.pid}").exists() for one in (arbiter, *workers)), "all are gone")
    eventually(local.is_ready, "the api is back")
    assert [one.status["State"] for one in local.processes().values() if one.status["State"][0] == "Z"] == []


def test_sigterm_ends_it_in_order_and_the_next_start_knows_all_that_was_issued(
    engine: Engine, keyring: KeyRing, tmp_path: Path, user: Key
) -> None:
    with Contained(engine, tmp_path / "ends", keyring("ed25519", "ca"), local=True) as service:
        serials = [service.sign(user.public_line).json()["serial"] for _ in range(20)]
        assert service.stop() == 0  # 137 if it had to be killed after 5 seconds
        assert "was killed" not in service.log()
        service.engine.control("start", service.name)
        eventually(service.is_ready, "it is back")
        page = service.ask("GET", "/api/certificates?limit=200", identity="deploy-agent").json()
        assert [found["serial"] for found in page["certificates"]] == serials[::-1]
        verified = service.inside("signer", "ledger", "verify", user="signer-keeper")
        assert verified.status == 0, verified.err


def test_a_key_that_is_not_there_is_not_made_by_the_engine(engine: Engine, keyring: KeyRing, tmp_path: Path) -> None:
    service = Contained(engine, tmp_path / "none", keyring("ed25519", "ca"), local=True)
    service.key_file.unlink()
    service.key_file.parent.rmdir()
    try:
        assert service.compose("up", "-d").status != 0
        assert not service.key_file.parent.exists()
    finally:
        service.remove()


# --- commands of the operator inside -------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["root", str(KEEPER_ID)])
def test_commands_of_the_operator_work_inside_without_a_token(local: Contained, new_key: NewKey, user: str) -> None:
    """Root of the container may not read what the keeper's user owns, and becomes that user."""
    serial = local.sign(new_key("ed25519", f"inside-{user}").public_line).json()["serial"]
    as_keeper = {} if user == "root" else {"SIGNER_KEEPER_USER": "", "SIGNER_API_USER": ""}
    unset = ["env", *(word for name in as_keeper for word in ("-u", name))] if as_keeper else []

    def inside(*words: str) -> str:
        ran = local.inside(*unset, "signer", *words, user=user)
        assert ran.status == 0, f"{words}: {ran.out}{ran.err}"
        return ran.out

    status = json.loads(inside("status", "--json"))
    assert (status["well"], status["keeper"]["state"], status["live"]["llmops"] > 0) == (True, "ready", True)
    assert serial in inside("certs", "list")
    assert '"serial"' in inside("certs", "show", serial, "--json")
    assert inside("ledger", "head").startswith(str(status["ledger"]["events"]))
    assert inside("ledger", "verify").startswith("intact")
    assert inside("freeze", "identity", "ci", "--reason", "a drill").startswith("identity:ci is frozen")
    assert [row["scope"] for row in json.loads(inside("freezes", "--json"))["freezes"]] == ["identity:ci"]
    assert local.ask("DELETE", "/api/freezes/identity:ci", identity="operator").status == 200


def test_check_inside_a_healthy_container_says_so(local: Contained) -> None:
    ran = local.inside("signer", "check")
    assert ran.status == 0, ran.out + ran.err
    assert ran.out.splitlines()[-1].startswith("ready:")


def test_another_user_inside_is_told_whose_files_it_may_not_read(local: Contained) -> None:
    ran = local.inside("env", "-u", "SIGNER_KEEPER_USER", "-u", "SIGNER_API_USER", "signer", "certs", "list",
                       user=str(API_ID))  # fmt: skip
    assert ran.status == 1
    assert "belongs to user" in ran.err
    assert "space" not in ran.err
    freezing = local.inside("env", "-u", "SIGNER_KEEPER_USER", "-u", "SIGNER_API_USER", "signer", "freeze", "all",
                            user="nobody")  # fmt: skip
    assert freezing.status == 1
    assert "give --token-file" in freezing.err
