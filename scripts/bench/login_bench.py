"""`scripts/bench/login`: three ways to run a command on a real sshd, by turns."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from scripts.bench.figures import Target, medians, ratio, render_json, render_table, render_targets
from scripts.bench.load import BadRun, Missing
from scripts.bench.machine import describe_machine, render_machine
from scripts.bench.options import read_login_options
from scripts.bench.sides import IDENTITY, ROLE, new_service, prepare_bao, require_bao
from scripts.bench.terminal import show_progress
from tests.parts import missing
from tests.parts.keys import Key, make_key, sign_with_ssh_keygen
from tests.parts.openbao import OpenBao, binary
from tests.parts.ports import LOOPBACK
from tests.parts.service import ROOT, Service
from tests.parts.sshd import Sshd, run

PLAIN, OURS, BAO = "ssh, certificate ready", "safe-session ssh", "bao ssh -mode=ca"
STEP_RUNS = 11
# `bao ssh` asks for these whatever the role's defaults are.
ASKED_BY_BAO = "permit-X11-forwarding,permit-agent-forwarding,permit-port-forwarding,permit-pty,permit-user-rc"
Login = Callable[[], float]


def main() -> int:
    asked = read_login_options()
    machine = describe_machine()
    print(render_machine(machine))
    try:
        require_bao()
        if reason := missing.sshd():
            raise Missing(reason)
        times, steps = measure(asked)
    except (Missing, BadRun) as error:
        print(f"scripts/bench/login: error: {error}", file=sys.stderr)
        return 1
    added = added_times(times)
    print(render_results(times, added, steps))
    targets = [Target("added login time", ratio(added[OURS], added[BAO]), "at most", 0.75, " x bao ssh's")]
    print(render_targets(targets))
    if asked.json is not None:
        figures = {"added_ms": added, "steps_ms": steps, "samples_ms": times}
        asked.json.write_text(render_json(machine, figures, targets, logins=asked.logins))
    return 0


def measure(asked: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Milliseconds of every login by kind, in the order of the rounds; medians of safe-session's steps."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="signer-bench-")))
        ca, user = make_key(folder, "ed25519", "bench-ca"), make_key(folder, "ed25519", "user")
        bao = running.enter_context(OpenBao(folder / "bao", raft=True))
        token = prepare_bao(bao, ca, allowed_extensions=ASKED_BY_BAO).token
        service = running.enter_context(new_service(folder / "signer", ca))
        sshd = running.enter_context(Sshd(folder / "sshd", ca.public_line, principals=(ROLE,)))
        ways: dict[str, Login] = {
            PLAIN: _plain(sshd, ca, user),
            OURS: _safe_session(sshd, service),
            BAO: _bao(sshd, bao, token, user),
        }
        for way in ways.values():
            way()  # warm
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(asked.logins):
            show_progress(f"round {number + 1} of {asked.logins}")
            for name in rotated(list(ways), number):
                times[name].append(ways[name]())
        show_progress("where the time goes")
        steps = measure_steps(_session_environment(service))
        show_progress("")
        return times, steps


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Each round begins with another one, so that none always follows the same."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


def timed(name: str, command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Milliseconds of one login; raises `BadRun` if it failed."""
    clock = time.perf_counter()
    done = run(command, environment=environment)
    passed = (time.perf_counter() - clock) * 1000
    if not done.ok:
        raise BadRun(f"{name}: status {done.status}: {done.out}{done.err}")
    return passed


def _plain(sshd: Sshd, ca: Key, user: Key) -> Login:
    certificate = sign_with_ssh_keygen(ca, user, principals=(ROLE,), validity="-1m:+1h", name="ready")
    key = ["-i", str(user.private), f"-oCertificateFile={certificate}", "-oIdentitiesOnly=yes", "-oIdentityAgent=none"]
    command = ["ssh", *key, *sshd.ssh_options(), LOOPBACK, "true"]
    return lambda: timed(PLAIN, command, {"PATH": os.environ["PATH"], "HOME": str(sshd.folder)})


def _safe_session(sshd: Sshd, service: Service) -> Login:
    console_script = Path(sys.executable).with_name("safe-session")
    if not console_script.exists():
        raise Missing("safe-session is not in the environment; run scripts/setup-venv test")
    command = [str(console_script), "ssh", *sshd.ssh_options(), LOOPBACK, "true"]
    environment = _session_environment(service)
    return lambda: timed(OURS, command, environment)


def _session_environment(service: Service) -> dict[str, str]:
    base = {"PATH": os.environ["PATH"], "HOME": str(service.folder)}
    return {**base, **service.client_environment(IDENTITY, ROLE)}


def _bao(sshd: Sshd, bao: OpenBao, token: str, user: Key) -> Login:
    """The binary itself: its console script would start Python first."""
    own = [f"-private-key-path={user.private}", f"-public-key-path={user.public}", "-mount-point=ssh"]
    own += ["-mode=ca", f"-role={ROLE}", f"-valid-principals={ROLE}", "-strict-host-key-checking=no"]
    own += [f"-user-known-hosts-file={sshd.known_hosts}"]
    options = [word for word in sshd.ssh_options() if not word.startswith(("-oStrict", "-oUserKnown", "-oUser="))]
    command = [str(binary()), "ssh", *own, f"{sshd.user}@{LOOPBACK}", *options, "true"]
    environment = bao.environment(token)
    return lambda: timed(BAO, command, environment)


def measure_steps(environment: Mapping[str, str]) -> dict[str, float | None]:
    """Medians, in milliseconds: Python's bare start, the console script's, and each step in a fresh process."""
    python = sys.executable
    found: list[dict[str, float]] = []
    for _ in range(STEP_RUNS):
        sample = {
            "python's start, bare": timed("python", [python, "-c", "pass"], environment),
            "safe-session --version": timed(
                "safe-session", [str(Path(python).with_name("safe-session")), "--version"], environment
            ),
        }
        done = subprocess.run(
            [python, "-P", "-m", "scripts.bench.login_steps"],
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BadRun(f"a step of safe-session failed: {done.stderr}")
        found.append(sample | json.loads(done.stdout))
    return medians(found)


def added_times(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of what a login took longer than the plain one of the same round, in milliseconds, by kind."""
    plain = times[PLAIN]
    return {
        name: median(took - bare for took, bare in zip(found, plain, strict=True))
        for name, found in times.items()
        if name != PLAIN
    }


def render_results(
    times: Mapping[str, Sequence[float]], added: Mapping[str, float], steps: Mapping[str, float | None]
) -> str:
    rows = [
        [name, median(found), min(found), max(found), added.get(name), ratio(added.get(name), added[BAO])]
        for name, found in times.items()
    ]
    return "\n".join(
        (
            render_table(("login", "median ms", "fastest", "slowest", "added ms", "x bao ssh's"), rows),
            "",
            render_table(("safe-session's own time", "median ms"), [list(step) for step in steps.items()]),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
