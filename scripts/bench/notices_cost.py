"""What notices cost the signing path: CPU of the keeper for a signature, with a channel configured and without one.

A signature makes no notice. Two services run at once, one of them with a channel, and are under load by turns.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final

from scripts.bench.load import run_wrk, write_bodies
from scripts.bench.machine import cpu_seconds
from scripts.bench.sides import Side, check_side, new_service, side_of
from scripts.bench.terminal import show_progress
from signer.service.control import ask_launcher
from signer.settings import load_settings
from tests.parts.keys import make_key
from tests.parts.service import Service

BODIES: Final = 20_000
CONNECTIONS: Final = 8
SECONDS: Final = 3  # of load, each time
_CHANNEL: Final = """
[channels.hook]
kind = "webhook"
url = "http://127.0.0.1:1/hook"
secret = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz"
"""


def measure_notices(folder: Path, rounds: int) -> dict[str, float | None]:
    """CPU of the keeper in µs for a signature, by side, and their ratio: the median of neighbouring turns."""
    ca = make_key(folder, "ed25519", "bench-ca")
    write_bodies(folder / "bodies", BODIES)
    with ExitStack() as running:
        services = {
            "without": new_service(folder / "without", ca),
            "with": new_service(folder / "with", ca, **_notices(folder)),
        }
        sides = {name: side_of(running.enter_context(service), name) for name, service in services.items()}
        keepers = {name: _keeper(service) for name, service in services.items()}
        for side in sides.values():
            check_side(side, ca)
            run_wrk(side.url, folder / "bodies", side.token, connections=CONNECTIONS, seconds=1)  # warm
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sides if number % 2 == 0 else reversed(sides):
                show_progress(f"signing {name} notices, turn {number + 1} of {rounds}")
                found[name].append(_cpu_of_a_signature(sides[name], keepers[name], folder / "bodies"))
    show_progress("")
    return {
        "keeper_without_notices_us": median(found["without"]),
        "keeper_with_notices_us": median(found["with"]),
        "notices_ratio": median(ours / theirs for ours, theirs in zip(found["with"], found["without"], strict=True)),
    }


def _notices(folder: Path) -> dict[str, str]:
    """The settings of a service with a channel."""
    file = folder / "notices.toml"
    file.write_text(_CHANNEL)
    file.chmod(0o400)
    user = {"SIGNER_NOTICES_USER": "root"} if os.geteuid() == 0 else {}
    return {"SIGNER_NOTICES_FILE": str(file), "SIGNER_NOTICES_DIR": str(folder / "sender"), **user}


def _keeper(service: Service) -> int:
    """The keeper's process id."""
    return int(ask_launcher(load_settings(service.environment()), "status")["keeper"]["pid"])


def _cpu_of_a_signature(side: Side, keeper: int, bodies: Path) -> float:
    """µs."""
    before = cpu_seconds([keeper])
    run = run_wrk(side.url, bodies, side.token, connections=CONNECTIONS, seconds=SECONDS)
    return (cpu_seconds([keeper]) - before) / run.answers * 1e6
