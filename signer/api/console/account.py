"""Signing in and out, and the pages about one's own session and for a new passkey."""

from __future__ import annotations

from flask import Response, request

from signer.api.console.session import SIGN_IN, Console, Session, check_origin, is_local, redirect
from signer.api.problems import retry_after, status_of
from signer.api.request import CONSOLE, COOKIE, SECURE_COOKIE, bounded_token
from signer.errors import SignerError
from signer.protocol.replies import SignedIn, expect


def register(console: Console) -> None:
    def show_form() -> Response:
        target = target_of(request.args.get("next", ""))
        if console.session(is_unattended=True) is None:
            return console.page("sign_in.html", next=target, fault=None)
        return redirect(target)

    def sign_in() -> Response:
        check_origin()
        target = target_of(request.form.get("next", ""))
        token = bounded_token(request.form.get("token", "").strip())
        try:
            signed_in = expect(SignedIn, console.ask("sign_in", token, {}))
        except SignerError as fault:
            response = console.page("sign_in.html", status_of(fault), next=target, fault=fault)
            if seconds := retry_after(fault):
                response.headers["Retry-After"] = seconds
            return response
        return console.set_cookie(redirect(target), signed_in.credential)

    def sign_out(session: Session) -> Response:
        session.ask("sign_out")
        response = redirect(SIGN_IN)
        response.delete_cookie(COOKIE, path="/console", httponly=True, samesite="Strict")
        response.delete_cookie(SECURE_COOKIE, path="/", secure=True, httponly=True, samesite="Strict")
        return response

    console.add("GET", SIGN_IN, show_form)
    console.add("POST", SIGN_IN, sign_in)
    console.post("/console/sign-out", sign_out)
    console.get("/console/session", lambda _session: console.page("session.html"))
    console.get("/console/enrol", lambda _session: console.page("enrol.html"))  # the browser sends nothing


def target_of(asked: str) -> str:
    """The page of the console that was asked for before the sign-in, else its first one."""
    return asked if is_local(asked) else CONSOLE
