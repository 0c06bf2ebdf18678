"""What the worker answers where no application sees the request, and what it keeps out of the log."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from gunicorn.http.errors import InvalidHeader, InvalidResponseHeader, LimitRequestHeaders, LimitRequestLine

from signer.api.connection import Mailbox
from signer.api.worker import PatientWorker

log = logging.getLogger("test.worker")


@pytest.fixture
def worker() -> PatientWorker:
    made = PatientWorker.__new__(PatientWorker)  # without gunicorn's arbiter, pipes and pool: only its answers
    made.log = log
    return made


def answer(worker: PatientWorker, exc: Exception) -> tuple[int, dict[str, Any]]:
    mailbox = Mailbox()
    mailbox.sendall(b"half an answer of the application")
    worker.handle_error(None, mailbox, None, exc)
    head, _, body = bytes(mailbox.response).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert {"Connection: close", f"Content-Length: {len(body)}", "Content-Type: application/problem+json"} <= set(lines)
    return int(lines[0].split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "exc, status, code",
    [
        (InvalidHeader("Authorization: sgn_secret"), 400, "request_malformed"),
        (LimitRequestHeaders("sgn_secret"), 431, "head_too_large"),
        (LimitRequestLine(5000, 4094), 414, "line_too_long"),
    ],
)
def test_what_is_no_http_is_refused_without_a_word_of_it(
    worker: PatientWorker, exc: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        found, problem = answer(worker, exc)
    assert (found, problem["status"], problem["code"]) == (status, status, code)
    assert problem["hint"]
    assert problem["errors"] == [problem["detail"]]
    assert "sgn_secret" not in caplog.text + json.dumps(problem)


@pytest.mark.parametrize("exc", [RuntimeError("inner detail"), InvalidResponseHeader("inner detail")])
def test_a_fault_of_ours_tells_the_client_a_number_and_the_log_the_rest(
    worker: PatientWorker, exc: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    found, problem = answer(worker, exc)
    assert (found, problem["code"]) == (500, "internal_error")
    assert "inner detail" not in json.dumps(problem)
    assert problem["request_id"] in caplog.text
    assert "inner detail" in caplog.text


def test_a_mailbox_gives_one_request_and_then_its_end() -> None:
    mailbox = Mailbox()
    mailbox.request = b"abcde"
    assert [mailbox.recv(2), mailbox.recv(8192), mailbox.recv(8192)] == [b"ab", b"cde", b""]
