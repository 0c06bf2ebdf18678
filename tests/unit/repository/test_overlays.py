"""The overlays: Vault signs without one, each opt-in overlay changes who signs and nothing else, settings exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml

from signer.settings import FINGERPRINT_SETTING, SETTINGS
from tests.parts.documents import ROOT
from tests.parts.yaml_files import parse_yaml

BASE: Final = "overlays/safe-session.yaml"
LOCAL: Final = "overlays/safe-session-local-ca.yaml"
SHADOW: Final = "overlays/safe-session-shadow.yaml"
AGENT: Final = "overlays/safe-session-agent.yaml"
MODES: Final = {LOCAL: "local", SHADOW: "shadow", AGENT: "local"}
CONTAINERFILE: Final = "Containerfile"
UNITS: Final = tuple(f"scripts/systemd/signer-{name}.service" for name in ("keeper", "api", "notices"))
NOTICES: Final = "overlays/safe-session-notices.yaml"
AGENT_UNIT: Final = "scripts/systemd/signer-agent.service"
DEFAULTS: Final = {name: default for name, default, _ in SETTINGS}
# Without the variable compose stops and prints the message.
VARIABLES: Final = dict.fromkeys((LOCAL, SHADOW), "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR")
VARIABLES[AGENT] = "PLATFORM_RUNTIME_SAFE_SESSION_CA_AGENT_DIR"
TARGETS: Final = dict.fromkeys((LOCAL, SHADOW), DEFAULTS["SIGNER_CA_KEY_FILE"].rpartition("/")[0])
TARGETS[AGENT] = DEFAULTS["SIGNER_CA_AGENT_SOCKET"].rpartition("/")[0]


def read(name: str) -> str:
    return (ROOT / name).read_text()


# --- the base file ---------------------------------------------------------------------------------------------------


def base_faults(text: str) -> list[str]:
    """What the base file has otherwise than it must."""
    service = parse_yaml(text)["services"]["safe-session-api"]
    wanted = {
        "read_only": "true",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "privileged": None,
        "environment": {**service["environment"], "SIGNER_MODE": "vault"},
    }
    return [key for key, value in wanted.items() if service.get(key) != value]


def test_the_base_file_lets_vault_sign_with_few_privileges() -> None:
    assert base_faults(read(BASE)) == []


@pytest.mark.parametrize(
    "before, after, fault",
    [
        ("SIGNER_MODE: vault", "SIGNER_MODE: local", "environment"),
        ("SIGNER_MODE: vault", "", "environment"),
        ("    read_only: true\n    cap_drop", "    cap_drop", "read_only"),
        ("    read_only: true\n    cap_drop", "    read_only: false\n    cap_drop", "read_only"),
        ("cap_drop: [ALL]", "cap_drop: [NET_RAW]", "cap_drop"),
        ("cap_drop: [ALL]", "cap_drop: {ALL}", "cap_drop"),
        ("    cap_drop:", "    privileged: true\n    cap_drop:", "privileged"),
        ("no-new-privileges:true", "no-new-privileges:false", "security_opt"),
    ],
)
def test_each_fault_of_the_base_file_is_found(before: str, after: str, fault: str) -> None:
    assert before in read(BASE)
    assert base_faults(read(BASE).replace(before, after)) == [fault]


# --- the opt-in overlays ---------------------------------------------------------------------------------------------


def places(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every text, and every map or list that is empty, with its place: keys and numbers of list items, with dots."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, f"{place}.{key}".lstrip("."))
    if not isinstance(value, dict | list) or not value:
        yield place, value


def overlay_faults(text: str, name: str) -> list[str]:
    """The places where an overlay differs from one mount of the key, or of its agent, read-only, and the mode."""
    mount = "services.safe-session-api.volumes.0"
    found = dict(places(parse_yaml(text)))
    wanted = {
        "services.safe-session-api.environment.SIGNER_MODE": MODES[name],
        f"{mount}.type": "bind",
        f"{mount}.target": TARGETS[name],
        f"{mount}.read_only": "true",
        f"{mount}.bind.create_host_path": "false",
        f"{mount}.source": found.get(f"{mount}.source", ""),
    }
    if name == AGENT:
        wanted["services.safe-session-api.environment.SIGNER_CA_KEY_SOURCE"] = "agent"
    source = re.compile(rf"\$\{{{VARIABLES[name]}:\?[^{{}}]+\}}")
    faults = [place for place in {**wanted, **found} if found.get(place) != wanted.get(place)]
    return faults if source.fullmatch(wanted[f"{mount}.source"]) else [*faults, f"{mount}.source"]


@pytest.mark.parametrize("name", MODES)
def test_an_overlay_sets_the_mode_and_mounts_the_key_and_nothing_else(name: str) -> None:
    assert overlay_faults(read(name), name) == []


def of(name: str, text: str) -> str:
    """A text of the table, which has the words of the overlays that mount the key's folder, in those of another."""
    if name != AGENT:
        return text
    text = text.replace(MESSAGE, ":?name the folder that holds the socket of the ssh-agent}")
    return text.replace("SAFE_SESSION_CA_KEY_DIR", "SAFE_SESSION_CA_AGENT_DIR").replace(TARGETS[LOCAL], TARGETS[AGENT])


MESSAGE = ":?name the folder that holds the rendered CA key as ca}"


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(
    "before, after, fault",
    [
        (MESSAGE, ":-/run/ca}", "volumes.0.source"),
        (MESSAGE, "}", "volumes.0.source"),
        (MESSAGE, ":?}", "volumes.0.source"),
        ("${PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR" + MESSAGE, "/run/ca", "volumes.0.source"),
        ("PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR" + MESSAGE, "OTHER" + MESSAGE, "volumes.0.source"),
        ("type: bind", "type: volume", "volumes.0.type"),
        ("read_only: true", "read_only: false", "volumes.0.read_only"),
        ("        read_only: true\n", "", "volumes.0.read_only"),
        ("create_host_path: false", "create_host_path: true", "volumes.0.bind.create_host_path"),
        ("target: /run/signer-ca", "target: /etc/ca", "volumes.0.target"),
        ("SIGNER_MODE: ", "SIGNER_MODE: vault # ", "environment.SIGNER_MODE"),
        ("    volumes:\n", "    user: root\n    volumes:\n", "user"),
        ("    volumes:\n", "    ports: []\n    volumes:\n", "ports"),
        ("    volumes:\n", "    tmpfs:\n      - /tmp\n    volumes:\n", "tmpfs.0"),
        ("    environment:\n", "    environment:\n      SIGNER_LISTEN: 0.0.0.0:8222\n", "environment.SIGNER_LISTEN"),
    ],
)
def test_each_fault_of_an_overlay_is_found(name: str, before: str, after: str, fault: str) -> None:
    before, after = of(name, before), of(name, after)
    assert before in read(name)
    assert overlay_faults(read(name).replace(before, after), name) == [f"services.safe-session-api.{fault}"]


def test_the_modes_of_the_overlays_are_not_each_others() -> None:
    assert overlay_faults(read(SHADOW), LOCAL) == ["services.safe-session-api.environment.SIGNER_MODE"]


@pytest.mark.parametrize("after", ["SIGNER_CA_KEY_SOURCE: file", "SIGNER_CA_KEY_FILE: agent"])
def test_an_overlay_with_another_source_of_the_key_is_found(after: str) -> None:
    text = read(AGENT).replace("SIGNER_CA_KEY_SOURCE: agent", after)
    assert "services.safe-session-api.environment.SIGNER_CA_KEY_SOURCE" in overlay_faults(text, AGENT)


# --- settings --------------------------------------------------------------------------------------------------------


def unknown_settings(text: str) -> set[str]:
    return set(re.findall(r"\bSIGNER_[A-Z0-9_]+", text)) - DEFAULTS.keys() - {FINGERPRINT_SETTING[0]}


@pytest.mark.parametrize("name", [BASE, LOCAL, SHADOW, AGENT, NOTICES, CONTAINERFILE, *UNITS, AGENT_UNIT])
def test_only_settings_that_exist_are_named(name: str) -> None:
    assert re.search(r"\bSIGNER_[A-Z]", read(name))
    assert unknown_settings(read(name)) == set()


@pytest.mark.parametrize(
    "name, before, after",
    [
        (BASE, "SIGNER_LISTEN:", "SIGNER_LISTN:"),
        (CONTAINERFILE, "SIGNER_API_USER", "SIGNER_APIUSER"),
        (UNITS[1], "SIGNER_RUN_DIR", "SIGNER_RUNDIR"),
    ],
)
def test_a_misspelt_setting_is_found(name: str, before: str, after: str) -> None:
    assert before in read(name)
    assert unknown_settings(read(name).replace(before, after)) == {after.rstrip(":")}


# --- the reader ------------------------------------------------------------------------------------------------------


def test_scalars_stay_texts() -> None:
    assert parse_yaml('a: true\nb: ["1", 0640, yes]\nc:\n') == {"a": "true", "b": ["1", "0640", "yes"], "c": ""}


@pytest.mark.parametrize(
    "text", ["a: b\na: c", "a: !reset b", "a: {<<: {b: c}}", "a: !!bool true", "a\n---\nb", "a: ["]
)
def test_what_an_engine_may_read_otherwise_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
