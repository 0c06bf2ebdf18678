"""What counts towards limits, and what is folded: by the second, and bounded."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from signer.authority.limits import MAX_KINDS, MAX_STRANGER_KINDS, UNAUTHENTICATED, WINDOW, CertificateUsage, Refusals
from signer.model import Event, UsageCounts


def refusal(actor: str = "a", code: str = "c", role: str = "r", address: str = "x") -> Event:
    return Event("request.refused", actor, {"code": code, "role": role, "address": address})


def test_a_certificate_counts_for_60_seconds_and_until_it_expires() -> None:
    held = CertificateUsage([("a", "r", 100, 400)])
    assert held.usage("a", "r", 100) == UsageCounts(1, 1, 60, 300)
    assert held.usage("a", "r", 159) == UsageCounts(1, 1, 1, 241)
    assert held.usage("a", "r", 160) == UsageCounts(0, 1, 0, 240)
    assert held.usage("a", "r", 399) == UsageCounts(0, 1, 0, 1)
    assert held.usage("a", "r", 400) == UsageCounts(0, 0)


def test_others_certificates_do_not_count() -> None:
    held = CertificateUsage([("a", "r", 100, 400)])
    assert held.usage("b", "r", 100) == held.usage("a", "s", 100) == UsageCounts()


def test_a_certificate_that_was_never_signed_is_not_live() -> None:
    held = CertificateUsage([("a", "r", 100, 400), ("a", "r", 100, 300), ("a", "r", 100, 200)])
    held.withhold("a", "r", 100, 300)
    assert held.usage("a", "r", 100) == UsageCounts(2, 2, 60, 100)
    assert held.usage("a", "r", 200) == UsageCounts(0, 1, 0, 200)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=40), st.integers(0, 700))
def test_usage_is_what_counting_by_hand_gives(rows: list[tuple[int, int]], now: int) -> None:
    issued = sorted((at, at + ttl) for at, ttl in rows if at <= now)
    held = CertificateUsage(("a", "r", at, end) for at, end in issued)
    recent, live = [at for at, _ in issued if at > now - 60], [end for _, end in issued if end > now]
    expected = UsageCounts(
        len(recent), len(live), min(recent) + 60 - now if recent else 0, min(live) - now if live else 0
    )
    assert held.usage("a", "r", now) == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.booleans(), st.integers(0, 3)), max_size=40))
def test_usage_stays_right_while_time_passes_and_certificates_are_withheld(
    steps: list[tuple[int, int, bool, int]],
) -> None:
    held, counted, now = CertificateUsage(), list[tuple[int, int]](), 0
    for _, ttl, is_withheld, passed in steps:
        now += passed * 7
        counted.append((now, now + ttl * 10))
        held.add("a", "r", *counted[-1])
        if is_withheld:
            gone = counted.pop(len(counted) // 2)
            held.withhold("a", "r", *gone)
        recent = [at for at, _ in counted if at > now - WINDOW]
        live = [end for _, end in counted if end > now]
        assert held.usage("a", "r", now) == UsageCounts(
            len(recent), len(live), min(recent) + WINDOW - now if recent else 0, min(live) - now if live else 0
        )
    held.withhold("a", "r", 10**6, 10**6)
    assert held.usage("a", "r", now + 10**6) == UsageCounts()


def test_many_certificates_take_no_more_memory_than_the_seconds_in_which_they_end() -> None:
    """200,000 valid ones took 17 MB, one heap entry each."""
    tracemalloc.start()
    try:
        held = CertificateUsage(("a", "r", 10_000 + n // 500, 10_900 + n // 500) for n in range(200_000))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held.usage("a", "r", 10_400).live == 200_000
    assert size < 200_000


def test_the_first_refusal_of_a_kind_is_told_and_the_rest_counted() -> None:
    folding = Refusals()
    assert list(folding.note(refusal(), 100)) == [refusal()]
    assert list(folding.note(refusal(), 159)) == []
    told = list(folding.note(refusal(), 160))
    assert [event.kind for event in told] == ["refusals.repeated", "request.refused"]
    assert told[0].body["count"] == 1


def test_each_kind_of_refusal_is_told() -> None:
    folding = Refusals()
    kinds = [refusal(), refusal(actor="b"), refusal(code="d"), refusal(role="s"), refusal(address="y")]
    assert [list(folding.note(event, 100)) for event in kinds] == [[event] for event in kinds]


def test_counts_are_due_when_their_minute_is_over_and_only_once() -> None:
    folding = Refusals()
    for _ in range(3):
        list(folding.note(refusal(), 100))
    assert folding.due(100 + WINDOW - 1) == []
    assert [event.body["count"] for event in folding.due(100 + WINDOW)] == [2]
    assert folding.due(10**9) == []


def test_an_identity_has_kinds_of_its_own_and_the_rest_share_a_count() -> None:
    folding = Refusals()
    told = [event for n in range(MAX_KINDS + 500) for event in folding.note(refusal(role=f"r{n}"), 100)]
    assert len(told) == MAX_KINDS + 1
    assert list(folding.note(refusal(actor="b"), 100)), "another identity's refusal is not hidden"
    (shared,) = folding.flush()
    assert (shared.actor, shared.body["code"], shared.body["count"]) == (refusal().actor, "various", 499)


def test_audit_b2_strangers_are_told_apart_by_code_and_address_only_and_have_a_small_budget() -> None:
    folding = Refusals()
    told = [
        event
        for n in range(5_000)
        for event in folding.note(refusal(actor=UNAUTHENTICATED, role=f"r{n}", address="198.51.100.1"), 100)
    ]
    assert len(told) == 1, "a free role name is no kind of its own"
    told += [
        event
        for n in range(5_000)
        for event in folding.note(refusal(actor=UNAUTHENTICATED, role="r", address=f"198.51.{n // 256}.{n % 256}"), 100)
    ]
    assert len(told) <= MAX_STRANGER_KINDS + 1 <= 65
    counts = folding.flush()
    assert len(counts) <= MAX_STRANGER_KINDS + 1
    assert sum(int(str(event.body["count"])) for event in counts) + len(told) == 10_000


def test_audit_b3_a_flood_of_strangers_hides_no_identitys_refusal() -> None:
    folding = Refusals()
    for n in range(5_000):
        list(folding.note(refusal(actor=UNAUTHENTICATED, address=f"198.51.{n // 256}.{n % 256}"), 100))
    assert list(folding.note(refusal(actor="deploy-agent"), 100)) == [refusal(actor="deploy-agent")]


def test_a_budget_is_free_again_when_its_window_is_over() -> None:
    folding = Refusals()
    for n in range(MAX_STRANGER_KINDS + 10):
        list(folding.note(refusal(actor=UNAUTHENTICATED, address=f"198.51.100.{n}"), 100))
    folding.due(100 + WINDOW)
    other = refusal(actor=UNAUTHENTICATED, address="203.0.113.9")
    assert list(folding.note(other, 100 + WINDOW)) == [other]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 400)), max_size=80))
def test_no_refusal_is_lost(noted: list[tuple[str, int]]) -> None:
    folding = Refusals()
    told = [
        event for actor, at in sorted(noted, key=lambda item: item[1]) for event in folding.note(refusal(actor), at)
    ]
    told += folding.flush()
    counted = sum(1 if event.kind == "request.refused" else int(str(event.body["count"])) for event in told)
    assert counted == len(noted)


batches = st.lists(st.tuples(st.lists(st.sampled_from("abc"), max_size=6), st.integers(0, 90), st.booleans()))


@given(batches)
def test_audit_a_failed_transaction_loses_no_count_and_leaves_each_of_its_kinds_new(
    steps: list[tuple[list[str], int, bool]],
) -> None:
    folding, now, recorded, counted_as_failed, expected = Refusals(), 0, list[Event](), 0, 0
    for actors, pause, is_kept in steps:
        now += pause
        told = [*folding.due(now), *(event for actor in actors for event in folding.note(refusal(actor), now))]
        expected += len(actors)
        if is_kept:
            folding.settle()
            recorded += told
            continue
        folding.restore()
        first = {event.actor for event in told if event.kind == "request.refused"}
        counted_as_failed += len([event for event in told if event.kind == "request.refused"])
        for actor in first:  # would be recorded now; is not kept, so that the step changes nothing
            assert refusal(actor) in list(folding.note(refusal(actor), now))
        folding.restore()
        expected += len(first)
        counted_as_failed += len(first)
    recorded += folding.flush()
    total = sum(1 if event.kind == "request.refused" else int(str(event.body["count"])) for event in recorded)
    assert total == expected - counted_as_failed


def test_a_budget_is_as_before_after_a_failed_transaction() -> None:
    folding = Refusals()
    for n in range(2 * MAX_STRANGER_KINDS):
        list(folding.note(refusal(actor=UNAUTHENTICATED, address=f"198.51.100.{n}"), 100))
        folding.restore()
    for n in range(MAX_STRANGER_KINDS):
        other = refusal(actor=UNAUTHENTICATED, address=f"203.0.113.{n}")
        assert list(folding.note(other, 100)) == [other]
        folding.settle()
