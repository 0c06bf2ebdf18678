"""Exit statuses that programs can use, and the JSON line that says the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer import errors
from signer.errors import BadFormat, BadSettings, NotAuthenticated, NotFound, Refused, SignerError, Unavailable
from signer.safe_session import output, statuses
from signer.safe_session.http import NoResponse
from signer.safe_session.statuses import Internal, Limited, NoCommand, NotWritten, UsageError, judge

CASES = [
    (UsageError("x"), 64, "usage", False),
    (BadFormat("bad_certificate", "x"), 69, "unreachable", True),
    (Unavailable("service_slow", "x"), 69, "unreachable", True),
    (NoResponse("service_closed", "x"), 69, "unreachable", True),
    (Internal("x"), 70, "internal", False),
    (NotWritten("x"), 74, "not_written", False),
    (Limited("rate_limited", "x"), 75, "limited", True),
    (Refused("principal_not_allowed", "x"), 77, "refused", False),
    (Refused("frozen", "x"), 77, "frozen", False),
    (NotAuthenticated("token_expired", "x"), 77, "refused", False),
    (NotFound("unknown_role", "x"), 77, "refused", False),
    (BadSettings("token_file_mode", "x"), 78, "settings", False),
    (NoCommand("x", "y", statuses.NOT_EXECUTABLE), 126, "no_command", False),
    (NoCommand("y", "y"), 127, "no_command", False),
]


@pytest.mark.parametrize("error,status,state,may_retry", CASES, ids=lambda value: getattr(value, "code", str(value)))
def test_each_kind_of_error_has_its_status_and_word(
    error: SignerError, status: int, state: str, may_retry: bool, capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert judge(error) == (status, state)
    written: list[str] = []
    monkeypatch.setattr(output, "show", written.append)
    assert output.report(error, as_json=True) == status
    (line,) = written
    said = json.loads(line)
    assert line.endswith("}\n")
    assert (said["state"], said["exit_status"], said["may_retry"], said["code"]) == (
        state, status, may_retry, error.code,
    )  # fmt: skip
    assert capsysbinary.readouterr().err == b""


def test_no_error_ends_with_a_status_that_a_command_may_mean() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SignerError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert 64 <= judge(kind("code", "text"))[0] <= 78


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
)


@given(JSON)
def test_json_is_what_the_json_module_reads(value: object) -> None:
    line = output.render_json(value)
    assert json.loads(line) == value
    assert line.isascii()
    assert "\n" not in line


def test_json_has_no_form_for_what_is_not_json() -> None:
    with pytest.raises(TypeError):
        output.render_json({"a": b"bytes"})
