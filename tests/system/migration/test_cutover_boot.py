"""What a cutover and a rollback leave for a reboot: the record that they write, started from nothing."""

from __future__ import annotations

import pytest

from tests.parts import missing
from tests.parts.container import BASE_FILE, OVERLAY_FILE
from tests.parts.platform import Platform
from tests.parts.service import ROOT

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(500)]
SCRIPT = str(ROOT / "scripts" / "container" / "start-recorded")


def test_a_reboot_starts_what_the_last_cutover_or_rollback_left(new_platform: Platform) -> None:
    platform = new_platform
    record = platform.evidence_dir.with_name("boot")
    assert not record.exists()
    for mode, files in (("local", [BASE_FILE, OVERLAY_FILE]), ("vault", [BASE_FILE])):
        done = platform.apply(platform.plan()) if mode == "local" else platform.rollback()
        assert done.status == 0, done.err
        facts = record.stat()
        assert (facts.st_uid, facts.st_mode) == (0, 0o100600)
        lines = record.read_text().splitlines()
        assert [line.rpartition("/")[2] for line in lines if line.startswith("file=")] == [file.name for file in files]
        before = platform.container()
        platform.engine.control("rm", "--force", "--time", "0", before)
        started = platform.engine.run(SCRIPT, "--file", str(record))
        assert started.status == 0, started.out + started.err
        assert f"mode {mode}" in started.out
        platform.wait_for_mode(mode)
        assert platform.container() != before
        assert platform.can_log_in()
