"""Deciding: one test a rule, and what holds for any request whatever."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from signer.errors import TOKEN_CODES, Refused
from signer.model import Approval, Grant, Identity, Limits, Role, SignRequest, UsageCounts
from signer.policy import decide as decide_module
from signer.policy.decide import decide, explain, preview
from signer.policy.rules import CLOSED_BY_FORCE_COMMAND, RULES, allowed_principals
from tests.parts import builders
from tests.parts.builders import NO_USAGE, ask, identity, public_key, role

ADDRESS = "192.0.2.7"


def grant(asked: SignRequest | None = None, allowed: Role | None = None, **more: Any) -> Grant:
    made = {"key": public_key(), "address": ADDRESS, "usage": NO_USAGE, **more}
    return decide(more.pop("who", None) or identity(), allowed or role(), asked or ask(), made["key"],
                  made["address"], made["usage"])  # fmt: skip


def refusal(asked: SignRequest | None = None, allowed: Role | None = None, **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        grant(asked, allowed, **more)
    assert caught.value.text
    return caught.value


def test_the_least_request_gets_the_roles_defaults() -> None:
    made = grant()
    assert made.principals == ("llmops",)
    assert (made.ttl, made.backdate) == (900, 30)
    assert made.extensions == ("permit-pty",)
    assert made.critical_options == ()
    assert made.key_id == "deploy-agent:llmops"
    assert (made.identity, made.kind, made.role) == ("deploy-agent", "agent", "llmops")


# --- one rule after the other -----------------------------------------------------------------------------------------


def test_a_key_of_another_type_is_refused() -> None:
    refused = refusal(key=public_key("ecdsa-sha2-nistp384"))
    assert refused.code == "key_type_not_allowed"
    assert "ssh-ed25519" in refused.hint


def test_a_short_rsa_key_is_refused_and_a_long_one_taken() -> None:
    assert refusal(key=public_key("ssh-rsa/2048")).code == "rsa_key_too_short"
    assert grant(key=public_key("ssh-rsa/3072")).public_key.bits == 3072
    assert grant(allowed=role(rsa_min_bits=2048), key=public_key("ssh-rsa/2048")).public_key.bits == 2048


def test_a_role_for_fido_keys_takes_no_other() -> None:
    fido = role(key_types=frozenset({"sk-ssh-ed25519@openssh.com"}), verify_required=True)
    assert refusal(allowed=fido).code == "key_type_not_allowed"
    made = grant(allowed=fido, key=public_key("sk-ssh-ed25519@openssh.com"))
    assert made.critical_options == (("verify-required", ""),)


def test_a_role_may_spare_fido_users_the_touch() -> None:
    fido = role(key_types=frozenset({"sk-ssh-ed25519@openssh.com"}), no_touch_required=True)
    made = grant(allowed=fido, key=public_key("sk-ssh-ed25519@openssh.com"))
    assert made.extensions == ("no-touch-required", "permit-pty")
    assert refusal(ask(extensions=(("no-touch-required", ""),))).code == "extension_not_allowed"


def test_a_key_id_is_the_callers_only_where_the_role_says_so() -> None:
    assert refusal(ask(key_id="mine")).code == "key_id_not_allowed"
    assert grant(ask(key_id="mine"), role(allow_key_id=True)).key_id == "mine"


@pytest.mark.parametrize("key_id", ["a" * 257, "a b", "a\n", "", "ä", "$(id)", "a;b", "%u", "a\0"])
def test_a_key_id_that_a_hosts_script_could_trip_over_is_refused(key_id: str) -> None:
    assert refusal(ask(key_id=key_id), role(allow_key_id=True)).code == "key_id_malformed"


def test_a_key_id_has_256_bytes_at_most() -> None:
    assert len(grant(ask(key_id="a" * 256), role(allow_key_id=True)).key_id) == 256


KIND_CODES = [("host", "cert_type_not_allowed"), ("", "cert_type_unknown"), ("x", "cert_type_unknown")]


@pytest.mark.parametrize("kind,code", KIND_CODES)
def test_only_user_certificates_are_issued(kind: str, code: str) -> None:
    assert refusal(ask(cert_type=kind)).code == code


def test_principals_are_sorted_and_unique() -> None:
    assert grant(ask(principals=("llmops", "backup", "llmops"))).principals == ("backup", "llmops")


@pytest.mark.parametrize(
    "names", [("root",), ("llmops", "root"), ("LLMOPS",), ("{identity}",), ("*",), ("llmops,root",)]
)
def test_a_principal_outside_the_role_is_refused(names: tuple[str, ...]) -> None:
    assert refusal(ask(principals=names)).code == "principal_not_allowed"


def test_the_placeholder_stands_for_the_caller_and_nobody_else() -> None:
    assert grant(ask(principals=("deploy-agent",))).principals == ("deploy-agent",)
    assert refusal(ask(principals=("deploy-agent",)), who=identity(name="other")).code == "principal_not_allowed"
    assert grant(allowed=role(default_principals=("{identity}",)), who=identity(name="other")).principals == ("other",)


def test_without_principals_nothing_is_issued() -> None:
    assert refusal(ask(principals=())).code == "no_principals"
    assert refusal(allowed=role(default_principals=())).code == "no_principals"


def test_256_principals_are_granted_and_257_are_not() -> None:
    names = tuple(f"p{number:03}" for number in range(257))
    assert refusal(ask(principals=names), role(principals=names)).code == "too_many_principals"
    assert grant(ask(principals=names[:256]), role(principals=names)).principals == names[:256]


TTL_CODES = [(1801, "ttl_above_max"), (10**9, "ttl_above_max"), (0, "ttl_too_short"), (-1, "ttl_too_short")]


@pytest.mark.parametrize("ttl,code", TTL_CODES)
def test_a_ttl_outside_the_role_is_refused_not_shortened(ttl: int, code: str) -> None:
    assert refusal(ask(ttl=ttl)).code == code


@pytest.mark.parametrize("ttl", [1, 1800])
def test_a_ttl_within_the_role_is_granted_to_the_second(ttl: int) -> None:
    assert grant(ask(ttl=ttl)).ttl == ttl


def test_the_sentence_about_a_ttl_names_both_numbers_and_the_place_to_change() -> None:
    refused = refusal(ask(ttl=7200))
    assert refused.text == "ttl is above the role's maximum: 2h requested, 30m allowed"
    assert "roles.llmops.max_ttl" in refused.hint


@pytest.mark.parametrize("name", ["force-command", "source-address", "verify-required", "x", ""])
def test_a_critical_option_that_the_role_does_not_offer_is_refused(name: str) -> None:
    assert refusal(ask(critical_options=((name, ""),))).code == "critical_option_not_allowed"


OPEN = role(allowed_critical_options=frozenset({"force-command", "source-address", "verify-required"}))


def test_a_critical_option_that_the_role_offers_is_the_callers_choice() -> None:
    options = (("force-command", "uptime"), ("source-address", "10.0.0.0/8,192.0.2.7"), ("verify-required", ""))
    assert grant(ask(critical_options=options), OPEN).critical_options == options


@pytest.mark.parametrize(
    "option",
    [
        ("verify-required", "yes"),
        ("force-command", ""),
        ("force-command", "a\nb"),
        ("source-address", ""),
        ("source-address", "10.0.0.1/8"),
        ("source-address", "10.0.0.0/255.0.0.0"),
        ("source-address", "fe80::1%eth0"),
        ("source-address", "10.0.0.0/8, 11.0.0.0/8"),
        ("source-address", "!10.0.0.0/8"),
        ("source-address", "10.0.0.0/33"),
    ],
)
def test_a_value_that_sshd_could_not_read_is_refused(option: tuple[str, str]) -> None:
    assert refusal(ask(critical_options=(option,)), OPEN).code == "critical_option_malformed"


def test_what_the_role_pins_stands_even_if_a_role_were_to_offer_it() -> None:
    offered = frozenset({"force-command", "source-address", "verify-required"})
    pins = role(force_command="/usr/bin/deploy", source_address="caller", verify_required=True,
                allowed_critical_options=offered)  # fmt: skip
    asked = (("force-command", "/bin/sh"), ("source-address", "0.0.0.0/0"))
    for options in (asked, ()):
        assert dict(grant(ask(critical_options=options), pins).critical_options) == {
            "force-command": "/usr/bin/deploy",
            "source-address": "192.0.2.7/32",
            "verify-required": "",
        }


def test_a_role_bound_to_the_caller_needs_to_know_the_address() -> None:
    bound = role(source_address="caller")
    assert grant(allowed=bound).critical_options == (("source-address", "192.0.2.7/32"),)
    assert grant(allowed=bound, address="2001:db8::7").critical_options == (("source-address", "2001:db8::7/128"),)
    assert refusal(allowed=bound, address=None).code == "caller_address_unknown"


def test_a_role_bound_to_networks_says_so_in_the_certificate() -> None:
    bound = role(source_address=("10.0.0.0/8", "2001:db8::/32"))
    assert grant(allowed=bound).critical_options == (("source-address", "10.0.0.0/8,2001:db8::/32"),)


def test_extensions_are_added_to_the_defaults() -> None:
    assert grant(ask(extensions=(("permit-port-forwarding", ""),))).extensions == (
        "permit-port-forwarding",
        "permit-pty",
    )


def test_an_extension_outside_the_role_or_with_a_value_is_refused() -> None:
    assert refusal(ask(extensions=(("permit-user-rc", ""),))).code == "extension_not_allowed"
    assert refusal(ask(extensions=(("permit-pty", "yes"),))).code == "extension_has_value"


def test_a_forced_command_of_the_callers_own_closes_forwarding_too() -> None:
    wide = role(
        allowed_critical_options=frozenset({"force-command"}),
        allowed_extensions=CLOSED_BY_FORCE_COMMAND | {"permit-pty"},
        default_extensions=("permit-port-forwarding", "permit-pty"),
    )
    forced = (("force-command", "uptime"),)
    assert grant(ask(critical_options=forced), wide).extensions == ("permit-pty",)
    for name in sorted(CLOSED_BY_FORCE_COMMAND):
        refused = refusal(ask(critical_options=forced, extensions=((name, ""),)), wide)
        assert refused.code == "extension_against_force_command"


def test_a_reason_is_wanted_where_the_role_wants_one_and_is_one_line() -> None:
    wants = role(reason_required=True)
    assert refusal(allowed=wants).code == "reason_missing"
    assert refusal(ask(reason=""), wants).code == "reason_missing"
    assert grant(ask(reason="ticket 812"), wants).reason == "ticket 812"
    for reason in ("a\nb", "\x1b[2J", "x" * 501):
        assert refusal(ask(reason=reason)).code == "reason_malformed"
    assert grant(ask(reason="x" * 500)).reason == "x" * 500


def test_limits_refuse_from_the_number_that_they_name() -> None:
    limited = role(limits=Limits(per_minute=3, live=5))
    assert grant(allowed=limited, usage=UsageCounts(2, 4)).ttl == 900
    refused = refusal(allowed=limited, usage=UsageCounts(3, 0, 17, 0))
    assert (refused.code, refused.hint, refused.facts["retry_after_s"]) == ("rate_limited", "retry in 17 s", 17)
    refused = refusal(allowed=limited, usage=UsageCounts(0, 5, 0, 240))
    assert (refused.code, refused.facts["retry_after_s"]) == ("too_many_live", 240)
    assert refused.hint == "the first of them expires in 240 s"


def test_a_grant_that_needs_humans_says_whose_signatures_are_asked_for() -> None:
    approved = role(approval=Approval(frozenset({"agent"}), ("operators", "owners"), 600, count=2), presence=True)
    assert approval_finding(approved, identity()) == "would be asked: agents need 2 of operators or owners"
    assert approval_finding(approved, identity(kind="human")) == "would be asked: humans sign for themselves"
    assert approval_finding(approved, identity(kind="workload")) == "not needed"
    assert approval_finding(role(), identity()) == "not needed"
    glass = role(break_glass=True)
    assert approval_finding(glass, identity(kind="human")) == "break-glass: deploy-agent signs, and an incident opens"


def approval_finding(allowed: Role, who: Identity) -> str:
    *_, (finding, refused) = explain(who, allowed, ask(), public_key(), None, UsageCounts())
    assert refused is None
    return finding.detail


def test_what_humans_are_asked_is_what_would_be_granted() -> None:
    asked = ask(principals=("backup",), extensions=(("permit-port-forwarding", ""),), reason="ticket 812")
    terms, given = preview(identity(), role(), asked, public_key(), None), grant(asked)
    assert (terms.principals, terms.ttl, terms.key_id) == (given.principals, given.ttl, given.key_id)
    assert (terms.critical_options, terms.extensions) == (given.critical_options, given.extension_fields)
    assert preview(identity(), role(), replace(asked, public_key=""), None, None) == terms
    limited = role(limits=Limits(1, 1))
    assert preview(identity(), limited, asked, public_key(), None).ttl == terms.ttl, "limits count at the claim"
    with pytest.raises(Refused):
        preview(identity(), role(), replace(asked, principals=("root",)), None, None)


def test_a_refusal_shows_a_callers_word_without_what_steers_a_terminal() -> None:
    for refused in (
        refusal(ask(principals=("\x1b[2Jroot" * 99,))),
        refusal(ask(critical_options=(("\x1b[2J", ""),))),
        refusal(ask(extensions=(("\x07", ""),))),
    ):
        assert refused.text.isprintable()
        assert len(refused.text) < 300


def test_faults_are_told_in_vaults_order() -> None:
    assert [rule.name for rule in RULES] == [
        "key", "key id", "certificate type", "principals", "ttl", "critical options", "source address", "extensions",
        "reason", "limits", "approval",
    ]  # fmt: skip
    everything_wrong = ask(
        key_id="x", cert_type="host", principals=("root",), ttl=10**6, critical_options=(("x", ""),),
        extensions=(("y", ""),), reason="\n",
    )  # fmt: skip
    assert refusal(everything_wrong, key=public_key("ecdsa-sha2-nistp256")).code == "key_type_not_allowed"
    assert refusal(everything_wrong).code == "key_id_not_allowed"


# --- for any request -----------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["llmops", "backup", "{identity}", "deploy-agent", "root", "", "\x1b[2J"]) | st.text(max_size=5)
FLAGS = st.sampled_from(["permit-pty", "permit-port-forwarding", "permit-user-rc", "no-touch-required", "x"])
OPTIONS = st.sampled_from(["force-command", "source-address", "verify-required", "x"])
ASKS = st.builds(
    SignRequest,
    role=st.just("llmops"),
    public_key=st.just(""),
    principals=st.none() | st.lists(NAMES, max_size=4).map(tuple),
    ttl=st.none() | st.integers(-5, 4000),
    key_id=st.none() | st.sampled_from(["mine", "", "a b"]),
    cert_type=st.sampled_from(["user", "user", "user", "host"]),
    critical_options=st.dictionaries(OPTIONS, st.sampled_from(["", "uptime", "10.0.0.0/8", "\n"]), max_size=2).map(
        lambda found: tuple(sorted(found.items()))
    ),
    extensions=st.dictionaries(FLAGS, st.sampled_from(["", "", "x"]), max_size=2).map(
        lambda found: tuple(sorted(found.items()))
    ),
    reason=st.none() | st.sampled_from(["ticket", "\n"]),
)
ROLES = st.builds(
    role,
    principals=st.lists(NAMES, min_size=1, max_size=4).map(tuple),
    default_principals=st.sampled_from([(), ("llmops",), ("{identity}",)]),
    allowed_extensions=st.frozensets(FLAGS),
    default_extensions=st.just(()),
    allowed_critical_options=st.frozensets(OPTIONS.filter(lambda name: name != "x")),
    force_command=st.none() | st.just("/usr/bin/deploy"),
    source_address=st.sampled_from([None, "caller", ("10.0.0.0/8",)]),
    verify_required=st.booleans(),
    allow_key_id=st.booleans(),
    reason_required=st.booleans(),
    limits=st.builds(Limits, st.none() | st.integers(1, 3), st.none() | st.integers(1, 3)),
    approval=st.sampled_from([None, None, Approval(frozenset({"agent"}), ("operators",), 600)]),
)
KEYS = st.sampled_from([public_key(), public_key("ssh-rsa/2048"), public_key("ecdsa-sha2-nistp256")])
ADDRESSES = st.sampled_from([None, "192.0.2.7", "2001:db8::7"])
USAGES = st.builds(UsageCounts, st.integers(0, 4), st.integers(0, 4))


@given(ASKS, ROLES, KEYS, ADDRESSES, USAGES)
def test_deciding_and_explaining_agree_and_explaining_names_every_rule(
    asked: SignRequest, allowed: Role, key: Any, address: str | None, usage: UsageCounts
) -> None:
    explained = list(explain(identity(), allowed, asked, key, address, usage))
    assert [finding.rule for finding, _ in explained] == [rule.name for rule in RULES]
    refusals = [refused for _, refused in explained if refused is not None]
    assert [finding.outcome == "refused" for finding, _ in explained].count(True) == len(refusals)
    try:
        decide(identity(), allowed, asked, key, address, usage)
    except Refused as refused:
        decided: tuple[str, ...] = (refused.code, refused.text, refused.hint)
    else:
        decided = ()
    first = refusals[0] if refusals else None
    assert decided == ((first.code, first.text, first.hint) if first is not None else ())


@given(ASKS, ROLES, KEYS, ADDRESSES, USAGES)
def test_no_request_gets_more_than_its_role_allows_or_less_than_it_pins(
    asked: SignRequest, allowed: Role, key: Any, address: str | None, usage: UsageCounts
) -> None:
    try:
        made = decide(identity(), allowed, asked, key, address, usage)
    except Refused:
        return
    options = dict(made.critical_options)
    assert made.principals
    assert set(made.principals) <= allowed_principals(allowed, identity())
    assert 1 <= made.ttl <= allowed.max_ttl
    assert key.kind in allowed.key_types
    assert set(made.extensions) <= allowed.allowed_extensions
    assert list(made.extensions) == sorted(set(made.extensions))
    assert list(options) == sorted(options)
    if allowed.force_command is not None:
        assert options["force-command"] == allowed.force_command
    if "force-command" in options:
        assert not CLOSED_BY_FORCE_COMMAND & set(made.extensions)
    if allowed.source_address == "caller":
        assert ipaddress.ip_network(options["source-address"]).num_addresses == 1
        assert options["source-address"].startswith(f"{address}/")
    elif allowed.source_address is not None:
        assert options["source-address"] == "10.0.0.0/8"
    if allowed.verify_required:
        assert options["verify-required"] == ""
    pinned = {"force-command", "source-address", "verify-required"} - allowed.allowed_critical_options
    assert {name for name, _ in asked.critical_options}.isdisjoint(pinned)
    assert made.reason or not allowed.reason_required


def test_without_a_key_the_other_rules_are_still_explained() -> None:
    explained = [
        finding for finding, _ in explain(identity(), role(), ask(), None, ADDRESS, NO_USAGE, "it is malformed")
    ]
    assert (explained[0].outcome, explained[0].detail) == ("skipped", "it is malformed")
    assert {finding.outcome for finding in explained[1:]} == {"ok"}


def test_a_role_is_the_callers_or_refused_or_unknown() -> None:
    read = builders.policy()
    agent, stranger = read.identities["deploy-agent"], read.identities["stranger"]
    assert read.role_for(agent, "llmops") is read.roles["llmops"]
    assert read.role_for(agent, "none") is None
    with pytest.raises(Refused) as caught:
        read.role_for(stranger, "llmops")
    assert caught.value.code == "role_not_granted"


def test_the_codes_of_a_credential_that_is_not_accepted_are_those_that_the_edge_knows() -> None:
    raised = set(re.findall(r'"(token_\w+)"', Path(decide_module.__file__).read_text()))
    assert raised | {"session_ended"} == set(TOKEN_CODES)
