"""Smoke tests: real logins through `safe-session`, as people and agents make them, and offers of a certificate to sshd.

Each function returns one observation or raises `SignerError` if it fails; `facts["log"]` of both is the output of the
login, for the evidence, without token or key. `on_each` runs for all hosts in parallel.

sshd answers the offer of a public key before it wants a signature (RFC 4252 section 7, SSH_MSG_USERAUTH_PK_OK). Without
the private key there is no signature: sshd logs no login and opens no session.
"""

from __future__ import annotations

import binascii
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from signer.address import SERVER_UID
from signer.errors import BadFormat, BadPublicKey, SignerError
from signer.migration.config import CutoverFile, SignerFacts, Target
from signer.migration.plan import Observation, Step
from signer.ssh.certificate import CertificateFields, decode_certificate
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import parse_public_key
from signer.subprocesses import CommandResult, run
from signer.units import plain

CONNECT_WITHIN: Final = 5  # seconds
LOGIN_WITHIN: Final = 15.0  # seconds for all of one login
AT_ONCE: Final = 8
MAX_CA_FILE: Final = 65536  # bytes
NOT_ALLOWED: Final = "principal_not_allowed"
_PACKAGES: Final = str(Path(__file__).parents[2])  # directory of the running package
_CERTIFICATE: Final = re.compile(r"^ssh-ed25519-cert-v01@openssh\.com ([A-Za-z0-9+/=]+)", re.MULTILINE)
_SERIAL: Final = re.compile(r"^safe-session: .*\(serial (\d{1,20}),", re.MULTILINE)
_NO_LOGIN: Final = 255  # ssh(1): an error of ssh itself, not the status of the remote command
_PASSED_ON: Final = ("PATH", "HOME", SERVER_UID)
# The base point of Ed25519: a valid key whose private half is unknown.
_KEY_WITHOUT_PRIVATE_HALF: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFhmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZm"

FindCertificate = Callable[[int], Mapping[str, Any]]


class SmokeFailed(SignerError):
    """A login failed, or its certificate is not the expected one; `facts` are for the evidence."""


def smoke(file: CutoverFile, find: FindCertificate, *, backend: str, ca_fingerprint: str) -> Observation:
    """Logs in to all targets in parallel, each checked by `smoke_login`; raises `SmokeFailed`."""
    seen = on_each(
        file.smoke,
        lambda target: smoke_login(target, file.signer, find, backend=backend, ca_fingerprint=ca_fingerprint),
    )
    count = len(file.smoke)
    return Observation(f"logins work on {count} of {count}", seen.facts)


def login_step(
    name: str,
    file: CutoverFile,
    action: Callable[[], Observation],
    *,
    again: str = "",
    also: str = "",
    verify: Callable[[], Observation] | None = None,
    reads: tuple[str, ...] = ("sshd", "ledger"),
) -> Step:
    """A step that logs in to all targets; `also` is the line of what `verify` does."""
    title = f"log in to {', '.join(target.name for target in file.smoke)}{again}"
    lines = (*login_lines(file), also) if also else login_lines(file)
    return Step(name, title, "logs in", action, lines=lines, verify=verify, reads=reads)


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
    2  the certificate, as in the agent, is signed by `ca_fingerprint`          smoke_wrong_ca
    3  it is in the ledger (`find` returns its record), byte for byte            smoke_not_recorded
    4  the ledger records `backend` as its signer                                smoke_wrong_backend
    """
    # 1
    ended = _safe_session(target, signer, "true", within)
    said = _login_facts(target, ended)
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
            "check the service's CA key: see its /readyz",
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
            "check that signer.address is the service that safe-session uses",
            facts,
        )
    # 4
    if found.get("backend") != backend:
        raise SmokeFailed(
            "smoke_wrong_backend",
            f"{target.name}: the ledger records {str(found.get('backend'))[:20]} as the signer, not {backend}",
            "check the service's mode: see its /readyz",
            facts,
        )
    summary = f"{target.name}: logged in as {target.user}, serial {fields.serial}, signed by {backend} {signed_by}"
    return Observation(summary, {**facts, "backend": backend, "recorded": dict(found.get("recorded") or {})})


def smoke_refusal(
    sign: Callable[[str, Mapping[str, object]], object], role: str, allowed: Iterable[str]
) -> Observation:
    """Requests principals that the policy does not allow; each request must be refused.

    `sign` requests a certificate of a role, `allowed` contains every principal of the policy. Raises `SmokeFailed`
    (`smoke_not_refused`, or `smoke_refusal_unclear` if the refusal has another cause than the policy).
    """
    known = frozenset(allowed)
    outside = [name for name in ("root", f"outside-{os.urandom(6).hex()}") if name not in known]
    for principal in outside:
        facts: dict[str, object] = {"role": role, "principal": principal}
        try:
            sign(role, {"public_key": _KEY_WITHOUT_PRIVATE_HALF, "principals": [principal]})
        except SignerError as refusal:
            if refusal.code == NOT_ALLOWED:
                continue
            raise SmokeFailed(
                "smoke_refusal_unclear",
                f"the request for principal {principal} was refused with {refusal.code}, not by the policy",
                refusal.hint,
                {**facts, "code": refusal.code},
            ) from None
        raise SmokeFailed(
            "smoke_not_refused",
            f"a certificate for {principal} was issued, which the policy does not allow",
            "freeze the role, and check which policy the service has loaded",
            facts,
        )
    names = " and ".join(outside)
    return Observation(
        f"refused for {names}: {NOT_ALLOWED}", {"role": role, "principals": outside, "code": NOT_ALLOWED}
    )


def read_trusted_cas(
    target: Target, signer: SignerFacts, ca_fingerprint: str, *, within: float = LOGIN_WITHIN
) -> Observation:
    """Checks over a login that the host trusts the CA.

    If that cannot be read, the observation reports it and `facts["trusted"]` is None. Raises `SmokeFailed`
    (`ca_not_trusted`, or `smoke_login_failed` if no login works now).
    """
    if target.trusted_ca_file is None:
        return Observation(f"{target.name}: cannot be read beforehand", {"target": target.name, "trusted": None})
    place = str(target.trusted_ca_file)
    ended = _safe_session(target, signer, f"head -c {MAX_CA_FILE} -- {shlex.quote(place)}", within)
    said = _login_facts(target, ended)
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
            "on that host, add the line that `signer ca bundle` prints to the file",
            facts,
        )
    return Observation(f"{target.name}: {place} has {ca_fingerprint}", facts)


def on_each(targets: Sequence[Target], observe: Callable[[Target], Observation]) -> Observation:
    """One observation of all targets, made in parallel; raises `SmokeFailed` with the first failure's code.

    `facts["targets"]` has the facts of each target in both cases.
    """
    with ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="smoke") as pool:
        seen = list(pool.map(lambda target: _seen(target, observe), targets))
    facts: dict[str, object] = {"targets": {target.name: fact for target, (_, fact) in zip(targets, seen, strict=True)}}
    failures = [outcome for outcome, _ in seen if isinstance(outcome, SignerError)]
    if failures:
        first, others = failures[0], len(failures) - 1
        text = f"{first.text}; {others} more host{'s' if others > 1 else ''}" if others else first.text
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
    """The command of a login. It ignores ssh's configuration files: a smoke login depends on cutover.toml alone.

    `LocalCommand` runs on this host after the login, with the session's private agent: it shows the certificate.
    """
    options = {"PermitLocalCommand": "yes", "LocalCommand": "ssh-add -L", "LogLevel": "ERROR"}
    ours = ["-v", "--role", role, "--reason", f"smoke login to {target.name}"]
    return [sys.executable, "-m", "signer.safe_session", *ours, *_ssh_line(target, options, command)]


def _ssh_line(target: Target, more: Mapping[str, str], command: str) -> list[str]:
    """A connection to a target, without the configuration files of user and system: no questions, its known host key,
    nothing forwarded, and the options of `more`."""
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": str(target.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "UpdateHostKeys": "no",
        "ConnectTimeout": str(CONNECT_WITHIN),
        "ConnectionAttempts": "1",
        "ClearAllForwardings": "yes",
        **more,
    }
    words = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", *words, "-F", "none", "-T", "-p", str(target.port), "-l", target.user, target.host, command]


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
    """The certificate that the local command printed before any output of the host; None if there was no login."""
    match = _CERTIFICATE.match(out)
    if match is None:
        return None
    try:
        fields, unsigned, _ = decode_certificate(binascii.a2b_base64(match[1]))
    except (BadFormat, ValueError):
        return None
    return fields, unsigned


def _login_facts(target: Target, ended: CommandResult) -> dict[str, object]:
    """The facts of a login for the evidence, successful or not."""
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
        text = f"{last.rstrip('.')}; it does not accept certificates of {ca_fingerprint}"
        hint = "check that TrustedUserCAKeys of its sshd_config has that CA and that the principal is allowed"
    else:
        text = last.rstrip(".") or f"the login ended with status {ended.status}"
    return SmokeFailed("smoke_login_failed", f"{target.name}: {text}", hint, dict(said))


def _last_line(ended: CommandResult) -> str:
    """The cause: safe-session's own error, or else the last line that is neither a hint nor a note."""
    besides = ("safe-session: hint:", "safe-session: note:")
    lines = [line for line in _lines(ended.err) if not line.startswith(besides)]
    ours = [line for line in lines if line.startswith("safe-session: error:")]
    found = [*lines, *ours][-1:] or [""]
    return found[0].removeprefix("safe-session: error: ")[:300]


def _lines(text: str) -> list[str]:
    shown = (plain(line, instead=" ").strip() for line in text.splitlines())
    return [line[:500] for line in shown if line]


def _fingerprints(text: str) -> list[str]:
    """Fingerprints of the keys in a TrustedUserCAKeys file (sshd_config(5)): one key per line, `#` begins a comment."""
    found = []
    for line in text.splitlines():
        words = line.strip()
        if not words or words.startswith(("#", "ssh-ed25519-cert-v01@openssh.com ")):
            continue
        try:
            found.append(parse_public_key(" ".join(words.split()[:2])).fingerprint)
        except BadPublicKey:
            continue  # sshd also skips lines that it cannot parse
    return found


# --- offers of a certificate ----------------------------------------------------------------------------------------


_PASSED_TO_SSH: Final = ("PATH", "HOME")
_ACCEPTED: Final = re.compile(r"^debug1: Server accepts key: .* (SHA256:[A-Za-z0-9+/]{43})(?:\s|$)", re.MULTILINE)
_METHODS: Final = re.compile(r"^debug1: Authentications that can continue: (\S+)", re.MULTILINE)
# What is kept of ssh's debug output: the answer and what led to it.
_TELLING: Final = re.compile(
    r"debug1: (?:Authenticating to|Remote protocol version|Server host key|Host .* is known|Will attempt key"
    r"|Authentications that can continue|Offering public key|Server accepts key|send_pubkey_test)"
)


def offer_certificate(
    target: Target, certificate: str, signer: SignerFacts, *, within: float = LOGIN_WITHIN
) -> Observation:
    """Offers the certificate line to the target's sshd as its login user; `facts["trusted"]` is the answer.

    Raises `SmokeFailed`: `certificate_refused`; `ca_not_trusted` if the host's CA file, then read over a login, shows
    why; or `smoke_login_failed` without an answer.
    """
    fields = certificate_fields(certificate)
    ca = fingerprint_of(fields.ca_key)
    ended = _offer(target, certificate, within)
    facts: dict[str, object] = {
        "target": target.name,
        "login": f"{target.user}@{target.host}:{target.port}",
        "serial": str(fields.serial),
        "ca": ca,
        "principals": list(fields.principals),
        "log": "\n".join(_telling(ended)),
    }
    if fingerprint_of(fields.key) in _ACCEPTED.findall(ended.err):
        summary = f"{target.name}: sshd accepts certificates of {ca} for {target.user}"
        return Observation(summary, {**facts, "trusted": True})
    methods = _METHODS.search(ended.err)
    if methods is None:
        raise _no_answer(target, ended, facts)
    try:
        read_trusted_cas(target, signer, ca, within=within)
    except SmokeFailed as error:
        if error.code == "ca_not_trusted":
            raise
    why = "" if "publickey" in methods[1].split(",") else f"; it offers {methods[1][:80]} only"
    raise SmokeFailed(
        "certificate_refused",
        f"{target.name}: sshd refuses certificates of {ca} for {target.user}{why}",
        "its log says why at LogLevel VERBOSE; or run the preflight on that host",
        {**facts, "trusted": False},
    )


def certificate_fields(line: str) -> CertificateFields:
    """The fields of a certificate line; raises `BadFormat`."""
    try:
        return decode_certificate(binascii.a2b_base64(line.split()[1].encode(), strict_mode=True))[0]
    except (ValueError, IndexError):
        raise BadFormat("certificate_not_understood", "the sample is not a certificate") from None


def offer_line(target: Target, certificate: str) -> list[str]:
    """The command of an offer; `certificate` is the name of its file. No agent, identity or token takes part."""
    options = {
        "LogLevel": "DEBUG1",
        "PreferredAuthentications": "publickey",
        "PubkeyAuthentication": "yes",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": "none",
        "CertificateFile": certificate,
    }
    return _ssh_line(target, options, "true")


def _offer(target: Target, certificate: str, within: float) -> CommandResult:
    environment = {name: os.environ[name] for name in _PASSED_TO_SSH if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="signer-offer-") as folder:
        path = Path(folder, "certificate.pub")
        path.touch(mode=0o600)
        with path.open("w") as file:
            file.write(f"{certificate.strip()}\n")
        return run(offer_line(target, str(path)), environment=environment, within=within)


def _no_answer(target: Target, ended: CommandResult, facts: dict[str, object]) -> SmokeFailed:
    said = [line for line in ended.err.splitlines() if line.strip() and not line.startswith("debug")]
    last = plain(said[-1], instead=" ").strip().rstrip(".")[:300] if said else f"ssh ended with status {ended.status}"
    text = f"no answer within {ended.seconds:.0f} s" if ended.status is None else last
    hint = f"try it by hand: safe-session ssh -p {target.port} {target.user}@{target.host}"
    return SmokeFailed("smoke_login_failed", f"{target.name}: {text}", hint, {**facts, "trusted": None})


def _telling(ended: CommandResult) -> list[str]:
    """The lines that show the answer, printable and bounded."""
    lines = (plain(line, instead=" ")[:300] for line in ended.err.splitlines())
    return [line for line in lines if not line.startswith("debug") or _TELLING.match(line)][:60]
