"""What goes wrong around a cutover, one thing a test, on a real platform: nothing is changed, or it is put back."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from signer.migration.smoke import certificate_fields
from signer.ssh.fingerprint import fingerprint_of
from tests.parts import missing
from tests.parts.container import Ended
from tests.parts.journalwatch import Watched
from tests.parts.keys import make_key
from tests.parts.platform import CUTOVER_PHRASE, DECOMMISSION_PHRASE, Platform

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def platform(new_platform: Platform) -> Platform:
    """In mode vault, with nothing done yet."""
    new_platform.reset()
    return new_platform


@pytest.fixture
def unchanged(platform: Platform) -> Iterator[Platform]:
    """The same; after the test the service is the very container that it was, in mode vault, and no run was begun."""
    before = platform.container()
    yield platform
    assert platform.container() == before
    assert not list(platform.evidence_dir.glob("*-cutover"))
    platform.wait_for_mode("vault")


def check_rolled_back(platform: Platform, ended: Ended, why: str) -> None:
    """As the issue wants it: exit status 1, all as before, and that is on record."""
    assert ended.status == 1, ended.out
    said = ended.out + ended.err
    assert "rolling back" in said
    assert why in said
    platform.wait_for_mode("vault")
    assert platform.can_log_in()
    assert platform.status()["runs"][-1]["outcome"] == "rolled_back"
    assert platform.operations()[0]["outcome"] == "rolled_back"
    assert platform.verify_evidence().status == 0


# --- after the change: it rolls back by itself -----------------------------------------------------------------------


def test_a_host_that_trusts_the_new_ca_no_more_puts_all_back(platform: Platform) -> None:
    platform.untrust_at_up("edge1")
    ended = platform.apply(platform.plan())
    check_rolled_back(platform, ended, "edge1: root@127.0.0.1: Permission denied (publickey)")


def test_audit_4e1_a_container_that_is_more_than_its_files_say_puts_all_back(platform: Platform) -> None:
    """Something between compose and the engine adds to the service's container; to the trial's it does not."""
    podman = platform.folder / "bin" / "podman"
    before = podman.read_text()
    added = (
        f'case "$*" in *--name={platform.service.name}*--cap-drop*) shift; set -- create --pid=host "$@";; esac\nexec '
    )
    podman.write_text(before.replace("exec ", added))
    try:
        ended = platform.apply(platform.plan())
    finally:
        podman.write_text(before)
    check_rolled_back(platform, ended, "the container is not what the compose files say: its PidMode is host")
    platform.start_service()


def test_compose_that_fails_half_way_puts_all_back(platform: Platform) -> None:
    """The key's folder vanishes in the last moment: the old container is gone, and the new one cannot be made."""
    watched = Watched(platform, "cutover", "apply", platform.plan(), "--approve", CUTOVER_PHRASE)
    ended = watched.at("step.began", "up", lambda: shutil.rmtree(platform.key_file.parent))
    check_rolled_back(platform, ended, "compose")


def test_a_service_that_never_gets_ready_puts_all_back(platform: Platform, tmp_path: Path) -> None:
    """Another key lies there in the last moment, which the service refuses."""
    other = make_key(tmp_path, "ed25519").private
    other.chmod(0o400)
    watched = Watched(platform, "cutover", "apply", platform.plan(), "--approve", CUTOVER_PHRASE)
    ended = watched.at("step.began", "up", lambda: shutil.copyfile(other, platform.key_file))
    check_rolled_back(platform, ended, "ready")


def test_a_disk_that_fills_up_under_way_leaves_a_platform_that_works(platform: Platform) -> None:
    platform.fill_evidence_disk("4m")

    def fill() -> None:
        with (platform.evidence_dir / "filling").open("wb") as file, Path("/dev/zero").open("rb") as zeros:
            shutil.copyfileobj(zeros, file)

    watched = Watched(platform, "cutover", "apply", platform.plan(), "--approve", CUTOVER_PHRASE)
    with pytest.raises(OSError, match="No space left"):
        watched.at("step.began", "up", fill)
    ended = watched.wait()
    assert ended.status == 1
    platform.wait_for_mode("vault")
    assert platform.can_log_in()
    (platform.evidence_dir / "filling").unlink()
    assert platform.status()["now"]["mode"] == "vault"


# --- before the change: nothing is changed ---------------------------------------------------------------------------


def test_an_overlay_that_was_edited_since_the_plan_is_exit_4_with_the_field(unchanged: Platform) -> None:
    plan = unchanged.plan()
    with unchanged.overlay.open("a") as file:
        file.write("# looks harmless\n")
    done = unchanged.apply(plan)
    assert done.status == 4
    assert "inputs.files.overlay.sha256: planned" in done.err
    assert "1 difference" in done.err


def test_a_role_that_was_widened_in_vault_since_the_plan_is_exit_4_with_the_field(unchanged: Platform) -> None:
    plan = unchanged.plan()
    unchanged.widen_vault_role("root")
    done = unchanged.apply(plan)
    assert done.status == 4
    assert "inputs.vault.roles.llmops.allowed_users: planned" in done.err
    assert "llmops,root" in done.err


@pytest.mark.parametrize(
    "fault, said",
    [
        (lambda platform: platform.bao.seal(), "sealed"),
        (lambda platform: platform.bao.halt(), "Vault"),
        (lambda platform: platform.revoke_vault_token(), "token"),
    ],
    ids=["sealed", "down", "token expired"],
)
def test_vault_that_does_not_answer_stops_a_cutover_before_anything_is_changed(
    platform: Platform, fault: Callable[[Platform], None], said: str
) -> None:
    plan, before = platform.plan(), platform.container()
    fault(platform)
    for done in (platform.apply(plan), platform.signer("cutover", "plan", "--config", "cutover.toml")):
        assert done.status == 1
        assert said in done.err
        assert "hint:" in done.err
    assert platform.container() == before
    assert not list(platform.evidence_dir.glob("*-cutover"))
    platform.reset()
    assert platform.can_log_in()


def test_an_evidence_disk_without_room_stops_it_before_anything_is_changed(platform: Platform) -> None:
    platform.fill_evidence_disk("64k")
    before = platform.container()
    done = platform.apply(platform.plan())
    assert done.status == 1
    assert "evidence" in done.err
    assert "space" in done.err
    assert platform.container() == before


def test_an_overlay_that_cannot_start_is_found_on_trial_before_anything_is_changed(platform: Platform) -> None:
    before = platform.container()
    platform.break_overlay()
    done = platform.apply(platform.plan())
    assert done.status == 1
    assert "2 ✗ compare roles" in done.out + done.err
    assert "rolling back" not in done.out + done.err
    assert platform.container() == before
    assert platform.status()["runs"][-1]["outcome"] == "failed"


def test_audit_4e3_a_host_whose_sshd_refuses_the_new_ca_is_found_before_anything_is_changed(
    platform: Platform,
) -> None:
    before = platform.container()
    platform.untrust("edge1")
    platform.write_config(smoke_edge1__trusted_ca_file=None)
    done = platform.apply(platform.plan())
    said = done.out + done.err
    assert done.status == 1, said
    assert "3 ✗ do the 2 hosts trust the new CA" in said
    assert f"edge1: sshd refuses certificates of {platform.ca.fingerprint}" in said
    assert "rolling back" not in said
    assert platform.container() == before
    (run,) = platform.evidence_dir.glob("*-cutover")
    logs = {path.name: path.read_text() for path in (run / "smoke").iterdir()}
    assert "Server accepts key" in logs["01-rs2000-trust.log"]
    assert "Server accepts key" not in logs["02-edge1-trust.log"]
    assert "Offering public key" in logs["02-edge1-trust.log"]
    certificate = json.loads((run / "sample.json").read_text())["certificate"]
    assert certificate.startswith("ssh-ed25519-cert-v01@openssh.com ")
    key = fingerprint_of(certificate_fields(certificate).key)
    for sshd in platform.targets.values():
        assert not [line for line in sshd.log().splitlines() if "Accepted publickey" in line and key in line]


# --- the phrase ------------------------------------------------------------------------------------------------------

TYPED = "open-sesame-4711"


@pytest.mark.parametrize(
    "words, environ, typed, code",
    [
        (["--approve", TYPED], {}, "", "approval_wrong"),
        (["--approve", DECOMMISSION_PHRASE], {}, "", "approval_for_another_operation"),
        ([], {}, "", "approval_missing"),
        ([], {}, f"{CUTOVER_PHRASE}\n", "approval_missing"),
        (
            [],
            dict.fromkeys(("APPROVE", "SIGNER_APPROVE", "SIGNER_CUTOVER_APPROVE", "PHRASE"), CUTOVER_PHRASE),
            "",
            "approval_missing",
        ),
    ],
    ids=["wrong", "that of the decommission", "missing", "through a pipe", "in the environment"],
)
def test_without_its_phrase_a_plan_is_exit_3_and_on_record_without_what_was_typed(
    unchanged: Platform, words: list[str], environ: dict[str, str], typed: str, code: str
) -> None:
    done = unchanged.signer("cutover", "apply", unchanged.plan(), *words, env=environ, typed=typed)
    assert done.status == 3
    newest = unchanged.operations()[0]
    assert (newest["operation"], newest["outcome"], newest["reason"]) == ("cutover", "approval_refused", code)
    assert newest["plan"] == json.loads((unchanged.folder / "cutover.json").read_text())["digest"]
    kept = (unchanged.evidence_dir / "journal" / "attempts.jsonl").read_text()
    assert json.loads(kept.splitlines()[-1])["code"] == code
    everything = done.out + done.err + kept + json.dumps(unchanged.operations())
    for phrase in (TYPED, CUTOVER_PHRASE, DECOMMISSION_PHRASE):
        assert phrase not in everything


@pytest.mark.parametrize("typed, status", [(TYPED, 3), (CUTOVER_PHRASE, 4)])
def test_at_a_terminal_the_plan_is_shown_before_the_phrase_is_asked_for(
    unchanged: Platform, typed: str, status: int
) -> None:
    """The right phrase is known by what comes after it: the world has changed since the plan."""
    plan = unchanged.plan()
    digest = json.loads((unchanged.folder / plan).read_text())["digest"]
    unchanged.widen_vault_role("root")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(unchanged.folder)
        os.execvpe(*_words(unchanged.command("cutover", "apply", plan)), unchanged.environment())  # noqa: S606 - itself
    said = _read_until(terminal, "type the phrase")
    assert "compose up with the overlay" in said
    assert digest in said
    os.write(terminal, f"{typed}\n".encode())
    _read_until(terminal, "hint:")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    os.close(terminal)


def _words(argv: list[str]) -> tuple[str, list[str]]:
    return argv[0], argv


def _read_until(terminal: int, text: str) -> str:
    """All that is said up to a text, on one line; fails if it does not come."""
    said = b""
    while text not in (line := " ".join(said.decode(errors="replace").split())):
        assert select.select([terminal], [], [], 30)[0], said
        said += os.read(terminal, 65536)
    return line


# --- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_apply_meanwhile_is_refused_and_ctrl_c_before_the_change_changes_nothing(platform: Platform) -> None:
    plan, before = platform.plan(), platform.container()
    first = Watched(platform, "cutover", "apply", plan, "--approve", CUTOVER_PHRASE)
    assert first.reaches("step.began", "parity")
    second = platform.apply(plan)
    assert second.status == 1
    assert "another process is changing this platform" in second.err
    first.process.send_signal(signal.SIGINT)
    first.go_on()
    ended = first.wait()
    assert ended.status == 1, ended.out
    assert "interrupted by SIGINT" in ended.out
    assert platform.container() == before
    assert [run["outcome"] for run in platform.status()["runs"]] == ["failed"]
