"""Runs `safe-session` as `python -m signer.safe_session`."""

from __future__ import annotations

import sys

from signer.safe_session.main import main

sys.exit(main())
