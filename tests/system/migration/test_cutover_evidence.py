"""What a run says was in force at its end is what a real platform has, and its page shows it in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from signer.migration.boot import boot_file
from tests.parts import missing
from tests.parts.browser import SIZES, Browser, Scheme
from tests.parts.journalwatch import Watched
from tests.parts.platform import CUTOVER_PHRASE, Platform

pytestmark = [missing.needs_podman, missing.needs_podman_compose, missing.needs_chromium, pytest.mark.slow,
              pytest.mark.timeout(300)]  # fmt: skip
SCHEMES: tuple[Scheme, ...] = ("light", "dark")


@pytest.fixture
def platform(new_platform: Platform) -> Platform:
    """In mode vault, with nothing done yet."""
    new_platform.reset()
    boot_file(new_platform.evidence_dir).unlink(missing_ok=True)
    return new_platform


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


def newest(platform: Platform, operation: str) -> Path:
    return max(platform.evidence_dir.glob(f"*Z-{operation}"))


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def digests(*paths: Path) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in paths}


def check_page(browser: Browser, run: Path, *told: str) -> None:
    """The page says it, in every size and scheme, and nothing of it is cut off or wrong for a reader of screens."""
    for size in SIZES:
        for scheme in SCHEMES:
            with browser.visit("file://", size=size, scheme=scheme) as visit:
                visit.page.goto(f"file://{run}/evidence.html")
                words = " ".join(visit.page.locator("body").inner_text().split())
                assert [one for one in told if one not in words] == [], words[:3000]
                top = visit.page.locator("header").inner_text()
                assert "Clients' pause" in top
                assert "Approved by" in top
                visit.check_narrow()
                visit.check_accessible()


def test_a_cutover_and_the_way_back_show_what_is_in_force(platform: Platform, browser: Browser) -> None:
    before = platform.ready()
    done = platform.apply(platform.plan())
    assert done.status == 0, done.err
    run, answer, container = newest(platform, "cutover"), platform.ready(), platform.service.inspect()
    look, plan = read(run, "observed.json"), read(run, "plan.json")
    seen = look["observed"]
    assert (seen["mode"], seen["ca"], seen["policy"]) == ("local", answer["ca_fingerprint"], answer["policy"])
    assert seen["image"] == str(container["Image"]).removeprefix("sha256:") == plan["inputs"]["compose"]["image"]
    assert seen["container"]["id"] == container["Id"]
    assert seen["compose_files"] == digests(platform.base, platform.overlay)
    assert seen["starts_at_boot"] == [str(platform.base), str(platform.overlay)]
    assert platform.service.address.removeprefix("http://") in seen["listens"]
    assert {name: seen[name] for name in look["planned"] if name != "principals"} == {
        name: value for name, value in look["planned"].items() if name != "principals"
    }
    assert look["unread"] == {}
    pause = read(run, "steps/06-ready.json")["facts"]["pause_seconds"]
    check_page(browser, run, f"Clients' pause {pause:.1f} s", "9 as planned, 1 as before", "llmops")

    back = platform.rollback()
    assert back.status == 0, back.err
    run = newest(platform, "rollback")
    look = read(run, "observed.json")
    assert (look["observed"]["mode"], look["observed"]["ca"]) == ("vault", before["ca_fingerprint"])
    assert look["observed"]["compose_files"] == digests(platform.base)
    assert read(run, "steps/02-remember.json")["facts"]["mode"] == "local"
    check_page(browser, run, "9 as planned, 1 as before", "nobody: a rollback needs no approval", "Run by root")
    assert platform.verify_evidence().status == 0


def test_an_overlay_that_is_edited_during_the_run_is_marked(platform: Platform, browser: Browser) -> None:
    """The container is what was planned; what the next start makes of the file is not."""

    def edit() -> None:
        with platform.overlay.open("a") as file:
            file.write("# edited during the run\n")

    watched = Watched(platform, "cutover", "apply", platform.plan(), "--approve", CUTOVER_PHRASE)
    ended = watched.at("step.done", "up", edit)
    assert ended.status == 0, ended.out
    assert "differs from the plan: compose files" in ended.out
    run = newest(platform, "cutover")
    assert read(run, "observed.json")["observed"]["compose_files"] == digests(platform.base, platform.overlay)
    check_page(browser, run, "Observed after differs from the plan: compose files (SHA-256)", "differs from the plan")
    assert platform.verify_evidence().status == 0


def test_a_cutover_that_goes_back_is_held_against_the_state_before(platform: Platform, browser: Browser) -> None:
    before = platform.ready()
    platform.untrust_at_up("edge1")
    assert platform.apply(platform.plan()).status == 1
    run = newest(platform, "cutover")
    assert read(run, "observed.json")["observed"]["ca"] == before["ca_fingerprint"]
    check_page(browser, run, "compared with the state before", "8 as before", "on the way back")
