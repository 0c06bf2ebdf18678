"""Clients log in without pause while the platform moves to the local CA and back: no login is lost."""

from __future__ import annotations

import time

import pytest

from tests.parts import missing
from tests.parts.clients import Clients, longest_gap
from tests.parts.journalwatch import Watched
from tests.parts.platform import CUTOVER_PHRASE, Platform

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.mark.parametrize("count", [8, pytest.param(30, marks=pytest.mark.long)])
def test_clients_that_try_once_more_lose_no_login_through_cutover_and_rollback(
    count: int, new_platform: Platform
) -> None:
    """The times are for people who run this; `scripts/bench/cutover` measures them."""
    platform = new_platform
    for step, words in (
        ("parity", ("apply", platform.plan(), "--approve", CUTOVER_PHRASE)),
        ("vault", ("rollback", "--config", platform.config.name, "--reason", "clients were watched")),
    ):
        watched = Watched(platform, "cutover", *words)
        assert watched.reaches("step.done", step)  # what comes first does not concern clients, and takes its time
        with Clients(platform, count) as clients:
            clients.wait_for(10)
            watched.go_on()
            began = time.monotonic()
            done = watched.wait()
            ended = time.monotonic()
            clients.wait_for(10)
        assert done.status == 0, done.out
        gap = longest_gap(clients.seen, began, ended)
        print(
            f"{words[0]}: {ended - began:.1f} s with clients, {gap:.1f} s of them without a login;"
            f" {len(clients.seen)} logins, {len(clients.retried)} at the second try"
        )
        assert [one.said for one in clients.lost] == []
        platform.wait_for_mode("local" if words[0] == "apply" else "vault")
        assert len(clients.seen) >= count
