"""Pages that stay up to date: when a waiting page gets its part, and how many may wait."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from signer.api.console import live
from signer.api.console.live import MAX_LIVE, SETTLE_SECONDS, LivePages, live_call
from signer.api.console.session import HEADERS
from signer.api.vault.responses import HttpResponse
from signer.api.waiting import Waiters

pytestmark = pytest.mark.unix_socket  # an event loop has a pair of them
SEEN, OTHER = "0123456789abcdef", "fedcba9876543210"
CREDENTIAL = "console_" + 43 * "x"


@pytest.mark.parametrize(
    "method, path, query, found",
    [
        ("GET", "/console/requests", f"fragment=1&wait=50&seen={SEEN}", (SEEN, 50)),
        ("GET", "/console/requests/r-abcdefghij", f"state=all&fragment=1&wait=0&seen={SEEN}", (SEEN, 0)),
        ("POST", "/console/requests", f"fragment=1&wait=50&seen={SEEN}", None),
        ("GET", "/api/requests", f"fragment=1&wait=50&seen={SEEN}", None),
        ("GET", "/console/requests", f"wait=50&seen={SEEN}", None),
        ("GET", "/console/requests", "fragment=1&wait=50", None),
        ("GET", "/console/requests", "fragment=1&wait=50&seen=x", None),
        ("GET", "/console/requests", f"fragment=1&wait=500&seen={SEEN}", None),
        ("GET", "/console/requests", f"fragment=1&wait=-1&seen={SEEN}", None),
        ("GET", "/console/requests", f"fragment=1&wait=²&seen={SEEN}", None),
        ("GET", "/console/requests", 'fragment=1&wait=5&seen="\r\n0123456789a', None),
    ],
)
def test_only_a_part_waits(method: str, path: str, query: str, found: tuple[str, int] | None) -> None:
    assert live_call({"REQUEST_METHOD": method, "RAW_PATH": path, "QUERY_STRING": query}) == found


def part(seen: str, status: int = 200) -> HttpResponse:
    return HttpResponse(status, [("ETag", f'"{seen}"')], b"<p>" + seen.encode())


class Bench:
    """Live pages whose part a test changes, and clients that stay."""

    def __init__(self, folder: Path) -> None:
        self.waiters = Waiters(folder / "none")
        self.pages = LivePages(self.waiters)
        self.seen, self.made, self.status = SEEN, 0, 200
        self._looked = asyncio.Event()

    async def make(self) -> HttpResponse:
        self.made += 1
        self._looked.set()
        return part(self.seen, self.status)

    async def has_looked(self, times: int) -> None:
        while self.made < times:
            self._looked.clear()
            await self._looked.wait()

    async def stay(self) -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    def wait(self, seconds: int = 30, receive: Any = None) -> asyncio.Task[HttpResponse | None]:
        waiting = self.pages.wait(CREDENTIAL, SEEN, seconds, self.make, receive or self.stay)
        return asyncio.ensure_future(waiting)


def test_a_page_waits_until_its_part_is_another_one(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        waiting = bench.wait()
        await asyncio.sleep(0)
        bench.waiters._wake(["r-abcdefghij"])  # a change that this page does not show
        await bench.has_looked(2)
        await asyncio.sleep(SETTLE_SECONDS)
        assert not waiting.done()
        bench.seen = OTHER
        bench.waiters._wake(["r-abcdefghij"])
        answer = await waiting
        assert answer is not None
        assert answer.body == b"<p>" + OTHER.encode()
        assert bench.made == 3
        assert bench.waiters._waiting == {}

    asyncio.run(story())


def test_a_change_between_two_waits_is_not_missed(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        bench.seen = OTHER
        answer = await bench.wait()
        assert answer is not None
        assert (int(answer.status), bench.made) == (200, 1)

    asyncio.run(story())


def test_many_changes_at_once_make_the_part_once(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        waiting = bench.wait()
        await asyncio.sleep(0)
        for number in range(100):
            bench.waiters._wake([f"r-{number}"])
            await asyncio.sleep(0)
        await asyncio.sleep(1.5 * SETTLE_SECONDS)
        assert bench.made <= 3
        waiting.cancel()

    asyncio.run(story())


def test_the_end_of_a_session_and_an_error_are_answered_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        for status in (401, 503):
            bench.status = status
            answer = await bench.wait()
            assert answer is not None
            assert int(answer.status) == status

    asyncio.run(story())


def test_without_a_change_the_answer_is_empty_and_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(live, "MAX_WAIT", 0)
        answer = await Bench(tmp_path).wait(99)
        assert answer is not None
        assert (int(answer.status), answer.body) == (204, b"")
        assert set(HEADERS) <= set(answer.headers)

    began = time.monotonic()
    asyncio.run(story())
    assert time.monotonic() - began < 50


def test_a_client_that_is_gone_gets_no_answer_and_leaves_nothing(tmp_path: Path) -> None:
    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def story() -> None:
        bench = Bench(tmp_path)
        assert await bench.wait(receive=leave) is None
        assert bench.waiters._waiting == {}
        assert not bench.pages._of_session

    asyncio.run(story())


def test_a_session_has_few_pages_that_wait_and_the_next_comes_back_later(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path)
        waiting = [bench.wait() for _ in range(MAX_LIVE)]
        await asyncio.sleep(0)
        answer = await bench.wait()
        assert answer is not None
        assert int(answer.status) == 204
        assert dict(answer.headers)["Retry-After"] == "30"
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        again = bench.wait()
        await asyncio.sleep(0.01)
        assert not again.done()
        for task in (*waiting, again):
            task.cancel()
        await asyncio.gather(*waiting, again, return_exceptions=True)
        assert not bench.pages._of_session

    asyncio.run(story())
