"""Notices in a real container: the overlay starts a process of a third user, which reaches a receiver."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.container import NOTICES_ID, Contained, Engine
from tests.parts.deciders import POLICY
from tests.parts.keys import KeyRing
from tests.parts.receiver import SECRET, Receiver
from tests.parts.service import ROOT

pytestmark = [
    missing.needs_root, missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow,
    pytest.mark.timeout(900),
]  # fmt: skip


def test_the_overlay_has_humans_told_by_a_user_of_its_own(engine: Engine, keyring: KeyRing, tmp_path: Path) -> None:
    receiver = Receiver()
    channels = tmp_path / "channels"
    channels.mkdir(mode=0o755)
    file = channels / "notices.toml"
    file.write_text(f'[channels.hook]\nkind = "webhook"\nurl = "{receiver.url}/hook"\nsecret = "{SECRET}"\n')
    file.chmod(0o400)
    os.chown(file, NOTICES_ID, NOTICES_ID)
    contained = Contained(engine, tmp_path / "local", keyring("ed25519", "ca"), local=True)
    contained.write_policy(POLICY)
    contained.files = (*contained.files, ROOT / "overlays" / "safe-session-notices.yaml")
    contained.variables["PLATFORM_RUNTIME_SAFE_SESSION_NOTICES_DIR"] = str(channels)
    try:
        with contained:
            asked = {"public_key": keyring("ed25519").public_line, "reason": "from a container"}
            answer = contained.ask("POST", "/api/sign/prod", asked, identity="deploy-agent")
            assert answer.status == 202, answer.body
            assert receiver.wait_for("from a container").is_signed()
            users = {one.uid for one in contained.processes().values() if "notices" in one.command}
            assert users == {NOTICES_ID}
            tested = contained.inside("signer", "notices", "test")
            assert (tested.status, tested.err) == (0, ""), tested.out
            for path in ("/var/lib/signer/ledger.sqlite3", "/run/signer-ca/ca", "/run/signer/keeper.sock"):
                assert contained.inside("test", "-r", path, user="signer-notices").status == 1, path
    finally:
        receiver.close()
