"""Vault's shape in Flask: everything below `/v1/` besides plain signing, which is in `sign.py`.

Vault routes by its own rules (any verb, LIST and its spellings, mounts with slashes in their names), so one function
looks at every request below `/v1/` before Flask does. `runbooks/develop/vault-contract.md` is the law; the order of the
checks is part of it.
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
from signer.api.sign import SignQuestion, read_body
from signer.api.vault import responses, system
from signer.api.vault.responses import REFUSALS, Answer
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
class Asked:
    """One request as Vault sees it: an operation on `path`, which is what stands behind `/v1/`."""

    environ: Mapping[str, Any]
    operation: str
    path: str
    query: Mapping[str, list[str]]
    body: bytes
    request_id: str
    caller: CallerDetails | SignerError | None = None  # who asks, once the keeper was asked

    def first(self, name: str) -> str | None:
        """The first value of a query parameter."""
        return self.query.get(name, [None])[0]

    def granted(self, data: Mapping[str, Any], *known: str) -> Answer:
        """200 with `data`; any query parameter but the known ones earns a warning."""
        return responses.success(
            data, self.request_id, [well_formed(name) for name in self.query.keys() - {*known, "help"}]
        )


_Shape = TypeVar("_Shape", bound=Reply)
Handler = Callable[["VaultShape", Asked, str], Answer]


def register(app: Flask, link: KeeperClient, settings: Settings) -> None:
    """Answers everything below `/v1/` that reaches `app`."""
    shape = VaultShape(link, settings)

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


class VaultShape:
    """The mounts of one service, and what can be asked of them."""

    def __init__(self, link: KeeperClient, settings: Settings) -> None:
        self._link = link
        self._settings = settings
        self._mounts = sorted(settings.mounts, key=len, reverse=True)

    def answer(self, environ: Mapping[str, Any], path: str) -> Answer:
        """The answer to one request, faults and all."""
        try:
            if (early := self._check_path(environ, path)) is not None:
                return early
            if path.removeprefix("/v1/") in system.UNAUTHENTICATED:
                return system.answer(environ, path.removeprefix("/v1/"), self._link)
            asked = self._read(environ, path.removeprefix("/v1/"))
            return asked if isinstance(asked, Answer) else self._route(asked)
        except SignerError as error:
            return responses.render_error(error)

    # --- before anybody looks at the token ----------------------------------------------------------------------

    def _check_path(self, environ: Mapping[str, Any], path: str) -> Answer | None:
        raw = str(environ.get("RAW_URI") or path).partition("?")[0]
        clean = posixpath.normpath(raw) + ("/" if raw.endswith("/") else "")
        if clean != raw and raw.startswith("/v1/"):
            query = environ.get("QUERY_STRING")
            return responses.redirect(clean + (f"?{query}" if query else ""))
        if not path.isprintable():
            return Answer(400, responses.HEADERS, b"")
        if path == "/v1":
            return responses.failure(404)
        if environ["REQUEST_METHOD"] not in _OPERATIONS:
            return responses.failure(405)
        return None

    def _read(self, environ: Mapping[str, Any], path: str) -> Asked | Answer:
        """The request's form is looked at before its sender, in Vault's order; raises `BadRequest`.

        Only the body is not: that of a caller without a good token is never decoded.
        """
        operation = _OPERATIONS[environ["REQUEST_METHOD"]]
        query = parse_qs(str(environ.get("QUERY_STRING", "")), keep_blank_values=True, errors="surrogateescape")
        if operation == "patch" and (refusal := _refuse_media_type(str(environ.get("CONTENT_TYPE") or ""))):
            return refusal
        asked = Asked(environ, operation, path, query, b"", new_request_id())
        if operation in ("update", "patch") and (body := read_body(environ)):
            asked = replace(asked, body=body, caller=self._find_caller(asked))
            if not isinstance(asked.caller, SignerError):
                decode_body(body, "" if operation == "patch" else str(environ.get("CONTENT_TYPE") or ""))
        if operation == "read" and "list" in query:
            word = asked.first("list")
            if word not in _TRUE | _FALSE:
                return responses.failure(400)
            if word in _TRUE:
                rest = {name: values for name, values in query.items() if name != "list"}
                asked = replace(asked, operation="list", query=rest)
        if asked.operation == "list" and not path.endswith("/"):
            asked = replace(asked, path=path + "/")
        return _refuse_wrapping(environ) or _refuse_form(environ, operation, path) or asked

    # --- routes -------------------------------------------------------------------------------------------------

    def _route(self, asked: Asked) -> Answer:
        for mount in self._mounts:
            if asked.path == mount or asked.path.startswith(mount + "/"):
                rest = asked.path[len(mount) + 1 :]
                return self._public(asked, rest) or self._mounted(asked, rest)
        whoami = self._whoami(asked)
        return system.route(asked.path, asked.operation, self._settings.mounts, whoami, asked.environ, asked.request_id)

    def _public(self, asked: Asked, rest: str) -> Answer | None:
        """What trusts nobody, so that a host can fetch the CA's line; any token is ignored."""
        if asked.operation == "list":
            return None
        match = _PUBLIC.fullmatch(rest)
        if match is None:
            return responses.failure(404, "unsupported path") if _looks_public(rest) else None
        if asked.operation != "read":
            return responses.failure(405, "unsupported operation")
        ca = self._ca()
        if match[1] is not None:
            self._check_issuer(match[1], ca)
        return responses.text(ca.public_key + "\n")

    def _mounted(self, asked: Asked, rest: str) -> Answer:
        if asked.operation == "update" and (match := re.fullmatch(f"sign/({NAME})", rest, re.ASCII)):
            # sign.py gave it to Flask for a namespace or a wrapping header, which turned out to ask for nothing.
            proxies = self._settings.trusted_proxies
            return SignQuestion(asked.environ, proxies, match[1], for_vault=True, body=asked.body).ask(self._link)
        self._whoami(asked)
        for pattern, operations in _ROUTES:
            if (match := pattern.fullmatch(rest)) is None:
                continue
            if asked.operation == "read" and asked.first("help"):
                return responses.help_text(rest)
            if (handler := operations.get(asked.operation)) is None:
                return responses.unsupported_operation()
            return handler(self, asked, match[1] if match.lastindex else "")
        return responses.unsupported_path()

    # --- reads --------------------------------------------------------------------------------------------------

    def _whoami(self, asked: Asked) -> CallerDetails:
        """Who asks; raises `NotAuthenticated` unless the keeper knows the token."""
        caller = self._find_caller(asked) if asked.caller is None else asked.caller
        if isinstance(caller, SignerError):
            raise caller
        return caller

    def _find_caller(self, asked: Asked) -> CallerDetails | SignerError:
        try:
            return self._ask(CallerDetails, "whoami", asked)
        except SignerError as error:
            return error

    def _ask(self, shape: type[_Shape], op: str, asked: Asked, **fields: object) -> _Shape:
        header = message_header(op, asked.environ, self._settings.trusted_proxies, asked.request_id)
        return expect(shape, self._link.ask({**header, **fields}))

    def _ca(self) -> CaKey:
        return expect(CaKey, self._link.ask({"op": "ca"}))

    @staticmethod
    def _check_issuer(ref: str, ca: CaKey) -> None:
        """Raises `BadRequest` for any name but the only issuer's."""
        if ref not in ("default", responses.issuer_id(ca.fingerprint)):
            sentence = f"unable to find issuer for reference: {ref}"
            raise BadRequest("issuer_unknown", sentence, "say default", {"vault": sentence})

    def list_roles(self, asked: Asked, _name: str) -> Answer:
        names = _page(asked, self._ask(Roles, "roles", asked).roles)
        info = {name: {"issuer_ref": "default", "key_type": "ca"} for name in names}
        return _list(asked, names, info)

    def read_role(self, asked: Asked, name: str) -> Answer:
        try:
            role = self._ask(RoleDetails, "role", asked, role=name)
        except SignerError as error:
            if error.code == "unknown_role":
                return responses.failure(404)
            raise
        return asked.granted(responses.role_fields(role, self._ca().public_key))

    def read_ca(self, asked: Asked, ref: str) -> Answer:
        ca = self._ca()
        if ref:
            self._check_issuer(ref, ca)
        data = {"issuer_id": responses.issuer_id(ca.fingerprint), **_issuer(ca)}
        return asked.granted(data)

    def list_issuers(self, asked: Asked, _name: str) -> Answer:
        ca = self._ca()
        names = _page(asked, [responses.issuer_id(ca.fingerprint)])
        return _list(asked, names, {name: {"is_default": True, **_issuer(ca)} for name in names})

    def read_default_issuer(self, asked: Asked, _name: str) -> Answer:
        return asked.granted({"default": responses.issuer_id(self._ca().fingerprint)})

    def refuse_roles(self, _asked: Asked, _name: str) -> Answer:
        return responses.failure(405, REFUSALS["roles"])

    def refuse_ca(self, _asked: Asked, _name: str) -> Answer:
        return responses.failure(405, REFUSALS["ca"])

    def refuse_issue(self, _asked: Asked, _name: str) -> Answer:
        return responses.failure(405, REFUSALS["issue"])


def _route_table(*rows: tuple[str, dict[str, Handler]]) -> tuple[tuple[re.Pattern[str], Mapping[str, Handler]], ...]:
    return tuple((re.compile(pattern, re.ASCII), handlers) for pattern, handlers in rows)


_V: Final = VaultShape
_ROUTES: Final = _route_table(
    ("roles/?", {"list": _V.list_roles}),
    (f"roles/({NAME})", {"read": _V.read_role, "update": _V.refuse_roles, "delete": _V.refuse_roles}),
    (f"sign/{NAME}", {}),
    (f"issue/({NAME})", {"update": _V.refuse_issue}),
    ("config/ca", {"read": _V.read_ca, "update": _V.refuse_ca, "delete": _V.refuse_ca}),
    ("config/issuers", {"read": _V.read_default_issuer, "update": _V.refuse_ca}),
    ("issuers/?", {"list": _V.list_issuers}),
    (f"issuers/import(?:/({NAME}))?", {"update": _V.refuse_ca}),
    (f"issuer/({NAME})", {"read": _V.read_ca, "update": _V.refuse_ca, "delete": _V.refuse_ca}),
    (f"issuer/{NAME}/public_key|public_key", {}),
)


def _looks_public(rest: str) -> bool:
    """Vault opens every path of this form before it looks at the name in it."""
    parts = rest.split("/")
    return len(parts) == 3 and parts[0] == "issuer" and parts[2] == "public_key"


def _issuer(ca: CaKey) -> dict[str, str]:
    return {"issuer_name": "", "public_key": ca.public_key + "\n"}


def _page(asked: Asked, names: list[str]) -> list[str]:
    """`after` and `limit`, as Vault pages its lists; raises `BadRequest`."""
    after, limit = asked.first("after") or "", asked.first("limit") or "0"
    if re.fullmatch(r"[+-]?[0-9]{1,18}", limit) is None:
        sentence = (
            'Field validation failed: error converting input for field "limit":'
            " '' cannot parse value as 'int': strconv.ParseInt: invalid syntax"
        )
        raise BadRequest("field_malformed", "limit is no number", "leave limit out", {"vault": sentence})
    names = sorted(name for name in names if name > after)
    return names[: int(limit)] if int(limit) > 0 else names


def _list(asked: Asked, names: list[str], info: Mapping[str, object]) -> Answer:
    if not names:
        return responses.failure(404)
    return asked.granted({"key_info": info, "keys": names}, "after", "limit")


def _refuse_media_type(content_type: str) -> Answer | None:
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type:
        return responses.failure(400, "mime: no media type")
    if media_type != _MERGE_PATCH:
        return responses.failure(415, f"PATCH requires Content-Type of {_MERGE_PATCH}, provided {media_type}")
    return None


def _refuse_wrapping(environ: Mapping[str, Any]) -> Answer | None:
    text = str(environ.get("HTTP_X_VAULT_WRAP_TTL") or "")
    try:
        wanted = go_nanoseconds(text)
    except BadDuration as fault:
        return responses.failure(400, f"error parsing X-Vault-Wrap-TTL header: {fault}")
    if wanted < 0:
        return responses.failure(400, "error parsing X-Vault-Wrap-TTL header: requested wrap ttl cannot be negative")
    return responses.failure(400, REFUSALS["wrapping"]) if wanted else None


def _refuse_form(environ: Mapping[str, Any], operation: str, path: str) -> Answer | None:
    parts = path.split("/")
    if ".." in parts or "." in parts:
        return responses.failure(400, "relative paths not supported")
    if (refusal := _refuse_namespace(environ)) is not None:
        return refusal
    if operation == "options":
        return responses.failure(400, "cannot handle internal-only request operation")
    if operation in ("update", "patch") and path.endswith("/"):
        return responses.failure(400, "cannot write to a path ending in '/'")
    return None


def _refuse_namespace(environ: Mapping[str, Any]) -> Answer | None:
    if str(environ.get("HTTP_X_VAULT_NAMESPACE") or "").strip("/") in ("", "root"):
        return None
    return responses.failure(404, "namespace not found")
