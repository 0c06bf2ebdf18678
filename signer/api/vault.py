"""Vault's shape in Flask: everything a Vault client asks for besides signing, which is in `sign.py`."""

from __future__ import annotations

from flask import Flask

from signer.link import Link
from signer.settings import Settings


def register(app: Flask, link: Link, settings: Settings) -> None:
    """Adds the routes below `/v1/` to `app`."""
