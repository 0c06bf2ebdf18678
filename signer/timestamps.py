"""Times as text."""

from __future__ import annotations

import time
from functools import lru_cache


@lru_cache(maxsize=64)  # what is signed within a second has the same times
def timestamp(seconds: int) -> str:
    """RFC 3339 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
