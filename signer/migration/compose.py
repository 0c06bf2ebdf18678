"""The service under compose and the container engine: its container, and starting it with another configuration.

Uses only features common to podman-compose (1.0 and later) and docker compose. Compose may fail with status 0, so after
each `up` the engine is queried. Containers are found by the labels that both tools write. The output of commands is
kept for the evidence, without the values of environment variables.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from signer import subprocesses
from signer.errors import SignerError
from signer.migration.compose_files import parse_compose, services_of
from signer.migration.config import ComposeFacts
from signer.migration.container_check import Expected, container_differences, expected_mounts
from signer.subprocesses import CommandResult, NoSuchCommand
from signer.units import plain

UP_WITHIN: Final = 40.0  # seconds; twice the service's `stop_grace_period` and a slow start
ASK_WITHIN: Final = 20.0
KEPT_WORDS: Final = 8192  # characters of a command's output, for the evidence
_MARK: Final = "SIGNER_COMPOSE_PROJECT"  # set in each command's environment, to find commands that outlive this process
_LOOK_EVERY: Final = 0.03  # seconds
_LEFTOVERS_END_WITHIN: Final = 15.0  # seconds
PROJECT_LABEL: Final = "com.docker.compose.project"
SERVICE_LABEL: Final = "com.docker.compose.service"
_FILES_LABEL: Final = "com.docker.compose.project.config_files"
ENGINES_OWN: Final = (
    "PATH", "HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME",
    "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "CONTAINERS_REGISTRIES_CONF", "CONTAINER_HOST",
    "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY", "DOCKER_API_VERSION",
)  # fmt: skip
_VALUE: Final = re.compile(r"\s(?:-e|--env)[ =].*", re.DOTALL)


class ComposeFailed(SignerError):
    """Compose or the engine failed, or its result is not the expected one; `said` is its output without secrets."""

    def __init__(self, code: str, text: str, hint: str = "", said: str = "") -> None:
        super().__init__(code, text, hint, {"said": said} if said else None)
        self.said = said


@dataclass(frozen=True, slots=True)
class ContainerState:
    """The service's container. `state` is the engine's word (`running`, `exited`, …), `mode` its SIGNER_MODE.

    Identifiers are bare hex, 64 digits. `started` is RFC 3339 as the engine writes it. `health` is the result of the
    container's own check (`healthy`, `starting`, …), empty without one. `files` are the compose files that it was made
    of, as compose labelled it. `pid` is its first process on this host, 0 if it does not run.
    """

    id: str
    image: str
    mode: str
    state: str
    started: str
    health: str = ""
    files: tuple[str, ...] = ()
    pid: int = 0

    @property
    def is_running(self) -> bool:
        return self.state == "running"


class Compose:
    """One service of one compose project. Only `running` may be called by several threads at once."""

    def __init__(self, facts: ComposeFacts, environ: Mapping[str, str] = os.environ, more: Sequence[Path] = ()) -> None:
        """Only PATH, HOME and the engine's own settings are taken from `environ`; `more` are further compose files."""
        self.facts = facts
        self._more = tuple(more)
        passed = {name: environ[name] for name in ENGINES_OWN if name in environ}
        self._environment = {**passed, **facts.environment, _MARK: facts.project}

    def command_line(self, with_overlay: bool, *words: str) -> list[str]:
        files = (self.facts.base, self.facts.overlay) if with_overlay else (self.facts.base,)
        named = [part for file in (*files, *self._more) for part in ("-f", str(file))]
        return [*self.facts.command, *named, "-p", self.facts.project, *words]

    def up_line(self, with_overlay: bool) -> list[str]:
        """The command line of `up`.

        No `--wait`: podman-compose before 1.3 lacks it, and it waits for a health check that runs seconds after the
        service is ready. No `--build`, no other service.
        """
        return self.command_line(with_overlay, "up", "--detach", "--no-deps", "--no-build", self.facts.service)

    def up(self, with_overlay: bool, *, within: float = UP_WITHIN) -> CommandResult:
        """Brings the service to the base file, or to base and overlay; returns when its container runs.

        A container with that configuration is kept; any other is replaced. Repeatable after any failure or
        crash: waits for compose commands that outlived their process. Raises `ComposeFailed` (`compose_slow`,
        `compose_failed`, `compose_not_running`) or `SignerError`.
        """
        deadline = time.monotonic() + within
        self.wait_for_leftovers(deadline)
        argv = self.up_line(with_overlay)
        ended = self.run(argv, max(1.0, deadline - time.monotonic()))
        if ended.status and self._remove_stuck():
            ended = self.run(argv, max(1.0, deadline - time.monotonic()))
        if ended.status is None:
            raise ComposeFailed(
                "compose_slow",
                f"compose did not end within {within:g} s",
                f"see `{self.facts.engine} ps` and what blocks it, then retry",
                shown(ended),
            )
        if ended.status != 0:
            raise ComposeFailed(
                "compose_failed",
                f"compose ended with status {ended.status}",
                "see the output above, fix it, and retry",
                shown(ended),
            )
        found = self.running()
        if found is None or not found.is_running:
            raise ComposeFailed(
                "compose_not_running",
                f"compose reports success, but the container {'is ' + found.state if found else 'does not exist'}",
                f"see `{self.facts.engine} logs` of it",
                shown(ended),
            )
        return ended

    def _remove_stuck(self) -> bool:
        """Removes a container that does not run and that compose could not start; False if there is none.

        An engine that is killed during a stop can leave a container that neither starts nor is replaced. Its volumes
        are kept.
        """
        found = self.running()
        if found is None or found.is_running:
            return False
        return self.run((self.facts.engine, "rm", "--force", found.id)).status == 0

    def config_digest(self, with_overlay: bool) -> str:
        """`sha256:` and the hash of the merged configuration; raises `ComposeFailed`."""
        return "sha256:" + sha256(self._merged(with_overlay).encode()).hexdigest()

    def _merged(self, with_overlay: bool) -> str:
        ended = self.ask(self.command_line(with_overlay, "config"), "the compose files cannot be merged")
        if not ended.out.strip():
            raise ComposeFailed("compose_failed", "compose prints no configuration", "run compose config by hand")
        return ended.out

    def running(self) -> ContainerState | None:
        """The service's container, running or not; None if there is none. Raises `ComposeFailed`."""
        engine, project, service = self.facts.engine, self.facts.project, self.facts.service
        labels = (f"label={PROJECT_LABEL}={project}", "--filter", f"label={SERVICE_LABEL}={service}")
        found = self.words((engine, "ps", "--all", "--no-trunc", "--quiet", "--filter", *labels))
        if len(found) > 1:
            raise ComposeFailed(
                "compose_several_containers",
                f"service {service} has {len(found)} containers",
                "scale it to one and remove the others",
            )
        return _state(self.ask_json((engine, "inspect", "--type", "container", *found))[0]) if found else None

    def content(self, with_overlay: bool) -> dict[str, Any]:
        """The merged configuration, parsed; raises `ComposeFailed` or `BadFile`."""
        return parse_compose(self._merged(with_overlay), "the output of compose config")

    def image_id(self, with_overlay: bool = False) -> str:
        """The image that `up` would start, bare hex; raises `ComposeFailed`, also if the engine does not have it."""
        return _bare(str(self._image(self._service(self.content(with_overlay)))["Id"]))

    def _service(self, content: Mapping[str, Any]) -> dict[str, Any]:
        return services_of(content).get(self.facts.service, {})

    def _image(self, service: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's description of the image that a merged service names."""
        name = service.get("image")
        if not isinstance(name, str) or not name:
            raise ComposeFailed(
                "compose_image_unknown",
                f"the merged configuration names no image for {self.facts.service}",
                "set an image for the service",
            )
        found = self.ask_json((self.facts.engine, "image", "inspect", name), f"the engine has no image {name}")[0]
        if not isinstance(found.get("Id"), str) or not isinstance(found.get("Config"), dict):
            raise _not_understood(self.facts.engine)
        return found

    def container_differences(self, container: str, *, with_overlay: bool, image: str = "") -> list[str]:
        """What a container has otherwise than these files and their image say, one line each; raises `ComposeFailed`.

        `image` is the image that a plan names, bare hex; without it, the one that the files name now.
        """
        content = self.content(with_overlay)
        service = self._service(content)
        facts = self._image(service)
        expected = Expected(
            image_id=image or _bare(str(facts["Id"])),
            image=facts,
            service=service,
            mounts=expected_mounts(content, service, self.facts.project, str(self.facts.base.parent)),
        )
        raw = self.ask_json((self.facts.engine, "inspect", "--type", "container", container))[0]
        try:
            return container_differences(raw, expected)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise _not_understood(self.facts.engine) from None

    def check_container(self, container: str, *, with_overlay: bool, image: str = "") -> None:
        """Raises `ComposeFailed` if a container differs from these files and their image."""
        if found := self.container_differences(container, with_overlay=with_overlay, image=image):
            raise ComposeFailed(
                "container_differs",
                f"the container is not what the compose files say: {found[0]}"
                + (f", and {len(found) - 1} more" if len(found) > 1 else ""),
                "see what compose reads besides these files (extends, env_file, .env), then plan again",
                "\n".join(found),
            )

    def versions(self) -> dict[str, str]:
        """The versions of compose and engine, each on one line; `unknown` if not available."""
        found = {}
        for name, argv in (
            ("compose", [*self.facts.command, "version"]),
            ("engine", [self.facts.engine, "--version"]),
        ):
            ended = self.run(argv)
            lines = [line.strip() for line in ended.out.splitlines() if line.strip()]
            found[name] = "; ".join(lines)[:200] if ended.status == 0 and lines else "unknown"
        return found

    # --- queries -----------------------------------------------------------------------------------------------------

    def words(self, argv: Sequence[str]) -> list[str]:
        """The output of a command, split at blanks; raises `ComposeFailed`."""
        return self.ask(argv, "the engine does not answer").out.split()

    def ask_json(self, argv: Sequence[str], text: str = "the engine does not answer") -> list[dict[str, Any]]:
        """The JSON objects that a command prints, at least one; raises `ComposeFailed`, with `text` if it fails."""
        try:
            value = json.loads(self.ask(argv, text).out)
        except (ValueError, RecursionError):
            value = None
        if not (isinstance(value, list) and value and all(isinstance(one, dict) for one in value)):
            raise _not_understood(self.facts.engine)
        return value

    def ask(self, argv: Sequence[str], text: str) -> CommandResult:
        """The result of a read-only command; raises `ComposeFailed` with `text` unless it succeeds.

        On failure only stderr is kept: partial output of `inspect` or `config` contains values of variables.
        """
        ended = self.run(argv)
        said = shown(replace(ended, out=""))
        if ended.status is None:
            text = f"{Path(argv[0]).name} did not answer within {ASK_WITHIN:g} s"
            raise ComposeFailed("compose_slow", text, "see what blocks it, then retry", said)
        if ended.status != 0:
            raise ComposeFailed("compose_failed", text, "see the output above, fix it, and retry", said)
        if not ended.is_whole:
            raise _not_understood(Path(argv[0]).name)
        return ended

    def run(self, argv: Sequence[str], within: float = ASK_WITHIN) -> CommandResult:
        """Runs a command in compose's environment; raises `ComposeFailed` if it does not exist."""
        try:
            return subprocesses.run(argv, environment=self._environment, within=within)
        except NoSuchCommand as error:
            raise ComposeFailed("compose_missing", error.text, "fix [compose] in cutover.toml, or PATH") from None

    @property
    def unmarked_environment(self) -> dict[str, str]:
        """The environment of compose's commands, for a command that `wait_for_leftovers` ignores."""
        return {name: value for name, value in self._environment.items() if name != _MARK}

    def wait_for_leftovers(self, deadline: float) -> None:
        """Waits for commands on this project that outlived the process that started them.

        They do not stop when that process is killed, and two at once would undo each other. The wait is bounded: a
        hanging command must not prevent a repair.
        """
        deadline = min(deadline, time.monotonic() + _LEFTOVERS_END_WITHIN)
        while time.monotonic() < deadline and any(_marked(f"{_MARK}={self.facts.project}", self.facts.engine)):
            time.sleep(_LOOK_EVERY)


def _marked(mark: str, engine: str) -> Iterator[int]:
    """Running compose and engine commands of this user that carry the mark; not the monitors of containers, which
    inherit it. Anybody can start a process with any environment, also a set-user-ID program of root's."""
    wanted, us = f"\0{mark}\0".encode(), [str(os.geteuid())] * 4
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it has ended or belongs to another user
            if _users(folder) != us:
                continue
            if wanted not in b"\0" + (folder / "environ").read_bytes():
                continue
            # proc(5): "pid (name) state parent group session …"; a zombie has no environment and does not match
            name, _, rest = (folder / "stat").read_text(errors="replace").partition(" (")[2].rpartition(") ")
            is_first_of_session = rest.split()[3] == folder.name
            if name == Path(engine).name[:15] or (is_first_of_session and name != "conmon"):
                yield int(folder.name)


def _users(folder: Path) -> list[str]:
    """The real, effective, saved and file system uid of a process, by its folder in /proc (proc_pid_status(5))."""
    lines = (folder / "status").read_text(errors="replace").splitlines()
    return next((line.split()[1:] for line in lines if line.startswith("Uid:")), [])


def _state(raw: Mapping[str, Any]) -> ContainerState:
    """From `inspect`, podman's or docker's; of its environment, which may contain secrets, only the mode is read."""
    try:
        environment = dict(str(one).partition("=")[::2] for one in raw["Config"]["Env"] or ())
        labels, state = raw["Config"].get("Labels") or {}, raw["State"]
        return ContainerState(
            id=_bare(str(raw["Id"])),
            image=_bare(str(raw["Image"])),
            mode=environment.get("SIGNER_MODE", ""),
            state=str(state["Status"]),
            started=str(state["StartedAt"]),
            health=str((state.get("Health") or {}).get("Status") or ""),
            files=tuple(file for file in str(labels.get(_FILES_LABEL) or "").split(",") if file),
            pid=int(state.get("Pid") or 0),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _not_understood("the engine") from None


def _bare(identifier: str) -> str:
    return identifier.removeprefix("sha256:")


def _not_understood(what: str) -> ComposeFailed:
    return ComposeFailed(
        "compose_not_understood",
        f"the output of {what} has an unknown form",
        "compare its version with runbooks/preflight.md",
    )


def shown(ended: CommandResult) -> str:
    """The output of a command, both streams: bounded, printable, without values of environment variables.

    podman-compose prints commands with `-e NAME=VALUE`; each line is cut there.
    """
    lines = []
    for line in f"{ended.out}\n{ended.err}".splitlines():
        cut = _VALUE.sub(" …", plain(line, instead=" ").rstrip())
        if cut:
            lines.append(cut[:1000])
    text = "\n".join(lines)
    if len(text) <= KEPT_WORDS:
        return text
    return (
        f"{text[: KEPT_WORDS // 4]}\n… {len(text) - KEPT_WORDS} characters left out …\n{text[-KEPT_WORDS * 3 // 4 :]}"
    )
