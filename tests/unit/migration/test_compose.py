"""Compose and the engine with every fault that they can have: what is told, and what is not believed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from signer.api_client import Readiness
from signer.migration import trial as composetrial
from signer.migration.compose import KEPT_WORDS, Compose, ComposeFailed, _marked, shown
from tests.parts import missing
from tests.parts.fake_compose import CONTAINER, IMAGE, FakePlatform, inspected

SECRET = "marker-of-a-secret"


@pytest.fixture
def platform(tmp_path: Path) -> FakePlatform:
    return FakePlatform(tmp_path)


@pytest.fixture
def compose(platform: FakePlatform) -> Compose:
    return Compose(platform.facts, {"PATH": "/usr/bin:/bin", "A_SECRET": SECRET, "HOME": "/root"})


def failed(act: Callable[[], object]) -> ComposeFailed:
    with pytest.raises(ComposeFailed) as caught:
        act()
    return caught.value


# --- what is run -----------------------------------------------------------------------------------------------------


def test_the_line_of_a_plan_is_the_line_that_is_run(platform: FakePlatform, compose: Compose) -> None:
    compose.up(with_overlay=True)
    files = f"-f {platform.folder}/base.yaml -f {platform.folder}/overlay.yaml"
    assert platform.calls[0] == f"compose {files} -p platform up --detach --no-deps --no-build safe-session-api"
    assert " ".join(compose.up_line(with_overlay=True)).endswith(platform.calls[0].removeprefix("compose "))


def test_without_overlay_the_base_file_alone_is_given(platform: FakePlatform, compose: Compose) -> None:
    compose.up(with_overlay=False)
    assert platform.calls[0].startswith(f"compose -f {platform.folder}/base.yaml -p platform up ")


def test_a_child_gets_the_configured_variables_and_nothing_else_of_ours(
    platform: FakePlatform, compose: Compose
) -> None:
    platform.compose(f"env > {platform.folder}/env")
    compose.up(with_overlay=False)
    names = {line.partition("=")[0] for line in (platform.folder / "env").read_text().splitlines()}
    ours = {"PATH", "HOME", "PLATFORM_RUNTIME_SAFE_SESSION_IMAGE", "SIGNER_COMPOSE_PROJECT"}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == ours


# --- up, and what is not believed ------------------------------------------------------------------------------------


def test_a_status_other_than_0_is_a_failure_with_what_was_said(platform: FakePlatform, compose: Compose) -> None:
    platform.compose("echo 'no such image' >&2; exit 125")
    error = failed(lambda: compose.up(with_overlay=True))
    assert (error.code, error.text) == ("compose_failed", "compose ended with status 125")
    assert error.facts["said"] == "no such image"


@pytest.mark.parametrize(
    "ps, state, told",
    [("", "running", "does not exist"), (CONTAINER, "exited", "is exited"), (CONTAINER, "created", "is created")],
)
def test_status_0_without_a_running_container_is_a_failure(
    platform: FakePlatform, compose: Compose, ps: str, state: str, told: str
) -> None:
    platform.engine(ps=ps, inspect=inspected(state=state))
    error = failed(lambda: compose.up(with_overlay=True))
    assert (error.code, error.text) == ("compose_not_running", f"compose reports success, but the container {told}")


def test_one_that_hangs_is_ended(platform: FakePlatform, compose: Compose) -> None:
    platform.compose("echo stopping; sleep 600")
    error = failed(lambda: compose.up(with_overlay=True, within=1))
    assert (error.code, error.facts["said"]) == ("compose_slow", "stopping")


@pytest.mark.parametrize("missing", ["compose", "podman"])
def test_a_missing_command_is_told_by_name(platform: FakePlatform, compose: Compose, missing: str) -> None:
    (platform.folder / missing).unlink()
    error = failed(lambda: compose.up(with_overlay=True))
    assert error.code == "compose_missing"
    assert f"{platform.folder}/{missing}" in error.text


def test_what_is_kept_of_the_output_is_bounded_and_without_values_of_variables(
    platform: FakePlatform, compose: Compose
) -> None:
    platform.compose(
        f"echo 'podman create --name=x -e A_TOKEN={SECRET} -e B={SECRET} image'; "
        f"echo 'podman run --env C={SECRET} image' >&2; printf 'a\\033[2Jb\\n'; yes filling | head -n 100000"
    )
    said = shown(compose.up(with_overlay=True))
    assert SECRET not in said
    assert said.startswith("podman create --name=x …\na [2Jb\nfilling\n")
    assert len(said) < KEPT_WORDS + 100
    assert said.endswith("podman run …")


def test_what_outlived_a_killed_process_of_ours_is_waited_for(platform: FakePlatform, compose: Compose) -> None:
    """Two compose commands at once would undo each other."""
    environment = {"PATH": "/usr/bin:/bin", "SIGNER_COMPOSE_PROJECT": "platform"}
    log = platform.folder / "calls"
    with subprocess.Popen(
        ["/bin/sh", "-c", f"sleep 1; echo the first has ended >> {log}"], env=environment, start_new_session=True
    ):
        compose.up(with_overlay=True)
    assert platform.calls[0] == "the first has ended"
    assert platform.calls[1].startswith("compose ")


def test_the_command_of_another_project_is_not_waited_for(platform: FakePlatform, compose: Compose) -> None:
    environment = {"PATH": "/usr/bin:/bin", "SIGNER_COMPOSE_PROJECT": "platform-2"}
    with subprocess.Popen(["/bin/sleep", "600"], env=environment, start_new_session=True) as other:
        compose.up(with_overlay=True)
        assert other.poll() is None
        other.kill()
    assert platform.calls[0].startswith("compose ")


@missing.needs_root
@pytest.mark.parametrize("users", [(65534, 65534, 65534), (65534, 0, 0)], ids=["another user", "a set-user-ID program"])
def test_audit_3d4_the_environment_of_another_users_process_is_not_believed(users: tuple[int, int, int]) -> None:
    """Who starts a process with our mark would hold up every operation on the platform."""
    environment = {"SIGNER_COMPOSE_PROJECT": "platform"}
    with ExitStack() as stack:
        ours, other = (
            stack.enter_context(
                subprocess.Popen(["/bin/sleep", "600"], env=environment, start_new_session=True, preexec_fn=become)  # noqa: PLW1509 - one thread
            )
            for become in (lambda: None, lambda: os.setresuid(*users))
        )
        try:
            found = set(_marked("SIGNER_COMPOSE_PROJECT=platform", "podman"))
        finally:
            ours.kill()
            other.kill()
    assert ours.pid in found
    assert other.pid not in found


# --- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "sha256:"], ids=["podman", "docker"])
def test_of_a_container_its_mode_is_read_and_no_other_variable(
    platform: FakePlatform, compose: Compose, prefix: str
) -> None:
    platform.engine(inspect=inspected(mode="local", prefix=prefix))
    found = compose.running()
    assert found is not None
    assert (found.id, found.image, found.mode, found.is_running) == (CONTAINER, IMAGE, "local", True)
    assert SECRET not in repr(found)
    assert "label=com.docker.compose.project=platform" in platform.calls[0]
    assert "label=com.docker.compose.service=safe-session-api" in platform.calls[0]


def test_no_container_is_none(platform: FakePlatform, compose: Compose) -> None:
    platform.engine(ps="")
    assert compose.running() is None


def test_several_containers_are_refused(platform: FakePlatform, compose: Compose) -> None:
    two = json.dumps(json.loads(inspected()) * 2)
    platform.engine(ps=f"{CONTAINER}\n{IMAGE}", inspect=two)
    assert failed(compose.running).code == "compose_several_containers"


@pytest.mark.parametrize(
    "garbage",
    ["", "no json", "{}", "[]", "[1]", "[{}]", '[{"Id": 1}]', '[{"Id":"a","Image":"b","Config":{"Env":[]},"State":3}]',
     "[" * 100_000, "x" * 2_000_000],
)  # fmt: skip
def test_garbage_from_the_engine_is_told_and_not_believed(
    platform: FakePlatform, compose: Compose, garbage: str
) -> None:
    platform.engine(inspect=garbage)
    assert failed(compose.running).code == "compose_not_understood"


# --- the configuration -----------------------------------------------------------------------------------------------

MERGED = """services:
  other:
    image: other:1
  safe-session-api:
    environment:
      SIGNER_MODE: vault
    image: "signer:1"
volumes:
  safe-session-api-image: null
"""


def test_the_digest_is_that_of_what_compose_merges(platform: FakePlatform, compose: Compose) -> None:
    platform.compose('echo "services: $*"')
    one, other = compose.config_digest(with_overlay=False), compose.config_digest(with_overlay=True)
    assert one != other
    assert one == compose.config_digest(with_overlay=False)
    assert one.startswith("sha256:")


@pytest.mark.parametrize("body", ["exit 0", "echo; exit 0", "echo x; exit 1", "yes 0123456789 | head -c 3000000"])
def test_no_digest_of_nothing_of_a_failure_or_of_a_part(platform: FakePlatform, compose: Compose, body: str) -> None:
    platform.compose(body)
    assert failed(lambda: compose.config_digest(with_overlay=True)).code in {"compose_failed", "compose_not_understood"}


def test_the_image_is_that_of_the_service_and_not_of_another(platform: FakePlatform, compose: Compose) -> None:
    (platform.folder / "merged.yaml").write_text(MERGED)
    assert compose.image_id() == IMAGE
    assert platform.calls[-1] == "podman image inspect signer:1"


def test_a_service_without_an_image_is_told(platform: FakePlatform, compose: Compose) -> None:
    platform.compose("echo services:")
    assert failed(compose.image_id).code == "compose_image_unknown"


def test_versions_are_told_as_far_as_they_are_known(platform: FakePlatform, compose: Compose) -> None:
    platform.compose("echo podman version 4; echo compose version 2")
    assert compose.versions() == {"compose": "podman version 4; compose version 2", "engine": "unknown"}


def test_a_container_that_compose_cannot_start_is_removed_and_made_anew(
    platform: FakePlatform, compose: Compose
) -> None:
    """As podman leaves one when it is killed within a stop."""
    platform.engine(inspect=inspected(state="stopping"))
    flag = platform.folder / "failed-once"
    mended = platform.folder / "mended"
    mended.write_text(inspected(mode="local"))
    platform.compose(f"[ -e {flag} ] || {{ touch {flag}; exit 125; }}; cp {mended} {platform.folder}/inspect.out")
    compose.up(with_overlay=True)
    found = compose.running()
    assert found is not None
    assert found.mode == "local"
    assert f"podman rm --force {CONTAINER}" in platform.calls


def test_one_that_runs_is_not_removed_when_compose_fails(platform: FakePlatform, compose: Compose) -> None:
    platform.compose("exit 1")
    failed(lambda: compose.up(with_overlay=True))
    assert not any(" rm " in call for call in platform.calls)
    assert sum(call.startswith("compose ") for call in platform.calls) == 1


# --- what a failing command says, and a trial that is interrupted ----------------------------------------------------


def test_half_an_answer_of_a_command_that_failed_is_not_shown(platform: FakePlatform, compose: Compose) -> None:
    """`inspect` of two containers, one of them just gone, prints the other with its environment, and fails."""
    engine = platform.folder / "podman"
    told = f"cat {platform.folder}/inspect.out; echo no such container >&2; exit 125"
    engine.write_text(f"#!/bin/sh\ncase $1 in ps) echo {CONTAINER};; inspect) {told};; esac\n")
    error = failed(compose.running)
    assert "no such container" in error.said
    assert "marker-of-a-secret" not in str(error.facts)


def test_a_trial_whose_removal_is_interrupted_keeps_its_guard(
    platform: FakePlatform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second Ctrl-C must not leave a service with the CA key that nobody ends."""
    guards: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def begin(words: list[str], **how: Any) -> subprocess.Popen[bytes]:
        child = start(words, **how)
        if words[0] == "/bin/sh":
            guards.append(child)
        return child

    def interrupted(_apart: Compose) -> None:
        if guards:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setattr(composetrial, "remove_trial", interrupted)
    monkeypatch.setattr(composetrial, "_wait_until_ready", lambda *_: Readiness(True))
    monkeypatch.setattr(composetrial, "_FOLDERS", tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt), composetrial.trial(platform.facts, environ={"PATH": "/usr/bin:/bin"}):
            pass
        assert [guard.poll() for guard in guards] == [None]
    finally:
        for guard in guards:
            guard.kill()
            guard.wait()
