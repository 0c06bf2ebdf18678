"""A compose command and an engine that are shell scripts: the test writes what they do, and reads what they got."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from signer.migration.config import ComposeFacts

CONTAINER: Final = "c" * 64
IMAGE: Final = "a" * 64


def inspected(
    *, mode: str = "vault", state: str = "running", prefix: str = "", volume: str = "platform-trial_ledger"
) -> str:
    """What `inspect` of one container prints; docker has a `prefix` before the image's number."""
    raw: dict[str, Any] = {
        "Id": CONTAINER,
        "Image": prefix + IMAGE,
        "Path": "signer",
        "Args": ["serve"],
        "Config": {"Env": ["PATH=/usr/bin", f"SIGNER_MODE={mode}", "SOME_TOKEN=marker-of-a-secret"]},
        "BoundingCaps": [],
        "HostConfig": {"Privileged": False, "ReadonlyRootfs": True, "SecurityOpt": ["no-new-privileges"]},
        "State": {"Status": state, "StartedAt": "2026-11-22T16:40:16.253332675Z"},
        "Mounts": [{"Type": "volume", "Name": volume, "Destination": "/var/lib/signer", "RW": True}],
    }
    return json.dumps([raw])


IMAGE_FACTS: Final = json.dumps(
    [{"Id": f"sha256:{IMAGE}", "Config": {"Entrypoint": ["signer"], "Cmd": ["serve"], "Env": ["PATH=/usr/bin"]}}]
)
# What compose merges: a service whose container `inspected` is.
MERGED: Final = """\
services:
  safe-session-api:
    image: signer:1
    read_only: true
    security_opt: ["no-new-privileges:true"]
    environment: {SIGNER_MODE: vault, SOME_TOKEN: marker-of-a-secret}
    volumes: [ledger:/var/lib/signer]
volumes: {ledger: {}}
"""


class FakePlatform:
    """Writes the scripts into `folder`. Calls are one line each in `calls`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = ComposeFacts(
            command=(str(folder / "compose"),),
            engine=str(folder / "podman"),
            project="platform",
            base=folder / "base.yaml",
            overlay=folder / "overlay.yaml",
            service="safe-session-api",
            environment={"PLATFORM_RUNTIME_SAFE_SESSION_IMAGE": "signer:1"},
        )
        (folder / "merged.yaml").write_text(MERGED)
        self.compose(f'if [ "$verb" = config ]; then cat {folder}/merged.yaml; fi')
        self.engine()

    def compose(self, body: str) -> None:
        """What compose does; `$verb` is its verb."""
        self._write(
            "compose", f"verb=; for word; do case $word in up|config|version) verb=$word;; esac; done\n{body}\n"
        )

    def engine(self, *, ps: str = CONTAINER, inspect: str = inspected(), image: str = IMAGE_FACTS) -> None:
        """What the engine prints for each of its verbs."""
        for name, text in (("ps", ps), ("inspect", inspect), ("image", image)):
            (self.folder / f"{name}.out").write_text(text)
        self._write("podman", f'case $1 in ps|inspect|image) cat "{self.folder}/$1.out";; esac\n')

    def _write(self, name: str, body: str) -> None:
        script = self.folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.folder}/calls"\n{body}')
        script.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """What was run so far."""
        return (self.folder / "calls").read_text().splitlines()
