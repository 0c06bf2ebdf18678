"""Each blocker alone stands in the way of removing Vault, with its code, what was found and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from signer.error_catalogue import CATALOGUE
from signer.errors import SignerError
from signer.migration.config import CutoverFile, decommission_of
from signer.migration.decommission.blockers import Blocker, Checks, LedgerFacts, blockers
from signer.vault.audit_log import BrokenLine, Client, Gap, Signature
from signer.vault.inventory import SNAPSHOT, AuditDevice, Inventory, KvEntries, Mount, Server, Unread
from tests.parts.removal import AUDIT, CHECKS, CLEAR, CUT_OVER, FILE, HOUR, LEDGER, NOW, OWN
from tests.parts.source import called_with, texts

FAULT = SignerError("smoke_login_failed", "edge1: no login", "see edge1")


def found(
    inventory: Inventory = CLEAR,
    ledger: LedgerFacts = LEDGER,
    checks: Checks = CHECKS,
    file: CutoverFile = FILE,
    now: int = NOW,
) -> list[Blocker]:
    return blockers(inventory, ledger, checks, file, now)


def test_nothing_stands_in_the_way_of_a_clear_one() -> None:
    assert found() == []


def audited(**changes: Any) -> Checks:
    return replace(CHECKS, audit=replace(AUDIT, **changes))


def switched(at: int) -> LedgerFacts:
    """The service signed by itself since then, and was looked at for some seconds more."""
    assert LEDGER.cutover is not None
    return replace(LEDGER, cutover=replace(LEDGER.cutover, local_since=at))


def test_vault_may_sign_until_the_service_does_it_by_itself() -> None:
    last = audited(signatures=(Signature("ssh/", "llmops", CUT_OVER - 3),))
    assert found(ledger=switched(CUT_OVER - 3), checks=last) == []


ONE = Server("one", "a:8201", "http://a:8200")
NAMED = replace(FILE, vault=replace(FILE.vault, address="http://a:8200"))


def wanting(file: CutoverFile = FILE, **changes: Any) -> CutoverFile:
    return replace(file, decommission=replace(decommission_of(file), **changes))


def test_audit_5_without_an_audit_log_the_clock_that_judges_the_soak_is_compared_with_two_others() -> None:
    """80 hours ahead passed a soak of 72; a minute is let pass."""
    for name in ("Vault", "the service"):
        for skew in (288_000, 61, 60, -60, -61):
            told = found(checks=replace(CHECKS, audit=None, clocks={"Vault": 0, "the service": 0} | {name: skew}))
            assert [one.code for one in told if one.code == "clocks_differ"] == ["clocks_differ"] * (abs(skew) > 60)


PARTIAL = (AuditDevice("file/", "file", file_path="/a.log", is_partial=True),)


def test_audit_5_a_node_that_is_named_and_a_single_one_are_in_nobodys_way() -> None:
    two = (ONE, Server("two", "b:8201", "http://b:8200/"))
    assert found(replace(CLEAR, servers=two), file=wanting(NAMED, other_nodes=("http://b:8200",))) == []
    assert found(replace(CLEAR, servers=(replace(ONE, api="http://elsewhere"),)), file=NAMED) == []


def test_audit_5_a_gap_that_the_operator_answers_for_is_none() -> None:
    gap = Gap(CUT_OVER, CUT_OVER + HOUR, "")
    accepted = wanting(audit_gaps=((CUT_OVER - 1, CUT_OVER + HOUR),))
    assert found(checks=audited(gaps=(gap,)), file=accepted) == []
    assert len(found(checks=audited(gaps=(replace(gap, end=gap.end + 1),)), file=accepted)) == 1


def test_audit_5_a_device_of_another_file_may_leave_entries_out() -> None:
    whole = AuditDevice("whole/", "file", file_path="/a.log")
    other = replace(PARTIAL[0], file_path="/b.log")
    assert found(replace(CLEAR, audit_devices=(whole, other)), file=wanting(audit_log=Path("/a.log"))) == []


ALONE: dict[str, tuple[str, Callable[[], list[Blocker]], str]] = {
    "no cutover": ("no_cutover", lambda: found(ledger=replace(LEDGER, cutover=None)), "no successful cutover"),
    "evidence": (
        "evidence_broken",
        lambda: found(checks=replace(CHECKS, evidence=("evidence_file_changed: plan.json",))),
        "evidence_file_changed: plan.json",
    ),
    "rolled back": ("rolled_back_since", lambda: found(ledger=replace(LEDGER, rolled_back=51)), "event 51"),
    "clocks": (
        "clocks_differ",
        lambda: found(checks=replace(CHECKS, clocks={"Vault": 61, "the service": -60})),
        "that of Vault by +61 s",
    ),
    "clock ahead": (
        "clocks_differ",
        lambda: found(checks=replace(CHECKS, audit=None, clocks={"Vault": -288_000, "the service": -288_000})),
        "the service by -288,000 s",
    ),
    "ssh mount": (
        "ssh_mount_missing",
        lambda: found(replace(CLEAR, mounts=tuple(m for m in CLEAR.mounts if m.type != "ssh"))),
        "does not list an SSH mount ssh/",
    ),
    "other nodes": (
        "other_nodes",
        lambda: found(replace(CLEAR, servers=(ONE, Server("two", "b:8201", "http://b:8200"))), file=NAMED),
        "2 nodes, and cutover.toml does not name two at http://b:8200",
    ),
    "a node that is down": (
        "other_nodes",
        lambda: found(replace(CLEAR, servers=(ONE, Server("two", "b:8201", ""))), file=NAMED),
        "two at b:8201 (not running)",
    ),
    "a line that is no entry": (
        "inventory_incomplete",
        lambda: found(checks=audited(broken=1, broken_lines=(BrokenLine("audit.log.1", 7, "vault: {"),))),
        "audit.log.1 line 7, not an entry: vault: {",
    ),
    "many lines that are no entry": (
        "inventory_incomplete",
        lambda: found(checks=audited(broken=9, broken_lines=(BrokenLine("audit.log.1", 7, "vault: {"),))),
        "8 more lines",
    ),
    "a gap": (
        "inventory_incomplete",
        lambda: found(checks=audited(gaps=(Gap(CUT_OVER, CUT_OVER + HOUR, "no file between a and b"),))),
        "no file between a and b",
    ),
    "no audit device": (
        "inventory_incomplete",
        lambda: found(replace(CLEAR, audit_devices=()), file=wanting(audit_log=Path("/a.log"))),
        "no audit device",
    ),
    "a device that leaves out": (
        "inventory_incomplete",
        lambda: found(replace(CLEAR, audit_devices=PARTIAL), file=wanting(audit_log=Path("/a.log"))),
        "the options of file/ leave entries out",
    ),
    "soak": (
        "soak_not_over",
        lambda: found(now=CUT_OVER + 71 * HOUR, checks=replace(CHECKS, audit=None)),
        "1h of 3d left",
    ),
    "not local": ("not_local", lambda: found(ledger=replace(LEDGER, mode="vault")), "mode vault"),
    "not ready": ("not_local", lambda: found(ledger=replace(LEDGER, mode="")), "not ready"),
    "signed, ledger": (
        "vault_signed_since",
        lambda: found(ledger=replace(LEDGER, vault_signed=(51, CUT_OVER + 5))),
        "event 51 of the ledger",
    ),
    "signed, audit log": (
        "vault_signed_since",
        lambda: found(checks=audited(signatures=(Signature("ssh/", "llmops", CUT_OVER + 1),))),
        "role llmops of ssh/",
    ),
    "signed before the cutover was at its end": (
        "vault_signed_since",
        lambda: found(
            ledger=switched(CUT_OVER - 3),
            checks=audited(signatures=(Signature("ssh/", "llmops", CUT_OVER - 2),)),
        ),
        "role llmops of ssh/",
    ),
    "valid, ledger": (
        "vault_certificate_valid",
        lambda: found(ledger=replace(LEDGER, vault_valid_until=NOW + 1)),
        "may be valid until",
    ),
    "valid, by the role": (
        "vault_certificate_valid",
        lambda: found(
            now=CUT_OVER + 1790, file=wanting(soak=0),
            checks=audited(signatures=(Signature("ssh/", "llmops", CUT_OVER - 5),), last_at=CUT_OVER + 1790),
        ),
        "may be valid until",
    ),
    "valid, by the mount": (
        "vault_certificate_valid",
        lambda: found(checks=audited(signatures=(Signature("ssh/", "open", CUT_OVER - 5),))),
        "may be valid until",
    ),
    "clients": (
        "other_clients",
        lambda: found(checks=audited(clients=(Client("userpass-dave", "login at auth/userpass/", NOW - 50, 3),))),
        "userpass-dave: login at auth/userpass/, 3 times",
    ),
    "secrets": (
        "secrets_left",
        lambda: found(replace(CLEAR, kv=(KvEntries("kv/", 2, ("a/b/c",)),))),
        "1 in kv/ (a/b/c)",
    ),
    "mounts": (
        "mounts_left",
        lambda: found(replace(CLEAR, mounts=(*CLEAR.mounts, Mount("kv/", "kv", 2), Mount("ssh2/", "ssh")))),
        "kv/ (kv), ssh2/ (ssh)",
    ),
    "another engine at its path": (
        "mounts_left",
        lambda: found(replace(CLEAR, mounts=(Mount("ssh/", "transit"),))),
        "ssh/ (transit)",
    ),
    "namespaces": ("mounts_left", lambda: found(replace(CLEAR, namespaces=("team/",))), "team/ (namespace)"),
    "unread": (
        "inventory_incomplete",
        lambda: found(replace(CLEAR, unread=(Unread("kv/a/", "vault_forbidden"),))),
        "kv/a/ (vault_forbidden)",
    ),
    "audit log unread": (
        "inventory_incomplete",
        lambda: found(checks=replace(CHECKS, audit=None, audit_fault=SignerError("audit_log_unreadable", "not there"))),
        "audit_log_unreadable",
    ),
    "audit log too short": (
        "inventory_incomplete",
        lambda: found(checks=audited(first_at=CUT_OVER + 1)),
        "begins after the cutover",
    ),
    "audit log old": ("inventory_incomplete", lambda: found(checks=audited(last_at=NOW - 2 * HOUR)), "where it ends"),
    "audit log empty": ("inventory_incomplete", lambda: found(checks=audited(entries=0)), "is empty"),
    "smoke": ("smoke_fails", lambda: found(checks=replace(CHECKS, smoke=FAULT)), "edge1: no login"),
    "storage": ("no_snapshot", lambda: found(replace(CLEAR, storage="file")), "the storage is file"),
    "snapshot file": (
        "no_snapshot",
        lambda: found(checks=replace(CHECKS, snapshot=SignerError("snapshot_differs", "another file", "a new one"))),
        "another file",
    ),
    "command": ("command_missing", lambda: found(checks=replace(CHECKS, missing=("systemclt",))), "systemclt"),
    "token rights": (
        "admin_token_unfit",
        lambda: found(replace(CLEAR, own_token=replace(OWN, lacks=("sys/seal",)))),
        "may not use sys/seal",
    ),
    "token parent": (
        "admin_token_unfit",
        lambda: found(replace(CLEAR, own_token=replace(OWN, is_orphan=False))),
        "has a parent",
    ),
    "token ends": ("admin_token_unfit", lambda: found(replace(CLEAR, own_token=replace(OWN, ttl=59))), " in 59s"),
    "token uses": ("admin_token_unfit", lambda: found(replace(CLEAR, own_token=replace(OWN, uses=9))), "is limited"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
def test_one_thing_in_the_way_is_one_blocker(case: str) -> None:
    code, look, words = ALONE[case]
    (blocker,) = look()
    assert blocker.code == code
    assert words in blocker.what
    assert blocker.do


def test_every_blocker_of_the_code_is_tried_and_told() -> None:
    real = {code for _, argument in called_with({"Blocker"}) for code in texts(argument)}
    assert {code for code, _, _ in ALONE.values()} == real
    assert {entry.code for entry in CATALOGUE.values() if entry.subject == "Decommission blockers"} == real


def test_the_soak_is_over_in_its_last_second_and_not_before() -> None:
    end = CUT_OVER + 72 * HOUR
    without_log = replace(CHECKS, audit=None)
    assert [one.code for one in found(now=end - 1, checks=without_log)] == ["soak_not_over"]
    assert found(now=end, checks=without_log) == []


def test_a_rollback_before_the_cutover_is_no_matter() -> None:
    assert found(ledger=replace(LEDGER, rolled_back=49)) == []


def test_signatures_of_other_engines_are_not_the_ssh_engines() -> None:
    assert found(checks=audited(signatures=(Signature("pki/", "web", NOW - 1),))) == []


def test_a_snapshot_file_makes_up_for_storage_and_right() -> None:
    given = wanting(snapshot_file=Path("/srv/snap"))
    own = replace(OWN, lacks=(SNAPSHOT,))
    assert found(replace(CLEAR, storage="file", own_token=own), file=given) == []
    assert [one.code for one in found(replace(CLEAR, own_token=own))] == ["admin_token_unfit"]


def test_many_names_are_counted_and_some_shown() -> None:
    kv = KvEntries("kv/", 1, tuple(f"name-{number:04}" for number in range(1500)))
    (blocker,) = found(replace(CLEAR, kv=(kv,)))
    assert "1500 in kv/" in blocker.what
    assert "and 1,480 more" in blocker.what


def test_the_inventory_tells_no_accessor_of_ours() -> None:
    told = json.dumps(CLEAR.as_json())
    assert OWN.accessor not in told
    assert OWN.hashes[0] not in told
    assert json.loads(told)["own_token"] == {"ttl": 0, "orphan": True, "lacks": []}
