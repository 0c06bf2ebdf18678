"""Compose files that hide a privilege, a namespace of the host or a second way to the key: none is ready.

Each form is written into the overlay or the base file, and merged by the real podman-compose.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.parts import missing
from tests.parts.documents import blocks, document
from tests.parts.hosts import SERVICE, Host
from tests.parts.service import ROOT

pytestmark = missing.needs_podman_compose

# Lines below our service, in the overlay.
FORMS: dict[str, str] = {
    "privileged: true": "privileged: true",
    "privileged: 1": "privileged: 1",
    "privileged: yes": "privileged: yes",
    "privileged as a text, which podman-compose takes for true": 'privileged: "false"',
    "privileged: false, which nobody has to say": "privileged: false",
    "pid: host": "pid: host",
    "pid of another container": "pid: container:vault",
    "ipc: host": "ipc: host",
    "uts: host": "uts: host",
    "userns_mode: host": "userns_mode: host",
    "cgroup: host": "cgroup: host",
    "cgroup_parent": "cgroup_parent: /",
    "the network of another container": "network_mode: container:vault",
    "devices": "devices: [/dev/mem]",
    "a device by its rule": 'device_cgroup_rules: ["a *:* rwm"]',
    "a CDI device": 'x-podman.devices: ["all"]',
    "gpus": "gpus: all",
    "seccomp=unconfined": 'security_opt: ["seccomp=unconfined"]',
    "seccomp:unconfined": 'security_opt: ["seccomp:unconfined"]',
    "apparmor=unconfined": 'security_opt: ["apparmor=unconfined"]',
    "label=disable": 'security_opt: ["label=disable"]',
    "unmask=ALL": 'security_opt: ["unmask=ALL"]',
    "systempaths=unconfined": 'security_opt: ["systempaths=unconfined"]',
    "no-new-privileges taken back": 'security_opt: ["no-new-privileges:false"]',
    "a capability": "cap_add: [SYS_ADMIN]",
    "a capability with its prefix": "cap_add: [CAP_SYS_ADMIN]",
    "all capabilities": "cap_add: [ALL]",
    "sysctls": "sysctls: {kernel.core_pattern: '|/x'}",
    "a group": 'group_add: ["0"]',
    "another user": 'user: "0"',
    "another entry point": "entrypoint: [sh, -c, 'cat /run/signer-ca/ca']",
    "another command": "command: [serve, --x]",
    "a health check of its own": "healthcheck: {test: 'cat /run/signer-ca/ca > /var/lib/signer/x'}",
    "a root file system of its own": "x-podman.rootfs: /",
    "user ids of its own": 'x-podman.uidmaps: ["0:0:65536"]',
    "an annotation for the runtime": "annotations: {run.oci.keep_original_groups: '1'}",
    "another runtime": "runtime: /tmp/x",
    "another platform": "platform: linux/arm64",
    "a pull": "pull_policy: always",
    "a build": "build: .",
    "a label": "labels: {io.containers.autoupdate: registry}",
    "a log file": "logging: {options: {path: /etc/x}}",
    "a core file": "ulimits: {core: -1}",
    "a container name": "container_name: vault",
    "two of it": "deploy: {replicas: 2, mode: replicated}",
    "the users of the processes": "environment: {SIGNER_KEEPER_USER: root}",
    "a variable of the loader": "environment: {LD_PRELOAD: /run/signer-vault/x.so}",
    "a variable of Python": "environment: {PYTHONPATH: /run/signer-vault}",
    "a setting that whoever starts it may choose": "environment: {SIGNER_LISTEN: null}",
    "env_file": "env_file: other.env",
    "a secret": "secrets: [ca]",
    "the volumes of another container": 'volumes_from: ["container:vault"]',
    "the engine's socket": "volumes: [/run/podman/podman.sock:/run/podman.sock]",
    "docker's socket read-only": "volumes: [/var/run/docker.sock:/var/run/docker.sock:ro]",
    "the whole host": "volumes: [/:/host:ro]",
    "a propagation": "volumes: ['/etc/ssl/certs:/etc/signer:ro,rshared']",
    "a chown of the source": "volumes: ['/etc/ssl/certs:/etc/signer:ro,U']",
    "an allowed target that can be written": "volumes: [/etc/ssl/certs:/etc/signer]",
    "a volume that is no ledger": "volumes: [other:/var/lib/signer]",
    "another size of the tmpfs, with exec": "tmpfs: ['/run/signer:exec,mode=0777']",
    "a mount by a pattern": "volumes: [{type: glob, source: '/run/*', target: /x}]",
    "a mount of a device": "volumes: [{type: devpts, target: /dev/pts}]",
    "a mount of an image": "volumes: [{type: image, source: x, target: /x}]",
    "a mount with a subpath": (
        "volumes: [{type: volume, source: ledger, target: /var/lib/signer, volume: {subpath: x}}]"
    ),
    "a mount with a label": (
        "volumes: [{type: bind, source: /etc/ssl/certs, target: /etc/signer, read_only: true, bind: {selinux: Z}}]"
    ),
}
# Whole files for the place of the overlay's service; EXTENDS and INCLUDED name files beside it.
HIDDEN = """services:
  hidden:
    privileged: true
    pid: host
    volumes: ["FOLDER:/folder"]
"""


@pytest.fixture
def ready_host(host: Host) -> Host:
    """A host with the real podman-compose."""
    (host.folder / "bin" / "podman-compose").unlink()
    host.environ["PLATFORM_RUNTIME_COMPOSE"] = str(Path(sys.executable).with_name("podman-compose"))
    return host


def _add(host: Host, lines: str) -> None:
    """As another file that is merged first would say it: `include` appends, and lists are joined."""
    host.write("overlays/more.yaml", f"services:\n  safe-session-api:\n    {lines}\n")
    _include(host)


def _include(host: Host) -> None:
    path = host.folder / "overlays" / "local-ca.yaml"
    path.write_text(f"include: [more.yaml]\n{path.read_text()}")


def _codes(host: Host) -> set[str]:
    told = host.run()
    return told.codes("FAIL") | ({"compose_allowed"} & told.codes("ok"))


def test_audit_4e2_the_host_itself_is_ready(ready_host: Host) -> None:
    assert _codes(ready_host) == {"compose_allowed"}
    _add(ready_host, "mem_limit: 512m\n    ulimits: {nofile: {soft: 1024, hard: 2048}}\n    pids_limit: 200")
    assert _codes(ready_host) == {"compose_allowed"}


def test_a_base_file_that_sends_notices_is_ready(ready_host: Host) -> None:
    """What the overlay of notices adds is in the allow-list; another place for the same file is not."""
    lines = (ROOT / "overlays" / "safe-session-notices.yaml").read_text()
    ready_host.environ["PLATFORM_RUNTIME_SAFE_SESSION_NOTICES_DIR"] = "/etc/ssl/certs"
    ready_host.write("overlays/more.yaml", lines)
    _include(ready_host)
    assert _codes(ready_host) == {"compose_allowed"}
    ready_host.write("overlays/more.yaml", lines.replace("target: /etc/signer-notices", "target: /etc/signer-noticed"))
    assert "compose_not_allowed" in _codes(ready_host)


def test_the_lines_for_tls_proxies_and_memory_of_the_page_are_ready(ready_host: Host) -> None:
    (lines,) = blocks(document("runbooks/install/reach.md"), "yaml")
    ready_host.write("overlays/more.yaml", lines.replace("/etc/safe-session/tls", "/etc/ssl/certs"))
    _include(ready_host)
    assert _codes(ready_host) == {"compose_allowed"}


def test_audit_3d2_a_base_file_with_a_socket_for_clients_of_the_host_is_ready(ready_host: Host) -> None:
    """The folder is the one that the allow-list names: the service may write there."""
    lines = (ROOT / "overlays" / "safe-session-socket.yaml").read_text()
    ready_host.write("overlays/more.yaml", lines)
    _include(ready_host)
    assert _codes(ready_host) == {"compose_allowed"}
    for folder in ("/", "/etc", "/run"):
        ready_host.environ["PLATFORM_RUNTIME_SAFE_SESSION_SOCKET_DIR"] = folder
        assert "compose_not_allowed" in _codes(ready_host)


def _groups() -> list[dict[str, Any]]:
    """The forms in as few services as hold them: lists are joined, a key with one value is in each service once."""
    groups: list[dict[str, Any]] = []
    for text in FORMS.values():
        ((key, value),) = yaml.safe_load(text).items()
        for group in groups:
            if key not in group:
                group[key] = value
            elif isinstance(value, list) and isinstance(group[key], list):
                group[key] += value
            elif isinstance(value, dict) and isinstance(group[key], dict) and not value.keys() & group[key].keys():
                group[key] |= value
            else:
                continue
            break
        else:
            groups.append({key: value})
    return groups


def _wanted(key: str, value: Any) -> list[str]:
    """How the detail of each fault begins."""
    if isinstance(value, list):
        return [f"{key}." for _ in value]
    return [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]


@pytest.mark.parametrize("number", range(len(_groups())))
def test_audit_4e2_a_form_that_is_not_in_the_allow_list_is_not_ready(ready_host: Host, number: int) -> None:
    group = _groups()[number]
    ready_host.write("overlays/other.env", "SIGNER_KEEPER_USER=root\n")
    more = {"services": {SERVICE: group}, "volumes": {"other": {}}, "secrets": {"ca": {"file": "/x"}}}
    ready_host.write("overlays/more.yaml", yaml.safe_dump(more))
    _include(ready_host)
    told = ready_host.run()
    assert "compose_allowed" not in told.codes("ok")
    faults = told.detail("compose_not_allowed").splitlines()
    for key, value in group.items():
        for begins in set(_wanted(key, value)):
            found = [fault for fault in faults if fault.startswith(begins)]
            assert len(found) >= _wanted(key, value).count(begins), (begins, told.stdout)


def test_audit_4e1_what_extends_hides_is_not_ready(ready_host: Host) -> None:
    """`podman-compose config` prints `extends` as it stands; `up` follows it."""
    hidden = HIDDEN.replace("FOLDER", str(ready_host.key.parent))
    ready_host.write("overlays/hidden.yaml", hidden)
    _add(ready_host, "extends: {file: hidden.yaml, service: hidden}")
    told = ready_host.run()
    assert told.codes("FAIL") == {"compose_not_allowed"}
    assert "extends.file" in told.detail("compose_not_allowed")


def test_audit_4e1_what_an_env_file_hides_is_not_ready(ready_host: Host) -> None:
    ready_host.write("overlays/hidden.env", "SIGNER_API_USER=root\nSIGNER_LISTEN=0.0.0.0:8222\n")
    _add(ready_host, "env_file: [hidden.env]")
    assert _codes(ready_host) == {"compose_not_allowed"}


@pytest.mark.parametrize("line", ["PODMAN_COMPOSE_IN_POD=1", "export PODMAN_USERNS=host", " 'COMPOSE_PROFILES'=x"])
def test_audit_4e1_what_env_beside_the_base_changes_is_not_ready(ready_host: Host, line: str) -> None:
    """podman-compose takes `--pod-args` from PODMAN_COMPOSE_POD_ARGS, and podman itself PODMAN_USERNS."""
    ready_host.write("overlays/.env", f"# mine\n{line}\n")
    assert _codes(ready_host) == {"compose_steered"}


def test_audit_4e1_what_the_environment_changes_is_not_ready(ready_host: Host) -> None:
    ready_host.environ["PODMAN_COMPOSE_POD_ARGS"] = "--share=pid"
    assert _codes(ready_host) == {"compose_steered"}


TOPS = {
    "the ledger in the folder of the key": (
        "volumes: {ledger: {driver_opts: {type: none, o: bind, device: FOLDER}}}", "compose_not_allowed",
    ),
    "the ledger of another project": ("volumes: {ledger: {external: true}}", "compose_not_allowed"),
    "podman's pods with arguments": ("x-podman: {in_pod: true, pod_args: ['--share=pid']}", "compose_not_allowed"),
    "a network of the host": ("networks: {default: {driver: host}}", "compose_not_allowed"),
    "something new": ("models: {x: {model: y}}", "compose_not_allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOPS)
def test_audit_4e2_what_stands_beside_the_services_is_not_ready(ready_host: Host, name: str) -> None:
    text, code = TOPS[name]
    ready_host.write("overlays/more.yaml", text.replace("FOLDER", str(ready_host.key.parent)) + "\n")
    _include(ready_host)
    assert code in _codes(ready_host)


def test_audit_4e2_without_its_list_nothing_is_ready(ready_host: Host) -> None:
    ready_host.arguments += ["--allow-list", str(ready_host.folder / "nowhere")]
    assert _codes(ready_host) == {"compose_allow_list_missing"}


def test_audit_4e2_a_list_of_the_operators_is_taken_by_name(ready_host: Host) -> None:
    text = (ROOT / "overlays" / "allow-list.txt").read_text()
    ready_host.write("list.txt", f"{text}service labels.* <text>\n")
    ready_host.arguments += ["--allow-list", str(ready_host.folder / "list.txt")]
    _add(ready_host, "labels: {team: platform}")
    assert _codes(ready_host) == {"compose_allowed"}


# --- other services --------------------------------------------------------------------------------------------------

GOOD_NEIGHBOUR = "image: vault:1\n    command: [server]\n    ports: ['127.0.0.1:8200:8200']\n    restart: always"
NEIGHBOURS: dict[str, tuple[str, str]] = {
    "privileged": ("compose_other_service_not_allowed", "privileged: true"),
    "pid: host": ("compose_other_service_not_allowed", "pid: host"),
    "network: host": ("compose_other_service_not_allowed", "network_mode: host"),
    "the network of our service": ("compose_other_service_not_allowed", "network_mode: 'service:safe-session-api'"),
    "a device": ("compose_other_service_not_allowed", "devices: [/dev/mem]"),
    "a capability": ("compose_other_service_not_allowed", "cap_add: [SYS_PTRACE]"),
    "seccomp": ("compose_other_service_not_allowed", "security_opt: ['seccomp=unconfined']"),
    "extends": ("compose_other_service_not_allowed", "extends: {file: hidden.yaml, service: hidden}"),
    "all volumes of our service": ("compose_other_service_not_allowed", "volumes_from: [safe-session-api]"),
    "a mount by a pattern": (
        "compose_other_service_not_allowed", "volumes: [{type: glob, source: '/run/*', target: /x}]",
    ),
    "a build with secrets": ("compose_other_service_not_allowed", "build: {context: ./x, secrets: [a]}"),
    "the folder of the key": ("compose_other_service_reaches", "volumes: ['FOLDER:/x:ro']"),
    "a folder above the key": ("compose_other_service_reaches", "volumes: ['MEMORY:/x:ro']"),
    "the key as a secret": ("overlay_key_reached_by_other_service", "secrets: [ca]"),
    "the key as its environment": ("compose_other_service_reaches", "env_file: ['FOLDER/ca']"),
    "the key in its build": ("compose_other_service_reaches", "build: {context: 'FOLDER'}"),
    "the policy": ("compose_other_service_reaches", "volumes: [/etc/ssl:/x:ro]"),
    "the ledger": ("compose_other_service_reaches", "volumes: ['ledger:/x']"),
    "the ledger by its whole name": ("compose_other_service_reaches", "volumes: ['alias:/x']"),
    "the ledger where the engine keeps it": ("compose_other_service_reaches", "volumes: [/var/lib/containers:/x:ro]"),
    "docker's socket": ("compose_other_service_reaches", "volumes: [/var/run/docker.sock:/x:ro]"),
    "podman's folder": ("compose_other_service_reaches", "volumes: [/run/podman:/x]"),
    "any socket": ("compose_other_service_reaches", "volumes: [/srv/engine.sock:/x]"),
    "the sockets of the service": ("compose_other_service_reaches", "volumes: [/run/signer-api:/x]"),
    "all of /run": ("compose_other_service_reaches", "volumes: [/run:/x:ro]"),
    "/proc": ("compose_other_service_reaches", "volumes: [/proc:/x:ro]"),
    "a device as a volume": ("compose_other_service_reaches", "volumes: [/dev/mem:/x]"),
    "cron": ("compose_other_service_reaches", "volumes: [/etc/cron.d:/x]"),
    "the compose files": ("compose_other_service_reaches", "volumes: [.:/x]"),
}  # fmt: skip
OTHER_TOPS = "secrets: {ca: {file: KEY}}\nvolumes:\n  alias: {name: overlays_ledger, external: true}\n"


def _neighbours(host: Host, *lines: str) -> None:
    """One service for each of `lines`, named `n0` and so on; all are named to the preflight."""
    text = "services:\n"
    for number, line in enumerate(lines):
        text += f"  n{number}:\n    {GOOD_NEIGHBOUR}\n" + (f"    {line}\n" if line else "")
    text = (text + OTHER_TOPS).replace("FOLDER", str(host.key.parent)).replace("MEMORY", str(host.memory))
    host.write("overlays/more.yaml", text.replace("KEY", str(host.key)))
    _include(host)


def _naming(count: int) -> list[str]:
    return [word for number in range(count) for word in ("--other-service", f"n{number}")]


def test_audit_4e2_a_service_that_nobody_named_is_not_ready(ready_host: Host) -> None:
    _neighbours(ready_host, "")
    assert _codes(ready_host) == {"compose_other_service_not_named", "compose_allowed"}
    ready_host.arguments += _naming(1)
    told = ready_host.run()
    assert told.codes("FAIL") == set(), told.stdout
    assert told.detail("compose_other_services").startswith("n0: ")


def test_audit_4e2_a_named_service_may_hold_no_privilege_and_reach_nothing(ready_host: Host) -> None:
    ready_host.write("overlays/hidden.yaml", HIDDEN.replace("FOLDER", str(ready_host.key.parent)))
    _neighbours(ready_host, *(line for _, line in NEIGHBOURS.values()), "")
    ready_host.arguments += _naming(len(NEIGHBOURS) + 1)
    told = ready_host.run()
    for number, (name, (code, _)) in enumerate(NEIGHBOURS.items()):
        details = told.detail(code).splitlines()
        assert any(re.search(rf"\bn{number}\b", detail) for detail in details), (name, code, told.stdout)
    assert not re.search(rf"^FAIL.*\bn{len(NEIGHBOURS)}\b", told.stdout, re.MULTILINE), "the last one is good"
