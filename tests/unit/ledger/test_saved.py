"""A saved checkpoint is believed only if it is one of this ledger, and as many witnesses as asked for say so lately."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import BadNote, LedgerBroken, NotFound, SignerError, Unavailable
from signer.ledger.audit import verify
from signer.ledger.checkpoint import (
    CLOCK_TOLERANCE,
    COSIGNATURE_KIND,
    NOTE_KIND,
    Checkpoint,
    Demand,
    Note,
    SavedCheckpoint,
    VerifierKey,
    check_note,
    cosign,
    parse_checkpoint,
    parse_note,
    read_saved,
    sign_note,
)
from signer.ledger.fold import fold_all
from signer.ledger.origin import ledger_keys, origins
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.ledger.store import Ledger
from signer.ledger.tree import CompactRange, check_consistency
from signer.model import Event
from signer.service.checkpoints import Checkpoints
from tests.parts.events import refused
from tests.parts.witnessed import (
    COSIGNED_AT,
    LOG,
    WITNESS,
    WITNESS_KEY,
    checkpoint_of,
    made_key,
    record_key,
    rewrite,
)

ORIGIN = "signer.example.org/ledger"
NOW = COSIGNED_AT + 600
SECOND = made_key("second")
SECOND_KEY = VerifierKey("second.example.org", COSIGNATURE_KIND, SECOND.raw_public)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path)) as opened:
        opened.commit([refused(str(number)) for number in range(400)], 1_740_000_000_000)
        record_key(opened)
        yield opened


def saved(ledger: Ledger, data: bytes, demand: Demand | None = None, now: int = NOW) -> SavedCheckpoint:
    known = origins(ledger, ORIGIN)
    return read_saved(data, known, ledger_keys(ledger, known[-1]), demand or Demand(), now)


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(SignerError) as caught:
        action()
    return caught.value.code


# --- whose checkpoint it is ---------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_ledger_is_read_and_agrees_with_the_events(ledger: Ledger, tmp_path: Path) -> None:
    data = checkpoint_of(ledger, ORIGIN)
    found = saved(ledger, data, Demand((WITNESS_KEY,), 1, 3_600))
    assert (found.checkpoint.origin, found.checkpoint.size) == (ORIGIN, 401)
    assert found.cosigned == {"witness.example.org": COSIGNED_AT}
    ledger.commit([refused("later")], 1_740_000_900_000)
    assert verify(LedgerReader(tmp_path), checkpoint=found.checkpoint).seq == 402


def test_another_origin_key_or_signature_is_refused(ledger: Ledger) -> None:
    assert code_of(lambda: saved(ledger, checkpoint_of(ledger, "other.example.org"))) == "checkpoint_of_another_log"
    foreign = checkpoint_of(ledger, ORIGIN, key=SECOND)
    assert code_of(lambda: saved(ledger, foreign)) == "note_not_signed"
    good = parse_note(checkpoint_of(ledger, ORIGIN))
    larger = Note(good.text.replace("\n401\n", "\n402\n"), good.signatures).render()
    assert code_of(lambda: saved(ledger, larger)) == "note_signature_wrong"
    for data in (good.render() + b"\n", good.render()[:-1], good.text.encode(), b""):
        assert code_of(lambda data=data: saved(ledger, data)) == "note_malformed"  # type: ignore[misc]


def test_a_line_more_in_the_text_is_refused_although_the_log_signed_it(ledger: Ledger) -> None:
    text = parse_note(checkpoint_of(ledger, ORIGIN)).text + "more\n"
    key = VerifierKey(ORIGIN, NOTE_KIND, LOG.raw_public)
    data = Note(text, (sign_note(text, key, LOG.sign),)).render()
    assert code_of(lambda: saved(ledger, data)) == "checkpoint_malformed"


def test_a_checkpoint_of_an_earlier_key_stays_good(ledger: Ledger) -> None:
    before = checkpoint_of(ledger, ORIGIN)
    record_key(ledger, SECOND, 1_740_000_800_000)
    after = checkpoint_of(ledger, ORIGIN, key=SECOND)
    assert [saved(ledger, data).checkpoint.size for data in (before, after)] == [401, 402]


# --- who cosigned it ----------------------------------------------------------------------------------------------


def both(ledger: Ledger, first: int, second: int) -> bytes:
    note = parse_note(checkpoint_of(ledger, ORIGIN, at=first))
    return note.with_signatures([cosign(note.text, second, SECOND_KEY, SECOND.sign)]).render()


def test_a_quorum_of_young_cosignatures_is_asked_for(ledger: Ledger) -> None:
    witnesses = (WITNESS_KEY, SECOND_KEY)
    data = both(ledger, NOW - 100, NOW - 7_200)
    assert len(saved(ledger, data, Demand(witnesses, 2)).cosigned) == 2
    assert len(saved(ledger, data, Demand(witnesses, 1, 3_600)).cosigned) == 2
    assert code_of(lambda: saved(ledger, data, Demand(witnesses, 2, 3_600))) == "checkpoint_too_old"
    alone = checkpoint_of(ledger, ORIGIN)
    assert code_of(lambda: saved(ledger, alone, Demand(witnesses, 2))) == "checkpoint_not_cosigned"
    assert code_of(lambda: saved(ledger, checkpoint_of(ledger, ORIGIN, at=None), Demand(witnesses, 1))) == (
        "checkpoint_not_cosigned"
    )


@pytest.mark.parametrize("age, is_good", [(3_599, True), (3_600, True), (3_601, False), (-300, True), (-301, False)])
def test_ages_at_the_limit(ledger: Ledger, age: int, is_good: bool) -> None:
    assert CLOCK_TOLERANCE == 300
    data = checkpoint_of(ledger, ORIGIN, at=NOW - age)
    demand = Demand((WITNESS_KEY,), 1, 3_600)
    if is_good:
        saved(ledger, data, demand)
    else:
        expected = "checkpoint_too_old" if age > 0 else "checkpoint_not_cosigned"
        assert code_of(lambda: saved(ledger, data, demand)) == expected


def test_a_forged_cosignature_refuses_the_whole_file(ledger: Ledger) -> None:
    note = parse_note(checkpoint_of(ledger, ORIGIN))
    forged = note.with_signatures([cosign(note.text, NOW, WITNESS_KEY, SECOND.sign)]).render()
    assert code_of(lambda: saved(ledger, forged, Demand((WITNESS_KEY, SECOND_KEY), 1))) == "note_signature_wrong"


# --- the drill: root writes another history -----------------------------------------------------------------------


@pytest.mark.parametrize("forged", [1, 200, 400])
def test_a_ledger_rewritten_with_valid_hashes_and_the_ledger_key_is_found(tmp_path: Path, forged: int) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([refused(str(number)) for number in range(400)], 1_740_000_000_000)
        record_key(ledger)
        data = checkpoint_of(ledger, ORIGIN)
    rewrite(tmp_path, {forged: {"code": "forged"}})
    with closing(Ledger(tmp_path)) as ledger:
        assert verify(ledger).seq == 401, "the hash chain alone does not show it"
        found = saved(ledger, data, Demand((WITNESS_KEY,), 1, 3_600))
        with pytest.raises(LedgerBroken) as caught:
            verify(ledger, checkpoint=found.checkpoint)
        assert caught.value.code == "ledger_differs_from_checkpoint"
        # What the thief signs with the stolen key no witness has seen: the forged history has no cosignature.
        stolen = checkpoint_of(ledger, ORIGIN, at=None)
        assert code_of(lambda: saved(ledger, stolen, Demand((WITNESS_KEY,), 1))) == "checkpoint_not_cosigned"
        moved = parse_note(stolen).with_signatures([parse_note(data).signatures[1]]).render()
        assert code_of(lambda: saved(ledger, moved, Demand((WITNESS_KEY,), 1))) == "note_signature_wrong"


def test_a_shorter_ledger_is_found(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        record_key(ledger)
        ledger.commit([refused(str(number)) for number in range(300)], 1_740_000_600_000)
        data = checkpoint_of(ledger, ORIGIN)
    rewrite(tmp_path, {}, keep=200)
    with closing(Ledger(tmp_path)) as ledger:
        found = saved(ledger, data)
        with pytest.raises(LedgerBroken, match="it ends at event 200, but the checkpoint has 301 events"):
            verify(ledger, checkpoint=found.checkpoint)


# --- names --------------------------------------------------------------------------------------------------------


def test_a_ledger_has_a_name_by_itself_and_a_new_one_after_each_restore(ledger: Ledger, tmp_path: Path) -> None:
    (digest,) = ledger.query("SELECT hash FROM events WHERE seq = 1")[0]
    assert origins(ledger, None) == [f"signer-ledger/{digest[:16]}"]
    before = checkpoint_of(ledger, ORIGIN)
    lost = {"seq": 500, "hash": "0" * 64}
    body: dict[str, object] = {"lost_head": lost, "first_serial": "1", "last_serial": "1000", "ca": None}
    (restored,) = ledger.commit([Event("ledger.restored", "operator", body)], 1_740_000_900_000)
    new = f"{ORIGIN}/restored-402-{restored.hash[:8]}"
    assert origins(ledger, ORIGIN) == [ORIGIN, new]
    assert parse_checkpoint(parse_note(checkpoint_of(ledger, ORIGIN)).text).origin == new
    found = saved(ledger, before)
    assert verify(LedgerReader(tmp_path), checkpoint=found.checkpoint).seq == 402, "the part that was kept still agrees"
    for size in (402, 500):
        gone = Checkpoint(ORIGIN, size, bytes(32))
        assert code_of(lambda gone=gone: verify(LedgerReader(tmp_path), checkpoint=gone)) == "ledger_head_lost"  # type: ignore[misc]


def test_an_empty_ledger_has_no_name_yet(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        assert code_of(lambda: origins(ledger, None)) == "checkpoint_not_ready"
        assert origins(ledger, ORIGIN) == [ORIGIN]
        assert ledger_keys(ledger, ORIGIN) == []


@pytest.mark.parametrize("line", ["", "ssh-ed25519", "ssh-ed25519 ä", "ssh-ed25519 AAAA", "ssh-rsa AAAA x"])
def test_a_line_that_is_no_key_is_none(tmp_path: Path, line: str) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([Event("ledger.key", "keeper", {"public_key": line})], 0)
        assert ledger_keys(ledger, ORIGIN) == []


# --- what the keeper gives out ------------------------------------------------------------------------------------


def test_the_keeper_signs_each_size_once(ledger: Ledger) -> None:
    given = Checkpoints(ledger, LOG, ORIGIN)
    with pytest.raises(Unavailable) as caught:
        given.newest(None)
    assert caught.value.code == "checkpoint_not_ready"
    head = fold_all(ledger)
    first = given.newest(head)
    assert given.newest(head) is first
    note = parse_note(first.encode())
    check_note(note, ledger_keys(ledger, ORIGIN)[-1])
    assert first.encode() == checkpoint_of(ledger, ORIGIN, at=None)
    ledger.commit([refused("one more")], 1_740_000_900_000)
    assert given.newest(head) is first, "an event counts once it is folded"
    with pytest.raises(Unavailable, match="event 402 was folded from another ledger"):
        given.newest(head._replace(seq=402))
    assert parse_checkpoint(parse_note(given.newest(fold_all(ledger)).encode()).text).size == 402


def test_a_proof_leads_from_each_size_to_each_later_one(ledger: Ledger, tmp_path: Path) -> None:
    fold_all(ledger)
    ledger.commit([refused(f"late {number}") for number in range(200)], 1_740_000_900_000)  # not folded yet
    with closing(CertificateReader(tmp_path)) as reader:
        hashes = [digest for (digest,) in reader.query("SELECT hash FROM events ORDER BY seq")]
        roots, tree = {0: CompactRange().root()}, CompactRange()
        for size, digest in enumerate(hashes, 1):
            tree.append(bytes.fromhex(digest))
            roots[size] = tree.root()
        for old in (0, 1, 255, 256, 257, 401, 402, 512, 600, 601):
            for new in (size for size in (256, 401, 402, 512, 600, 601) if size >= old):
                check_consistency(old, roots[old], new, roots[new], reader.consistency(old, new))
        with pytest.raises(NotFound) as caught:
            reader.consistency(1, 602)
        assert caught.value.code == "tree_size_unknown"


def test_a_fork_of_one_size_has_no_proof(ledger: Ledger, tmp_path: Path) -> None:
    """Two checkpoints of one size with different roots, both signed: what a witness keeps as evidence."""
    good = parse_checkpoint(parse_note(checkpoint_of(ledger, ORIGIN)).text)
    forked = Checkpoint(ORIGIN, good.size, bytes(32))
    with closing(CertificateReader(tmp_path)) as reader, pytest.raises(SignerError):
        check_consistency(good.size, good.root, forked.size, forked.root, reader.consistency(good.size, forked.size))


def test_the_witness_s_key_is_not_the_log_s() -> None:
    with pytest.raises(BadNote):
        check_note(Note("a\n", (cosign("a\n", NOW, WITNESS_KEY, WITNESS.sign),)), VerifierKey("a", 1, LOG.raw_public))
