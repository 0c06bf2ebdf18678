"""`signer serve`, `signer keeper` and `signer api`: the verbs that run until they are stopped. They log to stderr."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

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
    from signer.logs import start_log
    from signer.settings import load_settings

    start_log()
    return load_settings(os.environ)
