"""How a benchmark says what it is doing."""

from __future__ import annotations

import sys


def show_progress(text: str) -> None:
    """One line that is written over, on a terminal only; empty to take it away."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
