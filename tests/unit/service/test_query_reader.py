"""The query reader: replies come from a process of its own, each identity has its share, and a dead one is replaced."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from signer.errors import Refused, SignerError
from signer.ledger.fold import fold_all
from signer.ledger.lookups import FindCertificate, FindCertificates, FindOperations, Lookup, encode_lookup
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger
from signer.model import Event, Filter
from signer.protocol.commands import MAX_REPLY
from signer.protocol.replies import CertificateDetails, CertificatePage, OperationPage, Reply, decode_reply
from signer.service import helper_process
from signer.service import query_reader as reader_module
from signer.service.query_reader import MAX_WAITING, QueryReader, answer_lookup
from tests.parts import missing
from tests.parts.builders import MemoryStore
from tests.parts.events import issued

pytestmark = pytest.mark.unix_socket

NOW = 1_800_000_000
OPERATION: dict[str, object] = {"operation": "cutover", "outcome": "applied", "plan": "", "evidence": "", "reason": "ß"}


class Loop:
    """A keeper's loop with nothing but lookups."""

    def __init__(self, folder: Path) -> None:
        self.selector = selectors.DefaultSelector()
        self.reader: QueryReader[str] = QueryReader(folder, self.selector)
        self.reader.start()
        self.replies: dict[str, bytes] = {}

    def turn(self) -> None:
        due = self.reader.due()
        self.selector.select(0.05 if due is None else min(due, 0.05))
        for key, reply in self.reader.collect():
            assert key not in self.replies, "answered twice"
            self.replies[key] = reply

    def ask(self, lookup: Lookup, key: str = "key", within: float = 60) -> Reply:
        self.reader.submit(key, lookup)
        deadline = time.monotonic() + within
        while key not in self.replies:
            assert time.monotonic() < deadline, "no reply"
            self.turn()
        return decode_reply(self.replies.pop(key))

    def pid(self) -> int:
        process = self.reader._helper.process
        assert process is not None
        return process.pid


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path)) as opened:
        opened.commit([issued(1), issued(2, identity="operator")], NOW * 1000)
        opened.commit([Event("operation.recorded", "operator", OPERATION)], NOW * 1000)
        yield opened


@pytest.fixture
def loop(tmp_path: Path, ledger: Ledger) -> Iterator[Loop]:
    made = Loop(tmp_path)
    yield made
    made.reader.close()
    made.selector.close()


def page(asker: str = "operator", **filters: object) -> FindCertificates:
    return FindCertificates(asker, MAX_REPLY, Filter(**filters), NOW)  # type: ignore[arg-type]


def test_each_kind_of_lookup_has_the_shape_that_the_api_reads(loop: Loop, ledger: Ledger) -> None:
    found = loop.ask(page())
    assert isinstance(found, CertificatePage)
    assert [row.serial for row in found.certificates] == ["2", "1"]
    assert found.before is None
    one = loop.ask(FindCertificate("operator", MAX_REPLY, 2, None, NOW))
    assert isinstance(one, CertificateDetails)
    assert (one.identity, one.recorded.seq, one.reason) == ("operator", 2, None)
    operations = loop.ask(FindOperations("operator", MAX_REPLY, None, None, 50))
    assert isinstance(operations, OperationPage)
    assert [row.reason for row in operations.operations] == ["ß"]
    limited = loop.ask(page(limit=1))
    assert isinstance(limited, CertificatePage)
    assert limited.before == "2"


def test_a_page_holds_what_was_recorded_a_moment_before(loop: Loop, ledger: Ledger) -> None:
    for serial in range(3, 60):
        ledger.commit([issued(serial)], NOW * 1000 + serial)
        found = loop.ask(page(limit=1))
        assert isinstance(found, CertificatePage)
        assert found.certificates[0].serial == str(serial)
        if serial % 5 == 0:
            fold_all(ledger)


def test_another_identitys_certificate_is_not_found(loop: Loop) -> None:
    for serial in (2, 99):
        with pytest.raises(SignerError) as caught:
            loop.ask(FindCertificate("deploy-agent", MAX_REPLY, serial, "deploy-agent", NOW))
        assert caught.value.code == "unknown_serial"
        assert str(serial) in caught.value.text


def test_an_error_of_the_ledger_is_a_reply(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).rename(tmp_path / "away")
    with pytest.raises(SignerError) as caught:
        loop.ask(page())
    assert caught.value.code == "ledger_missing"
    (tmp_path / "away").rename(tmp_path / FILE_NAME)
    assert isinstance(loop.ask(page()), CertificatePage)


def test_a_lookup_that_fails_unexpectedly_is_an_error_and_no_end() -> None:
    store = MemoryStore()
    store.commit([Event("operation.recorded", "operator", {"operation": "cutover"})], 1)
    message = encode_lookup(FindOperations("operator", MAX_REPLY, None, None, 9))
    with pytest.raises(SignerError) as caught:
        decode_reply(answer_lookup(message, store))
    assert caught.value.code == "ledger_tables_differ"


def test_a_process_that_is_killed_is_replaced(loop: Loop) -> None:
    first = loop.pid()
    os.kill(first, signal.SIGKILL)
    with pytest.raises(SignerError) as caught:
        loop.ask(page())
    assert caught.value.code == "reader_gone"
    assert isinstance(loop.ask(page()), CertificatePage)
    assert loop.pid() != first


def test_a_process_that_hangs_is_replaced_after_the_deadline(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.ask(page())
    monkeypatch.setattr(reader_module, "DEADLINE", 0.3)
    monkeypatch.setattr(helper_process, "RESTART_PAUSE", 0.1)
    os.kill(loop.pid(), signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(SignerError) as caught:
        loop.ask(page())
    assert caught.value.code == "reader_gone"
    assert 0.3 <= time.monotonic() - start < 60, "the machine may be busy"
    monkeypatch.undo()
    assert isinstance(loop.ask(page()), CertificatePage)


def test_an_identity_may_wait_with_so_many_lookups_and_no_more(loop: Loop) -> None:
    for number in range(MAX_WAITING):
        loop.reader.submit(f"mine {number}", page("ann"))
    with pytest.raises(Refused) as caught:
        loop.reader.submit("one more", page("ann"))
    assert caught.value.code == "too_many_lookups"
    assert isinstance(loop.ask(page("bob"), "theirs"), CertificatePage)
    assert len(loop.replies) < MAX_WAITING, "another identity waits for all of them"
    left = loop.reader.close()
    assert len(left) + len(loop.replies) == MAX_WAITING


def test_who_asks_without_pause_gets_its_share_and_others_wait_for_nothing(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.ask(page())
    monkeypatch.setattr(reader_module, "BURST", 0.01)
    monkeypatch.setattr(reader_module, "SHARE", 0.05)
    done = 0
    start = time.monotonic()
    waited = []
    while time.monotonic() < start + 1.5:
        if f"greedy {done}" in loop.replies or done == 0:
            done += 1
            loop.reader.submit(f"greedy {done}", page("greedy", limit=200))
        if done % 3 == 0:
            asked = time.monotonic()
            loop.ask(page("patient"), f"patient {time.monotonic()}")
            waited.append(time.monotonic() - asked)
            time.sleep(0.2)
        loop.turn()
    free = time.monotonic()
    monkeypatch.undo()
    for number in range(50):
        loop.ask(page(f"other {number}", limit=200))
    each = (time.monotonic() - free) / 50
    assert done * each < 0.5 * 1.5, "an identity took half of the time"
    assert done > 1
    assert waited
    assert max(waited) < reader_module.DEADLINE, "the other waits for nothing"


def test_the_process_ends_with_its_keepers_end_of_the_connection(loop: Loop) -> None:
    loop.ask(page())
    process = loop.reader._helper.process
    assert process is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    assert isinstance(loop.ask(page()), CertificatePage), "signals to the whole group do not end it first"
    loop.reader._helper.disconnect()
    assert process.wait(timeout=60) == 0


@missing.needs_root
def test_the_process_gets_no_setting_and_no_descriptor_of_the_keeper(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNER_VAULT_TOKEN_FILE", "/secret")
    loop = Loop(tmp_path)
    try:
        environ = Path(f"/proc/{loop.pid()}/environ")
        assert b"SIGNER_" not in environ.read_bytes()
        links = []
        for path in Path(f"/proc/{loop.pid()}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since: it is still importing
                links.append(os.readlink(path))  # noqa: PTH115
        assert sum(link.startswith("socket:") for link in links) == 1
    finally:
        loop.reader.close()
        loop.selector.close()
