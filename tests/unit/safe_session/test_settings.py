"""The settings of safe-session and its token file: every fault is told before anything is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from signer.address import parse_address
from signer.errors import BadSettings
from signer.safe_session.settings import load_settings, load_token

TOKEN = "sgn_secret"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_private_token_file_is_read(token_file: Path, mode: int) -> None:
    token_file.chmod(mode)
    assert load_token(str(token_file)) == TOKEN


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601, 0o620])
def test_a_token_file_that_others_can_use_is_refused(token_file: Path, mode: int) -> None:
    token_file.chmod(mode)
    with pytest.raises(BadSettings) as caught:
        load_token(str(token_file))
    assert caught.value.code == "token_file_mode"
    assert f"{mode:04o}" in caught.value.text
    assert "chmod 0600" in caught.value.hint


def test_a_link_to_a_private_file_is_followed_and_the_file_is_judged(token_file: Path, tmp_path: Path) -> None:
    connection = tmp_path / "connection"
    connection.symlink_to(token_file)
    assert load_token(str(connection)) == TOKEN
    token_file.chmod(0o644)
    with pytest.raises(BadSettings):
        load_token(str(connection))


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"two words", b"sgn_a\nX-Evil: 1", b"sgn_\xc3\xa9", b"sgn_\x00x", b"a\x7f"],
)
def test_a_token_file_without_exactly_one_plain_word_is_refused(token_file: Path, content: bytes) -> None:
    token_file.write_bytes(content)
    with pytest.raises(BadSettings) as caught:
        load_token(str(token_file))
    assert caught.value.code == "token_file_content"
    assert "Evil" not in caught.value.text + caught.value.hint


def test_a_large_token_file_is_refused(token_file: Path) -> None:
    token_file.write_text("x" * 5000)
    with pytest.raises(BadSettings) as caught:
        load_token(str(token_file))
    assert caught.value.code == "token_file_size"


def test_a_folder_or_a_pipe_is_no_token_file_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in (".", "pipe"):
        with pytest.raises(BadSettings) as caught:
            load_token(str(tmp_path / name))
        assert caught.value.code == "token_file_kind"


@pytest.mark.parametrize("path", ["/nowhere/token", "a\0b"])
def test_a_token_file_that_cannot_be_opened_is_named(path: str) -> None:
    with pytest.raises(BadSettings) as caught:
        load_token(path)
    assert caught.value.code == "token_file_unreadable"
    assert caught.value.hint


def test_the_command_line_beats_the_environment(monkeypatch: pytest.MonkeyPatch, token_file: Path) -> None:
    monkeypatch.setenv("SAFE_SESSION_TOKEN_FILE", str(token_file))
    monkeypatch.setenv("SAFE_SESSION_ROLE", "from-environment")
    monkeypatch.delenv("SAFE_SESSION_ADDR", raising=False)
    assert load_settings("from-line").role == "from-line"
    settings = load_settings("")
    assert (settings.role, settings.server.address.text) == ("from-environment", "http://127.0.0.1:8222")
    assert TOKEN not in repr(settings)


@pytest.mark.parametrize("absent", ["SAFE_SESSION_TOKEN_FILE", "SAFE_SESSION_ROLE"])
def test_a_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch, token_file: Path, absent: str) -> None:
    monkeypatch.setenv("SAFE_SESSION_TOKEN_FILE", str(token_file))
    monkeypatch.setenv("SAFE_SESSION_ROLE", "llmops")
    monkeypatch.delenv(absent)
    with pytest.raises(BadSettings) as caught:
        load_settings("")
    assert absent in caught.value.text + caught.value.hint


@pytest.mark.parametrize(
    "text,scheme,host,port",
    [
        ("http://127.0.0.1:8222", "http", "127.0.0.1", 8222),
        ("http://localhost:8222/", "http", "localhost", 8222),
        ("http://[::1]:8222", "http", "::1", 8222),
        ("http://[::1]", "http", "::1", 80),
        ("https://ca.example.org", "https", "ca.example.org", 443),
    ],
)
def test_addresses_are_read(text: str, scheme: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert (address.scheme, address.host, address.port) == (scheme, host, port)


def test_a_socket_is_an_address() -> None:
    assert parse_address("unix:/run/signer/api.sock").path == "/run/signer/api.sock"


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:8222", "http:", "http://", "http://:1", "http://h:", "http://h:x", "http://h:0", "http://h:65536",
        "http://h/path", "http://user:pw@h", "http://h?x", "http://h\r\nX: 1", "ftp://h", "unix:run/x", "unix:",
        "unix:/" + "x" * 200, "http://[::1", "http://::1", "http://h\u00e9", "",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadSettings) as caught:
        parse_address(text)
    assert caught.value.code == "address_malformed"
