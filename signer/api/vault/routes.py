"""The Vault-compatible API in Flask: all of `/v1/` but plain signing, which is in `sign.py`.

Vault has its own routing rules (any verb, LIST and its spellings, mounts with slashes in their names), so one function
handles every request below `/v1/` before Flask routes it. `runbooks/develop/vault-contract.md` specifies the behaviour,
including the order of the checks.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs

from flask import Flask, Response, request

from signer.api.request import message_header, new_request_id
from signer.api.sign import SignCall, read_body
from signer.api.vault import responses, system
from signer.api.vault.responses import REFUSALS, HttpResponse
from signer.errors import BadRequest, SignerError
from signer.protocol.client import KeeperClient
from signer.protocol.go_duration import BadDuration, go_nanoseconds
from signer.protocol.go_json import unverified_text, well_formed
from signer.protocol.replies import CaKey, CallerDetails, Reply, RoleDetails, Roles, expect
from signer.protocol.sign_request import decode_body
from signer.settings import Settings

NAME: Final = r"(?![.@-])[\w.@-]++(?<![.@-])"
_OPERATIONS: Final = {
    "GET": "read", "LIST": "list", "POST": "update", "PUT": "update", "DELETE": "delete", "PATCH": "patch",
    "HEAD": "header", "OPTIONS": "options",
}  # fmt: skip
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"", "0", "f", "F", "false", "FALSE", "False"})
_MERGE_PATCH: Final = "application/merge-patch+json"
_PUBLIC: Final = re.compile(rf"public_key|issuer/({NAME})/public_key", re.ASCII)


@dataclass(frozen=True, slots=True)
class VaultRequest:
    """One request in Vault's terms: an operation on `path`, the part after `/v1/`."""

    environ: Mapping[str, Any]
    operation: str
    path: str
    query: Mapping[str, list[str]]
    body: bytes
    request_id: str
    caller: CallerDetails | SignerError | None = None  # None until the keeper has checked the token

    def first(self, name: str) -> str | None:
        """The first value of a query parameter."""
        return self.query.get(name, [None])[0]

    def granted(self, data: Mapping[str, Any], *known: str) -> HttpResponse:
        """200 with `data` and a warning for unknown query parameters."""
        return responses.success(
            data, self.request_id, [well_formed(name) for name in self.query.keys() - {*known, "help"}]
        )


_Shape = TypeVar("_Shape", bound=Reply)
Handler = Callable[["VaultApi", VaultRequest, str], HttpResponse]


def register(app: Flask, keeper: KeeperClient, settings: Settings) -> None:
    shape = VaultApi(keeper, settings)

    @app.before_request
    def answer_vault() -> Response | None:
        environ = request.environ
        path = unverified_text(environ["PATH_INFO"].encode("latin-1"))
        if path != "/v1" and not path.startswith("/v1/"):
            return None
        answer = shape.answer(environ, well_formed(path))
        headers = [*answer.headers]
        if environ.get("HTTP_X_VAULT_NAMESPACE"):
            headers.append(("X-Vault-Namespace", environ["HTTP_X_VAULT_NAMESPACE"]))
        return Response(answer.body, answer.status, headers)


class VaultApi:
    """The Vault-compatible API of one service."""

    def __init__(self, keeper: KeeperClient, settings: Settings) -> None:
        self._keeper = keeper
        self._settings = settings
        self._mounts = sorted(settings.mounts, key=len, reverse=True)

    def answer(self, environ: Mapping[str, Any], path: str) -> HttpResponse:
        """The response to one request, also for errors."""
        try:
            if (early := self._check_path(environ, path)) is not None:
                return early
            if path.removeprefix("/v1/") in system.UNAUTHENTICATED:
                return system.unauthenticated(environ, path.removeprefix("/v1/"), self._keeper)
            vault_request = self._read(environ, path.removeprefix("/v1/"))
            return vault_request if isinstance(vault_request, HttpResponse) else self._route(vault_request)
        except SignerError as error:
            return responses.render_error(error)

    # --- before authentication ----------------------------------------------------------------------------------

    def _check_path(self, environ: Mapping[str, Any], path: str) -> HttpResponse | None:
        raw = str(environ.get("RAW_URI") or path).partition("?")[0]
        clean = posixpath.normpath(raw) + ("/" if raw.endswith("/") else "")
        if clean != raw and raw.startswith("/v1/"):
            query = environ.get("QUERY_STRING")
            return responses.redirect(clean + (f"?{query}" if query else ""))
        if not path.isprintable():
            return HttpResponse(400, responses.HEADERS, b"")
        if path == "/v1":
            return responses.failure(404)
        if environ["REQUEST_METHOD"] not in _OPERATIONS:
            return responses.failure(405)
        return None

    def _read(self, environ: Mapping[str, Any], path: str) -> VaultRequest | HttpResponse:
        """Checks the request's form before its sender, in Vault's order; raises `BadRequest`.

        The body is an exception: without a valid token it is never decoded.
        """
        operation = _OPERATIONS[environ["REQUEST_METHOD"]]
        query = parse_qs(str(environ.get("QUERY_STRING", "")), keep_blank_values=True, errors="surrogateescape")
        if operation == "patch" and (refusal := _refuse_media_type(str(environ.get("CONTENT_TYPE") or ""))):
            return refusal
        vault_request = VaultRequest(environ, operation, path, query, b"", new_request_id())
        if operation in ("update", "patch") and (body := read_body(environ)):
            vault_request = replace(vault_request, body=body, caller=self._find_caller(vault_request))
            if not isinstance(vault_request.caller, SignerError):
                decode_body(body, "" if operation == "patch" else str(environ.get("CONTENT_TYPE") or ""))
        if operation == "read" and "list" in query:
            word = vault_request.first("list")
            if word not in _TRUE | _FALSE:
                return responses.failure(400)
            if word in _TRUE:
                rest = {name: values for name, values in query.items() if name != "list"}
                vault_request = replace(vault_request, operation="list", query=rest)
        if vault_request.operation == "list" and not path.endswith("/"):
            vault_request = replace(vault_request, path=path + "/")
        return _refuse_wrapping(environ) or _refuse_form(environ, operation, path) or vault_request

    # --- routes -------------------------------------------------------------------------------------------------

    def _route(self, vault_request: VaultRequest) -> HttpResponse:
        for mount in self._mounts:
            if vault_request.path == mount or vault_request.path.startswith(mount + "/"):
                rest = vault_request.path[len(mount) + 1 :]
                return self._public(vault_request, rest) or self._mounted(vault_request, rest)
        whoami = self._whoami(vault_request)
        return system.route(
            vault_request.path,
            vault_request.operation,
            self._settings.mounts,
            whoami,
            vault_request.environ,
            vault_request.request_id,
        )

    def _public(self, vault_request: VaultRequest, rest: str) -> HttpResponse | None:
        """The CA's public key, without authentication, so that hosts can fetch it; None for other paths."""
        if vault_request.operation == "list":
            return None
        match = _PUBLIC.fullmatch(rest)
        if match is None:  # Vault serves this form without authentication before it checks the issuer's name
            is_public = re.fullmatch("issuer/[^/]*/public_key", rest, re.DOTALL) is not None
            return responses.failure(404, "unsupported path") if is_public else None
        if vault_request.operation != "read":
            return responses.failure(405, "unsupported operation")
        ca = self._ca()
        if match[1] is not None:
            self._check_issuer(match[1], ca)
        return responses.text(ca.public_key + "\n")

    def _mounted(self, vault_request: VaultRequest, rest: str) -> HttpResponse:
        if vault_request.operation == "update" and (match := re.fullmatch(f"sign/({NAME})", rest, re.ASCII)):
            # sign.py passed it to Flask for a namespace or wrapping header that has no effect.
            proxies = self._settings.proxies
            return SignCall(vault_request.environ, proxies, match[1], for_vault=True, body=vault_request.body).run(
                self._keeper
            )
        self._whoami(vault_request)
        for pattern, operations in _ROUTES:
            if (match := pattern.fullmatch(rest)) is None:
                continue
            if vault_request.operation == "read" and vault_request.first("help"):
                return responses.help_text(rest)
            if (handler := operations.get(vault_request.operation)) is None:
                return responses.unsupported_operation()
            return handler(self, vault_request, match[1] if match.lastindex else "")
        return responses.unsupported_path()

    # --- reads --------------------------------------------------------------------------------------------------

    def _whoami(self, vault_request: VaultRequest) -> CallerDetails:
        """The caller's details; raises `NotAuthenticated` unless the keeper knows the token."""
        caller = self._find_caller(vault_request) if vault_request.caller is None else vault_request.caller
        if isinstance(caller, SignerError):
            raise caller
        return caller

    def _find_caller(self, vault_request: VaultRequest) -> CallerDetails | SignerError:
        try:
            return self._ask(CallerDetails, "whoami", vault_request)
        except SignerError as error:
            return error

    def _ask(self, shape: type[_Shape], op: str, vault_request: VaultRequest, **fields: object) -> _Shape:
        header = message_header(op, vault_request.environ, self._settings.proxies, vault_request.request_id)
        return expect(shape, self._keeper.ask({**header, **fields}))

    def _ca(self) -> CaKey:
        return expect(CaKey, self._keeper.ask({"op": "ca"}))

    @staticmethod
    def _check_issuer(ref: str, ca: CaKey) -> None:
        """Raises `BadRequest` unless `ref` names the only issuer."""
        if ref not in ("default", responses.issuer_id(ca.fingerprint)):
            sentence = f"unable to find issuer for reference: {ref}"
            raise BadRequest("issuer_unknown", sentence, "use default", {"vault": sentence})

    def list_roles(self, vault_request: VaultRequest, _name: str) -> HttpResponse:
        names = _page(vault_request, self._ask(Roles, "roles", vault_request).roles)
        info = {name: {"issuer_ref": "default", "key_type": "ca"} for name in names}
        return _list(vault_request, names, info)

    def read_role(self, vault_request: VaultRequest, name: str) -> HttpResponse:
        try:
            role = self._ask(RoleDetails, "role", vault_request, role=name)
        except SignerError as error:
            if error.code == "unknown_role":
                return responses.failure(404)
            raise
        return vault_request.granted(responses.role_fields(role, self._ca().public_key))

    def read_ca(self, vault_request: VaultRequest, ref: str) -> HttpResponse:
        ca = self._ca()
        if ref:
            self._check_issuer(ref, ca)
        data = {"issuer_id": responses.issuer_id(ca.fingerprint), **_issuer(ca)}
        return vault_request.granted(data)

    def list_issuers(self, vault_request: VaultRequest, _name: str) -> HttpResponse:
        ca = self._ca()
        names = _page(vault_request, [responses.issuer_id(ca.fingerprint)])
        return _list(vault_request, names, {name: {"is_default": True, **_issuer(ca)} for name in names})

    def read_default_issuer(self, vault_request: VaultRequest, _name: str) -> HttpResponse:
        return vault_request.granted({"default": responses.issuer_id(self._ca().fingerprint)})


def _refuse(why: str) -> Handler:
    """Answers every request of a route with a sentence of `REFUSALS`."""
    return lambda _api, _request, _name: responses.failure(405, REFUSALS[why])


_V: Final = VaultApi
_HANDLERS: Final[Mapping[str, Mapping[str, Handler]]] = {
    "roles/?": {"list": _V.list_roles},
    f"roles/({NAME})": {"read": _V.read_role, "update": _refuse("roles"), "delete": _refuse("roles")},
    f"sign/{NAME}": {},
    f"issue/({NAME})": {"update": _refuse("issue")},
    "config/ca": {"read": _V.read_ca, "update": _refuse("ca"), "delete": _refuse("ca")},
    "config/issuers": {"read": _V.read_default_issuer, "update": _refuse("ca")},
    "issuers/?": {"list": _V.list_issuers},
    f"issuers/import(?:/({NAME}))?": {"update": _refuse("ca")},
    f"issuer/({NAME})": {"read": _V.read_ca, "update": _refuse("ca"), "delete": _refuse("ca")},
    f"issuer/{NAME}/public_key|public_key": {},
}
_ROUTES: Final = tuple((re.compile(pattern, re.ASCII), handlers) for pattern, handlers in _HANDLERS.items())


def _issuer(ca: CaKey) -> dict[str, str]:
    return {"issuer_name": "", "public_key": ca.public_key + "\n"}


def _page(vault_request: VaultRequest, names: list[str]) -> list[str]:
    """Applies `after` and `limit` as Vault does; raises `BadRequest`."""
    after, limit = vault_request.first("after") or "", vault_request.first("limit") or "0"
    if re.fullmatch(r"[+-]?[0-9]{1,18}", limit) is None:
        sentence = (
            'Field validation failed: error converting input for field "limit":'
            " '' cannot parse value as 'int': strconv.ParseInt: invalid syntax"
        )
        raise BadRequest("field_malformed", "limit is not a number", "omit limit", {"vault": sentence})
    names = sorted(name for name in names if name > after)
    return names[: int(limit)] if int(limit) > 0 else names


def _list(vault_request: VaultRequest, names: list[str], info: Mapping[str, object]) -> HttpResponse:
    if not names:
        return responses.failure(404)
    return vault_request.granted({"key_info": info, "keys": names}, "after", "limit")


def _refuse_media_type(content_type: str) -> HttpResponse | None:
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type:
        return responses.failure(400, "mime: no media type")
    if media_type != _MERGE_PATCH:
        return responses.failure(415, f"PATCH requires Content-Type of {_MERGE_PATCH}, provided {media_type}")
    return None


def _refuse_wrapping(environ: Mapping[str, Any]) -> HttpResponse | None:
    text = str(environ.get("HTTP_X_VAULT_WRAP_TTL") or "")
    try:
        wanted = go_nanoseconds(text)
    except BadDuration as error:
        return responses.failure(400, f"error parsing X-Vault-Wrap-TTL header: {error}")
    if wanted < 0:
        return responses.failure(400, "error parsing X-Vault-Wrap-TTL header: requested wrap ttl cannot be negative")
    return responses.failure(400, REFUSALS["wrapping"]) if wanted else None


def _refuse_form(environ: Mapping[str, Any], operation: str, path: str) -> HttpResponse | None:
    parts = path.split("/")
    if ".." in parts or "." in parts:
        return responses.failure(400, "relative paths not supported")
    if str(environ.get("HTTP_X_VAULT_NAMESPACE") or "").strip("/") not in ("", "root"):
        return responses.failure(404, "namespace not found")
    if operation == "options":
        return responses.failure(400, "cannot handle internal-only request operation")
    if operation in ("update", "patch") and path.endswith("/"):
        return responses.failure(400, "cannot write to a path ending in '/'")
    return None
