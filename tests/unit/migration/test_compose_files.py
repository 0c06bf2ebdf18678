"""Every file that compose reads is under the plan's digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.errors import BadFile
from signer.migration.compose_files import ABSENT, digest_of, digests_read, parse_compose, services_of

BASE = """\
include:
  - included.yaml
  - path: [more.yaml]
    env_file: more.env
services:
  safe-session-api:
    image: x
    extends: {file: sub/extended.yaml, service: it}
  vault:
    env_file:
      - vault.env
      - {path: optional.env, required: false}
    label_file: labels
"""
FILES = {
    "included.yaml": "services:\n  a:\n    env_file: included.env\n",
    "more.yaml": "services: {}\n",
    "sub/extended.yaml": "services:\n  it:\n    privileged: true\n    extends: {file: deeper.yaml, service: x}\n",
    "sub/deeper.yaml": "services:\n  x:\n    pid: host\n    env_file: deep.env\n",
    "more.env": "A=1\n",
    "included.env": "B=1\n",
    "vault.env": "C=1\n",
    "labels": "D=1\n",
    "sub/deep.env": "E=1\n",
    "overlay.yaml": "services:\n  safe-session-api:\n    volumes: !override [x:/y]\n    ports: !reset null\n",
    "base.yaml": BASE,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def read(folder: Path, merged: str = "services: {}\n") -> dict[str, str]:
    return digests_read(folder / "base.yaml", folder / "overlay.yaml", parse_compose(merged, "it"))


def test_audit_4e1_every_file_is_found_however_deep(folder: Path) -> None:
    found = read(folder)
    lost = {name for name in FILES if found.get(str(folder / name), ABSENT) == ABSENT}
    assert lost == {"base.yaml", "overlay.yaml"}, "those two are inputs of the plan by themselves"
    assert found[str(folder / ".env")] == ABSENT
    assert "/.env" in found
    assert found[str(folder / "optional.env")] == ABSENT


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"base.yaml", "overlay.yaml"}))
def test_audit_4e1_a_change_of_any_of_them_is_a_difference(folder: Path, name: str) -> None:
    before = read(folder)
    (folder / name).write_text(FILES[name] + "# changed\n")
    assert read(folder) != before


@pytest.mark.parametrize("name", [".env", "optional.env"])
def test_audit_4e1_a_file_that_comes_later_is_a_difference(folder: Path, name: str) -> None:
    before = read(folder)
    (folder / name).write_text("PODMAN_USERNS=host\n")
    assert read(folder) != before


def test_audit_4e1_files_that_only_the_merged_form_names_are_read(folder: Path) -> None:
    (folder / "late.env").write_text("X=1\n")
    merged = f"services:\n  vault:\n    env_file: [{folder}/late.env]\n"
    assert read(folder, merged)[str(folder / "late.env")] != ABSENT


@pytest.mark.parametrize(
    "text", ["include: ['${X}.yaml']\n", "- a\n", "just text\n", "a: [\n", "a: *nowhere\n", "", "[" * 5000]
)
def test_what_is_no_compose_file_or_cannot_be_followed_is_refused(folder: Path, text: str) -> None:
    (folder / "more.yaml").write_text(text)
    with pytest.raises(BadFile) as refused:
        read(folder)
    assert refused.value.code == "compose_file_malformed"


def test_files_that_name_each_other_end(folder: Path) -> None:
    (folder / "more.yaml").write_text("include: [included.yaml]\n")
    (folder / "included.yaml").write_text("include: [more.yaml]\n")
    assert str(folder / "more.yaml") in read(folder)


def test_a_digest_is_of_all_values_and_their_types() -> None:
    values = [{"a": 1}, {"a": "1"}, {"a": True}, {"a": [1]}, {1: "a"}, {"1": "a"}, {"a": 1.5}, {"a": None}, {}]
    assert len({digest_of(value) for value in values}) == len(values)


def test_services_are_found_and_odd_ones_are_empty() -> None:
    assert services_of({"services": {"a": {"image": "x"}, "b": None}}) == {"a": {"image": "x"}, "b": {}}
    assert services_of({"services": []}) == services_of({}) == {}
