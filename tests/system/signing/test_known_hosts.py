"""First contact: a host is listed, clients know it at once; its list is signed, renewed and taken back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.eventually import eventually
from tests.parts.keys import Key, make_key
from tests.parts.service import ROOT, Service
from tests.parts.sshd import Sshd

pytestmark = missing.needs_sshd


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first-contact")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Key:
    return make_key(folder, "ed25519", "ca")


@pytest.fixture(scope="module")
def service(folder: Path, ca: Key) -> Iterator[Service]:
    with Service(folder / "service", ca) as running:
        yield running


@pytest.fixture(scope="module")
def sshd(folder: Path, ca: Key) -> Iterator[Sshd]:
    with Sshd(folder / "sshd", ca.public_line) as running:
        yield running


def signer(service: Service, *words: str, who: str = "operator") -> subprocess.CompletedProcess[str]:
    environment = {**service.environment(), **service.client_environment(who)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "signer", *words],
        env=environment, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def log_in(service: Service, sshd: Sshd, publishers: Path) -> subprocess.CompletedProcess[str]:
    """A login by a user whose own files know no host, and who is asked nothing."""
    environment = {
        **service.environment(), **service.client_environment("deploy-agent"), "HOME": str(sshd.folder),
        "SAFE_SESSION_PUBLISHERS_FILE": str(publishers),
    }  # fmt: skip
    options = [option for option in sshd.ssh_options() if "StrictHostKeyChecking" not in option]
    return subprocess.run(
        [sys.executable, "-P", "-m", "signer.safe_session", "ssh", *options, "-oStrictHostKeyChecking=ask",
         "127.0.0.1", "true"],
        env=environment, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip


def _list(service: Service) -> str:
    """What is published, empty if nothing is."""
    answer = service.ask("GET", "/api/known_hosts")
    return answer.body.decode() if answer.status == 200 else ""


def published(service: Service) -> str:
    """The list, once it has the ledger's newest event, which is one about hosts."""
    head = service.ask("GET", "/api/ledger/head", identity="operator").json()["seq"]

    def current() -> str:
        text = _list(service)
        return text if f"version={head} " in text else ""

    return eventually(current, f"a list of version {head}")


def test_a_listed_host_is_known_without_a_question_until_it_is_removed(
    service: Service, sshd: Sshd, folder: Path
) -> None:
    publishers = folder / "publishers"
    publishers.write_text(signer(service, "hosts", "key").stdout)
    publishers.chmod(0o644)
    name = f"[127.0.0.1]:{sshd.port}"
    # Not listed: what the user's own files say, which know nothing.
    assert log_in(service, sshd, publishers).returncode == 255
    # Listed by what ssh-keyscan says, as an operator does it.
    scanned = subprocess.run(
        ["ssh-keyscan", "-p", str(sshd.port), "127.0.0.1"], capture_output=True, text=True, check=True
    ).stdout
    (folder / "scanned").write_text(scanned)
    added = signer(service, "hosts", "add", name, "--keys", str(folder / "scanned"), "--yes")
    assert (added.returncode, added.stdout) == (0, f"{name} is listed with 1 key\n")
    content = published(service)
    assert sshd.host_public.read_text().split()[1] in content
    done = log_in(service, sshd, publishers)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # ssh-keygen agrees with the signature, in this namespace alone.
    for file, path in (("list", "/api/known_hosts"), ("list.sig", "/api/known_hosts.sig")):
        (folder / file).write_bytes(service.ask("GET", path).body)
    (folder / "allowed").write_text(f"signer {publishers.read_text()}")
    for namespace, expected in (("known-hosts.v1@signer", 0), ("krl.v1@signer", 255)):
        words = ["ssh-keygen", "-Y", "verify", "-f", str(folder / "allowed"), "-I", "signer", "-n", namespace]
        words += ["-s", str(folder / "list.sig")]
        given = (folder / "list").read_bytes()
        verified = subprocess.run(words, input=given, capture_output=True, check=False)
        assert verified.returncode == expected
    # Another key in its place: the same host is refused.
    another = make_key(folder, "ed25519", "another").public
    assert signer(service, "hosts", "add", name, "--keys", str(another), "--yes", "--replace").returncode == 0
    published(service)
    assert "IDENTIFICATION HAS CHANGED" in log_in(service, sshd, publishers).stderr
    assert signer(service, "hosts", "remove", name, who="deploy-agent").returncode == 1
    assert signer(service, "hosts", "remove", name).returncode == 0
    assert name not in published(service)
    done = log_in(service, sshd, publishers)
    assert (done.returncode, "IDENTIFICATION HAS CHANGED" in done.stderr) == (255, False)


def test_the_list_survives_a_restart_with_the_same_lines(service: Service, sshd: Sshd) -> None:
    assert signer(service, "hosts", "add", "edge1", "--keys", str(sshd.host_public), "--yes").returncode == 0
    before = published(service).split("\n", 1)
    service.stop()
    service.start()
    after = eventually(lambda: _list(service), "a list").split("\n", 1)
    assert after[1] == before[1]
    assert after[0].split(" as_of=")[0] == before[0].split(" as_of=")[0]
