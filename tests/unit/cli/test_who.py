"""Lines of sshd's log: which certificate they name, whatever a key id holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.cli.who import MAX_LINE, Login, read_login

KEY, CA = "SHA256:" + "k" * 43, "SHA256:" + "c" * 43
ACCEPTED = (
    f"Accepted publickey for llmops from 192.0.2.7 port 4711 ssh2: ED25519-CERT {KEY}"
    f" ID {{}} (serial {{}}) CA ED25519 {CA}"
)
VERBOSE = f'Accepted certificate ID "{{}}" (serial {{}}) signed by ED25519 CA {CA} via /etc/ssh/signer-ca.pub'


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "Nov 29 09:12:01 rs2000 sshd[812]: ",
        "2026-11-29T09:12:01.123456+00:00 rs2000 sshd-session[812]: ",
        "sshd-auth[1]: ",
    ],
)
def test_both_lines_of_every_sshd_are_read(prefix: str) -> None:
    accepted = read_login(prefix + ACCEPTED.format("deploy-agent:llmops", 12) + "\n")
    assert accepted == Login(12, "deploy-agent:llmops", CA, KEY)
    assert read_login(prefix + VERBOSE.format("deploy-agent:llmops", 12)) == Login(12, "deploy-agent:llmops", CA)


@pytest.mark.parametrize("form", [ACCEPTED, VERBOSE])
@pytest.mark.parametrize(
    "key_id", ["", " ", "x (serial 9) CA ED25519 SHA256:y", 'x" (serial 9) signed by RSA CA SHA256:y via z', "a ID b"]
)
def test_a_key_id_may_hold_anything(form: str, key_id: str) -> None:
    read = read_login(form.format(key_id, 4711))
    assert read is not None
    assert (read.serial, read.key_id, read.ca) == (4711, key_id, CA)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "sshd[1]: Failed publickey for llmops from 192.0.2.7 port 1 ssh2: ED25519 SHA256:x",
        f"sshd[1]: Accepted publickey for root from ::1 port 1 ssh2: ED25519 {KEY}",
        ACCEPTED.format("x", 2**64),
        ACCEPTED.format("x", "-1"),
        ACCEPTED.format("x", "\u0661"),
        ACCEPTED.format("x", 1).replace(CA, "SHA256:short"),
        ACCEPTED.format("x", 1).replace(KEY, "MD5:x"),
        VERBOSE.format("x", 1).replace(CA, "?"),
        ACCEPTED.format("x" * MAX_LINE, 1),
    ],
)
def test_other_lines_name_no_certificate(line: str) -> None:
    assert read_login(line) is None


@given(st.text())
def test_foreign_text_is_a_login_or_nothing(text: str) -> None:
    for line in (text, f"sshd[1]: {text}", f"Accepted publickey for {text}", f'Accepted certificate ID "{text}'):
        read_login(line)
