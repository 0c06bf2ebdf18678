"""What the console's tests share: one browser. Each file may run in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parts import missing
from tests.parts.browser import Browser


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if reason := missing.chromium():
        pytest.skip(reason)
    with Browser() as started:
        yield started
