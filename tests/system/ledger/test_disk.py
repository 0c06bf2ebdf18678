"""The ledger's disk fails in every way that can be arranged: nothing is signed that is not recorded, and the service
is back by itself once the disk is."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from signer.ledger.audit import verify
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import LOCK_NAME
from tests.parts import missing
from tests.parts.keys import KeyRing
from tests.parts.service import Answer, Service, StartService


@pytest.fixture
def line(keyring: KeyRing) -> str:
    return keyring("ed25519").public_line


@pytest.fixture
def prepared(tmp_path: Path, keyring: KeyRing) -> Service:
    """A service that is not yet started."""
    return Service(tmp_path / "service", keyring("ed25519", "ca"))


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at `folder`, in memory; skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", ",".join(["mode=0700", *options]), "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def eventually(what: Callable[[], bool], service: Service) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, service.log()[-2000:]
        time.sleep(0.05)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


def count_recorded(service: Service) -> int:
    """Certificates in a ledger whose chain and tables are right."""
    reader = LedgerReader(service.data_dir)
    try:
        verify(reader)
        return int(reader.query("SELECT count(*) FROM events WHERE kind = 'certificate.issued'")[0][0])
    finally:
        reader.close()


def assert_refused(answer: Answer, code: str = "ledger_unavailable") -> None:
    assert (answer.status, answer.json()["code"]) == (503, code), answer.body
    assert int(answer.headers["retry-after"]) >= 1
    assert b"ssh-ed25519-cert" not in answer.body


def assert_not_ready(service: Service, code: str = "ledger_unavailable") -> None:
    """Within a second or so; a write is tried once a second."""
    eventually(lambda: not service.is_ready(), service)
    answer = service.ask("GET", "/readyz")
    assert (answer.status, answer.json()["code"]) == (503, code)
    assert answer.json()["hint"]
    assert service.ask("GET", "/healthz").status == 200


@missing.needs_root
def test_a_full_disk_signs_nothing_says_so_and_is_got_over(prepared: Service, line: str) -> None:
    with mounted(prepared.data_dir, "size=4m"), prepared as service:
        for _ in range(5):
            assert service.sign(line).status == 201
        filler = service.data_dir / "filler"
        fill(filler)
        for _ in range(5):
            assert_refused(service.sign(line))
        assert_not_ready(service)
        filler.unlink()
        eventually(service.is_ready, service)
        assert int(service.sign(line).json()["serial"]) > 5
        assert service.stop() == 0
        began, ended = [text for text in service.log().splitlines() if "issued" in text]
        assert began.startswith("signer: no certificate is issued: the ledger cannot be used")
        assert re.fullmatch(r"signer: certificates are issued again, after \d+ s \(ledger_unavailable\)", ended)
        assert count_recorded(service) == 6


@missing.needs_root
def test_a_disk_that_fills_up_by_signing_alone_is_survived(prepared: Service, line: str) -> None:
    with mounted(prepared.data_dir, "size=1m"), prepared as service:
        good = 0
        while (answer := service.sign(line)).status == 201:
            good += 1
            assert good < 10_000
        assert_refused(answer)
        subprocess.run(["mount", "-o", "remount,size=20m", str(service.data_dir)], check=True)
        eventually(lambda: service.sign(line).status == 201, service)
        assert service.stop() == 0
        # A commit that fails may have reached the disk: recorded, and never released.
        assert good + 1 <= count_recorded(service) <= good + 2


def test_writes_that_fail_sign_nothing_and_are_got_over(start_service: StartService, line: str) -> None:
    """As on a full disk, for those who may not mount: the keeper's files may not grow."""
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    assert service.sign(line).status == 201
    hard = resource.prlimit(keeper, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (10, hard))
    assert_refused(service.sign(line))
    assert_not_ready(service)
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (hard, hard))
    eventually(service.is_ready, service)
    assert int(service.sign(line).json()["serial"]) > 1
    assert service.keeper_pid() == keeper
    assert service.stop() == 0
    assert count_recorded(service) == 2


@missing.needs_root
def test_a_keeper_that_dies_while_the_disk_is_full_is_back_when_there_is_space(prepared: Service, line: str) -> None:
    with mounted(prepared.data_dir, "size=4m"), prepared as service:
        assert service.sign(line).status == 201
        filler = service.data_dir / "filler"
        fill(filler)
        keeper = service.keeper_pid()
        assert keeper is not None
        os.kill(keeper, 9)
        eventually(lambda: "ended with status 1" in service.log(), service)
        assert_refused(service.sign(line), "keeper_gone")
        filler.unlink()
        eventually(lambda: service.sign(line).status == 201, service)
        assert service.stop() == 0
        assert count_recorded(service) == 2


@missing.needs_root
def test_a_read_only_file_system_stops_the_start(prepared: Service) -> None:
    with mounted(prepared.data_dir, "ro"):
        done = prepared.command("serve")
    assert done.returncode == 1
    assert "the ledger cannot be used: Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def disk_that_fails(folder: Path) -> Iterator[Callable[[], None]]:
    """A disk at `folder` which, when called, becomes read-only as after an error; skips where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder.with_name("disk.img")
    with image.open("wb") as file:
        file.truncate(48 << 20)
    mount = ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)]
    for command in (["mkfs.ext4", "-q", str(image)], mount):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip(f"no {command[0]} of a loop device here")
    try:
        folder.chmod(0o700)
        device = Path(subprocess.run(["findmnt", "-no", "SOURCE", str(folder)], capture_output=True, text=True).stdout)
        error = Path("/sys/fs/ext4", device.name.strip(), "trigger_fs_error")

        def fail() -> None:
            error.write_text("1")

        yield fail
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


READS = ("/api/certificates", "/api/certificates/1", "/api/ledger/head", "/api/operations", "/api/freezes", "/api/ca")


def answers(service: Service) -> dict[str, int]:
    return {path: service.ask("GET", path, identity="operator").status for path in READS}


@missing.needs_root
def test_audit_7_reading_goes_on_while_the_disk_is_full_or_read_only(prepared: Service, line: str) -> None:
    with disk_that_fails(prepared.data_dir) as fails, prepared as service:
        for _ in range(3):
            assert service.sign(line).status == 201
        good = answers(service)
        assert set(good.values()) == {200}
        (service.data_dir / "lost+found").rmdir()
        filler = service.data_dir / "filler"
        fill(filler)
        assert_refused(service.sign(line))
        assert answers(service) == good
        filler.unlink()
        eventually(service.is_ready, service)
        assert service.sign(line).status == 201
        fails()
        for _ in range(3):
            assert_refused(service.sign(line))
            assert answers(service) == good
        assert_not_ready(service)
        time.sleep(1.5)
        assert answers(service) == good


@missing.needs_root
def test_a_ledger_that_is_mounted_over_is_missed_and_found_again(prepared: Service, line: str) -> None:
    with prepared as service:
        assert service.sign(line).status == 201
        with mounted(service.data_dir):
            assert service.sign(line).status == 503
            assert_not_ready(service, "ledger_missing")
            assert os.listdir(service.data_dir) == []  # noqa: PTH208 - no new ledger was begun there
        eventually(service.is_ready, service)
        assert service.sign(line).status == 201
        assert service.stop() == 0
        count_recorded(service)


def move_away(service: Service, folder: Path) -> None:
    folder.mkdir()
    for path in service.data_dir.glob(f"{FILE_NAME}*"):
        path.rename(folder / path.name)


def move_back(service: Service, folder: Path) -> None:
    for path in service.data_dir.glob(f"{FILE_NAME}*"):
        path.unlink()
    for path in folder.iterdir():
        path.rename(service.data_dir / path.name)


def test_a_ledger_taken_away_under_the_keeper_stops_signing_until_it_is_back(
    start_service: StartService, line: str, tmp_path: Path
) -> None:
    service = start_service()
    assert service.sign(line).status == 201
    move_away(service, tmp_path / "away")
    for _ in range(3):
        assert service.sign(line).status == 503
    assert not service.is_ready()
    assert not (service.data_dir / FILE_NAME).exists(), "no new ledger may be begun in place of the old one"
    move_back(service, tmp_path / "away")
    eventually(service.is_ready, service)
    assert service.sign(line).status == 201
    assert service.stop() == 0
    reader = LedgerReader(service.data_dir)
    verify(reader)
    assert reader.last_serial() <= 3, "one may have been recorded whose file was gone a moment later; never released"
    reader.close()


def test_a_ledger_replaced_by_an_older_one_stops_signing(
    start_service: StartService, line: str, tmp_path: Path
) -> None:
    service = start_service()
    assert service.sign(line).status == 201
    older = tmp_path / "older.sqlite3"
    with sqlite3.connect(service.data_dir / FILE_NAME) as source, sqlite3.connect(older) as copy:
        source.backup(copy)
    source.close()
    copy.close()
    assert service.sign(line).status == 201
    move_away(service, tmp_path / "away")
    shutil.copy(older, service.data_dir / FILE_NAME)
    for _ in range(3):
        assert service.sign(line).status == 503
    assert_not_ready(service, "ledger_replaced")
    move_back(service, tmp_path / "away")
    eventually(service.is_ready, service)
    assert service.sign(line).status == 201


def test_a_write_ahead_log_that_somebody_removes_loses_nothing(start_service: StartService, line: str) -> None:
    service = start_service()
    serials = []
    for number in range(20):
        answer = service.sign(line)
        assert service.ask("GET", "/api/certificates", identity="operator").status == 200, "the query reader looked"
        if answer.status == 201:
            serials.append(int(answer.json()["serial"]))
        if number == 10:
            (service.data_dir / f"{FILE_NAME}-wal").unlink()
    keeper = service.keeper_pid()
    assert keeper is not None
    os.kill(keeper, 9)
    eventually(service.is_ready, service)
    assert len(serials) >= 18
    assert service.stop() == 0
    assert count_recorded(service) >= serials[-1]
    assert len(set(serials)) == len(serials)


def test_a_ledger_that_was_lost_between_two_starts_is_not_begun_anew(start_service: StartService, line: str) -> None:
    """Its serials would be given out a second time."""
    service = start_service()
    assert service.sign(line).status == 201
    assert service.stop() == 0
    for path in service.data_dir.glob(f"{FILE_NAME}*"):
        path.unlink()
    done = service.command("serve")
    assert done.returncode == 1
    assert "the ledger is missing from SIGNER_DATA_DIR" in done.stderr
    assert not (service.data_dir / FILE_NAME).exists()
    (service.data_dir / LOCK_NAME).unlink()
    service.start()
    assert service.sign(line).json()["serial"] == "1", "who removes both files wants a new one"


# --- at the start -----------------------------------------------------------------------------------------------------


def test_a_broken_ledger_stops_the_start_and_says_where(start_service: StartService, line: str) -> None:
    service = start_service()
    for _ in range(5):
        assert service.sign(line).status == 201
    assert service.stop() == 0
    with sqlite3.connect(service.data_dir / FILE_NAME) as db:
        db.execute("DROP TRIGGER events_are_never_changed")
        db.execute("UPDATE events SET actor = 'nobody' WHERE seq = 4")
    db.close()
    done = service.command("serve")
    assert done.returncode == 1
    assert "the ledger is broken at event 4: its content does not match its hash" in done.stderr
    assert "signer: hint:" in done.stderr


def test_a_damaged_file_stops_the_start(start_service: StartService) -> None:
    service = start_service()
    assert service.stop() == 0
    with (service.data_dir / FILE_NAME).open("r+b") as file:
        file.write(b"not a database, not at all")
    done = service.command("serve")
    assert done.returncode == 1
    assert "the ledger's file is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ledger_of_a_newer_version_stops_the_start(start_service: StartService) -> None:
    service = start_service()
    assert service.stop() == 0
    with sqlite3.connect(service.data_dir / FILE_NAME) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    done = service.command("serve")
    assert done.returncode == 1
    assert "the ledger has version 99" in done.stderr


# --- two of them ------------------------------------------------------------------------------------------------------


def other_than(service: Service, tmp_path: Path, keyring: KeyRing, **shared: str) -> Service:
    """Another service, with these settings of the first one's."""
    return Service(tmp_path / "other", keyring("ed25519", "ca"), environ=shared)


@pytest.mark.parametrize("verb", ["serve", "keeper"])
def test_a_second_keeper_on_one_ledger_refuses_and_leaves_the_first_alone(
    verb: str, start_service: StartService, keyring: KeyRing, tmp_path: Path, line: str
) -> None:
    service = start_service()
    keeper, door = service.keeper_pid(), service.socket.stat().st_ino
    second = other_than(
        service, tmp_path, keyring, SIGNER_DATA_DIR=str(service.data_dir), SIGNER_RUN_DIR=str(service.run_dir)
    )
    done = second.command(verb)
    assert done.returncode == 1
    assert "another keeper writes this ledger" in done.stderr
    assert service.socket.stat().st_ino == door
    assert service.keeper_pid() == keeper
    assert service.sign(line).status == 201


def test_a_second_service_in_one_run_directory_refuses_and_leaves_the_first_alone(
    start_service: StartService, keyring: KeyRing, tmp_path: Path, line: str
) -> None:
    """It has another ledger; the first one's api must not be talked away from its keeper."""
    service = start_service()
    door = service.socket.stat().st_ino
    second = other_than(service, tmp_path, keyring, SIGNER_RUN_DIR=str(service.run_dir))
    done = second.command("serve")
    assert done.returncode == 1
    assert "another keeper listens in SIGNER_RUN_DIR" in done.stderr
    assert service.socket.stat().st_ino == door
    assert service.sign(line).status == 201
