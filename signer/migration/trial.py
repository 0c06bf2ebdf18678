"""A trial of the service: same image and configuration, isolated from the running service, removed afterwards.

It tests the local CA before anything changes. Its project has a fixed name, so the next trial finds and removes what a
killed one left. The container holds the real CA key, so a separate guard process removes it after a time limit, even if
this process is killed.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from signer.migration.compose import ASK_WITHIN, PROJECT_LABEL, Compose, ComposeFailed, ContainerState, shown
from signer.migration.config import ComposeFacts
from signer.subprocesses import CommandResult

LISTEN: Final = "PLATFORM_RUNTIME_SAFE_SESSION_LISTEN"
KEEPER: Final = "signer-keeper"  # the user in the image that may read the ledger; root without capabilities may not
TRIAL_WITHIN: Final = 45.0  # seconds; a busy host needs as long, and nothing pauses meanwhile
LIVES: Final = 120  # seconds until the guard removes the container
_LOOK_EVERY: Final = 0.05
# Repeated, because an engine that is starting or stopping the container refuses.
_GUARD: Final = 'sleep "$1"; shift; for n in 1 2 3 4 5 6 7 8 9 10; do "$@" && exit; sleep 2; done'
_MAX_HEALTH: Final = 65536  # bytes


@dataclass(frozen=True, slots=True)
class Trial:
    """A running trial: address, answer of `/readyz`, and container."""

    address: str
    health: Mapping[str, Any]
    container: ContainerState
    _compose: Compose

    def export_ledger(self) -> str:
        """Every event of the trial's own ledger, as JSON lines; the ledger is removed with the trial.

        The trial signs with the real CA and no other ledger records these certificates: keep the export as evidence.
        """
        argv = (self._compose.facts.engine, "exec", "--user", KEEPER, self.container.id, "signer", "ledger", "export")
        return self._compose.ask(argv, "the trial's ledger cannot be read").out


def trial_project(facts: ComposeFacts) -> str:
    """The compose project of the trials."""
    return f"{facts.project}-trial"


def trial_lines(facts: ComposeFacts, with_overlay: bool = True) -> list[list[str]]:
    """The commands of `trial`, for a plan; the address is chosen at run time."""
    apart = Compose(_facts_on_trial(facts, ""), {})
    return [
        _create_line(apart, with_overlay),
        [facts.engine, "start", f"{trial_project(facts)}…"],
        [facts.engine, "rm", "--force", f"{trial_project(facts)}…"],
    ]


@contextmanager
def trial(
    facts: ComposeFacts,
    with_overlay: bool = True,
    *,
    mode: str = "local",
    image: str = "",
    within: float = TRIAL_WITHIN,
    lives: int = LIVES,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Trial]:
    """The service with its own project, port and ledger, ready in `mode` while the block runs.

    With the overlay its container gets the CA key, so it is started only if it is what the files, and `image` of the
    plan, say.

    Removes what an earlier trial left first, and this trial at the end. Raises `ComposeFailed` (`container_differs`,
    `trial_failed`, `trial_not_apart`, `trial_not_ready`, `trial_not_ours`, `trial_not_removed` and those of
    `Compose`).
    """
    deadline = time.monotonic() + within
    address = f"127.0.0.1:{_free_port()}"
    apart = Compose(_facts_on_trial(facts, address), environ)
    remove_trial(apart)
    try:
        ended = apart.run(_create_line(apart, with_overlay), max(1.0, deadline - time.monotonic()))
        found = apart.running() if ended.status == 0 else None
        if found is None:
            raise ComposeFailed(
                "trial_failed",
                "compose could not create a container for the trial",
                "see the output above, fix it, and retry",
                shown(ended),
            )
        _check_apart(apart, found)
        if with_overlay:
            apart.check_container(found.id, with_overlay=True, image=image)
        with _guarded(apart, found.id, lives):
            apart.ask((facts.engine, "start", found.id), "the trial's container does not start")
            _wait_until_ready(apart, address, mode, deadline)
            _check_listener(apart, found.id, address)
            health = _wait_until_ready(apart, address, mode, deadline)  # as the first answer was not proved to be ours
            yield Trial(f"http://{address}", health, found, apart)
    except BaseException:
        remove_trial(apart)
        raise


@contextmanager
def _guarded(apart: Compose, container: str, lives: int) -> Iterator[None]:
    """Removes the trial after the block; a guard process does it after `lives` seconds if this process cannot."""
    words = ["sh", str(lives), apart.facts.engine, "rm", "--force", *_at_once(apart), container]
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, *words],
        env=apart.unmarked_environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    try:
        yield
    finally:
        remove_trial(apart)  # if a second Ctrl-C interrupts this, the guard still runs
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def _at_once(apart: Compose) -> tuple[str, ...]:
    return ("--time", "0") if Path(apart.facts.engine).name == "podman" else ()


def remove_trial(apart: Compose) -> None:
    """Removes every container and volume of the trial's project; raises `ComposeFailed`.

    Selects by label, not by compose's `down`, which selects by name: with `container_name` in the compose file that
    would be the running service.
    """
    apart.wait_for_leftovers(time.monotonic() + ASK_WITHIN)
    engine, label = apart.facts.engine, f"label={PROJECT_LABEL}={apart.facts.project}"
    is_podman = Path(engine).name == "podman"
    done: list[CommandResult] = []
    if found := apart.words((engine, "ps", "--all", "--no-trunc", "--quiet", "--filter", label)):
        done.append(apart.run((engine, "rm", "--force", *_at_once(apart), *found)))
    if is_podman:  # podman-compose creates a pod, which has no label
        done.append(apart.run((engine, "pod", "rm", "--force", "--ignore", f"pod_{apart.facts.project}")))
    if found := apart.words((engine, "volume", "ls", "--quiet", "--filter", label)):
        done.append(apart.run((engine, "volume", "rm", *found)))
    for ended in done:
        if ended.status != 0:
            raise ComposeFailed(
                "trial_not_removed",
                "the trial's containers or volumes could not be removed",
                f"remove what `{engine} ps --all --filter {label}` shows, and its volume",
                shown(ended),
            )


def _facts_on_trial(facts: ComposeFacts, address: str) -> ComposeFacts:
    """The platform's facts with another project name and address."""
    return replace(facts, project=trial_project(facts), environment={**facts.environment, LISTEN: address})


def _create_line(apart: Compose, with_overlay: bool) -> list[str]:
    return apart.command_line(with_overlay, "up", "--no-start", "--no-deps", "--no-build", apart.facts.service)


def _check_apart(apart: Compose, container: ContainerState) -> None:
    """Raises `ComposeFailed` if the trial can write to a mount that is not its own, such as a shared named volume."""
    argv = (apart.facts.engine, "inspect", "--type", "container", container.id)
    for mount in apart.ask_json(argv)[0].get("Mounts") or ():
        is_own = mount.get("Type") == "volume" and str(mount.get("Name")).startswith(f"{apart.facts.project}_")
        if mount.get("RW") and mount.get("Type") != "tmpfs" and not is_own:
            raise ComposeFailed(
                "trial_not_apart",
                f"the trial could write to the mount {mount.get('Destination')}, which is not its own",
                "remove the volume's `name` in the compose file",
            )


def _wait_until_ready(apart: Compose, address: str, mode: str, deadline: float) -> Mapping[str, Any]:
    """The body of `/readyz`; raises `ComposeFailed`, at once if the container has ended."""
    said: Mapping[str, Any] = {}
    looked = time.monotonic()
    while time.monotonic() < deadline:
        said = _ask_ready(address)
        if said.get("ready") is True:
            if said.get("mode") == mode:
                return said
            break
        if time.monotonic() - looked > 1:
            state, looked = apart.running(), time.monotonic()
            if state is None or not state.is_running:
                break
        time.sleep(_LOOK_EVERY)
    why = f"its mode is {said['mode']!s:.20}" if "mode" in said else f"{said.get('detail', 'no answer')!s:.200}"
    state = apart.running()
    log = shown(apart.run((apart.facts.engine, "logs", "--tail", "40", state.id))) if state else ""
    text = f"the trial service is not ready in mode {mode}: {why}"
    raise ComposeFailed("trial_not_ready", text, "see the log above", log)


def _ask_ready(address: str) -> Mapping[str, Any]:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=2)
    try:
        connection.request("GET", "/readyz")
        said = json.loads(connection.getresponse().read(_MAX_HEALTH))
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return said if isinstance(said, dict) else {}


def _check_listener(apart: Compose, container: str, address: str) -> None:
    """Raises `ComposeFailed` unless only processes of the container listen at the address.

    The port is free until the container binds it: another local user who does so first would get the operator's token.
    """
    state = apart.ask_json((apart.facts.engine, "inspect", "--type", "container", container))[0].get("State") or {}
    pid = state.get("Pid")
    if type(pid) is not int or pid < 2 or not listens_alone(int(address.rpartition(":")[2]), pid):
        raise ComposeFailed(
            "trial_not_ours",
            f"it is not proved that the trial itself listens at {address}, so it is sent no token",
            "see `ss -ltnp`, then retry",
        )


def listens_alone(port: int, pid: int) -> bool:
    """True if sockets listen on this port of IPv4, and each one belongs to `pid` or one of its descendants."""
    inodes = set(_listening(port))
    held = {inode for one in _descendants(pid) for inode in _sockets_of(one)}
    return bool(inodes) and inodes <= held


def _listening(port: int) -> Iterator[str]:
    """Inodes of the sockets that listen on a port, from proc_net_tcp(5); `tcp6` has those that also take IPv4."""
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, ValueError, IndexError):  # it has ended
                parents[int(folder.name)] = int(
                    (folder / "stat").read_text(errors="replace").rpartition(") ")[2].split()[1]
                )
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def _sockets_of(pid: int) -> Iterator[str]:
    """Inodes of a process's sockets; none of a process that has ended or may not be read."""
    with suppress(OSError):
        for entry in Path("/proc", str(pid), "fd").iterdir():
            with suppress(OSError):
                target = str(entry.readlink())
                if target.startswith("socket:["):
                    yield target[8:-1]


def _free_port() -> int:
    """A free loopback port. If another process takes it before the service binds it, the trial is refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
