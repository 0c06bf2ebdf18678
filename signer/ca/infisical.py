"""Fetches one secret from Infisical with its own SDK. Only `signer ca render` imports this, never the service.

The SDK holds Python's lock while it waits and has no timeout, so it runs in a child process that can be killed. The
client secret and the value pass through pipes; the child's environment contains neither. The SDK's errors are plain
text that can contain addresses and the server's text: the child converts them to codes and drops the text.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from signer.address import is_clear_text
from signer.errors import BadSettings, SignerError, Unavailable
from signer.files import read_bounded
from signer.hardening import die_with_parent, forbid_dumps
from signer.settings import FINGERPRINT_SETTING, INFISICAL_SETTINGS, refused
from signer.units import plain

GIVE_UP_AFTER: Final = 15.0  # seconds, also if the SDK hangs
MAX_CLIENT_SECRET: Final = 4096  # bytes
MAX_VALUE: Final = 64 * 1024  # characters; four times the largest key
# Excludes everything that parsers read differently: user, query, fragment, backslash, blank.
_SITE_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?:/[A-Za-z0-9._~/-]*)?"
)
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_KEPT: Final = ("PATH", "LANG", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXIES: Final = (
    "HTTPS_PROXY",
    "https_proxy",
    "NO_PROXY",
    "no_proxy",
)  # may contain a password, so not in the environment
_FAULTS: Final = {
    error.code: error
    for error in (
        Unavailable("infisical_down", "Infisical cannot be reached", "check INFISICAL_SITE_URL and the network"),
        Unavailable("infisical_slow", f"Infisical did not answer within {GIVE_UP_AFTER:.0f} s", "try again later"),
        SignerError(
            "infisical_untrusted",
            "Infisical's TLS certificate is not trusted",
            "set SSL_CERT_FILE to a file with its CA certificate",
        ),
        SignerError(
            "infisical_unauthorized",
            "Infisical rejected the credentials",
            "check INFISICAL_CLIENT_ID and the file of INFISICAL_CLIENT_SECRET_FILE",
        ),
        SignerError(
            "infisical_forbidden",
            "Infisical does not let this identity read the secret",
            "give the machine identity read access to the project, environment and path",
        ),
        SignerError(
            "infisical_site_wrong",
            "there is no Infisical at INFISICAL_SITE_URL",
            "set INFISICAL_SITE_URL to its address, such as https://infisical.example",
        ),
        SignerError(
            "infisical_secret_missing",
            "Infisical has no such secret",
            "check INFISICAL_PROJECT_ID, INFISICAL_ENVIRONMENT, INFISICAL_SECRET_PATH and INFISICAL_SECRET_NAME",
        ),
        Unavailable("infisical_rate_limited", "Infisical limits the rate of requests", "try again in a minute"),
        SignerError(
            "infisical_refused", "Infisical rejected the request as malformed", "check the INFISICAL_* settings"
        ),
        Unavailable(
            "infisical_failed", "Infisical answered with its own error", "check Infisical's log, then try again"
        ),
        SignerError(
            "infisical_not_understood",
            "the response does not come from Infisical",
            "check INFISICAL_SITE_URL and any proxy in front of Infisical",
        ),
        SignerError(
            "infisical_sdk_failed", "Infisical's SDK ended without a result", "install the locked infisical-python"
        ),
    )
}
# Error texts of infisical-python 2.3 by their beginning; the rest may be the server's text.
_STATUS: Final = re.compile(r"Received error message from server: \(status (\d{3})")
_BAD_CERTIFICATE: Final = "error trying to connect: invalid peer certificate"
_BY_STATUS: Final = {"401": "infisical_unauthorized", "403": "infisical_forbidden", "429": "infisical_rate_limited"}
_BEGINNINGS: Final = (
    ("Failed to authenticate, did you provide", "infisical_site_wrong"),
    ("Failed to authenticate", "infisical_unauthorized"),
    ("Secret with name", "infisical_secret_missing"),
    ("[Bad request]", "infisical_refused"),
    ("error decoding response body", "infisical_not_understood"),
    ("error sending request", "infisical_down"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Location, credentials and expected key of the secret; the client secret stays in its file."""

    site_url: str
    client_id: str
    client_secret_file: Path
    project_id: str
    environment: str
    secret_path: str
    secret_name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A fetched value; its repr does not show it."""

    value: str

    def __repr__(self) -> str:
        return "Secret(…)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is never serialised")


def load_source(environ: Mapping[str, str]) -> Source:
    """The settings of `signer ca render`; raises `BadSettings` with every problem, without values."""
    settings = (*INFISICAL_SETTINGS, FINGERPRINT_SETTING)
    values = {name: environ.get(name) or default for name, default, _ in settings}
    problems = [f"{name}: is not set" for name, value in values.items() if not value]
    problems += [
        f"{name}: contains unprintable characters" for name, value in values.items() if not value.isprintable()
    ]
    problems += _problems_of_url(values["INFISICAL_SITE_URL"])
    secret_file = values["INFISICAL_CLIENT_SECRET_FILE"]
    if secret_file and not Path(secret_file).is_absolute():
        problems.append("INFISICAL_CLIENT_SECRET_FILE: is not an absolute path; name a file, not the secret")
    fingerprint = values[FINGERPRINT_SETTING[0]]
    if fingerprint and not _FINGERPRINT.fullmatch(fingerprint):
        problems.append(f"{FINGERPRINT_SETTING[0]}: is not a fingerprint as `ssh-keygen -l` prints it, SHA256:…")
    if problems:
        raise refused(problems)
    return Source(
        site_url=values["INFISICAL_SITE_URL"].rstrip("/"),
        client_id=values["INFISICAL_CLIENT_ID"],
        client_secret_file=Path(secret_file),
        project_id=values["INFISICAL_PROJECT_ID"],
        environment=values["INFISICAL_ENVIRONMENT"],
        secret_path=values["INFISICAL_SECRET_PATH"],
        secret_name=values["INFISICAL_SECRET_NAME"],
        fingerprint=fingerprint,
    )


def _problems_of_url(text: str) -> Iterator[str]:
    url = _SITE_URL.fullmatch(text)
    if "@" in text:
        yield "INFISICAL_SITE_URL: contains credentials; put them into the file of INFISICAL_CLIENT_SECRET_FILE"
    elif url is None or not 0 < int(url["port"] or "443") < 65_536:
        yield "INFISICAL_SITE_URL: is not an address such as https://infisical.example"
    elif is_clear_text(url["scheme"], url["host"].strip("[]")):
        yield "INFISICAL_SITE_URL: is plain http beyond loopback, which would send the CA key in the clear"


def fetch_secret(source: Source, timeout: float = GIVE_UP_AFTER) -> Secret:
    """The secret's value; raises `Unavailable` for a temporary error, another `SignerError` for a permanent one.

    `timeout` (seconds) covers everything: the child's start, login, the secret, and an SDK that hangs.
    """
    result = _run_child(_child_input(source), timeout)
    if "fault" in result:
        error = _FAULTS[result["fault"]]
        raise type(error)(error.code, error.text, error.hint)  # a copy, because an exception collects tracebacks
    return Secret(result["value"])


def _child_input(source: Source) -> bytes:
    fields = {
        "parent": os.getpid(),
        "proxies": {name: os.environ[name] for name in _PROXIES if name in os.environ},
        "site_url": source.site_url,
        "client_id": source.client_id,
        "client_secret": _read_client_secret(source.client_secret_file),
        "project_id": source.project_id,
        "environment": source.environment,
        "path": source.secret_path,
        "name": source.secret_name,
    }
    return json.dumps(fields).encode()


def _run_child(request: bytes, timeout: float) -> dict[str, str]:
    """The child's result, `value` or `fault`; raises nothing, so that no traceback contains the request."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "signer.ca.infisical"],
            input=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the SDK's text could contain secrets
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"fault": "infisical_slow"}
    except OSError:  # out of processes or memory
        return {"fault": "infisical_sdk_failed"}
    try:
        result: dict[str, str] = json.loads(child.stdout)
    except ValueError:
        return {"fault": "infisical_sdk_failed"}
    return result


def _read_client_secret(path: Path) -> str:
    """The file's only line; it must be a regular file with mode 0400 or 0600. Raises `BadSettings`."""

    def check(facts: os.stat_result) -> None:
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISREG(facts.st_mode) or mode not in (0o400, 0o600) or facts.st_uid not in (0, os.geteuid()):
            raise BadSettings(
                "client_secret_not_private",
                f"{plain(path)} (INFISICAL_CLIENT_SECRET_FILE) has mode {mode:04o} and owner {facts.st_uid}",
                "make it a regular file owned by root with mode 0400 or 0600",
            )

    try:
        data = read_bounded(path, MAX_CLIENT_SECRET, check=check)
    except OSError as error:
        raise BadSettings(
            "client_secret_unreadable",
            f"{plain(path)} (INFISICAL_CLIENT_SECRET_FILE) cannot be opened: {error.strerror}",
            "set it to a regular file that root can read",
        ) from None
    secret = data.decode("utf-8-sig", "replace").strip()
    if not secret or len(data) > MAX_CLIENT_SECRET or not secret.isprintable():
        raise BadSettings(
            "client_secret_malformed",
            f"{plain(path)} (INFISICAL_CLIENT_SECRET_FILE) is not one line of at most {MAX_CLIENT_SECRET} bytes",
            "put the machine identity's client secret into it and nothing else",
        )
    return secret


def _classify(text: str) -> str:
    """The code for one of the SDK's error texts."""
    status = _STATUS.match(text)
    if status is not None:
        return _BY_STATUS.get(status[1], "infisical_failed" if status[1] >= "500" else "infisical_refused")
    if text.startswith("error sending request") and _BAD_CERTIFICATE in text:
        return "infisical_untrusted"
    return next((code for beginning, code in _BEGINNINGS if text.startswith(beginning)), "infisical_failed")


def _child_main() -> None:
    """The child: reads the request from stdin and writes the result to stdout. It ends with its parent."""
    forbid_dumps()
    die_with_parent(signal.SIGKILL)
    request = json.load(sys.stdin)
    if os.getppid() != request["parent"]:  # the parent ended before the call of prctl
        return
    os.environ.update(request["proxies"])
    from infisical_client import (
        AuthenticationOptions,
        ClientSettings,
        GetSecretOptions,
        InfisicalClient,
        UniversalAuthMethod,
    )

    login = UniversalAuthMethod(client_id=request["client_id"], client_secret=request["client_secret"])
    settings = ClientSettings(site_url=request["site_url"], auth=AuthenticationOptions(universal_auth=login))
    wanted = GetSecretOptions(
        secret_name=request["name"],
        project_id=request["project_id"],
        environment=request["environment"],
        path=request["path"],
        include_imports=False,
    )
    try:
        result = {"value": InfisicalClient(settings).getSecret(wanted).secret_value[:MAX_VALUE]}
    except Exception as error:  # noqa: BLE001 - the SDK raises nothing narrower
        result = {"fault": _classify(str(error))}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    _child_main()
