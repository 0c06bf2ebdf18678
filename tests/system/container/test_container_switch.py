"""From one configuration to the other and back, and a trial beside what runs: with real podman and podman-compose."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.migration.boot import record_boot
from signer.migration.compose import Compose, ComposeFailed
from signer.migration.config import ComposeFacts
from signer.migration.parity import USUAL_KIND, throwaway_key
from signer.migration.trial import trial, trial_project
from signer.ssh.certificate import decode_certificate
from tests.parts import missing
from tests.parts.container import API, BASE_FILE, OVERLAY_FILE, Contained, Engine
from tests.parts.eventually import eventually
from tests.parts.keys import Key, KeyRing
from tests.parts.processes import command_line, descendants
from tests.parts.service import ROOT, STANDARD_POLICY

pytestmark = [missing.needs_podman, missing.needs_podman_compose]
COMPOSE = str(Path(sys.executable).with_name("podman-compose"))


class Platform(Contained):
    """A service that `Compose` starts; both files' variables are known."""

    def __init__(self, engine: Engine, folder: Path, ca: Key) -> None:
        super().__init__(engine, folder, ca, local=True)
        self.facts = ComposeFacts((COMPOSE,), "podman", self.project, BASE_FILE, OVERLAY_FILE, API, self.variables)
        self.compose_commands = Compose(self.facts, engine.environ)

    def mode(self) -> str:
        """That of the container, as soon as its service answers."""

        def answers() -> bool:
            try:
                return self.ask("GET", "/metrics").status == 200
            except OSError:
                return False  # it does not listen yet

        eventually(answers, "the service answers")
        found = self.compose_commands.running()
        return found.mode if found else ""

    def made(self, project: str) -> list[str]:
        """What the engine has of a project, by name."""
        label = f"label=com.docker.compose.project={project}"
        containers = self.engine.control("ps", "--all", "--format", "{{.Names}}", "--filter", label).split()
        return containers + self.engine.control("volume", "ls", "--quiet", "--filter", label).split()


@pytest.fixture(scope="module")
def platform(engine: Engine, keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """In mode vault, with a Vault that is away."""
    made = Platform(engine, tmp_path_factory.mktemp("switch") / "service", keyring("ed25519", "ca"))
    try:
        made.compose_commands.up(with_overlay=False)
        yield made
    finally:
        made.remove()


def test_up_replaces_the_container_there_and_back_and_leaves_alone_what_is_right(platform: Platform) -> None:
    compose = platform.compose_commands
    seen = [compose.running()]
    for with_overlay in (True, True, False):
        compose.up(with_overlay=with_overlay)
        seen.append(compose.running())
        assert platform.mode() == ("local" if with_overlay else "vault")
    base, overlay, again, back = seen
    assert base and overlay and again and back  # noqa: PT018 - for the type checker
    assert [one.mode for one in (base, overlay, again, back)] == ["vault", "local", "local", "vault"]
    assert overlay == again
    assert len({base.id, overlay.id, back.id}) == 3
    assert {one.image for one in (base, overlay, back)} == {compose.image_id()}
    assert platform.made(platform.project) == [platform.name, f"{platform.project}_ledger"]


@pytest.mark.parametrize("with_overlay", [True, False], ids=["local", "vault"])
def test_a_reboot_starts_what_was_recorded_from_nothing(platform: Platform, with_overlay: bool) -> None:
    """Engines forget containers that were not stopped in order; the ledger's volume stays."""
    record = Path("/run") / f"signer-boot-{os.getpid()}"
    record.mkdir(mode=0o700)
    try:
        record_boot(record / "boot", platform.compose_commands, with_overlay=with_overlay)
        platform.engine.control("rm", "--force", "--time", "0", platform.name)
        script = str(ROOT / "scripts" / "container" / "start-recorded")
        done = platform.engine.run(script, "--file", str(record / "boot"))
        assert done.status == 0, done.out + done.err
        assert platform.mode() == ("local" if with_overlay else "vault")
        assert platform.made(platform.project) == [platform.name, f"{platform.project}_ledger"]
    finally:
        shutil.rmtree(record)


def test_a_failure_leaves_a_platform_that_the_other_configuration_mends(platform: Platform) -> None:
    folder = platform.key_file.parent
    away = folder.rename(folder.with_name("away"))
    try:
        with pytest.raises(ComposeFailed) as caught:
            platform.compose_commands.up(with_overlay=True)
        assert caught.value.code == "compose_failed"
        assert str(folder) in caught.value.said
        platform.compose_commands.up(with_overlay=False)
        assert platform.mode() == "vault"
    finally:
        away.rename(folder)


_UP = """
from pathlib import Path
from signer.migration.compose import Compose
from signer.migration.config import ComposeFacts
files = Path({base!r}), Path({overlay!r})
Compose(ComposeFacts(({command!r},), "podman", {project!r}, *files, {service!r}, {variables!r})).up(True)
"""


@pytest.mark.parametrize("with_children", [False, True], ids=["alone", "with all that it started"])
@pytest.mark.parametrize("moment", ["stop", "create"])
def test_a_process_killed_in_the_middle_leaves_what_another_up_mends(
    platform: Platform, with_children: bool, moment: str
) -> None:
    """`moment` is the verb of podman that runs when SIGKILL comes."""
    platform.compose_commands.up(with_overlay=False)
    script = _UP.format(
        command=COMPOSE, project=platform.project, base=str(BASE_FILE), overlay=str(OVERLAY_FILE), service=API,
        variables=platform.variables,
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", script], env=platform.engine.environ | {"PYTHONPATH": str(ROOT)}
    ) as ours:
        wait_for_podman(moment, ours)
        victims = [*commands_of(platform.project)] if with_children else []
        for pid in (ours.pid, *victims):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended by itself
    platform.compose_commands.up(with_overlay=False)
    assert platform.mode() == "vault"


def wait_for_podman(verb: str, ours: subprocess.Popen[bytes]) -> None:
    """Returns when compose runs `podman VERB`; busy, and with no look at other processes, as the moment is short."""
    while ours.poll() is None:
        if any(command_line(pid).split(b"\0")[1:2] == [verb.encode()] for pid in descendants(ours.pid)):
            return
    raise AssertionError(f"it ended before podman {verb} was seen")


def commands_of(project: str) -> dict[int, list[str]]:
    """Running commands that were started for a project, containers' monitors not counted."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            marked = f"SIGNER_COMPOSE_PROJECT={project}\0".encode() in (folder / "environ").read_bytes()
            words = (folder / "cmdline").read_text().split("\0")
        except (OSError, ValueError):
            continue  # it is no process, or it has ended
        if marked and "conmon" not in words[0]:
            found[int(folder.name)] = words
    return found


def test_a_trial_runs_beside_the_service_and_leaves_nothing(platform: Platform) -> None:
    platform.compose_commands.up(with_overlay=False)
    before = platform.compose_commands.running()
    with trial(platform.facts, environ=platform.engine.environ) as tried:
        assert tried.health.mode == "local"
        assert tried.health.ca_fingerprint == platform.ca.fingerprint
        assert platform.mode() == "vault"
        assert len(platform.made(trial_project(platform.facts))) == 2
        assert '"kind": "keeper.started"' in tried.export_ledger()
    assert platform.made(trial_project(platform.facts)) == []
    assert platform.compose_commands.running() == before


def test_audit_3d1_a_trial_listens_in_a_folder_of_roots_alone_and_signs_for_a_caller_on_this_host(
    platform: Platform,
) -> None:
    """A role that binds certificates to the caller's address gives what it gives over loopback."""
    platform.write_policy(STANDARD_POLICY.replace("[roles.llmops]\n", '[roles.llmops]\nsource_address = "caller"\n', 1))
    token = platform.token_file("deploy-agent")
    try:
        with trial(platform.facts, environ=platform.engine.environ) as tried:
            place = Path(tried.address.removeprefix("unix:"))
            folder, socket_file = place.parent.stat(), place.stat()
            assert (place.parent.parent, folder.st_uid, folder.st_mode) == (Path("/run"), 0, 0o040700)
            assert (socket_file.st_uid, socket_file.st_mode) == (0, 0o140660)
            listening = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
            strange = subprocess.run(
                [sys.executable, "-c", listening, place], user=65534, capture_output=True, text=True
            )
            assert "PermissionError" in strange.stderr
            assert subprocess.run([sys.executable, "-c", listening, place], check=False).returncode == 0
            raw = platform.engine.control("inspect", tried.container.id)
            assert listening_ports(json.loads(raw)[0]["State"]["Pid"]) == []
            with pytest.raises(ComposeFailed) as refused:
                tried.client(token, "SHA256:" + "A" * 43)
            assert refused.value.code == "trial_not_ours"
            assert '"certificate.' not in tried.export_ledger()
            with tried.client(token, platform.ca.fingerprint) as api:
                made = api.sign("llmops", {"public_key": throwaway_key(USUAL_KIND)})
            fields = decode_certificate(base64.b64decode(str(made["certificate"]).split()[1]))[0]
            assert dict(fields.critical_options)["source-address"] == "127.0.0.1/32"
        assert not place.parent.exists()
    finally:
        platform.write_policy(STANDARD_POLICY)


def listening_ports(pid: int) -> list[str]:
    """TCP sockets that this process or one that it started listens on, as /proc/net/tcp has them."""
    ours = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    tree, parents = {pid}, subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    rows = [tuple(map(int, row.split())) for row in parents.stdout.splitlines()]
    for _ in range(8):
        tree |= {child for child, parent in rows if parent in tree}
    assert len(tree) > 2, "launcher, keeper and api"
    return [line for line in ours if any(f"pid={one}," in line for one in tree)]


def test_what_a_killed_trial_left_is_removed_by_the_next_and_a_failed_one_leaves_nothing(platform: Platform) -> None:
    abandoned = trial(platform.facts, environ=platform.engine.environ)
    left = abandoned.__enter__()
    project = trial_project(platform.facts)
    assert len(platform.made(project)) == 2
    with trial(platform.facts, environ=platform.engine.environ) as tried:
        assert tried.container.id != left.container.id
        assert len(platform.made(project)) == 2
    with (
        pytest.raises(ComposeFailed) as caught,
        trial(platform.facts, mode="shadow", environ=platform.engine.environ),
    ):
        raise AssertionError("it is not in that mode")
    assert (caught.value.code, "mode is local" in caught.value.text) == ("trial_not_ready", True)
    assert (platform.made(project), folders(platform.facts)) == ([], [])
    abandoned.__exit__(None, None, None)  # else it would clean up when it is collected, in the middle of another test


def test_the_container_of_a_trial_that_was_killed_ends_by_itself(platform: Platform) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from signer.migration.trial import trial\n"
        "from signer.migration.config import ComposeFacts\n"
        "command, project, base, overlay, service, *pairs = sys.argv[1:]\n"
        "variables = dict(pair.split('=', 1) for pair in pairs)\n"
        "facts = ComposeFacts((command,), 'podman', project, Path(base), Path(overlay), service, variables)\n"
        "with trial(facts, lives=15): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    facts = platform.facts
    words = [COMPOSE, facts.project, str(facts.base), str(facts.overlay), facts.service]
    variables = [f"{name}={value}" for name, value in facts.environment.items()]
    environ = {**platform.engine.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-P", "-c", code, *words, *variables], env=environ, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(folders(facts)) == 1
    volume = f"{trial_project(facts)}_ledger"
    eventually(lambda: platform.made(trial_project(facts)) == [volume], "only the volume is left", seconds=60)
    eventually(lambda: folders(facts) == [], "the guard has removed the folder of the socket")


def folders(facts: ComposeFacts) -> list[Path]:
    """Where the trials of this platform have their sockets."""
    return [*Path("/run").glob(f"signer-{trial_project(facts)}.*")]


def test_a_trial_that_would_share_the_ledger_is_refused_before_it_starts(platform: Platform, tmp_path: Path) -> None:
    shared = tmp_path / "base.yaml"
    shared.write_text(BASE_FILE.read_text() + f"    name: {platform.project}_ledger\n")
    facts = ComposeFacts((COMPOSE,), "podman", platform.project, shared, OVERLAY_FILE, API, platform.variables)
    with (
        pytest.raises(ComposeFailed) as caught,
        trial(facts, environ=platform.engine.environ),
    ):
        raise AssertionError("it has started")
    assert caught.value.code == "trial_not_apart"
    assert platform.made(trial_project(facts)) == []
    assert f"{platform.project}_ledger" in platform.made(platform.project)
