"""The list of host keys: who changes it, what it takes, and that events alone make it."""

from __future__ import annotations

from typing import Any

import pytest

from signer.authority.hosts import MAX_HOSTS, MAX_LIST_BYTES, MAX_PRINCIPALS, HostList, principals_of
from signer.errors import BadFile, SignerError
from signer.model import Entry, KnownHost
from signer.protocol.commands import AddHostKeys, Freeze, ListHostKeys, RemoveHostKeys
from signer.ssh.known_hosts import key_line
from tests.parts import builders
from tests.parts.builders import NOW, Bench, caller, policy, public_key

KEY = key_line(public_key())
SECOND = key_line(public_key("ecdsa-sha2-nistp256"))


def add(
    name: str = "edge1",
    *addresses: str,
    keys: tuple[str, ...] = (KEY,),
    replace: bool = False,
    by: str = "operator",
    principals: tuple[str, ...] | None = None,
) -> AddHostKeys:
    return AddHostKeys(caller(by), name, addresses, keys, replace, principals)


def code_of(reply: Any) -> str:
    assert isinstance(reply, SignerError), reply
    return reply.code


def rendered(bench: Bench) -> str:
    return bench.core.known_hosts(int(NOW)).decode()


def test_a_host_is_listed_recorded_and_rendered_and_a_restart_makes_the_same_bytes() -> None:
    bench = Bench()
    assert bench.core.hosts_version() == 0
    (reply,) = bench.ask(add("EDGE1", "192.0.2.7", "[Edge1]:2222", keys=(f"{KEY} root@edge1", SECOND, KEY)))
    assert [key["kind"] for key in reply["keys"]] == ["ssh-ed25519", "ecdsa-sha2-nistp256"]
    (body,) = bench.store.bodies("host.added")
    assert body == {"name": "edge1", "addresses": ["192.0.2.7", "[edge1]:2222"], "keys": [KEY, SECOND]}
    version = bench.store.entries[-1].seq
    names = "edge1,192.0.2.7,[edge1]:2222"
    first = f"# known-hosts.v1@signer version={version} as_of=2027-01-15T08:00:00Z\n"
    assert rendered(bench) == f"{first}{names} {KEY}\n{names} {SECOND}\n"
    assert bench.core.hosts_version() == version
    before = rendered(bench)
    bench.restart()
    assert rendered(bench) == before


def test_a_removed_host_is_gone_and_the_version_rises() -> None:
    bench = Bench()
    bench.ask(add(), add("edge2"))
    added = bench.core.hosts_version() or 0
    assert bench.ask(RemoveHostKeys(caller("operator"), "Edge1"))[0] == {"name": "edge1"}
    assert (bench.core.hosts_version() or 0) > added
    assert "edge1" not in rendered(bench)
    assert "edge2" in rendered(bench)
    assert code_of(bench.ask(RemoveHostKeys(caller("operator"), "edge1"))[0]) == "unknown_host"
    bench.restart()
    assert "edge1" not in rendered(bench)


def test_listed_keys_are_replaced_only_by_who_says_so() -> None:
    bench = Bench()
    bench.ask(add())
    assert code_of(bench.ask(add(keys=(SECOND,)))[0]) == "host_exists"
    assert SECOND not in rendered(bench)
    bench.ask(add(keys=(SECOND,), replace=True))
    assert KEY not in rendered(bench)
    assert SECOND in rendered(bench)


def test_the_same_again_changes_and_records_nothing() -> None:
    bench = Bench()
    first, again = bench.ask(add("edge1", "a", "b", keys=(KEY, SECOND)), add("edge1", "b", "a", keys=(SECOND, KEY)))
    assert again == first
    assert bench.ask(add("edge1", "a", "b", keys=(KEY, SECOND)))[0] == first
    assert bench.store.kinds().count("host.added") == 1
    other = Bench()
    other.store.fail = "before"
    assert [code_of(reply) for reply in other.ask(add(), add())] == ["ledger_unavailable"] * 2


def test_one_address_has_the_keys_of_one_host() -> None:
    bench = Bench()
    bench.ask(add("edge1", "192.0.2.7"))
    assert code_of(bench.ask(add("edge2", "192.0.2.7", keys=(SECOND,)))[0]) == "host_address_taken"
    assert code_of(bench.ask(add("192.0.2.7", keys=(SECOND,), replace=True))[0]) == "host_address_taken"
    assert code_of(bench.ask(RemoveHostKeys(caller("operator"), "192.0.2.7"))[0]) == "unknown_host"
    bench.ask(RemoveHostKeys(caller("operator"), "edge1"), add("edge2", "192.0.2.7", keys=(SECOND,)))
    assert f"edge2,192.0.2.7 {SECOND}" in rendered(bench)


@pytest.mark.parametrize(
    "name",
    ["*", "?", "!edge1", "edge*", "a,b", "a b", "a\tb", "edge1\n* ssh-ed25519 AAAA", "@cert-authority", "|1|x|y",
     "#x", "", "[a]:0", "[a]:65536", "[*]:22", "-oProxyCommand=x", "$(id)", "a;b", "10.0.0", "0x7f.1", "fe80::1%eth0",
     "ed\u0455e1", "\u202eegde"],
)  # fmt: skip
def test_a_name_is_never_a_pattern_a_marker_or_a_second_line(name: str) -> None:
    bench = Bench()
    assert code_of(bench.ask(add(name))[0]) == "host_name_malformed"
    assert code_of(bench.ask(add("edge1", name))[0]) == "host_name_malformed"
    assert "host.added" not in bench.store.kinds()


@pytest.mark.parametrize(
    "line",
    ["", "ssh-ed25519", "ssh-ed25519 AAAA", f"@cert-authority {KEY}", f"edge1 {KEY}", f"@revoked * {KEY}",
     "ssh-dss AAAAB3NzaC1kc3MAAAAA", key_line(public_key("sk-ssh-ed25519@openssh.com"))],
)  # fmt: skip
def test_a_key_is_one_plain_key(line: str) -> None:
    bench = Bench()
    assert code_of(bench.ask(add(keys=(line,)))[0]) == "host_key_refused"
    assert code_of(bench.ask(add(keys=(KEY, line)))[0]) == "host_key_refused"
    assert "host.added" not in bench.store.kinds()


@pytest.mark.parametrize("who", ["deploy-agent", "stranger"])
def test_without_the_right_the_list_is_neither_changed_nor_seen(who: str) -> None:
    bench = Bench()
    bench.ask(add())
    for command in (add("edge2", by=who), RemoveHostKeys(caller(who), "edge1")):
        assert code_of(bench.ask(command)[0]) in ("hosts_need_human", "not_permitted")
    assert code_of(bench.ask(ListHostKeys(caller(who), None))[0]) == "not_permitted"
    assert bench.store.kinds().count("host.added") == 1


def test_who_is_frozen_by_name_changes_no_host() -> None:
    bench = Bench()
    bench.ask(add(), Freeze(caller("operator"), "identity:operator", "their token leaked"))
    assert code_of(bench.ask(add("edge2"))[0]) == "frozen"
    assert code_of(bench.ask(RemoveHostKeys(caller("operator"), "edge1"))[0]) == "frozen"


@pytest.mark.parametrize("kind", ["agent", "workload"])
def test_policy_gives_the_right_to_no_agent_and_no_workload(kind: str) -> None:
    right = ("[identities.deploy-agent]", '[identities.deploy-agent]\nmay = ["hosts"]')
    with pytest.raises(BadFile) as refused:
        policy(builders.POLICY, right, ('kind = "agent"', f'kind = "{kind}"'))
    assert "can never change the keys of hosts" in str(refused.value.facts)


def test_nothing_of_a_batch_that_was_not_recorded_is_listed_or_shown() -> None:
    bench = Bench()
    bench.store.fail = "before"
    replies = bench.ask(add(), ListHostKeys(caller("operator"), None), RemoveHostKeys(caller("operator"), "edge1"))
    assert [code_of(reply) for reply in replies] == ["ledger_unavailable"] * 3
    bench.store.fail = ""
    assert bench.ask(ListHostKeys(caller("operator"), None))[0]["hosts"] == []


def _filled(count: int) -> HostList:
    found = HostList()
    for number in range(count):
        found._put(KnownHost((f"h{number:05}",), (KEY,), "operator", int(NOW)))
    return found


def test_ten_thousand_hosts_fit_are_paged_and_no_more_are_taken() -> None:
    hosts = _filled(MAX_HOSTS)
    assert len(hosts.render(0)) < MAX_LIST_BYTES
    operator = builders.identity(name="operator", kind="human", may=frozenset({"hosts"}))
    with pytest.raises(SignerError) as refused:
        hosts.add(add("one-more"), operator, {}, 0)
    assert refused.value.code == "host_list_full"
    hosts.add(add("h00000", replace=True), operator, {}, 0)
    seen, after = [], None
    while True:
        page = hosts.page(ListHostKeys(caller("operator"), after), operator)
        assert len(page.as_json()) < 64 * 1024
        seen += [host.name for host in page.hosts]
        if (after := page.after) is None:
            break
    assert seen == [f"h{number:05}" for number in range(MAX_HOSTS)]


def test_a_list_that_clients_would_not_read_is_not_made() -> None:
    hosts = HostList()
    operator = builders.identity(name="operator", kind="human", may=frozenset({"hosts"}))
    long = tuple(f"{'x' * 60}.{'y' * 60}.{'z' * 60}.n{number}" for number in range(7))
    code = ""
    for number in range(MAX_HOSTS):
        mine = tuple(f"{number}.{name}" for name in long)
        try:
            hosts.add(add(f"h{number}", *mine, keys=(KEY, SECOND)), operator, {}, 0)
        except SignerError as refused:
            code = refused.code
            break
    assert code == "host_list_full"
    assert len(hosts.render(0)) <= MAX_LIST_BYTES + 200


def test_the_size_that_is_counted_is_the_size_that_is_rendered() -> None:
    bench = Bench()
    bench.ask(add("edge1", "192.0.2.7"), add("edge2", keys=(KEY, SECOND)), add("edge2", "e", replace=True))
    bench.ask(RemoveHostKeys(caller("operator"), "edge1"))
    hosts = HostList.from_entries(entry for entry in bench.store.entries if entry.kind.startswith("host."))
    assert hosts._size == len(hosts.render(0).split(b"\n", 1)[1])


# --- principals -------------------------------------------------------------------------------------------------


def listed(bench: Bench) -> dict[str, Any]:
    return {host["name"]: host["principals"] for host in bench.ask(ListHostKeys(caller("operator"), None))[0]["hosts"]}


def test_principals_are_recorded_sorted_and_each_once_and_a_restart_has_them() -> None:
    bench = Bench()
    assert bench.ask(add(principals=("ops", "llmops", "ops")), add("edge2"))[0]["principals"] == ["llmops", "ops"]
    assert bench.store.bodies("host.added") == [
        {"name": "edge1", "addresses": [], "keys": [KEY], "principals": ["llmops", "ops"]},
        {"name": "edge2", "addresses": [], "keys": [KEY]},
    ]
    assert listed(bench) == {"edge1": ["llmops", "ops"], "edge2": None}
    bench.restart()
    assert listed(bench) == {"edge1": ["llmops", "ops"], "edge2": None}


def test_other_principals_replace_the_recorded_ones_without_replace_and_none_leaves_them() -> None:
    bench = Bench()
    bench.ask(add())
    for given, known in ((("ops",), ["ops"]), (None, ["ops"]), (("root", "dev"), ["dev", "root"])):
        assert bench.ask(add(principals=given))[0]["principals"] == known
        assert listed(bench) == {"edge1": known}
    assert bench.store.kinds().count("host.added") == 3  # None changed nothing
    assert bench.ask(add(principals=("dev", "root")))[0]["principals"] == ["dev", "root"]
    assert bench.store.kinds().count("host.added") == 3
    bench.ask(add(keys=(SECOND,), replace=True))  # set up anew, and lets in whom it let in before
    bench.restart()
    assert listed(bench) == {"edge1": ["dev", "root"]}
    bench.ask(RemoveHostKeys(caller("operator"), "edge1"), add())
    assert listed(bench) == {"edge1": None}


def test_principals_with_other_keys_or_names_change_nothing_without_replace() -> None:
    bench = Bench()
    bench.ask(add(principals=("ops",)))
    for command in (add(keys=(SECOND,), principals=("root",)), add("edge1", "192.0.2.7", principals=("root",))):
        assert code_of(bench.ask(command)[0]) == "host_exists"
    assert listed(bench) == {"edge1": ["ops"]}
    assert bench.store.kinds().count("host.added") == 1


@pytest.mark.parametrize(
    "principals",
    [(), ("",), ("ops", ""), ("a b",), ("a,b",), ("*",), ("{identity}",), ("ops\n",), ("\u043eps",), ("x" * 257,),
     tuple(f"p{number}" for number in range(65))],
)  # fmt: skip
def test_principals_are_names_that_a_certificate_can_have_64_at_most(principals: tuple[str, ...]) -> None:
    bench = Bench()
    assert code_of(bench.ask(add(principals=principals))[0]) == "host_principals_malformed"
    assert "host.added" not in bench.store.kinds()


def test_64_principals_of_256_characters_are_taken_and_pages_of_them_fit_into_a_reply() -> None:
    hosts = HostList()
    operator = builders.identity(name="operator", kind="human", may=frozenset({"hosts"}))
    names = tuple(f"{number:02}" + "\\" * 254 for number in range(64))
    for number in range(5):
        hosts.add(add(f"h{number}", principals=names), operator, {}, 0)
    hosts.add(add("h5"), operator, {}, 0)
    seen, after = [], None
    while True:
        page = hosts.page(ListHostKeys(caller("operator"), after), operator)
        assert len(page.as_json()) < 128 * 1024
        seen += [(host.name, host.principals) for host in page.hosts]
        if (after := page.after) is None:
            break
    assert seen == [*((f"h{number}", sorted(names)) for number in range(5)), ("h5", None)]


def test_the_principals_of_all_hosts_are_bounded_and_room_comes_back() -> None:
    hosts = HostList()
    operator = builders.identity(name="operator", kind="human", may=frozenset({"hosts"}))
    names = tuple(f"{number:02}" + "x" * 254 for number in range(64))
    full = MAX_PRINCIPALS // (64 * 256)
    for number in range(full):
        hosts.add(add(f"h{number}", principals=names), operator, {}, 0)
    with pytest.raises(SignerError) as refused:
        hosts.add(add("one-more", principals=("p",)), operator, {}, 0)
    assert refused.value.code == "host_list_full"
    hosts.add(add("none"), operator, {}, 0)
    hosts.add(add("h0", principals=names[1:]), operator, {}, 0)
    hosts.add(add("one-more", principals=("p",)), operator, {}, 0)


def test_a_host_is_found_by_any_of_its_names_and_says_whom_it_lets_in() -> None:
    bench = Bench()
    bench.ask(add("edge1", "192.0.2.7", principals=("ops",)), add("edge2"))
    hosts = HostList.from_entries(entry for entry in bench.store.entries if entry.kind.startswith("host."))
    for name in ("edge1", "EDGE1", "192.0.2.7"):
        assert principals_of(hosts.find(name)) == ("ops",)
    with pytest.raises(SignerError) as unknown:
        hosts.find("edge3")
    assert unknown.value.code == "unknown_host"
    assert "signer hosts add edge3 " in (unknown.value.hint or "")
    with pytest.raises(SignerError) as malformed:
        hosts.find("edge*")
    assert malformed.value.code == "host_name_malformed"
    with pytest.raises(SignerError) as unrecorded:
        principals_of(hosts.find("edge2"))
    assert unrecorded.value.code == "host_principals_unknown"
    assert "signer hosts add edge2 --keys FILE --principals" in (unrecorded.value.hint or "")


def test_an_event_of_an_earlier_release_has_no_principals() -> None:
    body = f'{{"addresses":[],"keys":["{KEY}"],"name":"edge1"}}'
    hosts = HostList.from_entries([Entry(7, 1_000, "host.added", "operator", body, "", "")])
    assert hosts.hosts["edge1"].principals is None


def test_an_event_of_a_later_release_may_have_more_fields() -> None:
    body = f'{{"accounts":["root"],"addresses":[],"keys":["{KEY}"],"name":"edge1"}}'
    hosts = HostList.from_entries([Entry(7, 1_000, "host.added", "operator", body, "", "")])
    assert (hosts.version, list(hosts.hosts)) == (7, ["edge1"])
