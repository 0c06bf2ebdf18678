"""`python -m signer`: the same as the command `signer`."""

from __future__ import annotations

import sys

from signer.cli.main import main

sys.exit(main())
