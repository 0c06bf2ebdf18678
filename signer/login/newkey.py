"""A new Ed25519 key pair from OpenSSL's libcrypto, through ctypes; the only module here that makes a secret.

libcrypto is what the ssh client itself uses: vetted, constant time, already in the page cache. Loading it takes 2 ms,
importing `cryptography` 38. The seed lives in one ctypes buffer that is wiped; OpenSSL wipes its own copy.
"""

from __future__ import annotations

import ctypes

from signer.errors import Unavailable
from signer.ssh.wire import string

_EVP_PKEY_ED25519 = 1087  # NID_ED25519 in openssl/obj_mac.h; stable since OpenSSL 1.1.1
_LIBRARIES = ("libcrypto.so.3", "libcrypto.so.1.1")
_PR_SET_DUMPABLE = 4


class NewKey:
    """`seed` is the private half, 32 bytes, wiped by `wipe`; `public` the other 32."""

    __slots__ = ("public", "seed")

    def __init__(self, seed: ctypes.Array[ctypes.c_char], public: bytes) -> None:
        self.seed = seed
        self.public = public

    def blob(self) -> bytes:
        """The public key as SSH writes it (RFC 8709 section 4)."""
        return string(b"ssh-ed25519") + string(self.public)

    def wipe(self) -> None:
        ctypes.memset(self.seed, 0, len(self.seed))


def make_key(libraries: tuple[str, ...] = _LIBRARIES) -> NewKey:
    """A fresh pair. Raises `Unavailable` when no libcrypto can be loaded or it cannot make the key."""
    crypto = _load(libraries)
    context = crypto.EVP_PKEY_CTX_new_id(_EVP_PKEY_ED25519, None)
    key = ctypes.c_void_p()
    seed = ctypes.create_string_buffer(32)
    public = ctypes.create_string_buffer(32)
    try:
        made = (
            context
            and crypto.EVP_PKEY_keygen_init(context) == 1
            and crypto.EVP_PKEY_keygen(context, ctypes.byref(key)) == 1
            and crypto.EVP_PKEY_get_raw_private_key(key, seed, ctypes.byref(ctypes.c_size_t(32))) == 1
            and crypto.EVP_PKEY_get_raw_public_key(key, public, ctypes.byref(ctypes.c_size_t(32))) == 1
        )
    finally:
        crypto.EVP_PKEY_free(key)
        crypto.EVP_PKEY_CTX_free(context)
    if not made:
        raise Unavailable(
            "no_key", "libcrypto cannot make an Ed25519 key", "check OpenSSL's openssl.cnf (FIPS?)"
        )
    return NewKey(seed, public.raw)


def _load(libraries: tuple[str, ...]) -> ctypes.CDLL:
    for name in libraries:
        try:
            crypto = ctypes.CDLL(name)
        except OSError:
            continue
        # Without these ctypes would cut pointers to 32 bits.
        pointer = ctypes.c_void_p
        crypto.EVP_PKEY_CTX_new_id.restype = pointer
        crypto.EVP_PKEY_CTX_new_id.argtypes = (ctypes.c_int, pointer)
        crypto.EVP_PKEY_keygen_init.argtypes = (pointer,)
        crypto.EVP_PKEY_keygen.argtypes = (pointer, pointer)
        crypto.EVP_PKEY_get_raw_private_key.argtypes = (pointer, pointer, pointer)
        crypto.EVP_PKEY_get_raw_public_key.argtypes = (pointer, pointer, pointer)
        crypto.EVP_PKEY_free.argtypes = (pointer,)
        crypto.EVP_PKEY_CTX_free.argtypes = (pointer,)
        return crypto
    raise Unavailable(
        "no_libcrypto",
        f"cannot load {' or '.join(libraries)}, which makes the key",
        "install OpenSSL's library (Debian: apt install libssl3)",
    )


def forbid_core_dumps() -> None:
    """From here on neither a core dump nor another process of this user can read this one's memory.
    Holds for this process only: what is executed later starts afresh. Best effort, prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
