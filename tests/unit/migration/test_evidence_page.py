"""evidence.html tells every fact of a run to a person, runs nothing, loads nothing, and trusts no text."""

from __future__ import annotations

import base64
import json
import re
import tomllib
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.migration.evidence.page import parity_of, render_page
from signer.migration.evidence.store import Evidence
from tests.parts.evidence import BEGAN, HOSTS, OURS, VAULTS, fill, look, plan

ROOT = Path(__file__).parents[3]
VOID = {"meta", "rect", "br"}
MAY_LINK = re.compile(r"#[a-z-]+")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Parsed(HTMLParser):
    """A page as a browser's parser takes it apart; an element that is not closed in order is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.style = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Evidence:
    made = Evidence.create(tmp_path / "evidence", "cutover", BEGAN)
    fill(made)
    return made


def page_of(run: Evidence, outcome: str = "applied", **facts: object) -> Parsed:
    run.seal(outcome, facts)
    return Parsed((run.folder / "evidence.html").read_text())


def test_every_fact_of_the_run_is_on_the_page(run: Evidence) -> None:
    page = page_of(run)
    wanted = [
        "Cutover of safe-session-api from Vault to the local CA", "Applied", "Certificates are signed by the local CA",
        "2026-11-22 14:05:02 UTC", "after 11.0 s", plan().digest, "Secrets redacted none",  # what was done
        "ada as root", "rs2000.example", "2026-11-22T14:05:01Z", "terminal",  # who approved
        VAULTS, OURS, "vault", "local",  # before and after
        "Compose up with the overlay", "CHANGES", "3.2 s", "1 container new", "compose up without the overlay",
        "renders this page",  # steps
        "Vault takes any size", "signer accepts no shorter keys", "longest ttl",  # parity
        "ca_key_on_disk", "ext4; render it to a tmpfs",  # preflight
        "uid=1001(llmops)", "smoke/03-edge1.log", "4713",  # logins
        "2.7.2", "9.2p1", "sha256sum -c SHA256SUMS", "signer evidence verify",  # versions, how to check
    ]  # fmt: skip
    missing = [fact for fact in [*wanted, *HOSTS] if fact not in page.text]
    assert missing == []
    for name in (name for name in files_of(run.folder) if name not in ("evidence.html", "SHA256SUMS")):
        assert name in page.text
        assert sha256((run.folder / name).read_bytes()).hexdigest() in page.text


def test_the_page_is_a_document_with_a_title_headings_and_working_links(run: Evidence) -> None:
    page = page_of(run)
    assert page.attributes("html") == [{"lang": "en"}]
    assert "Applied: Cutover of safe-session-api" in page.text
    assert len(page.attributes("h1")) == 1
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {str(attrs["href"])[1:] for attrs in page.attributes("a")} == ids
    assert {attrs.get("scope") for attrs in page.attributes("th")} == {"col", "row"}


def test_nothing_runs_and_nothing_is_loaded(run: Evidence) -> None:
    page = page_of(run)
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
    } == set()
    for _, attrs in page.tags:
        assert not {"src", "srcset", "style", "action", "xlink:href"} & attrs.keys()
        assert not [name for name in attrs if name.startswith("on")]
        assert MAY_LINK.fullmatch(str(attrs.get("href", "#x")))
    assert not re.search(r"url\(|@import|expression|</", page.style)
    (policy,) = [str(a["content"]) for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = base64.b64encode(sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"


def test_hostile_texts_are_shown_as_texts(tmp_path: Path) -> None:
    run = Evidence.create(tmp_path / "evidence", "cutover", BEGAN)
    fill(run, plan(HOSTILE))
    row = {"target": HOSTILE, HOSTILE: HOSTILE, "login": HOSTILE, "status": 0}
    step = {
        "step": HOSTILE,
        "title": HOSTILE,
        "what": HOSTILE,
        "summary": HOSTILE,
        "facts": {"targets": {HOSTILE: row}},
    }
    run.write_json("steps/08-x.json", {**step, "seconds": HOSTILE})
    run.write_json("versions.json", {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}], "rows": [row]})
    run.write_json("preflight.json", {"checks": [{"status": HOSTILE, HOSTILE: HOSTILE}]})
    run.write_json("approvals.json", [{"who": HOSTILE, HOSTILE: HOSTILE}])
    run.write_text("smoke/08-x.log", HOSTILE)
    before = {tag for tag, _ in page_of(Evidence.create(tmp_path / "other", "cutover", BEGAN)).tags}
    page = page_of(run, "failed", error={"text": HOSTILE, "step": HOSTILE}, reason=HOSTILE)
    assert HOSTILE in page.text
    more = {"article", "svg", "rect", "figure", "figcaption", "ul", "li", "h3", "h4", "time"}
    assert {tag for tag, _ in page.tags} - before <= more
    assert not [attrs for _, attrs in page.tags if "onerror" in attrs or "src" in attrs]


@pytest.mark.parametrize(
    "outcome, told, mood",
    [
        ("applied", "Applied", "is-good"),
        ("rolled_back", "Rolled back", "is-fair"),
        ("failed", "Failed", "is-bad"),
        ("rollback_failed", "Rollback failed", "is-bad"),
        ("something new", "something new", "is-bad"),
    ],
)
def test_the_outcome_stands_on_top(run: Evidence, outcome: str, told: str, mood: str) -> None:
    page = page_of(run, outcome)
    assert told in page.text
    assert {"class": f"outcome {mood}"} in page.attributes("p")


def test_what_failed_and_what_was_undone_is_told_at_its_step(run: Evidence) -> None:
    (run.folder / "steps/07-smoke.json").unlink()
    undone = {
        "step": "compose",
        "title": "Compose up with the overlay",
        "what": "undone",
        "summary": "Vault signs again",
    }
    run.write_json("steps/05-compose-undone.json", {**undone, "seconds": 2.25, "facts": {}})
    error = {"code": "smoke_login_failed", "text": "edge1: Permission denied", "hint": "add the CA", "step": "smoke"}
    page = page_of(run, "rolled_back", error=error, reason="")
    words = page.text
    assert re.search(r"\bError .{0,40}edge1: Permission denied", words)  # the heading, and what is under it
    assert words.count("edge1: Permission denied") == 2  # on top, and at its step
    assert "3.2 s, 2.2 s" in words
    assert re.search(r"Compose up with the overlay CHANGES done undone", words)
    assert re.search(r"Log in to rs2000, rs1000, edge1 logs in failed", words)


def test_a_run_by_hand_without_plan_and_approval_has_a_page_too(tmp_path: Path) -> None:
    run = Evidence.create(tmp_path / "evidence", "rollback", BEGAN)
    run.write_json("steps/01-up.json", {"step": "up", "title": "compose up", "what": "done", "summary": "took 2 s"})
    words = page_of(run, "applied", reason="edge1 lacks the new CA").text
    for told in (
        "The platform was restored",
        "edge1 lacks the new CA",
        "had no plan",
        "Nothing was approved",
        "took 2 s",
    ):
        assert told in words


# --- what was in force afterwards ------------------------------------------------------------------------------------


def row(page: Parsed, title: str) -> str:
    """The text of a row of the table of before, planned and observed."""
    table = page.text.partition("Observed after Before")[2] or page.text.partition("As planned Observed after ")[2]
    table = table.partition("Approvals")[0]
    found = re.search(rf"(?:^| ){re.escape(title)} (.*?)(?= (?:{'|'.join(map(re.escape, ROWS))}) |$)", table.strip())
    assert found, table
    return found[1]


ROWS = ("service ready", "mode", "CA", "certificates signed by", "their principals", "policy.toml (SHA-256)",
        "container image", "listens on", "container's own check", "container", "Vault", "Vault's data")  # fmt: skip


def test_planned_and_observed_stand_side_by_side(run: Evidence) -> None:
    page = page_of(run)
    assert "Observed after 7 as planned " in page.text
    assert "Observed at 2026-11-22 14:05:13 UTC" in page.text
    assert row(page, "mode") == "vault local local as planned"
    assert row(page, "CA") == f"{VAULTS} {OURS} {OURS} as planned"
    assert row(page, "certificates signed by") == f"{VAULTS} {OURS} {OURS} as planned"
    assert row(page, "their principals") == "llmops the same llmops as planned"
    assert row(page, "listens on") == "not recorded not named 127.0.0.1:8222"
    assert {"class": "is-good"} in page.attributes("dd")
    assert "differs" not in [attrs.get("class") for attrs in page.attributes("tr")]


def test_a_difference_is_marked_at_its_row_and_on_top(run: Evidence) -> None:
    run.write_json("observed.json", look(policy="9f" * 32, mode="shadow"))
    page = page_of(run)
    assert "Observed after differs from the plan: mode, policy.toml (SHA-256)" in page.text
    assert row(page, "mode") == "vault local shadow differs from the plan"
    assert row(page, "CA").endswith("as planned")
    assert [attrs.get("class") for attrs in page.attributes("tr")].count("differs") == 2
    assert {"class": "is-bad"} in page.attributes("dd")


def test_what_changed_although_the_plan_does_not_name_it_is_marked_too(run: Evidence) -> None:
    before = {"listens": ["127.0.0.1:8222"], "health": "healthy", "container": {"id": "0" * 64, "state": "running"}}
    run.write_json("steps/04-snapshot.json", {"step": "remember", "what": "done", "facts": before})
    run.write_json("observed.json", look(listens=["0.0.0.0:8222"], container={"id": "1" * 64, "state": "running"}))
    page = page_of(run)
    assert "differs from the plan: listens on" in page.text
    assert row(page, "listens on") == "127.0.0.1:8222 not named 0.0.0.0:8222 changed, not planned"
    assert [attrs.get("class") for attrs in page.attributes("tr")].count("differs") == 1, "a replacement is none"


def test_the_inventory_before_a_removal_is_one_word_in_the_table(tmp_path: Path) -> None:
    now = {"mode": "local", "vault": {"version": "2.7.2", "mounts": [{}, {}], "policies": ["root"]}}
    then = {"vault": "gone", "data": "kept, sealed"}
    plan = {"operation": "decommission", "inputs": {"policy": {"ca": OURS, "digest": "d"}}, "now": now, "then": then}
    run = Evidence.create(tmp_path / "evidence", "decommission", BEGAN)
    run.write_json("plan.json", plan)
    seen = {"ready": True, "mode": "local", "ca": OURS, "policy": "d", "vault": "gone"}
    unread = {"data": "no run looks at Vault's disk"}
    run.write_json("observed.json", {"at": "t", "planned": then, "observed": seen, "unread": unread})
    page = page_of(run)
    assert row(page, "Vault") == "version 2.7.2, 2 mounts, as in the plan gone gone as planned"
    assert row(page, "Vault's data") == "not recorded kept, sealed not observed no run looks at Vault's disk"
    assert "5 as planned; not observed: certificates signed by, Vault's data" in page.text


def test_a_run_that_was_rolled_back_is_held_against_the_state_before(run: Evidence) -> None:
    run.write_json("observed.json", look(mode="vault", ca=VAULTS, ready=False))
    undone = {"step": "compose", "what": "undone", "title": "t", "summary": "s", "seconds": 1}
    targets = {"rs2000": {"backend": "vault", "ca": VAULTS, "principals": ["llmops"]}}
    run.write_json("steps/05-compose-undone.json", {**undone, "facts": {"targets": targets, "pause_seconds": 2.5}})
    page = page_of(run, "rolled_back")
    assert "compared with the state before" in page.text
    assert row(page, "mode") == "vault local vault as before"
    assert row(page, "certificates signed by") == f"{VAULTS} {OURS} {VAULTS} as before"
    assert "Clients' pause 1.3 s, then 2.5 s on the way back" in page.text


def test_evidence_of_a_version_that_did_not_look_says_so(run: Evidence) -> None:
    (run.folder / "observed.json").unlink()
    page = page_of(run)
    assert "Observed after not observed: this run recorded nothing of it" in page.text
    assert row(page, "mode") == "vault local not observed this run recorded nothing of it"
    assert row(page, "certificates signed by").endswith(f"{OURS} as planned")  # of its logins it did
    assert "Clients' pause 1.3 s" in page.text


def test_what_is_as_before_is_counted_apart(run: Evidence) -> None:
    before = {"listens": ["127.0.0.1:8222"], "starts_at_boot": ["/base.yaml"]}
    run.write_json("steps/04-snapshot.json", {"step": "remember", "what": "done", "facts": before})
    assert "Observed after 7 as planned, 1 as before " in page_of(run).text
    run.write_json("observed.json", {**look(), "planned": {**look()["planned"], "starts_at_boot": ["/base.yaml"]}})
    assert "7 as planned, 1 as before; not observed: a reboot starts" in page_of(run).text


def test_a_look_that_saw_nothing_is_not_called_good(tmp_path: Path) -> None:
    run = Evidence.create(tmp_path / "evidence", "rollback", BEGAN)
    run.write_json("observed.json", {"at": "t", "planned": {}, "observed": {}, "unread": {"all": "it fell over"}})
    page = page_of(run)
    assert "Observed after nothing to compare" in page.text
    assert {"class": "is-fair"} in page.attributes("dd")


def test_a_fact_that_could_not_be_read_says_why(run: Evidence) -> None:
    seen = look()
    del seen["observed"]["image"]
    run.write_json("observed.json", {**seen, "unread": {"image": "the engine does not answer"}})
    page = page_of(run)
    assert row(page, "container image").endswith("not observed the engine does not answer")
    assert "6 as planned; not observed: container image" in page.text


def test_pause_and_who_approved_stand_on_top(run: Evidence) -> None:
    approval = json.loads((run.folder / "approvals.json").read_text())[0]
    run.write_json("approvals.json", [approval, approval, {**approval, "who": "grace as root"}])
    top = page_of(run).text.partition("Before, planned and observed")[0]
    assert "Clients' pause 1.3 s" in top
    assert "Approved by ada as root, grace as root " in top


@pytest.mark.parametrize(
    "lines, told",
    [
        ([{"event": "step.began", "step": "up"}], "Clients' pause not measured"),
        ([{"event": "step.began", "step": "vault"}], "Clients' pause none: the service was not replaced"),
    ],
)
def test_a_run_that_nobody_approves_names_who_ran_it(tmp_path: Path, lines: list[dict[str, str]], told: str) -> None:
    run = Evidence.create(tmp_path / "evidence", "rollback", BEGAN)
    lines = [{"event": "run.began", "who": "ada as root"}, *lines]
    run.write_text("journal.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    words = page_of(run).text
    assert "Approved by nobody: a rollback needs no approval" in words
    assert "Run by ada as root" in words
    assert told in words


def test_how_much_was_taken_out_is_told(run: Evidence) -> None:
    run.write_text("smoke/09-x.log", "hvs.CAESIJmarkerMARKERmarker")
    assert "1, each marked [removed]" in page_of(run).text


def test_long_logs_are_cut_and_say_so(run: Evidence) -> None:
    run.write_text("smoke/09-x.log", "x" * 30_000)
    page = page_of(run)
    assert "10000 more characters are in the file" in page.text
    assert "x" * 20_001 not in page.text


def test_a_difference_that_many_samples_show_is_told_once_and_errors_lead() -> None:
    note = {"field": "key_id", "ours": "a", "vaults": "b", "severity": "note", "why": "hosts log it"}
    error = {**note, "field": "principals", "severity": "error", "why": "signer adds root"}
    samples = [{"name": str(n), "outcome": "granted", "differences": [note]} for n in range(20)]
    samples[3]["differences"] = [note, error]
    found = parity_of({"roles": [{"role": "llmops", "differences": [], "samples": samples}]})
    assert found is not None
    assert [(row["field"], row["times"]) for row in found.differences] == [("principals", 1), ("key_id", 20)]


NAMES = ["observed.json", "plan.json",
         "outcome.json", "approvals.json", "preflight.json", "parity.json", "steps/01-x.json",
         "timings.json", "versions.json", "journal.jsonl", "smoke/01-x.log", "other.json"]  # fmt: skip
WORDS = ["planned", "observed", "unread", "service", "principals", "container", "pause_seconds",
         "operation", "outcome", "plan", "error", "step", "name", "what", "facts", "targets", "roles", "samples",
         "differences", "steps", "now", "then", "at", "seconds", "recorded", "removed", "number"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["x\ny", "<b>"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES | st.binary(max_size=30)))
def test_any_files_make_a_page(values: dict[str, Any]) -> None:
    files = {name: v if isinstance(v, bytes) else json.dumps(v).encode() for name, v in values.items()}
    Parsed(render_page("2026-11-22T14-05-02Z-cutover", files).replace("\0", ""))


def test_template_and_style_are_package_data() -> None:
    """What the wheel and so the container's image will hold; `signer.migration` is found by its packages.find."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tool["package-data"]["signer.migration.evidence"] == ["templates/*"]
    assert {path.name for path in (ROOT / "signer/migration/evidence/templates").iterdir()} == {
        "evidence.css",
        "evidence.html",
    }
