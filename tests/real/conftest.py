"""Fixtures of the tests against real parts alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parts import parity
from tests.parts.keys import KeyRing
from tests.parts.openbao import OpenBao
from tests.parts.parity import Pair
from tests.parts.service import Service


@pytest.fixture(scope="session")
def pair(bao: OpenBao, keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """OpenBao and our service with the same CA key and equivalent roles; tests change neither."""
    environ = {"SIGNER_MOUNTS": f"{parity.MOUNT},team/ssh"}
    service = Service(
        tmp_path_factory.mktemp("parity") / "service", keyring("ed25519", "ca"), parity.policy(), environ=environ
    )
    with service:
        yield parity.prepare(bao, service, keyring("ed25519"))
