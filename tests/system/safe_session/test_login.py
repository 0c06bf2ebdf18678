"""safe-session logs in to a real sshd, with its own identity and no other, whatever ~/.ssh/config says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.keys import Key, make_key, sign_with_ssh_keygen
from tests.parts.sshd import Sshd, StartSshd
from tests.parts.standin import Client, Signer, Standin

pytestmark = missing.needs_sshd


@pytest.fixture
def signer(client: Client, ca: Key) -> Signer:
    return Signer(client.folder, ca)


@pytest.fixture
def sshd(start_sshd: StartSshd, ca: Key) -> Sshd:
    return start_sshd(ca.public_line)


def configure(client: Client, sshd: Sshd, *lines: str) -> Path:
    """An ssh_config that names the host `rs2000`, with more lines of a user's. ssh finds the home in the password
    database, not in HOME, hence -F."""
    options = [word.removeprefix("-o").replace("=", " ", 1) for word in sshd.ssh_options()[2:]]
    options = [line for line in options if not line.startswith("PreferredAuthentications")]
    path = client.folder / "config"
    path.write_text("\n".join([*lines, "Host rs2000", "HostName 127.0.0.1", *options]) + "\n")
    return path


def log_in(
    client: Client, signer: Signer, sshd: Sshd, *words: str, config: tuple[str, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    path = configure(client, sshd, *config)
    with Standin(signer) as api:
        done = client.run(api.address, "ssh", "-F", str(path), *words, **more)
    assert client.left_behind() == []
    return done


def test_a_command_runs_on_the_host(client: Client, signer: Signer, sshd: Sshd) -> None:
    done = log_in(client, signer, sshd, "rs2000", "echo in; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, "in\n", "")
    assert "ID deploy-agent (serial 4711) CA ED25519" in sshd.log()


def test_a_principal_after_the_host_is_asked_for(client: Client, signer: Signer, sshd: Sshd) -> None:
    path = configure(client, sshd)
    with Standin(signer) as api:
        done = client.run(api.address, "-v", "ssh", "-F", str(path), "rs2000", "--principal", "root", "true")
    assert done.returncode == 0
    assert api.asked[0].body["principals"] == ["root"]
    assert done.stderr.startswith("safe-session: llmops for 15 min (serial 4711, until ")


def test_ssh_gets_exactly_one_key_to_offer(client: Client, signer: Signer, sshd: Sshd) -> None:
    """Not even the bare key beside its certificate: each costs one of the server's MaxAuthTries."""
    make_key(client.folder, "ed25519", "mine")
    config = (f"IdentityFile {client.folder}/mine",)
    done = log_in(client, signer, sshd, "-vv", "rs2000", "true", config=config)
    offered = [line for line in done.stderr.splitlines() if "Offering public key" in line]
    assert done.returncode == 0
    assert len(offered) == 1, offered
    assert "ED25519-CERT" in offered[0]


def test_ssh_looks_at_none_of_the_users_default_keys(client: Client, signer: Signer, sshd: Sshd) -> None:
    """They would be ruled out later as no certificates; but a certificate of the user's lies beside such a key."""
    done = log_in(client, signer, sshd, "-G", "rs2000")
    settings = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert settings["identityfile"] == "none"
    assert settings["identityagent"] == "SSH_AUTH_SOCK"


def test_ssh_itself_failing_is_status_255(client: Client, signer: Signer, sshd: Sshd) -> None:
    signer.principals = ("somebody",)
    done = log_in(client, signer, sshd, "rs2000", "true")
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_a_refused_login_is_one_line_with_what_the_certificate_was(
    client: Client, signer: Signer, sshd: Sshd, ca: Key
) -> None:
    signer.principals = ("somebody", "else")
    done = log_in(client, signer, sshd, "rs2000", "true")
    (line,) = done.stderr.splitlines()[1:]
    assert line == (
        "safe-session: note: the host refused the certificate (serial 4711, principals somebody, else, from any"
        f" address, CA {ca.fingerprint}): its TrustedUserCAKeys lacks this CA, or the account does not accept principal"
        " somebody, else"
    )
    signer.options = ("-O", "source-address=192.0.2.0/24,198.51.100.7/32")
    path = configure(client, sshd)
    with Standin(signer) as api:
        done = client.run(api.address, "--json", "exec", "--", "ssh", "-F", str(path), "rs2000", "true")
    assert done.returncode == 255
    said = json.loads(done.stderr.splitlines()[-1])
    assert (said["state"], said["serial"], said["principals"]) == ("login_refused", "4711", ["somebody", "else"])
    assert (said["source_address"], said["ca"]) == ("192.0.2.0/24,198.51.100.7/32", ca.fingerprint)
    assert "it sees you come from elsewhere than 192.0.2.0/24,198.51.100.7/32" in said["text"]


@pytest.mark.parametrize("how", ["no such host", "nobody listens", "the command fails", "the command ends with 255"])
def test_other_failures_are_not_taken_for_a_refused_login(client: Client, signer: Signer, sshd: Sshd, how: str) -> None:
    words = {
        "no such host": ["nowhere.invalid", "true"],
        "nobody listens": ["-p", "1", "rs2000", "true"],
        "the command fails": ["rs2000", "exit 3"],
        "the command ends with 255": ["rs2000", "exit 255"],
    }[how]
    done = log_in(client, signer, sshd, *words)
    assert done.returncode == (3 if how == "the command fails" else 255)
    assert "refused the certificate" not in done.stderr


def test_a_forwarded_agent_and_many_logins_at_once_pass_through(client: Client, signer: Signer, sshd: Sshd) -> None:
    path = configure(client, sshd)
    login = f"ssh -F {path} rs2000 echo in"
    script = f"for n in 1 2 3 4; do {login} & done; wait; ssh -A -F {path} rs2000 ssh-add -L"
    with Standin(signer) as api:
        done = client.run(api.address, "exec", "--", "sh", "-c", script)
    assert done.stdout.count("in\n") == 4
    assert "ssh-ed25519-cert-v01@openssh.com" in done.stdout
    assert "refused the certificate" not in done.stderr


@pytest.mark.parametrize(
    "lines",
    [
        ("IdentityAgent none",),
        ("IdentityAgent /nowhere/agent",),
        ("IdentitiesOnly yes",),
        ("PubkeyAuthentication no",),
        ("PreferredAuthentications password",),
        ("PubkeyAcceptedAlgorithms rsa-sha2-512",),
        ("ControlMaster auto", "ControlPath {folder}/master", "ControlPersist 60"),
    ],
    ids=lambda lines: lines[0],
)
def test_a_users_configuration_does_not_defeat_us(
    client: Client, signer: Signer, sshd: Sshd, lines: tuple[str, ...]
) -> None:
    config = tuple(line.format(folder=client.folder) for line in lines)
    done = log_in(client, signer, sshd, "rs2000", "echo in", config=config)
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
    assert not (client.folder / "master").exists()


def test_a_users_own_key_is_not_used_when_the_certificate_is_refused(
    client: Client, signer: Signer, start_sshd: StartSshd, ca: Key
) -> None:
    mine = make_key(client.folder, "ed25519", "mine")
    (client.folder / "authorized").write_text(mine.public_line + "\n")
    sshd = start_sshd(ca.public_line, extra=[f"AuthorizedKeysFile {client.folder}/authorized"])
    assert sshd.login(identity=mine.private).ok, "the key must open the door for this test to mean something"
    signer.principals = ("somebody",)
    done = log_in(client, signer, sshd, "rs2000", "true", config=(f"IdentityFile {mine.private}",))
    assert done.returncode == 255


def test_a_shared_master_is_not_ridden(client: Client, signer: Signer, sshd: Sshd, ca: Key) -> None:
    """An open master connection would log in without the certificate, and be seen by nobody."""
    mine = make_key(client.folder, "ed25519", "mine")
    sign_with_ssh_keygen(ca, mine)
    config = configure(client, sshd)
    master = ["-M", "-S", f"{client.runtime}/master", "-N", "-f"]
    subprocess.run(
        ["ssh", "-F", str(config), "-i", str(mine.private), *master, "rs2000"], check=True, capture_output=True
    )
    try:
        path = configure(client, sshd, f"ControlPath {client.runtime}/master")
        with Standin(signer) as api:
            assert client.run(api.address, "ssh", "-F", str(path), "rs2000", "true").returncode == 0
        assert "ID deploy-agent (serial 4711)" in sshd.log()
    finally:
        end = ["ssh", "-F", str(config), "-S", f"{client.runtime}/master", "-O", "exit", "rs2000"]
        subprocess.run(end, check=True, capture_output=True)


@pytest.mark.parametrize("verb", [("ssh",), ("exec", "--", "ssh")], ids=" ".join)
@pytest.mark.parametrize(
    "words,kept",
    [((), "no"), (("-o", "ControlPersist=30"), "30"), (("-oControlPersist 30",), "30")],
    ids=["configuration", "command line", "in one word"],
)
def test_without_a_terminal_no_master_connection_outlives_the_command(
    client: Client, signer: Signer, sshd: Sshd, verb: tuple[str, ...], words: tuple[str, ...], kept: str
) -> None:
    path = configure(client, sshd, "ControlPersist 60")
    with Standin(signer) as api:
        done = client.run(api.address, *verb, "-G", "-F", str(path), *words, "rs2000")
    settings = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert settings["controlpersist"] == kept


def test_a_command_with_a_master_connection_ends_when_it_ends(client: Client, signer: Signer, sshd: Sshd) -> None:
    """A master that persisted would hold the pipe that `run` reads to its end, and its socket would be left."""
    master = ("-M", "-S", f"{client.runtime}/master")
    done = log_in(client, signer, sshd, *master, "rs2000", "echo in", config=("ControlPersist 600",))
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr


@pytest.mark.parametrize("words,forwarded", [((), False), (("-A",), True)], ids=["configuration", "-A"])
def test_the_agent_is_forwarded_only_when_this_command_says_so(
    client: Client, signer: Signer, sshd: Sshd, words: tuple[str, ...], forwarded: bool
) -> None:
    config = ("ForwardAgent yes",)
    done = log_in(client, signer, sshd, *words, "rs2000", 'echo "<$SSH_AUTH_SOCK>"', config=config)
    assert (done.stdout != "<>\n") == forwarded, done.stderr


def test_ssh_inside_exec_uses_the_agent(client: Client, signer: Signer, sshd: Sshd) -> None:
    path = configure(client, sshd)
    with Standin(signer) as api:
        done = client.run(api.address, "exec", "--", "ssh", "-F", str(path), "rs2000", "echo in")
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr


def test_a_certificate_that_is_over_opens_nothing(client: Client, signer: Signer, sshd: Sshd) -> None:
    signer.validity = "-10m:-5m"
    done = log_in(client, signer, sshd, "rs2000", "true")
    assert done.returncode == 255
