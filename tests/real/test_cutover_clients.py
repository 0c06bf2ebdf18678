"""30 clients log in without pause while the platform moves to the local CA and back: no login is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.parts import missing
from tests.parts.clients import Clients, longest_gap
from tests.parts.container import Ended
from tests.parts.platform import Platform

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(500)]


def test_30_clients_that_try_once_more_lose_no_login_through_cutover_and_rollback(new_platform: Platform) -> None:
    """The times are for people who run this; `scripts/bench/cutover` measures them."""
    platform = new_platform
    plan = platform.plan()
    operations: dict[str, Callable[[], Ended]] = {
        "cutover": lambda: platform.apply(plan),
        "rollback": lambda: platform.rollback("clients were watched"),
    }
    with Clients(platform, 30) as clients:
        for name, operation in operations.items():
            clients.wait_for(30)
            began = time.monotonic()
            done = operation()
            ended = time.monotonic()
            assert done.status == 0, done.err
            clients.wait_for(30)
            gap = longest_gap(clients.seen, began, ended)
            print(f"{name}: {ended - began:.1f} s, {gap:.1f} s of them without a login")
    print(f"{len(clients.seen)} logins, {len(clients.retried)} at the second try")
    assert [one.said for one in clients.lost] == []
    signed_by = Counter(row["backend"] for row in platform.certificates(identity="deploy-agent"))
    assert set(signed_by) == {"vault", "local"}
    assert sum(signed_by.values()) >= len(clients.seen)
