"""A trial of the service: same image and configuration, isolated from the running service, removed afterwards.

It tests the local CA before anything changes. Its project has a fixed name, so the next trial finds and removes what a
killed one left. The container holds the real CA key, so a separate guard process removes it after a time limit, even if
this process is killed.

It listens on a unix socket alone, in a folder below /run that only this user, root, can enter: nobody else can listen
there, and nobody else reaches it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from signer.api_client import ApiClient, Readiness
from signer.errors import SignerError, write_hint
from signer.files import write_new
from signer.migration.compose import ASK_WITHIN, PROJECT_LABEL, Compose, ComposeFailed, ContainerState, shown
from signer.migration.config import ComposeFacts
from signer.subprocesses import CommandResult

SOCKET_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_SOCKET_DIR"
KEEPER: Final = "signer-keeper"  # the user in the image that may read the ledger; root without capabilities may not
TRIAL_WITHIN: Final = 45.0  # seconds; a busy host needs as long, and nothing pauses meanwhile
LIVES: Final = 120  # seconds until the guard removes the container
CALLER: Final = "127.0.0.1"  # the address of the trial's requests, as of a caller on this host
_FOLDERS: Final = Path("/run")  # only root can make a folder here
_INSIDE: Final = "/run/signer-trial"  # the folder, in the container
_LOOK_EVERY: Final = 0.05
# Repeated, because an engine that is starting or stopping the container refuses.
_GUARD: Final = (
    'sleep "$1"; folder=$2; shift 2; for n in 1 2 3 4 5 6 7 8 9 10; do "$@" && break; sleep 2; done;'
    ' rm -rf -- "$folder"'
)
# What compose merges into the files: the only address, and whose word on the caller's address is taken there.
_FILE: Final = """\
services:
  {service}:
    environment:
      SIGNER_LISTEN: unix:{inside}/api.sock
      SIGNER_TRUSTED_PROXIES: ""
      SIGNER_TRUSTED_PROXY_USERS: "0"
    volumes:
      - type: bind
        source: {folder}
        target: {inside}
        bind:
          create_host_path: false
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """A running trial: address, what `/readyz` answers, and container."""

    address: str
    health: Readiness
    container: ContainerState
    _compose: Compose

    def client(self, token_file: Path, ca_fingerprint: str) -> ApiClient:
        """A client with that token; raises `ComposeFailed` (`trial_not_ours`) if the trial has another CA.

        No token has been sent to it before.
        """
        if self.health.ca_fingerprint != ca_fingerprint:
            raise ComposeFailed(
                "trial_not_ours",
                f"the trial has the CA {self.health.ca_fingerprint or 'unknown':.60}, expected is {ca_fingerprint}",
                "compare the key file and the Vault that cutover.toml names with those of the compose files",
            )
        return ApiClient(self.address, token_file, forwarded_for=CALLER)

    def export_ledger(self) -> str:
        """Every event of the trial's own ledger, as JSON lines; the ledger is removed with the trial.

        The trial signs with the real CA and no other ledger records these certificates: keep the export as evidence.
        """
        argv = (self._compose.facts.engine, "exec", "--user", KEEPER, self.container.id, "signer", "ledger", "export")
        return self._compose.ask(argv, "the trial's ledger cannot be read").out


def trial_project(facts: ComposeFacts) -> str:
    return f"{facts.project}-trial"


def trial_lines(facts: ComposeFacts) -> list[list[str]]:
    """The commands of `trial`, for a plan; the name of the folder is chosen at run time."""
    tried = _facts_on_trial(facts)
    apart = Compose(tried, {}, (_FOLDERS / f"{_folder_prefix(tried)[:-1]}…" / "trial.yaml",))
    return [
        _create_line(apart, with_overlay=True),
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
    """The service with its own project, socket and ledger, ready in `mode` while the block runs.

    With the overlay its container gets the CA key, so it is started only if it is what the files, and `image` of the
    plan, say.

    Removes what an earlier trial left first, and this trial at the end. Raises `ComposeFailed` (`container_differs`,
    `trial_failed`, `trial_folder_unsafe`, `trial_not_apart`, `trial_not_ready`, `trial_not_removed` and those of
    `Compose`).
    """
    deadline = time.monotonic() + within
    tried = _facts_on_trial(facts)
    remove_trial(Compose(tried, environ))
    folder = _make_folder(tried)
    apart = Compose(_facts_on_trial(facts, folder), environ, (folder / "trial.yaml",))
    try:
        found = _create(apart, with_overlay, max(1.0, deadline - time.monotonic()))
        _check_apart(apart, found, folder)
        if with_overlay:
            apart.check_container(found.id, with_overlay=True, image=image)
        with _guarded(apart, found.id, folder, lives):
            apart.ask((facts.engine, "start", found.id), "the trial's container does not start")
            address = f"unix:{folder}/api.sock"
            yield Trial(address, _wait_until_ready(apart, address, mode, deadline), found, apart)
    except BaseException:
        remove_trial(apart)
        raise


def _create(apart: Compose, with_overlay: bool, within: float) -> ContainerState:
    """The trial's container, not started; raises `ComposeFailed` (`trial_failed`)."""
    ended = apart.run(_create_line(apart, with_overlay), within)
    found = apart.running() if ended.status == 0 else None
    if found is None:
        raise ComposeFailed(
            "trial_failed",
            "compose could not create a container for the trial",
            "see the output above, fix it, and retry",
            shown(ended),
        )
    return found


@contextmanager
def _guarded(apart: Compose, container: str, folder: Path, lives: int) -> Iterator[None]:
    """Removes the trial after the block; a guard process does it after `lives` seconds if this process cannot."""
    words = ["sh", str(lives), str(folder), apart.facts.engine, "rm", "--force", *_at_once(apart), container]
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
    """Removes every container, volume and folder of the trial's project; raises `ComposeFailed`.

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
    for folder in _left_folders(apart.facts):
        _remove_folder(folder)


def _folder_prefix(tried: ComposeFacts) -> str:
    return f"signer-{tried.project}."


def _make_folder(tried: ComposeFacts) -> Path:
    """A new folder, 0700, for the socket and for what compose merges; raises `ComposeFailed` (`trial_failed`)."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=_folder_prefix(tried), dir=_FOLDERS))
        text = _FILE.format(service=tried.service, folder=folder, inside=_INSIDE)
        write_new(folder / "trial.yaml", text.encode(), 0o600)
    except OSError as error:
        text = f"the folder of the trial's socket cannot be made in {_FOLDERS}: {error.strerror}"
        raise ComposeFailed("trial_failed", text, write_hint(error, str(_FOLDERS))) from None
    return folder


def _left_folders(tried: ComposeFacts) -> Iterator[Path]:
    """Where trials of this project have, or had, their sockets."""
    form = re.compile(re.escape(_folder_prefix(tried)) + "[a-z0-9_]{8}")
    yield from sorted(path for path in _FOLDERS.iterdir() if form.fullmatch(path.name))


def _remove_folder(folder: Path) -> None:
    """Removes a folder that `_make_folder` made; raises `ComposeFailed` for anything else in its place."""
    try:
        facts = folder.lstat()
        is_ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
        if not is_ours or stat.S_IMODE(facts.st_mode) != 0o700:
            raise ComposeFailed(
                "trial_folder_unsafe",
                f"{folder} is not a folder of this user with mode 0700, as a trial makes it",
                "find out who made it, and remove it",
            )
        shutil.rmtree(folder)
    except FileNotFoundError:
        return  # the guard of a trial that was killed was faster
    except OSError as error:
        text = f"the folder {folder} of the trial could not be removed: {error.strerror}"
        raise ComposeFailed("trial_not_removed", text, "remove it") from None


def _facts_on_trial(facts: ComposeFacts, folder: Path | None = None) -> ComposeFacts:
    """The platform's facts with another project name, and `folder` in the place of that of the api's socket."""
    environment = {**facts.environment, SOCKET_VARIABLE: str(folder)} if folder else facts.environment
    return replace(facts, project=trial_project(facts), environment=environment)


def _create_line(apart: Compose, with_overlay: bool) -> list[str]:
    return apart.command_line(with_overlay, "up", "--no-start", "--no-deps", "--no-build", apart.facts.service)


def _check_apart(apart: Compose, container: ContainerState, folder: Path) -> None:
    """Raises `ComposeFailed` if the trial can write to a mount that is not its own, such as a shared named volume."""
    argv = (apart.facts.engine, "inspect", "--type", "container", container.id)
    for mount in apart.ask_json(argv)[0].get("Mounts") or ():
        is_own = mount.get("Type") == "volume" and str(mount.get("Name")).startswith(f"{apart.facts.project}_")
        is_own = is_own or (mount.get("Type") == "bind" and mount.get("Source") == str(folder))
        if mount.get("RW") and mount.get("Type") != "tmpfs" and not is_own:
            raise ComposeFailed(
                "trial_not_apart",
                f"the trial could write to the mount {mount.get('Destination')}, which is not its own",
                f"remove the volume's `name` in the compose file; name the api socket's folder by {SOCKET_VARIABLE}",
            )


def _wait_until_ready(apart: Compose, address: str, mode: str, deadline: float) -> Readiness:
    """What `/readyz` answers; raises `ComposeFailed`, at once if the container has ended."""
    seen = Readiness(False, text="no answer")
    looked = time.monotonic()
    with ApiClient(address, None) as api:
        while time.monotonic() < deadline and not seen.ready:
            try:
                seen = api.ready(within=2)
            except SignerError as error:  # it does not listen yet
                seen = Readiness(False, code=error.code, text=error.text)
            if seen.ready and seen.mode == mode:
                return seen
            if time.monotonic() - looked > 1:
                state, looked = apart.running(), time.monotonic()
                if state is None or not state.is_running:
                    break
            time.sleep(_LOOK_EVERY)
    why = f"its mode is {seen.mode:.20}" if seen.ready else f"{seen.text:.200}"
    state = apart.running()
    log = shown(apart.run((apart.facts.engine, "logs", "--tail", "40", state.id))) if state else ""
    text = f"the trial service is not ready in mode {mode}: {why}"
    raise ComposeFailed("trial_not_ready", text, "see the log above", log)
