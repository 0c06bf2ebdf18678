"""Every error this product raises: one tree, stable codes, text that is safe to show.

Contains `SignerError` and its subclasses, but no HTTP statuses, Vault sentences or output; each edge has exactly one
mapper for those. Any module may import it; it imports nothing but names of errors.
"""

from __future__ import annotations

import errno


class SignerError(Exception):
    """A failure that a user may read.

    `code` is stable and lower case with underscores, `text` is one sentence without a full stop, `hint` is the
    next action (may be empty), `facts` are the safe values that `text` mentions, for edges with their own wording.
    No secret, no path on the server and no other user's data may be put into any of them.
    """

    def __init__(self, code: str, text: str, hint: str = "", facts: dict[str, object] | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.hint = hint
        self.facts = facts or {}

    def as_json(self) -> dict[str, object]:
        """What JSON shows of every error; `facts` are added where they have a place."""
        return {"code": self.code, "text": self.text, "hint": self.hint}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code!r}, {self.text!r})"

    def __reduce__(self) -> tuple[object, ...]:  # subclasses take other arguments; `ledger verify` runs in processes
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[SignerError], arguments: tuple[object, ...], fields: dict[str, object]) -> SignerError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error


class BadFormat(SignerError):
    """Bytes or text that do not follow their format (key, certificate, agent message)."""


class BadPublicKey(BadFormat):
    """The public key in a request cannot be read or is malformed."""


class BadSignature(BadFormat):
    """A signature of an approver cannot be read, is for something else, or does not verify."""


class BadNote(BadFormat):
    """A signed note, a checkpoint or a verifier key cannot be read, or its signature is missing or wrong."""


class BadProof(BadFormat):
    """A Merkle proof is malformed, or does not lead to the root that it is for."""


class BadRequest(SignerError):
    """The body of a request cannot be read: JSON, a field's type, an unknown field."""


class NotAuthenticated(SignerError):
    """The credential is missing, mistyped, unknown or expired."""


# The codes of `NotAuthenticated`, where an error has come as a message.
TOKEN_CODES = ("session_ended", "token_expired", "token_missing", "token_mistyped", "token_unknown")


class Refused(SignerError):
    """Policy, a limit or a freeze forbids the request. `code` names the rule."""


class NotFound(SignerError):
    """No object with this name or number exists or is visible to the caller."""


class Unavailable(SignerError):
    """The service cannot answer now (ledger, keeper, clock, backend); the same request may succeed later."""


class LedgerBroken(SignerError):
    """The ledger's content is inconsistent: hash chain, tables, version."""


class BadFile(SignerError):
    """A file of the operator is invalid; `problems` has one line for each fault."""

    def __init__(self, code: str, text: str, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(code, text, hint, {"problems": list(problems)})
        self.problems = problems


class BadSettings(BadFile):
    """An environment variable is missing or wrong."""


class ApprovalRefused(SignerError):
    """The approval phrase is missing, wrong, or for another operation; nothing was changed."""


class Drift(BadFile):
    """The state has changed since the plan; `problems` has one line for each field."""


class BadKeyFile(SignerError):
    """The file of the CA key, or of a key of the keeper's own, is not valid; `code` names the failed check."""


class ForeignCertificate(SignerError):
    """A certificate that Vault signed is not within its grant: Vault's fault or its configuration's, not ours."""


class CertificateMismatch(SignerError):
    """A certificate about to be signed differs from its grant: an internal error, never the caller's."""


# --- what to do after a failed write ---------------------------------------------------------------------------------

_SQLITE_ERRNO = {"FULL": errno.ENOSPC, "IOERR": errno.EIO}


def write_hint(error: Exception, place: str) -> str:
    """The next action after a write to `place` failed with this error, of the system or of SQLite."""
    number = getattr(error, "errno", None)
    name = str(getattr(error, "sqlite_errorname", "")).split("_")
    if len(name) > 1:
        number = _SQLITE_ERRNO.get(name[1])
        if name[1] in ("READONLY", "CANTOPEN"):
            return f"check whether the file system of {place} is read-only, then owner and mode of its files"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"free disk space for {place}"
    if number == errno.EROFS:
        return f"check whether the file system of {place} is read-only (`findmnt -o TARGET,OPTIONS -T DIR`)"
    if number == errno.EIO:
        return f"check the disk of {place}; the kernel's log shows what failed"
    if number in (errno.EACCES, errno.EPERM):
        return f"fix owner and mode of {place}"
    return f"check {place}: that it exists, its owner, its free space and its disk"
