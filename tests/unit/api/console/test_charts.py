"""Charts and plain words of the console: the numbers are in the picture, and so is what a screen reader says."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.api.console.charts import WIDTH, Span, activity_chart, holders_chart
from signer.api.console.words import LONGEST, age, explain_role, facts, shorten, size, summarize, time_left, who_agrees
from signer.protocol.replies import ApprovalTerms, Extensions, GrantedRole, LedgerEntry

HOSTILE = "<script>alert(1)</script>\"'&"


def read(chart: object) -> ET.Element:
    """The chart as XML, and that it names nothing outside and carries no style or script."""
    text = str(chart)
    assert not re.search(r"style=|<style|<script|href=|on[a-z]+=", text)
    root = ET.fromstring(text)  # noqa: S314 - our own text
    title, about = root.attrib["aria-labelledby"].split()
    ids = {element.attrib["id"]: element.tag for element in root.iter() if "id" in element.attrib}
    assert (ids[title], ids[about], root.attrib["role"]) == ("title", "desc", "img")
    return root


def bars(root: ET.Element, series: str) -> list[tuple[float, str]]:
    """The height or width of each bar of a series that its numbers are drawn by, and its title."""
    found = []
    for bar in root.iter("rect"):
        if series in bar.attrib["class"]:
            title = bar.find("title")
            assert title is not None
            found.append((float(bar.attrib["height"]), str(title.text)))
    return found


def span(hour: int, signatures: int = 0, refusals: int = 0) -> Span:
    return Span(f"{hour:02}:00", f"{hour:02}:00 to {hour + 1:02}:00 UTC", signatures, refusals)


def test_bars_stand_for_the_numbers_and_the_description_says_them() -> None:
    root = read(activity_chart([span(0, 4), span(1, 8, 1), span(2)], "the last 3 hours"))
    assert bars(root, "series-1") == [
        (32, "00:00 to 01:00 UTC: 4 signatures"),
        (64, "01:00 to 02:00 UTC: 8 signatures"),
    ]
    assert bars(root, "series-2") == [(64, "01:00 to 02:00 UTC: 1 refusals")]
    assert root.findtext("title") == "Signatures and refusals, the last 3 hours"
    assert root.findtext("desc") == (
        "Signatures: 12, most of them 01:00 to 02:00 UTC: 8. Refusals: 1, most of them 01:00 to 02:00 UTC: 1."
    )


def test_an_hour_with_one_signature_is_seen_beside_one_with_a_million() -> None:
    root = read(activity_chart([span(0, 1), span(1, 1_000_000)], "the last 2 hours"))
    (least, _), (most, _) = bars(root, "series-1")
    assert 1 < least < most


def test_a_chart_of_nothing_says_so() -> None:
    assert read(activity_chart([], "the last 0 hours")).findtext("desc") == "Signatures: none. Refusals: none."
    assert read(holders_chart([], (0, 0))).findtext("desc") == "No certificate is valid now."


def test_holders_are_bars_with_names_and_the_rest_share_one() -> None:
    root = read(holders_chart([("deploy-agent", 20), ("anna", 10)], (40, 5)))
    widths = [float(bar.attrib["width"]) for bar in root.iter("rect")]
    assert widths[0] == 2 * widths[1] == 4 * widths[2]
    assert root.findtext("desc") == "deploy-agent 20, anna 10, 40 others 5."
    shown = [text.text for text in root.iter("text")]
    assert shown == ["deploy-agent", "20", "anna", "10", "40 others", "5"]


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=48),
    st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_categories=["C"])), st.integers(0, 10**9))),
)
def test_every_bar_lies_inside_the_picture(numbers: list[tuple[int, int]], holders: list[tuple[str, int]]) -> None:
    spans = [span(hour, *pair) for hour, pair in enumerate(numbers)]
    for chart in (activity_chart(spans, "some time"), holders_chart(holders, (3, 7))):
        root = read(chart)
        height = float(root.attrib["viewBox"].split()[3])
        for bar in root.iter("rect"):
            x, y, wide, tall = (float(bar.attrib[name]) for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + wide <= WIDTH + 0.1
            assert 0 <= y <= y + tall <= height


def test_a_name_is_text_and_nothing_else() -> None:
    root = read(holders_chart([(HOSTILE, 1)], (0, 0)))
    assert root.findtext("desc") == f"{HOSTILE} 1."


# --- words ------------------------------------------------------------------------------------------------------------


def granted(**changes: object) -> GrantedRole:
    good: dict[str, object] = {
        "name": "llmops",
        "principals": ["deploy-agent", "llmops"],
        "default_principals": ["llmops"],
        "default_ttl": 900,
        "max_ttl": 1800,
        "key_types": ["ssh-ed25519", "ssh-rsa"],
        "rsa_min_bits": 3072,
        "extensions": Extensions(allowed=["permit-pty"], default=["permit-pty"], values={}),
        "critical_options": [],
        "force_command": None,
        "source_address": None,
        "verify_required": False,
        "no_touch_required": False,
        "allow_key_id": False,
        "reason_required": False,
        "backdate": 30,
        "approval": None,
        "presence": False,
        "break_glass": False,
        "per_minute": None,
        "live": None,
        "holds": 0,
        "any_key": True,
        **changes,
    }
    return GrantedRole.model_validate(good)


def approval(**changes: object) -> ApprovalTerms:
    good: dict[str, object] = {
        "kinds": ["agent"],
        "by": ["operators"],
        "count": 1,
        "valid_for": 600,
        "waivers": False,
        "key_kinds": ["ssh", "webauthn"],
    }
    return ApprovalTerms.model_validate({**good, **changes})


def test_a_role_is_explained_in_plain_words() -> None:
    assert dict(explain_role(granted(), "agent")) == {
        "Logs in as": "deploy-agent, llmops; llmops if it names none",
        "For": "15m; at most 30m if it asks for that",
        "Who agrees": "nobody",
        "Runs": "any command",
        "From": "any address",
        "May use": "permit-pty, without asking",
        "Keys": "ssh-ed25519, ssh-rsa from 3,072 bits",
        "Holds now": "0 certificates",
    }


@pytest.mark.parametrize(
    "changes, about, text",
    [
        ({"default_principals": []}, "Logs in as", "deploy-agent, llmops; it has to name one"),
        ({"principals": ["llmops"]}, "Logs in as", "llmops"),
        ({"max_ttl": 900}, "For", "15m, no longer"),
        ({"force_command": "/usr/bin/deploy"}, "Runs", "only /usr/bin/deploy"),
        (
            {"critical_options": ["force-command"]},
            "Runs",
            "any command, or the one that the certificate is asked for",
        ),
        ({"source_address": "caller"}, "From", "the address that it asked from"),
        ({"source_address": ["192.0.2.0/24", "10.0.0.0/8"]}, "From", "192.0.2.0/24, 10.0.0.0/8"),
        ({"extensions": Extensions(allowed=[], default=[], values={})}, "May use", "nothing besides the command"),
        (
            {"extensions": Extensions(allowed=["a@b"], default=[], values={"a@b": "x"})},
            "May use",
            "a@b=x, if it asks for them",
        ),
        (
            {"extensions": Extensions(allowed=["a", "b"], default=["b"], values={})},
            "May use",
            "a, b; b without asking",
        ),
        ({"any_key": False, "key_types": ["ssh-ed25519"]}, "Keys", "ssh-ed25519; only those that policy.toml names"),
        (
            {"verify_required": True, "key_types": ["sk-ssh-ed25519@openssh.com"]},
            "Keys",
            "sk-ssh-ed25519@openssh.com; each login verifies the user (PIN or fingerprint)",
        ),
        ({"per_minute": 30, "live": 20}, "At most", "30 certificates a minute and 20 that are valid at once"),
        ({"live": 20}, "At most", "20 that are valid at once"),
        ({"reason_required": True}, "Has to say", "why, for each certificate"),
        ({"holds": 1}, "Holds now", "1 certificate"),
    ],
)
def test_each_rule_of_a_role_has_its_sentence(changes: dict[str, object], about: str, text: str) -> None:
    assert dict(explain_role(granted(**changes), "agent"))[about] == text


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        (
            {"approval": approval()},
            "agent",
            "one human of operators, by a key of OpenSSH or a passkey; an approval is good for 10m",
        ),
        (
            {"approval": approval(count=2, by=["leads", "ops"], key_kinds=["ssh"], waivers=True)},
            "agent",
            (
                "2 humans of leads or ops, by a key of OpenSSH; an approval is good for 10m; "
                "a waiver may cover later requests"
            ),
        ),
        ({"approval": approval(kinds=["agent", "workload"])}, "human", "nobody; agents and workloads need a human"),
        ({"presence": True}, "human", "the asker signs with an approval key"),
        ({"presence": True}, "agent", "nobody"),
        (
            {"presence": True, "approval": approval(kinds=["human"], key_kinds=["ssh"])},
            "human",
            (
                "the asker signs with an approval key, and one human of operators, by a key of OpenSSH; "
                "an approval is good for 10m"
            ),
        ),
        (
            {"break_glass": True},
            "human",
            (
                "nobody else: the asker signs with an approval key, and an incident stays open until it is closed. "
                "With an open incident, a second human has to agree"
            ),
        ),
    ],
)
def test_who_has_to_agree_depends_on_who_asks(changes: dict[str, object], kind: str, text: str) -> None:
    assert who_agrees(granted(**changes), kind) == text


def entry(**body: object) -> LedgerEntry:
    return LedgerEntry(seq=1, time=0, kind="k", actor="a", body=body, prev="0" * 64, hash="1" * 64)


def test_an_event_is_told_by_its_facts_on_one_bounded_line() -> None:
    told = summarize(
        entry(
            role="llmops",
            serial="7",
            principals=["a", "b"],
            reason=None,
            nonce="x",
            frozen={"reason": "x", "address": "::1"},
        )
    )
    assert told == "serial 7, role llmops, principals a b, address ::1"
    long = summarize(entry(reason="x\n" * 500))
    assert len(long) == LONGEST
    assert long.endswith("…")
    assert "\n" not in long
    assert summarize(entry()) == ""
    assert summarize(entry(policy="ab" * 32)) == "policy abababababababab…"
    assert dict(facts({"policy": "ab" * 32})) == {"policy": "ab" * 32}  # whole on the page of the certificate


def test_facts_name_every_value_of_an_object() -> None:
    found = dict(
        facts({"key_id": "x", "reason": None, "options": {"force-command": "/bin/a", "b": True}, "list": [1, 2]})
    )
    assert found == {
        "key id": "x",
        "reason": "none",
        "options: force-command": "/bin/a",
        "options: b": "yes",
        "list": "1 2",
    }


@pytest.mark.parametrize(
    "now, left", [(0, "15m"), (840, "1m"), (850, "50s"), (899, "1s"), (900, "over"), (950, "over")]
)
def test_the_time_left_of_a_certificate(now: int, left: str) -> None:
    assert time_left("1970-01-01T00:15:00Z", now) == left


def test_ages_and_sizes_are_told_roughly() -> None:
    assert age("1970-01-01T00:00:00Z", 7_260) == "2h1m ago"
    assert age("1970-01-01T00:00:10Z", 0) == "0s ago"  # a clock that was set back
    assert [size(count) for count in (0, 1023, 1536, 20 << 20, 3 << 30, 5 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "20 MiB", "3.0 GiB", "5.0 TiB",
    ]  # fmt: skip
    assert shorten("a\tb") == "a\\tb"
