"""A directory in memory for key files, of the test's user alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from signer.ca.render import file_system_of

MEMORY = Path("/dev/shm")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """It and all in it is gone afterwards; the test is skipped where there is no such file system."""
    if not MEMORY.is_dir() or file_system_of(MEMORY) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    made = Path(tempfile.mkdtemp(dir=MEMORY, prefix="render-"))
    try:
        yield made
    finally:
        shutil.rmtree(made)
