"""Fetches one secret from Infisical with its own SDK. Only `signer ca render` imports this, never what serves requests.

The SDK holds Python's lock while it waits and has no time limit, so it runs in a child process that can be killed; the
client secret goes to the child through a pipe, the value comes back through one. The SDK's errors are bare text that
can hold addresses and the server's words: they become codes in the child, and the text goes nowhere.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from signer.errors import BadSettings, SignerError, Unavailable
from signer.harden import forbid_dumps
from signer.settings import INFISICAL_SETTINGS

GIVE_UP_AFTER: Final = 15.0  # seconds, the SDK's hanging included
MAX_CLIENT_SECRET: Final = 4096  # bytes
_FAULTS: Final = {
    error.code: error
    for error in (
        Unavailable("infisical_down", "Infisical cannot be reached", "check INFISICAL_SITE_URL and the network"),
        Unavailable(
            "infisical_slow",
            f"Infisical did not answer within {GIVE_UP_AFTER:.0f} s",
            "try again; the file is as it was",
        ),
        SignerError(
            "infisical_unauthorized",
            "Infisical does not know these credentials",
            "check INFISICAL_CLIENT_ID and the file of INFISICAL_CLIENT_SECRET_FILE",
        ),
        SignerError(
            "infisical_forbidden",
            "Infisical does not let this identity read the secret",
            "give the machine identity read access to the project, environment and path",
        ),
        SignerError(
            "infisical_site_wrong",
            "there is no Infisical where INFISICAL_SITE_URL points",
            "set INFISICAL_SITE_URL to its address, without a path",
        ),
        SignerError(
            "infisical_secret_missing",
            "Infisical has no such secret",
            "check INFISICAL_PROJECT_ID, INFISICAL_ENVIRONMENT, INFISICAL_SECRET_PATH and INFISICAL_SECRET_NAME",
        ),
        Unavailable("infisical_rate_limited", "Infisical says that it is asked too often", "try again in a minute"),
        SignerError(
            "infisical_refused", "Infisical refuses the request as malformed", "check the INFISICAL_* settings"
        ),
        Unavailable(
            "infisical_failed", "Infisical answered with an error of its own", "look at Infisical, then try again"
        ),
        SignerError(
            "infisical_sdk_failed", "Infisical's SDK ended without an answer", "install the locked infisical-python"
        ),
    )
}
# What infisical-python 2.3 says, by how it begins; a status in the text goes before these.
_STATUS: Final = re.compile(r"Received error message from server: \(status (\d{3})")
_BY_STATUS: Final = {"401": "infisical_unauthorized", "403": "infisical_forbidden", "429": "infisical_rate_limited"}
_BEGINNINGS: Final = (
    ("Failed to authenticate, did you provide", "infisical_site_wrong"),
    ("Failed to authenticate", "infisical_unauthorized"),
    ("Secret with name", "infisical_secret_missing"),
    ("[Bad request]", "infisical_refused"),
    ("error sending request", "infisical_down"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the secret is and how to get at it; the client secret stays in its file until it is needed."""

    site_url: str
    client_id: str
    client_secret_file: Path
    project_id: str
    environment: str
    secret_path: str
    secret_name: str


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A value that was fetched; it never shows itself."""

    value: str

    def __repr__(self) -> str:
        return "Secret(…)"


def load_source(environ: Mapping[str, str]) -> Source:
    """The `INFISICAL_*` settings; raises `BadSettings` with every problem found."""
    problems, values = [], {}
    for name, default, _ in INFISICAL_SETTINGS:
        values[name] = environ.get(name) or default
        if not values[name]:
            problems.append(f"{name}: is not set")
    url = urlsplit(values["INFISICAL_SITE_URL"])
    if url.scheme not in ("https", "http") or not url.hostname:
        problems.append("INFISICAL_SITE_URL: is not an address such as https://infisical.example")
    elif url.username is not None or url.password is not None:
        problems.append("INFISICAL_SITE_URL: holds credentials; they belong into INFISICAL_CLIENT_SECRET_FILE")
    elif url.scheme == "http" and url.hostname not in ("127.0.0.1", "localhost", "::1"):
        problems.append("INFISICAL_SITE_URL: is plain http beyond loopback, and the CA key would travel in the clear")
    secret_file = Path(values["INFISICAL_CLIENT_SECRET_FILE"])
    if values["INFISICAL_CLIENT_SECRET_FILE"] and not secret_file.is_absolute():
        problems.append("INFISICAL_CLIENT_SECRET_FILE: is not an absolute path; it names a file, never a value")
    if problems:
        raise BadSettings("settings_refused", "the Infisical settings are not complete", "set them", tuple(problems))
    return Source(
        site_url=values["INFISICAL_SITE_URL"].rstrip("/"),
        client_id=values["INFISICAL_CLIENT_ID"],
        client_secret_file=secret_file,
        project_id=values["INFISICAL_PROJECT_ID"],
        environment=values["INFISICAL_ENVIRONMENT"],
        secret_path=values["INFISICAL_SECRET_PATH"],
        secret_name=values["INFISICAL_SECRET_NAME"],
    )


def fetch_secret(source: Source, timeout: float = GIVE_UP_AFTER) -> Secret:
    """The secret's value; raises `Unavailable` for what may pass, another `SignerError` for what may not."""
    question = {
        "site_url": source.site_url,
        "client_id": source.client_id,
        "client_secret": _read_client_secret(source.client_secret_file),
        "project_id": source.project_id,
        "environment": source.environment,
        "path": source.secret_path,
        "name": source.secret_name,
    }
    kept = ("PATH", "LANG", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTPS_PROXY", "NO_PROXY")
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "signer.infisical"],
            input=json.dumps(question).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the SDK's own words could hold anything
            env={name: os.environ[name] for name in kept if name in os.environ},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _fault("infisical_slow") from None
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        raise _fault("infisical_sdk_failed") from None
    if "fault" in answer:
        raise _fault(str(answer["fault"]))
    return Secret(str(answer["value"]))


def _fault(code: str) -> SignerError:
    fault = _FAULTS[code]
    return type(fault)(fault.code, fault.text, fault.hint)  # a new one: an exception gathers where it has been


def _read_client_secret(path: Path) -> str:
    """The file's one line; it must be a regular file, owner-only (0400 or 0600). Raises `BadSettings`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadSettings(
            "client_secret_unreadable",
            f"the file of INFISICAL_CLIENT_SECRET_FILE cannot be opened: {error.strerror}",
            "name a regular file that root may read",
        ) from None
    try:
        facts = os.fstat(descriptor)
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISREG(facts.st_mode) or mode not in (0o400, 0o600) or facts.st_uid not in (0, os.geteuid()):
            raise BadSettings(
                "client_secret_not_private",
                f"the file of INFISICAL_CLIENT_SECRET_FILE has mode {mode:04o} and owner {facts.st_uid}",
                "it must be a regular file of root's, 0400 or 0600",
            )
        data = os.read(descriptor, MAX_CLIENT_SECRET + 1)
    finally:
        os.close(descriptor)
    secret = data.decode("utf-8", "replace").strip()
    if not secret or len(data) > MAX_CLIENT_SECRET or not secret.isprintable():
        raise BadSettings(
            "client_secret_malformed",
            f"the file of INFISICAL_CLIENT_SECRET_FILE is not one line of at most {MAX_CLIENT_SECRET} bytes",
            "put the machine identity's client secret into it and nothing else",
        )
    return secret


def _classify(text: str) -> str:
    """The code for one of the SDK's error texts."""
    status = _STATUS.match(text)
    if status is not None:
        return _BY_STATUS.get(status[1], "infisical_failed")
    return next((code for beginning, code in _BEGINNINGS if text.startswith(beginning)), "infisical_failed")


def _ask_the_sdk() -> None:
    """The child: a question on stdin, an answer on stdout."""
    forbid_dumps()
    question = json.load(sys.stdin)
    from infisical_client import (
        AuthenticationOptions,
        ClientSettings,
        GetSecretOptions,
        InfisicalClient,
        UniversalAuthMethod,
    )

    login = UniversalAuthMethod(client_id=question["client_id"], client_secret=question["client_secret"])
    settings = ClientSettings(site_url=question["site_url"], auth=AuthenticationOptions(universal_auth=login))
    wanted = GetSecretOptions(
        secret_name=question["name"],
        project_id=question["project_id"],
        environment=question["environment"],
        path=question["path"],
        include_imports=False,
    )
    try:
        answer = {"value": InfisicalClient(settings).getSecret(wanted).secret_value}
    except Exception as error:  # noqa: BLE001 - the SDK raises nothing narrower
        answer = {"fault": _classify(str(error))}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _ask_the_sdk()
