"""The Vault or OpenBao client (hvac) of the operator's commands: SSH roles, CA key, certificates and any other call.

Every call has a deadline; every error has a code of `vault/errors.py`. The token is read from its file for each call.
Errors contain neither the token nor Vault's text. Not thread-safe; use as a context manager or call `close`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import hvac
from hvac import exceptions as hvac_errors

from signer.address import check_url
from signer.errors import BadFormat, BadSettings, Unavailable
from signer.http import MAX_BODY, Watched, new_session
from signer.model import PublicKey
from signer.ssh.publickey import parse_public_key
from signer.vault.errors import VaultContext, malformed, read_token, role_missing, says, sealed, translated_errors
from signer.vault.role import MountTtls

ANSWERS_WITHIN: Final = 10.0  # seconds for one call
_CAPABILITIES: Final = {"GET": "read", "LIST": "list", "POST": "update", "PUT": "update", "DELETE": "delete"}
_NO_ROUTE: Final = "no handler for route"
_SHOWN: Final = 120  # characters of a path in an error


class VaultAdmin(Watched):
    """Vault at `address` with the token in `token_file`; raises `BadSettings` if the file contains no token, or if
    the address would send it to another machine in the clear."""

    def __init__(self, address: str, token_file: Path, ca_file: Path | None = None) -> None:
        check_url(address, "Vault's address")
        self._address = address
        self._token_file = token_file
        self._ca_file = ca_file
        if ca_file is not None and not os.access(ca_file, os.R_OK):
            raise BadSettings(
                "vault_ca_file_unreadable", "Vault's CA file cannot be read", "name a file that you may read"
            )
        read_token(token_file, _context("", ""))
        super().__init__()
        self._clients: dict[int, Any] = {}  # by maximum response size

    def __repr__(self) -> str:
        return f"VaultAdmin({self._address})"

    def close(self) -> None:
        super().close()
        for client in self._clients.values():
            client.adapter.close()

    # --- low level ---------------------------------------------------------------------------------------------------

    def call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, within: float = ANSWERS_WITHIN
    ) -> dict[str, Any]:
        """The response body (with `data`, `auth`, …) of one request to `/v1/<path>`; `{}` for status 204.

        `path` is plain text, such as `sys/mounts` or a name from Vault; it is encoded here. `method` may be LIST.
        `within` is seconds. Raises `Unavailable` or another `SignerError`; 404 is `vault_mount_missing`, see `find`.
        """
        with self._asking(method, path, within) as client:
            return _send(client, method, path, body)

    def find(self, method: str, path: str, *, within: float = ANSWERS_WITHIN) -> dict[str, Any] | None:
        """As `call`, but None if Vault has no such entry or the list is empty."""
        with self._asking(method, path, within) as client:
            try:
                return _send(client, method, path)
            except hvac_errors.InvalidPath as error:
                if isinstance(error.errors, list) and not error.errors:
                    return None
                raise

    def is_unrouted(self, method: str, path: str, body: Mapping[str, object]) -> bool:
        """True if Vault reports that no mount serves `path`, False if the request succeeds; raises like `call`.

        A 404 without that sentence, which may be a proxy's, is an error.
        """
        with self._asking(method, path) as client:
            try:
                _send(client, method, path, body)
            except hvac_errors.InvalidPath as error:
                if says(error, _NO_ROUTE):
                    return True
                raise
            return False

    def clock(self) -> int:
        """Vault's clock, from the header `Date` of an answer, in seconds since the epoch; raises like `call`."""
        with self._asking("GET", "sys/health") as client:
            answer = client.adapter.session.get(f"{self._address.rstrip('/')}/v1/sys/health", allow_redirects=False)
            return int(parsedate_to_datetime(answer.headers.get("Date", "")).timestamp())

    def download(self, path: str, *, most: int, within: float) -> bytes:
        """The body of a GET, at most `most` bytes, within `within` seconds; raises like `call`."""
        with self._asking("GET", path, within, most) as client:
            answer = client.adapter.session.get(
                f"{self._address.rstrip('/')}/v1/{_quoted(path)}",
                headers={"X-Vault-Token": client.token, "X-Vault-Request": "true"},
                allow_redirects=False,
            )
            if answer.status_code != 200:
                text = answer.text if answer.status_code >= 400 else ""
                raise hvac_errors.VaultError.from_status(answer.status_code or 500, errors=_errors(answer), text=text)
            return bytes(answer.content)

    @contextmanager
    def _asking(self, method: str, path: str, within: float = ANSWERS_WITHIN, most: int = MAX_BODY) -> Iterator[Any]:
        """hvac's client for one request within `within` seconds, answered by `most` bytes."""
        context = _context(f"{method} {path[:_SHOWN]}", f"{_CAPABILITIES.get(method, 'update')} on {path[:_SHOWN]}")
        if any(part in (".", "..") for part in path.split("/")):
            raise malformed(context)  # Vault has no such names, and HTTP would normalise them
        client = self._client(most, context)
        with self._watch.within(within), translated_errors(context):
            yield client

    def _client(self, most: int, context: VaultContext) -> Any:
        client = self._clients.get(most)
        if client is None:
            session = new_session(self._ca_file, most)
            client = hvac.Client(url=self._address, token="", session=session, allow_redirects=False)
            self._clients[most] = client
        client.token = read_token(self._token_file, context)
        return client

    # --- the SSH engine ----------------------------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Raises an error if Vault is down or sealed, or does not accept the token."""
        if self.call("GET", "sys/seal-status").get("sealed") is not False:
            raise sealed()
        self.call("GET", "auth/token/lookup-self")

    def roles(self, mount: str) -> tuple[str, ...]:
        """Names of the mount's roles, sorted."""
        answer = self.find("LIST", f"{mount}/roles")
        names = data_of(answer).get("keys", []) if answer is not None else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise not_understood()
        return tuple(sorted(names))

    def role(self, mount: str, name: str) -> dict[str, Any]:
        """A role as Vault returns it, with 27 fields for key type `ca`; raises `vault_role_missing`."""
        answer = self.find("GET", f"{mount}/roles/{name}")
        if answer is None:
            raise role_missing()
        return data_of(answer)

    def mount_ttls(self, mount: str) -> MountTtls | None:
        """Lifetimes for roles that set none; None if the token may not read the mount's tuning."""
        try:
            data = data_of(self.call("GET", f"sys/mounts/{mount}/tune"))
        except Unavailable as error:
            if error.code != "vault_forbidden":
                raise
            return None
        default, most = data.get("default_lease_ttl"), data.get("max_lease_ttl")
        if not isinstance(default, int) or not isinstance(most, int):
            raise not_understood()
        return MountTtls(default, most)

    def ca_public_key(self, mount: str) -> PublicKey:
        """The CA key that the mount signs with by default; raises `vault_ca_unknown`."""
        try:
            return parse_public_key(str(data_of(self.call("GET", f"{mount}/config/ca"))["public_key"]))
        except (KeyError, BadFormat):
            raise not_understood() from None

    def sign(self, mount: str, role: str, fields: Mapping[str, object]) -> str:
        """The certificate line that the sign endpoint returns for `fields`; raises `vault_refused` if Vault refuses."""
        line = data_of(self.call("POST", f"{mount}/sign/{role}", fields)).get("signed_key")
        if not isinstance(line, str):
            raise not_understood()
        return line.strip()


def _send(client: Any, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Sends one request through hvac's adapter, which raises its own errors and returns a dict for 200 with JSON."""
    options = {"json": dict(body)} if body is not None else {}
    answer = client.adapter.request(method, f"/v1/{_quoted(path)}", **options)
    if isinstance(answer, dict):
        return answer
    if getattr(answer, "status_code", 0) == 204:
        return {}
    raise ValueError  # a redirect or a web page, not Vault's


def _quoted(path: str) -> str:
    return quote(path, safe="/")


def data_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` of an answer; raises `Unavailable` if it has none."""
    data = answer.get("data")
    if not isinstance(data, dict):
        raise not_understood()
    return data


def not_understood() -> Unavailable:
    """The error for an answer of another form."""
    return malformed(_context("", ""))


def _errors(answer: Any) -> object:
    try:
        body = answer.json()
    except ValueError:
        return None
    return body.get("errors") if isinstance(body, dict) else None


def _context(act: str, right: str) -> VaultContext:
    return VaultContext(
        "Vault's address", "Vault's token file", "Vault's CA file", "the name of the mount", act, right, "you"
    )
