"""Signs the statement of an approval with `ssh-keygen -Y sign`: with a key file, or a key in the ssh-agent.

`ssh-keygen` speaks to the agent, asks for a PIN or passphrase on the terminal, and reminds of the touch; no private
key is read here.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from signer.errors import BadPublicKey, BadSignature, Unavailable
from signer.model import PublicKey
from signer.ssh.publickey import parse_public_key, render_public_key
from signer.ssh.sshsig import signature_key, verify
from signer.ssh.statement import APPROVAL_NAMESPACE

TOUCHED_WITHIN: Final = 120.0  # seconds for a touch, a PIN or a passphrase
LISTED_WITHIN: Final = 10.0  # seconds for the agent's list of keys


def sign_statement(statement: bytes, key: Path | None) -> str:
    """The armored signature over `statement`; raises `Unavailable` if no key signs it, `BadSignature` for a bad one.

    `key` is a private key's file, or a .pub file whose private half is beside it or in the agent; None: see
    `choose_key`.
    """
    if key is not None:
        return _checked(_sign(statement, key), statement)
    chosen = choose_key(_agents_keys())
    with tempfile.TemporaryDirectory(prefix="signer-") as folder:
        public = Path(folder) / "approval.pub"
        public.write_text(render_public_key(chosen.kind, chosen.blob) + "\n")
        return _checked(_sign(statement, public, "-U"), statement)


def choose_key(keys: list[PublicKey]) -> PublicKey:
    """The only FIDO key, or without one the only key, of an agent; raises `Unavailable`."""
    fido = [key for key in keys if key.kind.startswith("sk-")]
    fitting = fido or keys
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise Unavailable(
            "approval_key_not_found", "the ssh-agent holds no key", "name your key with --key, or add it: ssh-add FILE"
        )
    listed = ", ".join(key.fingerprint for key in fitting[:8])
    raise Unavailable(
        "approval_key_unclear", f"the ssh-agent holds {len(fitting)} keys: {listed}", "name the one with --key FILE.pub"
    )


def _agents_keys() -> list[PublicKey]:
    if not os.environ.get("SSH_AUTH_SOCK"):
        raise Unavailable("approval_key_not_found", "there is no ssh-agent (SSH_AUTH_SOCK)", "name your key with --key")
    try:
        done = subprocess.run(["ssh-add", "-L"], capture_output=True, timeout=LISTED_WITHIN, check=False)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer within {LISTED_WITHIN:.0f} s"
        raise Unavailable(
            "approval_key_not_found", f"ssh-add cannot list keys: {reason}", "name your key with --key"
        ) from None
    keys = []
    for line in done.stdout.decode(errors="replace").splitlines():
        try:
            keys.append(parse_public_key(line))
        except BadPublicKey:
            continue  # a certificate, or a kind that cannot approve
    return keys


def _sign(statement: bytes, key: Path, *options: str) -> bytes:
    command = ["ssh-keygen", "-q", "-Y", "sign", *options, "-n", APPROVAL_NAMESPACE, "-f", str(key)]
    hint = "check that the token is plugged in, or that the ssh-agent holds the key"
    try:
        done = subprocess.run(command, input=statement, stdout=subprocess.PIPE, timeout=TOUCHED_WITHIN, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable("approval_not_signed", f"no signature within {TOUCHED_WITHIN:.0f} s", hint) from None
    except OSError as error:
        text = f"ssh-keygen cannot be run: {error.strerror}"
        raise Unavailable("approval_not_signed", text, "install openssh-client") from None
    if done.returncode != 0:
        raise Unavailable("approval_not_signed", "ssh-keygen made no signature; its reason is above", hint)
    return done.stdout


def _checked(armored: bytes, statement: bytes) -> str:
    """The signature as text; it verifies, so that a wrong one is noticed here and not at the service."""
    text = armored.decode("ascii", "replace")
    try:
        verify(text, statement, APPROVAL_NAMESPACE, signature_key(text))
    except BadSignature as fault:
        raise BadSignature(fault.code, f"ssh-keygen made a bad signature: {fault.text}", fault.hint) from None
    return text
