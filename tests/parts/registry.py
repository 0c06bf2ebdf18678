"""A registry of container images on loopback: Debian's docker-registry, without TLS, with what it keeps in a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from tests.parts import ports
from tests.parts.container import Engine

_CONFIGURATION: Final = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "{place}"}}
"""
_INSECURE: Final = """\
[[registry]]
location = "{place}"
insecure = true
"""


class Registry:
    """Use as a context manager. `place` is its host and port, `environ` lets podman ask it without TLS."""

    def __init__(self, folder: Path) -> None:
        self.place = f"{ports.LOOPBACK}:{ports.free_port()}"
        self.data = folder / "data"
        self._log = folder / "log"
        self._configuration = folder / "config.yml"
        self._configuration.write_text(_CONFIGURATION.format(folder=self.data, place=self.place))
        known = folder / "registries.conf"
        known.write_text(_INSECURE.format(place=self.place))
        self.environ = {"CONTAINERS_REGISTRIES_CONF": str(known)}

    def __enter__(self) -> Registry:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", self._configuration], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        port = int(self.place.rpartition(":")[2])
        ports.wait_until(lambda: ports.accepts(port), self._process, self._log.read_text)
        return self

    def __exit__(self, *exc_info: object) -> None:
        ports.stop(self._process)

    def push(self, engine: Engine, image: str, name: str) -> str:
        """Gives it an image of `engine` under `name`, such as `debian:bookworm`; the digest of its manifest there."""
        told = self.data.with_name("digest")
        done = engine.run(
            "podman", "push", "--quiet", "--digestfile", str(told), image, f"{self.place}/{name}", environ=self.environ
        )
        if done.status != 0:
            raise RuntimeError(done.err)
        return told.read_text()

    def manifest(self, digest: str) -> Path:
        """The file with the manifest of that digest."""
        number = digest.removeprefix("sha256:")
        return self.data / "docker" / "registry" / "v2" / "blobs" / "sha256" / number[:2] / number / "data"
