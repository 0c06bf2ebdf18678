"""A ledger with very many certificates, made by `signer.ledger`'s own commit: the chain is a real one."""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

from scripts.bench.load import new_public_line
from signer.authority.certificates import issued_event, prepare_certificate
from signer.ledger.store import Ledger
from signer.model import Caller, Event, Grant
from signer.ssh.publickey import parse_public_key

BATCH: Final = 5_000  # events a transaction
LIVES: Final = 900  # seconds of each certificate
SPAN: Final = 90 * 86_400  # seconds over which the expired ones are spread
IDENTITIES: Final = tuple(f"agent-{number:02}" for number in range(40))
ROLES: Final = ("llmops", "deploy", "backup", "database", "readonly")
RARE: Final = "once-a-year"  # an identity, role and principal of a handful of certificates, all of them old
RARE_EVERY: Final = 250_000
_POLICY_DIGEST: Final = "0" * 64


def fill_ledger(
    data_dir: Path,
    certificates: int,
    active: int,
    now: int,
    progress: Callable[[int, int], None],
    refusal_every: int | None = None,
) -> tuple[str, int]:
    """Records `certificates`, the newest `active` of them still valid at `now` (seconds) for some minutes; a refusal
    after each `refusal_every` of them.

    Returns the fingerprint of one in the middle, and the number of events.
    """
    source = random.Random(1)  # noqa: S311 - the same mix in every run
    template = _template(now)
    ledger = Ledger(data_dir)
    middle = ""
    try:
        for start in range(0, certificates, BATCH):
            size = min(BATCH, certificates - start)
            events = []
            for number in range(start, start + size):
                issued = _issued_at(number, certificates, active, now)
                events.append(_event(template, number, issued, source))
                if number == certificates // 2:
                    middle = str(events[-1].body["fingerprint"])
                if refusal_every is not None and number % refusal_every == 0:
                    events.append(_refusal(number, source))
            ledger.commit(events, _issued_at(start + size - 1, certificates, active, now) * 1000)
            progress(start + size, certificates)
        return middle, ledger.head().seq
    finally:
        ledger.close()


def _refusal(number: int, source: random.Random) -> Event:
    code, role = source.choice(("principal_not_allowed", "limit_reached", "ttl_above_max")), source.choice(ROLES)
    body: dict[str, object] = {"code": code, "text": f"refused for the {number}th time", "role": role}
    return Event("request.refused", source.choice(IDENTITIES), {**body, "address": "127.0.0.1", "request_id": "r"})


def _issued_at(number: int, certificates: int, active: int, now: int) -> int:
    expired = certificates - active
    if number < expired:
        return now - SPAN + (SPAN - 2 * LIVES) * number // max(expired, 1)
    return now - LIVES // 3 * (certificates - number) // max(active, 1)


def _template(now: int) -> dict[str, object]:
    """The body of a real `certificate.issued` event."""
    grant = Grant(
        identity="agent-00",
        kind="agent",
        role="llmops",
        public_key=parse_public_key(new_public_line()),
        key_id="agent-00:llmops",
        principals=("llmops",),
        ttl=LIVES,
        backdate=30,
        critical_options=(),
        extensions=("permit-pty",),
        reason=None,
        address="127.0.0.1",
    )
    draft = prepare_certificate(grant, 1, os.urandom(32), now, parse_public_key(new_public_line()).blob)
    caller = Caller(None, "127.0.0.1", "00000000-0000-4000-8000-000000000000")
    return issued_event(draft, caller, _POLICY_DIGEST, "local", "SHA256:" + "A" * 43).body


def _event(template: dict[str, object], number: int, issued: int, source: random.Random) -> Event:
    if number % RARE_EVERY == RARE_EVERY // 2:
        identity = role = RARE
        principals = [RARE]
    else:
        identity, role = source.choice(IDENTITIES), source.choice(ROLES)
        principals = [role] if number % 4 else [role, f"{role}-{identity}"]
    random_bytes = source.randbytes(64)
    body = {
        **template,
        "serial": str(number + 1),
        "identity": identity,
        "role": role,
        "principals": principals,
        "key_id": f"{identity}:{role}",
        "fingerprint": "SHA256:" + base64.b64encode(random_bytes[:32]).decode().rstrip("="),
        "valid_after": issued - 30,
        "valid_before": issued + LIVES,
        "to_be_signed_sha256": random_bytes[32:].hex(),
    }
    return Event("certificate.issued", identity, body)
