"""What listens is read from the kernel's tables, of the container's own processes alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.migration.boot import files_at_boot
from signer.migration.compose import ContainerState
from signer.migration.observe import _address, digests_of, listens

# Listens on a unix socket as the first process of its own pid namespace, and says so.
LISTENER = """
import socket, sys, time
with socket.socket(socket.AF_UNIX) as one:
    one.bind(sys.argv[1])
    one.listen()
    print("listens", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def contained(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Number and socket of a process that is the first of a pid namespace, as a container's is."""
    if os.geteuid() != 0:
        pytest.skip("only root makes a namespace of processes")
    path = tmp_path / "api.sock"
    words = ["unshare", "--pid", "--fork", "--kill-child", "/usr/bin/python3", "-c", LISTENER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield int(child), path
        process.kill()


def container(pid: int) -> ContainerState:
    return ContainerState("c" * 64, "a" * 64, "local", "running", "", pid=pid)


def test_the_sockets_of_the_container_and_of_nobody_else_are_listed(contained: tuple[int, Path]) -> None:
    pid, path = contained
    assert listens(container(pid)) == [f"unix:{path}"]


@pytest.mark.parametrize("pid", [0, None, 2**22 + 1], ids=["none", "our own", "unknown"])
def test_a_process_that_is_no_container_of_this_host_is_not_looked_at(pid: int | None) -> None:
    """An engine may run on another host, where the same number is another process."""
    with pytest.raises(OSError, match=r"not in a container|No such file"):
        listens(container(os.getpid() if pid is None else pid))


@pytest.mark.parametrize(
    "text, address",
    [
        ("0100007F:201E", "127.0.0.1:8222"),
        ("00000000:0016", "0.0.0.0:22"),
        ("00000000000000000000000001000000:201E", "[::1]:8222"),
        ("00000000000000000000000000000000:01BB", "[::]:443"),
    ],
)
def test_an_address_of_the_kernels_table_is_read(text: str, address: str) -> None:
    assert _address(text) == address


def test_a_file_that_is_gone_has_no_digest(tmp_path: Path) -> None:
    assert digests_of(tmp_path / "gone.yaml") == {str(tmp_path / "gone.yaml"): "unreadable"}


def test_what_a_reboot_starts_is_read_back(tmp_path: Path) -> None:
    boot = tmp_path / "boot"
    boot.write_text("# head\nmode=local\nfile=/a b/base.yaml\nfile=/o=1.yaml\nproject=p\nvariable=FILE=x\n")
    assert files_at_boot(boot) == ("/a b/base.yaml", "/o=1.yaml")
