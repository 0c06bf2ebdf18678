"""Messages of the SSH agent protocol (RFC 9987): add a certified key (`safe-session`), list keys and sign (the keeper).

Pure: bytes in, bytes out, no socket. The message that carries a private key is a `bytearray`, so that its owner can
wipe it. Imports nothing but `signer.errors` and `signer.ssh.wire`.
"""

from __future__ import annotations

from signer.errors import BadFormat, Unavailable
from signer.ssh.wire import Reader, string, uint32

SUCCESS = 6  # SSH_AGENT_SUCCESS
FAILURE = 5  # SSH_AGENT_FAILURE
_REQUEST_IDENTITIES = 11  # SSH_AGENTC_REQUEST_IDENTITIES
_IDENTITIES_ANSWER = 12  # SSH_AGENT_IDENTITIES_ANSWER
_SIGN_REQUEST = 13  # SSH_AGENTC_SIGN_REQUEST
_SIGN_RESPONSE = 14  # SSH_AGENT_SIGN_RESPONSE
_RSA_SHA2_512 = 4  # SSH_AGENT_RSA_SHA2_512; without a flag an agent signs with SHA-1
_ADD_ID_CONSTRAINED = 25  # SSH_AGENTC_ADD_ID_CONSTRAINED
_CONSTRAIN_LIFETIME = 1  # SSH_AGENT_CONSTRAIN_LIFETIME
_ED25519_CERT = b"ssh-ed25519-cert-v01@openssh.com"
_LARGEST_REPLY = 256 * 1024  # AGENT_MAX_LEN in OpenSSH


def render_add_ed25519_certificate(
    certificate: bytes, seed: bytes | bytearray | memoryview, public: bytes, *, comment: str, lifetime: int
) -> bytearray:
    """SSH_AGENTC_ADD_ID_CONSTRAINED for an Ed25519 key with its certificate (RFC 9987, "Adding Keys to the Agent" and
    "Key Constraints"; the layout for a certificate is OpenSSH's: type, certificate, then the plain key's fields).

    `certificate` is the whole blob, `seed` the 32 private bytes of RFC 8032, `public` the 32 public ones, `lifetime`
    in seconds from 1 to 2**32-1. Only the certificate is added, not the bare key beside it: ssh signs for the
    certificate with this one entry, and offering the bare key would cost one of the server's `MaxAuthTries`.

    Returns the message with its length in front. The caller wipes it. Raises `BadFormat` for wrong sizes.
    """
    if len(seed) != 32 or len(public) != 32:
        raise BadFormat("bad_agent_key", "an Ed25519 key has 32 private and 32 public bytes")
    if not 0 < lifetime < 2**32:
        raise BadFormat("bad_agent_lifetime", "the lifetime is not from 1 to 4294967295 seconds")
    before = bytes([_ADD_ID_CONSTRAINED]) + string(_ED25519_CERT) + string(certificate) + string(public) + uint32(64)
    after = public + string(comment.encode(errors="replace")) + bytes([_CONSTRAIN_LIFETIME]) + uint32(lifetime)
    # Allocated once and filled in place: growing or joining leaves copies of the seed in freed memory.
    message = bytearray(4 + len(before) + 32 + len(after))
    at = 4 + len(before)
    message[:at] = uint32(len(message) - 4) + before
    message[at + 32 :] = after
    # Through a view, because assignment to a bytearray slice makes a hidden copy.
    memoryview(message)[at : at + 32] = seed
    return message


def reply_length(head: bytes) -> int:
    """How many bytes follow the four of `head` (RFC 9987 section 3). Raises `BadFormat`."""
    length = int.from_bytes(head, "big")
    if len(head) != 4 or not 0 < length <= _LARGEST_REPLY:
        raise BadFormat("bad_agent_reply", "the agent's reply has an invalid length")
    return length


def check_reply(body: bytes) -> None:
    """The reply to an add request, without its length. Raises `Unavailable` if the agent refused, `BadFormat` for
    anything but SSH_AGENT_SUCCESS and SSH_AGENT_FAILURE (RFC 9987, "Generic Agent Responses")."""
    if body == bytes([FAILURE]):
        raise Unavailable("agent_refused", "the agent refused the key", "check the version of ssh-agent")
    if body != bytes([SUCCESS]):
        raise BadFormat("bad_agent_reply", "the agent's reply is neither success nor failure")


def render_request_identities() -> bytes:
    """SSH_AGENTC_REQUEST_IDENTITIES with its length (RFC 9987, "Requesting a List of Keys")."""
    return string(bytes([_REQUEST_IDENTITIES]))


def read_identities(body: bytes) -> list[bytes]:
    """The public key blobs, or certificates, of an identities answer, without its length; drops the comments.

    Raises `BadFormat` for any other reply, also for SSH_AGENT_FAILURE.
    """
    reader = Reader(body)
    if reader.byte() != _IDENTITIES_ANSWER:
        raise BadFormat("bad_agent_reply", "the agent's reply is not a list of keys")
    blobs = []
    for _ in range(reader.uint32()):
        blobs.append(reader.string())
        reader.string()
    reader.expect_end()
    return blobs


def render_sign_request(key: bytes, data: bytes) -> bytes:
    """SSH_AGENTC_SIGN_REQUEST with its length (RFC 9987, "Private Key Operations"); for RSA it asks for SHA-512."""
    is_rsa = key.startswith(string(b"ssh-rsa"))
    flags = uint32(_RSA_SHA2_512 if is_rsa else 0)
    return string(bytes([_SIGN_REQUEST]) + string(key) + string(data) + flags)


def read_signature(body: bytes) -> bytes:
    """The signature blob of a sign response, without its length; its content is not checked.

    Raises `Unavailable` if the agent refused, `BadFormat` for any other reply.
    """
    if body == bytes([FAILURE]):
        raise Unavailable("ca_agent_refused", "the ssh-agent refused to sign", "unlock it or its token, see its log")
    reader = Reader(body)
    if reader.byte() != _SIGN_RESPONSE:
        raise BadFormat("bad_agent_reply", "the agent's reply is not a signature")
    signature = reader.string()
    reader.expect_end()
    return signature
