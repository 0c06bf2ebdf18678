"""safe-session knows hosts by the signed list alone, and gives no session where the list cannot be had or verified."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.keys import Key, make_key
from tests.parts.sshd import Sshd, StartSshd
from tests.parts.standin import Asked, Client, Signer, Standin, http, problem

pytestmark = missing.needs_sshd
STRICT = ("StrictHostKeyChecking yes", "NoHostAuthenticationForLocalhost no")
NAMESPACE = "known-hosts.v1@signer"


def list_of(*lines: str, age: int = 0, version: str = "7") -> bytes:
    as_of = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - age))
    return "\n".join([f"# {NAMESPACE} version={version} as_of={as_of}", *lines, ""]).encode()


class Publisher:
    """A service with a list of host keys, which it signs with its own key, and with certificates."""

    def __init__(self, folder: Path, signer: Signer) -> None:
        self.signer = signer
        self.key = make_key(folder, "ed25519", "publisher")
        self.content = list_of()
        self.change: Callable[[str, bytes], bytes] = lambda _path, answer: answer
        self.certified = 0

    def sign(self, content: bytes, namespace: str = NAMESPACE, key: Key | None = None) -> bytes:
        words = ["ssh-keygen", "-Y", "sign", "-q", "-n", namespace, "-f", str((key or self.key).private)]
        return subprocess.run(words, input=content, capture_output=True, check=True).stdout

    def __call__(self, asked: Asked) -> bytes:
        path = asked.line.split()[1]
        if path == "/api/known_hosts":
            return self.change(path, http(200, self.content, kind="text/plain"))
        if path == "/api/known_hosts.sig":
            return self.change(path, http(200, self.sign(self.content), kind="text/plain"))
        self.certified += 1
        return self.signer(asked)


@pytest.fixture
def service(client: Client, ca: Key) -> Publisher:
    return Publisher(client.folder, Signer(client.folder, ca))


@pytest.fixture
def sshd(start_sshd: StartSshd, ca: Key) -> Sshd:
    return start_sshd(ca.public_line)


def host_key(sshd: Sshd) -> str:
    return " ".join(sshd.host_public.read_text().split()[:2])


def log_in(
    client: Client,
    service: Publisher,
    sshd: Sshd,
    *words: str,
    config: tuple[str, ...] = (),
    verb: str = "ssh",
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """With a configuration that trusts any key, which a listed host must not get."""
    config_file = client.folder / "config"
    lines = [
        *config, "Host *", f"Port {sshd.port}", f"User {sshd.user}", "StrictHostKeyChecking no", "BatchMode yes",
        "UserKnownHostsFile /dev/null", "NoHostAuthenticationForLocalhost yes", "HostName 127.0.0.1",
    ]  # fmt: skip
    config_file.write_text("\n".join(lines) + "\n")
    pinned = client.folder / "publishers"
    pinned.write_text(f"{service.key.public_line} signer-publishing\n")
    with Standin(service) as api:
        words = words or ("edge1", "true")
        words = ("-F", str(config_file), *words) if verb == "ssh" else words
        done = client.run(api.address, verb, *words, SAFE_SESSION_PUBLISHERS_FILE=str(pinned), **more)
    assert client.left_behind() == []
    return done


# --- with a real sshd ----------------------------------------------------------------------------------------------


def test_a_listed_host_is_known_a_swapped_key_is_refused_and_a_removed_host_is_the_users_own(
    client: Client, service: Publisher, sshd: Sshd
) -> None:
    # The user's own configuration knows no host: without the list there is no login.
    done = log_in(client, service, sshd, config=STRICT)
    assert (done.returncode, "Host key verification failed" in done.stderr) == (255, True)
    service.content = list_of(f"127.0.0.2,[127.0.0.1]:{sshd.port} {host_key(sshd)}")
    done = log_in(client, service, sshd, config=STRICT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # Another key than the listed one, whatever the user's configuration says.
    another = make_key(client.folder, "ed25519", "another").public_line
    service.content = list_of(f"[127.0.0.1]:{sshd.port} {another}")
    done = log_in(client, service, sshd)
    assert (done.returncode, "REMOTE HOST IDENTIFICATION HAS CHANGED" in done.stderr) == (255, True)
    # A key of another kind is as foreign.
    ecdsa = make_key(client.folder, "ecdsa256", "ecdsa").public_line
    service.content = list_of(f"[127.0.0.1]:{sshd.port} {ecdsa}")
    assert log_in(client, service, sshd).returncode == 255
    # Removed: the configuration that accepts anything decides again.
    service.content = list_of(f"[127.0.0.1]:{sshd.port + 1} {another}", "127.0.0.1 " + another)
    assert log_in(client, service, sshd).returncode == 0


def test_an_alias_and_the_ssh_of_a_jump_host_and_of_exec_are_looked_up_as_ssh_does(
    client: Client, service: Publisher, sshd: Sshd
) -> None:
    another = make_key(client.folder, "ed25519", "another").public_line
    service.content = list_of(f"edge1.example {host_key(sshd)}", f"[127.0.0.1]:{sshd.port} {another}")
    alias = ("Host web", "HostKeyAlias Edge1.Example")
    assert log_in(client, service, sshd, "web", "true", config=alias).returncode == 0
    # The jump host's key is not the listed one, though the last host's is.
    done = log_in(client, service, sshd, "-J", "jump", "web", "true", config=alias)
    assert (done.returncode, "IDENTIFICATION HAS CHANGED" in done.stderr) == (255, True)
    config = str(client.folder / "config")
    exec_words = ("--", "ssh", "-F", config)
    assert log_in(client, service, sshd, *exec_words, "web", "true", config=alias, verb="exec").returncode == 0
    assert log_in(client, service, sshd, *exec_words, "edge1", "true", config=alias, verb="exec").returncode == 255


# --- without one ---------------------------------------------------------------------------------------------------


def _replace(path: str, answer: bytes) -> Callable[[str, bytes], bytes]:
    return lambda asked, real: answer if asked == path else real


def test_a_list_that_is_not_of_the_pinned_key_of_now_and_of_its_purpose_gives_no_session(
    client: Client, service: Publisher, sshd: Sshd
) -> None:
    foreign = make_key(client.folder, "ed25519", "foreign")
    service.content = content = list_of(f"[127.0.0.1]:{sshd.port} {host_key(sshd)}")
    named, signature = "/api/known_hosts", "/api/known_hosts.sig"
    cases = {
        "another key": _replace(signature, http(200, service.sign(content, key=foreign))),
        "another namespace": _replace(signature, http(200, service.sign(content, "krl.v1@signer"))),
        "another list": _replace(named, http(200, content.replace(b"version=7", b"version=8"))),
        "one line more": _replace(named, http(200, content + b"* ssh-ed25519 AAAA\n")),
        "cut off": _replace(named, http(200, content[:-40])),
        "no signature": _replace(signature, http(200, b"")),
        "not there": _replace(named, problem(404, "no such path")),
        "not yet": _replace(named, problem(503, "known_hosts is not published yet")),
        "too large": _replace(named, http(200, b"#" * (5 * 1024 * 1024))),
        "empty": _replace(named, http(200, b"")),
    }
    for case, change in cases.items():
        service.change = change
        done = log_in(client, service, sshd)
        assert (case, done.returncode, done.stdout) == (case, 69, "")
        assert done.stderr.startswith("safe-session: error: "), case
    service.change = lambda _path, answer: answer
    signed_by_us = {
        "replayed": list_of(age=1_000),
        "of the future": list_of(age=-1_000),
        "no first line": b"edge1 ssh-ed25519 AAAA\n",
        "another first line": list_of().replace(b"known-hosts.v1", b"known-hosts.v2"),
        "no version": list_of(version="x"),
        "script bytes": list_of("edge1\x1b]0;x\x07 ssh-ed25519 AAAA"),
    }
    for case, bad in signed_by_us.items():
        service.content = bad
        assert (case, log_in(client, service, sshd).returncode) == (case, 69)
    assert service.certified == 0


def test_a_pair_of_files_that_was_replaced_meanwhile_is_fetched_again(
    client: Client, service: Publisher, sshd: Sshd
) -> None:
    service.content = list_of(f"[127.0.0.1]:{sshd.port} {host_key(sshd)}")
    old = iter([http(200, service.sign(list_of(version="6")))])
    service.change = lambda path, real: next(old, real) if path.endswith(".sig") else real
    assert log_in(client, service, sshd).returncode == 0


def test_nothing_runs_if_the_ssh_that_it_starts_would_not_look_hosts_up(
    client: Client, service: Publisher, sshd: Sshd
) -> None:
    spy = client.folder / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(
        "import os\nmkdir = os.mkdir\n"
        "def fail(path, mode=0o777):\n"
        "    if path.endswith('/bin'): raise OSError(28, 'No space left on device')\n"
        "    mkdir(path, mode)\n"
        "os.mkdir = fail\n"
    )
    path = f"{spy}:{client.environment('')['PYTHONPATH']}"
    mark = client.folder / "ran"
    done = log_in(client, service, sshd, "--", "touch", str(mark), verb="exec", PYTHONPATH=path)
    assert (done.returncode, mark.exists()) == (69, False)
    assert "cannot put a script for ssh into" in done.stderr


def test_ten_thousand_hosts_are_no_burden(client: Client, service: Publisher, sshd: Sshd) -> None:
    many = [f"host{number}.example,[host{number}.example]:2222 {host_key(sshd)}" for number in range(10_000)]
    service.content = list_of(*many, f"[127.0.0.1]:{sshd.port} {host_key(sshd)}")
    assert (
        log_in(
            client, service, sshd, config=("StrictHostKeyChecking yes", "NoHostAuthenticationForLocalhost no")
        ).returncode
        == 0
    )


def test_without_a_pinned_key_nothing_is_fetched(client: Client, service: Publisher, sshd: Sshd) -> None:
    with Standin(service) as api:
        done = client.run(api.address, "ssh", *sshd.ssh_options(), "127.0.0.1", "true")
    assert done.returncode == 0
    assert [asked.line.split()[1] for asked in api.asked] == ["/api/sign/llmops"]


def test_the_client_in_one_file_looks_hosts_up_too(
    client: Client, service: Publisher, sshd: Sshd, tmp_path: Path
) -> None:
    another = make_key(client.folder, "ed25519", "another").public_line
    keys_of = {"good": host_key(sshd), "bad": another}
    subprocess.run(["scripts/build-client", str(tmp_path / "safe-session")], check=True, capture_output=True)
    pinned = client.folder / "publishers"
    pinned.write_text(f"{service.key.public_line}\n")
    for case, status in (("good", 0), ("bad", 255)):
        service.content = list_of(f"[127.0.0.1]:{sshd.port} {keys_of[case]}")
        with Standin(service) as api:
            environment = client.environment(api.address, SAFE_SESSION_PUBLISHERS_FILE=str(pinned))
            del environment["PYTHONPATH"]
            words = [str(tmp_path / "safe-session"), "exec", "--", "ssh", *sshd.ssh_options(), "127.0.0.1", "true"]
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert (case, done.returncode) == (case, status), done.stderr
