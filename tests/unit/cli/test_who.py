"""Lines of sshd's log: which certificate they name, whatever a key id holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.cli.who import MAX_LINE, Login, read_login, read_logins

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
    assert accepted is not None
    assert (accepted.process == "") == (prefix == "")
    assert accepted == Login(12, "deploy-agent:llmops", CA, KEY, accepted.process)
    other = Login(12, "deploy-agent:llmops", CA, "", accepted.process)
    assert read_login(prefix + VERBOSE.format("deploy-agent:llmops", 12)) == other


def said(prefix: str, serial: int = 12, name: str = "a:b") -> list[str]:
    """The lines of one login with LogLevel VERBOSE, as sshd of OpenSSH 9.2 has them."""
    once = prefix + VERBOSE.format(name, serial)
    return [once, f"{prefix}Postponed publickey for llmops from 192.0.2.7 port 1 ssh2 [preauth]", once,
            prefix + ACCEPTED.format(name, serial)]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "sshd[{}]: ", "Nov 29 09:12:01 rs2000 sshd-session[{}]: "])
def test_a_login_of_several_lines_is_one(prefix: str) -> None:
    first, second = said(prefix.format(7)), said(prefix.format(8))
    assert [(number, login.fingerprint) for number, login in read_logins([*first, *second])] == [(4, KEY), (8, KEY)]
    assert [number for number, _ in read_logins([first[0], first[2]])] == [1], "accepted, and refused later"


def test_logins_of_two_hosts_or_with_two_certificates_are_two() -> None:
    one, other = said("9:12 web1 sshd[7]: "), said("9:12 web2 sshd[7]: ")
    both = [line for pair in zip(one, other, strict=True) for line in pair]
    assert [(login.process, login.fingerprint) for _, login in read_logins(both)] == [
        ("web1 [7]", KEY),
        ("web2 [7]", KEY),
    ]
    serials = [login.serial for _, login in read_logins([*said("sshd[7]: ", 1), *said("sshd[7]: ", 2)])]
    assert serials == [1, 2]
    foreign = ACCEPTED.format("a:b", 12).replace(KEY, "SHA256:" + "x" * 43)
    assert len(read_logins([*one, f"9:12 web1 sshd[7]: {foreign}"])) == 2, "another key is never left out"


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
        login = read_login(line)
        assert login is None or (login.serial >= 0 and login.key_id in line and login.ca in line)
