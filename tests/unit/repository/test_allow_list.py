"""overlays/allow-list.txt: derived from the overlays, and beyond them only what the operator may set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from signer.settings import SETTINGS
from tests.parts.documents import ROOT
from tests.parts.yaml_files import parse_yaml

LIST: Final = ROOT / "overlays" / "allow-list.txt"
OVERLAYS: Final = sorted((ROOT / "overlays").glob("*.yaml"))
SERVICE: Final = "safe-session-api"
VARIABLE: Final = re.compile(r"\$\{[A-Z_]+(?::[-?].*)?\}")
DEFAULT: Final = re.compile(r"\$\{[A-Z_]+:-(/[^{}]+)\}")
DERIVED: Final = "# --- derived"
SECTIONS: Final = ("ledger", "top", "service", "mount")
# Not the operator's to set in a compose file: the image, the tmpfs and the ledger's volume depend on them.
NOT_SETTABLE: Final = {
    "SIGNER_API_USER", "SIGNER_KEEPER_USER", "SIGNER_CA_KEY_OWNER", "SIGNER_DATA_DIR", "SIGNER_NOTICES_DIR",
    "SIGNER_NOTICES_USER", "SIGNER_RUN_DIR",
}  # fmt: skip


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Each text with its place: keys with dots between them, `*` for an item of a list."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from leaves(inner, f"{place}.*")
    elif place:
        yield place, value or "<empty>"


def mount(volume: Any) -> str:
    """A line of the list for a volume of the service."""
    if isinstance(volume, str):
        source, target = volume.split(":")
        return f"mount volume {target} rw {source}"
    assert volume["bind"] == {"create_host_path": "false"}
    assert set(volume) == {"type", "source", "target", "read_only", "bind"} or "read_only" not in volume
    if volume.get("read_only") == "true":
        return f"mount {volume['type']} {volume['target']} ro <path>"
    default = DEFAULT.fullmatch(volume["source"])
    assert default, "a folder that the service may write is one that the list names"
    return f"mount {volume['type']} {volume['target']} rw {default[1]}"


def derived(text: str) -> Iterator[str]:
    """The lines that an overlay needs."""
    content = parse_yaml(text)
    service = content.pop("services")[SERVICE]
    yield from (mount(volume) for volume in service.pop("volumes", []))
    for section, table in (("service", service), ("top", content)):
        for place, value in leaves(table):
            kind = "ledger" if place.startswith("volumes.ledger") else section
            yield f"{kind} {place} {'<text>' if VARIABLE.match(value) else value}"


def listed(begins: str) -> list[str]:
    """The lines below each headline that begins so."""
    found, inside = [], False
    for line in LIST.read_text().splitlines():
        if line.startswith("# ---"):
            inside = line.startswith(begins)
        elif inside and line and not line.startswith("#"):
            found.append(line)
    return found


def test_audit_4e2_the_list_is_what_the_overlays_hold() -> None:
    wanted = {line for overlay in OVERLAYS for line in derived(overlay.read_text())}
    assert listed(DERIVED) == sorted(wanted, key=lambda line: (SECTIONS.index(line.split()[0]), line))


@pytest.mark.parametrize(
    "before, after, line",
    [
        ("    cap_drop:", "    privileged: true\n    cap_drop:", "service privileged true"),
        ("cap_drop: [ALL]", "cap_drop: [NET_RAW]", "service cap_drop.* NET_RAW"),
        ("- ledger:/var/lib/signer", "- other:/var/lib/signer", "mount volume /var/lib/signer rw other"),
        ("in_pod: false", "in_pod: true", "top x-podman.in_pod true"),
        ("SIGNER_MODE: vault", "SIGNER_MODE: other", "service environment.SIGNER_MODE other"),
        ("  ledger:\n", "  ledger: {external: true}\n", "ledger volumes.ledger.external true"),
    ],
)
def test_audit_4e2_a_change_of_an_overlay_would_show_in_the_list(before: str, after: str, line: str) -> None:
    text = (ROOT / "overlays" / "safe-session.yaml").read_text()
    assert before in text
    assert line in set(derived(text.replace(before, after))) - set(listed(DERIVED))


def test_audit_4e2_every_setting_is_in_the_list_or_has_a_reason_not_to_be() -> None:
    named = set(re.findall(r"^service environment\.(\S+)", LIST.read_text(), re.MULTILINE))
    assert named == {name for name, _, _ in SETTINGS} - NOT_SETTABLE


def test_audit_4e2_nothing_in_the_list_gives_a_container_of_its_host() -> None:
    """Whatever is added later: none of these words may come in by any line."""
    lines = [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    words = re.compile(
        r"\b(privileged|pid|ipc|uts|userns_mode|cgroup\w*|devices?|gpus|sysctls|volumes_from|runtime|annotations|glob|"
        r"extends|use_api_socket|credential_spec|isolation|SYS_\w+|NET_ADMIN|unconfined|rootfs|uidmaps)\b"
    )
    assert [line for line in lines if words.search(line)] == ["top volumes.*.driver_opts.device <path>"]
    assert [line for line in lines if line.endswith(" host")] == ["service network_mode host"]


@pytest.mark.parametrize("line", [line for line in LIST.read_text().splitlines() if line and line[0] != "#"])
def test_audit_4e2_each_line_has_its_form(line: str) -> None:
    section, place, value = line.split(maxsplit=2)
    assert section in ("top", "ledger", "service", "mount", "other")
    assert section == "mount" or re.fullmatch(r"[\w*-]+(\.[\w*-]+)*", place)
    if value.startswith("<"):
        assert value in ("<empty>", "<bool>", "<word>", "<number>", "<size>", "<time>", "<path>", "<text>")
