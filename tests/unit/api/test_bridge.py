"""How Flask's response becomes one whole response: what PEP 3333 asks of a server that sends nothing before the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, Response

from signer.api.asgi import run_flask
from signer.api.vault.responses import HttpResponse


class Body:
    """A body in parts that fails after the last one, if `error` is given, and knows whether it was closed."""

    def __init__(self, *parts: bytes, error: Exception | None = None) -> None:
        self._parts, self._error = parts, error
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self.closed += 1


def ask(answer: Any, method: str = "GET") -> HttpResponse:
    flask = Flask("bridge")
    flask.add_url_rule("/", view_func=lambda: answer, methods=["GET", "POST"])
    environ = {"REQUEST_METHOD": method, "RAW_PATH": "/", "REMOTE_ADDR": "127.0.0.1", "QUERY_STRING": ""}
    return run_flask(flask, environ, b"")


def test_all_parts_of_a_body_are_sent_and_it_is_closed_once() -> None:
    body = Body(b"one ", b"", b"two")
    response = ask(Response(body, 201, [("X-A", "1"), ("X-A", "2")]))
    assert (response.status, response.body, body.closed) == (201, b"one two", 1)
    assert [value for name, value in response.headers if name == "X-A"] == ["1", "2"]


def test_a_body_that_fails_is_closed_and_nothing_of_it_is_sent() -> None:
    body = Body(b"half", error=OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        ask(Response(body))
    assert body.closed == 1


def test_head_has_the_fields_of_get_without_its_body() -> None:
    body = Body(b"never sent")
    response = ask(Response(body, headers={"Content-Length": "10"}), "HEAD")
    assert (response.body, body.closed) == (b"", 1)
    assert ("Content-Length", "10") in response.headers


def plain(*calls: tuple[Any, ...], body: Any = (), write: bytes = b"") -> Any:
    """A WSGI application in Flask's place, which calls `start_response` so."""
    flask = Flask("bridge")

    def application(_environ: Any, start_response: Any) -> Any:
        for call in calls:
            send = start_response(*call)
            if write:
                send(write)
        return body

    flask.wsgi_app = application  # type: ignore[method-assign, assignment]
    environ = {"REQUEST_METHOD": "GET", "RAW_PATH": "/", "REMOTE_ADDR": "127.0.0.1", "QUERY_STRING": ""}
    return run_flask(flask, environ, b"")


def test_what_is_written_comes_before_the_body() -> None:
    assert plain(("200 OK", []), body=[b"b"], write=b"a").body == b"ab"


def test_a_response_in_place_of_one_that_failed_is_sent_as_none_of_the_first_was() -> None:
    failed = (ValueError, ValueError("late"), None)
    response = plain(("200 OK", [("X-A", "1")]), ("500 Failed", [("X-B", "2")], failed), body=[b"sorry"])
    assert (response.status, list(response.headers), response.body) == (500, [("X-B", "2")], b"sorry")


def test_an_application_without_a_status_is_an_error() -> None:
    body = Body(b"x")
    with pytest.raises(ValueError, match="start_response"):
        plain(body=body)
    assert body.closed == 1
