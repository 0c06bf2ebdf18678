"""The verbs that create and render the CA key: `signer ca new`, `signer ca render`. They show public facts only."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from signer.cli import output
from signer.cli.arguments import FILE, KEY_KINDS, PAUSE, OneOf
from signer.cli.parser import verb
from signer.errors import BadSettings, SignerError, Unavailable
from signer.hardening import forbid_dumps
from signer.units import plain

if TYPE_CHECKING:
    from signer.ca.render import Rendered

_FIRST_PAUSE = 5  # seconds
_SENTENCES = {
    "written": "written, the keeper takes it at its next start or `signer reload`",
    "unchanged": "unchanged",
    "agrees": "agrees with Infisical",
    "differs": "differs from what it should be in {}; nothing was written",
    "missing": "is not there; nothing was written",
}


@verb("ca new", "signer ca new --out /dev/shm/ca", "signer ca new --out /dev/shm/ca --kind ecdsa256 --json")
@click.option("--out", type=FILE, metavar="FILE", required=True, help="a file that does not exist")
@click.option("--kind", type=OneOf(KEY_KINDS), default="ed25519", help="default ed25519")
def ca_new(out: Path, kind: str, as_json: bool) -> None:
    """Writes the key, 0400, and shows its public line, its fingerprint and how to bring it into use by hand.
    Nothing of the private half is shown, and nothing is written to Infisical."""
    from signer.ca.key import KeyMaterial
    from signer.ca.render import create

    forbid_dumps()
    target = out.absolute()
    key = create(target, lambda: KeyMaterial.generate(kind))
    if as_json:
        output.show_json({"file": str(target), "fingerprint": key.fingerprint, "public_key": key.public_line})
        return
    output.show_exactly(f"public key   {key.public_line}")
    output.show(f"fingerprint  {key.fingerprint}")
    output.show()
    for line in (
        "What to do with it, by hand:",
        "  1  in policy.toml, under [ca]:  fingerprint = " + f'"{key.fingerprint}"',
        "  2  on every host, a line of TrustedUserCAKeys: the public key above",
        "",
        "To keep it over a reboot in Infisical, to which this program never writes:",
        f"  3  as the secret of INFISICAL_SECRET_NAME: the whole content of {plain(target)}",
        f"  4  signer ca render --to /run/signer-ca/ca   with SIGNER_CA_FINGERPRINT={key.fingerprint}",
        "  5  when that reports written or unchanged:  shred -u " + plain(target),
        "",
        "Or without Infisical, encrypted for this machine (runbooks/ca-key.md, section 6):",
        f"  3  in your own safe: a copy of {plain(target)}, as no other machine can decrypt what follows",
        f"  4  systemd-creds encrypt --name=ca {plain(target)} /etc/signer/ca.cred",
        "  5  when the service has started with it:  shred -u " + plain(target),
    ):
        output.show(line)


@verb("ca render", "signer ca render --to /run/signer-ca/ca", "signer ca render --to /run/signer-ca/ca --check --json")
@click.option("--to", type=FILE, metavar="FILE", required=True, help="an absolute path, on a memory file system")
@click.option("--check", is_flag=True, help="write nothing, report whether file and Infisical agree")
@click.option("--watch", type=PAUSE, metavar="60s", help="render again at this interval")
@click.option("--allow-disk", is_flag=True, help="accept a target that survives a reboot")
def ca_render(to: Path, check: bool, watch: int | None, allow_disk: bool, as_json: bool) -> int:
    """Fetches the key, checks it against SIGNER_CA_FINGERPRINT and puts it in place in one step, 0400. The same
    key is left as it is. --check writes nothing; exit status 1 if file and Infisical differ. --watch runs
    until SIGTERM and renders again on a change; it sends no signal to the keeper."""
    from signer.ca.infisical import fetch_secret, load_source
    from signer.ca.key import KeyMaterial
    from signer.ca.render import render

    forbid_dumps()
    if os.environ.get("SIGNER_CA_KEY_SOURCE") == "agent":
        raise BadSettings(
            "nothing_to_render",
            "SIGNER_CA_KEY_SOURCE is agent: the CA key is in an ssh-agent, there is nothing to render",
            "stop rendering on this host, or set SIGNER_CA_KEY_SOURCE=file",
        )
    source = load_source(os.environ)
    once = partial(
        render,
        lambda: KeyMaterial.repair(fetch_secret(source).value, source.fingerprint),
        to,
        check=check,
        allow_disk=allow_disk,
    )
    if watch is not None:
        return _watch(once, to, watch, as_json=as_json)
    rendered = once()
    _show(rendered, to, as_json=as_json)
    return 1 if rendered.result in ("differs", "missing") else 0


class _Stopped(BaseException):
    """SIGTERM came. Raised wherever the program is, but not between the system calls of a write."""


def _watch(once: Callable[[], Rendered], target: Path, pause: int, *, as_json: bool) -> int:
    """Renders every `pause` seconds until SIGTERM; reports an error and tries again. Sends no signal to the keeper.

    systemd hears that the unit is ready once the key is in its place. What waits for that at boot does not wait `pause`
    seconds for a network that comes a second later: until then it tries at least every `_FIRST_PAUSE` seconds.
    """
    from signer.service.supervisor import Supervisor

    supervisor = Supervisor(None, os.environ)
    shown: Rendered | None = None
    is_ready = False
    try:
        signal.signal(signal.SIGTERM, _stop)
        while True:
            try:
                rendered = once()
            except SignerError as error:
                _report_error(error, as_json=as_json)
                shown = None
            else:
                is_new = rendered.result == "written" or rendered != shown
                if rendered.result != "unchanged" and is_new:
                    _show(rendered, target, as_json=as_json, on_one_line=True)
                shown = rendered
                supervisor.ready()
                is_ready = True
            output.flush()
            _sleep(pause if is_ready else min(pause, _FIRST_PAUSE))
    except _Stopped:
        return 0


def _sleep(seconds: float) -> None:
    """As time.sleep, which a SIGTERM that arrives just before it does not end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        if signal.sigtimedwait((signal.SIGTERM,), seconds) is not None:
            raise _Stopped
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Stopped


def _report_error(error: SignerError, *, as_json: bool) -> None:
    output.report_error(error)
    if not isinstance(error, Unavailable):
        output.warn("this error does not go away by itself; trying again all the same")
    if as_json:
        output.show_error_json(error, on_one_line=True)


def _show(rendered: Rendered, target: Path, *, as_json: bool, on_one_line: bool = False) -> None:
    if as_json:
        facts: dict[str, object] = {"result": rendered.result, "file": str(target)}
        facts |= {"fingerprint": rendered.fingerprint, "kind": rendered.kind, "differs_in": list(rendered.differs_in)}
        output.show_json(facts, on_one_line=on_one_line)
    else:
        sentence = _SENTENCES[rendered.result].format(", ".join(rendered.differs_in))
        output.show(f"{plain(target)}: {sentence} ({rendered.kind} {rendered.fingerprint})")
