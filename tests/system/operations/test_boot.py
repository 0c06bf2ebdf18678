"""What a reboot starts, with systemd as process 1 and the units as they are: the key first, then who needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.parts import missing
from tests.parts.agents import PIN, SO_PIN, SOFTHSM
from tests.parts.booted import BootedMachine, booted_machine
from tests.parts.command_blocks import read_command_blocks
from tests.parts.documents import blocks, document
from tests.parts.infisical import CLIENT_SECRET

pytestmark = [
    missing.needs_systemd,
    missing.needs_sshd,
    missing.needs_curl_and_jq,
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

_USERS = 'for user in signer-keeper signer-api; do useradd --system --user-group "$user"; done'
_UNITS = "cp /opt/signer/scripts/systemd/*.{service,socket,timer} /etc/systemd/system/; systemctl daemon-reload"
_ENABLE = "systemctl enable --now signer-api.socket signer-keeper signer-api"
_READY = "until curl -fsS http://127.0.0.1:8222/readyz; do sleep 0.2; done 2>/dev/null"
_SIGN = (
    "ssh-keygen -q -t ed25519 -N '' -f id <<<y >/dev/null; "
    'echo "Authorization: Bearer $(cat /etc/signer/operator.token)" >header; '
    'curl -fsS -H @header --json "{\\"public_key\\":\\"$(cat id.pub)\\"}" http://127.0.0.1:8222/api/sign/llmops'
)


@pytest.fixture
def machine() -> Iterator[BootedMachine]:
    with booted_machine() as running:
        do(
            running,
            f"rm -rf /etc/signer /var/lib/signer; {_USERS}; ln -sf /opt/signer/.venv/bin/signer /usr/local/bin/",
        )
        do(running, _UNITS)
        yield running


def do(machine: BootedMachine, script: str) -> str:
    """What lines that must end well print."""
    ran = machine.run(script)
    assert ran.status == 0, (
        f"{script}\n-> {ran.status}\n{ran.out}\n{machine.run('journalctl -b --no-pager | tail -40').out}"
    )
    return ran.out


def block(begins: str) -> str:
    """The block of runbooks/ca-key.md that begins so."""
    (found,) = (one.text for one in read_command_blocks() if one.page == "runbooks/ca-key.md" and begins in one.text)
    return found


def log(machine: BootedMachine, unit: str) -> str:
    return do(machine, f"journalctl -b --no-pager -o cat -u {unit}")


def start_of(machine: BootedMachine, unit: str) -> tuple[int, int]:
    """When its last start began and when it was done, in microseconds of the monotonic clock."""
    shown = do(machine, f"systemctl show {unit} -p InactiveExitTimestampMonotonic -p ActiveEnterTimestampMonotonic")
    found = dict(line.split("=") for line in shown.split())
    return int(found["InactiveExitTimestampMonotonic"]), int(found["ActiveEnterTimestampMonotonic"])


def test_a_request_does_not_bring_back_a_keeper_that_was_stopped(machine: BootedMachine) -> None:
    """Else a ledger that is restored or was moved has a second keeper, which gives the same serials."""
    do(machine, f"signer init /etc/signer --yes; {_ENABLE}; {_SIGN}")
    for stop in ("systemctl stop signer-api signer-keeper", "systemctl stop signer-keeper"):
        do(machine, stop)
        asked = do(machine, "curl -sS -m 30 -w '%{http_code}' http://127.0.0.1:8222/readyz; sleep 1")
        assert "keeper_gone" in asked
        assert asked.endswith("503")
        assert machine.run("systemctl is-active signer-keeper").out.strip() == "inactive"
        do(machine, f"systemctl start signer-keeper; {_READY}")
    do(machine, "systemctl disable --now signer-api.socket signer-api signer-keeper")
    assert machine.run("curl -sS http://127.0.0.1:8222/readyz").status == 7  # nobody listens
    machine.reboot()
    assert machine.run("curl -sS http://127.0.0.1:8222/readyz").status == 7
    assert machine.run("systemctl is-active signer-keeper signer-api").out.split() == ["inactive"] * 2


def prepare_infisical(machine: BootedMachine) -> None:
    """The settings of the page, and a stand-in as a unit, which a reboot starts late: it needs 5 s to answer."""
    pin = json.loads(do(machine, "signer ca new --out /root/new-ca --json"))["fingerprint"]
    (settings,) = re.findall(
        r"^INFISICAL_SITE_URL=.*?^SIGNER_CA_FINGERPRINT=.*?$", document("runbooks/ca-key.md"), re.M | re.S
    )
    settings = settings.replace("https://infisical.example", "http://127.0.0.1:8321")
    settings = re.sub(r"SHA256:\S+", pin, settings)
    do(
        machine,
        f"signer init /etc/signer --yes --ca infisical --ca-fingerprint {pin}; install -d -m 0700 /srv/infisical",
    )
    machine.write("/etc/signer/ca-render.env", settings + "\n")
    machine.write("/etc/signer/client-secret", CLIENT_SECRET + "\n", 0o400)
    orders = {"value": machine.read("/root/new-ca"), "login": None, "secret": None}
    machine.write("/srv/infisical/orders.json", json.dumps(orders))
    machine.write(
        "/etc/systemd/system/infisical.service",
        "[Service]\nExecStartPre=/bin/sleep 5\nWorkingDirectory=/opt/signer\n"
        "ExecStart=/opt/signer/.venv/bin/python -m tests.parts.infisical 8321 /srv/infisical\n"
        "[Install]\nWantedBy=multi-user.target\n",
    )
    do(machine, "systemctl daemon-reload; systemctl enable --now infisical")


def test_the_keeper_starts_once_the_key_is_rendered(machine: BootedMachine) -> None:
    prepare_infisical(machine)
    do(machine, block("signer-ca-render.service /etc"))
    do(machine, f"{_ENABLE}; {_READY}; {_SIGN}")
    machine.reboot()
    do(machine, f"{_READY}; {_SIGN}")
    began, done = start_of(machine, "signer-ca-render")
    assert done - began > 2_500_000, "Infisical was not late"
    assert start_of(machine, "signer-keeper")[0] >= done
    assert "ca_key_missing" not in log(machine, "signer-keeper")
    assert do(machine, "stat -c '%U %a' /run/signer-ca/ca").split() == ["root", "400"]
    assert do(machine, "systemctl is-system-running").strip() == "running"


def test_a_keeper_without_its_key_tries_until_it_is_there(machine: BootedMachine) -> None:
    """systemd gives a unit up that fails five times in ten seconds, unless the unit says otherwise."""
    do(machine, f"signer init /etc/signer --yes; {_ENABLE}; {_READY}; mv /etc/signer/ca /root/ca")
    machine.reboot()
    do(machine, "until test $(systemctl show signer-keeper -p NRestarts --value) -gt 6; do sleep 0.2; done")
    assert "ca_key_missing" in log(machine, "signer-keeper")
    do(machine, f"mv /root/ca /etc/signer/ca; {_READY}; {_SIGN}")


# What each needs, as it comes.
_LATE = {
    "signer-notices": 'echo "SIGNER_NOTICES_FILE=/etc/signer/notices.toml" >>/etc/signer/environment',
    "signer-witness": 'echo "WITNESS_OPTIONS=--name w.example --log $(signer ledger key)" >/etc/signer/witness',
    "signer-agent": "mv /usr/bin/later /usr/bin/ssh-agent",
    "signer-ca-credential": "mv /root/ca.cred /etc/signer/ca.cred",
}


def test_other_units_too_try_until_what_they_need_is_there(machine: BootedMachine) -> None:
    do(
        machine,
        "for user in signer-notices signer-witness; do useradd --system --user-group $user; done; "
        f"signer init /etc/signer --yes; {_ENABLE}; {_READY}; mv /usr/bin/ssh-agent /usr/bin/later; "
        "install -m 0400 -o signer-notices /dev/null /etc/signer/notices.toml; "
        "systemd-creds encrypt --name=ca /etc/signer/ca /root/ca.cred",
    )
    machine.write("/etc/signer/witness", "WITNESS_OPTIONS=--name w.example --log no-key\n")
    do(machine, f"systemctl enable --now --no-block {' '.join(_LATE)}")
    for unit, come in _LATE.items():
        restarts = f"$(systemctl show {unit} -p NRestarts --value)"
        limit = 6 if unit != "signer-ca-credential" else 1  # every second, and every five
        do(machine, f"until test {restarts} -gt {limit}; do ! systemctl is-failed {unit} && sleep 0.2 || exit 1; done")
        do(machine, f"{come}; until systemctl is-active {unit}; do sleep 0.2; done")
    assert do(machine, f"sleep 2; systemctl is-active {' '.join(_LATE)}").split() == ["active"] * len(_LATE)


def test_a_credential_of_systemd_is_the_key_and_another_one_is_taken_by_a_restart(machine: BootedMachine) -> None:
    made = json.loads(do(machine, "signer ca new --out /dev/shm/new-ca --json"))["fingerprint"]
    do(machine, f"signer init /etc/signer --yes --ca systemd-creds --ca-fingerprint {made}; {_ENABLE} || true")
    do(machine, f"{block('signer-keeper.service.d')}\n{_READY}; {_SIGN}")
    assert "PRIVATE KEY" not in do(machine, "cat /etc/signer/ca.cred")
    machine.reboot()
    assert json.loads(do(machine, _READY))["ca_fingerprint"] == made
    assert machine.run("runuser -u signer-keeper -- cat /run/credentials/signer-keeper.service/ca").status != 0
    # Another key: published as next, encrypted, and not seen before the restart.
    new = json.loads(do(machine, "signer ca new --out /dev/shm/next-ca --json"))
    old = do(machine, "curl -fsS http://127.0.0.1:8222/api/ca").rsplit(" ", 3)[0]
    policy = machine.read("/etc/signer/policy.toml")
    line = (
        f'public_key = "{old}"\nnext = {{ fingerprint = "{new["fingerprint"]}", public_key = "{new["public_key"]}" }}\n'
    )
    machine.write("/etc/signer/policy.toml", re.sub(r"^(fingerprint = .*\n)", rf"\1{line}", policy, flags=re.M))
    do(
        machine,
        "systemd-creds encrypt --name=ca /dev/shm/next-ca /etc/signer/ca.cred; systemctl reload signer-keeper; sleep 2",
    )
    assert json.loads(do(machine, _READY))["ca_fingerprint"] == made
    do(machine, "systemctl restart signer-keeper")
    assert json.loads(do(machine, _READY))["ca_fingerprint"] == new["fingerprint"]
    rotated = do(machine, "signer events list --kind ca.rotated --json")
    assert made in rotated
    assert new["fingerprint"] in rotated


_FAKE_COMPOSE = """#!/bin/sh
case " $* " in *" config "*) exit 0 ;; esac
ls -ld /run/safe-session/vault /run/signer-ca/ca >/root/seen
printf '%s\\n' "$@" >/root/words
"""


def test_the_container_is_started_from_the_record_after_its_key_was_decrypted(machine: BootedMachine) -> None:
    """The compose command only writes how it was run: this machine's control groups do not do for containers here."""
    machine.write("/usr/local/bin/podman-compose", _FAKE_COMPOSE, 0o755)
    (record,) = [
        text for text in blocks(document("runbooks/install/container.md"), "ini") if text.startswith("command=")
    ]
    machine.write("/var/lib/safe-session/boot", record, 0o600)
    do(machine, "install -d -m 0700 /etc/signer; signer ca new --out /dev/shm/new-ca; chmod 0755 /var/lib/safe-session")
    do(machine, block("signer-ca-credential.service /etc"))
    do(machine, "systemctl enable signer-container")
    machine.reboot(in_order=False)
    words = machine.read("/root/words").split()
    assert words[:4] == [
        "-f",
        "/opt/signer/overlays/safe-session.yaml",
        "-f",
        "/opt/signer/overlays/safe-session-local-ca.yaml",
    ]
    assert words[4:] == ["-p", "safe-session", "up", "--detach", "--no-deps", "--no-build", "safe-session-api"]
    vault, key = machine.read("/root/seen").splitlines()
    assert vault.startswith("drwxr-xr-x")
    assert key.startswith("-r-------- 1 root root")
    assert start_of(machine, "signer-container")[0] >= start_of(machine, "signer-ca-credential")[1]
    assert do(machine, "systemctl is-system-running").strip() == "running"
    # Without a record nothing is started, and that is no failure.
    do(machine, "rm /var/lib/safe-session/boot /root/words")
    machine.reboot()
    assert machine.run("cat /root/words").status != 0
    assert do(machine, "systemctl is-system-running").strip() == "running"


@missing.needs_systemd_analyze
def test_units_that_wait_for_each_other_are_found(machine: BootedMachine) -> None:
    """`systemd-analyze verify` is content with the units together, and would not be with a circle among them."""
    do(
        machine,
        "install -d /etc/signer; touch /etc/signer/ca-render.env; "
        "systemd-analyze verify --man=no /etc/systemd/system/signer-*.*",
    )
    machine.write(
        "/etc/systemd/system/signer-keeper.service.d/circle.conf", "[Unit]\nBefore=signer-ca-render.service\n"
    )
    ran = machine.run("systemctl daemon-reload; systemd-analyze verify --man=no /etc/systemd/system/signer-*.* 2>&1")
    assert "ordering cycle" in ran.out, ran.out


@missing.needs_softhsm
def test_a_ca_key_in_a_token_is_loaded_at_boot_with_a_pin_that_only_this_machine_decrypts(
    machine: BootedMachine,
) -> None:
    """SoftHSM stands for the token: its folder is the one thing that the agent's unit has to be shown more."""
    page = document("runbooks/operate/ca-key-in-hardware.md")
    (credential,) = (one.text for one in read_command_blocks() if "--name=ca-pin" in one.text)
    machine.write("/srv/hsm/softhsm2.conf", "directories.tokendir = /srv/hsm/tokens\nlog.level = ERROR\n")
    as_keeper = "runuser -u signer-keeper -- env SOFTHSM2_CONF=/srv/hsm/softhsm2.conf"
    made = f"--login --pin {PIN} --keypairgen --id 01 --key-type EC:prime256v1 --label signer-ca"
    do(
        machine,
        "mkdir -p /srv/hsm/tokens; chown -R signer-keeper: /srv/hsm; "
        f"{as_keeper} softhsm2-util --init-token --free --label ca --so-pin {SO_PIN} --pin {PIN}; "
        f"{as_keeper} pkcs11-tool --module {SOFTHSM} {made}",
    )
    listed = do(machine, f"{as_keeper} ssh-keygen -D {SOFTHSM} >/root/ca.pub; ssh-keygen -l -f /root/ca.pub")
    pin = listed.split()[1]
    do(machine, f"signer init /etc/signer --yes --ca ssh-agent --ca-fingerprint {pin}")
    for name, text in zip(("load-ca-key", "ca-pin"), blocks(page, "sh"), strict=True):
        machine.write(f"/etc/signer/{name}", text, 0o755)
    drop_in = "/etc/systemd/system/signer-agent.service.d"
    machine.write(f"{drop_in}/pin.conf", next(text for text in blocks(page, "ini") if "ca-pin" in text))
    machine.write(
        f"{drop_in}/token.conf",
        "[Service]\nEnvironment=SOFTHSM2_CONF=/srv/hsm/softhsm2.conf\nReadWritePaths=/srv/hsm\n",
    )
    typed = machine.run(credential, f"{PIN}\n", terminal=True)
    assert typed.status == 0, typed.out
    assert PIN not in do(machine, "cat /etc/signer/ca-pin.cred")
    do(machine, f"systemctl daemon-reload; systemctl enable --now signer-agent; {_ENABLE}; {_READY}; {_SIGN}")
    machine.reboot(in_order=False)
    assert json.loads(do(machine, _READY))["ca_fingerprint"] == pin
    do(machine, _SIGN)
    assert "ca_agent_key_missing" not in log(machine, "signer-keeper")
    assert do(machine, "systemctl is-system-running").strip() == "running"
