"""A running service whose CA key changes: as root with a keeper that cannot read the key file, else as one user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from signer.ledger.reader import LedgerReader
from tests.parts.eventually import eventually
from tests.parts.keys import Key
from tests.parts.service import ROOT, STANDARD_POLICY, Service

KEEPER_USER, API_USER = "daemon", "nobody"


def line_of(key: Key) -> str:
    """Its public line without comment."""
    return " ".join(key.public_line.split()[:2])


def table_of(key: Key) -> str:
    return f'{{ fingerprint = "{key.fingerprint}", public_key = "{line_of(key)}" }}'


def ca_lines(pinned: Key, following: Key | None = None, *retired: Key) -> str:
    """What stands under `[ca]`."""
    lines = [f'fingerprint = "{pinned.fingerprint}"', f'public_key = "{line_of(pinned)}"']
    if following is not None:
        lines.append(f"next = {table_of(following)}")
    if retired:
        lines.append(f"retired = [{', '.join(map(table_of, retired))}]")
    return "\n".join(lines)


class Rotating:
    """The service, and what an operator does to it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def say(self, pinned: Key, following: Key | None = None, *retired: Key) -> None:
        """Writes policy.toml."""
        policy = STANDARD_POLICY.replace('fingerprint = "{ca}"', ca_lines(pinned, following, *retired))
        self.service.write_policy(policy)

    def place(self, key: Key) -> None:
        """Renders a key: another file under the same name, in one step."""
        fresh = self.service.folder / ".ca"
        fresh.write_bytes(key.private.read_bytes())
        fresh.chmod(0o400)
        fresh.replace(self.service.key_file)

    def hup(self) -> None:
        """SIGHUP to the launcher; returns when the keeper has read its files again."""
        before = self._reloads()
        os.kill(self.service.pid, signal.SIGHUP)
        eventually(lambda: self._reloads() > before, f"the files were read again: {self.service.log()[-2000:]}")

    def _reloads(self) -> int:
        return len(self.events("policy.loaded")) + len(self.events("policy.refused"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The bodies of all events of a kind."""
        reader = LedgerReader(self.service.data_dir)
        try:
            return [json.loads(body) for (body,) in reader.query("SELECT body FROM events WHERE kind = ?", (kind,))]
        finally:
            reader.close()

    def in_use(self) -> str:
        """The fingerprint of the key that signs."""
        return str(self.service.ask("GET", "/readyz").json()["ca_fingerprint"])

    def bundle(self) -> list[str]:
        """The lines of `GET /api/ca`."""
        answer = self.service.ask("GET", "/api/ca")
        assert answer.status == 200, answer.body
        return answer.body.decode().splitlines()

    def certificate(self, user: Key, folder: Path, name: str) -> Path:
        """A file with a certificate for `user`."""
        answer = self.service.sign(user.public_line)
        assert answer.status == 201, answer.body
        path = folder / f"{name}-cert.pub"
        path.write_text(answer.json()["certificate"] + "\n")
        return path


def why_not_two_users() -> str:
    """Why there can be no users of their own for keeper and api; empty if there can."""
    if os.geteuid() != 0:
        return "not root"
    probe = [sys.executable, "-c", "import flask, signer"]
    found = subprocess.run(probe, user=API_USER, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    return "" if found.returncode == 0 else f"{API_USER} cannot read this interpreter"


@contextmanager
def rotating_service(
    ca: Key, prepare: Callable[[Rotating], None] | None = None, policy: str = STANDARD_POLICY
) -> Iterator[Rotating]:
    """Started with `ca`; as root under two users, of whom neither may read the key file."""
    two = not why_not_two_users()
    environ = {"SIGNER_KEEPER_USER": KEEPER_USER, "SIGNER_API_USER": API_USER} if two else {}
    # Not in pytest's own folder: each pytest that starts makes that one private to root again.
    with tempfile.TemporaryDirectory(prefix="rotation-") as place:
        Path(place).chmod(0o755)
        service = Service(Path(place) / "service", ca, policy, environ=environ)
        service.folder.chmod(0o755)
        service.policy_file.chmod(0o644)
        world = Rotating(service)
        if prepare is not None:
            prepare(world)
        with service:
            yield world


@contextmanager
def two_users_service(ca: Key) -> Iterator[Service]:
    """Its service under two users; skips the test where there can be none."""
    if reason := why_not_two_users():
        pytest.skip(reason)
    with rotating_service(ca) as world:
        yield world.service
