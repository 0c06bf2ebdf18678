"""The `signer` command: one function a verb. All printing of the product is here, and in `login/`.

Rules: results go to stdout, everything else to stderr; `signer: error: <lowercase, no full stop>`, then
`signer: hint: <next action>`. Exit status 0 done, 1 refused or failed, 2 wrong use. Heavy modules are imported by the
verb that needs them.
"""

from __future__ import annotations

import logging
import os
import sys

from signer.errors import BadFile, SignerError
from signer.settings import load_settings


def main() -> int:
    """Runs one verb; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="signer: %(message)s", stream=sys.stderr)
    try:
        if sys.argv[1:] == ["keeper"]:
            from signer.keeper import run_keeper

            run_keeper(load_settings(os.environ))
        elif sys.argv[1:] == ["serve"]:
            from signer.serve import run_service

            run_service(load_settings(os.environ))
    except SignerError as error:
        print(f"signer: error: {error.text}", file=sys.stderr)
        if isinstance(error, BadFile):
            for problem in error.problems:
                print(f"  {problem}", file=sys.stderr)
        if error.hint:
            print(f"signer: hint: {error.hint}", file=sys.stderr)
        return 1
    return 0
