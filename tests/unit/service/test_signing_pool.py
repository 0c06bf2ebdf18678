"""Grants on their way to Vault: bounded in number and time, each answered once, and no thread lost for good."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.ca.backends import SLOW_VAULT
from signer.errors import SignerError, Unavailable
from signer.model import Returned
from signer.service import signing_pool
from signer.service.signing_pool import MAX_OUTSTANDING, THREADS, SigningPool
from signer.ssh.signing import Obtained
from tests.parts.eventually import eventually

DONE = Returned("a line", b"a key")


class Vault:
    """Signs at once, or when it is let."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.asked: list[Returned] = []
        self.fails: Exception | None = None

    def obtain(self) -> Returned:
        self.asked.append(DONE)
        assert self.may_go_on.wait(30)
        if self.fails is not None:
            raise self.fails
        return DONE


class Clock:
    """The time as `forwarding` sees it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(signing_pool, "time", made)
    return made


@pytest.fixture
def vault() -> Iterator[Vault]:
    made = Vault()
    yield made
    made.may_go_on.set()


def start(vault: Vault, **options: int) -> tuple[SigningPool[int], threading.Event]:
    woken = threading.Event()
    return SigningPool[int](SLOW_VAULT, woken.set, **options), woken


def all_of(pool: SigningPool[int], count: int) -> dict[int, Obtained | SignerError]:
    found: dict[int, Obtained | SignerError] = {}

    def look() -> bool:
        for key, result in pool.collect():
            assert key not in found, "answered twice"
            found[key] = result
        return len(found) >= count

    eventually(look, f"{count} results")
    return found


def codes(results: list[tuple[int, Obtained | SignerError]]) -> dict[int, str]:
    return {key: result.code if isinstance(result, SignerError) else "signed" for key, result in results}


def test_each_grant_comes_back_once_with_its_key(vault: Vault) -> None:
    pool, woken = start(vault)
    for key in range(40):
        pool.submit(key, vault.obtain)
    assert all_of(pool, 40) == dict.fromkeys(range(40), DONE)
    assert woken.is_set()
    assert pool.is_idle()
    assert pool.close() == []


def test_an_error_comes_back_as_it_is_and_a_fault_of_ours_as_one_without_its_words(vault: Vault) -> None:
    pool, _ = start(vault)
    vault.fails = Unavailable("vault_sealed", "Vault is sealed", "unseal it")
    pool.submit(1, vault.obtain)
    assert all_of(pool, 1)[1] is vault.fails
    vault.fails = RuntimeError("with a token in it")
    pool.submit(2, vault.obtain)
    result = all_of(pool, 1)[2]
    assert isinstance(result, Unavailable)
    assert result.code == "vault_failed"
    assert "token" not in f"{result.text}{result.hint}{result.facts}"
    pool.close()


def test_the_one_who_would_be_too_many_is_told_at_once(vault: Vault, clock: Clock) -> None:
    vault.may_go_on.clear()
    pool, _ = start(vault)
    for key in range(MAX_OUTSTANDING):
        pool.submit(key, vault.obtain)
    with pytest.raises(Unavailable) as caught:
        pool.submit(99, vault.obtain)
    assert caught.value.code == "vault_busy"
    vault.may_go_on.set()
    assert len(all_of(pool, MAX_OUTSTANDING)) == MAX_OUTSTANDING
    pool.submit(99, vault.obtain)
    assert all_of(pool, 1) == {99: DONE}
    pool.close()


def test_while_answers_are_slow_fewer_may_wait(vault: Vault, clock: Clock) -> None:
    vault.may_go_on.clear()
    pool, _ = start(vault, max_when_slow=3)
    for key in range(5):
        pool.submit(key, vault.obtain)
    clock.now += signing_pool.SLOW_AFTER
    with pytest.raises(Unavailable) as caught:
        pool.submit(5, vault.obtain)
    assert caught.value.code == "vault_busy"
    vault.may_go_on.set()
    all_of(pool, 5)
    pool.submit(6, vault.obtain)
    assert all_of(pool, 1) == {6: DONE}
    pool.close()


def test_one_may_always_wait_however_slow_it_is(vault: Vault, clock: Clock) -> None:
    vault.may_go_on.clear()
    pool, _ = start(vault, max_when_slow=1)
    pool.submit(1, vault.obtain)
    clock.now += SLOW_VAULT.deadline
    assert codes(pool.collect()) == {1: "vault_slow"}
    pool.submit(2, vault.obtain)
    assert not pool.is_idle()
    pool.close()


def test_what_is_overdue_is_given_up_and_its_late_result_thrown_away(vault: Vault, clock: Clock) -> None:
    vault.may_go_on.clear()
    pool, woken = start(vault)
    pool.submit(1, vault.obtain)
    eventually(lambda: vault.asked, "it is sent")
    clock.now += SLOW_VAULT.deadline - 0.001
    assert pool.collect() == []
    clock.now += 0.001
    assert codes(pool.collect()) == {1: "vault_slow"}
    assert pool.is_idle()
    vault.may_go_on.set()
    assert woken.wait(30), "the late result arrives"
    assert pool.collect() == []
    pool.close()


def test_what_is_overdue_before_a_thread_is_free_is_never_sent(vault: Vault, clock: Clock) -> None:
    vault.may_go_on.clear()
    pool, _ = start(vault)
    for key in range(THREADS + 5):
        pool.submit(key, vault.obtain)
    eventually(lambda: len(vault.asked) == THREADS, "all threads are busy")
    clock.now += SLOW_VAULT.deadline
    assert len(codes(pool.collect())) == THREADS + 5
    vault.may_go_on.set()
    pool.submit(99, vault.obtain)
    assert all_of(pool, 1) == {99: DONE}
    assert len(vault.asked) == THREADS + 1
    pool.close()


def test_closing_gives_up_what_is_out_and_starts_nothing_more(vault: Vault) -> None:
    vault.may_go_on.clear()
    pool, _ = start(vault)
    for key in range(THREADS + 5):
        pool.submit(key, vault.obtain)
    eventually(lambda: len(vault.asked) == THREADS, "all threads are busy")
    assert codes(pool.close()) == dict.fromkeys(range(THREADS + 5), "keeper_stopping")
    assert pool.collect() == []


def test_closing_still_hands_over_what_came_back(vault: Vault) -> None:
    pool, woken = start(vault)
    pool.submit(1, vault.obtain)
    assert woken.wait(30)
    assert codes(pool.close()) == {1: "signed"}


def test_closing_ends_the_threads(vault: Vault) -> None:
    before = set(threading.enumerate())
    pool, _ = start(vault)
    mine = set(threading.enumerate()) - before
    assert len(mine) == THREADS
    pool.close()
    for thread in mine:
        thread.join(30)
    assert not [thread for thread in mine if thread.is_alive()]


def test_threads_that_hang_do_not_keep_the_process() -> None:
    program = """
import threading
from signer.ca.backends import SLOW_VAULT
from signer.service.signing_pool import SigningPool
started = threading.Event()
def obtain():
    started.set()
    threading.Event().wait()
pool = SigningPool(SLOW_VAULT, lambda: None)
pool.submit(1, obtain)
assert started.wait(30)
print([error.code for _, error in pool.close()])
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "['keeper_stopping']", "")
