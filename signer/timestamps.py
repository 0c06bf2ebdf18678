"""Times as text."""

from __future__ import annotations

import time


def timestamp(seconds: int) -> str:
    """RFC 3339 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
