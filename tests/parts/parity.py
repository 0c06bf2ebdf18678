"""Our service and a real OpenBao side by side: the same CA key, equivalent roles, one request sent to both.

What has to be the same is what `seen()` leaves of an answer; everything it takes away (request ids, serials, nonces,
signatures, issuer ids) is made anew by each server. The certificate reader shares no code with signer/ssh.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.parts import ports
from tests.parts.keys import Key
from tests.parts.openbao import OpenBao
from tests.parts.service import Answer, Service

MOUNT = "parity"
SPARE = "parity-spare"  # in OpenBao, for roles that we have no equivalent of
IDENTITY = "deploy-agent"
KEY_TYPES = (
    '["ssh-ed25519", "sk-ssh-ed25519@openssh.com", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384",'
    ' "ecdsa-sha2-nistp521", "sk-ecdsa-sha2-nistp256@openssh.com", "ssh-rsa"]'
)
PTY = 'extensions = { allowed = ["permit-pty"], default = ["permit-pty"] }'
FIVE = "permit-X11-forwarding,permit-agent-forwarding,permit-port-forwarding,permit-pty,permit-user-rc"


@dataclass(frozen=True)
class Role:
    """One role in both servers' words: lines of policy.toml, fields of Vault's roles/:name."""

    ours: str
    theirs: Mapping[str, object]


def _ours(principals: str = '["llmops"]', default: str = '["llmops"]', more: str = PTY, keys: str = KEY_TYPES) -> str:
    defaults = f"default_principals = {default}\n" if default else ""
    bits = "" if "rsa_min_bits" in more else "rsa_min_bits = 2048\n"
    return (
        f'principals = {principals}\n{defaults}default_ttl = "15m"\nmax_ttl = "30m"\nkey_types = {keys}\n{bits}{more}\n'
    )


def _theirs(**fields: object) -> dict[str, object]:
    """No critical option gets through, key ids have our form; a field of None is left out."""
    every = {
        "key_type": "ca",
        "allow_user_certificates": True,
        "allowed_users": "llmops",
        "default_user": "llmops",
        "allowed_extensions": "permit-pty",
        "default_extensions": {"permit-pty": ""},
        "allowed_critical_options": "none-of-them",
        "ttl": "15m",
        "max_ttl": "30m",
        "key_id_format": "{{token_display_name}}:{{role_name}}",
        **fields,
    }
    return {name: value for name, value in every.items() if value is not None}


NO_EXTENSIONS: dict[str, object] = {"allowed_extensions": None, "default_extensions": None}
FORCED = "/usr/bin/deploy --now"
ROLES: Mapping[str, Role] = {
    "llmops": Role(_ours(), _theirs()),
    "many": Role(
        _ours('["llmops", "deploy", "admin", "web-1.eu_x"]', '["llmops", "deploy"]'),
        _theirs(allowed_users="llmops,deploy,admin,web-1.eu_x", default_user="llmops,deploy"),
    ),
    "nobody": Role(_ours(default=""), _theirs(default_user=None)),
    "keyid": Role(_ours(more=PTY + "\nallow_key_id = true"), _theirs(allow_user_key_ids=True)),
    "keys": Role(
        _ours(
            keys='["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"]',
            more=PTY + "\nrsa_min_bits = 3072",
        ),
        _theirs(allowed_user_key_lengths={"ed25519": [0], "ecdsa-sha2-nistp256": [0], "rsa": [3072]}),
    ),
    "curves": Role(
        _ours(keys='["ecdsa-sha2-nistp384"]'), _theirs(allowed_user_key_lengths={"ecdsa-sha2-nistp384": [0]})
    ),
    "forced": Role(
        _ours(more=f'force_command = "{FORCED}"'),
        _theirs(**NO_EXTENSIONS, default_critical_options={"force-command": FORCED}),
    ),
    "fixed": Role(
        _ours(more='source_address = ["10.0.0.0/8", "192.0.2.7/32"]'),
        _theirs(**NO_EXTENSIONS, default_critical_options={"source-address": "10.0.0.0/8,192.0.2.7/32"}),
    ),
    "options": Role(
        _ours(more=PTY + '\ncritical_options = { allowed = ["source-address", "force-command"] }'),
        _theirs(allowed_critical_options="source-address,force-command"),
    ),
    "five": Role(
        _ours(more="extensions = { allowed = [" + ", ".join(f'"{name}"' for name in FIVE.split(",")) + "] }"),
        _theirs(allowed_extensions=FIVE, default_extensions=None),
    ),
    "none": Role(_ours(more=""), _theirs(**NO_EXTENSIONS)),
    "a.b-c@d_1": Role(_ours(), _theirs()),
    "x": Role(_ours(), _theirs()),
    "others": Role(_ours(), _theirs()),
    # Not equivalent: as generous as each server lets a role be.
    "wide": Role(
        _ours(
            more="extensions = { allowed = ["
            + ", ".join(f'"{name}"' for name in FIVE.split(","))
            + '], default = ["permit-port-forwarding", "permit-pty"] }\nallow_key_id = true\n'
            + 'critical_options = { allowed = ["force-command", "source-address"] }'
        ),
        _theirs(
            allowed_users="*",
            allowed_domains="*",
            allow_subdomains=True,
            allow_bare_domains=True,
            allow_host_certificates=True,
            allow_user_key_ids=True,
            allowed_critical_options=None,
            allowed_extensions="*",
            default_extensions={"permit-port-forwarding": "", "permit-pty": ""},
            key_id_format=None,
        ),
    ),
}


def policy() -> str:
    """policy.toml with every role; the identity may ask for all but `others`."""
    tables = "".join(f'[roles."{name}"]\n{role.ours}\n' for name, role in ROLES.items())
    names = ", ".join(f'"{name}"' for name in ROLES if name != "others")
    token = 'tokens = [{ sha256 = "{token:%s}", expires = 2099-01-01T00:00:00Z }]\n'
    return (
        f'[ca]\nfingerprint = "{{ca}}"\n\n{tables}'
        f'[identities.{IDENTITY}]\nkind = "agent"\nroles = [{names}]\n{token % IDENTITY}\n'
        f'[identities.owner]\nkind = "human"\nroles = ["others"]\n{token % "owner"}'
    )


HCL = f"""
path "*" {{ capabilities = ["create", "read", "update", "delete", "list", "patch", "sudo"] }}
path "{MOUNT}/sign/others" {{ capabilities = ["deny"] }}
path "{MOUNT}/roles/others" {{ capabilities = ["deny"] }}
"""


@dataclass(frozen=True)
class Case:
    """One request with a name. In `path`, `@` is the mount; in a body of bytes, `@KEY@` is the user's public line.

    `token` is `good`, `none`, `bad`, `root` (which only OpenBao has; ours gets the good one), or None where the headers
    carry one (`@TOKEN@`). A body of None sends none.
    """

    name: str
    path: str
    method: str = "POST"
    body: Mapping[str, object] | bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    token: str | None = "good"

    def __str__(self) -> str:
        return self.name


def sign(case_name: str, fields: Mapping[str, object] | None = None, role: str = "llmops", **more: object) -> Case:
    """A sign request for the ed25519 user key, unless the fields bring their own; a field set to `...` is left out."""
    body = {"public_key": "@KEY@", **(fields or {}), **more}
    return Case(case_name, f"@/sign/{role}", body={name: value for name, value in body.items() if value is not ...})


def raw(case_name: str, body: bytes | str, content_type: str | None = None) -> Case:
    """A sign request whose body is exactly this."""
    data = body.encode() if isinstance(body, str) else body
    headers = {} if content_type is None else {"Content-Type": content_type}
    return Case(case_name, "@/sign/llmops", body=data, headers=headers)


@dataclass(frozen=True)
class Certificate:
    """Everything a certificate says, read from its bytes; times in seconds since 1970."""

    kind: str
    nonce: bytes
    key: tuple[bytes, ...]
    serial: int
    cert_type: int
    key_id: str
    principals: tuple[str, ...]
    valid_after: int
    valid_before: int
    critical_options: tuple[tuple[str, str | None], ...]
    extensions: tuple[tuple[str, str | None], ...]
    reserved: bytes
    ca_key: bytes
    signature_kind: str


KEY_PARTS = {
    "ssh-rsa-cert-v01@openssh.com": 2,
    "ssh-ed25519-cert-v01@openssh.com": 1,
    "sk-ssh-ed25519-cert-v01@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256-cert-v01@openssh.com": 3,
}


class _Blob:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def number(self, size: int) -> int:
        taken, self.data = self.data[:size], self.data[size:]
        return int.from_bytes(taken, "big")

    def string(self) -> bytes:
        size = self.number(4)
        taken, self.data = self.data[:size], self.data[size:]
        assert len(taken) == size
        return taken

    def strings(self) -> tuple[bytes, ...]:
        found = []
        while self.data:
            found.append(self.string())
        return tuple(found)


def read_certificate(line: str) -> Certificate:
    """The certificate of one `type base64` line."""
    label, encoded = line.split()[:2]
    blob = _Blob(base64.b64decode(encoded, validate=True))
    kind = blob.string().decode()
    assert kind == label
    nonce = blob.string()
    key = tuple(blob.string() for _ in range(KEY_PARTS.get(kind, 2)))
    certificate = Certificate(
        kind=kind,
        nonce=nonce,
        key=key,
        serial=blob.number(8),
        cert_type=blob.number(4),
        key_id=blob.string().decode(),
        principals=tuple(name.decode() for name in _Blob(blob.string()).strings()),
        valid_after=blob.number(8),
        valid_before=blob.number(8),
        critical_options=_options(blob.string()),
        extensions=_options(blob.string()),
        reserved=blob.string(),
        ca_key=blob.string(),
        signature_kind=_Blob(blob.string()).string().decode(),
    )
    assert not blob.data
    return certificate


def _options(data: bytes) -> tuple[tuple[str, str | None], ...]:
    parts = _Blob(data).strings()
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple((name.decode(), _Blob(value).string().decode() if value else None) for name, value in pairs)


HEADERS = ("content-type", "cache-control", "strict-transport-security", "location", "x-vault-namespace")


def seen(answer: Answer) -> dict[str, Any]:
    """What a client can tell of an answer, without what no two answers share."""
    view: dict[str, Any] = {
        "status": answer.status,
        "headers": {name: answer.headers[name] for name in HEADERS if name in answer.headers},
    }
    if answer.headers.get("content-type") != "application/json" or not answer.body:
        return {**view, "body": answer.body}
    assert answer.body.endswith(b"\n")
    body = answer.json()
    if set(body) == {"errors"}:
        return {**view, "errors": [_seen_error(text) for text in body["errors"]]}
    view["keys"] = list(body)
    data = body.get("data")
    if isinstance(data, dict) and "signed_key" in data:
        view["certificate"] = _seen_certificate(read_certificate(data["signed_key"]))
        view["data keys"] = list(data)
        assert int(data["serial_number"], 16) == read_certificate(data["signed_key"]).serial
        assert f"{read_certificate(data['signed_key']).serial:x}" == data["serial_number"]
        assert data["signed_key"].endswith("\n")
        data = None
    rest = {name: value for name, value in body.items() if name not in ("request_id", "data")}
    return {**view, **rest, "data": _without_names(data)}


# What of a sentence is the same in both servers, where Go tells the place of a fault in JSON or in a duration.
BEGINNINGS = (
    "failed to decode JSON input: ",
    'Field validation failed: error converting input for field "ttl": ',
    "error parsing X-Vault-Wrap-TTL header: ",
)


def _seen_error(text: str) -> str:
    """A sentence without the end that is a listed difference; a list of a map's names, which Go shuffles, in order."""
    for beginning in BEGINNINGS:
        if text.startswith(beginning):
            return beginning
    return re.sub(r"\[.*\]", _sorted_words, text, flags=re.DOTALL)


UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _without_names(data: Any) -> Any:
    """Issuer ids are made up by each server; and a list of roles holds those of others, here a listed difference."""
    if isinstance(data, dict):
        return {UUID.sub("ISSUER", name): _without_names(value) for name, value in data.items() if name != "others"}
    if isinstance(data, list):
        return [_without_names(value) for value in data if value != "others"]
    return UUID.sub("ISSUER", data) if isinstance(data, str) else data


def _sorted_words(match: re.Match[str]) -> str:
    return "[" + " ".join(sorted(match[0][1:-1].split(" "))) + "]"


def _seen_certificate(certificate: Certificate) -> dict[str, object]:
    return {
        "kind": certificate.kind,
        "nonce length": len(certificate.nonce),
        "key": certificate.key,
        "type": certificate.cert_type,
        "key id": certificate.key_id.removeprefix("token-"),  # what Vault puts before a token's display name
        "principals": certificate.principals,
        "seconds": certificate.valid_before - certificate.valid_after,
        "critical options": certificate.critical_options,
        "extensions": certificate.extensions,
        "reserved": certificate.reserved,
        "CA": certificate.ca_key,
        "signature": certificate.signature_kind,
    }


@dataclass(frozen=True)
class Pair:
    """Both servers, ready: `both(case)` are their answers, theirs first."""

    bao: OpenBao
    service: Service
    token: str
    key: Key

    def both(self, case: Case) -> tuple[Answer, Answer]:
        theirs = self.bao.root_token if case.token == "root" else self.token
        return (
            self._send(self.bao.port, theirs, case),
            self._send(self.service.port, self.service.tokens[IDENTITY], case),
        )

    def ours(self, case: Case) -> Answer:
        return self.both(case)[1]

    def certificates(self, case: Case) -> tuple[Certificate, Certificate]:
        """Of a sign request that both grant."""
        theirs, ours = self.both(case)
        assert (theirs.status, ours.status) == (200, 200), (theirs.body, ours.body)
        return (
            read_certificate(theirs.json()["data"]["signed_key"]),
            read_certificate(ours.json()["data"]["signed_key"]),
        )

    def _send(self, port: int, token: str, case: Case) -> Answer:
        connection = http.client.HTTPConnection(ports.LOOPBACK, port, timeout=30)
        try:
            connection.putrequest(case.method, "/v1/" + case.path.replace("@", MOUNT, 1), skip_accept_encoding=True)
            if case.token in ("good", "bad", "root"):
                connection.putheader("X-Vault-Token", "no-such-token" if case.token == "bad" else token)
            for name, value in case.headers.items():
                connection.putheader(name, value.replace("@TOKEN@", token))
            body = self._body(case)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def _body(self, case: Case) -> bytes | None:
        if case.body is None:
            return None
        data = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
        return data.replace(b"@KEY@", self.key.public_line.encode())


def prepare(bao: OpenBao, service: Service, key: Key) -> Pair:
    """The same CA key and equivalent roles in both; `service` runs with `policy()`."""
    for mount in (MOUNT, SPARE):
        bao.enable_ssh(mount, private_key=service.ca.private.read_text(), public_key=bare_line(service.ca))
    for name, role in ROLES.items():
        bao.must("POST", f"{MOUNT}/roles/{name}", role.theirs)
    bao.must("PUT", "sys/policies/acl/parity", {"policy": HCL})
    made = bao.must(
        "POST", "auth/token/create", {"policies": ["parity"], "no_default_policy": True, "display_name": IDENTITY}
    )
    return Pair(bao, service, str(made["auth"]["client_token"]), key)


def bare_line(key: Key) -> str:
    """A public line as a server writes one: no comment, a line end."""
    return " ".join(key.public_line.split()[:2]) + "\n"
