"""What whoever owns the signer's host can do: a copy of a ledger that tells another story, with valid hashes.

`python -m scripts.tour.rewrite DATA_DIR NEW_DIR`: the first certificate of the copy went to somebody else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from signer.ledger.audit import export
from signer.ledger.fold import fold_all
from signer.ledger.reader import LedgerReader
from signer.ledger.store import Ledger
from signer.model import Event


def main(arguments: Sequence[str]) -> int:
    """Exit status 0."""
    data, new = map(Path, arguments)
    with closing(LedgerReader(data)) as reader:
        entries = list(export(reader))
    new.mkdir(mode=0o700)
    changed = 0
    with closing(Ledger(new)) as ledger:
        for entry in entries:
            body = json.loads(entry.body)
            if entry.kind == "certificate.issued" and not changed:
                body["identity"], changed = "somebody-else", entry.seq
            ledger.commit([Event(entry.kind, entry.actor, body)], entry.time_ms)
        fold_all(ledger)
    owner = data.stat()
    for path in (new, *new.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)
    print(f"event {changed} of {len(entries)} is rewritten, and every hash after it is computed anew")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
