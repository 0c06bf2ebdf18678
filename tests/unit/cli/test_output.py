"""What is asked at a terminal, and what happens where there is none."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.cli import output
from signer.errors import ApprovalRefused

REFUSED = "nothing was archived"


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The descriptor of who types at the terminal that is stdin."""
    leader, follower = pty.openpty()
    with os.fdopen(follower) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield leader
    os.close(leader)


def test_yes_lets_it_go_on(typing: int, capsys: pytest.CaptureFixture[str]) -> None:
    os.write(typing, b"yes\n")
    output.require_yes("archive them? yes or no", REFUSED, "add --yes")
    assert capsys.readouterr().err == "archive them? yes or no [no]: "


@pytest.mark.parametrize("answer", [b"no\n", b"\n", b"y\n", b"YES\n", b"\x04"])
def test_any_other_answer_refuses(typing: int, answer: bytes) -> None:
    os.write(typing, answer)
    with pytest.raises(ApprovalRefused) as caught:
        output.require_yes("archive them? yes or no", REFUSED, "add --yes", "nothing was sent")
    assert (caught.value.code, caught.value.text, caught.value.hint) == ("not_approved", REFUSED, "nothing was sent")


def test_a_stdin_that_is_read_for_something_else_is_not_asked(typing: int, capsys: pytest.CaptureFixture[str]) -> None:
    os.write(typing, b"yes\n")
    with pytest.raises(ApprovalRefused) as caught:
        output.require_yes("archive them? yes or no", REFUSED, "add --yes", "nothing was sent", can_ask=False)
    assert (caught.value.text, caught.value.hint) == (f"{REFUSED}: there is no terminal to ask at", "add --yes")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_closed", [False, True])
def test_without_a_terminal_it_refuses(is_closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as null:
        monkeypatch.setattr(sys, "stdin", None if is_closed else null)
        with pytest.raises(ApprovalRefused) as caught:
            output.require_yes("archive them? yes or no", REFUSED, "add --yes")
    assert (caught.value.text, caught.value.hint) == (f"{REFUSED}: there is no terminal to ask at", "add --yes")
