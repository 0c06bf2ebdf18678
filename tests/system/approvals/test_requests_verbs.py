"""An agent asks, humans decide with `signer` and a FIDO key in their agent, and the ledger proves it later."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from signer.ledger.store import Ledger
from signer.model import Event
from tests.parts import missing
from tests.parts.deciders import Deciders, deciders
from tests.parts.fido import PRESENT
from tests.parts.keys import KeyRing, ssh_keygen

pytestmark = missing.needs_ssh_keygen


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[Deciders]:
    with deciders(tmp_path_factory.mktemp("humans"), keyring) as found:
        yield found


def test_an_approved_request_gets_exactly_what_was_shown(people: Deciders, tmp_path: Path) -> None:
    request = people.request(critical_options={"force-command": "systemctl restart queue"})
    listed = people.signer("anna", "requests", "list")
    assert request in listed.stdout
    assert "systemctl restart queue" in listed.stdout
    shown = people.signer("anna", "requests", "show", request).stdout.splitlines()
    assert shown[2] == "  runs only `systemctl restart queue` on every host that accepts principal llmops"
    assert "  reason: restart the queue, ticket 812" in shown
    assert people.ask(critical_options={"force-command": "systemctl restart queue"}).status == 202
    done = people.approve("anna", request)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        f"{request} is approved: needs 1, given by anna with {people.keys['anna'].fingerprint}"
    )
    answer = people.ask(critical_options={"force-command": "systemctl restart queue"})
    assert answer.status == 201, answer.body
    certificate = tmp_path / "id-cert.pub"
    certificate.write_text(answer.json()["certificate"])
    # What `show` said of the certificate is what `ssh-keygen -L` says of it.
    real = [line.strip() for line in ssh_keygen("-L", "-f", certificate).splitlines()]
    for line in ("llmops", "force-command systemctl restart queue", "permit-pty", 'Key ID: "deploy-agent:prod"'):
        assert line in [text.strip() for text in shown]
        assert line in real


def test_the_ledger_proves_it_without_the_service(people: Deciders) -> None:
    request = people.request(reason="one more restart")
    assert people.approve("ben", request).returncode == 0
    assert people.ask(reason="one more restart").status == 201
    policy = str(people.service.policy_file)
    found = people.json("anna", "ledger", "verify", "--approvals", "--policy", policy)["approvals"]
    assert found["problems"] == []
    assert found["policies_not_given"] == {}
    row = next(row for row in found["keys"] if row["approver"] == "ben")
    assert row == {"approver": "ben", "key": people.keys["ben"].fingerprint, "approvals": 1, "confirmed": True}
    without = people.json("anna", "ledger", "verify", "--approvals")["approvals"]
    assert without["problems"] == []
    assert without["signatures"] == found["signatures"]
    assert not any(row["confirmed"] for row in without["keys"])
    assert sum(without["policies_not_given"].values()) == without["certificates"]


def test_a_signature_without_a_touch_is_refused(people: Deciders) -> None:
    request = people.request(reason="without a touch")
    people.keys["anna"].flags = 0
    try:
        done = people.approve("anna", request)
    finally:
        people.keys["anna"].flags = PRESENT
    assert done.returncode == 1
    assert "the signature was made without a touch of the key" in done.stderr
    assert people.json("anna", "requests", "show", request)["state"] == "pending"


def test_the_key_of_another_is_refused(people: Deciders, tmp_path: Path) -> None:
    request = people.request(reason="with another's key")
    people.agents["anna"], people.agents["ben"] = people.agents["ben"], people.agents["anna"]
    try:
        done = people.approve("anna", request)
    finally:
        people.agents["anna"], people.agents["ben"] = people.agents["ben"], people.agents["anna"]
    assert done.returncode == 1
    assert "which is not among anna's approval_keys" in done.stderr
    public = tmp_path / "anna.pub"
    public.write_text(people.keys["anna"].line + "\n")
    named = people.approve("anna", request, "--key", str(public))
    assert named.returncode == 0, named.stderr


def test_nothing_is_signed_unless_a_human_says_yes(people: Deciders) -> None:
    request = people.request(reason="without a terminal")
    done = people.signer("anna", "requests", "approve", request)
    assert done.returncode == 3
    assert "there is no terminal to ask at" in done.stderr
    assert people.json("anna", "requests", "show", request)["approvals"] == []


def test_nobody_approves_their_own_and_no_agent_approves(people: Deciders) -> None:
    own = people.request(who="anna", reason="my own request")
    done = people.approve("anna", own)
    assert "nobody approves their own request" in done.stderr
    assert people.approve("ben", own).returncode == 0
    request = people.request(reason="approved by an agent")
    people.agents["stranger"] = people.agents["anna"]
    try:
        refused = people.approve("stranger", request)
    finally:
        del people.agents["stranger"]
    assert refused.returncode == 1
    assert "there is no request" in refused.stderr


def test_a_denied_request_says_who_and_why(people: Deciders) -> None:
    request = people.request(reason="to be denied")
    done = people.signer("ben", "requests", "deny", request, "--reason", "not during the sale")
    assert done.stdout == f"{request} is denied\n"
    assert "denied by ben: not during the sale" in people.signer("anna", "requests", "show", request).stdout
    late = people.approve("anna", request)
    assert late.returncode == 1
    assert f"{request} is denied" in late.stderr
    answer = people.ask(reason="to be denied")
    assert (answer.status, answer.json()["code"]) == (403, "request_denied")


def test_a_waiver_covers_the_same_ask_until_it_is_ended(people: Deciders) -> None:
    fields: dict[str, Any] = {"principals": ["backup"], "reason": "first of many"}
    request = people.request(**fields)
    assert people.approve("anna", request, "--waive", "1h", "--uses", "3").returncode == 0
    assert people.ask(**fields).status == 201
    again = people.ask(**fields | {"reason": "the next one"})
    assert again.status == 201, again.body
    (waiver,) = people.json("anna", "waivers", "list")["waivers"]
    assert (waiver["identity"], waiver["used"], waiver["uses"]) == ("deploy-agent", 1, 3)
    assert "1 of 3" in people.signer("anna", "waivers", "list").stdout
    done = people.signer("anna", "waivers", "end", waiver["waiver"], "--reason", "done")
    assert done.stdout == f"{waiver['waiver']} is ended\n", done.stderr
    assert people.ask(**fields | {"reason": "one too many"}).status == 202
    policy = str(people.service.policy_file)
    assert people.signer("anna", "ledger", "verify", "--approvals", "--policy", policy).returncode == 0


def test_what_differs_from_the_last_certificate_is_shown(people: Deciders) -> None:
    first = people.request(reason="to compare with")
    assert people.approve("anna", first).returncode == 0
    assert people.ask(reason="to compare with").status == 201
    wider = people.request(principals=["backup", "llmops"], ttl=60, reason="to compare")
    shown = people.signer("anna", "requests", "show", wider).stdout
    assert "  principals: backup, llmops; was llmops" in shown
    assert "  ttl: 1m; was 15m" in shown
    unread = people.signer("ben", "requests", "show", wider).stdout
    assert "your token may not read the ledger" in unread


def test_watch_tells_of_each_request_once_and_of_its_end(people: Deciders) -> None:
    request = people.request(reason="to be watched")
    lines = people.signer("anna", "requests", "watch", "--for", "1s").stdout.splitlines()
    assert sum(request in line for line in lines) == 1
    assert any("deploy-agent asks for opens" in line and "to be watched" in line for line in lines)


def test_break_glass_leaves_an_incident_that_closes_with_a_commit(people: Deciders) -> None:
    fields: dict[str, Any] = {"who": "anna", "role": "glass", "reason": "the database host does not boot"}
    request = people.request(**fields)
    assert people.signer("anna", "requests", "approve", request, "--yes").returncode == 0
    assert people.ask(**fields).status == 201
    (row,) = people.json("anna", "incidents", "list")["incidents"]
    incident = row["incident"]
    assert "the database host does not boot" in people.signer("anna", "incidents", "show", incident).stdout
    bad = people.signer("anna", "incidents", "close", incident, "--reference", "later")
    assert bad.returncode == 1
    assert "the reference is not a commit" in bad.stderr
    assert people.signer("anna", "incidents", "close", incident, "--reference", "4a1f09c").returncode == 0
    assert people.json("anna", "incidents", "list")["incidents"] == []
    closed = people.signer("anna", "incidents", "show", incident).stdout
    assert "closed by anna at" in closed
    policy = str(people.service.policy_file)
    assert people.signer("anna", "ledger", "verify", "--approvals", "--policy", policy).returncode == 0


def test_whoever_rewrites_the_whole_ledger_still_has_no_signature(people: Deciders, tmp_path: Path) -> None:
    """New hashes for every event are easily made; the approval of another request is not."""
    fields = {"reason": "to be rewritten"}
    assert people.approve("anna", people.request(**fields)).returncode == 0
    assert people.ask(**fields).status == 201
    lines = [json.loads(line) for line in people.signer("anna", "ledger", "export").stdout.splitlines()]
    at = next(number for number, line in enumerate(lines) if line["kind"] == "approval.requested")
    lines[at]["body"]["frozen"]["principals"] = ["root"]
    (tmp_path / "data").mkdir(mode=0o700)
    with closing(Ledger(tmp_path / "data")) as ledger:
        for line in lines:
            ledger.commit([Event(line["kind"], line["actor"], line["body"])], line["time"])
    environment = people.environment("anna") | {"SIGNER_DATA_DIR": str(tmp_path / "data")}
    done = [
        subprocess.run(
            [sys.executable, "-P", "-m", "signer", "ledger", "verify", *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        for options in ([], ["--approvals"])
    ]
    assert [run.returncode for run in done] == [0, 1], done
    request = lines[at]["body"]["request"]
    assert f"WRONG   event {lines[at]['seq']}: {request}: its digest is not that of its fields" in done[1].stdout
    assert "does not verify" in done[1].stdout
    assert "has other principals than" in done[1].stdout
