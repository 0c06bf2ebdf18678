"""Looking at processes that may end while they are looked at."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that a process has started; none if it has ended meanwhile."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """All that came of a process, itself not counted."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def family(pid: int) -> list[int]:
    """A process and all that came of it."""
    return [pid, *descendants(pid)]


def is_alive(pid: int) -> bool:
    """Whether it runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def command_line(pid: int) -> bytes:
    """Its words, each with a zero byte behind it; empty if it has ended meanwhile."""
    return _read(pid, "cmdline")


def environment(pid: int) -> bytes:
    """Its variables, each with a zero byte behind it; empty if it has ended meanwhile."""
    return _read(pid, "environ")


def open_files(pid: int) -> list[str]:
    """What its descriptors lead to, as `readlink` shows it."""
    found = []
    for link in _links(pid):
        try:
            found.append(str(link.readlink()))
        except OSError:  # closed meanwhile
            continue
    return found


def _links(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
