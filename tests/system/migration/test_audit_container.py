"""The trial's container, which would get the CA key, is not started if compose made of the files what they do not say.

The preflight refuses these files before; here they come to the trial all the same, as if it had not looked.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from signer.migration.compose import Compose, ComposeFailed
from signer.migration.config import ComposeFacts
from signer.migration.trial import trial, trial_project
from tests.parts import missing
from tests.parts.container import API, BASE_FILE, FOLDER_VARIABLE, OVERLAY_FILE, Engine
from tests.parts.keys import KeyRing

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(300)]

# Lines of the hidden service, and what is told of each.
LINES = {
    "privileged": {"privileged: true": "it is privileged"},
    "all else": {
        "pid: host": "its PidMode is host",
        "volumes: [{type: bind, source: FOLDER, target: /folder, read_only: true}]": "it sees FOLDER at /folder",
        "security_opt: ['seccomp=unconfined', 'unmask=ALL']": "its security option is seccomp=unconfined",
        "devices: [/dev/null:/dev/mem]": "its Devices is not empty",
        "env_file: [FOLDER/hidden.env]": "it has the variable LD_PRELOAD",
        "entrypoint: [sleep, '60']": "its command is not the image's",
        "healthcheck: {test: 'cat /run/signer-ca/ca'}": "its health check is not the image's",
        "group_add: ['0'] # podman shows no trace of unmask": "it was created with the security option unmask=ALL",
    },
}


@pytest.fixture
def facts(engine: Engine, tmp_path: Path, keyring: KeyRing) -> ComposeFacts:
    for file in (BASE_FILE, OVERLAY_FILE):
        shutil.copyfile(file, tmp_path / file.name)
    for name in ("policy", "vault"):
        (tmp_path / name).mkdir()
    return ComposeFacts(
        command=(str(Path(os.environ["PATH"].split(":")[0]) / "podman-compose"),),
        engine="podman",
        project=f"audit-{os.getpid()}",
        base=tmp_path / BASE_FILE.name,
        overlay=tmp_path / OVERLAY_FILE.name,
        service=API,
        environment={
            "PLATFORM_RUNTIME_SAFE_SESSION_IMAGE": engine.image,
            "PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR": str(tmp_path / "policy"),
            "PLATFORM_RUNTIME_SAFE_SESSION_VAULT_DIR": str(tmp_path / "vault"),
            FOLDER_VARIABLE: str(tmp_path / "vault"),
        },
    )


def tried(facts: ComposeFacts, engine: Engine, image: str = "") -> ComposeFailed:
    """Why the trial ended; its container was never started, and is gone."""
    with pytest.raises(ComposeFailed) as refused, trial(facts, environ=engine.environ, image=image, within=60):
        pass
    label = f"label=com.docker.compose.project={trial_project(facts)}"
    assert engine.podman("ps", "--all", "--quiet", "--filter", label) == ""
    return refused.value


def test_audit_4e1_what_extends_hides_is_found_before_the_start(facts: ComposeFacts, engine: Engine) -> None:
    folder = facts.base.parent
    (folder / "hidden.env").write_text("LD_PRELOAD=/run/signer-vault/x.so\n")
    text = facts.overlay.read_text()
    extends = f"  {API}:\n    extends: {{file: hidden.yaml, service: hidden}}\n"
    facts.overlay.write_text(text.replace(f"  {API}:\n", extends))
    for name in LINES.values():
        lines = "".join(f"    {line}\n" for line in name)
        (folder / "hidden.yaml").write_text(f"services:\n  hidden:\n{lines}".replace("FOLDER", str(folder)))
        error = tried(facts, engine)
        assert error.code == "container_differs", error.text
        wanted = {told.replace("FOLDER", str(folder)) for told in name.values()}
        assert wanted <= set(error.said.splitlines())


def test_audit_4e2_another_image_than_the_planned_one_is_not_started(facts: ComposeFacts, engine: Engine) -> None:
    error = tried(facts, engine, "0" * 64)
    assert (error.code, "its image is" in error.text) == ("container_differs", True)


def test_audit_4e2_the_overlays_own_container_differs_in_nothing(facts: ComposeFacts, engine: Engine) -> None:
    compose = Compose(facts, engine.environ)
    try:
        for with_overlay in (True, False):
            made = compose.run(compose.command_line(with_overlay, "up", "--no-start", "--no-deps", API), 60)
            assert made.status == 0, made.err
            found = compose.running()
            assert found is not None
            assert compose.container_differences(found.id, with_overlay=with_overlay) == []
    finally:
        compose.run(compose.command_line(True, "down", "--volumes"), 60)
