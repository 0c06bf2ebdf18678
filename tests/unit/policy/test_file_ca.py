"""`[ca]` of policy.toml: the pinned key, the next one, retired ones. What contradicts itself refuses the whole file."""

from __future__ import annotations

import pytest

from signer.errors import BadFile
from signer.policy.file import parse_policy
from tests.parts import builders
from tests.parts.builders import POLICY, policy_text, public_key, public_line

PINNED = builders.PretendKey().fingerprint
PINNED_LINE = public_line("ssh-ed25519", "ca")


def key(name: str, kind: str = "ssh-ed25519", *, line: str | None = None, fingerprint: str | None = None) -> str:
    """An inline table of a key, right unless told otherwise."""
    fingerprint = fingerprint or public_key(kind, name).fingerprint
    return f'{{ fingerprint = "{fingerprint}", public_key = "{line or public_line(kind, name)}" }}'


def with_ca(*lines: str) -> bytes:
    return policy_text(POLICY.replace('fingerprint = "{ca}"', "\n".join(['fingerprint = "{ca}"', *lines]))).encode()


def problems(*lines: str) -> list[str]:
    with pytest.raises(BadFile) as caught:
        parse_policy(with_ca(*lines))
    assert caught.value.code == "policy_refused"
    return [" ".join(problem.split()) for problem in caught.value.problems]


def pinned(line: str = PINNED_LINE) -> str:
    return f'public_key = "{line}"'


def test_the_pinned_key_alone_may_sign_where_nothing_else_is_said() -> None:
    ca = parse_policy(with_ca()).ca
    assert (ca.may_sign, ca.public, ca.next, ca.retired) == ((PINNED,), None, None, ())


def test_next_and_retired_keys_are_read_with_their_public_halves() -> None:
    read = parse_policy(with_ca(pinned(), f"next = {key('b')}", f"retired = [{key('c')}, {key('d')}]")).ca
    assert read.public == public_key("ssh-ed25519", "ca")
    assert read.next == public_key("ssh-ed25519", "b")
    assert read.retired == (public_key("ssh-ed25519", "c"), public_key("ssh-ed25519", "d"))
    assert read.may_sign == (PINNED, public_key("ssh-ed25519", "b").fingerprint), "a retired key may not"


@pytest.mark.parametrize("kind", ["ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa"])
def test_every_kind_of_a_ca_key_may_be_next(kind: str) -> None:
    assert parse_policy(with_ca(pinned(), f"next = {key('b', kind)}")).ca.next == public_key(kind, "b")


def test_a_comment_of_a_public_line_is_dropped() -> None:
    line = public_line("ssh-ed25519", "b") + " ca@host of 2026"
    assert parse_policy(with_ca(pinned(), f"next = {key('b', line=line)}")).ca.next == public_key("ssh-ed25519", "b")


def test_a_next_key_needs_the_public_half_of_the_pinned_one() -> None:
    assert problems(f"next = {key('b')}") == ["line 2 ca.public_key is missing"]


def test_a_public_half_that_is_not_the_pinned_key_is_refused() -> None:
    other = public_key("ssh-ed25519", "b").fingerprint
    assert problems(pinned(public_line("ssh-ed25519", "b"))) == [
        f"line 4 ca.public_key does not match fingerprint: its own is {other}"
    ]


@pytest.mark.parametrize(
    "place, written",
    [("ca.next", "next = {}"), ("ca.retired.0", "retired = [{}]")],
)
@pytest.mark.parametrize(
    "table, problem",
    [
        (key("b", fingerprint=public_key("ssh-ed25519", "c").fingerprint), "public_key does not match fingerprint"),
        (key("b", line="ssh-ed25519 AAAA"), "public_key cannot be read: "),
        (key("b", line=" "), "public_key cannot be read: missing public_key"),
        (key("b", fingerprint="SHA256:short"), "fingerprint is not a fingerprint such as"),
        (key("b", "sk-ssh-ed25519@openssh.com"), "public_key is sk-ssh-ed25519@openssh.com: a CA key is ed25519"),
        (key("b", "ssh-rsa/2048"), "public_key has 2048 bits; an RSA CA key requires 3072"),
        ('{ fingerprint = "SHA256:x" }', "public_key is missing"),
        (f'{{ public_key = "{PINNED_LINE}" }}', "fingerprint is missing"),
        (key("b")[:-2] + ", note = 1 }", "note unknown key"),
    ],
)
def test_a_key_that_is_not_what_it_says_is_told_with_its_line(
    place: str, written: str, table: str, problem: str
) -> None:
    found = problems(pinned(), written.replace("{}", table))
    assert any(line.startswith(f"line 5 {place}.{problem}") for line in found), found


def test_an_empty_list_of_retired_keys_is_refused() -> None:
    assert problems("retired = []") == [
        "line 4 ca.retired is empty, which would allow none: name at least one, or remove the key"
    ]


@pytest.mark.parametrize(
    "lines, twice",
    [
        ([pinned(), f"next = {key('ca')}"], "line 5 ca.next.fingerprint is also ca.fingerprint"),
        ([f"retired = [{key('ca')}]"], "line 4 ca.retired.0.fingerprint is also ca.fingerprint"),
        (
            [pinned(), f"next = {key('b')}", f"retired = [{key('b')}]"],
            "line 6 ca.retired.0.fingerprint is also ca.next",
        ),
        (
            [f"retired = [{key('b')}, {key('c')}, {key('b')}]"],
            "line 4 ca.retired.2.fingerprint is also ca.retired.0",
        ),
    ],
)
def test_no_key_may_stand_there_twice(lines: list[str], twice: str) -> None:
    assert problems(*lines) == [twice]


def test_all_problems_are_told_at_once() -> None:
    found = problems(
        f"next = {key('b', fingerprint='SHA256:short')}", f"retired = [{key('c', line='x')}, {key('ca')}]", "nxt = 1"
    )
    assert [line.split()[2] for line in found] == [
        "ca.public_key", "ca.next.fingerprint", "ca.next.public_key", "ca.retired.0.public_key",
        "ca.retired.1.fingerprint", "ca.nxt",
    ]  # fmt: skip
