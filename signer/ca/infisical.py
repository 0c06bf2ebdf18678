"""Fetches one secret from Infisical with its own SDK. Only `signer ca render` imports this, never what serves requests.

The SDK holds Python's lock while it waits and has no time limit, so it runs in a child process that can be killed; the
client secret goes to the child through a pipe, the value comes back through one; its environment holds neither. The
SDK's errors are bare text that can hold addresses and the server's words: they become codes in the child, and the text
goes nowhere.
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

from signer.errors import BadSettings, SignerError, Unavailable
from signer.files import read_bounded
from signer.hardening import die_with_parent, forbid_dumps
from signer.settings import FINGERPRINT_SETTING, INFISICAL_SETTINGS

GIVE_UP_AFTER: Final = 15.0  # seconds, the SDK's hanging included
MAX_CLIENT_SECRET: Final = 4096  # bytes
MAX_VALUE: Final = 64 * 1024  # characters that leave the child; four times the largest key
# Nothing that a parser could read in two ways: no user, no query, no fragment, no backslash, no blank.
_SITE_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?:/[A-Za-z0-9._~/-]*)?"
)
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
_KEPT: Final = ("PATH", "LANG", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXIES: Final = ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")  # may hold a password: not in an environment
_FAULTS: Final = {
    error.code: error
    for error in (
        Unavailable("infisical_down", "Infisical cannot be reached", "check INFISICAL_SITE_URL and the network"),
        Unavailable(
            "infisical_slow",
            f"Infisical did not answer within {GIVE_UP_AFTER:.0f} s",
            "try again later",
        ),
        SignerError(
            "infisical_untrusted",
            "nothing vouches for the certificate that Infisical shows",
            "name a file with its CA certificate in SSL_CERT_FILE",
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
            "set INFISICAL_SITE_URL to its address, such as https://infisical.example",
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
            "infisical_not_understood",
            "the answer is not one that Infisical gives",
            "check that INFISICAL_SITE_URL names Infisical, and nothing in front of it answers instead",
        ),
        SignerError(
            "infisical_sdk_failed", "Infisical's SDK ended without an answer", "install the locked infisical-python"
        ),
    )
}
# What infisical-python 2.3 says, by how it begins: what follows may be the server's words.
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
    """Where the secret is, how to get at it, and what key it must be; the client secret stays in its file."""

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
    """A value that was fetched; it never shows itself."""

    value: str

    def __repr__(self) -> str:
        return "Secret(…)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is never serialised")


def load_source(environ: Mapping[str, str]) -> Source:
    """The settings of `signer ca render`; raises `BadSettings` with every problem found, and never shows a value."""
    settings = (*INFISICAL_SETTINGS, FINGERPRINT_SETTING)
    values = {name: environ.get(name) or default for name, default, _ in settings}
    problems = [f"{name}: is not set" for name, value in values.items() if not value]
    problems += [f"{name}: holds what cannot be printed" for name, value in values.items() if not value.isprintable()]
    problems += _problems_of_url(values["INFISICAL_SITE_URL"])
    secret_file = values["INFISICAL_CLIENT_SECRET_FILE"]
    if secret_file and not Path(secret_file).is_absolute():
        problems.append("INFISICAL_CLIENT_SECRET_FILE: is not an absolute path; it names a file, never a value")
    fingerprint = values[FINGERPRINT_SETTING[0]]
    if fingerprint and not _FINGERPRINT.fullmatch(fingerprint):
        problems.append(f"{FINGERPRINT_SETTING[0]}: is not a fingerprint as `ssh-keygen -l` tells it, SHA256:…")
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise BadSettings(
            "settings_refused", f"the settings have {count}", "mend them in the environment", tuple(problems)
        )
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
        yield "INFISICAL_SITE_URL: holds credentials; they belong into the file of INFISICAL_CLIENT_SECRET_FILE"
    elif url is None or not 0 < int(url["port"] or "443") < 65_536:
        yield "INFISICAL_SITE_URL: is not an address such as https://infisical.example"
    elif url["scheme"] == "http" and url["host"] not in _LOOPBACK:
        yield "INFISICAL_SITE_URL: is plain http beyond loopback, and the CA key would travel in the clear"


def fetch_secret(source: Source, timeout: float = GIVE_UP_AFTER) -> Secret:
    """The secret's value; raises `Unavailable` for what may pass, another `SignerError` for what may not.

    `timeout` is in seconds and holds for everything: the child's start, login, the secret, and an SDK that hangs.
    """
    answer = _ask_the_child(_question(source), timeout)
    if "fault" in answer:
        raise _fault(answer["fault"])
    return Secret(answer["value"])


def _question(source: Source) -> bytes:
    question = {
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
    return json.dumps(question).encode()


def _ask_the_child(question: bytes, timeout: float) -> dict[str, str]:
    """Its answer, `value` or `fault`; it raises nothing, so that no traceback holds the question."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "signer.ca.infisical"],
            input=question,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the SDK's own words could hold anything
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"fault": "infisical_slow"}
    except OSError:  # no process, no memory
        return {"fault": "infisical_sdk_failed"}
    try:
        answer: dict[str, str] = json.loads(child.stdout)
    except ValueError:
        return {"fault": "infisical_sdk_failed"}
    return answer


def _fault(code: str) -> SignerError:
    fault = _FAULTS[code]
    return type(fault)(fault.code, fault.text, fault.hint)  # a new one: an exception gathers where it has been


def _read_client_secret(path: Path) -> str:
    """The file's one line; it must be a regular file, owner-only (0400 or 0600). Raises `BadSettings`."""

    def check(facts: os.stat_result) -> None:
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISREG(facts.st_mode) or mode not in (0o400, 0o600) or facts.st_uid not in (0, os.geteuid()):
            raise BadSettings(
                "client_secret_not_private",
                f"the file of INFISICAL_CLIENT_SECRET_FILE has mode {mode:04o} and owner {facts.st_uid}",
                "it must be a regular file of root's, 0400 or 0600",
            )

    try:
        data = read_bounded(path, MAX_CLIENT_SECRET, check=check)
    except OSError as error:
        raise BadSettings(
            "client_secret_unreadable",
            f"the file of INFISICAL_CLIENT_SECRET_FILE cannot be opened: {error.strerror}",
            "name a regular file that root may read",
        ) from None
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
        return _BY_STATUS.get(status[1], "infisical_failed" if status[1] >= "500" else "infisical_refused")
    if text.startswith("error sending request") and _BAD_CERTIFICATE in text:
        return "infisical_untrusted"
    return next((code for beginning, code in _BEGINNINGS if text.startswith(beginning)), "infisical_failed")


def _ask_the_sdk() -> None:
    """The child: a question on stdin, an answer on stdout. It ends with its parent, however that ends."""
    forbid_dumps()
    die_with_parent(signal.SIGKILL)
    question = json.load(sys.stdin)
    if os.getppid() != question["parent"]:  # it ended before we asked the kernel to tell us
        return
    os.environ.update(question["proxies"])
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
        answer = {"value": InfisicalClient(settings).getSecret(wanted).secret_value[:MAX_VALUE]}
    except Exception as error:  # noqa: BLE001 - the SDK raises nothing narrower
        answer = {"fault": _classify(str(error))}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _ask_the_sdk()
