"""Client of the native API for the operator's commands: readiness, certificates, recorded operations.

Addresses follow the rules of `safe-session`: https, a unix socket, or plain http to this machine only, where root, this
user or that of SAFE_SESSION_SERVER_UID must listen. Every call is bounded in time and taken at most once: only one that
the edge refused, because too many unknown callers wait, is sent again. Every failure is a `SignerError`, with the code
and hint of the service's own problem. The token is read from its file at each call and is in no error. For one thread
at a time.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import requests

from signer.address import Address, check_scheme, check_server, parse_address, server_uids
from signer.errors import (
    BadFormat,
    BadRequest,
    BadSettings,
    NotAuthenticated,
    NotFound,
    Refused,
    SignerError,
    Unavailable,
)
from signer.files import read_secret_word, undone_by
from signer.http import Watched, new_session
from signer.units import plain

ANSWERS_WITHIN: Final = 10.0  # seconds for one call
LOOKS_WITHIN: Final = 3.0  # seconds for one GET /readyz
PAUSE: Final = 0.1  # seconds between two polls
BUSY: Final = "edge_busy"  # the code of a request that the edge did not pass on
BUSY_PAUSE: Final = 0.5  # seconds before such a request is sent again
PAGE: Final = 200
_CODE: Final = re.compile(r"[a-z0-9_]{1,64}", re.ASCII)
_KINDS: Final[dict[int, type[SignerError]]] = {
    401: NotAuthenticated, 403: Refused, 404: NotFound, 429: Refused, 503: Unavailable
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of /readyz: mode, CA and policy if ready, else `code` and `text`."""

    ready: bool
    mode: str = ""
    ca_fingerprint: str = ""
    policy: str = ""
    code: str = ""
    text: str = ""


class ApiClient(Watched):
    """A client of the service at `address` with the token in `token_file`; raises `BadSettings` if either is invalid.

    Without a token file it can only ask what is open to all.
    """

    def __init__(
        self,
        address: str,
        token_file: Path | None,
        *,
        settings: tuple[str, str] = ("signer.address", "signer.token_file"),
        forwarded_for: str = "",
    ) -> None:
        """`forwarded_for` is an address for X-Forwarded-For, which counts where this user is a trusted proxy."""
        self._address_setting, self._token_setting = settings  # as hints name them; by default those of cutover.toml
        self._address = parse_address(address, self._address_setting)
        self._trusted = server_uids(os.environ)
        self._token_file = token_file
        self._forwarded_for = forwarded_for
        if token_file is not None:
            self._read_token()
        super().__init__()

    def __repr__(self) -> str:
        return f"ApiClient({self._address.text})"

    # --- requests -----------------------------------------------------------------------------------------------------

    def ready(self, *, within: float = LOOKS_WITHIN) -> Readiness:
        """The service's readiness, also when it is not ready; raises only without a valid answer."""
        status, answer = self._send("GET", "/readyz", None, within, with_token=False)
        if status == 200 and answer.get("ready") is True:
            mode, ca, policy = (str(answer.get(name, "")) for name in ("mode", "ca_fingerprint", "policy"))
            return Readiness(True, mode, ca, policy)
        problem = self._problem(status, answer)
        if status != 503 and problem.code != BUSY:
            raise problem
        return Readiness(False, code=problem.code, text=problem.text)

    def clock(self) -> int:
        """The service's clock, from the header `Date` of an answer, in seconds since the epoch; raises `BadFormat`."""
        _, content, date = self._request("GET", "/readyz", None, LOOKS_WITHIN, with_token=False)
        self._read_json(content)
        try:
            return int(parsedate_to_datetime(date).timestamp())
        except (ValueError, TypeError, OverflowError):
            raise self._not_ours("no header Date") from None

    def wait_ready(self, mode: str, ca_fingerprint: str | None, within: float) -> Readiness:
        """Waits until the service is ready in `mode`, with that CA key unless None; raises `Unavailable`.

        `within` is seconds. A service that is down, or still in its previous mode, is polled until then.
        """
        deadline = time.monotonic() + within
        while True:
            left = deadline - time.monotonic()
            try:
                seen = self.ready(within=min(max(left, PAUSE), LOOKS_WITHIN))
            except (Unavailable, BadFormat) as error:
                seen = Readiness(False, code=error.code, text=error.text)
            if seen.ready and seen.mode == mode and ca_fingerprint in (None, seen.ca_fingerprint):
                return seen
            if time.monotonic() + PAUSE >= deadline:
                raise _never_ready(seen, mode, ca_fingerprint, within)
            time.sleep(PAUSE)

    def sign(self, role: str, body: Mapping[str, object]) -> dict[str, Any]:
        """A certificate: the answer of `POST /api/sign/<role>`."""
        return self.post("sign", role, body=body)

    def certificate(self, serial: int | str) -> dict[str, Any]:
        """The full record of one certificate; raises `NotFound`."""
        return self.get("certificates", str(serial))

    def certificates(self, **filters: str | int | bool) -> Iterator[dict[str, Any]]:
        """Rows, newest first, fetched page by page; filters as in the API, `limit` is the page size."""
        return self._pages("certificates", filters)

    def whoami(self) -> dict[str, Any]:
        """The caller: identity, kind, roles, groups, rights, and when the token ends."""
        return self.get("whoami")

    def head(self) -> dict[str, Any]:
        """The newest entry of the ledger: `seq`, `hash`, `time`."""
        return self.get("ledger", "head")

    def entries(self, after: int) -> tuple[list[dict[str, Any]], bool]:
        """A page of the ledger's events after number `after`, in their order, and whether there are more."""
        page = self.get("ledger", "entries", after=after)
        return self._listed(page, "entries"), page.get("after") is not None

    def host_keys(self) -> list[dict[str, Any]]:
        """The hosts whose keys are listed, by name."""
        return list(self._pages("host-keys", {}, "hosts", mark="after", has_numbers=False))

    def record(
        self, operation: str, outcome: str, plan: str = "", evidence: str = "", reason: str = ""
    ) -> dict[str, Any]:
        """Records an operation in the ledger and returns the entry, which is on disk by then.

        Sent once: if the answer is lost (`service_closed`, `service_slow`), `operations` shows whether it was recorded.
        """
        body = {"operation": operation, "outcome": outcome, "plan": plan, "evidence": evidence, "reason": reason}
        return self.post("operations", body=body)

    def operations(self, evidence: str | None = None) -> list[dict[str, Any]]:
        """Recorded operations, newest first; all of them, or those with this evidence digest."""
        return list(self._pages("operations", {} if evidence is None else {"evidence": evidence}))

    def requests(self, **filters: str) -> Iterator[dict[str, Any]]:
        """Requests for approval that the caller may see, newest first; filters `state` and `identity`."""
        return self._pages("requests", filters, has_numbers=False)

    def revocations(self) -> Iterator[dict[str, Any]]:
        """All revocations, newest first."""
        return self._pages("revocations", {})

    def hosts(self) -> dict[str, Any]:
        """Which hosts have which revocation list, and which one is published."""
        return self.get("hosts")

    def file(self, name: str, most: int) -> bytes:
        """A file that is open to all, such as `krl`, of at most `most` bytes; raises `NotFound` if there is none."""
        status, content, _ = self._request("GET", f"/api/{name}", None, ANSWERS_WITHIN, with_token=False)
        if status != 200:
            raise self._problem(status, self._read_json(content))
        if len(content) > most:
            raise self._not_ours(f"{name} has more than {most} bytes")
        return content

    # --- any other resource ---------------------------------------------------------------------------------------

    def get(self, *path: str, **query: str | int | bool) -> dict[str, Any]:
        """The answer of `GET /api/<path>?<query>`; raises the service's own problem, such as `NotFound`."""
        words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in query.items()}
        return self._ask("GET", _path(*path) + (f"?{urlencode(words, quote_via=quote)}" if words else ""))

    def listed(self, name: str, **query: str) -> list[dict[str, Any]]:
        """The rows of `GET /api/<name>`."""
        return self._listed(self.get(name, **query), name)

    def post(self, *path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """The answer of `POST /api/<path>`, which is sent once; raises as `get`."""
        return self._ask("POST", _path(*path), dict(body))

    def delete(self, *path: str) -> dict[str, Any]:
        """The answer of `DELETE /api/<path>`; raises as `get`."""
        return self._ask("DELETE", _path(*path))

    # --- transport ----------------------------------------------------------------------------------------------------

    def _listed(self, page: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        rows = page.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self._not_ours("no list")
        return rows

    def _pages(
        self,
        path: str,
        filters: Mapping[str, str | int | bool],
        name: str | None = None,
        *,
        mark: str = "before",
        has_numbers: bool = True,
    ) -> Iterator[dict[str, Any]]:
        """The rows of all pages, in `name` of each; its `mark` asks for the next one, and a number only falls."""
        query, seen = dict(filters), set[str]()
        if has_numbers:
            query.setdefault("limit", PAGE)
        while True:
            page = self.get(path, **query)
            yield from self._listed(page, name or path)
            if (following := page.get(mark)) is None:
                return
            text = str(following)
            falls = text.isdecimal() and int(text) < int(query.get(mark, 2**63))
            if not (falls if has_numbers else isinstance(following, str) and text not in seen):
                raise self._not_ours("pages that do not end")
            seen.add(text)
            query[mark] = text

    def _ask(self, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        status, answer = self._send(method, path, body, ANSWERS_WITHIN)
        if status not in (200, 201):
            raise self._problem(status, answer)
        return answer

    def _send(
        self, method: str, path: str, body: dict[str, object] | None, within: float, *, with_token: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one request, which the edge has passed on or still refuses when the time is over."""
        deadline = time.monotonic() + within
        while True:
            left = deadline - time.monotonic()
            status, content, _ = self._request(method, path, body, left, with_token=with_token)
            found = self._read_json(content)
            if status != 429 or found.get("code") != BUSY or time.monotonic() + 2 * BUSY_PAUSE > deadline:
                return status, found
            time.sleep(BUSY_PAUSE)

    def _read_json(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            raise self._not_ours("no JSON") from None
        if not isinstance(found, dict):
            raise self._not_ours("no JSON object")
        return found

    def _request(
        self, method: str, path: str, body: dict[str, object] | None, within: float, *, with_token: bool
    ) -> tuple[int, bytes, str]:
        """Status, content and `Date`, on a connection of its own: the service may be replaced between two requests."""
        headers = {"Connection": "close", "Accept": "application/json", "User-Agent": "signer"}
        if self._forwarded_for:
            headers["X-Forwarded-For"] = self._forwarded_for
        if with_token:
            headers["Authorization"] = f"Bearer {self._read_token()}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        session = new_session(_authorities() if self._address.scheme == "https" else None, connect=self._connect)
        try:
            with self._watch.within(within):
                answer = session.request(
                    method, _base(self._address) + path, data=data, headers=headers, allow_redirects=False
                )
            content: bytes = answer.content
        except requests.exceptions.Timeout:
            raise self._slow(within) from None
        except requests.exceptions.SSLError:
            check_scheme(self._address, self._address_setting)
            raise Unavailable(
                "service_tls",
                f"the TLS certificate of {self._address.text} is not trusted",
                f"set SSL_CERT_FILE to the authority that signed it, or check {self._address_setting}",
            ) from None
        except requests.exceptions.ConnectionError:
            check_scheme(self._address, self._address_setting)
            raise Unavailable(
                "service_closed", f"the signing service at {self._address.text} closed without an answer", self._hint
            ) from None
        except (requests.exceptions.RequestException, ValueError):
            raise self._not_ours("no whole answer") from None
        finally:
            session.close()
        return answer.status_code, content, answer.headers.get("Date", "")

    def _connect(self, within: float) -> socket.socket:
        """A connected socket, in clear text never to another machine or another user's process; raises `Unavailable`.

        The listener is checked before the connection and after it, which is before anything is sent. `within` is
        seconds for each address.
        """
        address, failure = self._address, OSError("no address")
        try:
            if address.scheme == "unix":
                return _connected(socket.AF_UNIX, address.path, within)
            found = socket.getaddrinfo(address.host, address.port, 0, socket.SOCK_STREAM)
        except OSError as error:
            raise self._no_connection(error) from None
        for family, _, _, _, place in found:
            try:
                if address.scheme == "http":
                    self._check_server(family, place)
                link = _connected(family, place, within)
                with undone_by(link.close):
                    if address.scheme == "http":
                        self._check_server(family, link.getpeername())
                return link
            except OSError as error:
                failure = error
        raise self._no_connection(failure)

    def _check_server(self, family: int, place: Any) -> None:
        check_server(family, str(place[0]), int(place[1]), self._trusted, self._address_setting)

    def _no_connection(self, error: OSError) -> Unavailable:
        place, reason = self._address.text, (error.strerror or "no connection").lower()
        if isinstance(error, socket.gaierror):
            return Unavailable("service_unknown", f"no such host: {self._address.host}", self._hint)
        if isinstance(error, PermissionError):
            return Unavailable("service_forbidden", f"not allowed to connect to {place}", "check who may open it")
        if isinstance(error, TimeoutError):
            return Unavailable("service_unreachable", f"{place} did not accept the connection in time", self._hint)
        if isinstance(error, ConnectionError | FileNotFoundError):
            return Unavailable("service_down", f"cannot reach the signing service at {place}: {reason}", self._hint)
        return Unavailable("service_unreachable", f"cannot reach the signing service at {place}: {reason}", self._hint)

    def _problem(self, status: int, answer: Mapping[str, Any]) -> SignerError:
        """The service's own problem with its code and hint, or `not_our_service` for any other answer."""
        code, text, hint = (answer.get(name) for name in ("code", "detail", "hint"))
        if not isinstance(code, str) or _CODE.fullmatch(code) is None or not isinstance(text, str):
            return self._not_ours(f"status {status}")
        kind = _KINDS.get(status, BadRequest if 400 <= status < 500 else SignerError)
        # A foreign service might echo the token.
        token = "" if self._token_file is None else self._read_token()
        return kind(code, _without(token, text), _without(token, hint) if isinstance(hint, str) else "")

    def _slow(self, within: float) -> Unavailable:
        text = f"the signing service at {self._address.text} did not answer within {within:.0f} seconds"
        return Unavailable("service_slow", text, f"check {self._address_setting} and the service's /readyz")

    def _not_ours(self, what: str) -> BadFormat:
        text = f"the answer from {self._address.text} is not a signing service's: {what}"
        return BadFormat("not_our_service", text, self._hint)

    @property
    def _hint(self) -> str:
        return f"check {self._address_setting}, and that the service runs"

    def _read_token(self) -> str:
        if self._token_file is None:
            raise BadSettings("token_file_missing", "no token was given", f"set {self._token_setting}")
        return read_secret_word(self._token_file, self._token_setting)


def _path(*parts: str) -> str:
    return "/api/" + "/".join(quote(part, safe="") for part in parts)


def _never_ready(seen: Readiness, mode: str, ca_fingerprint: str | None, within: float) -> Unavailable:
    """The error that describes the last poll."""
    waited = f"after {within:.0f} s the service"
    if not seen.ready:
        return Unavailable(
            "service_never_ready", f"{waited} is not ready: {seen.text} ({seen.code})", "look at the service's log",
            {"code": seen.code},
        )  # fmt: skip
    if seen.mode != mode:
        return Unavailable(
            "service_other_mode", f"{waited} runs in mode {seen.mode[:20]}, not {mode}", "see which files it runs with"
        )
    return Unavailable(
        "service_other_ca", f"{waited} signs with {seen.ca_fingerprint[:60]}, not {ca_fingerprint}", "see its key file"
    )


def _connected(family: int, place: Any, within: float) -> socket.socket:
    link = socket.socket(family, socket.SOCK_STREAM)
    with undone_by(link.close):
        link.settimeout(within)
        link.connect(place)
    return link


def _base(address: Address) -> str:
    if address.scheme == "unix":
        return "http://localhost"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{address.scheme}://{host}:{address.port}"


def _authorities() -> Path | None:
    """The trusted authorities: SSL_CERT_FILE, or the system's, as for `safe-session`."""
    known = ssl.get_default_verify_paths()
    found = known.cafile or known.capath
    return Path(found) if found else None


def _without(token: str, text: str) -> str:
    """The service's text without the token, safe to print."""
    return plain(text.replace(token, "…") if token else text, instead="?")[:600]
