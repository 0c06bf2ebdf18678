"""Who listens at the trial's address is read from the kernel, before a token is sent there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from signer.migration.trial import listens_alone

LISTEN = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])), reuse_port=True)
child = os.fork()
print(flush=True)
sys.stdin.read()
"""


def test_audit_3d1_only_the_trials_own_processes_may_listen_at_its_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert not listens_alone(port, os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert listens_alone(port, child.pid)
        assert listens_alone(port, os.getpid())
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            assert not listens_alone(port, other.pid)
            other.communicate(b"\n")
        with socket.create_server(("127.0.0.1", port), reuse_port=True):
            assert not listens_alone(port, child.pid)
        child.communicate(b"")
