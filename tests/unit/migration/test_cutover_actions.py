"""The actions of a cutover: the last look before the change, what counts as done, and logs on a full disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from signer.api_client import ApiClient, Readiness
from signer.errors import Drift, Unavailable
from signer.migration.boot import boot_file, record_boot
from signer.migration.compose import Compose, ComposeFailed
from signer.migration.compose_files import digests_read
from signer.migration.config import CutoverFile, parse_cutover_file
from signer.migration.cutover import actions
from signer.migration.cutover.actions import CutoverActions
from signer.migration.cutover.preconditions import check_files
from signer.migration.evidence.after import differing
from signer.migration.evidence.store import Evidence
from signer.migration.journal import Journal
from signer.migration.observe import Observed
from signer.migration.run import Run
from signer.vault.admin import VaultAdmin
from tests.parts.cutover_file import GOOD
from tests.parts.fake_compose import IMAGE, MERGED, FakePlatform, inspected
from tests.parts.runs import Ledger

FILES = {
    "base": "base.yaml",
    "overlay": "overlay.yaml",
    "preflight": "preflight.sh",
    "allow list": "allow-list.txt",
    "policy": "policy.toml",
}
PLACES = {
    "/opt/signer/overlays/safe-session.yaml": "base",
    "/opt/signer/overlays/safe-session-local-ca.yaml": "overlay",
    "/opt/signer/scripts/cutover/safe-session-local-ca-preflight.sh": "preflight",
    "/etc/safe-session/policy/policy.toml": "policy",
}


@pytest.fixture
def platform(tmp_path: Path) -> FakePlatform:
    platform = FakePlatform(tmp_path)
    platform.compose(f"if test $verb = config; then cat {tmp_path}/base.yaml {tmp_path}/overlay.yaml; fi")
    for name in FILES.values():
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "base.yaml").write_text(MERGED.replace("SIGNER_MODE: vault", "SIGNER_MODE: local"))
    (tmp_path / "overlay.yaml").write_text("x-overlay: it\n")
    for name in ("token", "vault-token"):
        (tmp_path / name).write_text(f"{name}-that-nobody-knows\n")
        (tmp_path / name).chmod(0o600)
    return platform


@pytest.fixture
def file(platform: FakePlatform) -> CutoverFile:
    text = GOOD.replace("/root/", f"{platform.folder}/").replace('"podman-compose"', f'"{platform.folder}/compose"')
    text = text.replace('= "podman"', f'= "{platform.folder}/podman"')
    text = text.replace("/var/lib/safe-session/evidence", f"{platform.folder}/evidence")
    text = text.replace("[preflight]\n", f'[preflight]\nallow_list = "{platform.folder}/allow-list.txt"\n')
    for place, name in PLACES.items():
        text = text.replace(f'"{place}"', f'"{platform.folder / FILES[name]}"')
    return parse_cutover_file(text.encode())


def inputs_of(file: CutoverFile) -> dict[str, Any]:
    """As a plan holds them."""
    compose = Compose(file.compose)
    merged = {"with overlay": compose.config_digest(with_overlay=True)}
    reads = digests_read(file.compose.base, file.compose.overlay, compose.content(with_overlay=True))
    places = (
        file.compose.base, file.compose.overlay, file.preflight.script, file.preflight.allow_list,
        file.signer.policy_file,
    )  # fmt: skip
    files = {
        name: {"path": str(path), "sha256": sha256(path.read_bytes()).hexdigest()}
        for name, path in zip(FILES, places, strict=True)
    }
    facts = {"merged": merged, "reads": reads, "other_services": {}, "image": IMAGE}
    return {"files": files, "compose": facts}


@pytest.fixture
def acting(file: CutoverFile) -> Iterator[CutoverActions]:
    evidence = Evidence.create(file.evidence_dir, "cutover", 1_800_000_000)
    evidence.write_json("plan.json", {"inputs": inputs_of(file)})
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        acting = CutoverActions(file, api)
        acting.begin(Run(Journal(file.evidence_dir, evidence.run), evidence, "", Ledger()))
        yield acting


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_edited_while_the_cutover_is_checked_stops_it(
    platform: FakePlatform, acting: CutoverActions, name: str
) -> None:
    (platform.folder / FILES[name]).write_text("command: [/bin/evil]\n")
    with pytest.raises(Drift) as drifted:
        acting.record_state()
    assert any(f"inputs.files.{name}.sha256" in line for line in drifted.value.problems)


def test_what_compose_makes_of_the_same_files_is_held_against_the_plan_too(
    platform: FakePlatform, file: CutoverFile
) -> None:
    planned = inputs_of(file)
    check_files(file, planned)
    platform.compose("if test $verb = config; then echo 'services: {safe-session-api: {image: other}}'; fi")
    with pytest.raises(Drift) as drifted:
        check_files(file, planned)
    assert [line.partition(":")[0] for line in drifted.value.problems] == ["inputs.compose.merged.with overlay"]


@pytest.mark.parametrize(
    "mode, is_local, is_vault", [("local", True, False), ("vault", False, True), ("shadow", False, False)]
)
def test_a_service_in_shadow_mode_is_neither_cut_over_nor_rolled_back(
    platform: FakePlatform, file: CutoverFile, acting: CutoverActions, mode: str, is_local: bool, is_vault: bool
) -> None:
    platform.engine(inspect=inspected(mode=mode, volume="safe-session_ledger"))
    assert not acting.is_up(with_overlay=is_local), "nothing says yet what a reboot starts"
    record_boot(boot_file(file.evidence_dir), Compose(file.compose), with_overlay=mode == "local")
    assert (acting.is_up(with_overlay=True), acting.is_up(with_overlay=False)) == (is_local, is_vault)


# --- the pause that clients see ---------------------------------------------------------------------------------------


class Answers:
    """A service that is ready when the test says so."""

    def __init__(self) -> None:
        self.is_ready = True

    def ready(self, *, within: float) -> Readiness:
        if not self.is_ready:
            raise Unavailable("service_down", f"nobody answers within {within}", "start it")
        return Readiness(True, "local")

    def close(self) -> None:
        """Nothing is open."""


def measured(answers: Answers, seconds: float, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(actions, "ApiClient", lambda *_: answers)
    pause = actions.Pause("http://127.0.0.1:1", Path("/token"))
    pause.start()
    time.sleep(0.2)
    answers.is_ready = False
    time.sleep(seconds)
    answers.is_ready = True
    return pause.stop()


def test_the_pause_is_the_longest_time_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(Answers(), 0.6, monkeypatch) >= 0.4


def away(monkeypatch: pytest.MonkeyPatch) -> actions.Pause:
    """A measurement that has begun, of a service that does not answer."""
    answers = Answers()
    answers.is_ready = False
    monkeypatch.setattr(actions, "ApiClient", lambda *_: answers)
    pause = actions.Pause("http://127.0.0.1:1", Path("/token"))
    pause.start()
    return pause


def test_a_pause_that_has_not_ended_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert away(monkeypatch).stop() == 0.0


def test_a_start_that_failed_and_the_way_back_are_one_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client had no service in between; the first measurement ends without an answer, the second one goes on."""
    answers = Answers()
    monkeypatch.setattr(actions, "ApiClient", lambda *_: answers)
    first = actions.Pause("http://127.0.0.1:1", Path("/token"))
    first.start()
    time.sleep(0.2)
    assert first.unanswered_since is None
    answers.is_ready = False
    time.sleep(0.4)
    first.stop()
    second = actions.Pause("http://127.0.0.1:1", Path("/token"), first.unanswered_since)
    second.start()
    time.sleep(0.2)
    answers.is_ready = True
    assert second.stop() >= 0.5
    assert second.unanswered_since is None


def test_the_last_look_is_at_the_stop_however_late_the_one_before_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may not have let the thread look since the service came back, or at all."""
    monkeypatch.setattr(actions, "_LOOK_EVERY", 1000.0)
    pause = away(monkeypatch)
    assert pause.stop() == 0.0
    assert pause.unanswered_since is not None


def test_the_action_before_the_way_back_hands_its_pause_on(
    platform: FakePlatform, acting: CutoverActions, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, began = Answers(), time.monotonic()
    answers.is_ready = False
    monkeypatch.setattr(actions, "ApiClient", lambda *_: answers)
    platform.compose("exit 1")
    for _ in range(2):
        with pytest.raises(ComposeFailed):
            acting.up(with_overlay=True)
    assert acting._unanswered_since is not None
    assert began <= acting._unanswered_since < began + (time.monotonic() - began) / 2


# --- what is in force at the end --------------------------------------------------------------------------------------


class Ready:
    """A service that answers `/readyz` with this."""

    def __init__(self, answer: Readiness | None) -> None:
        self.answer = answer

    def ready(self) -> Readiness:
        if self.answer is None:
            raise Unavailable("service_down", "nobody answers", "start it")
        return self.answer


def look(acting: CutoverActions) -> tuple[Mapping[str, Any], Observed]:
    assert acting._run.look is not None
    return acting._run.look()


def test_the_end_of_a_cutover_is_held_against_the_plan(
    platform: FakePlatform, file: CutoverFile, acting: CutoverActions, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = inputs_of(file)
    plan["policy"] = {"ca": "SHA256:ours", "digest": "d", "roles": {"llmops": ["llmops"]}}
    goal = {
        "operation": "cutover",
        "inputs": plan,
        "now": {"mode": "vault"},
        "then": {"mode": "local", "ca": "SHA256:x"},
    }
    acting._run.evidence.write_json("plan.json", goal)
    monkeypatch.setattr(acting, "_api", Ready(Readiness(True, "local", "SHA256:x", "d")))
    files = [str(file.compose.base), str(file.compose.overlay)]
    raw = json.loads(inspected(mode="local"))
    raw[0]["Config"]["Labels"] = {"com.docker.compose.project.config_files": ",".join(files)}
    raw[0]["State"]["Health"] = {"Status": "healthy"}
    platform.engine(inspect=json.dumps(raw))
    record_boot(boot_file(file.evidence_dir), Compose(file.compose), with_overlay=True)
    planned, seen = look(acting)
    digests = {path: sha256(Path(path).read_bytes()).hexdigest() for path in files}
    assert planned == {
        "ready": True, "mode": "local", "ca": "SHA256:x", "policy": "d", "image": IMAGE, "compose_files": digests,
        "starts_at_boot": files, "principals": ["llmops"],
    }  # fmt: skip
    assert differing(planned, seen.facts) == []
    assert set(planned) - set(seen.facts) == {"principals"}, "which the logins show"
    assert seen.facts["health"] == "healthy"
    assert seen.unread == {"listens": "the container's processes cannot be read: No such file or directory"}
    file.compose.overlay.write_text("x-overlay: another\n")
    planned, seen = look(acting)
    assert differing(planned, seen.facts) == ["compose files (SHA-256)"]


def test_the_end_of_a_rollback_is_held_against_vault_and_the_base_file(
    platform: FakePlatform, file: CutoverFile, acting: CutoverActions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sealed() -> VaultAdmin:
        raise Unavailable("vault_sealed", "Vault is sealed", "unseal it")

    (acting._run.evidence.folder / "plan.json").unlink()
    monkeypatch.setattr(acting, "_api", Ready(None))
    monkeypatch.setattr(acting, "_vault", sealed)
    platform.engine(ps="")
    planned, seen = look(acting)
    assert planned["mode"] == "vault"
    assert planned["image"] == IMAGE
    assert "ca" not in planned, "Vault cannot say"
    assert planned["starts_at_boot"] == [str(file.compose.base)]
    assert seen.facts == {"ready": False, "container": None}
    assert seen.unread["mode"] == "the service is not ready: service_down"
    assert seen.unread["image"] == "there is no container"
    assert seen.unread["starts_at_boot"] == "no run has recorded it"
