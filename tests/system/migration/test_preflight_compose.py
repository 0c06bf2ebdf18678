"""The preflight's checks of the merged compose configuration: who else reaches the key, and what is not understood."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.parts import missing
from tests.parts.hosts import DATA, FOLDER_VARIABLE, SCRIPT, SERVICE, Host

yaml: Any = pytest.importorskip(
    "yaml", reason="no PyYAML: the Python package podman-compose, which needs it, is not installed"
)

Config = dict[str, Any]
Change = Callable[[Config, Host], None]
TABLE: dict[str, tuple[set[str], Change]] = {}


def a_configuration_where(*codes: str) -> Callable[[Change], Change]:
    """Adds a merged configuration to the table; `codes` are all that is not `ok` with it."""

    def add(change: Change) -> Change:
        TABLE[change.__name__] = (set(codes), change)
        return change

    return add


def _service(config: Config) -> Config:
    found: Config = config["services"][SERVICE]
    return found


def _key_mount(config: Config) -> Config:
    found: Config = _service(config)["volumes"][-1]
    return found


@a_configuration_where("overlay_mount_missing")
def the_mount_is_missing(config: Config, host: Host) -> None:
    _service(config)["volumes"].pop()


@a_configuration_where("overlay_mount_missing")
def another_file_is_mounted(config: Config, host: Host) -> None:
    _key_mount(config)["source"] = str(host.folder / "etc" / "principals")


@a_configuration_where("compose_not_allowed", "overlay_mount_missing")
def there_are_no_volumes(config: Config, host: Host) -> None:
    _service(config)["volumes"] = []


@a_configuration_where("compose_not_allowed", "overlay_mount_not_read_only")
def the_mount_is_writable(config: Config, host: Host) -> None:
    del _key_mount(config)["read_only"]


@a_configuration_where("compose_not_allowed", "overlay_mount_not_read_only")
def the_mount_says_that_it_is_writable(config: Config, host: Host) -> None:
    _key_mount(config)["read_only"] = False


@a_configuration_where("compose_not_allowed", "overlay_mount_may_be_created", "overlay_mount_not_read_only")
def the_mount_is_short_and_writable(config: Config, host: Host) -> None:
    _service(config)["volumes"][-1] = f"{host.key.parent}:/run/signer-ca"


@a_configuration_where("compose_not_allowed", "overlay_mount_may_be_created")
def the_mount_is_short(config: Config, host: Host) -> None:
    _service(config)["volumes"][-1] = f"{host.key.parent}:/run/signer-ca:ro,z"


@a_configuration_where("overlay_mount_may_be_created")
def the_engine_may_make_a_folder_of_it(config: Config, host: Host) -> None:
    _key_mount(config)["bind"] = {"create_host_path": True}


@a_configuration_where()
def only_the_overlay_says_that_the_engine_must_not_create_it(config: Config, host: Host) -> None:
    _key_mount(config)["bind"] = {}


@a_configuration_where("overlay_mount_may_be_created")
def nobody_says_whether_the_engine_may_create_it(config: Config, host: Host) -> None:
    _key_mount(config)["bind"] = {}
    host.change("overlays/local-ca.yaml", "create_host_path: false", "propagation: rprivate")


@a_configuration_where("compose_not_allowed", "overlay_mount_twice")
def it_is_mounted_in_two_places(config: Config, host: Host) -> None:
    _service(config)["volumes"].append(_key_mount(config) | {"target": "/elsewhere"})


@a_configuration_where("compose_not_allowed", "overlay_mount_twice")
def its_folder_is_mounted_twice(config: Config, host: Host) -> None:
    _service(config)["volumes"].insert(0, _key_mount(config) | {"target": "/folder"})


@a_configuration_where("compose_not_allowed", "overlay_mount_twice")
def the_file_is_mounted_as_well(config: Config, host: Host) -> None:
    _service(config)["volumes"].append(f"{host.key}:/file:ro")


@a_configuration_where("compose_not_allowed", "overlay_mount_missing", "overlay_mount_twice")
def the_file_is_mounted_instead(config: Config, host: Host) -> None:
    _key_mount(config).update(source=str(host.key), target="/run/signer-ca/ca")


@a_configuration_where("compose_not_allowed", "overlay_mount_twice")
def a_folder_above_it_is_mounted_read_only_as_well(config: Config, host: Host) -> None:
    _service(config)["volumes"].append(f"{host.memory}:/folder:ro")


@a_configuration_where("compose_not_allowed", "overlay_mount_twice")
def it_is_a_secret_of_compose_as_well(config: Config, host: Host) -> None:
    config["secrets"] = {"ca": {"file": str(host.key)}}
    _service(config)["secrets"] = [{"source": "ca", "target": "/run/secrets/ca"}]


@a_configuration_where("compose_not_allowed", "overlay_mount_twice")
def it_is_a_secret_by_its_short_name(config: Config, host: Host) -> None:
    config["secrets"] = {"ca": {"file": str(host.key)}}
    _service(config)["secrets"] = ["ca"]


@a_configuration_where("compose_not_allowed", "overlay_key_reached_by_writable_mount")
def its_folder_can_be_written(config: Config, host: Host) -> None:
    _service(config)["volumes"].insert(0, {"type": "bind", "source": f"{host.key.parent}/", "target": "/folder"})


@a_configuration_where("compose_not_allowed", "overlay_key_reached_by_writable_mount")
def a_folder_far_above_it_can_be_written(config: Config, host: Host) -> None:
    _service(config)["volumes"].append(f"{host.memory.parent}:/far")


@a_configuration_where("compose_not_allowed", "overlay_key_reached_by_writable_mount")
def the_whole_host_is_mounted(config: Config, host: Host) -> None:
    _service(config)["volumes"].append({"type": "bind", "source": "/", "target": "/host", "read_only": False})


@a_configuration_where("compose_not_allowed", "overlay_key_reached_by_writable_mount")
def a_link_leads_to_its_folder(config: Config, host: Host) -> None:
    (host.folder / "link").symlink_to(host.key.parent)
    _service(config)["volumes"].append(f"{host.folder}/link:/x")


@a_configuration_where("ca_key_has_links", "compose_not_allowed", "overlay_key_reached_by_writable_mount")
def its_other_name_is_mounted(config: Config, host: Host) -> None:
    (host.memory / "other").hardlink_to(host.key)
    _service(config)["volumes"].append(f"{host.memory}/other:/x")


@a_configuration_where("compose_not_allowed", "overlay_key_reached_by_writable_mount")
def dots_lead_to_its_folder(config: Config, host: Host) -> None:
    (host.memory / "sub").mkdir()
    _service(config)["volumes"].append(f"{host.memory}/sub/../safe-session:/x")


@a_configuration_where("compose_not_allowed", "overlay_key_reached_by_writable_mount")
def a_relative_path_leads_to_its_folder(config: Config, host: Host) -> None:
    up = os.path.relpath(host.key.parent, host.folder / "overlays")
    _service(config)["volumes"].append(f"{up}:/x")


@a_configuration_where("compose_not_allowed", "overlay_key_reached_by_writable_mount")
def a_named_volume_is_its_folder(config: Config, host: Host) -> None:
    options = {"type": "none", "o": "bind", "device": f"{host.key.parent}/"}
    config["volumes"]["sly"] = {"driver": "local", "driver_opts": options}
    _service(config)["volumes"].append({"type": "volume", "source": "sly", "target": "/x"})


@a_configuration_where(
    "compose_other_service_not_named", "compose_other_service_reaches", "overlay_key_reached_by_writable_mount"
)
def another_service_can_write_it(config: Config, host: Host) -> None:
    config["services"]["other"] = {"image": "x", "volumes": [f"{host.key.parent}:/x"]}


@a_configuration_where(
    "compose_other_service_not_named", "compose_other_service_reaches", "overlay_key_reached_by_other_service"
)
def another_service_can_read_it(config: Config, host: Host) -> None:
    config["services"]["other"] = {"image": "x", "volumes": ["/:/host:ro"]}


@a_configuration_where(
    "compose_other_service_not_named", "compose_other_service_reaches", "overlay_key_reached_by_other_service"
)
def another_service_takes_all_its_volumes_to_read(config: Config, host: Host) -> None:
    config["services"]["other"] = {"image": "x", "volumes_from": [f"{SERVICE}:ro"]}


@a_configuration_where(
    "compose_other_service_not_named", "compose_other_service_reaches", "overlay_key_reached_by_writable_mount"
)
def another_service_takes_all_its_volumes(config: Config, host: Host) -> None:
    config["services"]["other"] = {"image": "x", "volumes_from": [SERVICE]}


@a_configuration_where()
def neighbours_of_its_folder_are_mounted_in_a_named_service(config: Config, host: Host) -> None:
    host.arguments += ["--other-service", "other"]
    for name in ("safe-session2", "safe", "other"):
        (host.memory / name).mkdir()
    mounts = [f"{host.memory}/{name}:/{name}" for name in ("safe-session2", "safe", "other")]
    config["services"]["other"] = {"image": "x", "volumes": [*mounts, f"{host.folder}/home:/x:ro", "named:/y"]}
    config["services"]["other"] |= {"tmpfs": ["/z"], "environment": {"A": "b"}}
    config["volumes"]["named"] = {}


@a_configuration_where("compose_not_allowed", "overlay_mount_target_differs")
def the_service_looks_elsewhere_for_it(config: Config, host: Host) -> None:
    _service(config)["environment"]["SIGNER_CA_KEY_FILE"] = "/run/secrets/ca"


@a_configuration_where("compose_not_allowed", "overlay_mount_target_differs")
def it_is_mounted_elsewhere(config: Config, host: Host) -> None:
    del _service(config)["environment"]["SIGNER_CA_KEY_FILE"]
    _key_mount(config)["target"] = "/elsewhere"


@a_configuration_where()
def the_environment_is_a_list(config: Config, host: Host) -> None:
    variables = _service(config)["environment"]
    _service(config)["environment"] = [f"{name}={value}" for name, value in variables.items()]


@a_configuration_where("overlay_mode_must_be_local")
def the_mode_is_still_vault(config: Config, host: Host) -> None:
    _service(config)["environment"]["SIGNER_MODE"] = "vault"


@a_configuration_where("overlay_mode_must_be_local")
def no_mode_is_said(config: Config, host: Host) -> None:
    del _service(config)["environment"]


@a_configuration_where("compose_not_allowed", "service_not_hardened")
def its_root_can_be_written(config: Config, host: Host) -> None:
    _service(config)["read_only"] = False


@a_configuration_where("compose_not_allowed")
def it_is_privileged(config: Config, host: Host) -> None:
    _service(config)["privileged"] = True


@a_configuration_where("service_not_hardened")
def it_keeps_all_capabilities(config: Config, host: Host) -> None:
    del _service(config)["cap_drop"]


@a_configuration_where("compose_not_allowed", "container_capabilities_differ")
def it_gets_a_capability_too_many(config: Config, host: Host) -> None:
    _service(config)["cap_add"].append("CAP_SYS_ADMIN")


@a_configuration_where("compose_not_allowed", "service_not_hardened")
def it_may_gain_privileges(config: Config, host: Host) -> None:
    _service(config)["security_opt"] = ["no-new-privileges:false", "seccomp=x"]


@a_configuration_where("image_missing")
def its_image_is_not_here(config: Config, host: Host) -> None:
    _service(config)["image"] = "localhost/other:latest"


@a_configuration_where("image_missing")
def it_names_no_image(config: Config, host: Host) -> None:
    del _service(config)["image"]


@a_configuration_where("compose_service_missing")
def it_has_another_name(config: Config, host: Host) -> None:
    config["services"]["signer"] = config["services"].pop(SERVICE)


@a_configuration_where("compose_service_missing")
def there_is_nothing_in_it(config: Config, host: Host) -> None:
    del config["services"]


@pytest.mark.parametrize("form", ["podman-compose", "docker-compose"])
@pytest.mark.parametrize("name", TABLE)
def test_a_merged_configuration_is_told_as_it_is(host: Host, name: str, form: str) -> None:
    expected, change = TABLE[name]
    if form == "docker-compose":
        host.use_docker()
    config = yaml.safe_load((host.folder / "merged.yaml").read_text())
    change(config, host)
    host.write("merged.yaml", _dump(config, form))
    told = host.run()
    assert told.codes("FAIL", "warn") == expected, told.stdout
    assert told.returncode == (1 if told.codes("FAIL") else 0)


# Lists indented under their key, as Go writes them.
_INDENTED = type(
    "Indented",
    (yaml.SafeDumper,),
    {"increase_indent": lambda self, flow=False, indentless=False: yaml.SafeDumper.increase_indent(self, flow, False)},
)


def _dump(config: Config, form: str) -> str:
    return str(yaml.dump(config, Dumper=_INDENTED if form == "docker-compose" else yaml.SafeDumper))


@pytest.mark.parametrize(
    "text",
    [
        "services:\n  safe-session-api: {image: x}\n",
        "services:\n  safe-session-api:\n    image: >-\n      folded\n",
        "services:\n  safe-session-api:\n    image: !tag x\n",
        "services:\n\tsafe-session-api:\n",
        "services:\n  safe-session-api: *nowhere\n",
        'services:\n  safe-session-api:\n    image: "open\n',
        "just words\n",
        "services:\n  safe-session-api:\n    user: x\n      read_only: true\n",
        "services:\n  ? safe-session-api\n  : x\n",
    ],
)
def test_what_is_not_understood_is_not_ready(host: Host, text: str) -> None:
    host.write("merged.yaml", text)
    told = host.run()
    assert told.codes("FAIL") == {"compose_config_not_understood"}
    assert {"overlay_mount", "overlay_mode", "service_hardened", "container_user"} <= told.codes("skip")


def test_compose_that_fails_is_not_ready_and_its_words_stay_away(host: Host) -> None:
    host.write("compose-fails", "")
    told = host.run()
    assert told.codes("FAIL") == {"compose_merge_failed", "overlay_stops_for_another_reason"}
    assert "cannot do that" not in told.stdout + told.stderr


def test_overlay_that_does_without_its_variable_is_not_ready(host: Host) -> None:
    host.write("compose-default", "")
    assert host.run().codes("FAIL", "warn") == {"overlay_merges_without_variable"}


def test_overlay_that_stops_but_does_not_name_its_variable_is_not_ready(host: Host) -> None:
    host.write("compose-message", "something is missing\n")
    assert host.run().codes("FAIL", "warn") == {"overlay_stops_for_another_reason"}


@pytest.mark.parametrize(
    "file, code", [("safe-session.yaml", "compose_base_missing"), ("local-ca.yaml", "compose_overlay_missing")]
)
def test_missing_file_is_named(host: Host, file: str, code: str) -> None:
    (host.folder / "overlays" / file).unlink()
    told = host.run()
    assert told.codes("FAIL", "warn") == {code}
    assert file in told.detail(code)
    assert {"compose_merged", "overlay_needs_variable"} <= told.codes("skip")


def test_host_without_any_compose_is_not_ready(host: Host) -> None:
    host.environ |= {"PLATFORM_RUNTIME_COMPOSE": "no-such-compose --x", "PLATFORM_RUNTIME_ENGINE": "podman"}
    assert host.run().codes("FAIL") == {"compose_missing"}


def test_host_without_an_engine_is_not_ready(host: Host) -> None:
    host.environ["PLATFORM_RUNTIME_ENGINE"] = "no-such-engine"
    told = host.run()
    assert told.codes("FAIL") == {"engine_missing"}
    assert {"image_present", "container_mode"} <= told.codes("skip")


@pytest.mark.parametrize(
    "compose, found",
    [("", "docker compose 2.40, engine docker"), ("podman-compose", "podman-compose 2.40, engine podman")],
)
def test_compose_command_is_looked_for_or_named(host: Host, compose: str, found: str) -> None:
    host.use_docker()
    host.environ["PLATFORM_RUNTIME_COMPOSE"] = compose
    assert host.run().detail("compose_found") == found


def test_key_reached_by_another_mount_of_its_file_system_is_found(host: Host) -> None:
    """The host shows the key's folder a second time, below a folder that the container may write."""
    alias = host.folder / "alias"
    (alias / "deep").mkdir(parents=True)
    host.over[str(alias / "deep")] = host.key.parent
    host.change("merged.yaml", "- ledger:/var/lib/signer", f"- {alias}:/var/lib/signer")
    told = host.run()
    assert told.codes("FAIL", "warn") == {"compose_not_allowed", "overlay_key_reached_by_writable_mount"}


def test_key_file_mounted_alone_in_another_place_is_found(host: Host) -> None:
    other = host.write("seemingly-harmless", "")
    host.over[str(other)] = host.key
    host.change("merged.yaml", "- ledger:/var/lib/signer", f"- {host.folder}:/var/lib/signer")
    assert host.run().codes("FAIL", "warn") == {"compose_not_allowed", "overlay_key_reached_by_writable_mount"}


# --- the real compose commands -----------------------------------------------------------------------------------


def _use_real_podman_compose(host: Host) -> None:
    (host.folder / "bin" / "podman-compose").unlink()
    real = Path(sys.executable).with_name("podman-compose")
    host.environ["PLATFORM_RUNTIME_COMPOSE"] = str(real)


@missing.needs_podman_compose
def test_real_merge_is_ready(host: Host) -> None:
    _use_real_podman_compose(host)
    told = host.run()
    assert told.codes("FAIL", "warn", "skip") == set(), told.stdout


@missing.needs_root
@missing.needs_podman_compose
def test_recorded_merge_is_still_what_podman_compose_prints() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("podman-compose"), "-f", DATA / "base.yaml", "-f", DATA / "overlay.yaml",
         "config"],
        capture_output=True, text=True, env=os.environ | {FOLDER_VARIABLE: "KEYDIR"},
    )  # fmt: skip
    assert done.stdout.strip() == (DATA / "podman-compose.yaml").read_text().strip()


@missing.needs_docker_compose
def test_recorded_merge_is_still_what_docker_compose_prints() -> None:
    done = subprocess.run(
        [missing.DOCKER_COMPOSE, "-f", DATA / "base.yaml", "-f", DATA / "overlay.yaml", "-p", "overlays", "config"],
        capture_output=True, text=True, env=os.environ | {FOLDER_VARIABLE: "/KEYDIR"},
    )  # fmt: skip
    assert done.stdout.replace("/KEYDIR", "KEYDIR") == (DATA / "docker-compose.yaml").read_text()


@missing.needs_podman_compose
def test_overlays_of_this_repository_are_what_it_looks_at_unless_told_and_are_ready(host: Host) -> None:
    _use_real_podman_compose(host)
    host.arguments = []
    host.write("image", "localhost/signer:latest")
    (host.folder / "container.txt").unlink()
    told = host.run()
    assert told.codes("FAIL", "warn") == {"container_not_running"}, told.stdout
    assert "overlays/safe-session.yaml, " in told.detail("compose_files")


REAL = {
    "a writable mount": ("read_only: true\n", "read_only: false\n", "overlay_mount_not_read_only"),
    "a mount of the folder too": (
        "    volumes:\n", "    volumes:\n      - FOLDER/..:/folder\n", "overlay_key_reached_by_writable_mount",
    ),
    "no mount": ("source: ${", "source: /etc/hostname${NOTHING-} # ${", "overlay_mount_missing"),
    "a wrong path": (":?name the folder of the rendered CA key}", ":+/etc/hostname}", "overlay_mount_missing"),
    "a default": (":?name the folder of the rendered CA key", ":-/run/default", "overlay_merges_without_variable"),
    "no local mode": ("SIGNER_MODE: local", "OTHER: x", "overlay_mode_must_be_local"),
    "capabilities": ("    volumes:\n", "    cap_add: [NET_ADMIN]\n    volumes:\n", "compose_not_allowed"),
}  # fmt: skip


@missing.needs_podman_compose
@pytest.mark.parametrize("name", REAL)
def test_real_merge_of_a_wrong_overlay_is_not_ready(host: Host, name: str) -> None:
    _use_real_podman_compose(host)
    before, after, code = REAL[name]
    host.change("overlays/local-ca.yaml", before, after.replace("FOLDER", str(host.key.parent)))
    assert code in host.run().codes("FAIL")


@missing.needs_podman_compose
def test_default_in_an_env_file_beside_the_base_is_found(host: Host) -> None:
    _use_real_podman_compose(host)
    host.write("overlays/.env", f"{FOLDER_VARIABLE}={host.key.parent}\n")
    assert host.run().codes("FAIL") == {"overlay_merges_without_variable"}


@missing.needs_podman_compose
def test_real_merge_with_an_odd_key_path_is_ready(host: Host) -> None:
    _use_real_podman_compose(host)
    folder = host.memory / ("a long name with blanks, 'quotes', \"more\", #1 and an ü: " + "x" * 60)
    folder.mkdir()
    host.key.rename(folder / "ca")
    host.key = folder / "ca"
    host.change("container.txt", 'safe-session"', 'elsewhere"')
    told = host.run()
    assert told.codes("FAIL", "warn") == set(), told.stdout


# --- the reader of YAML against PyYAML ----------------------------------------------------------------------------

_TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00\x1f", exclude_categories=["Cs"]), max_size=100
).filter(lambda text: "\r" not in text)
_WORD = st.from_regex(r"[A-Za-z_][A-Za-z0-9_./-]{0,20}", fullmatch=True)
_NODE = st.recursive(
    st.one_of(_TEXT, _WORD, st.sampled_from(["a: b", "- x", "# no", "x #y", "it's", '"', "/a:/b:ro", "~", "true", ""])),
    lambda inner: st.lists(inner, min_size=1, max_size=4) | st.dictionaries(_WORD, inner, min_size=1, max_size=4),
    max_leaves=12,
)
_READ = f"""
source {SCRIPT}
mapfile -t config_lines
parse_config || exit 3
for place in "${{places[@]}}"; do printf '%s\\0%s\\0' "$place" "${{config[$place]}}"; done
"""


def _flat(node: Any, place: str = "") -> dict[str, str]:
    found = {place: ""} if place else {}
    if isinstance(node, dict):
        for name, value in node.items():
            found |= _flat(value, f"{place}\x1f{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            found |= _flat(value, f"{place}\x1f{index}")
    else:
        found[place] = node
    return found


@pytest.mark.parametrize("form", ["podman-compose", "docker-compose"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(node=st.dictionaries(_WORD, _NODE, min_size=1, max_size=4))
def test_yaml_is_read_as_pyyaml_reads_it(form: str, node: dict[str, Any]) -> None:
    text = _dump(node, form)
    done = subprocess.run(["bash", "-c", _READ], input=text.encode(), capture_output=True)
    assert done.returncode == 0, (text, done.stderr)
    parts = done.stdout.decode().split("\0")[:-1]
    assert dict(zip(parts[::2], parts[1::2], strict=True)) == _flat(yaml.safe_load(text))


def test_yaml_of_go_is_read() -> None:
    """Literal blocks and anchors, which PyYAML writes seldom or never."""
    text = (
        "a: &x\n    b: |-\n        one\n         two\n\n        three\n    c: |\n        end\n"
        'l:\n    - &y\n      k: v\n    - *y\nd: *x\ne: "tab\\there \\U0001F511"\nf: last\n'
    )
    done = subprocess.run(["bash", "-c", _READ], input=text.encode(), capture_output=True)
    parts = done.stdout.decode().split("\0")[:-1]
    assert dict(zip(parts[::2], parts[1::2], strict=True)) == _flat(yaml.safe_load(text)), done.stderr
