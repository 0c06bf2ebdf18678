"""A new Ed25519 key pair from OpenSSL's libcrypto, through ctypes; the only module here that makes a secret.

libcrypto is what the ssh client itself uses: vetted, constant time, already in the page cache. Loading it takes 2 ms,
importing `cryptography` 38. The seed lives in one ctypes buffer that is wiped; OpenSSL wipes its own copies.
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
    """A fresh pair. Raises `Unavailable` when no libcrypto can be loaded or it cannot make the key.

    The seed comes from RAND_priv_bytes, as in EVP_PKEY_keygen, and straight into our buffer: reading it back out of a
    finished key with EVP_PKEY_get_raw_private_key leaves a copy in freed memory (seen with OpenSSL 3.0).
    """
    crypto = _load(libraries)
    seed = ctypes.create_string_buffer(32)
    public = ctypes.create_string_buffer(32)
    if crypto.RAND_priv_bytes(seed, 32) == 1:
        key = crypto.EVP_PKEY_new_raw_private_key(_EVP_PKEY_ED25519, None, seed, 32)
        size = ctypes.c_size_t(32)
        made = bool(key) and crypto.EVP_PKEY_get_raw_public_key(key, public, ctypes.byref(size)) == 1
        crypto.EVP_PKEY_free(key)
        if made:
            return NewKey(seed, public.raw)
    raise Unavailable("no_key", "libcrypto cannot make an Ed25519 key", "check OpenSSL's openssl.cnf (FIPS?)")


def _load(libraries: tuple[str, ...]) -> ctypes.CDLL:
    for name in libraries:
        try:
            crypto = ctypes.CDLL(name)
        except OSError:
            continue
        # Without these ctypes would cut pointers to 32 bits.
        pointer = ctypes.c_void_p
        crypto.RAND_priv_bytes.argtypes = (pointer, ctypes.c_int)
        crypto.EVP_PKEY_new_raw_private_key.restype = pointer
        crypto.EVP_PKEY_new_raw_private_key.argtypes = (ctypes.c_int, pointer, pointer, ctypes.c_size_t)
        crypto.EVP_PKEY_get_raw_public_key.argtypes = (pointer, pointer, pointer)
        crypto.EVP_PKEY_free.argtypes = (pointer,)
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
