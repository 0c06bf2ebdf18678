"""The verbs that make and bring the CA key: `signer ca new`, `signer ca render`. They show public facts only."""

from __future__ import annotations

import os
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from signer.ca.infisical import fetch_secret, load_source
from signer.ca.key import KeyMaterial
from signer.ca.render import Rendered, create, render
from signer.cli import output
from signer.errors import SignerError, Unavailable
from signer.hardening import forbid_dumps

if TYPE_CHECKING:
    from signer.settings import Settings

_SAYS = {
    "written": "written, the keeper takes it at its next start or SIGHUP",
    "unchanged": "unchanged",
    "agrees": "agrees with Infisical",
    "differs": "differs from what it should be in {}; nothing was written",
    "missing": "is not there; nothing was written",
}


def ca_new(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """A new CA key into a file that must not exist."""
    forbid_dumps()
    target = Path(arguments.out).absolute()
    key = create(target, lambda: KeyMaterial.generate(arguments.kind))
    if arguments.json:
        output.show_json({"file": str(target), "fingerprint": key.fingerprint, "public_key": key.public_line})
        return 0
    output.show(f"public key   {key.public_line}")
    output.show(f"fingerprint  {key.fingerprint}")
    output.show()
    for line in (
        "What to do with it, by hand; this program never writes to Infisical:",
        "  1  in policy.toml, under [ca]:  fingerprint = " + f'"{key.fingerprint}"',
        "  2  on every host, a line of TrustedUserCAKeys: the public key above",
        f"  3  into Infisical, as the secret of INFISICAL_SECRET_NAME: the whole content of {output.plain(target)}",
        f"  4  signer ca render --to /run/signer-ca/ca   with SIGNER_CA_FINGERPRINT={key.fingerprint}",
        "  5  when that says written or unchanged:  shred -u " + output.plain(target),
    ):
        output.show(line)
    return 0


def ca_render(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """The CA key from Infisical to a file, once or again and again."""
    forbid_dumps()
    target = Path(arguments.to)
    source = load_source(os.environ)

    def once() -> Rendered:
        return render(
            lambda: KeyMaterial.repair(fetch_secret(source).value, source.fingerprint),
            target,
            check=arguments.check,
            allow_disk=arguments.allow_disk,
        )

    if arguments.watch is not None:
        return _watch(once, arguments)
    rendered = once()
    _tell(rendered, arguments)
    return 1 if rendered.result in ("differs", "missing") else 0


class _Stopped(BaseException):
    """SIGTERM came. Raised wherever the program is, but not between the system calls of a write."""


def _watch(once: Callable[[], Rendered], arguments: Namespace) -> int:
    """Renders until SIGTERM; a fault is told and tried again. It signals nobody: who reads the file decides when."""
    told: Rendered | None = None
    try:
        signal.signal(signal.SIGTERM, _stop)
        while True:
            try:
                rendered = once()
            except SignerError as error:
                _tell_fault(error, arguments)
                told = None
            else:
                news = rendered.result == "written" or rendered != told
                if rendered.result != "unchanged" and news:
                    _tell(rendered, arguments)
                told = rendered
            output.flush()
            time.sleep(arguments.watch)
    except _Stopped:
        return 0


def _stop(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Stopped


def _tell_fault(error: SignerError, arguments: Namespace) -> None:
    output.say_error(error)
    if not isinstance(error, Unavailable):
        output.warn("this will not pass by itself; trying again all the same")
    if arguments.json:
        output.show_json(
            {"error": {**error.facts, "code": error.code, "text": error.text, "hint": error.hint}}, on_one_line=True
        )


def _tell(rendered: Rendered, arguments: Namespace) -> None:
    target = Path(arguments.to)
    if arguments.json:
        facts: dict[str, object] = {"result": rendered.result, "file": str(target)}
        facts |= {"fingerprint": rendered.fingerprint, "kind": rendered.kind, "differs_in": list(rendered.differs_in)}
        output.show_json(facts, on_one_line=arguments.watch is not None)
    else:
        says = _SAYS[rendered.result].format(", ".join(rendered.differs_in))
        output.show(f"{output.plain(target)}: {says} ({rendered.kind} {rendered.fingerprint})")
