"""docker with a daemon of the tests' own, and docker compose v2: the compose files' other engine.

The daemon has data, socket and containerd below one folder, a tmpfs, and touches neither firewall nor bridges of the
host, so it runs beside another one. Its containers have the host's network alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.parts import missing, ports
from tests.parts.container import ContainerEngine, Engine

_STARTS_WITHIN: Final = 60.0  # seconds


class Docker(ContainerEngine):
    """Use as a context manager; `image` is that of `podman`, loaded once."""

    program = "docker"
    compose_command = ("docker", "compose")
    joint = "-"

    def __init__(self, podman: Engine) -> None:
        # Not below pytest's folder: the name of a socket has 107 bytes at most. On a disk it takes ten times as long.
        self.folder = Path(tempfile.mkdtemp(prefix="dk-"))
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g,mode=700", "none", self.folder], capture_output=True)
        self._podman = podman
        self._socket = self.folder / "docker.sock"
        configuration = self.folder / "configuration"
        super().__init__(podman.image, {"DOCKER_HOST": f"unix://{self._socket}", "DOCKER_CONFIG": str(configuration)})
        plugins = configuration / "cli-plugins"
        plugins.mkdir(parents=True)
        (plugins / "docker-compose").symlink_to(missing.DOCKER_COMPOSE)

    def __enter__(self) -> Docker:
        """Returns when the daemon answers and has the image."""
        with (self.folder / "log").open("ab") as log:
            self._daemon = subprocess.Popen(
                ["dockerd", "--host", f"unix://{self._socket}", "--data-root", self.folder / "data",
                 "--exec-root", self.folder / "exec", "--pidfile", self.folder / "pid",
                 "--iptables=false", "--bridge=none"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            ports.wait_until(self._answers, self._daemon, self.log, seconds=_STARTS_WITHIN)
            self._load()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Ends the daemon with all its containers, and removes what it kept."""
        if self._daemon.poll() is None and (left := self.run("docker", "ps", "--all", "--quiet").out.split()):
            self.run("docker", "rm", "--force", *left)
        ports.stop(self._daemon)
        # A namespace that the daemon leaves mounted, and the folder with all that is in it.
        for place in (self.folder / "exec" / "netns" / "default", self.folder):
            subprocess.run(["umount", "--lazy", place], capture_output=True)
        shutil.rmtree(self.folder)

    def log(self) -> str:
        """What the daemon said."""
        return (self.folder / "log").read_text(errors="replace")

    def change_image(self, name: str) -> None:
        """Gives `name` to an image that differs from `image` in a label alone, as a new build does."""
        recipe = self.folder / "image" / "Dockerfile"
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(f"FROM {self.image}\nLABEL changed={os.urandom(4).hex()}\n")
        self.control("build", "--quiet", "--tag", name, str(recipe.parent))

    def _answers(self) -> bool:
        return self._socket.exists() and self.run("docker", "info").status == 0

    def _load(self) -> None:
        archive = self.folder / "image.tar"
        self._podman.podman("save", "--quiet", "--format", "docker-archive", "--output", str(archive), self.image)
        self.control("load", "--quiet", "--input", str(archive))
        archive.unlink()
