"""The service in a docker container, from the compose files by docker compose v2: what podman does, docker does."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from signer.migration.compose import Compose, ComposeFailed
from signer.migration.config import ComposeFacts
from signer.migration.trial import trial, trial_project
from tests.parts import missing
from tests.parts.container import API, BASE_FILE, FOLDER_VARIABLE, KEEPER_ID, OVERLAY_FILE, Contained, Engine
from tests.parts.docker import Docker
from tests.parts.eventually import eventually
from tests.parts.hosts import Host
from tests.parts.keys import Key, KeyRing
from tests.parts.platform import Platform, make_memory, remove_memory
from tests.parts.service import STANDARD_POLICY
from tests.parts.sshd import StartSshd

pytestmark = [missing.needs_docker, pytest.mark.slow, pytest.mark.timeout(300)]


class DockerService(Contained):
    """A service that `Compose` starts with docker; `image` is a name of its own, that an upgrade gives to another."""

    def __init__(self, docker: Docker, folder: Path, ca: Key) -> None:
        super().__init__(docker, folder, ca, local=True)
        self.image = f"localhost/signer:upgraded-{os.getpid()}"
        docker.control("tag", docker.image, self.image)
        self.variables["PLATFORM_RUNTIME_SAFE_SESSION_IMAGE"] = self.image
        facts = ComposeFacts(
            docker.compose_command, docker.program, self.project, BASE_FILE, OVERLAY_FILE, API, self.variables
        )
        self.facts, self.commands = facts, Compose(facts, docker.environ)

    def up(self) -> None:
        """Brings up base and overlay, and waits until the service is ready."""
        self.commands.up(with_overlay=True)
        eventually(self.is_ready, "the service is ready")

    def made(self, project: str) -> list[str]:
        """The containers and volumes that docker has of a project, by name."""
        label = f"label=com.docker.compose.project={project}"
        containers = self.engine.control("ps", "--all", "--format", "{{.Names}}", "--filter", label).split()
        return containers + self.engine.control("volume", "ls", "--quiet", "--filter", label).split()


@pytest.fixture(scope="module")
def docker(engine: Engine) -> Iterator[Docker]:
    with Docker(engine) as running:
        yield running


@pytest.fixture(scope="module")
def service(docker: Docker, keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerService]:
    """Base and overlay: the local CA signs."""
    made = DockerService(docker, tmp_path_factory.mktemp("docker") / "service", keyring("ed25519", "ca"))
    try:
        made.up()
        yield made
    finally:
        made.remove()


def test_a_certificate_from_the_container_opens_an_sshd(
    service: DockerService, start_sshd: StartSshd, new_key: Callable[..., Key]
) -> None:
    user = new_key("ed25519", "user")
    answer = service.sign(user.public_line)
    assert answer.status == 201, answer.body
    certificate = user.private.with_name("user-cert.pub")
    certificate.write_text(answer.json()["certificate"] + "\n")
    sshd = start_sshd(service.ca.public_line)
    login = sshd.login("echo it-is-$((40 + 2))", identity=user.private, certificate=certificate)
    assert (login.out.strip(), login.status) == ("it-is-42", 0), login.err


def test_the_container_is_what_the_files_say_and_its_keeper_has_no_powers(service: DockerService) -> None:
    found = service.commands.running()
    assert found is not None
    assert (found.mode, found.is_running, found.image) == ("local", True, service.commands.image_id(True))
    assert service.commands.container_differences(found.id, with_overlay=True) == []
    in_vault_mode = service.commands.container_differences(found.id, with_overlay=False)
    assert in_vault_mode == [
        "its variable SIGNER_MODE has another value", f"it sees {service.key_file.parent} at /run/signer-ca",
    ]  # fmt: skip
    keeper = service.keeper()
    assert (keeper.uid, int(keeper.status["CapEff"][0], 16), keeper.status["NoNewPrivs"]) == (KEEPER_ID, 0, ["1"])
    assert "Read-only file system" in service.inside("touch", "/run/signer-ca/new").err


def test_a_replaced_policy_is_taken_by_sighup_and_by_reload(service: DockerService, keyring: KeyRing) -> None:
    line = keyring("ed25519").public_line

    def status() -> int:
        return service.sign(line, ttl="20m").status

    service.write_policy(STANDARD_POLICY.replace('max_ttl = "30m"', 'max_ttl = "16m"'))
    service.engine.control("kill", "--signal", "HUP", service.name)
    eventually(lambda: status() == 403, "the shorter lifetime is in force")
    service.write_policy(STANDARD_POLICY)
    done = service.inside("signer", "reload")
    assert done.status == 0, done.out + done.err
    assert status() == 201


def test_up_keeps_the_container_of_the_same_image_and_an_upgrade_replaces_it(
    service: DockerService, docker: Docker, keyring: KeyRing
) -> None:
    line = keyring("ed25519").public_line
    before, serial = service.commands.running(), int(service.sign(line).json()["serial"])
    service.up()
    assert service.commands.running() == before
    docker.change_image(service.image)
    service.up()
    after = service.commands.running()
    assert before is not None
    assert after is not None
    assert (after.id != before.id, after.image != before.image) == (True, True)
    assert after.image == service.commands.image_id(True)
    assert int(service.sign(line).json()["serial"]) == serial + 1
    assert service.made(service.project) == [service.name, f"{service.project}_ledger"]


def test_a_trial_runs_beside_the_service_and_leaves_nothing(service: DockerService) -> None:
    before = service.commands.running()
    with trial(service.facts, environ=service.engine.environ) as tried:
        assert tried.health.ca_fingerprint == service.ca.fingerprint
        place = Path(tried.address.removeprefix("unix:"))
        assert (place.parent.stat().st_uid, place.parent.stat().st_mode) == (0, 0o040700)
        assert len(service.made(trial_project(service.facts))) == 2
        assert '"kind": "keeper.started"' in tried.export_ledger()
    assert service.made(trial_project(service.facts)) == []
    assert not place.parent.exists()
    assert service.commands.running() == before


def test_the_preflight_finds_a_host_with_docker_ready(service: DockerService, host: Host) -> None:
    """The script asks docker itself for its configuration, its image and its container."""
    service.commands.up(with_overlay=False)
    for name in ("docker", "podman-compose"):  # the small programs that stand for real ones elsewhere
        (host.folder / "bin" / name).unlink()
    (host.folder / "bin" / "docker").symlink_to(shutil.which("docker") or "docker")
    host.environ |= {name: service.engine.environ[name] for name in ("DOCKER_HOST", "DOCKER_CONFIG")}
    host.environ |= {name: value for name, value in service.variables.items() if name != FOLDER_VARIABLE}
    host.arguments = []  # the overlays of this repository
    told = host.run()
    assert told.codes("FAIL", "warn", "skip") == set(), told.stdout
    assert told.detail("compose_found") == "docker compose 2.40, engine docker"
    assert (told.detail("image_present"), told.detail("container_mode")) == (service.image, "vault")


def test_a_folder_that_is_missing_is_named_and_not_created_and_the_base_alone_goes_back(service: DockerService) -> None:
    """docker compose prints `create_host_path: false` as an empty `bind`, and obeys it."""
    service.commands.up(with_overlay=False)
    assert '"bind": {}' in json.dumps(service.commands.content(with_overlay=True))
    folder = service.key_file.parent
    away = folder.rename(folder.with_name("away"))
    try:
        with pytest.raises(ComposeFailed) as caught:
            service.commands.up(with_overlay=True)
        assert str(folder) in caught.value.said
        assert not folder.exists()
        service.commands.up(with_overlay=False)
        found = service.commands.running()
        assert found is not None
        assert (found.mode, service.commands.container_differences(found.id, with_overlay=False)) == ("vault", [])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        away.rename(folder)
    service.up()


@pytest.mark.long
@missing.needs_bao
@missing.needs_sshd
def test_a_platform_with_docker_is_cut_over_and_back(engine: Engine, docker: Docker, tmp_path: Path) -> None:
    memory = Path(tempfile.mkdtemp(prefix="signer-platform-", dir="/run"))
    make_memory(memory)
    try:
        with Platform(engine, tmp_path / "platform", memory, targets=("rs2000",), service_engine=docker) as platform:
            vault = platform.container()
            done = platform.apply(platform.plan())
            assert done.status == 0, done.out + done.err
            assert (platform.mode(), platform.container() != vault, platform.can_log_in()) == ("local", True, True)
            assert platform.verify_evidence().status == 0
            back = platform.rollback()
            assert back.status == 0, back.out + back.err
            assert (platform.mode(), platform.can_log_in()) == ("vault", True)
    finally:
        remove_memory(memory)
