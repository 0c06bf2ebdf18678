"""`python -m signer.safe_session` is `safe-session`."""

from __future__ import annotations

import sys

from signer.safe_session.main import main

sys.exit(main())
