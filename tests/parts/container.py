"""The image, built for the tests with podman, and the service out of it as the compose files start it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tests.parts import ports
from tests.parts.eventually import eventually
from tests.parts.keys import Key
from tests.parts.processes import family
from tests.parts.service import ROOT, STANDARD_POLICY, Service

BASE_IMAGE: Final = "localhost/debian:bookworm"
BASE_FILE: Final = ROOT / "overlays" / "safe-session.yaml"
OVERLAY_FILE: Final = ROOT / "overlays" / "safe-session-local-ca.yaml"
API: Final = "safe-session-api"
FOLDER_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR"
KEEPER_ID, API_ID, NOTICES_ID = 8221, 8222, 8223  # as the Containerfile has them

# For hosts without CAP_SYS_RESOURCE and with cgroup v1, see runbooks/install/container.md; on others it changes nothing
# that is tested.
CONTAINERS_CONF: Final = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=2048:2048"]
netns = "host"
[engine]
runtime = "runc"
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


class ContainerEngine:
    """A container engine and its compose command, run with `environ`; `image` is the one that the tests use."""

    program: str
    compose_command: tuple[str, ...]
    joint: str  # between project, service and number in the name that compose gives a container
    at_once: tuple[str, ...] = ()  # options of `rm`

    def __init__(self, image: str, settings: Mapping[str, str]) -> None:
        """`settings` are the variables that steer it, added to those of the tests."""
        self.image = image
        self.settings = dict(settings)
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PLATFORM_RUNTIME_")}
        self.environ = {**ours, **settings}

    def run(self, *argv: str, environ: Mapping[str, str] | None = None, timeout: float = 100) -> Ended:
        """Runs a command with this engine's configuration."""
        done = subprocess.run(
            argv,
            env=self.environ | dict(environ or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def control(self, *argv: str, timeout: float = 100) -> str:
        """What the engine prints; raises with what it says if it fails."""
        done = self.run(self.program, *argv, timeout=timeout)
        if done.status != 0:
            raise RuntimeError(f"{self.program} {' '.join(argv)}: {done.status}\n{done.out}{done.err}")
        return done.out

    def compose(self, files: Sequence[Path], *argv: str, environ: Mapping[str, str] | None = None) -> Ended:
        """The compose command with these files."""
        named = [part for file in files for part in ("-f", str(file))]
        return self.run(*self.compose_command, *named, *argv, environ=environ)

    def remove_project(self, project: str) -> None:
        """Removes the containers and the ledger of a compose project."""
        label = f"label=com.docker.compose.project={project}"
        for _ in range(3):  # one that is just being started again by its restart policy may slip through
            if not (left := self.control("ps", "--all", "--quiet", "--filter", label).split()):
                break
            self.run(self.program, "rm", "--force", *self.at_once, *left)
        self.run(self.program, "volume", "rm", "--force", f"{project}_ledger")


class Engine(ContainerEngine):
    """podman and podman-compose with a configuration of their own in `folder`; `image` is built once."""

    program = "podman"
    compose_command = (str(Path(sys.executable).with_name("podman-compose")),)
    joint = "_"
    at_once = ("--time", "1", "--ignore")

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        configuration = folder / "containers.conf"
        configuration.write_text(CONTAINERS_CONF)
        super().__init__(f"localhost/signer:test-{os.getpid()}", {"CONTAINERS_CONF": str(configuration)})
        self.built = ""

    def podman(self, *argv: str) -> str:
        """What podman prints; raises with what it says if it fails."""
        return self.control(*argv)

    def remove_project(self, project: str) -> None:
        """Removes its pod, too."""
        super().remove_project(project)
        self.run("podman", "pod", "rm", "--force", "--ignore", f"pod_{project}")

    def make_base(self) -> str:
        """Makes the image to build on, if it is not there; why it cannot, else nothing."""
        done = self.run(str(ROOT / "scripts" / "container" / "make-base"), BASE_IMAGE, timeout=500)
        return "" if done.status == 0 else done.err.strip().splitlines()[-1]

    def build(self) -> None:
        """Builds the image on `BASE_IMAGE`; raises with what the build said."""
        script = str(ROOT / "scripts" / "container" / "build")
        with (Path(tempfile.gettempdir()) / "signer-test-build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the second of two workers finds the first one's steps done
            done = self.run(script, self.image, environ={"BASE": BASE_IMAGE}, timeout=500)
        if done.status != 0:
            raise RuntimeError(done.err)
        self.built = done.out
        # Kept when this run's own name goes, so that the next build finds its steps.
        self.podman("tag", self.image, "localhost/signer:test")

    def forget(self) -> None:
        """Takes this run's name from the image, and ends what earlier builds left behind a day ago."""
        self.run("podman", "rmi", self.image)
        ours, old = "label=org.opencontainers.image.title=signer", "until=24h"
        self.run("podman", "image", "prune", "--force", "--filter", ours, "--filter", old)

    def in_image(self, *argv: str) -> str:
        """What a command in a fresh container of the image prints.

        podman 4.3 now and then loses all output of a container that ends at once, on a busy machine, so a last line
        says that the output is there.
        """
        for _ in range(3):
            whole = ("--entrypoint", "/bin/sh", self.image, "-c", '"$@" && echo whole', "sh", *argv)
            printed = self.podman("run", "--rm", *whole)
            if printed.endswith("whole\n"):
                return printed.removesuffix("whole\n")
        raise AssertionError(f"the output of {argv} is lost each time")

    def facts(self, image: str) -> dict[str, Any]:
        """What `podman image inspect` says."""
        found: dict[str, Any] = json.loads(self.podman("image", "inspect", image))[0]
        return found


class Contained(Service):
    """The service in a container, from the base file alone (Vault signs) or with the overlay (`local`).

    `start` and `stop` are compose's `up` and the engine's `stop`; the ledger stays in its volume until `remove`.
    """

    def __init__(
        self, engine: ContainerEngine, folder: Path, ca: Key, *, local: bool, vault: tuple[str, str, str] | None = None
    ) -> None:
        """`vault` is the address, the mount and a token of a real one."""
        super().__init__(folder, ca)
        self.engine = engine
        self.files: tuple[Path, ...] = (BASE_FILE, OVERLAY_FILE) if local else (BASE_FILE,)
        self.project = f"test-{os.getpid()}-{self.port}"
        # In a folder of its own, which is mounted: beside it lie the policy and the tests' tokens.
        alone = folder / "ca-key" / "ca"
        alone.parent.mkdir(mode=0o700)
        self.key_file = self.key_file.rename(alone)
        self.policy_file = folder / "policy" / "policy.toml"
        self.policy_file.parent.mkdir(mode=0o755)
        self.write_policy(STANDARD_POLICY)
        self.policy_file.chmod(0o644)
        address, mount, token = vault or ("http://127.0.0.1:9", "ssh", "unused")
        self.token_path = folder / "vault" / "token"
        self.token_path.parent.mkdir(mode=0o755)
        self.token_path.write_text(token)
        self.token_path.chmod(0o400)
        os.chown(self.token_path, KEEPER_ID, KEEPER_ID)
        self.variables = {
            "PLATFORM_RUNTIME_SAFE_SESSION_IMAGE": engine.image,
            "PLATFORM_RUNTIME_SAFE_SESSION_LISTEN": f"{ports.LOOPBACK}:{self.port}",
            "PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR": str(self.policy_file.parent),
            "PLATFORM_RUNTIME_SAFE_SESSION_VAULT_ADDR": address,
            "PLATFORM_RUNTIME_SAFE_SESSION_VAULT_MOUNT": mount,
            "PLATFORM_RUNTIME_SAFE_SESSION_VAULT_DIR": str(self.token_path.parent),
            **({FOLDER_VARIABLE: str(self.key_file.parent)} if local else {}),
        }

    @property
    def name(self) -> str:
        return self.engine.joint.join((self.project, API, "1"))

    def compose(self, *argv: str) -> Ended:
        return self.engine.compose(self.files, "-p", self.project, *argv, environ=self.variables)

    def start(self) -> Contained:
        """Returns when /readyz says yes."""
        done = self.compose("up", "-d")
        if done.status != 0:
            raise RuntimeError(f"compose up: {done.status}\n{done.out}{done.err}")
        try:
            eventually(self.is_ready, "the container is ready")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log()[-2000:]}") from None
        return self

    def __enter__(self) -> Contained:
        try:
            return self.start()
        except BaseException:  # a container that would be started again and again
            self.remove()
            raise

    def stop(self) -> int:
        """SIGTERM, after 5 seconds SIGKILL; the exit status, which is 137 then."""
        self.engine.control("stop", "--time", "5", self.name)
        return int(self.inspect()["State"]["ExitCode"])

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Ends it and forgets its ledger."""
        self.compose("down", "--volumes", "--timeout", "1")

    def inspect(self) -> dict[str, Any]:
        """What the engine's `inspect` says of the container."""
        found: dict[str, Any] = json.loads(self.engine.control("container", "inspect", self.name))[0]
        return found

    def inside(self, *argv: str, user: str = "root", almighty: bool = False) -> Ended:
        """A command in the running container; `almighty` with all the powers that an engine can give."""
        powers = ["--privileged"] if almighty else []
        return self.engine.run(self.engine.program, "exec", *powers, "--user", user, self.name, *argv)

    def log(self) -> str:
        done = self.engine.run(self.engine.program, "logs", self.name)
        return done.out + done.err

    def processes(self) -> dict[int, Inhabitant]:
        """All processes of the container, by their number in there, as this host sees them.

        One that ends while they are looked at is left out.
        """
        found = {}
        top = self.inspect()["State"]["Pid"]
        for pid in family(top):
            inhabitant = Inhabitant(pid)
            with suppress(FileNotFoundError, ProcessLookupError):
                inhabitant.read()
                found[inhabitant.number] = inhabitant
        return found

    def keeper(self) -> Inhabitant:
        """The keeper's process."""
        found = {one.pid: one for one in self.processes().values() if " -m signer keeper" in one.command}
        # A child that the keeper starts has the keeper's command line until it has become another program.
        (keeper,) = [one for one in found.values() if int(one.status["PPid"][0]) not in found]
        return keeper


class Inhabitant:
    """A process in a container; `pid` is its number on this host."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def read(self) -> None:
        """Keeps what changes no more; raises `FileNotFoundError` or `ProcessLookupError` if the process has ended."""
        _ = self.status, self.command

    @cached_property
    def status(self) -> dict[str, list[str]]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}

    @property
    def number(self) -> int:
        """Its number in the container."""
        return int(self.status["NSpid"][-1])

    @property
    def uid(self) -> int:
        return int(self.status["Uid"][1])

    @cached_property
    def command(self) -> str:
        return Path(f"/proc/{self.pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()

    @cached_property
    def environment(self) -> str:
        return Path(f"/proc/{self.pid}/environ").read_bytes().decode()
