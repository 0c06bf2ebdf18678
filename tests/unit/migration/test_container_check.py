"""A container is what its files, its image and the plan say, or it is not started, or the cutover goes back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from signer.migration.container_check import Expected, container_differences, expected_mounts
from tests.parts.documents import ROOT

DATA = ROOT / "tests" / "data" / "preflight"
Raw = dict[str, Any]


def recorded(engine: str) -> tuple[Raw, Expected]:
    """What `inspect` of the overlays' container says, recorded from podman 4.3.1; docker's by its documented form."""
    raw = json.loads((DATA / "inspect-podman.json").read_text())
    image = json.loads((DATA / "inspect-image.json").read_text())
    content = {"volumes": {"ledger": None}}
    service = json.loads((DATA / "inspect-service.json").read_text())
    if engine == "docker":
        del raw["BoundingCaps"], raw["EffectiveCaps"], raw["Config"]["CreateCommand"], raw["Config"]["Annotations"]
        raw["Image"] = f"sha256:{raw['Image']}"
        raw["HostConfig"] |= {
            "CapAdd": ["CHOWN", "SETGID", "SETUID", "KILL"], "CapDrop": ["ALL"], "PidMode": "", "UTSMode": "",
            "IpcMode": "private", "MaskedPaths": ["/proc/acpi"], "ReadonlyPaths": ["/proc/bus"],
            "SecurityOpt": ["no-new-privileges:true"], "Tmpfs": {"/run/signer": "mode=0750,size=1m"}, "Devices": None,
        }  # fmt: skip
    mounts = expected_mounts(content, service, "insp", "/x")
    return raw, Expected(raw["Image"].removeprefix("sha256:"), image, service, mounts)


@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_audit_4e2_the_container_of_the_overlays_differs_in_nothing(engine: str) -> None:
    assert container_differences(*recorded(engine)) == []


def _host(**values: object) -> Callable[[Raw], None]:
    return lambda raw: raw["HostConfig"].update(values)


def _created(*words: str) -> Callable[[Raw], None]:
    def change(raw: Raw) -> None:
        raw["Config"].setdefault("CreateCommand", ["podman", "create", "image"])[2:2] = words

    return change


def _mounted(**values: object) -> Callable[[Raw], None]:
    mount = {"Type": "bind", "Source": "/run/podman", "Destination": "/x", "RW": False, "Propagation": "rprivate"}
    return lambda raw: raw["Mounts"].append({**mount, **values})


def _variable(line: str) -> Callable[[Raw], None]:
    def change(raw: Raw) -> None:
        name = line.partition("=")[0]
        raw["Config"]["Env"] = [one for one in raw["Config"]["Env"] if not one.startswith(f"{name}=")] + [line]

    return change


CHANGES: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "another image": ("its image is", lambda raw: raw.update(Image="b" * 64)),
    "a folder for a root": ("root file system is a folder", lambda raw: raw.update(Rootfs="/")),
    "another command": ("its command", lambda raw: raw.update(Path="sh")),
    "more arguments": ("its command", lambda raw: raw["Args"].append("--x")),
    "another user": ("it runs as user 0", lambda raw: raw["Config"].update(User="0")),
    "another health check": ("its health check", lambda raw: raw["Config"].update(Healthcheck={"Test": ["CMD", "sh"]})),
    "another user of the keeper": ("SIGNER_KEEPER_USER has another value", _variable("SIGNER_KEEPER_USER=root")),
    "another address": ("SIGNER_LISTEN has another value", _variable("SIGNER_LISTEN=0.0.0.0:8222")),
    "a variable of an env_file": ("it has the variable LD_PRELOAD", _variable("LD_PRELOAD=/x.so")),
    "privileged": ("it is privileged", _host(Privileged=True)),
    "privileged unsaid": ("it is privileged", lambda raw: raw["HostConfig"].pop("Privileged")),
    "a root that can be written": ("can be written", _host(ReadonlyRootfs=False)),
    "new privileges": ("may gain privileges", _host(SecurityOpt=[])),
    "seccomp": ("security option is seccomp", _host(SecurityOpt=["no-new-privileges", "seccomp=unconfined"])),
    "a device": ("Devices is not empty", _host(Devices=[{"PathOnHost": "/dev/mem"}])),
    "a group": ("GroupAdd is not empty", _host(GroupAdd=["0"])),
    "another container's volumes": ("VolumesFrom is not empty", _host(VolumesFrom=["vault"])),
    "user ids": ("IDMappings is not empty", _host(IDMappings={"UidMap": ["0:0:1"]})),
    "pid: host": ("PidMode is host", _host(PidMode="host")),
    "pid of another": ("PidMode is container:x", _host(PidMode="container:x")),
    "ipc: host": ("IpcMode is host", _host(IpcMode="host")),
    "uts: host": ("UTSMode is host", _host(UTSMode="host")),
    "userns": ("UsernsMode is host", _host(UsernsMode="host")),
    "another network": ("its network is container:x", _host(NetworkMode="container:x")),
    "a mount": ("it sees /run/podman at /x", _mounted()),
    "a mount that can be written": ("it can write /run/podman at /x", _mounted(RW=True)),
    "a mount of a mount": ("propagation rshared", lambda raw: raw["Mounts"][1].update(Propagation="rshared")),
    "the policy can be written": ("it can write", lambda raw: raw["Mounts"][-1].update(RW=True)),
    "a mount is missing": ("it lacks the mount", lambda raw: raw["Mounts"].pop()),
    "another volume": ("it can write other", lambda raw: raw["Mounts"][0].update(Name="other")),
    "a tmpfs": ("a tmpfs at /etc", lambda raw: raw["HostConfig"]["Tmpfs"].update({"/etc": ""})),
}
OF_PODMAN: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "a capability": ("its capabilities", lambda raw: raw["BoundingCaps"].append("CAP_SYS_ADMIN")),
    "an annotation": ("the annotation run.oci", lambda raw: raw["Config"]["Annotations"].update({"run.oci.x": "1"})),
    "unmask": ("security option unmask=ALL", _created("--security-opt", "unmask=ALL")),
    "unmask in one word": ("security option unmask=ALL", _created("--security-opt=unmask=ALL")),
    "a device's rule": ("created with --device-cgroup-rule", _created("--device-cgroup-rule", "a *:* rwm")),
    "ipc, which 4.3.1 does not show": ("created with --ipc", _created("--ipc", "host")),
    "hooks": ("created with --hooks-dir", _created("--hooks-dir=/x")),
}
OF_DOCKER: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "a capability": ("its capabilities", _host(CapAdd=["CHOWN", "SETGID", "SETUID", "KILL", "SYS_ADMIN"])),
    "nothing dropped": ("does not drop all", _host(CapDrop=[])),
    "nothing masked": ("its MaskedPaths are empty", _host(MaskedPaths=[])),
    "nothing read-only": ("its ReadonlyPaths are empty", _host(ReadonlyPaths=None)),
    "a GPU": ("DeviceRequests is not empty", _host(DeviceRequests=[{"Driver": "nvidia"}])),
}


@pytest.mark.parametrize(
    "engine, name",
    [(engine, name) for engine in ("podman", "docker") for name in CHANGES]
    + [("podman", name) for name in OF_PODMAN]
    + [("docker", name) for name in OF_DOCKER],
)
def test_audit_4e2_each_difference_of_a_container_is_told(engine: str, name: str) -> None:
    words, change = {**CHANGES, **(OF_PODMAN if engine == "podman" else OF_DOCKER)}[name]
    raw, expected = recorded(engine)
    changed = copy.deepcopy(raw)
    change(changed)
    found = container_differences(changed, expected)
    assert any(words in line for line in found), found


def test_audit_4e2_no_value_of_a_variable_is_told() -> None:
    raw, expected = recorded("podman")
    raw["Config"]["Env"] += ["SOME_TOKEN=marker-of-a-secret", "SIGNER_VAULT_ADDR=marker-of-a-secret"]
    found = container_differences(raw, expected)
    assert len(found) == 2
    assert "marker" not in str(found)


def test_mounts_are_read_in_each_form_that_compose_prints() -> None:
    service = {
        "volumes": [
            "ledger:/var/lib/signer", "./policy:/etc/signer:ro", "named:/n",
            {"type": "bind", "source": "/run/x", "target": "/x", "read_only": True},
            {"type": "bind", "source": "../y", "target": "/y"},
            {"type": "volume", "source": "ledger", "target": "/l", "volume": {}},
        ]
    }  # fmt: skip
    assert expected_mounts({"volumes": {"named": {"name": "other"}}}, service, "p", "/a/b") == {
        ("volume", "p_ledger", "/var/lib/signer", True),
        ("bind", "/a/b/policy", "/etc/signer", False),
        ("volume", "other", "/n", True),
        ("bind", "/run/x", "/x", False),
        ("bind", "/a/y", "/y", True),
        ("volume", "p_ledger", "/l", True),
    }
