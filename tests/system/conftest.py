"""Fixtures of the tests against real parts alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parts import hosts, missing, parity
from tests.parts.container import Engine
from tests.parts.hosts import Host
from tests.parts.keys import Key, KeyRing
from tests.parts.openbao import OpenBao
from tests.parts.parity import Pair
from tests.parts.platform import Platform, make_memory, remove_memory
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


@pytest.fixture(scope="session")
def place_for_hosts() -> Iterator[Path]:
    """A folder of root's with a tmpfs at `memory`; both are gone afterwards."""
    if reason := hosts.why_not_here():
        pytest.skip(reason)
    place = hosts.make_place(str(os.getpid()))
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", place / "memory"], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place / "memory"], check=True)
    finally:
        shutil.rmtree(place)


@pytest.fixture(scope="session")
def keys_for_hosts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Key, Key]:
    """The CA key and the host key of all hosts."""
    return hosts.make_keys(tmp_path_factory.mktemp("keys-for-hosts"))


@pytest.fixture
def new_host(place_for_hosts: Path, keys_for_hosts: tuple[Key, Key]) -> Iterator[Callable[[], Host]]:
    """Prepared hosts, each ready for the local CA until the test changes it."""
    made: list[Host] = []

    def prepare() -> Host:
        name = f"host-{len(made)}"
        folder, memory = place_for_hosts / name, place_for_hosts / "memory" / name
        folder.mkdir()
        memory.mkdir()
        made.append(Host.prepare(folder, memory, *keys_for_hosts))
        return made[-1]

    yield prepare
    for host in made:
        shutil.rmtree(host.folder)
        shutil.rmtree(host.memory)


@pytest.fixture
def host(new_host: Callable[[], Host]) -> Host:
    """One prepared host."""
    return new_host()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """podman with our image, built once; skipped where there is no podman, or no base image can be made."""
    if reason := missing.podman() or missing.podman_compose():
        pytest.skip(reason)
    made = Engine(tmp_path_factory.mktemp("containers"))
    if reason := made.make_base():
        pytest.skip(f"no base image: {reason}")
    made.build()
    yield made
    made.forget()


@pytest.fixture(scope="module")
def new_platform(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform in mode vault for the tests of a module; each leaves it so that `reset()` can mend it."""
    if reason := missing.bao() or missing.sshd():
        pytest.skip(reason)
    memory = Path(tempfile.mkdtemp(prefix="signer-platform-", dir="/run"))
    make_memory(memory)
    try:
        with Platform(engine, tmp_path_factory.mktemp("platform"), memory) as running:
            yield running
    finally:
        remove_memory(memory)
