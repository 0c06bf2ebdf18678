"""The machine under the figures: what it is, and what a tree of processes costs it. Reads /proc only."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")  # of utime and stime, a second


def describe_machine() -> dict[str, object]:
    """Cores, CPU model, load and the versions that matter."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "load_before": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "openssh": _first_line("ssh", "-V"),
    }


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "missing"
    return (done.stdout + done.stderr).strip().partition("\n")[0]


def render_machine(facts: dict[str, object]) -> str:
    """One line."""
    return "machine: " + ", ".join(f"{name} {value}" for name, value in facts.items())


def process_tree(root: int) -> list[int]:
    """`root` and all that descends from it, as long as they live."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        fields = _stat_fields(int(entry.name)) if entry.name.isdigit() else []
        if fields:
            children[int(fields[1])].append(int(entry.name))
    found, left = [], [root]
    while left:
        pid = left.pop()
        found.append(pid)
        left += children[pid]
    return found


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes so far, and of their children that they have waited for."""
    total = 0
    for pid in pids:
        total += sum(map(int, _stat_fields(pid)[11:15]))
    return total / TICKS


def pss_megabytes(pids: list[int]) -> float | None:
    """Memory that these processes hold together, shared pages counted once, in 10^6 bytes.

    None if the kernel will not tell: a process that forbids dumps is readable for root only.
    """
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except PermissionError:
            return None
        except OSError:  # ended meanwhile
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total * 1024 / 1e6


def process_name(pid: int) -> str:
    """Its command line, shortened."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80].strip()
    except OSError:
        return "gone"


def _stat_fields(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from `state` on; none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
