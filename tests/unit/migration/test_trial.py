"""The trial's folder, which only this user can enter, and the CA that it must have before a token is sent to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from signer.api_client import Readiness
from signer.migration import trial as composetrial
from signer.migration.compose import Compose, ComposeFailed, ContainerState
from tests.parts.fake_compose import FakePlatform

LEFT = "signer-platform-trial.abcd_123"


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePlatform:
    monkeypatch.setattr(composetrial, "_FOLDERS", tmp_path)
    found = FakePlatform(tmp_path)
    found.engine(ps="")
    return found


def removal(platform: FakePlatform) -> None:
    facts = composetrial._facts_on_trial(platform.facts)
    composetrial.remove_trial(Compose(facts, {"PATH": "/usr/bin:/bin"}))


def test_audit_3d1_a_folder_is_new_private_and_gone_with_the_trial(platform: FakePlatform) -> None:
    facts = composetrial._facts_on_trial(platform.facts)
    folder, other = composetrial._make_folder(facts), composetrial._make_folder(facts)
    assert folder != other
    assert (folder.stat().st_mode, folder.stat().st_uid) == (0o040700, os.geteuid())
    assert f"source: {folder}\n" in (folder / "trial.yaml").read_text()
    kept = [platform.folder / name for name in (f"{LEFT}.abcd_123", "signer-platform-trial.x", "signer-other.abcd_123")]
    for path in kept:
        path.mkdir()
    (other / "api.sock").touch()
    removal(platform)
    assert (folder.exists(), other.exists()) == (False, False)
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("what", ["another owner", "another mode", "a link", "a file"])
def test_audit_3d1_what_is_not_a_trials_folder_is_refused_and_stays(
    platform: FakePlatform, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    left, elsewhere = platform.folder / LEFT, platform.folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "precious").touch()
    if what == "a link":
        left.symlink_to(elsewhere)
    elif what == "a file":
        left.touch(0o700)
    else:
        left.mkdir(mode=0o755 if what == "another mode" else 0o700)
    if what == "another owner":
        another = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(ComposeFailed) as refused:
        removal(platform)
    assert (refused.value.code, str(left) in refused.value.text) == ("trial_folder_unsafe", True)
    assert left.is_symlink() or left.exists()
    assert (elsewhere / "precious").exists()


def test_audit_3d1_a_trial_is_not_made_beside_a_folder_that_is_not_its_own(platform: FakePlatform) -> None:
    (platform.folder / LEFT).symlink_to(platform.folder)
    with pytest.raises(ComposeFailed) as refused, composetrial.trial(platform.facts, environ={"PATH": "/usr/bin:/bin"}):
        raise AssertionError("it has started")
    assert refused.value.code == "trial_folder_unsafe"
    assert [call for call in platform.calls if " up " in call] == []


def test_a_folder_that_cannot_be_made_is_told(platform: FakePlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composetrial, "_FOLDERS", platform.folder / "nowhere")
    with pytest.raises(ComposeFailed) as failed:
        composetrial._make_folder(composetrial._facts_on_trial(platform.facts))
    assert (failed.value.code, "No such file" in failed.value.text) == ("trial_failed", True)


@pytest.mark.parametrize("health", [Readiness(True), Readiness(True, ca_fingerprint="SHA256:another")])
def test_audit_3d1_a_trial_with_another_ca_than_the_pinned_one_gets_nothing(
    platform: FakePlatform, health: Readiness, tmp_path: Path
) -> None:
    """There is no way to a client with the token but through the comparison."""
    state = ContainerState("c" * 64, "a" * 64, "local", "running", "")
    token = tmp_path / "token"
    token.write_text("marker-of-a-token\n")
    token.chmod(0o600)
    compose = Compose(platform.facts, {})
    with pytest.raises(ComposeFailed) as refused:
        composetrial.Trial("unix:/run/x/api.sock", health, state, compose).client(token, "SHA256:pinned")
    assert refused.value.code == "trial_not_ours"
    pinned = Readiness(True, ca_fingerprint="SHA256:pinned")
    with composetrial.Trial("unix:/run/x/api.sock", pinned, state, compose).client(token, "SHA256:pinned") as client:
        assert "unix:/run/x/api.sock" in repr(client)
