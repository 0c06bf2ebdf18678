"""Made-up secrets of every kind that must not be written down; each contains the word MARKER."""

from __future__ import annotations

from typing import Final

from signer.policy.tokens import render_token

KEY: Final = (
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\nMARKERMARKER\n-----END OPENSSH PRIVATE KEY-----"
)
SECRETS: Final = {
    "our token": render_token(bytes(range(32))),
    "our token, mistyped": render_token(bytes(range(32)))[:-3],
    "Vault's service token": "hvs.CAESIJmarkerMARKERmarker_-0123456789",
    "Vault's batch token": "hvb.AAAAAQJmarkerMARKERmarker_-0123456789",
    "Vault's recovery token": "hvr.CAESIJmarkerMARKERmarker_-0123456789",
    "OpenBao's service token": "s.MARKERmarkerMARKERmarker",
    "OpenBao's service token of a namespace": "s.MARKERmarkerMARKERmarker.ns1ab",
    "OpenBao's batch token": "b.AAAAAQJmarkerMARKERmarker_-0123456789",
    "OpenSSH's private key": KEY,
    "a private key in PEM": "-----BEGIN RSA PRIVATE KEY-----\nMIIMARKER\n-----END RSA PRIVATE KEY-----",
    "an encrypted one": "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIMARKER\n-----END ENCRYPTED PRIVATE KEY-----",
    "a private key that was cut off": "-----BEGIN PRIVATE KEY-----\nMIIMARKER",
    "a private key without its armour": "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAMARKER",
    "PuTTY's private key": "PuTTY-User-Key-File-3: ssh-ed25519\nPrivate-Lines: 1\nMARKER",
    "a JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJNQVJLRVIifQ.c2lnbmF0dXJl",
}
