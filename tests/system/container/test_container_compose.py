"""The compose files as podman-compose merges them: what each overlay changes, and what no merge may ever hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parts import missing
from tests.parts.container import API, BASE_FILE, FOLDER_VARIABLE, OVERLAY_FILE, Ended, Engine

yaml: Any = pytest.importorskip(
    "yaml", reason="no PyYAML: the Python package podman-compose, which needs it, is not installed"
)

pytestmark = missing.needs_podman_compose

Config = dict[str, Any]
KEY_FOLDER = "/run/safe-session/ca-key"
SHADOW_FILE = OVERLAY_FILE.with_name("safe-session-shadow.yaml")
AGENT_FILE = OVERLAY_FILE.with_name("safe-session-agent.yaml")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Ended]:
    """Merges files with podman-compose."""
    engine = Engine(tmp_path / "engine")
    return lambda *files, **variables: engine.compose(files, "config", environ=variables)


@pytest.fixture
def base(config: Callable[..., Ended]) -> Config:
    return read(config(BASE_FILE))


@pytest.fixture
def merged(config: Callable[..., Ended]) -> Config:
    return read(config(BASE_FILE, OVERLAY_FILE, **{FOLDER_VARIABLE: KEY_FOLDER}))


@pytest.fixture
def shadowed(config: Callable[..., Ended]) -> Config:
    return read(config(BASE_FILE, SHADOW_FILE, **{FOLDER_VARIABLE: KEY_FOLDER}))


def read(done: Ended) -> Config:
    assert done.status == 0, done.err
    found: Config = yaml.safe_load(done.out)
    return found


def test_the_overlay_with_an_agent_adds_the_folder_of_its_socket_and_nothing_else(
    base: Config, config: Callable[..., Ended]
) -> None:
    found = read(config(BASE_FILE, AGENT_FILE, PLATFORM_RUNTIME_SAFE_SESSION_CA_AGENT_DIR="/run/agent"))
    expected = copy.deepcopy(base)
    expected["services"][API]["environment"] |= {"SIGNER_MODE": "local", "SIGNER_CA_KEY_SOURCE": "agent"}
    expected["services"][API]["volumes"].append(
        {
            "type": "bind",
            "source": "/run/agent",
            "target": "/run/signer-agent",
            "read_only": True,
            "bind": {"create_host_path": False},
        }
    )
    assert found == expected
    without = config(BASE_FILE, AGENT_FILE)
    assert without.status != 0
    assert "PLATFORM_RUNTIME_SAFE_SESSION_CA_AGENT_DIR" in without.err + without.out


@pytest.mark.parametrize("which, mode", [("merged", "local"), ("shadowed", "shadow")])
def test_an_overlay_changes_the_mode_and_adds_the_key_and_nothing_else(
    base: Config, which: str, mode: str, request: pytest.FixtureRequest
) -> None:
    expected = copy.deepcopy(base)
    assert expected["services"][API]["environment"]["SIGNER_MODE"] == "vault"
    expected["services"][API]["environment"]["SIGNER_MODE"] = mode
    expected["services"][API]["volumes"].append(
        {
            "type": "bind",
            "source": KEY_FOLDER,
            "target": "/run/signer-ca",
            "read_only": True,
            "bind": {"create_host_path": False},
        }
    )
    assert request.getfixturevalue(which) == expected


def test_the_base_alone_asks_for_no_key(base: Config) -> None:
    assert "SIGNER_CA_KEY_FILE" not in base["services"][API]["environment"]
    assert not any("signer-ca" in str(volume) for volume in base["services"][API]["volumes"])


@pytest.mark.parametrize("overlay", [OVERLAY_FILE, SHADOW_FILE], ids=["local", "shadow"])
@pytest.mark.parametrize("variables", [{}, {FOLDER_VARIABLE: ""}], ids=["unset", "empty"])
def test_an_overlay_without_its_variable_stops_with_its_message(
    config: Callable[..., Ended], variables: dict[str, str], overlay: Path
) -> None:
    done = config(BASE_FILE, overlay, **variables)
    assert done.status != 0
    assert done.out.strip() == ""
    assert f"{FOLDER_VARIABLE} is missing a value: name the folder that holds the rendered CA key as ca" in done.err


# --- merge blocker: no writable secret mount -------------------------------------------------------------------------


def writable_secrets(merged: Config) -> list[str]:
    """Mounts of a merged configuration through which something of the host could be written or made."""
    found = []
    for name, service in merged["services"].items():
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                source, _, rest = volume.partition(":")
                if source in merged.get("volumes", {}) and source == "ledger":
                    continue
                found.append(f"{name}: {source} at {rest}, in the short form")
            elif volume.get("type") != "bind" or volume.get("read_only") is not True:
                found.append(f"{name}: {volume.get('source')} at {volume.get('target')} can be written")
            elif volume.get("bind", {}).get("create_host_path") is not False:
                found.append(f"{name}: {volume['source']} would be made where it is missing")
        others = ("secrets", "configs", "volumes_from", "devices")
        found += [f"{name}: {key} bring mounts of their own" for key in others if service.get(key)]
    found += [f"volume {name} is configured" for name, options in merged.get("volumes", {}).items() if options]
    return found


def test_no_secret_mount_of_a_merged_configuration_can_be_written(
    base: Config, merged: Config, shadowed: Config
) -> None:
    assert writable_secrets(base) == []
    for config in (merged, shadowed):
        assert writable_secrets(config) == []
        assert sum(str(volume).count("signer-ca") for volume in config["services"][API]["volumes"]) == 1


def _drop_read_only(config: Config) -> None:
    del config["services"][API]["volumes"][-1]["read_only"]


def _say_writable(config: Config) -> None:
    config["services"][API]["volumes"][-1]["read_only"] = "false"


def _let_it_be_made(config: Config) -> None:
    del config["services"][API]["volumes"][-1]["bind"]


def _short(config: Config) -> None:
    config["services"][API]["volumes"].append("/run:/host-run")


def _disguised_volume(config: Config) -> None:
    config["volumes"]["ledger"] = {"driver_opts": {"type": "none", "o": "bind", "device": "/run"}}


def _other_service(config: Config) -> None:
    config["services"]["other"] = {"volumes": [{"type": "bind", "source": "/run", "target": "/x"}]}


def _secret(config: Config) -> None:
    config["services"][API]["secrets"] = ["ca"]


@pytest.mark.parametrize(
    "change",
    [_drop_read_only, _say_writable, _let_it_be_made, _short, _disguised_volume, _other_service, _secret],
)
def test_the_check_for_writable_secret_mounts_sees_each_way_to_make_one(
    merged: Config, change: Callable[[Config], None]
) -> None:
    change(merged)
    assert len(writable_secrets(merged)) == 1


# --- hardening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["base", "merged", "shadowed"])
def test_the_service_is_hardened_in_all(which: str, request: pytest.FixtureRequest) -> None:
    config: Config = request.getfixturevalue(which)
    assert list(config["services"]) == [API]
    service = config["services"][API]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert sorted(service["cap_add"]) == ["CHOWN", "KILL", "SETGID", "SETUID"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["network_mode"] == "host"
    assert not {"privileged", "user", "pid", "ipc", "userns_mode", "ports", "group_add"} & set(service)


def test_it_listens_on_loopback_where_it_does_today(base: Config) -> None:
    assert base["services"][API]["environment"]["SIGNER_LISTEN"] == "127.0.0.1:8222"
