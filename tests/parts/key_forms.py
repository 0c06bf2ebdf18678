"""What may happen to the file of a CA key, and the one verdict of `signer` and the preflight on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FORMS: Final[dict[str, tuple[str, Callable[[bytes], bytes]]]] = {
    "no newline at its end": ("ca_key_malformed", lambda data: data.rstrip(b"\n")),
    "CRLF": ("ca_key_malformed", lambda data: data.replace(b"\n", b"\r\n")),
    "CR alone": ("ca_key_malformed", lambda data: data.replace(b"\n", b"\r")),
    "two keys": ("ca_key_several", lambda data: data + data),
    "two keys with CRLF": ("ca_key_several", lambda data: (data + data).replace(b"\n", b"\r\n")),
    "a key in PEM after it": ("ca_key_several", lambda data: data + b"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n"),
    "a line before": ("ca_key_malformed", lambda data: b"# rendered\n" + data),
    "a line after": ("ca_key_malformed", lambda data: data + b"# rendered\n"),
    "an empty line after": ("ca_key_malformed", lambda data: data + b"\n"),
    "an empty line inside": ("ca_key_malformed", lambda data: data.replace(b"\n", b"\n\n", 1)),
    "its last line lost": ("ca_key_malformed", lambda data: data.rstrip(b"\n").rpartition(b"\n")[0] + b"\n"),
    "a NUL": ("ca_key_malformed", lambda data: data.replace(b"\n", b"\0\n", 1)),
    "blanks at the ends of lines": ("ca_key_malformed", lambda data: data.replace(b"\n", b" \n")),
}
