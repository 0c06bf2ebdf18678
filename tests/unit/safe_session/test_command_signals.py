"""A signal that safe-session passes on reaches its command whatever this process does at that moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Another thread takes the signal, so that no system call of the main thread is interrupted: as when it arrives just
# before one. Then only the byte that each signal writes can wake the main thread.
_BETWEEN = """
import os, signal, sys, threading, time
from signer.safe_session.command import run

def take() -> None:
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), int(sys.argv[2]))

threading.Thread(target=take, daemon=True).start()
print(run("/bin/sh", ["sh", "-c", f"touch {sys.argv[1]}; exec sleep 100"], dict(os.environ)))
"""


# The signal comes when the command runs already, and before this process passes signals on.
_EARLY = """
import os, sys
from signer.safe_session.command import run

spawn = os.posix_spawn
def early(*words, **more):
    child = spawn(*words, **more)
    os.kill(os.getpid(), int(sys.argv[2]))
    return child

os.posix_spawn = early
print(run("/bin/sh", ["sh", "-c", "exec sleep 100"], dict(os.environ)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("program", [_BETWEEN, _EARLY], ids=["between two system calls", "before its handler is there"])
def test_a_signal_is_passed_on_whenever_it_comes(tmp_path: Path, program: str, number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "mark"), str(int(number))],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (f"{128 + number}\n", "")
