"""The pages that read: what each shows of the core's state, to whom, and that it stays text and stays small."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest

from signer.errors import Unavailable
from signer.ledger.marks import Mark
from signer.ledger.schema import EVENT_KINDS
from signer.model import BACKDATE, Event, EventFilter, Revocation
from signer.protocol.commands import Freeze, RecordOperation, Revoke
from signer.protocol.operations import OperationBody
from signer.protocol.replies import Reply
from signer.service.publisher import ListState
from tests.parts.builders import NOW, POLICY, Bench, caller, policy, role_lines, token
from tests.parts.console import Browser, Page, console_app, keeper_status
from tests.parts.events import issued

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
MOST = 50_000  # bytes of a page
READ = ("/console", "/console/certificates", "/console/people", "/console/ledger", "/console/operations")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("time.time", lambda: float(NOW))
    return Bench()


def signed_in(bench: Bench, who: str = "operator", **direct: Reply) -> Browser:
    browser = Browser(console_app(bench, direct))
    browser.sign_in(who)
    return browser


def with_human(text: str = POLICY) -> str:
    """The policy with a human who has no rights."""
    lines = 'kind = "human"\nroles = ["llmops"]\ntokens = [{ sha256 = "{token:anna}", expires = 2099-01-01T00:00:00Z }]'
    return f"{text}\n[identities.anna]\n{lines}\n"


def rows(page: Page) -> list[str]:
    """The text of each row of the page's tables."""
    return [
        " ".join(unescape(re.sub(r"<[^>]*>", " ", row)).split())
        for row in re.findall(r"<tr>(.*?)</tr>", page.text, re.DOTALL)
    ]


# --- overview ---------------------------------------------------------------------------------------------------------


def test_the_overview_has_charts_what_waits_and_the_health_of_all_parts(bench: Bench) -> None:
    for _ in range(3):
        bench.sign()
    bench.ask(Freeze(caller("operator"), "role:llmops", "disk swap"))
    page = signed_in(bench).get("/console")
    assert page.status == 200
    assert page.text.count("<svg") == 2
    assert "Signatures: 3, most of them 08:00 to 09:00 UTC: 3. Refusals: none." in page.shown
    assert "deploy-agent 3." in page.shown
    assert "role:llmops: disk swap by operator since" in page.shown
    health = {row.split(" ")[0]: row for row in rows(page)[-9:]}
    assert health["Keeper"].startswith("Keeper ready mode local, version")
    assert health["Ledger"].startswith("Ledger writable ")
    assert health["Verified"] == "Verified intact 9 events, 2h ago"
    assert health["Witness"] == "Witness cosigned 8 events, 5m ago"
    assert health["Revocation"].startswith("Revocation list version 4 no host has fetched it")
    assert not re.search(r"badge (bad|warn)", page.text.partition('id="health"')[2])


def test_the_overview_names_what_is_wrong(bench: Bench) -> None:
    fault = Unavailable("ledger_unavailable", "the disk is full", "free space")
    ill = keeper_status(
        bench, fault=fault, published=ListState(3, NOW - 7200, 4), verified=None, cosigned=None,
        warnings=("a witness held another",),
    )  # fmt: skip
    page = signed_in(bench, status=ill).get("/console")
    shown = "\n".join(rows(page))
    assert "Keeper not ready the disk is full: free space" in shown
    assert "Verified never run signer ledger verify each day" in shown
    assert "Witness none nobody else holds the history: runbooks/operate/witness.md" in shown
    assert "Revocation list version 3 is behind the ledger asks for version 4: see the service's log" in shown
    assert "Attention look into it a witness held another" in shown


def test_the_overview_calls_late_what_the_keeper_calls_late(bench: Bench) -> None:
    """Whatever the ages: there is one limit, and it is not the console's."""
    status = keeper_status(bench, verified=Mark(9, NOW - 30), cosigned=Mark(8, NOW - 30))
    assert status.ledger is not None
    late = status.ledger.model_copy(
        update={
            name: getattr(status.ledger, name).model_copy(update={"late": True}) for name in ("verified", "cosigned")
        }
    )
    shown = "\n".join(rows(signed_in(bench, status=status.model_copy(update={"ledger": late})).get("/console")))
    assert "Verified long ago 9 events, 30s ago" in shown
    assert "Witness long ago 8 events, 30s ago" in shown


def test_a_human_without_the_right_sees_their_own_part_of_the_overview(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: float(NOW))
    bench = Bench(policy(with_human()))
    bench.sign()
    page = signed_in(bench, "anna").get("/console")
    assert page.status == 200
    assert "deploy-agent" not in page.shown
    assert "No certificate is valid now." in page.shown
    assert "need the right ledger.read" in page.shown


# --- certificates -----------------------------------------------------------------------------------------------------


def test_live_certificates_come_first_with_the_time_that_they_have_left(bench: Bench) -> None:
    for _ in range(2):
        bench.sign()
    browser = signed_in(bench)
    page = browser.get("/console/certificates")
    assert rows(page)[1:] == [
        f"{serial} deploy-agent llmops llmops 15m left 2027-01-15 08:15:00 UTC" for serial in (2, 1)
    ]
    bench.ask(Revoke(caller("operator"), Revocation("serial", first=1, last=1), "lost laptop"))
    assert [row[:1] for row in rows(browser.get("/console/certificates"))[1:]] == ["2"]
    everything = browser.get("/console/certificates?live=no&identity=deploy-agent")
    assert "revoked" in rows(everything)[2]


def test_a_serial_leads_to_the_certificates_complete_record(bench: Bench) -> None:
    bench.sign()
    browser = signed_in(bench)
    page = browser.get("/console/certificates?serial=1")
    assert page.status == 200
    assert "Certificate 1" in page.shown
    assert "deploy-agent (agent) may log in as llmops until 2027-01-15 08:15:00 UTC" in page.shown
    assert "fingerprint SHA256:" in page.shown
    missing = browser.get("/console/certificates?serial=77")
    assert missing.status == 404
    assert "no certificate 77 is visible to you" in missing.shown
    assert browser.get("/console/certificates?serial=7x").status == 400


def test_a_search_passes_its_filters_to_the_keeper_and_to_the_next_page(bench: Bench) -> None:
    for _ in range(60):
        bench.sign()
    browser = signed_in(bench)
    page = browser.get("/console/certificates?live=no&identity=deploy-agent&role=&principal=+")
    assert len(rows(page)) == 51
    (following,) = [link for link in page.links if "before=" in link]
    assert following.startswith("/console/certificates?identity=deploy-agent&live=no&before=")
    assert len(rows(browser.get(following))) == 11
    asked = browser.app.extensions["console"].keeper.asked
    sent = [header for header, _ in asked if header["op"] == "certificates"]
    assert {name: sent[0].get(name) for name in ("identity", "role", "principal", "active", "limit")} == {
        "identity": "deploy-agent", "role": None, "principal": None, "active": False, "limit": 50,
    }  # fmt: skip


@pytest.mark.parametrize(
    "path",
    ["/console/certificates?identity=%00", "/console/certificates?before=-1", "/console/certificates?role=" + "x" * 257,
     "/console/ledger?since=yesterday", "/console/ledger?kind=%3Cscript%3E", "/console/ledger?before=1e3",
     "/console/people?part=%07", "/console/operations?before=x"],
)  # fmt: skip
def test_a_malformed_search_is_refused_with_the_next_action(bench: Bench, path: str) -> None:
    page = signed_in(bench).get(path)
    assert page.status == 400
    assert "query_malformed" in page.shown


# --- people and agents ------------------------------------------------------------------------------------------------


def test_people_are_listed_and_searched_by_a_part_of_the_name(bench: Bench) -> None:
    bench.ask(Freeze(caller("operator"), "identity:stranger", "lost laptop"))
    browser = signed_in(bench)
    names = [row.split(" ")[0] for row in rows(browser.get("/console/people"))[1:]]
    assert names == ["deploy-agent", "operator", "stranger"]
    (row,) = rows(browser.get("/console/people?part=STRANGE"))[1:]
    assert row == "stranger frozen agent none none 2099-01-01 00:00:00 UTC 0 0"
    assert "No identity matches." in browser.get("/console/people?part=nobody").shown


def test_the_next_names_are_one_link_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: float(NOW))
    more = "".join(f'[identities.bot-{number:03}]\nkind = "agent"\n' for number in range(60))
    browser = signed_in(Bench(policy(POLICY + more)))
    page = browser.get("/console/people?part=bot")
    (following,) = [link for link in page.links if "after=" in link]
    assert following == "/console/people?part=bot&after=bot-049"
    assert [row.split(" ")[0] for row in rows(browser.get(following))[1:]] == [f"bot-{n:03}" for n in range(50, 60)]


def test_what_an_agent_may_get_is_explained_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: float(NOW))
    approval = 'approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }'
    bench = Bench(policy(POLICY, role_lines(approval, 'source_address = "caller"')))
    bench.ask(Freeze(caller("operator"), "all", "drill"))
    page = signed_in(bench).get("/console/people/deploy-agent")
    assert "one human of operators, by a key of OpenSSH or a passkey; an approval is good for 10m" in page.shown
    assert "From the address that it asked from" in page.shown
    assert "all is frozen by operator since" in page.shown
    assert "It has had no certificate." in page.shown
    own = signed_in(bench).get("/console/people/operator")
    assert "nobody; agents need a human" in own.shown
    assert "revoke certificates and keys" in own.shown
    assert "key of OpenSSH SHA256:" in own.shown


def test_the_others_are_hidden_from_a_human_without_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: float(NOW))
    browser = signed_in(Bench(policy(with_human())), "anna")
    assert [row.split(" ")[0] for row in rows(browser.get("/console/people"))[1:]] == ["anna"]
    assert browser.get("/console/people/anna").status == 200
    for path in ("/console/people/operator", "/console/people/nobody", "/console/ledger", "/console/operations"):
        page = browser.get(path)
        assert page.status == 403
        assert "anna lacks the right ledger.read" in page.shown
        assert 'add "ledger.read" to identities.anna.may in policy.toml' in page.shown
        assert "not_permitted" in page.shown


# --- ledger and operations --------------------------------------------------------------------------------------------


def test_the_ledger_offers_every_kind_of_event_and_no_other(bench: Bench) -> None:
    choices = re.search(r'<select[^>]*name="kind".*?</select>', signed_in(bench).get("/console/ledger").text, re.DOTALL)
    assert choices is not None
    offered = [EventFilter(kind) for kind in re.findall(r'value="([a-z_.]+)"', choices[0]) if kind != "others"]
    assert [kind for kind in EVENT_KINDS if not any(choice.takes(kind) for choice in offered)] == []
    assert [choice.kind for choice in offered if not any(map(choice.takes, EVENT_KINDS))] == []


def test_the_ledger_shows_the_chain_and_its_events_by_kind_identity_and_time(bench: Bench) -> None:
    bench.sign()
    bench.ask(Freeze(caller("operator"), "identity:deploy-agent", "drill"))
    browser = signed_in(bench)
    page = browser.get("/console/ledger")
    assert "Last verified 9 events, 2h ago" in page.shown
    assert "Checkpoint signer.example.org/ledger, 12 events, root CROOT=" in page.shown
    assert "Cosigned 8 events, 5m ago" in page.shown
    head = bench.store.head()
    assert f"Head {head.seq}:{head.hash}" in page.shown

    def kinds(query: str) -> list[str]:
        return [row.split(" ")[4] for row in rows(browser.get(f"/console/ledger?{query}"))[1:]]

    assert kinds("") == ["console.signed_in", "freeze.set", "certificate.issued", "keeper.started"]
    assert kinds("kind=others") == ["console.signed_in", "freeze.set", "keeper.started"]
    assert kinds("kind=freeze") == ["freeze.set"]
    assert kinds("identity=deploy-agent") == ["freeze.set", "certificate.issued"]
    assert kinds("kind=certificate&identity=operator") == []
    assert kinds("since=1h&kind=certificate") == ["certificate.issued"]
    assert kinds("since=2027-01-15&kind=certificate") == ["certificate.issued"]
    assert kinds("since=2027-01-15T08:00:01Z") == []
    assert kinds("kind=keeper.started") == ["keeper.started"]


def test_an_operation_is_shown_with_its_evidence_and_how_to_check_it(bench: Bench) -> None:
    digest = "sha256:" + "ab" * 32
    body = {"operation": "cutover", "plan": "sha256:" + "cd" * 32, "evidence": digest, "reason": "move"}
    for outcome in ("failed", "applied"):
        bench.ask(RecordOperation(caller("operator"), OperationBody.model_validate({**body, "outcome": outcome})))
    browser = signed_in(bench)
    listed = rows(browser.get("/console/operations"))[1:]
    assert [row.split(" UTC ")[1] for row in listed] == [
        "cutover applied operator move", "cutover failed operator move",
    ]  # fmt: skip
    page = browser.get("/console/operations/3")
    assert "Cutover, event 3" in page.shown
    assert f"Evidence {digest}" in page.shown
    assert "signer evidence verify EVIDENCE_DIR/TIME-cutover" in page.shown
    assert "event 2 : cutover, failed" in page.shown
    for path in ("/console/operations/1", "/console/operations/99", "/console/operations/x"):
        assert browser.get(path).status == 404


# --- attackers and bounds ---------------------------------------------------------------------------------------------


def test_text_of_strangers_stays_text(bench: Bench) -> None:
    """Reasons, roles, principals and actors reach the pages; none becomes an element or an attribute."""
    bench.sign(reason=HOSTILE)
    bench.ask(Freeze(caller("operator"), "identity:deploy-agent", HOSTILE))
    body = {"operation": "cutover", "outcome": "applied", "plan": "", "evidence": "", "reason": HOSTILE}
    bench.ask(RecordOperation(caller("operator"), OperationBody.model_validate(body)))
    bench.core.record([
        issued(900, identity=HOSTILE, role=HOSTILE, principals=[HOSTILE], key_id=HOSTILE, reason=HOSTILE,
               valid_before=NOW + 900, valid_after=NOW - BACKDATE),
        Event("request.refused", HOSTILE, {"code": "x", "text": HOSTILE, "role": HOSTILE, "address": ""}),
        Event(f"freeze.{HOSTILE}", HOSTILE, {"scope": HOSTILE, "reason": HOSTILE}),
    ])  # fmt: skip
    browser = signed_in(bench)
    seen = 0
    for path in (
        *READ, "/console/certificates?live=no", "/console/certificates/900", "/console/certificates/1",
        "/console/people/deploy-agent", "/console/ledger?kind=others", "/console/operations/4",
        "/console/certificates?identity=%3Cscript%3Ealert(1)%3C/script%3E&live=no",
        "/console/people?part=%22%3E%3Cscript%3E", "/console/ledger?identity=%22%3E%3Cscript%3E",
        "/console/people/%3Cscript%3E", "/console/operations/%3Cscript%3E",
    ):  # fmt: skip
        page = browser.get(path)
        assert page.status in (200, 404), (path, page.shown)
        assert [attributes for tag, attributes in page.tags if tag == "script"] == [
            {"src": "/console/static/console.js", "defer": ""}
        ], path
        assert not any("onerror" in attributes or "style" in attributes for _, attributes in page.tags), path
        assert not any(tag == "img" for tag, _ in page.tags), path
        seen += HOSTILE in page.text.replace("&lt;", "<").replace("&gt;", ">")
    assert seen >= 6


def test_every_page_is_a_page_without_script_or_style_of_its_own(bench: Bench) -> None:
    bench.sign()
    browser = signed_in(bench)
    for path in (*READ, "/console/people/operator", "/console/certificates/1"):
        page = browser.get(path)
        assert page.status == 200
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert not re.search(r"<style|style=|javascript:| on[a-z]+=", page.text)
        tables = page.text.count("<table>")
        assert page.text.count("<caption>") == tables, path
        assert not re.search(r"<th(?! scope=)[ >]", page.text.replace("<thead>", "")), path
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), path
        labels = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
        fields = {
            attributes["id"] for tag, attributes in page.tags if tag in ("input", "select") and "id" in attributes
        }
        assert fields == labels, path


def test_pages_need_a_session_and_change_nothing(bench: Bench) -> None:
    bench.sign()
    anonymous = Browser(console_app(bench))
    browser = signed_in(bench)
    before = bench.store.head()
    for path in (*READ, "/console/people/operator", "/console/certificates/1", "/console/operations/1"):
        assert any(form.action == "/console/sign-in" for form in anonymous.get(path).forms), path
        browser.get(path)
        assert anonymous.get(path, Authorization=f"Bearer {token('operator')}").forms, path
    assert bench.store.head() == before


def test_every_page_stays_small_with_the_longest_names_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: float(NOW))
    names = [f"{number:02}-" + "n" * 61 for number in range(60)]
    principals = ", ".join(f'"{number:02}{"p" * 200}"' for number in range(20))
    lines = 'default_ttl = "15m"\nmax_ttl = "30m"\nkey_types = ["ssh-ed25519"]\n'
    roles = "".join(f"[roles.r{number:02}-{'r' * 50}]\nprincipals = [{principals}]\n{lines}" for number in range(25))
    granted = ", ".join(f'"r{number:02}-{"r" * 50}"' for number in range(25))
    people = "".join(f'[identities."{name}"]\nkind = "agent"\nroles = [{granted}]\n' for name in names)
    bench = Bench(policy(POLICY + roles + people))
    long = "&" * 500
    for serial in range(1, 101):
        name = names[serial % 60]
        bench.core.record([
            issued(serial, identity=name, role=f"r01-{'r' * 50}", principals=["p" * 256] * 20, key_id="k" * 256,
                   reason=long, valid_before=NOW + 900, valid_after=NOW - BACKDATE,
                   critical_options={"force-command": "&" * 1000}),
            Event("request.refused", name, {"code": "x", "text": long, "role": "r" * 64, "address": ""}),
        ])  # fmt: skip
        bench.ask(Freeze(caller("operator"), f"identity:{name}", long))
        body = {"operation": "cutover", "outcome": "applied", "plan": "sha256:" + "a" * 64, "reason": long}
        evidence = {"evidence": "sha256:" + "b" * 64}
        bench.ask(RecordOperation(caller("operator"), OperationBody.model_validate({**body, **evidence})))
    bench.restart()
    operation = next(entry.seq for entry in bench.store.entries if entry.kind == "operation.recorded")
    browser = signed_in(bench)
    for path in (
        *READ, "/console/certificates?live=no", "/console/certificates/7", f"/console/people/{names[0]}",
        "/console/ledger?kind=others", f"/console/operations/{operation}",
    ):  # fmt: skip
        page = browser.get(path)
        assert page.status == 200, (path, page.shown)
        assert len(page.text.encode()) <= MOST, (path, len(page.text.encode()))


def test_the_page_of_the_error_is_the_same_for_a_keeper_that_is_gone(bench: Bench) -> None:
    browser = signed_in(bench)
    keeper = browser.app.extensions["console"].keeper

    def gone(_header: dict[str, object], _body: bytes = b"") -> Reply:
        raise Unavailable("keeper_gone", "the keeper does not answer", "retry in a second")

    keeper.ask = gone
    for path in READ:
        page = browser.get(path)
        assert page.status == 503
        assert "the keeper does not answer retry in a second keeper_gone" in page.shown


def test_summaries_name_no_secret(bench: Bench) -> None:
    bench.sign(reason=f"with {token('operator')}")
    page = signed_in(bench).get("/console/ledger")
    assert token("operator") not in page.text
    assert json.loads(bench.store.entries[1].body)["reason"] == "with [hidden]"
