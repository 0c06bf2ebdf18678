"""Smoke tests: real logins through `safe-session`, as people and agents make them.

Each function makes one observation and raises `SignerError` if it is not what it must be; `facts["log"]` of either is
the output of the login, for the evidence, without token or key. `on_each` observes all hosts at once.
"""

from __future__ import annotations

import binascii
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from signer.errors import BadFormat, BadPublicKey, SignerError
from signer.migration.config import CutoverFile, SignerFacts, Target
from signer.migration.plan import Observation
from signer.ssh.certificate import CertificateFields, decode_certificate
from signer.ssh.publickey import fingerprint_of, parse_public_key
from signer.subprocesses import CommandResult, run
from signer.units import plain

CONNECT_WITHIN: Final = 5  # seconds
LOGIN_WITHIN: Final = 15.0  # seconds for all of one login
AT_ONCE: Final = 8
MAX_CA_FILE: Final = 65536  # bytes
NOT_ALLOWED: Final = "principal_not_allowed"
_PACKAGES: Final = str(Path(__file__).parents[2])  # where this very program's package lies
_CERTIFICATE: Final = re.compile(r"^ssh-ed25519-cert-v01@openssh\.com ([A-Za-z0-9+/=]+)", re.MULTILINE)
_SERIAL: Final = re.compile(r"^safe-session: .*\(serial (\d{1,20}),", re.MULTILINE)
_NO_LOGIN: Final = 255  # ssh(1): of ssh itself, not of the command on the host
_PASSED_ON: Final = ("PATH", "HOME")
# The base point of Ed25519: a key that is in order, and to which nobody has the other half.
_NOBODYS_KEY: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFhmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZm"

FindCertificate = Callable[[int], Mapping[str, Any]]


class SmokeFailed(SignerError):
    """A login, or what must be seen of it, is not as it must be; `facts` are for the evidence."""


def smoke(file: CutoverFile, find: FindCertificate, *, backend: str, ca_fingerprint: str) -> Observation:
    """A real login to every target at once, each checked as by `smoke_login`; raises `SmokeFailed`."""
    seen = on_each(
        file.smoke,
        lambda target: smoke_login(target, file.signer, find, backend=backend, ca_fingerprint=ca_fingerprint),
    )
    count = len(file.smoke)
    return Observation(f"logins work on {count} of {count}", seen.facts)


def login_lines(file: CutoverFile) -> tuple[str, ...]:
    """A login to each target as a person would type it, for a plan."""
    return tuple(f"safe-session ssh -p {target.port} {target.user}@{target.host}" for target in file.smoke)


def smoke_login(
    target: Target,
    signer: SignerFacts,
    find: FindCertificate,
    *,
    backend: str,
    ca_fingerprint: str,
    within: float = LOGIN_WITHIN,
) -> Observation:
    """Logs in with a certificate of the service at `signer`, runs `true`, and checks the certificate.

    1  the login ends with status 0                                             smoke_login_failed
    2  the certificate, as the agent held it, is signed by `ca_fingerprint`     smoke_wrong_ca
    3  it is in the ledger (`find` returns its record), byte for byte            smoke_not_recorded
    4  the ledger says that `backend` signed it                                 smoke_wrong_backend
    """
    # 1
    ended = _safe_session(target, signer, "true", within)
    said = _told(target, ended)
    issued = _certificate(ended.out)
    if ended.status != 0 or issued is None:
        raise _login_failed(target, ended, ca_fingerprint, said)
    # 2
    fields, unsigned = issued
    signed_by = fingerprint_of(fields.ca_key)
    facts = {**said, "serial": str(fields.serial), "ca": signed_by, "principals": list(fields.principals)}
    if signed_by != ca_fingerprint:
        raise SmokeFailed(
            "smoke_wrong_ca",
            f"{target.name}: {signed_by} signed the certificate, not {ca_fingerprint}",
            "see which key the service holds: its /readyz",
            facts,
        )
    # 3
    try:
        found = find(fields.serial)
    except SignerError as error:
        raise SmokeFailed(
            "smoke_not_recorded",
            f"{target.name}: the ledger does not show certificate {fields.serial}: {error.text}",
            error.hint,
            facts,
        ) from None
    if found.get("to_be_signed_sha256") != sha256(unsigned).hexdigest() or found.get("ca") != signed_by:
        raise SmokeFailed(
            "smoke_not_recorded",
            f"{target.name}: the ledger has another certificate with serial {fields.serial}",
            "is signer.address the service that safe-session asked?",
            facts,
        )
    # 4
    if found.get("backend") != backend:
        raise SmokeFailed(
            "smoke_wrong_backend",
            f"{target.name}: the ledger says that {str(found.get('backend'))[:20]} signed it, not {backend}",
            "see the mode of the service: its /readyz",
            facts,
        )
    summary = f"{target.name}: logged in as {target.user}, serial {fields.serial}, signed by {backend} {signed_by}"
    return Observation(summary, {**facts, "backend": backend, "recorded": dict(found.get("recorded") or {})})


def smoke_refusal(
    sign: Callable[[str, Mapping[str, object]], object], role: str, allowed: Iterable[str]
) -> Observation:
    """Asks for principals that the policy does not allow, and is refused by it each time.

    `sign` asks the service for a certificate of a role, `allowed` are all principals that the policy lets anybody have.
    Raises `SmokeFailed` (`smoke_not_refused`, or `smoke_refusal_unclear` if something else than the policy said no).
    """
    known = frozenset(allowed)
    outside = [name for name in ("root", f"outside-{os.urandom(6).hex()}") if name not in known]
    for principal in outside:
        facts: dict[str, object] = {"role": role, "principal": principal}
        try:
            sign(role, {"public_key": _NOBODYS_KEY, "principals": [principal]})
        except SignerError as refusal:
            if refusal.code == NOT_ALLOWED:
                continue
            raise SmokeFailed(
                "smoke_refusal_unclear",
                f"asked for principal {principal}, it was not the policy that refused, but {refusal.code}",
                refusal.hint,
                {**facts, "code": refusal.code},
            ) from None
        raise SmokeFailed(
            "smoke_not_refused",
            f"a certificate for {principal} was issued, which the policy does not allow",
            "freeze the role, and look for what policy the service has in force",
            facts,
        )
    names = " and ".join(outside)
    return Observation(
        f"refused for {names}: {NOT_ALLOWED}", {"role": role, "principals": outside, "code": NOT_ALLOWED}
    )


def read_trusted_cas(
    target: Target, signer: SignerFacts, ca_fingerprint: str, *, within: float = LOGIN_WITHIN
) -> Observation:
    """Whether the host trusts the CA, as far as that can be read over a login of today.

    Where it cannot, the observation says so and `facts["trusted"]` is None. Raises `SmokeFailed` (`ca_not_trusted`, or
    `smoke_login_failed` if there is no login today).
    """
    place = target.trusted_ca_file
    if place is None:
        return Observation(f"{target.name}: cannot be read beforehand", {"target": target.name, "trusted": None})
    ended = _safe_session(target, signer, f"head -c {MAX_CA_FILE} -- {shlex.quote(place)}", within)
    said = _told(target, ended)
    if ended.status == _NO_LOGIN or _certificate(ended.out) is None:
        raise _login_failed(target, ended, "", said)
    if ended.status != 0:
        why = _last_line(ended) or f"status {ended.status}"
        return Observation(f"{target.name}: cannot be read beforehand: {why}", {**said, "trusted": None})
    found = _fingerprints(ended.out)
    facts = {**said, "file": place, "found": found, "trusted": ca_fingerprint in found}
    if ca_fingerprint not in found:
        raise SmokeFailed(
            "ca_not_trusted",
            f"{target.name}: {place} lacks {ca_fingerprint}",
            "add the line that `signer ca bundle` prints to it, on that host",
            facts,
        )
    return Observation(f"{target.name}: {place} has {ca_fingerprint}", facts)


def on_each(targets: Sequence[Target], observe: Callable[[Target], Observation]) -> Observation:
    """One observation of all targets, made at once; raises `SmokeFailed` with the first failure's code.

    `facts["targets"]` has what each of them gave, in either case.
    """
    with ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="smoke") as pool:
        seen = list(pool.map(lambda target: _seen(target, observe), targets))
    facts: dict[str, object] = {"targets": {target.name: fact for target, (_, fact) in zip(targets, seen, strict=True)}}
    failures = [outcome for outcome, _ in seen if isinstance(outcome, SignerError)]
    if failures:
        first, others = failures[0], len(failures) - 1
        text = f"{first.text}; {others} other host{'s' if others > 1 else ''}, too" if others else first.text
        raise SmokeFailed(first.code, text, first.hint, facts)
    return Observation("; ".join(one.summary for one, _ in seen if isinstance(one, Observation)), facts)


def _seen(target: Target, observe: Callable[[Target], Observation]) -> tuple[Observation | SignerError, object]:
    started = time.monotonic()
    try:
        seen: Observation | SignerError = observe(target)
    except SignerError as error:
        seen = error
    fact: dict[str, object] = {**seen.facts, "seconds": round(time.monotonic() - started, 2)}
    if isinstance(seen, SignerError):
        fact |= {"code": seen.code, "text": seen.text}
    return seen, fact


# --- one login -------------------------------------------------------------------------------------------------------


def login_line(target: Target, role: str, command: str) -> list[str]:
    """What is run for a login. Nothing of ssh's configuration files: a smoke login hangs on cutover.toml alone.

    `LocalCommand` runs here, after the login, with the session's private agent: it shows the certificate that was used.
    """
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": str(target.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "UpdateHostKeys": "no",
        "ConnectTimeout": str(CONNECT_WITHIN),
        "ConnectionAttempts": "1",
        "ClearAllForwardings": "yes",
        "PermitLocalCommand": "yes",
        "LocalCommand": "ssh-add -L",
        "LogLevel": "ERROR",
    }
    words = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    where = ["-F", "none", "-T", "-p", str(target.port), "-l", target.user, target.host]
    ours = ["-v", "--role", role, "--reason", f"smoke login to {target.name}"]
    return [sys.executable, "-m", "signer.safe_session", *ours, "ssh", *words, *where, command]


def _safe_session(target: Target, signer: SignerFacts, command: str, within: float) -> CommandResult:
    environment = {
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        "SHELL": "/bin/sh",  # runs LocalCommand
        "PYTHONPATH": _PACKAGES,
        "SAFE_SESSION_ADDR": signer.address,
        "SAFE_SESSION_TOKEN_FILE": str(signer.token_file),
    }
    return run(login_line(target, signer.role, command), environment=environment, within=within, most=2 * MAX_CA_FILE)


def _certificate(out: str) -> tuple[CertificateFields, bytes] | None:
    """The certificate that the local command showed, ahead of all that the host said; None if there was no login."""
    match = _CERTIFICATE.match(out)
    if match is None:
        return None
    try:
        fields, unsigned, _ = decode_certificate(binascii.a2b_base64(match[1]))
    except (BadFormat, ValueError):
        return None
    return fields, unsigned


def _told(target: Target, ended: CommandResult) -> dict[str, object]:
    """What is kept of a login, whether it worked or not."""
    serial = _SERIAL.search(ended.err)
    return {
        "target": target.name,
        "login": f"{target.user}@{target.host}:{target.port}",
        "status": ended.status,
        "seconds": round(ended.seconds, 2),
        "serial": serial[1] if serial else None,
        "log": "\n".join(_lines(ended.err))[:4000],
    }


def _login_failed(target: Target, ended: CommandResult, ca_fingerprint: str, said: Mapping[str, object]) -> SmokeFailed:
    last = _last_line(ended)
    hint = f"try it by hand: safe-session ssh -p {target.port} {target.user}@{target.host}"
    if ended.status is None:
        text = f"no login within {ended.seconds:.0f} s"
    elif "Permission denied (" in last and ca_fingerprint:
        text = f"{last.rstrip('.')}; it takes no certificate of {ca_fingerprint}"
        hint = "is that CA in the file that TrustedUserCAKeys of its sshd_config names, and the principal allowed?"
    else:
        text = last.rstrip(".") or f"the login ended with status {ended.status}"
    return SmokeFailed("smoke_login_failed", f"{target.name}: {text}", hint, dict(said))


def _last_line(ended: CommandResult) -> str:
    """The line that says why: safe-session's own error, or else the last one that is no hint."""
    lines = [line for line in _lines(ended.err) if not line.startswith("safe-session: hint:")]
    ours = [line for line in lines if line.startswith("safe-session: error:")]
    found = [*lines, *ours][-1:] or [""]
    return found[0].removeprefix("safe-session: error: ")[:300]


def _lines(text: str) -> list[str]:
    shown = (plain(line, instead=" ").strip() for line in text.splitlines())
    return [line[:500] for line in shown if line]


def _fingerprints(text: str) -> list[str]:
    """Of all keys in a file as TrustedUserCAKeys has it (sshd_config(5)): one a line, `#` begins a comment."""
    found = []
    for line in text.splitlines():
        words = line.strip()
        if not words or words.startswith(("#", "ssh-ed25519-cert-v01@openssh.com ")):
            continue
        try:
            found.append(parse_public_key(" ".join(words.split()[:2])).fingerprint)
        except BadPublicKey:
            continue  # sshd skips what it cannot read, too
    return found
