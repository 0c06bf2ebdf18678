"""The verbs that make and bring the CA key: `signer ca new`, `signer ca render`. They show public facts only."""

from __future__ import annotations

import os
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from signer import printing
from signer.cakey import KeyMaterial
from signer.errors import BadSettings, SignerError, Unavailable
from signer.harden import forbid_dumps
from signer.infisical import fetch_secret, load_source
from signer.ops.render import Rendered, create, render
from signer.settings import FINGERPRINT_SETTING

if TYPE_CHECKING:
    from signer.settings import Settings

_SAYS = {
    "written": "written, the keeper takes it at its next start or SIGHUP",
    "unchanged": "unchanged",
    "agrees": "agrees with Infisical",
    "differs": "differs from Infisical; nothing was written",
    "missing": "is not there; nothing was written",
}


def ca_new(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """A new CA key into a file that must not exist."""
    forbid_dumps()
    target = Path(arguments.out).absolute()
    key = KeyMaterial.generate(arguments.kind)
    create(target, key)
    if arguments.json:
        printing.show_json({"file": str(target), "fingerprint": key.fingerprint, "public_key": key.public_line})
        return 0
    printing.show(f"public key   {key.public_line}")
    printing.show(f"fingerprint  {key.fingerprint}")
    printing.show()
    for line in (
        "What to do with it, by hand; this program never writes to Infisical:",
        "  1  in policy.toml, under [ca]:  fingerprint = " + f'"{key.fingerprint}"',
        "  2  on every host, a line of TrustedUserCAKeys: the public key above",
        f"  3  into Infisical, as the secret of INFISICAL_SECRET_NAME: the whole content of {printing.plain(target)}",
        f"  4  signer ca render --to /run/signer-ca/ca   with SIGNER_CA_FINGERPRINT={key.fingerprint}",
        "  5  when that says written or unchanged:  shred -u " + printing.plain(target),
    ):
        printing.show(line)
    return 0


def ca_render(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """The CA key from Infisical to a file, once or again and again."""
    forbid_dumps()
    target = Path(arguments.to)
    source = load_source(os.environ)
    pin = os.environ.get(FINGERPRINT_SETTING[0], "")
    if not pin:
        raise BadSettings(
            "fingerprint_missing", "SIGNER_CA_FINGERPRINT is not set", "set it to ca.fingerprint of policy.toml"
        )

    def once() -> Rendered:
        return render(
            lambda: KeyMaterial.repair(fetch_secret(source).value, pin),
            target,
            check=arguments.check,
            allow_disk=arguments.allow_disk,
        )

    if arguments.watch is not None:
        return _watch(once, arguments)
    rendered = once()
    _tell(rendered, target, arguments)
    return 1 if rendered.result in ("differs", "missing") else 0


def _watch(once: Callable[[], Rendered], arguments: Namespace) -> int:
    """Renders until SIGTERM; a fault is told and tried again. It signals nobody: who reads the file decides when."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stop.append(number))
    while not stop:
        try:
            rendered = once()
        except SignerError as error:
            printing.say_error(error)
            if not isinstance(error, Unavailable) and not arguments.json:
                printing.warn("this will not pass by itself; trying again all the same")
        else:
            if rendered.result != "unchanged":
                _tell(rendered, Path(arguments.to), arguments)
                printing.flush()
        due = time.monotonic() + arguments.watch
        while not stop and time.monotonic() < due:
            time.sleep(min(0.2, max(0.0, due - time.monotonic())))
    return 0


def _tell(rendered: Rendered, target: Path, arguments: Namespace) -> None:
    if arguments.json:
        facts = {"result": rendered.result, "file": str(target), "fingerprint": rendered.fingerprint}
        printing.show_json({**facts, "kind": rendered.kind}, on_one_line=arguments.watch is not None)
    else:
        printing.show(f"{printing.plain(target)}: {_SAYS[rendered.result]} ({rendered.kind} {rendered.fingerprint})")
