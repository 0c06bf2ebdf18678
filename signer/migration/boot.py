"""What a reboot starts: the compose files in force, in a file of root's that cutover and rollback write.

`scripts/container/start-recorded` reads it, and `scripts/systemd/signer-container.service` runs that at boot. One
`name=value` a line: `command`, `file`, `variable` may come several times, in their order.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from signer.errors import SignerError, write_hint
from signer.files import read_bounded, write_atomically
from signer.migration.compose import Compose

MAX_BYTES: Final = 64 * 1024
_HEAD: Final = "# Written by `signer cutover apply` and `rollback`: what is started at boot. Root's alone.\n"


def boot_file(evidence_dir: Path) -> Path:
    """The file, beside the evidence: /var/lib/safe-session/boot unless cutover.toml names another directory."""
    return evidence_dir.with_name("boot")


def render_boot(compose: Compose, *, with_overlay: bool) -> str:
    """The file's content: the command line of `up`, and the variables that it was run with."""
    facts = compose.facts
    files = (facts.base, facts.overlay) if with_overlay else (facts.base,)
    lines = [
        f"mode={'local' if with_overlay else 'vault'}",
        *(f"command={word}" for word in facts.command),
        *(f"file={file}" for file in files),
        f"project={facts.project}",
        f"service={facts.service}",
        *(f"variable={name}={value}" for name, value in sorted(compose.unmarked_environment.items())),
    ]
    if any("\n" in line for line in lines):
        raise _not_recorded("a value has more than one line", "take it out of the environment, then run it again")
    return _HEAD + "".join(f"{line}\n" for line in lines)


def record_boot(path: Path, compose: Compose, *, with_overlay: bool) -> None:
    """Writes the file, 0600; raises `SignerError` (`boot_not_recorded`)."""
    try:
        write_atomically(path, os.fsencode(render_boot(compose, with_overlay=with_overlay)), 0o600)
    except OSError as error:
        hint = f"{write_hint(error, str(path.parent))}, then run it again"
        raise _not_recorded(error.strerror or "it cannot be written", hint) from None


def files_at_boot(path: Path) -> tuple[str, ...]:
    """The compose files that a reboot starts, in their order; raises `OSError`, also if nothing is recorded."""
    lines = os.fsdecode(read_bounded(path, MAX_BYTES)).splitlines()
    return tuple(line.removeprefix("file=") for line in lines if line.startswith("file="))


def is_recorded(path: Path, compose: Compose, *, with_overlay: bool) -> bool:
    """True if a reboot starts exactly this."""
    try:
        found = read_bounded(path, MAX_BYTES)
    except OSError:
        return False
    return found == os.fsencode(render_boot(compose, with_overlay=with_overlay))


def _not_recorded(why: str, hint: str) -> SignerError:
    return SignerError("boot_not_recorded", f"what a reboot starts cannot be recorded: {why}", hint)
