"""The pages on containers and units, compared with the compose files, the Containerfile and the units."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
TEXT = "".join((ROOT / "runbooks" / "install" / f"{name}.md").read_text() for name in ("container", "systemd"))
FILES = sorted((ROOT / "overlays").glob("*.yaml"))
OVERLAYS = "".join(path.read_text() for path in FILES)


def test_variables_and_their_defaults_are_those_of_the_compose_files() -> None:
    told = re.findall(r"^\| `(PLATFORM_\w+)` \| ?(.*?) ?\|", TEXT, re.MULTILINE)
    real = set(re.findall(r"\$\{(\w+):([-?])([^}]*)\}", OVERLAYS))
    assert told == sorted(
        (name, "required by the overlay" if sign == "?" else f"`{default}`" if default else "")
        for name, sign, default in real
    )


def test_numbers_of_the_users_are_those_of_the_image() -> None:
    (users,) = re.findall(r"for user in (.*); do", (ROOT / "Containerfile").read_text())
    assert users.split() == ["signer-keeper:8221", "signer-api:8222", "signer-notices:8223"]
    for user in users.split():
        name, number = user.split(":")
        assert f"`{name}`, {number}" in TEXT
    assert "# token, 0400, owned by 8221;" in OVERLAYS


def test_capabilities_are_those_of_the_base_file() -> None:
    (added,) = re.findall(r"^    cap_add:\n((?:      - .*\n)+)", OVERLAYS, re.MULTILINE)
    real = {line.split()[1] for line in added.splitlines()}
    (told,) = re.findall(r"capabilities are (.*?)\(", TEXT.replace("\n", " "))
    assert set(re.findall(r"`([A-Z]+)`", told)) == real


def test_paths_of_the_units_are_told() -> None:
    for name in ("signer-keeper", "signer-api", "signer-notices"):
        unit = (ROOT / "scripts" / "systemd" / f"{name}.service").read_text()
        assert name in TEXT
        assert "EnvironmentFile=-/etc/signer/environment\n" in unit
        assert "ExecStart=/opt/signer/.venv/bin/python " in unit
    assert "`/etc/signer/environment`" in TEXT
    assert "`/opt/signer`" in TEXT


def test_named_scripts_and_files_exist() -> None:
    named = set(re.findall(r"\b(?:scripts|overlays|tests)/[\w/.-]*\w", TEXT))
    assert len(named) >= 5
    assert not [name for name in named if not (ROOT / name).exists()]
