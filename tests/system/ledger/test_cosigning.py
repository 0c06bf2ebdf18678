"""The whole drill: a service signs, a witness cosigns, root rewrites the ledger with the ledger key, both refuse it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from signer.ledger.checkpoint import check_cosignature, parse_note, parse_vkey
from signer.ledger.reader import LedgerReader
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.service import Service
from tests.parts.witness_process import WitnessProcess
from tests.parts.witnessed import rewrite


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[WitnessProcess]:
    process = WitnessProcess(tmp_path / "witness", "")
    yield process
    if process.log:
        process.end(signal.SIGKILL)


def test_a_ledger_that_root_rewrites_with_its_key_is_refused_by_the_witness_and_by_verify(
    tmp_path: Path, keyring: KeyRing, witness: WitnessProcess
) -> None:
    service = Service(tmp_path / "service", keyring("ed25519", "ca"))
    data, out = service.folder / "data", tmp_path / "checkpoint"
    line = keyring("ed25519").public_line
    asked: tuple[str, ...] = ("ledger", "witness", "--address", service.address, "--out", str(out))
    with service:
        eventually(lambda: service.ask("GET", "/api/ledger/checkpoint").status == 200, "the ledger is folded")
        witness.log = service.command("ledger", "key").stdout.strip()
        witness.start()
        asked += ("--to", witness.address, "--witness", witness.vkey)
        for _ in range(2):  # killed between the rounds, the witness goes on from what it knew
            assert service.sign(line).status == 201
            done = service.command(*asked)
            assert done.returncode == 0, done.stderr
            check_cosignature(parse_note(out.read_bytes()), parse_vkey(witness.vkey))
            witness.end(signal.SIGKILL)
            down = service.command(*asked)
            assert (down.returncode, "witness_unreachable" in down.stderr) == (1, True)
            witness.start()
        size = parse_note(out.read_bytes()).text.split("\n")[1]
        status = json.loads(service.command("status", "--json").stdout)
        assert str(status["ledger"]["cosigned"]["events"]) == size
        assert b"signer_ledger_cosigned_timestamp_seconds" in service.ask("GET", "/metrics").body
        assert "warnings" not in service.ask("GET", "/readyz").json()
    verify = ("ledger", "verify", "--checkpoint", str(out), "--witness", witness.vkey, "--max-age", "1h")
    good = service.command(*verify)
    assert (good.returncode, good.stderr) == (0, "")

    with closing(LedgerReader(data)) as reader:
        issued = reader.query("SELECT seq FROM events WHERE kind = 'certificate.issued'")[0][0]
        owner = (data / "ledger.sqlite3").stat()
    rewrite(data, {issued: {"identity": "operator"}})
    for name in ("ledger.sqlite3", "views.sqlite3"):
        os.chown(data / name, owner.st_uid, owner.st_gid)
    assert service.command("ledger", "verify").returncode == 0, "the chain alone does not show it"
    found = service.command(*verify)
    assert (found.returncode, "the ledger was rewritten or cut off" in found.stderr) == (1, True)
    with service:
        assert service.sign(line).status == 201
        refused = service.command(*asked)
        assert (refused.returncode, "ledger_differs_from_witness" in refused.stderr) == (1, True)
        kept = parse_note((tmp_path / f"checkpoint.other-{size}").read_bytes())
        check_cosignature(kept, parse_vkey(witness.vkey))
        assert out.read_bytes() == kept.render(), "the last good checkpoint stays"
        (warning,) = service.ask("GET", "/readyz").json()["warnings"]
        assert "another history" in warning
        assert witness.run("list").stdout.splitlines()[1].split()[3] == "1", "the witness keeps it, too"
