"""Checks every approval in a ledger again, years later and without the service. Pure.

What is checked needs only the events: each signature is over the recorded request, each certificate that names humans
is exactly what they signed, and no approval was used twice. With the revisions of policy.toml that were in force it is
also checked that each key was that person's, and that they had the right. `authority/core.py` decides by its own code;
this module shares with it what a policy requires and what events are called, and nothing else.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from signer.authority import approvals
from signer.authority.incidents import Incidents
from signer.authority.webauthn import VerifiedAssertion, verify_assertion
from signer.errors import BadFormat, BadSignature, Refused
from signer.model import BACKDATE, ApprovalKey, Assertion, Entry, Event, Passkey
from signer.policy.decide import Policy
from signer.policy.passkeys import encode_base64url, read_passkey
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import parse_public_key
from signer.ssh.sshsig import SshSignature, verify
from signer.ssh.statement import APPROVAL_NAMESPACE, approval_statement, request_digest
from signer.units import parse_timestamp


class Problem(NamedTuple):
    """What is wrong with the event `seq`."""

    seq: int
    text: str


@dataclass(frozen=True, slots=True)
class _Given:
    """A signature that verifies."""

    by: str
    signature: SshSignature | VerifiedAssertion
    passkey: Passkey | None  # as it was recorded
    is_software: bool
    waiver: Mapping[str, Any] | None


@dataclass(slots=True)
class _Asked:
    """A request, and what the events so far say of it."""

    frozen: Mapping[str, Any]
    digest: str
    given: dict[str, _Given] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)  # see `signature_mark`
    end: str | None = None
    is_used: bool = False
    waiver_used: int = 0
    waiver_ended: bool = False


@dataclass(slots=True)
class Audit:
    """The result: counts of signatures that verify and of certificates that they let be issued, and every problem.

    `keys` counts signatures by approver and fingerprint; `owned` has those pairs that a given policy confirms;
    `unknown_policies` counts the certificates that were issued under a policy that was not given.
    """

    signatures: int = 0
    software: int = 0
    certificates: int = 0
    problems: list[Problem] = field(default_factory=list)
    keys: Counter[tuple[str, str]] = field(default_factory=Counter)
    owned: set[tuple[str, str]] = field(default_factory=set)
    unknown_policies: Counter[str] = field(default_factory=Counter)


class ApprovalAuditor:
    """Takes the events of a ledger in their order; `audit` is what it has found. `policies` are keyed by digest."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.audit = Audit()
        self._policies = policies
        self._asked: dict[str, _Asked] = {}
        self._incidents = Incidents()
        self._counters: dict[str, int] = {}  # the highest of each passkey, by fingerprint

    def take(self, entry: Entry) -> None:
        """Checks one event; one that no signer wrote is a problem, too."""
        if not entry.kind.startswith(("approval.", "certificate.issued", "waiver.", "incident.", "freeze.set")):
            return
        try:
            self._take(entry, json.loads(entry.body))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            self._add(entry, f"its body is not one of {entry.kind}")

    def _add(self, entry: Entry, text: str) -> None:
        self.audit.problems.append(Problem(entry.seq, text))

    def _take(self, entry: Entry, body: Mapping[str, Any]) -> None:
        match entry.kind:
            case "approval.requested":
                self._request(entry, body)
            case "approval.given":
                self._give(entry, body)
            case "certificate.issued":
                self._issue(entry, body)
            case "waiver.used" | "waiver.ended":
                if (asked := self._of_waiver(body["waiver"])) is not None:
                    asked.waiver_used += entry.kind == "waiver.used"
                    asked.waiver_ended |= entry.kind == "waiver.ended"
            case "freeze.set":
                self._freeze(body["scope"])
            case "incident.opened" | "incident.closed":
                self._incidents.apply(Event(entry.kind, entry.actor, dict(body)), entry.time_ms // 1000)
            case kind if kind in approvals.ENDS and (asked := self._asked.get(body["request"])) is not None:
                asked.end = approvals.ENDS[kind]

    def _request(self, entry: Entry, body: Mapping[str, Any]) -> None:
        frozen, name = body["frozen"], body["request"]
        if name in self._asked:
            self._add(entry, f"{name} was requested before")
        elif frozen["id"] != name or frozen["identity"] != entry.actor:
            self._add(entry, f"{name} has the fields of another request")
        else:
            if request_digest(frozen) != body["digest"]:
                self._add(entry, f"{name}: its digest is not that of its fields")
            self._asked[name] = _Asked(frozen, request_digest(frozen))

    def _freeze(self, scope: str) -> None:
        """A freeze voids the signatures of an identity, and ends the waivers of everybody concerned."""
        kind, _, name = scope.partition(":")
        for asked in self._asked.values():
            concerned = {asked.frozen["identity"], *asked.given} if kind == "identity" else {asked.frozen["role"]}
            if kind == "all" or name in concerned:
                asked.waiver_ended = True
            if kind == "identity":
                asked.given.pop(name, None)

    # --- a signature ----------------------------------------------------------------------------------------------

    def _give(self, entry: Entry, body: Mapping[str, Any]) -> None:
        name, approver = body["request"], body["approver"]
        asked = self._asked.get(name)
        if asked is None:
            self._add(entry, f"{approver} approves {name}, which was never requested")
            return
        faults = self._record_faults(entry, body, asked)
        try:
            statement = approval_statement(name, asked.digest, approver, body["waiver"])
            given = self._verified(body, statement)
        except BadFormat as fault:
            faults.append(f"does not verify: {fault.text}")
        else:
            faults += self._signature_faults(body, given)
            faults += self._counter_faults(body, given, asked)
            asked.given[approver] = given
            self.audit.signatures += 1
            self.audit.software += given.is_software
            self.audit.keys[approver, given.signature.fingerprint] += 1
        for text in faults:
            self._add(entry, f"the approval of {name} by {approver} {text}")

    @staticmethod
    def _verified(body: Mapping[str, Any], statement: bytes) -> _Given:
        """The signature of an event, which verifies by the key that is recorded with it; raises `BadFormat`."""
        approver, waiver = body["approver"], body["waiver"]
        if "assertion" not in body:
            key = parse_public_key(body["public_key"])
            signature = verify(body["signature"], statement, APPROVAL_NAMESPACE, key)
            return _Given(approver, signature, None, not key.kind.startswith("sk-"), waiver)
        parts, line = body["assertion"], body["passkey"]
        name = _as_base64url(line["id"])
        passkey, problems = read_passkey(name, _as_base64url(line["public_key"]), line["rp"], list(line["origins"]))
        if passkey is None or problems:
            raise BadSignature("assertion_malformed", "its passkey is not one that policy.toml could have")
        fields = {field: _as_base64url(parts[field]) for field in ("authenticator_data", "client_data", "signature")}
        asserted = verify_assertion(Assertion(name, **fields), statement, passkey)
        return _Given(approver, asserted, passkey, is_software=False, waiver=waiver)

    def _counter_faults(self, body: Mapping[str, Any], given: _Given, asked: _Asked) -> list[str]:
        """The same signature twice; and a passkey's counter that went back in the whole ledger: it has a copy."""
        asserted = given.signature
        faults: list[str] = []
        mark = approvals.signature_mark(body)
        if mark is not None and mark in asked.seen:
            faults.append("is a signature that was recorded before")
        asked.seen.add(mark or "")
        if not isinstance(asserted, VerifiedAssertion):
            if body.get("counter", asserted.counter) != asserted.counter:
                faults.append("is recorded with another counter than it has")
            return faults
        if (body["counter"], body["content"]) != (asserted.counter, asserted.content):
            faults.append("is recorded with another counter or content than it has")
        known = self._counters.get(asserted.fingerprint, 0)
        self._counters[asserted.fingerprint] = max(known, asserted.counter)
        if (known or asserted.counter) and asserted.counter <= known:
            faults.append(f"has counter {asserted.counter} after {known}: the passkey may have been copied")
        return faults

    @staticmethod
    def _record_faults(entry: Entry, body: Mapping[str, Any], asked: _Asked) -> list[str]:
        """What is wrong with the event, whatever was signed."""
        faults = []
        if entry.actor != body["approver"]:
            faults.append(f"was recorded for {entry.actor}")
        if body["digest"] != asked.digest:
            faults.append("has another digest than the request")
        if asked.end is not None:
            faults.append(f"came after the request was {asked.end}")
        elif entry.time_ms // 1000 > parse_timestamp(asked.frozen["expires"]):
            faults.append("came after the request had expired")
        return faults

    @staticmethod
    def _signature_faults(body: Mapping[str, Any], given: _Given) -> list[str]:
        """What a signature that verifies does not say, though the event does."""
        faults, signature, is_software = [], given.signature, given.is_software
        recorded = (body["key"], body["software"], body["user_present"], body["user_verified"])
        if recorded != (signature.fingerprint, is_software, signature.user_present, signature.user_verified):
            faults.append("is recorded with another key or other flags than it has")
        if not is_software and not signature.user_present:
            faults.append("was made without a touch of the key")
        if given.passkey is not None and not signature.user_verified:
            faults.append("was made without a verification of the user")
        return faults

    # --- a certificate --------------------------------------------------------------------------------------------

    def _of_waiver(self, waiver: str) -> _Asked | None:
        return self._asked.get(approvals.request_of_waiver(waiver))

    def _issue(self, entry: Entry, body: Mapping[str, Any]) -> None:
        serial, names = body["serial"], body.get("approved_by")
        policy = self._policies.get(body["policy"])
        if names is None:
            role = None if policy is None else policy.roles.get(body["role"])
            if role is not None and approvals.needs_humans(role, body["kind"]):
                self._add(entry, f"certificate {serial} of role {role.name} was issued without an approval")
            return
        self.audit.certificates += 1
        request, waiver = body["request"], body["waiver"]
        asked = self._asked.get(request) if waiver is None else self._of_waiver(waiver)
        if asked is None:
            self._add(entry, f"certificate {serial} names {waiver or request}, which was never requested")
            return
        if request is not None:
            self._use(entry, body, self._asked.get(request))
        faults = self._waiver_faults(entry, body, asked) if waiver is not None else []
        for name in names:
            # The asker's own signature is over their own request, also where a waiver stands for the others'.
            if name not in (self._asked[request] if name == body["identity"] and request else asked).given:
                faults.append(f"names {name}, who has given no signature that counts")
        if policy is None:
            self.audit.unknown_policies[body["policy"]] += 1
        else:
            faults += self._policy_faults(entry, body, asked, policy)
        for fault in faults:
            self._add(entry, f"certificate {serial} {fault}")

    def _use(self, entry: Entry, body: Mapping[str, Any], asked: _Asked | None) -> None:
        """The certificate uses its own request up, and is exactly what was asked for."""
        serial = body["serial"]
        if asked is None:
            self._add(entry, f"certificate {serial} names {body['request']}, which was never requested")
            return
        if asked.is_used or asked.end is not None:
            self._add(
                entry, f"certificate {serial} was issued for {body['request']} after it was {asked.end or 'used'}"
            )
        asked.is_used = True
        wrong = [name for name, value in _issued_fields(body).items() if value != _frozen_fields(asked.frozen)[name]]
        if (line := asked.frozen["binding"].get("public_key")) is not None and body["fingerprint"] != _print_of(line):
            wrong.append("public key")
        if wrong:
            self._add(entry, f"certificate {serial} has other {', '.join(wrong)} than {body['request']}")

    @staticmethod
    def _waiver_faults(entry: Entry, body: Mapping[str, Any], asked: _Asked) -> list[str]:
        faults, waiver = [], body["waiver"]
        others = [asked.given[name] for name in body["approved_by"] if name in asked.given and name != body["identity"]]
        terms = [given.waiver for given in others if given.waiver is not None]
        if len(terms) < len(others) or not others:
            faults.append(f"names {waiver}, which an approver has not given")
        elif entry.time_ms // 1000 > min(parse_timestamp(term["until"]) for term in terms):
            faults.append(f"was issued after {waiver} had ended")
        elif asked.waiver_used >= min(term["uses"] for term in terms):
            faults.append(f"was issued after {waiver} was used up")
        if asked.waiver_ended or asked.end in ("denied", "withdrawn"):
            faults.append(f"was issued after {waiver} was ended")
        issued, waived = _issued_fields(body), _frozen_fields(asked.frozen)
        narrower = {"ttl": issued["ttl"] <= waived["ttl"], "extensions": issued["extensions"] <= waived["extensions"]}
        wrong = [name for name, value in issued.items() if not narrower.get(name, value == waived[name])]
        if body["address"] != asked.frozen["address"]:
            wrong.append("address")
        return [*faults, f"has other {', '.join(wrong)} than {waiver} covers"] if wrong else faults

    def _policy_faults(self, entry: Entry, body: Mapping[str, Any], asked: _Asked, policy: Policy) -> list[str]:
        """What the policy in force says against it: too few approvers, or one without the right or the key."""
        identity = body["identity"]
        overdue = self._incidents.is_overdue(identity, entry.time_ms // 1000)
        wanted = approvals.requirement_of(policy.roles.get(body["role"]), body["kind"], needs_second_human=overdue)
        names = dict.fromkeys(body["approved_by"])
        others = [name for name in names if name != identity]
        faults = []
        if len(others) < wanted.count:
            faults.append(f"has {len(others)} of the {wanted.count} approvals that its policy requires")
        if wanted.presence and identity not in names:
            faults.append(f"lacks the signature of {identity} that its policy requires")
        own = asked if body["request"] is None else self._asked.get(body["request"], asked)
        for name in names:
            given = (own if name == identity else asked).given.get(name)
            if given is not None:
                faults += self._approver_faults(given, asked, wanted, policy, is_own=name == identity)
        return faults

    def _approver_faults(
        self, given: _Given, asked: _Asked, wanted: approvals.Requirement, policy: Policy, *, is_own: bool
    ) -> list[str]:
        identity = policy.identities.get(given.by)
        if identity is None:
            return [f"names {given.by}, whom its policy does not know"]
        faults, signature = [], given.signature
        line = next((line for line in identity.approval_keys if _is_of_line(given, line)), None)
        try:
            if not is_own:
                approvals.check_approver(identity, approvals.FrozenRequest.from_json(asked.frozen), wanted, {})
            if line is not None:
                approvals.check_key_kind(line, wanted, asked.frozen["role"])
                approvals.check_flags(line, present=signature.user_present, verified=signature.user_verified)
        except Refused as fault:
            faults.append(f"names {given.by}, against its policy: {fault.text}")
        if line is None:
            faults.append(f"names {given.by}, whose key by its policy is not {signature.fingerprint}")
        elif not faults:
            self.audit.owned.add((given.by, signature.fingerprint))
        return faults


def _is_of_line(given: _Given, line: ApprovalKey) -> bool:
    """Whether a signature is by the key of a line; a passkey is also for the same pages."""
    return line == given.passkey if isinstance(line, Passkey) else line.fingerprint == given.signature.fingerprint


def _as_base64url(text: str) -> str:
    """Recorded base64 as base64url; raises `ValueError` if it is not base64."""
    return encode_base64url(base64.b64decode(text, validate=True))


def _print_of(line: str) -> str:
    return fingerprint_of(base64.b64decode(line.split()[1]))


def _issued_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a certificate has in common with its request; `ttl` is in seconds."""
    return {
        **{name: body[name] for name in ("identity", "kind", "role", "key_id", "principals", "critical_options")},
        "extensions": set(body["extensions"]),
        "ttl": body["valid_before"] - body["valid_after"] - body.get("backdate", BACKDATE),
    }


def _frozen_fields(frozen: Mapping[str, Any]) -> dict[str, Any]:
    extensions = {f"{name}={value}" if value else name for name, value in frozen["extensions"].items()}
    return {**frozen, "extensions": extensions}
