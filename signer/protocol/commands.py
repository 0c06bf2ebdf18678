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
from functools import lru_cache, partial
from typing import Annotated, Any, Final

import msgspec

from signer.errors import BadRequest, NotAuthenticated
from signer.model import BACKENDS, REQUEST_STATES, Assertion, Caller, EventFilter, Filter, Revocation, SignRequest
from signer.protocol import bodies
from signer.protocol.operations import OperationBody, read_digest
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
_Version = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Peer = Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]
_Fetches = Annotated[list[tuple[str, _Peer, _Version]], msgspec.Meta(max_length=MAX_FETCHES)]
_Field = Callable[[dict[str, Any], str], object]  # reads a field of a header, by its name
_REQUEST_ID: Final = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)


class _Sent(msgspec.Struct, frozen=True):
    """What every command has: who sends it."""

    caller: Caller


class Unauthenticated(_Sent, frozen=True):
    """Refuse a caller without a valid token; `role` is that of a sign or explain request, otherwise empty."""

    role: str
    fault: NotAuthenticated


class Sign(_Sent, frozen=True):
    """Issue a certificate. `request` is the error of a malformed body, shown only to an authenticated caller."""

    role: str
    request: SignRequest | BadRequest
    warnings: tuple[str, ...] = ()


class Explain(_Sent, frozen=True):
    """Report what policy would decide; signs and counts nothing."""

    role: str
    request: SignRequest | BadRequest


class Freeze(_Sent, frozen=True):
    """Stop issuing for `scope`: `all`, `identity:NAME` or `role:NAME`."""

    scope: str
    reason: str
    seconds: int | None = None  # for which it lasts; None for ever


class Unfreeze(_Sent, frozen=True):
    """Issue again for `scope`."""

    scope: str


class Revoke(_Sent, frozen=True):
    """Revoke certificates or a key for good."""

    revocation: Revocation
    reason: str


class PreviewRevocation(_Sent, frozen=True):
    """What a revocation would hit if it was made now."""

    revocation: Revocation


class ListRevocations(_Sent, frozen=True):
    """A page of revocations, newest first; `before` is the event of the last one of the page before."""

    before: int | None
    limit: int


class RecordOperation(_Sent, frozen=True):
    """Record an operation on the platform. `operation` is the error of a malformed body, as in `Sign`."""

    operation: OperationBody | BadRequest


class ListOperations(_Sent, frozen=True):
    """A page of recorded operations, newest first; `evidence` restricts it to those with that digest."""

    evidence: str | None
    before: int | None
    limit: int


class ListCertificates(_Sent, frozen=True):
    """A page of certificates, newest first; `active` restricts it to those valid now."""

    wanted: Filter
    active: bool


class ShowCertificate(_Sent, frozen=True):
    """One certificate with its complete record."""

    serial: int


class ShowHead(_Sent, frozen=True):
    """The newest entry of the ledger."""


class ListEntries(_Sent, frozen=True):
    """A page of the ledger's events as they are, oldest first, after event `after`."""

    after: int
    limit: int


class ListEvents(_Sent, frozen=True):
    """A page of the ledger's events, newest first."""

    wanted: EventFilter


class ShowActivity(_Sent, frozen=True):
    """How many certificates and refusals there were in each of the last hours."""


class ListLive(_Sent, frozen=True):
    """How many certificates are valid now, by identity."""


class ListIdentities(_Sent, frozen=True):
    """A page of the policy's identities by name, after `after`; only those whose name contains `part`."""

    part: str | None
    after: str | None
    limit: int


class ShowIdentity(_Sent, frozen=True):
    """One identity of the policy: what it may ask for, its tokens' ends, its keys, and what stops it now."""

    identity: str


class ListFreezes(_Sent, frozen=True):
    """The freezes in force."""


class ListRoles(_Sent, frozen=True):
    """The caller's roles."""


class ShowRole(_Sent, frozen=True):
    """One role of the policy."""

    role: str


class ShowCaller(_Sent, frozen=True):
    """The caller's identity, rights and token."""


class SignIn(_Sent, frozen=True):
    """Begin a console session of the caller, who shows a token."""


class SignOut(_Sent, frozen=True):
    """End the caller's console session."""


class ShowRequest(_Sent, frozen=True):
    """One request that waits for humans."""

    request: str


class ListRequests(_Sent, frozen=True):
    """A page of requests, newest first; `before` is the id of the last one of the page before."""

    state: str | None
    identity: str | None
    before: str | None


class Claim(_Sent, frozen=True):
    """Issue the certificate of an approved request; `secret` is the claim secret in hex."""

    request: str
    public_key: str
    secret: str | None

    def __repr__(self) -> str:
        return f"Claim({self.caller!r}, {self.request!r})"  # without the secret


class Approve(_Sent, frozen=True):
    """Approve a request with an armored signature or a passkey's assertion; the waiver is its `until` as text and its
    uses."""

    request: str
    signature: str | Assertion
    waiver: tuple[str, int] | None


class Deny(_Sent, frozen=True):
    """Deny a request."""

    request: str
    reason: str


class Withdraw(_Sent, frozen=True):
    """Withdraw the caller's own request."""

    request: str


class ListWaivers(_Sent, frozen=True):
    """The waivers in force."""


class EndWaiver(_Sent, frozen=True):
    """End a waiver."""

    waiver: str
    reason: str


class ListIncidents(_Sent, frozen=True):
    """The open incidents, or all that are kept."""

    also_closed: bool


class CloseIncident(_Sent, frozen=True):
    """Close an incident with a reference to a commit."""

    incident: str
    reference: str


class AddHostKeys(_Sent, frozen=True):
    """List a host with its names and public keys, in the place of an earlier entry only with `replace`, and with the
    principals that it lets in; None leaves those that are recorded."""

    name: str
    addresses: tuple[str, ...]
    keys: tuple[str, ...]
    replace: bool
    principals: tuple[str, ...] | None = None


class RemoveHostKeys(_Sent, frozen=True):
    """Take a host off the list."""

    host: str


class ListHostKeys(_Sent, frozen=True):
    """A page of the list of hosts, by name; `after` is the last name of the page before."""

    after: str | None


AboutHosts = AddHostKeys | RemoveHostKeys | ListHostKeys
AboutIdentities = ListLive | ListIdentities | ShowIdentity
AboutRequest = (
    ShowRequest | ListRequests | Approve | Deny | Withdraw | ListWaivers | EndWaiver | ListIncidents | CloseIncident
)
OfWholeLedger = ShowHead | ListEntries | ListEvents | ShowActivity | ListOperations
LedgerQuery = (
    OfWholeLedger
    | ListCertificates
    | ShowCertificate
    | PreviewRevocation
    | ListRevocations
    | ListFreezes
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


_Reader = Callable[[dict[str, Any], bytes, Caller], Command]


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
        return reader(header, body, msgspec.structs.replace(caller, local_user=local_user))
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
    try:
        fetches = msgspec.convert(header.get("fetches"), _Fetches)
    except msgspec.ValidationError:
        raise _bad_message("fetches") from None
    if not all(HOST_NAME.fullmatch(host) for host, _, _ in fetches):
        raise _bad_message("fetches")
    return fetches


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


def _read_integer(header: dict[str, Any], key: str, default: int | None = None, maximum: int = 2**63 - 1) -> int | None:
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
    wanted = Filter(
        identity=_optional_text(header, "identity"),
        role=_optional_text(header, "role"),
        principal=_optional_text(header, "principal"),
        fingerprint=_optional_text(header, "fingerprint"),
        backend=_read_choice(header, "backend", BACKENDS),
        before=_read_integer(header, "before"),
        limit=_read_limit(header),
    )
    return ListCertificates(caller, wanted, header.get("active") is True)


def _optional_text(header: dict[str, Any], key: str, maximum: int = 256) -> str | None:
    return None if header.get(key) is None else _read_text(header, key, maximum)


def _read_choice(header: dict[str, Any], key: str, choices: tuple[str, ...]) -> str | None:
    value = _optional_text(header, key)
    if value not in (None, *choices):
        raise BadRequest("field_malformed", f"{key} must be one of {', '.join(choices)}", f"correct {key}")
    return value


def _read_limit(header: dict[str, Any], key: str = "limit", default: int = 50) -> int:
    return _read_integer(header, key, default, MAX_PAGE) or 1


def _read_serial(header: dict[str, Any], key: str) -> int:
    serial = _read_integer(header, key, maximum=2**64 - 1)
    if serial is None:
        raise _bad_message(key)
    return serial


def _read_evidence(header: dict[str, Any], key: str) -> str | None:
    return None if header.get(key) is None else read_digest(_read_text(header, key))


def _read_record(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    fields = decode_body(body)
    try:
        return RecordOperation(caller, bodies.read_body_as(OperationBody, fields))
    except BadRequest as fault:
        return RecordOperation(caller, fault)


def _read_entries(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    return ListEntries(caller, _read_integer(header, "after", 0) or 0, _read_limit(header, default=MAX_PAGE))


def _read_events(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    wanted = EventFilter(
        kind=_optional_text(header, "kind"),
        identity=_optional_text(header, "identity"),
        since=_read_integer(header, "since"),
        before=_read_integer(header, "before"),
        only_others=header.get("only_others") is True,
        limit=_read_limit(header),
    )
    return ListEvents(caller, wanted)


def _read_preview(header: dict[str, Any], _body: bytes, caller: Caller) -> Command:
    return PreviewRevocation(caller, bodies.read_revocation(_read_text(header, "by"), _read_text(header, "value")))


def _read_freeze(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = bodies.read_body_as(bodies.FreezeBody, decode_body(body))
    return Freeze(caller, asked.scope, asked.reason, asked.seconds())


def _read_revoke(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = bodies.read_body_as(bodies.RevokeBody, decode_body(body))
    return Revoke(caller, bodies.read_revocation(asked.by, asked.value), asked.reason)


def _read_claim(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = bodies.read_body_as(bodies.ClaimBody, decode_body(body))
    return Claim(caller, _read_text(header, "request"), asked.public_key, asked.claim_secret)


def _read_approve(header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = bodies.read_body_as(bodies.ApproveBody, decode_body(body))
    waiver = None if asked.waiver is None else (asked.waiver.until, asked.waiver.uses)
    return Approve(caller, _read_text(header, "request"), asked.evidence(), waiver)


def _read_add_host(_header: dict[str, Any], body: bytes, caller: Caller) -> Command:
    asked = bodies.read_body_as(bodies.HostKeysBody, decode_body(body))
    principals = None if asked.principals is None else tuple(asked.principals)
    return AddHostKeys(caller, asked.name, tuple(asked.addresses), tuple(asked.keys), asked.replace, principals)


def _reader(command: Callable[..., Command], body: type[bodies.Body] | None = None, /, **fields: _Field) -> _Reader:
    """The reader of a command that consists of these fields of the header, and of all those of its body."""

    def read(header: dict[str, Any], raw: bytes, caller: Caller) -> Command:
        asked = {} if body is None else dict(bodies.read_body_as(body, decode_body(raw)))
        return command(caller, **{name: take(header, name) for name, take in fields.items()}, **asked)

    return read


_READERS: Final[dict[str, _Reader]] = {
    "sign": _read_sign,
    "explain": _read_explain,
    "freeze": _read_freeze,
    "unfreeze": _reader(Unfreeze, scope=_read_text),
    "revoke": _read_revoke,
    "preview_revocation": _read_preview,
    "revocations": _reader(ListRevocations, before=_read_integer, limit=_read_limit),
    "record": _read_record,
    "operations": _reader(ListOperations, evidence=_read_evidence, before=_read_integer, limit=_read_limit),
    "certificates": _read_list,
    "certificate": _reader(ShowCertificate, serial=_read_serial),
    "head": _reader(ShowHead),
    "entries": _read_entries,
    "events": _read_events,
    "activity": _reader(ShowActivity),
    "live": _reader(ListLive),
    "identities": _reader(ListIdentities, part=_optional_text, after=_optional_text, limit=_read_limit),
    "identity": _reader(ShowIdentity, identity=_read_text),
    "freezes": _reader(ListFreezes),
    "roles": _reader(ListRoles),
    "role": _reader(ShowRole, role=_read_text),
    "request": _reader(ShowRequest, request=_read_text),
    "requests": _reader(
        ListRequests,
        state=partial(_read_choice, choices=REQUEST_STATES),
        identity=_optional_text,
        before=_optional_text,
    ),
    "claim": _read_claim,
    "approve": _read_approve,
    "deny": _reader(Deny, bodies.DenyBody, request=_read_text),
    "withdraw": _reader(Withdraw, bodies.WithdrawBody, request=_read_text),
    "waivers": _reader(ListWaivers),
    "end_waiver": _reader(EndWaiver, bodies.EndBody, waiver=_read_text),
    "incidents": lambda header, _body, caller: ListIncidents(caller, header.get("state") == "all"),
    "close_incident": _reader(CloseIncident, bodies.CloseBody, incident=_read_text),
    "host_keys": _reader(ListHostKeys, after=partial(_optional_text, maximum=bodies.MAX_HOST_NAME)),
    "add_host_keys": _read_add_host,
    "remove_host_keys": _reader(RemoveHostKeys, host=partial(_read_text, maximum=bodies.MAX_HOST_NAME)),
    "sign_in": _reader(SignIn),
    "sign_out": _reader(SignOut),
    "whoami": _reader(ShowCaller),
}
