"""Checkpoints of a real service: anybody gets one, it goes on from the one before, and a rewritten ledger is found."""

from __future__ import annotations

import base64
import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from signer.ledger.checkpoint import Checkpoint, check_note, cosign, parse_checkpoint, parse_note, parse_vkey
from signer.ledger.reader import LedgerReader
from signer.ledger.tree import check_consistency
from tests.parts.keys import KeyRing
from tests.parts.service import Service
from tests.parts.witnessed import WITNESS, WITNESS_KEY, rewrite

ORIGIN = "signer.example.org/ledger"


@pytest.fixture
def service(tmp_path: Path, keyring: KeyRing) -> Service:
    """A service that is not yet started."""
    return Service(tmp_path / "service", keyring("ed25519", "ca"), environ={"SIGNER_LEDGER_ORIGIN": ORIGIN})


def newest(service: Service, least: int = 1) -> Checkpoint:
    """The service's checkpoint, once it has so many events."""
    deadline = time.monotonic() + 30
    while True:
        answer = service.ask("GET", "/api/ledger/checkpoint")
        if answer.status == 200:
            found = parse_checkpoint(parse_note(answer.body).text)
            if found.size >= least:
                return found
        assert time.monotonic() < deadline, service.log()[-2000:]
        time.sleep(0.05)


def test_the_whole_way_of_a_checkpoint_to_a_ledger_that_root_rewrites(
    service: Service, keyring: KeyRing, tmp_path: Path
) -> None:
    with service:
        first = newest(service, 3)
        assert service.sign(keyring("ed25519").public_line).status == 201
        second = newest(service, first.size + 1)
        answer = service.ask("GET", f"/api/ledger/proof?from={first.size}&to={second.size}")
        assert answer.status == 200
        proof = [base64.b64decode(digest) for digest in answer.json()["hashes"]]
        check_consistency(first.size, first.root, second.size, second.root, proof)
        for query, status in (("", 400), ("?from=2&to=1", 400), ("?from=1&to=1000000", 404), ("?from=1&to=-1", 400)):
            assert service.ask("GET", f"/api/ledger/proof{query}").status == status, query

        vkey = parse_vkey(service.command("ledger", "key").stdout.strip())
        printed = service.command("ledger", "checkpoint", "--address", service.address)
        assert printed.returncode == 0, printed.stderr
        note = parse_note(printed.stdout.encode())
        check_note(note, vkey)
        assert vkey.name == ORIGIN
        facts = (service.folder / "data" / "ledger.key").stat()
        assert facts.st_mode & 0o777 == 0o600
    saved = tmp_path / "checkpoint"
    cosigned = note.with_signatures([cosign(note.text, int(time.time()), WITNESS_KEY, WITNESS.sign)])
    saved.write_bytes(cosigned.render())
    asked = ("ledger", "verify", "--checkpoint", str(saved), "--witness", str(WITNESS_KEY), "--max-age", "1h")
    good = service.command(*asked)
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""

    data = service.folder / "data"
    with closing(LedgerReader(data)) as reader:
        issued = reader.query("SELECT seq FROM events WHERE kind = 'certificate.issued'")[0][0]
        owner = (data / "ledger.sqlite3").stat()
    rewrite(data, {issued: {"identity": "operator"}})
    for name in ("ledger.sqlite3", "views.sqlite3"):
        os.chown(data / name, owner.st_uid, owner.st_gid)
    assert service.command("ledger", "verify").returncode == 0, "the chain alone does not show it"
    found = service.command(*asked)
    assert found.returncode == 1
    assert "the ledger was rewritten or cut off" in found.stderr


def test_the_key_and_the_name_stay_over_a_restart(service: Service) -> None:
    with service:
        before = service.command("ledger", "key").stdout
        first = newest(service)
    with service:
        assert service.command("ledger", "key").stdout == before
        second = newest(service, first.size + 1)
        answer = service.ask("GET", f"/api/ledger/proof?from={first.size}&to={second.size}")
        proof = [base64.b64decode(digest) for digest in answer.json()["hashes"]]
        check_consistency(first.size, first.root, second.size, second.root, proof)
