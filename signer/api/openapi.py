"""/api/openapi.json: OpenAPI 3.1 of the native API, generated from the models. `ROUTES` lists every route.

A test compares it with Flask's map of routes in both directions, and real responses with the models.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from signer import __version__
from signer.api.published import FILES
from signer.api.schemas import Alive, Problem, WhoAmI
from signer.model import BACKENDS, REQUEST_STATES, RevokedBy
from signer.protocol import bodies, replies
from signer.protocol.commands import MAX_WAIT
from signer.protocol.operations import DIGEST, OperationBody
from signer.protocol.sign_request import PRINTABLE, SignBody

_SCHEMAS: Final = "#/components/schemas/"


@dataclass(frozen=True, slots=True)
class Query:
    name: str
    text: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `answer` is a model or the content type of a text.

    `op` is the keeper's command, empty where none is asked; it gets the name in the path as its field `named`.
    """

    method: str
    path: str
    op: str
    text: str
    answer: type[BaseModel] | str
    body: type[BaseModel] | None = None
    status: int = 200
    faults: tuple[int, ...] = (403,)  # other statuses, besides those that follow from token, path, query and body
    queries: tuple[Query, ...] = ()
    is_open: bool = False  # needs no token
    accepted: type[BaseModel] | None = None  # the answer 202, while humans have not approved
    required: tuple[str, ...] = ()  # fields of the body that other routes with this model do not need
    named: str = ""  # "" for the name that the path gives it

    @property
    def statuses(self) -> list[int]:
        """What the route answers besides `status`, without what the edge answers before it."""
        is_read = self.body is not None or self.queries or "{" in self.path
        by_form = {401: not self.is_open, 503: not self.is_open, 400: is_read, 413: self.body is not None}
        return sorted({*self.faults, *(status for status, applies in by_form.items() if applies)})


# What the edge answers before any route sees the request: malformed, late, too large, a long line, too many requests
# without a known token, a large head.
EDGE_FAULTS: Final = (400, 408, 413, 414, 429, 431)
_WORD: Final = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": PRINTABLE}
_HOST: Final = {**_WORD, "maxLength": bodies.MAX_HOST_NAME}
_SEQ: Final = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_SERIAL: Final = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}


def _pages(rows: str, default: int = 50) -> tuple[Query, ...]:
    """The parameters of a list that goes backwards."""
    limit = {"type": "integer", "minimum": 1, "maximum": 200, "default": default}
    return Query("before", "`before` of the previous page", _SEQ), Query("limit", f"{rows} per page", limit)


_LIST: Final = (
    Query("identity", "issued to this identity; another identity requires the right ledger.read", _WORD),
    Query("role", "issued for this role", _WORD),
    Query("principal", "with this principal", _WORD),
    Query("fingerprint", "of the public key, SHA256:…", _WORD),
    Query("backend", "signed by signer's CA key or by Vault", {"type": "string", "enum": list(BACKENDS)}),
    Query("active", "true: only certificates valid now", {"type": "boolean", "default": False}),
    *_pages("certificates"),
)
PROOF: Final = (
    Query("from", "number of events of the older checkpoint", _SEQ),
    Query("to", "number of events of the newer one", _SEQ),
)
_STATES: Final = {"type": "string", "enum": list(REQUEST_STATES)}
_REQUESTS: Final = (
    Query("state", "in this state now", _STATES),
    Query("identity", "asked by this identity", _WORD),
    Query("before", "`before` of the previous page", _WORD),
)
_WAIT: Final = (
    Query("wait", "seconds to wait while it is pending", {"type": "integer", "minimum": 0, "maximum": MAX_WAIT}),
)
_INCIDENTS: Final = (Query("state", "all: also closed ones", {"type": "string", "enum": ["all", "open"]}),)
_ENTRIES: Final = (
    Query("after", "`after` of the previous page; default: from the first event on", _SEQ),
    _pages("events", 200)[1],
)
_OPERATIONS: Final = (
    Query("evidence", "with this evidence", {"type": "string", "pattern": f"^{DIGEST}$"}),
    *_pages("operations"),
)
_PREVIEW: Final = (
    Query("by", "as in POST /api/revocations", {"type": "string", "enum": list(get_args(RevokedBy))}),
    Query("value", "as in POST /api/revocations", {"type": "string", "maxLength": 256}),
)
ROUTES: Final = (
    Route(
        "POST", "/api/sign/{role}", "sign", "Issue a certificate, or ask humans to approve it", replies.Certificate,
        SignBody, 201, (403, 404, 409, 429), accepted=replies.RequestDetails, required=("public_key",),
    ),
    Route(
        "POST", "/api/explain/{role}", "explain", "Show the policy decision; signs nothing", replies.Explanation,
        SignBody, faults=(403, 404),
    ),
    Route(
        "GET", "/api/certificates", "certificates",
        "List certificates, newest first; the header Link names the next page", replies.CertificatePage, queries=_LIST,
    ),
    Route(
        "GET", "/api/certificates/{serial}", "certificate", "Show one certificate with its ledger entries",
        replies.CertificateDetails, faults=(404,),
    ),
    Route("GET", "/api/ledger/head", "head", "The newest entry of the ledger", replies.Recorded),
    Route(
        "GET", "/api/ledger/checkpoint", "checkpoint",
        "The newest checkpoint of the ledger: a signed note, c2sp.org/tlog-checkpoint", "text/plain", faults=(503,),
        is_open=True,
    ),
    Route(
        "GET", "/api/ledger/proof", "proof", "Prove that the ledger of one size begins with that of a smaller one",
        replies.ConsistencyProof, faults=(403, 404, 503), queries=PROOF, is_open=True,
    ),
    Route(
        "GET", "/api/ledger/entries", "entries",
        "All events of the ledger in their order, page by page, for a copy of it", replies.LedgerPage, queries=_ENTRIES,
    ),
    Route(
        "GET", "/api/operations", "operations",
        "List operations on the platform, newest first; pages as for certificates", replies.OperationPage,
        queries=_OPERATIONS,
    ),
    Route(
        "POST", "/api/operations", "record", "Record an operation; returns its ledger entry", replies.OperationDetails,
        OperationBody, 201,
    ),
    Route("GET", "/api/freezes", "freezes", "The freezes in force that you may see", replies.Freezes, faults=()),
    Route(
        "POST", "/api/freezes", "freeze", "Stop issuing to an identity, for a role, or at all", replies.FreezeState,
        bodies.FreezeBody, 201,
    ),
    Route(
        "DELETE", "/api/freezes/{scope}", "unfreeze", "Issue again", replies.FreezeState, faults=(403, 404),
    ),
    Route(
        "GET", "/api/revocations", "revocations", "List revocations, newest first; pages as for certificates",
        replies.RevocationPage, queries=_pages("revocations"),
    ),
    Route(
        "GET", "/api/revocations/preview", "preview_revocation",
        "What a revocation would hit now; needs the right revoke", replies.RevocationPreview, queries=_PREVIEW,
    ),
    Route(
        "POST", "/api/revocations", "revoke", "Revoke certificates or a key for good; needs the right revoke",
        replies.Revoked, bodies.RevokeBody, 201,
    ),
    Route(
        "GET", "/api/host-keys", "host_keys", "List the hosts whose keys are known, by name", replies.HostKeysPage,
        queries=(Query("after", "`after` of the previous page", _HOST),),
    ),
    Route(
        "POST", "/api/host-keys", "add_host_keys", "List a host with its keys; needs the right hosts", replies.HostKeys,
        bodies.HostKeysBody, 201, (403, 409),
    ),
    Route(
        "DELETE", "/api/host-keys/{host}", "remove_host_keys", "Take a host off the list; needs the right hosts",
        replies.HostRemoved, faults=(403, 404),
    ),
    Route(
        "GET", "/api/whoami", "whoami", "Who the caller is: identity, roles, rights, and when the token ends",
        WhoAmI, faults=(),
    ),
    Route(
        "GET", "/api/requests", "requests",
        "List requests that you may see, newest first, also those that ended in the last day", replies.RequestPage,
        queries=_REQUESTS,
    ),
    Route(
        "GET", "/api/requests/{name}", "request", "Show a request; with `wait`, as soon as it is decided",
        replies.RequestDetails, faults=(404,), queries=_WAIT, named="request",
    ),
    Route(
        "POST", "/api/requests/{name}/claim", "claim", "Issue the certificate of an approved request",
        replies.Certificate, bodies.ClaimBody, 201, (403, 404, 409, 429), accepted=replies.RequestDetails,
        named="request",
    ),
    Route(
        "POST", "/api/requests/{name}/approve", "approve", "Approve a request with a signature", replies.RequestDetails,
        bodies.ApproveBody, faults=(403, 404, 409), named="request",
    ),
    Route(
        "POST", "/api/requests/{name}/deny", "deny", "Deny a request", replies.RequestDetails, bodies.DenyBody,
        faults=(403, 404, 409), named="request",
    ),
    Route(
        "POST", "/api/requests/{name}/withdraw", "withdraw", "Withdraw your own request", replies.RequestDetails,
        bodies.WithdrawBody, faults=(403, 404, 409), named="request",
    ),
    Route(
        "GET", "/api/waivers", "waivers", "List the waivers in force that you may see", replies.Waivers, faults=(),
    ),
    Route(
        "POST", "/api/waivers/{name}/end", "end_waiver", "End a waiver", replies.WaiverEnded, bodies.EndBody,
        faults=(403, 404), named="waiver",
    ),
    Route(
        "GET", "/api/incidents", "incidents", "List the incidents that you may see, newest first", replies.Incidents,
        faults=(), queries=_INCIDENTS,
    ),
    Route(
        "POST", "/api/incidents/{name}/close", "close_incident", "Close an incident with a reference to a commit",
        replies.IncidentRow, bodies.CloseBody, faults=(403, 404, 409), named="incident",
    ),
    Route(
        "GET", "/api/ca", "ca", "Every CA key that hosts must trust, for TrustedUserCAKeys", "text/plain",
        faults=(503,), is_open=True,
    ),
    *(
        Route("GET", f"/api/{name}", "", text, content_type, faults=(503,), is_open=True)
        for name, (content_type, text) in FILES.items()
    ),
    Route("GET", "/api/hosts", "hosts", "Which hosts have which revocation list", replies.Hosts),
    Route("GET", "/api/openapi.json", "", "This document", "application/json", faults=(), is_open=True),
    Route("GET", "/healthz", "", "Check that the API process responds", Alive, faults=(), is_open=True),
    Route(
        "GET", "/readyz", "health", "Check that certificates can be issued", replies.Ready, faults=(503,), is_open=True,
    ),
    Route(
        "GET", "/metrics", "metrics", "Metrics for Prometheus; by role with the right ledger.read, else totals",
        "text/plain", faults=(401, 503), is_open=True,
    ),
)  # fmt: skip


@cache
def text() -> str:
    """The document as JSON; made at the first request for it, as that takes a tenth of the api's start."""
    return json.dumps(document()) + "\n"


@cache
def document() -> dict[str, Any]:
    models: set[type[BaseModel]] = {Problem}
    for route in ROUTES:
        models |= {
            part
            for part in (route.answer, route.body, route.accepted)
            if part is not None and not isinstance(part, str)
        }
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=_SCHEMAS + "{model}")
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "signer", "version": __version__, "description": "SSH user certificates, by policy."},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "vault": {"type": "apiKey", "in": "header", "name": "X-Vault-Token"},
            },
        },
        "security": [{"bearer": []}, {"vault": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    if isinstance(route.answer, str):
        content: dict[str, Any] = {route.answer: {"schema": {"type": "string"}}}
        if route.answer == "application/json":
            content = {route.answer: {"schema": {"type": "object"}}}
    else:
        content = _of_model(route.answer, "application/json")
    responses: dict[str, Any] = {
        str(route.status): {"description": HTTPStatus(route.status).phrase, "content": content}
    }
    if route.accepted is not None:
        accepted = _of_model(route.accepted, "application/json")
        responses["202"] = {"description": HTTPStatus.ACCEPTED.phrase, "content": accepted}
    for status in sorted({*route.statuses, *EDGE_FAULTS}):
        problem = _of_model(Problem, "application/problem+json")
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": problem}
    queries = [
        {"name": query.name, "in": "query", "description": query.text, "schema": query.schema}
        for query in route.queries
    ]
    operation: dict[str, Any] = {
        "operationId": "_".join([route.method.lower(), *re.findall(r"\w+", route.path.removeprefix("/api"))]),
        "summary": route.text,
        "parameters": [*_path_parameters(route), *queries],
        "responses": responses,
    }
    if route.body is not None:
        content = _of_model(route.body, "application/json")
        if route.required:
            content["application/json"]["schema"]["required"] = list(route.required)
        operation["requestBody"] = {"required": True, "content": content}
    if route.is_open:
        operation["security"] = []
    return operation


def _of_model(model: type[BaseModel], content_type: str) -> dict[str, Any]:
    return {content_type: {"schema": {"$ref": _SCHEMAS + model.__name__}}}


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    names = [part.strip("{}") for part in route.path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": path_schema(name)} for name in names]


def path_schema(name: str) -> dict[str, Any]:
    return {"serial": _SERIAL, "host": _HOST}.get(name, _WORD)
