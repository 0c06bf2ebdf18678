"""The keeper's commands, one frozen type each, and the parser of their messages.

A message is a number and a space, one line of JSON, `{"op", "token", "address", "request_id", …}`, then a newline and
the body as the caller sent it. The reply begins with the same number and a space. Messages are not trusted: everything
is checked here, and a malformed message raises `BadRequest`. The caller is authenticated from the line alone; without a
valid token the body is never decoded.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

import msgspec

from signer.errors import BadRequest, NotAuthenticated
from signer.model import BACKENDS, REQUEST_STATES, Assertion, Caller, EventFilter, Filter, Revocation, SignRequest
from signer.protocol.approval_requests import ApproveBody, ClaimBody, CloseBody, DenyBody, EndBody, WithdrawBody
from signer.protocol.bodies import read_body_as
from signer.protocol.freeze_request import FreezeBody
from signer.protocol.host_request import MAX_HOST_NAME, HostKeysBody
from signer.protocol.operations import OperationBody, read_digest, read_operation
from signer.protocol.revocation_request import RevokeBody, read_revocation
from signer.protocol.sign_request import MAX_BODY, decode_body, read_native_sign, read_vault_sign, vault_sign_warnings

MAX_HEADER: Final = 16 * 1024  # bytes
MAX_NUMBER: Final = 20  # digits of a message's number
MAX_MESSAGE: Final = MAX_HEADER + 1 + MAX_BODY
MAX_REPLY: Final = 384 * 1024  # bytes; fits into one message with the kernel's default limits
MAX_PAGE: Final = 200
MAX_WAIT: Final = 50  # seconds for which a client may wait for a decision; many give up after 60
MAX_ADDRESS: Final = 64  # characters; an IPv6 address has 45 at most
MAX_FETCHES: Final = 100  # in one message `seen`, whose header must hold them
HOST_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", re.ASCII)
_REQUEST_ID: Final = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Unauthenticated:
    """Refuse a caller without a valid token; `role` is that of a sign or explain request, otherwise empty."""

    caller: Caller
    role: str
    fault: NotAuthenticated


@dataclass(frozen=True, slots=True)
class Sign:
    """Issue a certificate. `request` is the error of a malformed body, shown only to an authenticated caller."""

    caller: Caller
    role: str
    request: SignRequest | BadRequest
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explain:
    """Report what policy would decide; signs and counts nothing."""

    caller: Caller
    role: str
    request: SignRequest | BadRequest


@dataclass(frozen=True, slots=True)
class Freeze:
    """Stop issuing for `scope`: `all`, `identity:NAME` or `role:NAME`."""

    caller: Caller
    scope: str
    reason: str
    seconds: int | None = None  # for which it lasts; None for ever


@dataclass(frozen=True, slots=True)
class Unfreeze:
    """Issue again for `scope`."""

    caller: Caller
    scope: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """Revoke certificates or a key for good."""

    caller: Caller
    revocation: Revocation
    reason: str


@dataclass(frozen=True, slots=True)
class PreviewRevocation:
    """What a revocation would hit if it was made now."""

    caller: Caller
    revocation: Revocation


@dataclass(frozen=True, slots=True)
class ListRevocations:
    """A page of revocations, newest first; `before` is the event of the last one of the page before."""

    caller: Caller
    before: int | None
    limit: int


@dataclass(frozen=True, slots=True)
class RecordOperation:
    """Record an operation on the platform. `operation` is the error of a malformed body, as in `Sign`."""

    caller: Caller
    operation: OperationBody | BadRequest


@dataclass(frozen=True, slots=True)
class ListOperations:
    """A page of recorded operations, newest first; `evidence` restricts it to those with that digest."""

    caller: Caller
    evidence: str | None
    before: int | None
    limit: int


@dataclass(frozen=True, slots=True)
class ListCertificates:
    """A page of certificates, newest first; `active` restricts it to those valid now."""

    caller: Caller
    wanted: Filter
    active: bool


@dataclass(frozen=True, slots=True)
class ShowCertificate:
    """One certificate with its complete record."""

    caller: Caller
    serial: int


@dataclass(frozen=True, slots=True)
class ShowHead:
    """The newest entry of the ledger."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class ListEntries:
    """A page of the ledger's events as they are, oldest first, after event `after`."""

    caller: Caller
    after: int
    limit: int


@dataclass(frozen=True, slots=True)
class ListEvents:
    """A page of the ledger's events, newest first."""

    caller: Caller
    wanted: EventFilter


@dataclass(frozen=True, slots=True)
class ShowActivity:
    """How many certificates and refusals there were in each of the last hours."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class ListLive:
    """How many certificates are valid now, by identity."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class ListIdentities:
    """A page of the policy's identities by name, after `after`; only those whose name contains `part`."""

    caller: Caller
    part: str | None
    after: str | None
    limit: int


@dataclass(frozen=True, slots=True)
class ShowIdentity:
    """One identity of the policy: what it may ask for, its tokens' ends, its keys, and what stops it now."""

    caller: Caller
    identity: str


@dataclass(frozen=True, slots=True)
class ListFreezes:
    """The freezes in force."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class ListRoles:
    """The caller's roles."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class ShowRole:
    """One role of the policy."""

    caller: Caller
    role: str


@dataclass(frozen=True, slots=True)
class ShowCaller:
    """The caller's identity, rights and token."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class SignIn:
    """Begin a console session of the caller, who shows a token."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class SignOut:
    """End the caller's console session."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class ShowRequest:
    """One request that waits for humans."""

    caller: Caller
    request: str


@dataclass(frozen=True, slots=True)
class ListRequests:
    """A page of requests, newest first; `before` is the id of the last one of the page before."""

    caller: Caller
    state: str | None
    identity: str | None
    before: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    """Issue the certificate of an approved request; `secret` is the claim secret in hex."""

    caller: Caller
    request: str
    public_key: str
    secret: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Approve:
    """Approve a request with an armored signature or a passkey's assertion; the waiver is its `until` as text and its
    uses."""

    caller: Caller
    request: str
    signature: str | Assertion
    waiver: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class Deny:
    """Deny a request."""

    caller: Caller
    request: str
    reason: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Withdraw the caller's own request."""

    caller: Caller
    request: str


@dataclass(frozen=True, slots=True)
class ListWaivers:
    """The waivers in force."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class EndWaiver:
    """End a waiver."""

    caller: Caller
    waiver: str
    reason: str


@dataclass(frozen=True, slots=True)
class ListIncidents:
    """The open incidents, or all that are kept."""

    caller: Caller
    also_closed: bool


@dataclass(frozen=True, slots=True)
class CloseIncident:
    """Close an incident with a reference to a commit."""

    caller: Caller
    incident: str
    reference: str


@dataclass(frozen=True, slots=True)
class AddHostKeys:
    """List a host with its names and public keys, in the place of an earlier entry only with `replace`, and with the
    principals that it lets in; None leaves those that are recorded."""

    caller: Caller
    name: str
    addresses: tuple[str, ...]
    keys: tuple[str, ...]
    replace: bool
    principals: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class RemoveHostKeys:
    """Take a host off the list."""

    caller: Caller
    name: str


@dataclass(frozen=True, slots=True)
class ListHostKeys:
    """A page of the list of hosts, by name; `after` is the last name of the page before."""

    caller: Caller
    after: str | None


AboutHosts = AddHostKeys | RemoveHostKeys | ListHostKeys
AboutIdentities = ListLive | ListIdentities | ShowIdentity
AboutRequest = (
    ShowRequest | ListRequests | Approve | Deny | Withdraw | ListWaivers | EndWaiver | ListIncidents | CloseIncident
)
LedgerQuery = (
    ListCertificates
    | ShowCertificate
    | PreviewRevocation
    | ListRevocations
    | ShowHead
    | ListEntries
    | ListEvents
    | ShowActivity
    | ListFreezes
    | ListOperations
    | ListRoles
    | ShowRole
    | ShowCaller
)
Query = LedgerQuery | AboutIdentities
Command = (
    Unauthenticated
    | Sign
    | Explain
    | Freeze
    | Unfreeze
    | Revoke
    | RecordOperation
    | Claim
    | SignIn
    | SignOut
    | AboutHosts
    | AboutRequest
    | Query
)


def read_command(
    header: dict[str, Any], body: bytes, authenticate: Callable[[Caller], None], local_user: str | None = None
) -> Command:
    """The command of a message; raises `BadRequest`. `local_user` is the account that the kernel names, if it counts.

    If `authenticate` raises `NotAuthenticated`, only the caller and the role are read.
    """
    reader = _READERS.get(str(header.get("op")))
    if reader is None:
        raise _bad_message("op")
    caller = read_caller(header)
    if local_user is not None:
        return reader(header, body, replace(caller, local_user=local_user))
    try:
        authenticate(caller)
    except NotAuthenticated as fault:
        role = _read_text(header, "role") if reader in (_read_sign, _read_explain) else ""
        return Unauthenticated(caller, role, fault)
    return reader(header, body, caller)


def read_sizes(header: dict[str, Any]) -> tuple[int, int]:
    """The sizes `from` and `to` of a proof's message, in order; raises `BadRequest`."""
    old, new = header.get("from"), header.get("to")
    if type(old) is not int or type(new) is not int or not 0 <= old <= new < 2**63:
        raise BadRequest(
            "field_malformed",
            "from and to must be numbers of events, from not above to",
            "take the sizes of two checkpoints",
        )
    return old, new


def split_number(message: bytes) -> tuple[bytes, bytes]:
    """The number in front of a message, which its reply repeats, and the message; an empty one if there is none."""
    end = message.find(b" ", 0, MAX_NUMBER + 1)
    if end > 0 and message[:end].isdigit():
        return message[:end], message[end + 1 :]
    return b"", message


def split_message(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body; raises `BadRequest`."""
    line, _, body = message.partition(b"\n")
    if len(line) > MAX_HEADER:
        raise _bad_message("header")
    try:
        header = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Python's decoder also takes lone surrogates, and numbers that no float64 holds.
        try:
            header = json.loads(line)
        except (ValueError, RecursionError):
            raise _bad_message("header") from None
    if not isinstance(header, dict):
        raise _bad_message("header")
    return header, body


def read_fetches(header: dict[str, Any]) -> list[tuple[str, str, int]]:
    """The fetches in a message `seen`: host, address and version of the list; raises `BadRequest`."""
    fetches = header.get("fetches")
    if not isinstance(fetches, list) or len(fetches) > MAX_FETCHES:
        raise _bad_message("fetches")
    found = []
    for fetch in fetches:
        match fetch:
            case [str() as host, str() as peer, int() as version] if (
                HOST_NAME.fullmatch(host) and len(peer) <= MAX_ADDRESS and 0 <= version < 2**63
            ):
                found.append((host, peer, version))
            case _:
                raise _bad_message("fetches")
    return found


def _bad_message(what: str) -> BadRequest:
    return BadRequest(
        "message_malformed",
        f"the message to the keeper is malformed: {what}",
        "restart the service: api and keeper must have the same version",
    )


def read_caller(header: dict[str, Any]) -> Caller:
    """The sender of a message; raises `BadRequest`."""
    token, address, request_id = header.get("token"), header.get("address"), header.get("request_id")
    if token is not None and not isinstance(token, str):
        raise _bad_message("token")
    if not isinstance(request_id, str) or _REQUEST_ID.fullmatch(request_id) is None:
        raise _bad_message("request_id")
    if address is not None:
        address = normalize_address(address) if isinstance(address, str) else None
        if address is None:
            raise _bad_message("address")
    return Caller(token or None, address, request_id, is_unattended=header.get("unattended") is True)


def normalize_address(text: str) -> str | None:
    """The canonical form of an IP address, with IPv4-mapped IPv6 as IPv4; None if it is not an address."""
    return _normalize_short(text) if len(text) < MAX_ADDRESS else None  # keeps long texts of callers out of the cache


@lru_cache(maxsize=1024)
def _normalize_short(text: str) -> str | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:  # a zone is local to the sender: a certificate cannot pin it
            return None
        return str(address.ipv4_mapped or address)
    return str(address)


def _read_text(header: dict[str, Any], key: str, maximum: int = 256) -> str:
    value = header.get(key)
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= maximum:
        raise _bad_message(key)
    return value


def _read_integer(header: dict[str, Any], key: str, default: int | None, maximum: int = 2**63 - 1) -> int | None:
    value = header.get(key, default)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise BadRequest("field_malformed", f"{key} must be a whole number from 0 to {maximum}", f"correct {key}")
    return value


def _read_sign(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    role = _read_text(header, "role")
    if header.get("shape") == "vault":
        fields = decode_body(body, str(header.get("content_type", "")))
        warnings = tuple(vault_sign_warnings(fields))
        try:
            return Sign(caller, role, read_vault_sign(role, fields), warnings)
        except BadRequest as fault:
            return Sign(caller, role, fault, warnings)
    return Sign(caller, role, _read_native(role, body))


def _read_native(role: str, body: bytes) -> SignRequest | BadRequest:
    fields = decode_body(body)
    try:
        return read_native_sign(role, fields)
    except BadRequest as fault:
        return fault


def _read_explain(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    role = _read_text(header, "role")
    return Explain(caller, role, _read_native(role, body))


def _read_list(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    def optional(key: str) -> str | None:
        return None if header.get(key) is None else _read_text(header, key)

    limit = _read_integer(header, "limit", 50, MAX_PAGE) or 1
    wanted = Filter(
        identity=optional("identity"),
        role=optional("role"),
        principal=optional("principal"),
        fingerprint=optional("fingerprint"),
        backend=_read_backend(optional("backend")),
        before=_read_integer(header, "before", None),
        limit=limit,
    )
    return ListCertificates(caller, wanted, header.get("active") is True)


def _read_backend(backend: str | None) -> str | None:
    if backend not in (None, *BACKENDS):
        raise BadRequest("field_malformed", f"backend must be one of {', '.join(BACKENDS)}", "correct backend")
    return backend


def _read_record(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    fields = decode_body(body)
    try:
        return RecordOperation(caller, read_operation(fields))
    except BadRequest as fault:
        return RecordOperation(caller, fault)


def _read_operations(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    evidence = None if header.get("evidence") is None else read_digest(_read_text(header, "evidence"))
    limit = _read_integer(header, "limit", 50, MAX_PAGE) or 1
    return ListOperations(caller, evidence, _read_integer(header, "before", None), limit)


def _read_entries(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    limit = _read_integer(header, "limit", MAX_PAGE, MAX_PAGE) or 1
    return ListEntries(caller, _read_integer(header, "after", 0) or 0, limit)


def _read_events(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    wanted = EventFilter(
        kind=_optional_text(header, "kind"),
        identity=_optional_text(header, "identity"),
        since=_read_integer(header, "since", None),
        before=_read_integer(header, "before", None),
        only_others=header.get("only_others") is True,
        limit=_read_integer(header, "limit", 50, MAX_PAGE) or 1,
    )
    return ListEvents(caller, wanted)


def _read_identities(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    limit = _read_integer(header, "limit", 50, MAX_PAGE) or 1
    return ListIdentities(caller, _optional_text(header, "part"), _optional_text(header, "after"), limit)


def _read_show(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    serial = _read_integer(header, "serial", None, 2**64 - 1)
    if serial is None:
        raise _bad_message("serial")
    return ShowCertificate(caller, serial)


def _read_freeze(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = read_body_as(FreezeBody, decode_body(body))
    return Freeze(caller, asked.scope, asked.reason, asked.seconds())


def _read_revoke(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = read_body_as(RevokeBody, decode_body(body))
    return Revoke(caller, asked.revocation(), asked.reason)


def _read_preview(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    return PreviewRevocation(caller, read_revocation(_read_text(header, "by"), _read_text(header, "value")))


def _read_revocations(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    limit = _read_integer(header, "limit", 50, MAX_PAGE) or 1
    return ListRevocations(caller, _read_integer(header, "before", None), limit)


def _optional_text(header: dict[str, Any], key: str) -> str | None:
    return None if header.get(key) is None else _read_text(header, key)


def _read_requests(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    state = _optional_text(header, "state")
    if state not in (None, *REQUEST_STATES):
        raise BadRequest("field_malformed", f"state must be one of {', '.join(REQUEST_STATES)}", "correct state")
    return ListRequests(caller, state, _optional_text(header, "identity"), _optional_text(header, "before"))


def _read_claim(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = read_body_as(ClaimBody, decode_body(body))
    return Claim(caller, _read_text(header, "request"), asked.public_key, asked.claim_secret)


def _read_approve(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = read_body_as(ApproveBody, decode_body(body))
    waiver = None if asked.waiver is None else (asked.waiver.until, asked.waiver.uses)
    return Approve(caller, _read_text(header, "request"), asked.evidence(), waiver)


def _read_deny(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    return Deny(caller, _read_text(header, "request"), read_body_as(DenyBody, decode_body(body)).reason)


def _read_withdraw(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    read_body_as(WithdrawBody, decode_body(body))
    return Withdraw(caller, _read_text(header, "request"))


def _read_end_waiver(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    return EndWaiver(caller, _read_text(header, "waiver"), read_body_as(EndBody, decode_body(body)).reason)


def _read_close(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    return CloseIncident(caller, _read_text(header, "incident"), read_body_as(CloseBody, decode_body(body)).reference)


def _read_add_host(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = read_body_as(HostKeysBody, decode_body(body))
    principals = None if asked.principals is None else tuple(asked.principals)
    return AddHostKeys(caller, asked.name, tuple(asked.addresses), tuple(asked.keys), asked.replace, principals)


def _read_hosts(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    after = header.get("after")
    return ListHostKeys(caller, None if after is None else _read_text(header, "after", MAX_HOST_NAME))


_READERS: Final[dict[str, Callable[[dict[str, Any], bytes, Caller], Command]]] = {
    "sign": _read_sign,
    "explain": _read_explain,
    "freeze": _read_freeze,
    "unfreeze": lambda header, _body, caller: Unfreeze(caller, _read_text(header, "scope")),
    "revoke": _read_revoke,
    "preview_revocation": _read_preview,
    "revocations": _read_revocations,
    "record": _read_record,
    "operations": _read_operations,
    "certificates": _read_list,
    "certificate": _read_show,
    "head": lambda _header, _body, caller: ShowHead(caller),
    "entries": _read_entries,
    "events": _read_events,
    "activity": lambda _header, _body, caller: ShowActivity(caller),
    "live": lambda _header, _body, caller: ListLive(caller),
    "identities": _read_identities,
    "identity": lambda header, _body, caller: ShowIdentity(caller, _read_text(header, "identity")),
    "freezes": lambda _header, _body, caller: ListFreezes(caller),
    "roles": lambda _header, _body, caller: ListRoles(caller),
    "role": lambda header, _body, caller: ShowRole(caller, _read_text(header, "role")),
    "request": lambda header, _body, caller: ShowRequest(caller, _read_text(header, "request")),
    "requests": _read_requests,
    "claim": _read_claim,
    "approve": _read_approve,
    "deny": _read_deny,
    "withdraw": _read_withdraw,
    "waivers": lambda _header, _body, caller: ListWaivers(caller),
    "end_waiver": _read_end_waiver,
    "incidents": lambda header, _body, caller: ListIncidents(caller, header.get("state") == "all"),
    "close_incident": _read_close,
    "host_keys": _read_hosts,
    "add_host_keys": _read_add_host,
    "remove_host_keys": lambda header, _body, caller: RemoveHostKeys(caller, _read_text(header, "host", MAX_HOST_NAME)),
    "sign_in": lambda _header, _body, caller: SignIn(caller),
    "sign_out": lambda _header, _body, caller: SignOut(caller),
    "whoami": lambda _header, _body, caller: ShowCaller(caller),
}
