"""Lists are built by another process and published only if `ssh-keygen` and our reader see what was meant."""

from __future__ import annotations

import os
import selectors
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from signer.errors import SignerError, Unavailable
from signer.ledger.store import Ledger
from signer.model import Event
from signer.service import list_builder
from signer.service.list_builder import Built, ListBuilder, build
from signer.ssh.krl import ANY_CA, RevocationList, decode_krl
from tests.parts import missing
from tests.parts.builders import NOW
from tests.parts.events import issued

pytestmark = [
    pytest.mark.unix_socket,
    pytest.mark.skipif(bool(missing.ssh_keygen()), reason=missing.ssh_keygen()),
]
MEANT = RevocationList(7, 1_790_000_000, "signer", {ANY_CA: ((1, 3), (9, 9))}, frozenset({sha256(b"key").digest()}))


def fake_keygen(folder: Path, script: str) -> dict[str, str]:
    """An environment in which `ssh-keygen` is a script; $keygen is the real one."""
    folder.mkdir()
    program = folder / "ssh-keygen"
    program.write_text(f"#!/bin/sh\nkeygen=/usr/bin/ssh-keygen\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def refused(tmp_path: Path, environment: dict[str, str]) -> SignerError:
    with pytest.raises(Unavailable) as caught:
        build(MEANT, tmp_path / "krl", environment)
    assert not (tmp_path / "krl").exists()
    return caught.value


def test_a_list_that_reads_as_it_was_meant_is_written(tmp_path: Path) -> None:
    (tmp_path / "krl").write_text("left by a keeper that was killed")
    built = build(MEANT, tmp_path / "krl", os.environ)
    content = (tmp_path / "krl").read_bytes()
    assert built == Built(7, sha256(content).hexdigest())
    assert decode_krl(content) == MEANT
    assert stat.S_IMODE((tmp_path / "krl").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "script, said",
    [
        ("exit 0", "its version differ"),
        ('"$keygen" "$@" | sed "s/serial: 9/serial: 8/"', "the serials differ"),
        ('"$keygen" "$@" | grep -v "serial: 9"', "the serials differ"),
        ('"$keygen" "$@" | grep -v hash:', "the SHA-256 digests of keys differ"),
        ('"$keygen" "$@" | grep -v Wildcard', "a certificate of no CA"),
        ('"$keygen" "$@" | sed "s/version 7/version 8/"', "its version differ"),
        ('"$keygen" "$@"; echo "serial: 11"', "the serials differ"),
        ('"$keygen" "$@"; echo "what: is this"', "an unknown line"),
        ('"$keygen" "$@"; exit 255', "status 255"),
        ('"$keygen" "$@"; echo broken >&2; kill -9 $$', "status 137"),
    ],
)
def test_a_list_that_ssh_keygen_reads_otherwise_is_not_published(tmp_path: Path, script: str, said: str) -> None:
    error = refused(tmp_path, fake_keygen(tmp_path / "bin", script))
    assert error.code == "list_differs"
    assert said in error.text


def test_without_ssh_keygen_no_list_is_published(tmp_path: Path) -> None:
    assert refused(tmp_path, {"PATH": str(tmp_path)}).code == "ssh_keygen_missing"


def test_an_ssh_keygen_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_builder, "READ_BACK_WITHIN", 0.2)
    error = refused(tmp_path, fake_keygen(tmp_path / "bin", "exec sleep 60"))
    assert (error.code, "did not read it within" in error.text) == ("list_differs", True)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        build(MEANT, tmp_path / "missing" / "krl", os.environ)
    assert caught.value.code == "list_not_written"


def test_a_list_that_hosts_would_not_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_builder, "MAX_LIST", 50)
    error = refused(tmp_path, dict(os.environ))
    assert error.code == "list_not_built"
    assert "bytes" in error.text


# --- the keeper's end -------------------------------------------------------------------------------------------------


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


def result_of(builder: ListBuilder, selector: selectors.BaseSelector) -> Built | SignerError:
    builder.start()
    assert builder.is_busy
    deadline = time.monotonic() + 60
    while (result := builder.collect()) is None:
        assert time.monotonic() < deadline, "no result"
        selector.select(0.2)
    assert builder.collect() is None
    assert not selector.get_map(), "nothing is left to wait for"
    return result


def test_the_process_builds_from_the_ledger(tmp_path: Path, selector: selectors.BaseSelector) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.connection()
        result = result_of(ListBuilder(tmp_path, tmp_path / "krl", selector), selector)
        assert isinstance(result, Built), result
        assert decode_krl((tmp_path / "krl").read_bytes()).version == result.version == 0
        revoked: dict[str, object] = {"by": "serial", "first": "2", "last": "9", "reason": "x"}
        ledger.commit([issued(1), issued(2), Event("certificates.revoked", "operator", revoked), issued(3)], NOW * 1000)
        result = result_of(ListBuilder(tmp_path, tmp_path / "krl", selector), selector)
    assert result == Built(3, sha256((tmp_path / "krl").read_bytes()).hexdigest(), NOW + 900)
    listed = decode_krl((tmp_path / "krl").read_bytes())
    assert [*listed.certificates.values()] == [((2, 2),)]


def test_what_the_process_meets_is_the_result(tmp_path: Path, selector: selectors.BaseSelector) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.connection()
        result = result_of(ListBuilder(tmp_path, tmp_path / "no" / "krl", selector), selector)
    assert isinstance(result, Unavailable)
    assert result.code == "list_not_written"


def test_a_process_that_is_killed_or_hangs_is_a_failure(
    tmp_path: Path, selector: selectors.BaseSelector, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = ListBuilder(tmp_path, tmp_path / "krl", selector)
    builder._command = ["/bin/sleep", "60"]
    builder.start()
    process = builder._process
    assert process is not None
    process.kill()
    process.wait()
    result = builder.collect()
    assert isinstance(result, Unavailable)
    assert (result.code, "ended without a result" in result.text) == ("list_not_built", True)
    monkeypatch.setattr(list_builder, "BUILT_WITHIN", 0.0)
    result = result_of(builder, selector)
    assert isinstance(result, Unavailable)
    assert "took longer" in result.text


def test_no_process_is_a_failure_at_once(tmp_path: Path, selector: selectors.BaseSelector) -> None:
    builder = ListBuilder(tmp_path, tmp_path / "krl", selector)
    builder._command = [str(tmp_path / "missing")]
    with pytest.raises(Unavailable):
        builder.start()
    assert not builder.is_busy
    builder.close()
