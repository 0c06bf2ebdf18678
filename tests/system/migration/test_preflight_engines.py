"""What the preflight asks of container engines, put to real ones: podman with a container, the docker client with a
daemon that only remembers what a real one said."""

from __future__ import annotations

import json
import shutil
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.parts import missing
from tests.parts.hosts import DATA, SCRIPT, SERVICE, Host

_ASK = f'source {SCRIPT}; engine="$1"; ask_engine'
_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=2048:2048"]
netns = "host"
[engine]
runtime = "runc"
"""


class Podman:
    """A podman with images and containers of its own, and one image that can do nothing but sleep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "podman"
        (folder / "containers.conf").write_text(_CONTAINERS_CONF)
        self.program.write_text(
            f"#!/bin/sh\nexport CONTAINERS_CONF={folder}/containers.conf\n"
            f'exec /usr/bin/podman --root {folder}/storage --runroot {folder}/run --tmpdir {folder}/tmp "$@"\n'
        )
        self.program.chmod(0o755)
        self._import()

    def _import(self) -> None:
        root = self.folder / "rootfs"
        for name in ("bin", "etc", "proc", "sys", "dev", "run", "tmp"):
            (root / name).mkdir(parents=True)
        shutil.copy("/bin/sleep", root / "bin")
        (root / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sleep\n")
        for word in subprocess.run(["ldd", "/bin/sleep"], capture_output=True, text=True).stdout.split():
            if word.startswith("/"):
                target = root / word.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, target)
        packed = subprocess.run(["tar", "-C", root, "-c", "."], capture_output=True, check=True).stdout
        subprocess.run([self.program, "import", "-", "localhost/signer:test"], input=packed, check=True,
                       capture_output=True)  # fmt: skip

    def start(self, *options: str) -> None:
        """Starts a container of the service with these options; raises where containers cannot run."""
        label = f"com.docker.compose.service={SERVICE}"
        self(
            "run", "--detach", "--name", "pft", "--label", label, *options, "localhost/signer:test", "/bin/sleep", "900"
        )

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([self.program, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return done.stdout


HARDENED = ("--read-only", "--cap-drop", "all", "--cap-add", "SETUID", "--cap-add", "SETGID",
            "--security-opt", "no-new-privileges:true", "--env", "SIGNER_MODE=vault")  # fmt: skip


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    if reason := missing.podman():
        pytest.skip(reason)
    # Not pytest's own folder, whose name is long with several workers: podman takes 50 characters for its state.
    folder = Path(tempfile.mkdtemp(prefix="pm-"))
    program = Podman(folder)
    yield program
    subprocess.run([program.program, "rm", "--all", "--force", "--time", "0"], capture_output=True)
    # podman leaves its storage mounted on itself.
    subprocess.run(["umount", folder / "storage" / "overlay"], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def with_podman(host: Host, podman: Podman) -> Iterator[Host]:
    """A host whose engine is the real podman."""
    host.environ["PLATFORM_RUNTIME_ENGINE"] = str(podman.program)
    yield host
    subprocess.run([podman.program, "rm", "--all", "--force", "--time", "0"], capture_output=True)


def _mount(host: Host, rights: str) -> tuple[str, str]:
    return "--volume", f"{host.key.parent}:/run/signer-ca:{rights}"


def test_real_podman_without_a_container(with_podman: Host) -> None:
    told = with_podman.run()
    assert told.codes("FAIL", "warn") == {"container_not_running"}
    assert told.detail("image_present") == "localhost/signer:test"


def test_real_hardened_container_is_ready_and_is_told_as_recorded(with_podman: Host, podman: Podman) -> None:
    podman.start(*HARDENED, *_mount(with_podman, "ro"))
    told = with_podman.run()
    assert told.codes("FAIL", "warn", "skip") == set(), told.stdout
    asked = subprocess.run(["bash", "-c", _ASK, "bash", podman.program], capture_output=True, text=True)
    assert asked.stdout.replace(str(with_podman.key.parent), "KEYDIR") == (DATA / "container-podman.txt").read_text()


def test_real_soft_container_is_not_ready(with_podman: Host, podman: Podman) -> None:
    podman.start("--user", "1001", *_mount(with_podman, "rw"))
    assert with_podman.run().codes("FAIL", "warn") == {
        "container_mode_unexpected", "container_user_differs", "container_capabilities_differ",
        "container_root_writable", "container_can_write_key",
    }  # fmt: skip


VERSIONS: dict[str, str] = {
    head: "\n".join(lines) + "\n"
    for head, *lines in (
        part.splitlines() for part in (DATA / "compose-versions.txt").read_text().partition("\n")[2].split("\n\n")
    )
}


@pytest.mark.parametrize("name", VERSIONS)
def test_a_compose_command_that_is_too_old_is_told_by_its_version(host: Host, name: str) -> None:
    host.write("compose-version", VERSIONS[name])
    told = host.run()
    assert told.codes("FAIL", "warn") == ({"compose_too_old"} if name.endswith(": too old") else set())


# --- docker -------------------------------------------------------------------------------------------------------

_ID = "f" * 64
_CONTAINER: dict[str, Any] = {
    "Id": _ID,
    "Name": "/overlays-safe-session-api-1",
    "Config": {"User": "", "Env": ["PATH=/bin", "TOKEN=hidden", "SIGNER_MODE=vault"], "Image": "x"},
    "HostConfig": {
        "ReadonlyRootfs": True, "Privileged": False, "SecurityOpt": ["no-new-privileges:true"],
        "CapAdd": ["CAP_SETGID", "CAP_SETUID"], "CapDrop": ["ALL"],
    },
    "Mounts": [
        {"Type": "bind", "Source": '/run/a "b"', "Destination": "/x", "Mode": "", "RW": False},
        {"Type": "volume", "Name": "l", "Source": "/var/lib/docker/volumes/l/_data", "Destination": "/y", "RW": True},
    ],
}  # fmt: skip


class _Daemon(BaseHTTPRequestHandler):
    """As much of the Docker Engine API as `ps`, `inspect` and `image inspect` need."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answer: object = {}
        if path.endswith("/containers/json"):
            answer = [{"Id": _ID, "Names": ["/x"], "Image": "x", "Command": "x", "Created": 1, "State": "running"}]
        elif path.endswith(f"/containers/{_ID}/json"):
            answer = _CONTAINER
        body = b"OK" if path.endswith("/_ping") else json.dumps(answer).encode()
        self.send_response(404 if "/images/" in path else 200)
        for name, value in (("Api-Version", "1.47"), ("Content-Type", "application/json")):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server calls it so
        """Says nothing."""


@pytest.fixture
def docker_host(tmp_path: Path) -> Iterator[str]:
    """Where the docker client finds the daemon."""
    if shutil.which("docker") is None:
        pytest.skip("no docker: the docker client is not installed")
    path = tmp_path / "docker.sock"
    with socketserver.ThreadingUnixStreamServer(str(path), _Daemon) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"unix://{path}"
        server.shutdown()
        thread.join()


def test_real_docker_client_understands_the_questions(host: Host, docker_host: str) -> None:
    host.use_docker()
    asked = subprocess.run(
        ["bash", "-c", _ASK, "bash", "docker"],
        capture_output=True, text=True, env={"PATH": "/usr/local/bin:/usr/bin:/bin", "DOCKER_HOST": docker_host},
    )  # fmt: skip
    assert asked.stdout == (DATA / "container-docker.txt").read_text()
    assert "hidden" not in asked.stdout + asked.stderr


def test_real_docker_client_is_asked_by_the_script(host: Host, docker_host: str) -> None:
    host.use_docker()
    host.environ |= {"PLATFORM_RUNTIME_ENGINE": shutil.which("docker") or "docker", "DOCKER_HOST": docker_host}
    told = host.run()
    assert told.codes("FAIL", "warn") == {"image_missing"}
    assert told.detail("container_mode") == "vault"
