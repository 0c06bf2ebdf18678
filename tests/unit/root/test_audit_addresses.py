"""One rule for every address that gets a token: https, a unix socket, or plain http to this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.address import check_peer, is_this_machine, parse_address
from signer.api_client import ApiClient
from signer.errors import BadFile, BadSettings, Unavailable
from signer.migration.config import parse_cutover_file
from signer.settings import load_settings
from signer.vault.admin import VaultAdmin
from tests.parts.cutover_file import GOOD

HERE = [
    "http://127.0.0.1:8200",
    "http://127.8.9.10:8200",
    "http://localhost:8200",
    "http://LOCALHOST",
    "http://[::1]:8200",
]
ELSEWHERE = [
    "http://10.0.0.7:8200", "http://vault.example:8200", "http://vault:8200", "http://[2001:db8::1]:8200",
    "http://127.0.0.1.vault.example:8200", "http://localhost.vault.example:8200", "http://127.1:8200",
    "http://0.0.0.0:8200", "http://[::]:8200", "http://[::ffff:10.0.0.7]:8200",
]  # fmt: skip
IN_CLEAR = "which would send the token in the clear"


def token_file(folder: Path) -> Path:
    path = folder / "token"
    path.touch(0o600)
    path.write_text("token\n")
    return path


@pytest.mark.parametrize("text", ELSEWHERE)
def test_audit_c4_no_reader_of_an_address_takes_plain_http_to_another_machine(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as client:
        parse_address(text)
    assert client.value.code == "token_in_clear"
    with pytest.raises(BadSettings) as api:
        ApiClient(text, token_file(tmp_path))
    assert api.value.code == "token_in_clear"
    with pytest.raises(BadSettings) as admin:
        VaultAdmin(text, token_file(tmp_path))
    assert admin.value.code == "token_in_clear"
    with pytest.raises(BadSettings) as service:
        load_settings({"SIGNER_MODE": "vault", "SIGNER_VAULT_ADDR": text, "SIGNER_VAULT_TOKEN_FILE": "/token"})
    assert service.value.problems[0].startswith("SIGNER_VAULT_ADDR: is plain http to ")
    assert IN_CLEAR in service.value.problems[0]
    for mine in ('"http://127.0.0.1:8222"', '"http://127.0.0.1:8200"'):
        with pytest.raises(BadFile) as file:
            parse_cutover_file(GOOD.replace(mine, f'"{text}"').encode())
        assert len(file.value.problems) == 1
        assert IN_CLEAR in file.value.problems[0]


@pytest.mark.parametrize("text", [*HERE, "https://vault.example:8200", "https://10.0.0.7"])
def test_audit_c4_every_reader_takes_https_and_plain_http_to_this_machine(text: str, tmp_path: Path) -> None:
    assert parse_address(text).text == text
    ApiClient(text, token_file(tmp_path)).close()
    VaultAdmin(text, token_file(tmp_path)).close()
    load_settings({"SIGNER_MODE": "vault", "SIGNER_VAULT_ADDR": text, "SIGNER_VAULT_TOKEN_FILE": "/token"})
    parse_cutover_file(GOOD.replace('"http://127.0.0.1:8200"', f'"{text}"').encode())


@pytest.mark.parametrize("text", ["vault:8200", "ftp://vault", "http://", "http://[::1"])
def test_audit_c4_an_address_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as caught:
        VaultAdmin(text, token_file(tmp_path))
    assert caught.value.code == "address_malformed"


@pytest.mark.parametrize(
    "number", ["128.0.0.1", "127.0.0.1.5", "127.0.0", "127.0.0.256", "127.0.0.x", "::2", "::ffff:127.0.0.1", "127", ""]
)
def test_audit_c4_a_name_that_resolves_elsewhere_gets_nothing(number: str) -> None:
    """What `localhost` stands for is decided by the resolver of the host, so the answer is checked, too."""
    assert not is_this_machine(number)
    with pytest.raises(Unavailable) as caught:
        check_peer("http", number, "SAFE_SESSION_ADDR")
    assert caught.value.code == "token_in_clear"
    check_peer("https", number, "SAFE_SESSION_ADDR")
