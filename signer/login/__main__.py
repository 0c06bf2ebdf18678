"""`python -m signer.login` is `safe-session`."""

from __future__ import annotations

import sys

from signer.login.main import main

sys.exit(main())
