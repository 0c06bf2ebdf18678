"""Channels without a network: those whose name begins with `down` fail, all others take what they get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from signer.protocol.notices import Notice
from signer.service.channels import Result, Sender


def play_channels(environ: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """The settings for the file of channels `name` in the folder; nothing is sent, and no time passes."""
    file = folder / name
    file.chmod(0o400)
    environ.setenv("SIGNER_NOTICES_FILE", str(file))
    if os.geteuid() == 0:
        environ.setenv("SIGNER_NOTICES_USER", "root")

    def send(sender: Sender, _notice: Notice, _now: int) -> Result:
        is_down = sender._channel.name.startswith("down")
        return Result("the connection was refused" if is_down else "")

    environ.setattr(Sender, "send", send)
    environ.setattr("signer.cli.services.time.monotonic", lambda: 0.0)
