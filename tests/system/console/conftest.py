"""What the console's tests share: a browser for each file.

Not one for all: playwright keeps an event loop running in this thread until the browser is closed, and asyncio allows
no second one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parts import missing
from tests.parts.browser import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if reason := missing.chromium():
        pytest.skip(reason)
    with Browser() as started:
        yield started
