"""A command that calls the service closes its client, which has a thread, also where the service does not answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from signer import http
from signer.http import Watch
from signer.migration.plan import Plan
from tests.parts.command import run
from tests.parts.removal import CONFIG

pytestmark = pytest.mark.unix_socket


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cutover.toml names a service and a Vault that nothing listens for."""
    text = CONFIG.replace("<dir>", str(tmp_path))
    for name in (".safe-session-token", ".vault-token-cutover"):
        text = text.replace(f"/root/{name}", f"{tmp_path}/{name}")
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text("sgn_a_token_of_the_test\n")
    (tmp_path / "cutover.toml").write_text(text.replace('"http://127.0.0.1:8222"', f'"unix:{tmp_path}/api.sock"'))
    config = {"config": {"path": str(tmp_path / "cutover.toml")}}
    for operation in ("cutover", "decommission"):
        plan = Plan(operation, "a title", config, {}, {}, ())
        (tmp_path / f"{operation}.json").write_text(json.dumps(plan.as_json()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signer.cli.moves.vault_state", lambda _file: "gone")  # connects to no port
    return tmp_path


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    """The watches of all clients that the command makes."""
    made: list[Watch] = []

    def make() -> Watch:
        made.append(Watch())
        return made[-1]

    monkeypatch.setattr(http, "Watch", make)
    return made


@pytest.mark.parametrize(
    "words, status",
    [
        ("cutover status --config cutover.toml", 0),
        ("cutover rollback --config cutover.toml --reason test", 1),
        ("cutover apply cutover.json --approve phrase", 3),
        ("decommission status --config cutover.toml", 0),
        ("decommission plan --config cutover.toml", 1),
        ("decommission apply decommission.json --approve phrase", 3),
        ("evidence verify evidence --config cutover.toml", 1),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_command_closes_its_client_where_the_service_is_down(words: str, status: int, watches: list[Watch]) -> None:
    assert run(*words.split()).status == status
    assert watches
    assert not any(watch.is_running for watch in watches)
