"""`signer serve`, `keeper`, `api` and `notices run`, the verbs that run until they are stopped and log to stderr; and
`notices test`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from signer.cli import output
from signer.cli.arguments import whole
from signer.cli.parser import verb

if TYPE_CHECKING:
    from signer.settings import Settings


@verb("serve", "signer serve", is_service=True, lists_settings=True)
def serve() -> None:
    """Checks the settings, starts the keeper and the API, each under its own user when started as root, and
    restarts either when it ends or hangs. `signer reload`, or SIGHUP, takes a changed policy, CA key and TLS
    certificate."""
    settings = _start()
    from signer.service.launcher import run_service

    run_service(settings)


@verb("keeper", "signer keeper", is_service=True, lists_settings=True)
# `signer serve` watches its children through this descriptor, and passes the CA key file; it has no other use.
@click.option("--channel", type=whole(3, 1_000_000), hidden=True)
def keeper(channel: int | None) -> None:
    """Holds the CA key and the ledger; decides, records and signs what arrives on its socket. The API is started
    separately: signer api. SIGHUP takes a changed policy and CA key."""
    settings = _start()
    from signer.service.startup import run_keeper

    run_keeper(settings, channel)


@verb("api", "signer api", is_service=True, lists_settings=True)
# `signer serve` passes the sockets that it has bound through these descriptors; they have no other use.
@click.option("--listener", type=whole(3, 1_000_000), multiple=True, hidden=True)
@click.option("--channel", type=whole(3, 1_000_000), hidden=True)
def api(listener: tuple[int, ...], channel: int | None) -> None:
    """Serves HTTP and passes each request to the keeper; holds no key, no policy and no state. It listens on the
    sockets that systemd passes (LISTEN_FDS), otherwise on SIGNER_LISTEN. Requests get 503 while no keeper runs.
    SIGHUP takes a renewed TLS certificate."""
    settings = _start()
    from signer.service.api import run_api

    run_api(settings, listener, channel)


def _start() -> Settings:
    from signer.service.logs import start_log
    from signer.settings import load_settings

    start_log()
    return load_settings(os.environ)


@verb("notices run", "signer notices run", is_service=True, lists_settings=True)
# `signer serve` watches its children through this descriptor; it has no other use.
@click.option("--channel", type=whole(3, 1_000_000), hidden=True)
def notices_run(channel: int | None) -> None:
    """Sends notices to the channels of SIGNER_NOTICES_FILE: what waits for a human, what they decided,
    break-glass, freezes, faults. Holds no key, no ledger and no policy; the keeper connects to it. SIGHUP takes
    a changed file."""
    settings = _start()
    from signer.service.notices import run_notices

    run_notices(settings, channel)


@verb("notices test", "signer notices test", "signer notices test --json")
def notices_test(*, as_json: bool) -> int:
    """Sends one test notice to each channel of SIGNER_NOTICES_FILE, with no retry, and shows what became of it.
    Root becomes SIGNER_NOTICES_USER first, so that it also tests who may read the file. Exit status 1 if one
    failed."""
    from signer.errors import BadSettings
    from signer.http import Watch
    from signer.service.channels import Sender, load_channels, trial_notice
    from signer.service.notices import become_sender
    from signer.settings import load_settings

    settings = load_settings(os.environ)
    if settings.notices_file is None:
        raise BadSettings("notices_off", "SIGNER_NOTICES_FILE is not set", "set it to a file of channels")
    become_sender(settings)
    channels = load_channels(settings.notices_file)
    watch = Watch()
    rows = []
    for channel in channels:
        sender, began = Sender(channel, watch, settings.console_url), time.monotonic()
        result = sender.send(trial_notice(int(time.time())), int(time.time()))
        sender.close()
        facts = {"channel": channel.name, "kind": channel.facts.kind, "people": list(channel.facts.people)}
        seconds = round(time.monotonic() - began, 3)
        rows.append({**facts, "error": result.error or None, "seconds": seconds})
        if not as_json:
            output.show(_line(rows[-1]))
    watch.close()
    failed = sum(row["error"] is not None for row in rows)
    if as_json:
        output.show_json({"channels": rows, "failed": failed})
    return 1 if failed else 0


def _line(row: dict[str, Any]) -> str:
    people = f", read by {', '.join(row['people'])}" if row["people"] else ""
    outcome = f"failed: {row['error']}" if row["error"] else f"took it within {row['seconds']:.1f} s"
    return f"{'FAIL' if row['error'] else 'ok  '}  {row['channel']} ({row['kind']}{people}) {outcome}"
