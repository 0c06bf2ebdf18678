"""Load by `wrk`: bodies with a new public key each, one run, and what it found."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SCRIPT: Final = Path(__file__).with_name("sign.lua")
_BLOB_START: Final = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"  # RFC 8709 section 4; any 32 bytes may follow


class Missing(Exception):
    """Something that the benchmark cannot do without; its text says how to get it."""


class BadRun(Exception):
    """A run whose figures would mean nothing."""


def require_wrk() -> None:
    """Raises `Missing`."""
    if shutil.which("wrk") is None:
        raise Missing("wrk is missing; as root: apt-get install wrk")


def new_public_line() -> str:
    """The line of an Ed25519 public key that nobody has the other half of."""
    return f"ssh-ed25519 {base64.b64encode(_BLOB_START + os.urandom(32)).decode()} bench"


def write_bodies(path: Path, count: int) -> None:
    """`count` sign bodies, one a line, no two with the same key."""
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"public_key": new_public_line(), "valid_principals": "llmops"}) + "\n")


@dataclass(frozen=True)
class Run:
    """One run of wrk: answers, errors of any kind, seconds, and latencies in milliseconds."""

    answers: int
    errors: int
    seconds: float
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        return self.answers / self.seconds


def run_wrk(url: str, bodies: Path, token: str, *, connections: int, seconds: float) -> Run:
    """Posts the bodies in turn to `url`; raises `BadRun` if anything but a 2xx came back.

    The token goes through the environment: an argument can be read by everybody on the machine.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s"]
    done = subprocess.run(
        [*command, "-s", str(SCRIPT), url, "--", str(bodies)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "BENCH_TOKEN": token},
        check=False,
    )
    if done.returncode != 0:
        raise BadRun(f"wrk failed: {done.stdout}{done.stderr}")
    run = read_run(done.stdout)
    if run.errors or not run.answers:
        raise BadRun(f"{url}: {run.errors} of {run.answers} answers were errors:\n{done.stdout}")
    return run


def read_run(output: str) -> Run:
    """What sign.lua prints at the end; raises `BadRun` if it is not there."""
    for line in output.splitlines():
        if line.startswith("BENCH "):
            told: dict[str, Any] = json.loads(line.removeprefix("BENCH "))
            return Run(
                answers=told["answers"],
                errors=told["errors"],
                seconds=told["us"] / 1e6,
                p50=told["p50_us"] / 1e3,
                p99=told["p99_us"] / 1e3,
            )
    raise BadRun(f"wrk said nothing that can be read:\n{output}")
