"""What the tests of `safe-session` share: a client's account, and the CA that hosts trust."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts.keys import Key, KeyRing
from tests.parts.standin import Client, make_client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with make_client(tmp_path) as made:
        yield made


@pytest.fixture
def ca(keyring: KeyRing) -> Key:
    return keyring("ed25519", "ca")
