"""Offers a certificate to a host's sshd without its private key: would certificates of the new CA be accepted there?

sshd answers the offer of a public key before it wants a signature (RFC 4252 section 7, SSH_MSG_USERAUTH_PK_OK). Without
the private key there is no signature: sshd logs no login and opens no session.
"""

from __future__ import annotations

import binascii
import os
import re
import tempfile
from pathlib import Path
from typing import Final

from signer.errors import BadFormat
from signer.migration.config import SignerFacts, Target
from signer.migration.plan import Observation
from signer.migration.smoke import LOGIN_WITHIN, SmokeFailed, read_trusted_cas, ssh_options, where
from signer.ssh.certificate import CertificateFields, decode_certificate
from signer.ssh.fingerprint import fingerprint_of
from signer.subprocesses import CommandResult, run
from signer.units import plain

_PASSED_ON: Final = ("PATH", "HOME")
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
        **ssh_options(target),
        "LogLevel": "DEBUG1",
        "PreferredAuthentications": "publickey",
        "PubkeyAuthentication": "yes",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": "none",
        "CertificateFile": certificate,
    }
    words = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", *words, *where(target), "true"]


def _offer(target: Target, certificate: str, within: float) -> CommandResult:
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
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
