"""The base image: Debian's packages alone, and none whose signature was not checked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.documents import ROOT

SCRIPT = ROOT / "scripts" / "container" / "make-base"


@missing.needs_root
@pytest.mark.parametrize("status", [0, 1])
def test_audit_9_no_base_is_made_without_the_check_of_debians_signature(tmp_path: Path, status: int) -> None:
    """debootstrap goes on without a keyring unless it is told not to."""
    programs = tmp_path / "bin"
    programs.mkdir()
    asked = tmp_path / "asked"
    for name, ends in (("debootstrap", status), ("podman", 1)):
        (programs / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {asked}\nexit {ends}\n')
        (programs / name).chmod(0o755)
    environ = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SIGNER_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run([SCRIPT, "localhost/never"], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    (line,) = [line for line in asked.read_text().splitlines() if line.startswith(f"{programs}/debootstrap ")]
    assert "--force-check-gpg" in line.split()
    assert [line for line in asked.read_text().splitlines() if " import " in line] == []
