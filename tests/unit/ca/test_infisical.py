"""Settings of `signer ca render`, the client secret's file, and what the SDK's words are taken for."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import traceback
from pathlib import Path

import pytest

from signer.ca import infisical
from signer.ca.infisical import Secret, fetch_secret, load_source
from signer.errors import BadSettings, SignerError
from tests.parts import missing

PIN = "SHA256:" + "A" * 43
GOOD = {
    "INFISICAL_SITE_URL": "https://infisical.example/",
    "INFISICAL_CLIENT_ID": "id",
    "INFISICAL_CLIENT_SECRET_FILE": "/etc/signer/client-secret",
    "INFISICAL_PROJECT_ID": "project",
    "SIGNER_CA_FINGERPRINT": PIN,
}
URL = "INFISICAL_SITE_URL"


def problems(environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(BadSettings) as caught:
        load_source(environ)
    assert caught.value.code == "settings_refused"
    return caught.value.problems


def test_settings_have_defaults_for_environment_path_and_name() -> None:
    source = load_source(GOOD)
    assert source.site_url == "https://infisical.example"
    assert (source.environment, source.secret_path, source.secret_name) == ("prod", "/", "SAFE_SESSION_CA_KEY")
    assert source.fingerprint == PIN


def test_an_empty_setting_is_one_that_is_not_set() -> None:
    assert problems({**GOOD, "INFISICAL_PROJECT_ID": ""}) == ("INFISICAL_PROJECT_ID: is not set",)
    assert load_source({**GOOD, "INFISICAL_ENVIRONMENT": ""}).environment == "prod"


def test_all_problems_are_told_at_once() -> None:
    found = problems({URL: "http://infisical.example", "INFISICAL_CLIENT_SECRET_FILE": "cs-value"})
    assert [problem.split(":")[0] for problem in found] == [
        "INFISICAL_CLIENT_ID",
        "INFISICAL_PROJECT_ID",
        "SIGNER_CA_FINGERPRINT",
        "INFISICAL_SITE_URL",
        "INFISICAL_CLIENT_SECRET_FILE",
    ]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080", "http://localhost", "http://127.0.0.2", "http://[::1]:1", "https://[2001:db8::1]"]
)
def test_plain_http_is_for_loopback_only(url: str) -> None:
    assert load_source({**GOOD, URL: url}).site_url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://infisical.example",
        "http://10.0.0.1",
        "http://127.0.0.1.evil.example",
        "http://127.1",
        "http://localhost.",
        "http://[::2]",
    ],
)
def test_plain_http_beyond_loopback_is_refused(url: str) -> None:
    (problem,) = problems({**GOOD, URL: url})
    assert "plain http beyond loopback" in problem


@pytest.mark.parametrize(
    "url",
    [
        "infisical.example",
        "https://",
        "ftp://infisical.example",
        "https://[::1",
        "https://infisical.example:0",
        "https://infisical.example:99999",
        "https://infisical.example:port",
        "https://infisical.example/?token=geheim",
        "https://infisical.example/#geheim",
        "http://evil.example\\.localhost",
        "http://localhost\\.evil.example",
        "https://infisical.example geheim",
        "https://infisical.example\n",
        "HTTPS://infisical.example",
        "https://ínfisical.example",
    ],
)
def test_an_address_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    found = problems({**GOOD, URL: url})
    assert any("is not an address" in problem for problem in found)
    assert "geheim" not in str(found)


@pytest.mark.parametrize(
    "url",
    ["https://me:geheim@infisical.example", "https://geheim@infisical.example", "http://127.0.0.1\\@evil.example"],
)
def test_an_address_with_credentials_is_refused_and_not_shown(url: str) -> None:
    (problem,) = problems({**GOOD, URL: url})
    assert "contains credentials" in problem
    assert "geheim" not in problem


@pytest.mark.parametrize("pin", ["A" * 43, "SHA256:short", f"{PIN}=", f"MD5:{PIN}", f"{PIN} ca"])
def test_a_pin_must_be_a_fingerprint(pin: str) -> None:
    (problem,) = problems({**GOOD, "SIGNER_CA_FINGERPRINT": pin})
    assert problem.startswith("SIGNER_CA_FINGERPRINT: is not a fingerprint")


def test_a_client_secret_given_as_a_value_is_refused_and_not_shown() -> None:
    (problem,) = problems({**GOOD, "INFISICAL_CLIENT_SECRET_FILE": "cs-geheim"})
    assert "name a file, not the secret" in problem
    assert "geheim" not in problem


# --- the file of the client secret -----------------------------------------------------------------------------------


def refused(path: Path) -> BadSettings:
    """What `fetch_secret` says to this file; it reads it before it starts anything."""
    with pytest.raises(BadSettings) as caught:
        fetch_secret(load_source({**GOOD, "INFISICAL_CLIENT_SECRET_FILE": str(path)}))
    assert "geheim" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("mode", [0o440, 0o444, 0o500, 0o700, 0o640, 0o000, 0o4400])
def test_a_client_secret_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("geheim")
    path.chmod(mode)
    expected = {"client_secret_not_private"} | ({"client_secret_unreadable"} if not mode & 0o400 else set())
    assert refused(path).code in expected


@missing.needs_root
def test_a_client_secret_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("geheim")
    path.chmod(0o400)
    os.chown(path, 65534, 65534)
    assert refused(path).code == "client_secret_not_private"


def test_a_client_secret_behind_a_link_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("geheim")
    (tmp_path / "link").symlink_to("secret")
    os.mkfifo(tmp_path / "pipe", 0o400)
    assert refused(tmp_path / "link").code == "client_secret_unreadable"
    assert refused(tmp_path / "none").code == "client_secret_unreadable"
    assert refused(tmp_path).code == "client_secret_not_private"
    assert refused(tmp_path / "pipe").code == "client_secret_not_private"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"geheim\nsecond", b"geheim\x00", b"geheim" * 1000, b"geheim\xff\x1b["]
)
def test_a_client_secret_must_be_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(0o600)
    assert refused(path).code == "client_secret_malformed"


# --- the SDK's words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, code",
    [
        ("Failed to authenticate: Invalid credentials", "infisical_unauthorized"),
        ("Failed to authenticate, did you provide the correct site URL?", "infisical_site_wrong"),
        ("Secret with name 'X' not found.", "infisical_secret_missing"),
        ("[Bad request]: x", "infisical_refused"),
        ("Received error message from server: (status 401 Unauthorized), {}", "infisical_unauthorized"),
        ("Received error message from server: (status 403 Forbidden), {}", "infisical_forbidden"),
        ("Received error message from server: (status 429 Too Many Requests), {}", "infisical_rate_limited"),
        ("Received error message from server: (status 418 I'm a teapot), {}", "infisical_refused"),
        ("Received error message from server: (status 500 Internal Server Error), {}", "infisical_failed"),
        ("Received error message from server: (status 504 Gateway Timeout), {}", "infisical_failed"),
        ("error sending request for url (https://x/): error trying to connect: dns error", "infisical_down"),
        (
            "error sending request for url (https://x/): error trying to connect: invalid peer certificate: Expired",
            "infisical_untrusted",
        ),
        ("error decoding response body: expected value at line 1 column 1", "infisical_not_understood"),
        ("something that a later SDK says", "infisical_failed"),
        ("", "infisical_failed"),
    ],
)
def test_the_sdks_words_become_a_code(text: str, code: str) -> None:
    assert infisical._classify(text) == code


def test_a_servers_words_do_not_choose_the_code() -> None:
    says = "(status 403 x) error sending request error trying to connect: invalid peer certificate"
    assert infisical._classify(f"Failed to authenticate: {says}") == "infisical_unauthorized"
    assert infisical._classify(f"Received error message from server: (status 500 x), {says}") == "infisical_failed"


def test_every_fault_has_a_code_a_sentence_and_a_hint_of_its_own() -> None:
    faults = infisical._FAULTS.values()
    assert len(faults) > 10
    for part in ("code", "text", "hint"):
        assert len({getattr(fault, part) for fault in faults} - {""}) == len(faults), part


def test_it_gives_up_after_15_seconds() -> None:
    assert inspect.signature(fetch_secret).parameters["timeout"].default == 15.0
    assert "15 s" in infisical._FAULTS["infisical_slow"].text


# --- the child -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> infisical.Source:
    path = tmp_path / "secret"
    path.write_text("geheim\n")
    path.chmod(0o400)
    return load_source({**GOOD, "INFISICAL_CLIENT_SECRET_FILE": str(path)})


class Asked:
    """Stands where `subprocess.run` does, and keeps what it was given."""

    def __init__(self, answer: bytes | BaseException) -> None:
        self.answer = answer
        self.words: list[str] = []
        self.environ: dict[str, str] = {}

    def __call__(self, words: list[str], *, env: dict[str, str], **how: object) -> subprocess.CompletedProcess[bytes]:
        self.words, self.environ = words, env
        assert b"geheim" in how["input"]  # type: ignore[operator]
        if isinstance(self.answer, BaseException):
            raise self.answer
        return subprocess.CompletedProcess(words, 0, self.answer)


def test_the_child_gets_secrets_and_proxies_through_a_pipe_only(
    source: infisical.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("INFISICAL_CLIENT_SECRET", "HTTPS_PROXY", "https_proxy", "VAULT_TOKEN", "RUST_LOG"):
        monkeypatch.setenv(name, "http://me:geheim@proxy")
    asked = Asked(b'{"value": "the key"}')
    monkeypatch.setattr(subprocess, "run", asked)
    assert fetch_secret(source).value == "the key"
    assert "geheim" not in f"{asked.words} {asked.environ}"
    assert set(asked.environ) <= {"PATH", "LANG", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR"}


@pytest.mark.parametrize(
    "answer, code",
    [
        (b"", "infisical_sdk_failed"),
        (b"geheim Traceback", "infisical_sdk_failed"),
        (OSError(11, "no more processes"), "infisical_sdk_failed"),
        (subprocess.TimeoutExpired(["x"], 1, b"geheim"), "infisical_slow"),
        (b'{"fault": "infisical_down"}', "infisical_down"),
    ],
)
def test_a_child_that_fails_leaves_no_secret_in_the_traceback(
    answer: bytes | BaseException, code: str, source: infisical.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Asked(answer))
    with pytest.raises(SignerError) as caught:
        fetch_secret(source)
    assert caught.value.code == code
    told = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert caught.value.__context__ is None
    ours = [frame for frame in told.stack if frame.filename == infisical.__file__]
    assert [frame.name for frame in ours] == ["fetch_secret"]
    assert "geheim" not in str(ours[0].locals)


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret("geheim")
    assert "geheim" not in f"{secret} {secret!r} {[secret]}"


def test_a_secret_is_not_serialised() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret("geheim"))
