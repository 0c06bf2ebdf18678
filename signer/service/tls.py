"""The api's TLS certificate and key: read once, checked as a pair, and replaced only by another good pair.

Both files are read by the api's user. The context is made from the bytes that were read, so that a renewal in progress
cannot mix an old file with a new one; workers inherit it and read no file.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from signer.errors import BadSettings
from signer.files import read_bounded
from signer.units import plain, timestamp

MAX_FILE: Final = 256 * 1024  # bytes; a chain of certificates


@dataclass(frozen=True, slots=True)
class TlsPair:
    """A certificate with its chain and its key, ready to serve. `subject` and `not_after` are for people."""

    context: ssl.SSLContext = field(repr=False)
    chain: bytes = field(repr=False)
    fingerprint: str  # hex SHA-256 of the certificate
    subject: str
    not_after: int  # seconds since 1970


def load_tls_pair(certificate: Path, key: Path) -> TlsPair:
    """The pair of both files; raises `BadSettings` if it cannot serve."""
    chain = _read(certificate, "CERT")
    secret = _read(key, "KEY")
    fingerprint, subject, not_after = _describe(chain)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with ExitStack() as files:
        chain_path, key_path = files.enter_context(_in_memory(chain)), files.enter_context(_in_memory(secret))
        try:
            context.load_cert_chain(chain_path, key_path, password=lambda: b"")  # never a prompt for a passphrase
        except (ssl.SSLError, ValueError) as error:
            raise _refused(_reason(error)) from None
    return TlsPair(context, chain, fingerprint, subject, not_after)


def check_not_ended(pair: TlsPair, now: int) -> None:
    """Raises `BadSettings` for a certificate that has expired."""
    if pair.not_after <= now:
        raise _refused(f"the certificate expired on {timestamp(pair.not_after)}")


def _read(path: Path, what: str) -> bytes:
    """The content of the file of that setting; raises `BadSettings`."""
    setting = f"SIGNER_TLS_{what}_FILE"
    try:
        content = read_bounded(path, MAX_FILE, follow_links=True)  # renewals are often links
    except OSError as error:
        raise BadSettings(
            "tls_key_unreadable" if what == "KEY" else "tls_certificate_unreadable",
            f"{plain(path)} ({setting}) cannot be read: {error.strerror}",
            "let the api's user read it",
        ) from None
    if len(content) > MAX_FILE:
        raise _refused(f"{plain(path)} ({setting}) is larger than {MAX_FILE // 1024} KiB")
    return content


def _describe(chain: bytes) -> tuple[str, str, int]:
    """Fingerprint, subject and end of the first certificate; raises `BadSettings`."""
    from cryptography import x509  # 10 MB, which an api without TLS does not need
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        first = x509.load_pem_x509_certificates(chain)[0]
        subject = first.subject.rfc4514_string()
    except ValueError:
        raise _refused("the file of SIGNER_TLS_CERT_FILE is not a PEM certificate") from None
    return first.fingerprint(SHA256()).hex(), subject, int(first.not_valid_after_utc.timestamp())


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A path to the content that exists in memory only: ssl reads certificates and keys from files alone."""
    with os.fdopen(os.memfd_create("tls", os.MFD_CLOEXEC), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _reason(error: Exception) -> str:
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        return "certificate and key do not belong together"
    return "the file of SIGNER_TLS_KEY_FILE is not a PEM private key without a passphrase"


def _refused(text: str) -> BadSettings:
    return BadSettings("tls_pair_refused", text, "write both files of one renewal, then reload")
