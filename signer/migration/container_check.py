"""Compares the service's container, as the engine describes it, with its merged configuration and its image.

The configuration is text that compose reads in its own way; `inspect` shows what it made of it. What a container has
beyond the few things that the configuration of the overlays gives it is a difference. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

NO_NEW_PRIVILEGES: Final = frozenset({"no-new-privileges", "no-new-privileges:true", "no-new-privileges=true"})
# Parts of `HostConfig` that must be empty: each gives a container something of its host or of another container.
_EMPTY: Final = (
    "Devices", "DeviceRequests", "DeviceCgroupRules", "GroupAdd", "VolumesFrom", "Links", "Sysctls", "ExtraHosts",
    "IDMappings", "CgroupParent", "Cgroup", "VolumeDriver",
)  # fmt: skip
_MODES: Final = {
    "PidMode": ("", "private"),
    "IpcMode": ("", "private", "shareable"),
    "UTSMode": ("", "private"),
    "UsernsMode": ("",),
}
_ENGINES_OWN: Final = frozenset({"TERM", "container", "HOME", "HOSTNAME"})  # variables that engines add
_ENGINES_TMPFS: Final = frozenset({"/run", "/tmp", "/var/tmp", "/dev/shm"})  # noqa: S108 - podman's with a read-only root
_ANNOTATIONS: Final = ("io.podman.annotations.", "io.kubernetes.cri-o.", "io.container.manager", "org.opencontainers.")
# Options of `podman create` that podman-compose writes for what the allow-list allows; True: a value follows.
_OPTIONS: Final = {
    **dict.fromkeys(("-d", "--detach", "--read-only", "--replace"), False),
    **dict.fromkeys(
        ("--name", "--pod", "--label", "--cap-add", "--cap-drop", "--security-opt", "-e", "--env", "--tmpfs", "--mount",
         "-v", "--volume", "--network", "--restart", "--log-driver", "--log-opt", "-m", "--memory", "--memory-swap",
         "--memory-reservation", "--cpus", "--cpu-shares", "--pids-limit", "--ulimit", "--oom-score-adj",
         "--stop-timeout", "--network-alias", "--requires", "--hostname"), True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Expected:
    """What a container must be: its image (`inspect` of it), its merged service, and the volumes' names and sources.

    `image_id` is bare hex. `mounts` are (type, source or volume name, target, writable).
    """

    image_id: str
    image: Mapping[str, Any]
    service: Mapping[str, Any]
    mounts: frozenset[tuple[str, str, str, bool]]


def expected_mounts(
    content: Mapping[str, Any], service: Mapping[str, Any], project: str, folder: str
) -> frozenset[tuple[str, str, str, bool]]:
    """The mounts of a merged service; relative sources are below `folder`, named volumes have the project's name."""
    return frozenset(_mount(one, content.get("volumes") or {}, project, folder) for one in service.get("volumes") or ())


def _mount(one: object, volumes: Mapping[str, Any], project: str, folder: str) -> tuple[str, str, str, bool]:
    if isinstance(one, Mapping):
        kind, source, target = (str(one.get(name) or "") for name in ("type", "source", "target"))
        writable = one.get("read_only") is not True
    else:
        source, _, rest = str(one).partition(":")
        target, _, options = rest.partition(":")
        kind, writable = "", "ro" not in options.split(",")
    if kind in ("bind", "") and source.startswith(("/", ".", "~")):
        return "bind", os.path.realpath(os.path.join(folder, os.path.expanduser(source))), target, writable  # noqa: PTH111, PTH118
    named = volumes.get(source)
    name = named.get("name") if isinstance(named, Mapping) else None
    return kind or "volume", str(name or f"{project}_{source}"), target, writable


def container_differences(raw: Mapping[str, Any], expected: Expected) -> list[str]:
    """One line for each difference, without values of variables; raises `KeyError` or `TypeError` for another form."""
    return [*_identity(raw, expected), *_powers(raw, expected), *_mounts(raw, expected), *_asked(raw)]


def _identity(raw: Mapping[str, Any], expected: Expected) -> Iterator[str]:
    """Which program runs, as whom, with which variables."""
    config, image = raw["Config"], expected.image["Config"]
    if str(raw["Image"]).removeprefix("sha256:") != expected.image_id:
        yield f"its image is {str(raw['Image']).removeprefix('sha256:')[:12]}, not {expected.image_id[:12]}"
    if raw.get("Rootfs"):
        yield "its root file system is a folder of the host"
    command = [*_words(image.get("Entrypoint")), *_words(image.get("Cmd"))]
    if [raw["Path"], *raw["Args"]] != command:
        yield "its command is not the image's"
    if (config.get("User") or "") != (image.get("User") or expected.image.get("User") or ""):
        yield f"it runs as user {config.get('User') or 'root'!s:.40}"
    if _test(config) != _test(image) and _test(config) != _test(expected.image):
        yield "its health check is not the image's"
    known = _variables(image.get("Env") or ())
    wanted = {**known, **_service_variables(expected.service.get("environment"))}
    for name, value in _variables(config.get("Env") or ()).items():
        if name in wanted and wanted[name] != value:
            yield f"its variable {name!s:.60} has another value"
        elif name not in wanted and name not in _ENGINES_OWN:
            yield f"it has the variable {name!s:.60}"
    for name in config.get("Annotations") or ():
        if not str(name).startswith(_ANNOTATIONS):
            yield f"it has the annotation {name!s:.60}"


def _powers(raw: Mapping[str, Any], expected: Expected) -> Iterator[str]:
    """Privileges, capabilities, namespaces."""
    host, service = raw["HostConfig"], expected.service
    if host.get("Privileged") is not False:
        yield "it is privileged"
    if host.get("ReadonlyRootfs") is not True:
        yield "its root file system can be written"
    options = {str(one) for one in host.get("SecurityOpt") or ()}
    if not options & NO_NEW_PRIVILEGES:
        yield "it may gain privileges"
    yield from (f"its security option is {one:.60}" for one in sorted(options - NO_NEW_PRIVILEGES))
    wanted = _capabilities(service.get("cap_add"))
    if "BoundingCaps" in raw:
        found = _capabilities(raw["BoundingCaps"])
    else:  # docker
        found = _capabilities(host.get("CapAdd"))
        if "ALL" not in _capabilities(host.get("CapDrop")):
            yield "it does not drop all capabilities"
    if found != wanted:
        yield f"its capabilities are {' '.join(sorted(found)) or 'none'}"[:200]
    yield from (f"its {name} is not empty" for name in _EMPTY if host.get(name))
    for name in ("MaskedPaths", "ReadonlyPaths"):  # docker's; podman does not show them
        if name in host and not host[name]:
            yield f"its {name} are empty"
    for name, allowed in _MODES.items():
        if (host.get(name) or "") not in allowed:
            yield f"its {name} is {host[name]!s:.60}"
    network, planned = str(host.get("NetworkMode") or ""), service.get("network_mode")
    if network != planned and (planned is not None or network.startswith(("host", "container:", "ns:"))):
        yield f"its network is {network:.60}"


def _mounts(raw: Mapping[str, Any], expected: Expected) -> Iterator[str]:
    """What it sees of the host."""
    found = set()
    for mount in raw.get("Mounts") or ():
        kind, target = str(mount.get("Type")), str(mount.get("Destination"))
        if kind == "tmpfs":
            continue
        source = str(mount.get("Name")) if kind == "volume" else os.path.realpath(str(mount.get("Source")))
        found.add((kind, source, target, bool(mount.get("RW"))))
        if mount.get("Propagation") not in (None, "", "private", "rprivate"):
            yield f"the mount at {target:.60} has the propagation {mount['Propagation']!s:.20}"
    for _, source, target, writable in sorted(found - expected.mounts):
        yield f"it {'can write' if writable else 'sees'} {source:.100} at {target:.60}"
    yield from (f"it lacks the mount at {target:.60}" for _, _, target, _ in sorted(expected.mounts - found))
    planned = {str(one).partition(":")[0] for one in _words(expected.service.get("tmpfs"))}
    for target in sorted({str(one) for one in raw["HostConfig"].get("Tmpfs") or ()} - planned - _ENGINES_TMPFS):
        yield f"it has a tmpfs at {target:.60}"


def _asked(raw: Mapping[str, Any]) -> Iterator[str]:
    """What compose asked podman for, where podman tells: `inspect` shows no trace of some options."""
    words = [str(word) for word in raw["Config"].get("CreateCommand") or ()]
    verb = next((at for at, word in enumerate(words) if word in ("create", "run")), None)
    if verb is None:
        return
    at = verb + 1
    while at < len(words) and words[at].startswith("-"):
        option, equals, value = words[at].partition("=")
        if option not in _OPTIONS:
            yield f"it was created with {option:.60}"
        takes_value = _OPTIONS.get(option, False) and not equals
        if takes_value:
            value = words[at + 1] if at + 1 < len(words) else ""
        if option == "--security-opt" and value not in NO_NEW_PRIVILEGES:
            yield f"it was created with the security option {value:.60}"
        at += 1 + takes_value


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(one) for one in value] if isinstance(value, Sequence) else []


def _test(config: Mapping[str, Any]) -> list[str]:
    check = config.get("Healthcheck")
    return _words(check.get("Test")) if isinstance(check, Mapping) else []


def _capabilities(names: object) -> set[str]:
    return {name.upper().removeprefix("CAP_") for name in _words(names)}


def _variables(lines: Sequence[object]) -> dict[str, str]:
    return dict(str(line).partition("=")[::2] for line in lines)


def _service_variables(value: object) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(name): str(one) for name, one in value.items() if one is not None}
    return _variables([one for one in _words(value) if "=" in one])
