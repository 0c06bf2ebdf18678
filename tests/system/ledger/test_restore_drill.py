"""The drill of `runbooks/operate/backup-restore.md` with a real service, the real commands and clients that ask on."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from signer.ledger.audit import verify
from signer.ledger.follow import FOLDER
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from tests.parts import ports
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.ledgers import fill
from tests.parts.service import ROOT, STANDARD_POLICY, Service


@pytest.fixture(scope="module")
def line(keyring: KeyRing) -> str:
    return keyring("ed25519").public_line


@pytest.fixture
def service(tmp_path: Path, keyring: KeyRing) -> Iterator[Service]:
    with Service(tmp_path / "service", keyring("ed25519", "ca")) as started:
        yield started


class Load:
    """Clients that ask for certificates until the block ends; `serials` are those that they got."""

    def __init__(self, service: Service, line: str) -> None:
        self.serials: list[int] = []
        self._service, self._line = service, line
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._service.sign(self._line)
            except OSError:  # the service was killed
                continue
            if answer.status == 201:
                self.serials.append(int(answer.json()["serial"]))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self) -> None:
        """Until some more certificates were issued."""
        wanted = len(self.serials) + 10
        eventually(lambda: len(self.serials) >= wanted, "certificates are issued")


def kill(service: Service) -> None:
    """As a host that is lost: launcher, keeper and api end at once."""
    keeper = service.keeper_pid()
    assert keeper is not None
    os.kill(service.pid, signal.SIGKILL)
    os.kill(keeper, signal.SIGKILL)
    service.stop()


def succeed(service: Service, *words: str) -> str:
    done = service.command(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_backed_up_under_load_and_restored_no_serial_comes_twice(service: Service, line: str, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    with Load(service, line) as load:
        made = json.loads(succeed(service, "ledger", "backup", str(backup), "--json"))
        load.wait_for_more()
        status = json.loads(service.command("status", "--json").stdout)
    assert status["ledger"]["backed_up"]["events"] == made["head"]["seq"]
    lost = succeed(service, "ledger", "head").split()[0]

    running = service.command("ledger", "restore", str(backup), "--yes")
    assert (running.returncode, "stop the service" in running.stderr) == (1, True)
    service.stop()
    asked = service.command("ledger", "restore", str(backup))
    assert asked.returncode == 3, asked.stderr
    assert "will be lost" in asked.stderr
    result = json.loads(succeed(service, "ledger", "restore", str(backup), "--yes", "--lost-head", lost, "--json"))
    assert result["lost_head"]["seq"] > int(lost.split(":")[0])  # the keeper recorded its stop after that
    again = json.loads(succeed(service, "ledger", "restore", str(backup), "--yes", "--json"))
    assert again == {"restored": False, "head": result["head"]}

    service.start()
    refused = service.sign(line)
    assert (refused.status, refused.json()["code"]) == (403, "frozen")
    assert service.ask("DELETE", "/api/freezes/all", identity="operator").status == 200
    first_new = int(service.sign(line).json()["serial"])
    assert first_new == int(result["last_serial"]) + 1
    assert first_new - int(result["first_serial"]) >= 1_000_000
    assert max(load.serials) < first_new
    assert len(set(load.serials)) == len(load.serials)
    lost_serials = {serial for serial in load.serials if serial >= int(result["first_serial"])}
    assert lost_serials, "certificates were lost"
    who = service.command("certs", "who", str(max(lost_serials)))
    assert "a backup was restored" in who.stderr
    lost_by_verify = service.command("ledger", "verify", "--head", lost)
    assert (lost_by_verify.returncode, "was lost when a backup was restored" in lost_by_verify.stderr) == (1, True)
    succeed(service, "ledger", "verify", "--head", f"{result['head']['seq']}:{result['head']['hash']}")
    with closing(LedgerReader(Path(result["replaced"]))) as replaced:
        assert verify(replaced).seq >= int(lost.split(":")[0])


def test_followed_killed_and_promoted_on_another_host(
    service: Service, line: str, tmp_path: Path, keyring: KeyRing
) -> None:
    standby = Service(tmp_path / "standby", keyring("ed25519", "ca"))
    standby.tokens = service.tokens  # one policy.toml on both hosts
    standby.write_policy(STANDARD_POLICY)
    standby.data_dir.mkdir(mode=0o700)
    reach = ("--address", service.address, "--token-file", str(service.token_file("operator")))
    of_ci = ("--address", service.address, "--token-file", str(service.token_file("ci")))
    refused = standby.command("ledger", "follow", *of_ci)  # without --once: it ends by itself
    assert (refused.returncode, "lacks the right ledger.read" in refused.stderr) == (1, True), refused.stderr
    with Load(service, line) as load:
        first = json.loads(succeed(standby, "ledger", "follow", "--once", "--json", *reach))
        load.wait_for_more()
        second = json.loads(succeed(standby, "ledger", "follow", "--once", "--json", *reach))
        load.wait_for_more()
        assert second["added"] == second["head"]["seq"] - first["head"]["seq"] >= 10
        kill(service)

    away = standby.command("ledger", "follow", "--once", *reach)
    assert (away.returncode, "cannot reach" in away.stderr) == (1, True), away.stderr
    keeper = standby.command("ledger", "rebuild")
    assert keeper.returncode == 1  # there is no ledger yet
    assert standby.command("ledger", "promote").returncode == 3
    result = json.loads(succeed(standby, "ledger", "promote", "--yes", "--json"))
    assert result["backup"]["seq"] == second["head"]["seq"]
    with standby:
        assert standby.sign(line).json()["code"] == "frozen"
        assert standby.ask("DELETE", "/api/freezes/all", identity="operator").status == 200
        assert int(standby.sign(line).json()["serial"]) == int(result["last_serial"]) + 1 > max(load.serials)
    with closing(LedgerReader(standby.data_dir)) as reader, closing(LedgerReader(service.data_dir)) as lost:
        common = second["head"]["seq"]
        assert verify(reader).seq > common
        assert reader.entry(common) == lost.entry(common)
        verify(lost)

    # The old host comes back: its ledger has another event where the promoted one has its restore.
    service.port = ports.free_port()
    with service:
        fork = ("--address", service.address, "--token-file", str(service.token_file("operator")))
        shutil.rmtree(standby.data_dir / FOLDER)
        (standby.data_dir / FOLDER).mkdir(mode=0o700)
        shutil.copy(standby.data_dir / FILE_NAME, standby.data_dir / FOLDER / FILE_NAME)
        (standby.data_dir / FOLDER / "ledger.followed").write_text('{"seq": 1, "time": 1}\n')
        forked = standby.command("ledger", "follow", *fork)
        assert (forked.returncode, "is not the one that this copy follows" in forked.stderr) == (1, True), forked.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_root_restores_as_the_keepers_user_what_that_user_may_not_read(tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    try:
        keeper = pwd.getpwnam("nobody")
        data = place / "data"
        data.mkdir(mode=0o700)
        fill(data)
        for path in (data, *data.iterdir()):
            os.chown(path, keeper.pw_uid, keeper.pw_gid)
        environ = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SIGNER_KEEPER_USER": "nobody",
            "SIGNER_API_USER": "daemon", "SIGNER_DATA_DIR": str(data), "SIGNER_POLICY_FILE": str(place / "missing"),
            "SIGNER_RUN_DIR": str(place / "run"), "SIGNER_CA_KEY_FILE": str(place / "ca"),
        }  # fmt: skip

        def signer(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-P", "-m", "signer", *words]
            return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)

        assert signer("ledger", "backup", "backup").returncode == 0
        assert (tmp_path / "backup").stat().st_uid == 0
        done = signer("ledger", "restore", "backup", "--yes")
        assert done.returncode == 0, done.stderr
        owners = {path.stat().st_uid for path in (*data.iterdir(), *data.glob("ledger.replaced-*/*"))}
        assert owners == {keeper.pw_uid}
        data.chmod(0o770)
        refused = signer("ledger", "restore", "backup", "--yes")
        assert (refused.returncode, "is not this user's alone" in refused.stderr) == (1, True), refused.stderr
    finally:
        shutil.rmtree(place)
