"""Text that an editor on Windows saved: a byte order mark and CRLF are accepted, UTF-16 is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from signer.ca.infisical import _read_client_secret
from signer.cli.keys import load_public_key
from signer.errors import BadFile, BadPublicKey, BadSettings
from signer.files import read_secret_word
from signer.migration.config import parse_cutover_file
from signer.policy.file import load_policy, parse_policy
from signer.safe_session.settings import load_token
from signer.ssh.publickey import parse_public_key
from tests.parts.builders import policy_text, public_line
from tests.parts.cutover_file import GOOD

MARK = b"\xef\xbb\xbf"
LINE = public_line()


def as_windows(text: str) -> bytes:
    return MARK + text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize("line", [LINE, LINE + " me@pc", LINE + "\r\n", LINE.split()[1]])
def test_audit_f9_a_public_key_with_a_byte_order_mark_is_the_same_key(line: str) -> None:
    assert parse_public_key("\ufeff" + line) == parse_public_key(LINE)


@pytest.mark.parametrize("text", ["\ufeff", "\ufeff\ufeff" + LINE, "ssh-ed25519 \ufeff" + LINE.split()[1]])
def test_audit_f9_a_mark_elsewhere_is_none(text: str) -> None:
    with pytest.raises(BadPublicKey):
        parse_public_key(text)


def test_audit_f9_a_public_key_file(tmp_path: Path) -> None:
    path = tmp_path / "id.pub"
    path.write_bytes(as_windows(LINE + " me@pc\n"))
    assert load_public_key(path) == parse_public_key(LINE)


def test_audit_f9_the_policy_and_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(as_windows(policy_text()))
    assert load_policy(path).roles.keys() == parse_policy(policy_text().encode()).roles.keys()
    with pytest.raises(BadFile) as plain:
        parse_policy(policy_text().replace("max_ttl", "max_til").encode())
    with pytest.raises(BadFile) as marked:
        parse_policy(as_windows(policy_text().replace("max_ttl", "max_til")))
    assert marked.value.problems == plain.value.problems


def test_audit_f9_the_cutover_file() -> None:
    marked = parse_cutover_file(as_windows(GOOD))
    plain = parse_cutover_file(GOOD.encode())
    assert marked.digest != plain.digest, "the digest is of the bytes"
    assert replace(marked, digest=plain.digest) == plain


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_audit_f9_utf_16_is_named(coding: str) -> None:
    mark = {"utf-16-be": b"\xfe\xff", "utf-16-le": b"\xff\xfe"}.get(coding, b"")
    with pytest.raises(BadFile) as caught:
        parse_policy(mark + policy_text().encode(coding))
    assert "is UTF-16 text: save it as UTF-8" in caught.value.problems[0]


def test_audit_f9_token_files(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_bytes(as_windows("sgn_word\n"))
    assert load_token(str(path)) == read_secret_word(path, "SIGNER_VAULT_TOKEN_FILE") == "sgn_word"
    assert _read_client_secret(path) == "sgn_word"
    path.write_bytes(MARK)
    with pytest.raises(BadSettings) as empty:
        load_token(str(path))
    assert "is empty" in empty.value.text
    path.write_text("sgn_word\r\n", encoding="utf-16")
    with pytest.raises(BadSettings) as wide:
        load_token(str(path))
    assert "is UTF-16 text" in wide.value.text
    with pytest.raises(BadSettings):
        read_secret_word(path, "SIGNER_VAULT_TOKEN_FILE")
