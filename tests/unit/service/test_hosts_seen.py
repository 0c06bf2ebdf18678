"""Hosts that fetched: bounded, and what a stranger says pushes out neither registered hosts nor those of others."""

from __future__ import annotations

from signer.service.hosts_seen import FORGOTTEN_AFTER, MAX_HOSTS, MAX_OF_PEER, Fetch, HostsSeen

NOW = 1_800_000_000


def names(seen: HostsSeen, now: int = NOW) -> list[str]:
    return [fetch.host for fetch in seen.rows(now)]


def test_the_newest_fetch_of_each_host_counts() -> None:
    seen = HostsSeen()
    seen.note([Fetch("edge2", 1, NOW, "a"), Fetch("edge1", 1, NOW, "a"), Fetch("edge2", 2, NOW + 1, "b")])
    assert seen.rows(NOW) == [Fetch("edge1", 1, NOW, "a"), Fetch("edge2", 2, NOW + 1, "b")]


def test_one_address_can_name_only_some() -> None:
    seen = HostsSeen()
    seen.note([Fetch("edge1", 1, NOW, "honest")])
    seen.note([Fetch(f"x{number}", 1, NOW, "flood") for number in range(5_000)])
    assert len(names(seen)) == MAX_OF_PEER + 1
    assert "edge1" in names(seen)
    seen.note([Fetch("x1", 2, NOW, "flood")])  # one that it named before
    assert next(fetch for fetch in seen.rows(NOW) if fetch.host == "x1").version == 2


def test_a_thousand_hosts_of_their_own_addresses_have_room_and_the_next_takes_the_place_of_the_oldest() -> None:
    seen = HostsSeen()
    seen.note([Fetch(f"h{number:04}", 1, NOW, f"p{number}") for number in range(MAX_HOSTS)])
    assert len(names(seen)) == MAX_HOSTS
    seen.note([Fetch("h0000", 2, NOW, "p0"), Fetch("late", 1, NOW, "q")])
    found = names(seen)
    assert len(found) == MAX_HOSTS
    assert {"h0000", "late"} <= set(found)
    assert "h0001" not in found


def test_registered_hosts_always_have_room_and_no_flood_pushes_them_out() -> None:
    registered = {f"edge{number}" for number in range(200)}
    seen = HostsSeen(lambda: registered)
    seen.note([Fetch(name, 1, NOW, "nat") for name in registered])  # behind one address
    seen.note([Fetch(f"x{number}", 1, NOW, f"p{number}") for number in range(3_000)])
    assert registered <= set(names(seen))
    assert len(names(seen)) == MAX_HOSTS
    registered.add("new")
    seen.note([Fetch("new", 1, NOW, "nat")])
    assert "new" in names(seen)
    assert len(names(seen)) == MAX_HOSTS


def test_when_only_registered_ones_are_there_a_stranger_finds_no_room() -> None:
    registered = {f"edge{number}" for number in range(MAX_HOSTS)}
    seen = HostsSeen(lambda: registered)
    seen.note([Fetch(name, 1, NOW, "nat") for name in registered])
    seen.note([Fetch("x", 1, NOW, "p")])
    assert "x" not in names(seen)


def test_a_host_that_moves_gives_its_place_at_the_former_address_back() -> None:
    seen = HostsSeen()
    seen.note([Fetch(f"x{number}", 1, NOW, "a") for number in range(MAX_OF_PEER)])
    seen.note([Fetch("x0", 1, NOW, "b"), Fetch("y", 1, NOW, "a")])
    assert {"x0", "y"} <= set(names(seen))


def test_hosts_that_are_gone_are_forgotten() -> None:
    seen = HostsSeen()
    seen.note([Fetch("old", 1, NOW, "a"), Fetch("new", 1, NOW + 10, "a")])
    assert names(seen, NOW + FORGOTTEN_AFTER) == ["new", "old"]
    assert names(seen, NOW + FORGOTTEN_AFTER + 1) == ["new"]
