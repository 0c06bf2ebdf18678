"""Who passes the edge first, and that strangers share what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from signer.api import admission as admission_module
from signer.api.admission import (
    KNOWN_FOR,
    MAX_INSIDE,
    MAX_KNOWN,
    MAX_WAITING,
    STRANGERS_PER_SECOND,
    Admission,
    Peer,
    peer_of,
)
from signer.errors import Unavailable
from tests.parts.clock import Clock

pytestmark = pytest.mark.unix_socket  # the event loop wakes itself through a pair of them


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(clock)


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


def come(admission: Admission, peer: Peer = "a", requests: int = 0) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(admission.enter(peer, requests))


async def outcomes(*tasks: asyncio.Task[None]) -> str:
    """`+` for each that entered, `-` for each refused one, `.` for each that waits."""
    for _ in range(3):
        await asyncio.sleep(0)
    return "".join("." if not task.done() else "-" if task.exception() else "+" for task in tasks)


async def use_up(admission: Admission) -> None:
    """Takes the credit of a whole second."""
    for _ in range(STRANGERS_PER_SECOND):
        await admission.enter("x", 0)
        admission.leave()


def test_an_accepted_token_is_known_for_a_minute(admission: Admission, clock: Clock) -> None:
    assert not admission.is_known("t")
    assert not admission.is_known(None)
    admission.accept("t")
    clock.now += KNOWN_FOR - 1
    assert admission.is_known("t")
    assert not admission.is_known("u")
    clock.now += 1
    assert not admission.is_known("t")
    admission.accept("t")
    admission.forget("t")
    assert not admission.is_known("t")


def test_the_number_of_known_tokens_is_bounded(admission: Admission) -> None:
    for number in range(MAX_KNOWN + 10):
        admission.accept(f"t{number}")
    assert not admission.is_known("t0")
    assert admission.is_known(f"t{MAX_KNOWN + 9}")
    assert len(admission._known) == MAX_KNOWN


def test_fifty_a_second_pass_and_sixteen_wait(admission: Admission, clock: Clock) -> None:
    async def scene() -> None:
        await use_up(admission)
        waiting = [come(admission) for _ in range(MAX_WAITING + 4)]
        assert await outcomes(*waiting) == "." * MAX_WAITING + "----"
        clock.now += 3.5 / STRANGERS_PER_SECOND
        admission.admit()
        assert await outcomes(*waiting) == "+++" + "." * (MAX_WAITING - 3) + "----"

    run(scene())


def test_at_most_eight_are_inside(admission: Admission, clock: Clock) -> None:
    async def scene() -> None:
        tasks = [come(admission) for _ in range(MAX_INSIDE + MAX_WAITING + 1)]
        assert await outcomes(*tasks) == "+" * MAX_INSIDE + "." * MAX_WAITING + "-"
        admission.leave()
        assert await outcomes(*tasks) == "+" * (MAX_INSIDE + 1) + "." * (MAX_WAITING - 1) + "-"

    run(scene())


def test_peers_take_turns_and_the_crowd_makes_room(admission: Admission, clock: Clock) -> None:
    async def scene() -> None:
        await use_up(admission)
        crowd = [come(admission, "crowd") for _ in range(MAX_WAITING)]
        await outcomes(*crowd)
        newcomers = [come(admission, "b"), come(admission, "c")]
        assert await outcomes(*newcomers) == ".."
        assert (await outcomes(*crowd)).count("-") == 2
        clock.now += 3.5 / STRANGERS_PER_SECOND
        admission.admit()
        assert await outcomes(*newcomers) == "++"
        assert (await outcomes(*crowd)).count("+") == 1

    run(scene())


def test_within_a_peer_the_connection_with_the_fewest_requests_goes_first(admission: Admission, clock: Clock) -> None:
    async def scene() -> None:
        await use_up(admission)
        busy = [come(admission, "a", 5) for _ in range(MAX_WAITING)]
        await outcomes(*busy)
        newcomer = come(admission, "a", 0)
        assert await outcomes(newcomer) == "."
        assert (await outcomes(*busy)).count("-") == 1
        clock.now += 1.5 / STRANGERS_PER_SECOND
        admission.admit()
        assert await outcomes(newcomer) == "+"

    run(scene())


def test_a_client_that_is_gone_leaves_the_queue(admission: Admission, clock: Clock) -> None:
    async def scene() -> None:
        await use_up(admission)
        gone = come(admission)
        await outcomes(gone)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        stays = come(admission)
        clock.now += 1.5 / STRANGERS_PER_SECOND
        admission.admit()
        assert await outcomes(stays) == "+"

    run(scene())


def test_closed_connections_make_room_for_a_newcomer(admission: Admission, clock: Clock) -> None:
    async def scene() -> None:
        await use_up(admission)
        closed: list[int] = []
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(admission.enter("a", 1, lambda: bool(closed))) for _ in range(MAX_WAITING)]
        assert await outcomes(*tasks, come(admission, requests=1)) == "." * MAX_WAITING + "-"
        closed.append(1)
        assert await outcomes(come(admission, requests=1)) == "."
        assert await outcomes(*tasks) == "-" * MAX_WAITING

    run(scene())


def test_a_newcomer_has_the_room_of_those_who_end_in_the_same_moment(admission: Admission, clock: Clock) -> None:
    async def scene() -> None:
        await use_up(admission)
        closed: list[int] = []
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(admission.enter("a", 1, lambda: bool(closed))) for _ in range(MAX_WAITING)]
        await outcomes(*tasks)
        newcomer = come(admission, requests=1)
        loop.call_soon(closed.append, 1)  # the loop reads these ends after the newcomer's request
        assert await outcomes(newcomer) == "."

    run(scene())


def test_the_refusal_says_what_to_do() -> None:
    busy = admission_module.busy()
    assert isinstance(busy, Unavailable)
    assert (busy.code, busy.hint) == ("edge_busy", "retry in a second")


@pytest.mark.parametrize(
    "address, peer",
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_peer_is_an_address_or_the_network_of_one_sender(address: str, peer: str) -> None:
    assert peer_of(address) == peer
