"""Which hosts are on the list, by what ssh says that it looks up; and the file of pinned keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.errors import BadSettings
from signer.safe_session.listed import Question, host_options, is_listed, looked_up
from signer.safe_session.settings import load_publishers
from tests.parts.builders import public_line

LIST = b"""# known-hosts.v1@signer version=7 as_of=2026-11-29T12:00:00Z
edge1,192.0.2.7,[edge1]:2222 ssh-ed25519 AAAA
2001:db8::1 ssh-ed25519 AAAA
"""


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("hostname edge1\nport 22\n", ("edge1",)),
        ("user x\nhostname EDGE1\nport 2222\n", ("[edge1]:2222",)),
        ("hostname 10.0.0.7\nport 2200\nhostkeyalias Web\n", ("web",)),
        ("hostname 2001:DB8:0::1\nport 22\n", ("2001:db8:0::1", "2001:db8::1")),
        ("hostname [2001:DB8::1]\nport 2222\n", ("[2001:db8::1]:2222",)),
        ("hostname a\nport 22\nhostname b\n", ("a",)),
        ("", ()),
        ("OpenSSH_9.2p1\n", ()),
    ],
)
def test_the_name_is_the_one_that_ssh_looks_up(answer: str, expected: tuple[str, ...]) -> None:
    assert looked_up(answer) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("edge1", True), ("192.0.2.7", True), ("[edge1]:2222", True), ("2001:db8::1", True), ("edge", False),
        ("edge1,192.0.2.7", False), ("[edge1]:22", False), ("ssh-ed25519", False), ("known-hosts.v1@signer", False),
        ("#", False), ("", False), ("*", False), ("edge1 ssh-ed25519 AAAA", False), ("\u0435dge1", False),
        ("\udcff", False),
    ],
)  # fmt: skip
def test_only_a_whole_name_is_listed(name: str, expected: bool, tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_bytes(LIST)
    assert is_listed((name,), str(file)) is expected
    assert bool(host_options((name,), str(file))) is expected


def test_without_an_answer_of_ssh_the_options_are_strict(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_bytes(LIST)
    assert "StrictHostKeyChecking=yes" in host_options((), str(file))
    question = Question("/nonexistent/ssh", ["edge1"])
    assert question.names() == ()


def test_what_ssh_answers_may_not_be_endless(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nyes x\n")
    ssh.chmod(0o755)
    assert Question(str(ssh), ["edge1"]).names() == ()


# --- pinned keys ----------------------------------------------------------------------------------------------------


def _file(folder: Path, text: str, mode: int = 0o644) -> str:
    path = folder / "publishers"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_pinned_keys_are_read_without_their_comments(tmp_path: Path) -> None:
    first, second = public_line(), public_line("ssh-ed25519", "other")
    text = f"# the publishing key\n{first} signer-publishing\n\n{second}\n"
    assert load_publishers(_file(tmp_path, text)) == [first, second]


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "ssh-ed25519\n", public_line("ecdsa-sha2-nistp256"), f"* {public_line()}",
     "ssh-ed25519 " + "A" * 67, f"cert-authority {public_line()}", "ssh-ed25519 " + '"' * 68,
     f"{public_line()}\n-----BEGIN OPENSSH PRIVATE KEY-----", f"{public_line()}\n" + "#" * 5_000],
)  # fmt: skip
def test_a_file_with_anything_but_keys_pins_nothing(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as refused:
        load_publishers(_file(tmp_path, text))
    assert refused.value.code == "publishers_file_content"
    assert "PRIVATE" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_pins_nothing(mode: int, tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as refused:
        load_publishers(_file(tmp_path, public_line(), mode))
    assert refused.value.code == "publishers_file_not_private"


@pytest.mark.parametrize("name", ["missing", "", ".", "x\0y"])
def test_what_is_no_file_pins_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings):
        load_publishers(f"{tmp_path}/{name}")
