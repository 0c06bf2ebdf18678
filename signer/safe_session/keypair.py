"""Generates an Ed25519 key pair with OpenSSL's libcrypto through ctypes; the only module here that creates a secret.

The ssh client itself uses libcrypto: vetted, constant time, already in the page cache. Loading it takes 2 ms, the
import of `cryptography` 38. The seed lives in one ctypes buffer that is wiped; OpenSSL wipes its own copies.
"""

from __future__ import annotations

import ctypes

from signer.errors import Unavailable
from signer.ssh.wire import string

_EVP_PKEY_ED25519 = 1087  # NID_ED25519 in openssl/obj_mac.h; stable since OpenSSL 1.1.1
_LIBRARIES = ("libcrypto.so.3", "libcrypto.so.1.1")
_PR_SET_DUMPABLE = 4
_SHA256_SIZE = 32


class NewKey:
    """An Ed25519 key pair: `seed` holds the 32 private bytes until `wipe`, `public` the 32 public ones."""

    def __init__(self, seed: ctypes.Array[ctypes.c_char], public: bytes) -> None:
        self.seed = seed
        self.public = public

    def blob(self) -> bytes:
        """The public key as an SSH blob (RFC 8709 section 4)."""
        return string(b"ssh-ed25519") + string(self.public)

    def wipe(self) -> None:
        ctypes.memset(self.seed, 0, len(self.seed))


def make_key(libraries: tuple[str, ...] = _LIBRARIES) -> NewKey:
    """A new key pair. Raises `Unavailable` if libcrypto cannot be loaded or cannot create the key.

    RAND_priv_bytes writes the seed directly into this buffer: to read it back from a finished key with
    EVP_PKEY_get_raw_private_key leaves a copy in freed memory (seen with OpenSSL 3.0).
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
    raise Unavailable("no_key", "libcrypto cannot generate an Ed25519 key", "check OpenSSL's openssl.cnf (FIPS?)")


def sha256(data: bytes) -> bytes:
    """SHA-256 of `data`: libcrypto is loaded in any case, and the import of `hashlib` takes 4 ms."""
    digest = ctypes.create_string_buffer(_SHA256_SIZE)
    _load(_LIBRARIES).SHA256(data, len(data), digest)
    return digest.raw


def _load(libraries: tuple[str, ...]) -> ctypes.CDLL:
    for name in libraries:
        try:
            crypto = ctypes.CDLL(name)
        except OSError:
            continue
        # Without these, ctypes truncates pointers to 32 bits.
        pointer = ctypes.c_void_p
        crypto.RAND_priv_bytes.argtypes = (pointer, ctypes.c_int)
        crypto.EVP_PKEY_new_raw_private_key.restype = pointer
        crypto.EVP_PKEY_new_raw_private_key.argtypes = (ctypes.c_int, pointer, pointer, ctypes.c_size_t)
        crypto.EVP_PKEY_get_raw_public_key.argtypes = (pointer, pointer, pointer)
        crypto.EVP_PKEY_free.argtypes = (pointer,)
        crypto.SHA256.argtypes = (ctypes.c_char_p, ctypes.c_size_t, pointer)
        crypto.SHA256.restype = pointer
        return crypto
    raise Unavailable(
        "no_libcrypto",
        f"cannot load {' or '.join(libraries)}, which generates the key",
        "install OpenSSL's library (Debian: apt install libssl3)",
    )


def forbid_core_dumps() -> None:
    """Keeps core dumps and the user's other processes from reading this process's memory. Best effort, prctl(2).
    Does not extend to programs that this process executes."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
