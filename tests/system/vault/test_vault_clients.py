"""Real Vault clients against our service, with nothing changed but the address: hvac, the `bao` command, `bao ssh`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import hvac
import pytest
from hvac import exceptions

from tests.parts import missing, openbao
from tests.parts.keys import Key, KeyRing
from tests.parts.parity import FIVE, read_certificate
from tests.parts.service import Service, StartService
from tests.parts.sshd import Login, StartSshd, run

POLICY = """
[ca]
fingerprint = "{ca}"

[roles.llmops]
principals = ["llmops"]
default_principals = ["llmops"]
default_ttl = "15m"
max_ttl = "30m"
key_types = ["ssh-ed25519", "ssh-rsa"]
extensions = { allowed = [FIVE], default = ["permit-pty"] }

[roles.rare]
principals = ["llmops"]
default_principals = ["llmops"]
key_types = ["ssh-ed25519"]
limits = { per_minute = 1 }

[roles.others]
principals = ["llmops"]
default_principals = ["llmops"]
key_types = ["ssh-ed25519"]

[identities.deploy-agent]
kind = "agent"
roles = ["llmops", "rare"]
tokens = [{ sha256 = "{token:deploy-agent}", expires = 2099-01-01T00:00:00Z }]

[identities.old]
kind = "agent"
roles = ["llmops"]
tokens = [{ sha256 = "{token:old}", expires = 2001-01-01T00:00:00Z }]
""".replace("FIVE", ", ".join(f'"{name}"' for name in FIVE.split(",")))


@pytest.fixture
def service(start_service: StartService) -> Service:
    return start_service(POLICY)


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    with_token = hvac.Client(url=service.address, token=service.tokens["deploy-agent"])
    yield with_token
    with_token.adapter.close()


# --- hvac ------------------------------------------------------------------------------------------------------------


def test_hvac_signs(client: Any, keyring: KeyRing) -> None:
    answer = client.secrets.ssh.sign_ssh_key(name="llmops", public_key=keyring("ed25519").public_line)
    certificate = read_certificate(answer["data"]["signed_key"])
    assert (certificate.principals, certificate.key_id) == (("llmops",), "deploy-agent:llmops")
    assert certificate.valid_before - certificate.valid_after == 930
    assert answer["data"]["serial_number"] == "1"


def test_hvac_signs_with_everything_said(client: Any, keyring: KeyRing) -> None:
    answer = client.secrets.ssh.sign_ssh_key(
        name="llmops",
        public_key=keyring("ed25519").public_line,
        ttl="60s",
        valid_principals="llmops",
        cert_type="user",
        key_id="",
        critical_options={},
        extensions={"permit-user-rc": ""},
    )
    certificate = read_certificate(answer["data"]["signed_key"])
    assert certificate.extensions == (("permit-pty", None), ("permit-user-rc", None))
    assert certificate.valid_before - certificate.valid_after == 90


def test_hvac_signs_with_a_generic_write(client: Any, keyring: KeyRing) -> None:
    answer = client.write_data("ssh/sign/llmops", data={"public_key": keyring("ed25519").public_line, "ttl": 60})
    assert answer["data"]["signed_key"].startswith("ssh-ed25519-cert-v01@openssh.com ")


def test_hvac_lists_roles_in_all_its_ways(client: Any, service: Service) -> None:
    assert client.secrets.ssh.list_roles()["data"]["keys"] == ["llmops", "rare"]
    assert client.list("ssh/roles")["data"]["keys"] == ["llmops", "rare"]
    strict = hvac.Client(url=service.address, token=service.tokens["deploy-agent"], strict_http=True)
    assert strict.secrets.ssh.list_roles()["data"]["key_info"]["rare"] == {"issuer_ref": "default", "key_type": "ca"}
    strict.adapter.close()


def test_hvac_reads_a_role_and_the_ca(client: Any, service: Service) -> None:
    role = client.secrets.ssh.read_role(name="llmops")["data"]
    assert (role["default_user"], role["max_ttl"], role["key_type"], len(role)) == ("llmops", 1800, "ca", 27)
    line = " ".join(service.ca.public_line.split()[:2]) + "\n"
    assert client.secrets.ssh.read_public_key()["data"]["public_key"] == line
    assert client.read("ssh/config/ca")["data"]["public_key"] == line
    assert client.read("ssh/roles/nope") is None


def test_hvac_knows_whether_it_is_authenticated(client: Any, service: Service) -> None:
    assert client.is_authenticated()
    assert client.auth.token.lookup_self()["data"]["display_name"] == "deploy-agent"
    for token in ("nope", service.tokens["old"], service.tokens["deploy-agent"][:-1]):
        stranger = hvac.Client(url=service.address, token=token)
        assert not stranger.is_authenticated()
        stranger.adapter.close()


def test_hvac_sees_a_server_that_is_open(client: Any) -> None:
    assert client.sys.is_initialized()
    assert not client.sys.is_sealed()
    assert client.sys.read_health_status(method="HEAD").status_code == 200
    assert client.sys.read_leader_status() == {"ha_enabled": False}
    assert client.sys.list_mounted_secrets_engines()["data"]["ssh/"]["type"] == "ssh"


@pytest.mark.parametrize(
    "kind, role, fields, said",
    [
        (exceptions.InvalidRequest, "llmops", {"public_key": "x!"}, "illegal base64 data at input byte 1"),
        (
            exceptions.InvalidRequest,
            "llmops",
            {"valid_principals": "root"},
            "root is not a valid value for valid_principals",
        ),
        (exceptions.InvalidRequest, "llmops", {"ttl": "31m"}, "ttl is larger than maximum allowed 1800"),
        (exceptions.InvalidRequest, "nope", {}, "Unknown role: nope"),
        (exceptions.Forbidden, "others", {}, "permission denied"),
        (exceptions.InvalidPath, "-", {}, "unsupported path"),
    ],
    ids=str,
)
def test_hvac_raises_the_class_it_raises_for_vault(
    client: Any, keyring: KeyRing, kind: type[Exception], role: str, fields: Mapping[str, str], said: str
) -> None:
    asked = {"public_key": keyring("ed25519").public_line, **fields}
    with pytest.raises(kind, match=said):
        client.secrets.ssh.sign_ssh_key(name=role, **asked)


def test_hvac_is_forbidden_without_a_good_token(service: Service, keyring: KeyRing) -> None:
    stranger = hvac.Client(url=service.address, token="nope")
    with pytest.raises(exceptions.Forbidden, match="permission denied"):
        stranger.secrets.ssh.sign_ssh_key(name="llmops", public_key=keyring("ed25519").public_line)
    stranger.adapter.close()


def test_hvac_sees_a_limit_as_too_many_requests(client: Any, keyring: KeyRing) -> None:
    line = keyring("ed25519").public_line
    client.secrets.ssh.sign_ssh_key(name="rare", public_key=line)
    with pytest.raises(exceptions.RateLimitExceeded, match="had 1 certificates of role rare within 60 s"):
        client.secrets.ssh.sign_ssh_key(name="rare", public_key=line)


def test_hvac_is_told_where_roles_are_written(client: Any) -> None:
    with pytest.raises(exceptions.UnexpectedError, match=r"policy\.toml"):
        client.secrets.ssh.create_role(name="new", key_type="ca", allow_user_certificates=True)
    with pytest.raises(exceptions.UnexpectedError, match=r"policy\.toml"):
        client.secrets.ssh.delete_role(name="llmops")
    with pytest.raises(exceptions.UnexpectedError, match=r"policy\.toml"):
        client.secrets.ssh.submit_ca_information(generate_signing_key=True)
    with pytest.raises(exceptions.UnexpectedError, match="a server must not make private keys"):
        client.write_data("ssh/issue/llmops", data={})


def test_hvac_in_a_namespace_finds_nothing(service: Service) -> None:
    elsewhere = hvac.Client(url=service.address, token=service.tokens["deploy-agent"], namespace="ns1")
    with pytest.raises(exceptions.InvalidPath, match="namespace not found"):
        elsewhere.secrets.ssh.list_roles()
    elsewhere.adapter.close()


# --- bao -------------------------------------------------------------------------------------------------------------


def _bao(service: Service, *arguments: str, identity: str = "deploy-agent") -> Login:
    """Runs a `bao` command as it comes, its home a folder of its own."""
    if reason := missing.bao():
        pytest.skip(reason)
    home = service.folder / "home"
    home.mkdir(exist_ok=True)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "BAO_ADDR": service.address,
        "BAO_TOKEN": service.tokens[identity],
    }
    return run([str(openbao.binary()), *arguments], environment=environ)


def test_bao_signs(service: Service, keyring: KeyRing) -> None:
    public = keyring("ed25519").public
    done = _bao(service, "write", "-format=json", "ssh/sign/llmops", f"public_key=@{public}", "ttl=5m")
    assert done.ok, done.err
    assert read_certificate(json.loads(done.out)["data"]["signed_key"]).principals == ("llmops",)
    field = _bao(service, "write", "-field=signed_key", "ssh/sign/llmops", f"public_key=@{public}")
    assert read_certificate(field.out).serial == 2


def test_bao_reads_and_lists(service: Service) -> None:
    listed = _bao(service, "list", "-format=json", "ssh/roles")
    assert json.loads(listed.out) == ["llmops", "rare"], listed.err
    assert _bao(service, "read", "-field=max_ttl", "ssh/roles/llmops").out == "1800"
    line = " ".join(service.ca.public_line.split()[:2]) + "\n"
    assert _bao(service, "read", "-field=public_key", "ssh/config/ca").out == line
    assert _bao(service, "read", "-format=raw", "ssh/public_key").out.rstrip("\n") == line.rstrip("\n")
    assert "No value found at ssh/roles/nope" in _bao(service, "read", "ssh/roles/nope").err
    assert "ssh/" in json.loads(_bao(service, "secrets", "list", "-format=json").out)


def test_bao_tells_a_refusal(service: Service, keyring: KeyRing) -> None:
    public = f"public_key=@{keyring('ed25519').public}"
    refused = _bao(service, "write", "ssh/sign/llmops", public, "valid_principals=root")
    assert refused.status == 2
    assert "Code: 400" in refused.err
    assert "* root is not a valid value for valid_principals" in refused.err
    assert "Code: 403" in _bao(service, "write", "ssh/sign/llmops", public, identity="stranger").err
    for command in (("write", "ssh/roles/x", "key_type=ca"), ("delete", "ssh/roles/llmops")):
        refused = _bao(service, *command)
        assert (refused.status, "Code: 405" in refused.err, "policy.toml" in refused.err) == (2, True, True)
    assert "Code: 400" in _bao(service, "write", "-wrap-ttl=60s", "ssh/sign/llmops", public).err
    assert "namespace not found" in _bao(service, "write", "-namespace=team/a", "ssh/sign/llmops", public).err


def test_bao_status_and_login(service: Service) -> None:
    status = _bao(service, "status", "-format=json")
    assert (status.status, json.loads(status.out)["sealed"]) == (0, False), status.err
    table = _bao(service, "status")
    assert table.ok, table.err
    login = _bao(service, "login", "-format=json", service.tokens["deploy-agent"])
    assert login.ok, login.err
    assert json.loads(login.out)["auth"]["policies"] == ["llmops", "rare"]
    help_text = _bao(service, "path-help", "ssh/roles")
    assert "policy.toml" in help_text.out, help_text.err


@missing.needs_sshd
def test_bao_ssh_logs_in(service: Service, keyring: KeyRing, start_sshd: StartSshd) -> None:
    user: Key = keyring("ed25519")
    sshd = start_sshd(service.ca.public_line, principals=["llmops"])
    arguments = [
        "ssh", "-mode=ca", "-role=llmops", "-mount-point=ssh", f"-private-key-path={user.private}",
        f"-public-key-path={user.public}", "-valid-principals=llmops", "-strict-host-key-checking=no",
        f"-user-known-hosts-file={sshd.folder / 'known'}", f"{sshd.user}@127.0.0.1", "-p", str(sshd.port),
        "-o", "IdentitiesOnly=yes", "echo", "in",
    ]  # fmt: skip
    assert shutil.which("ssh")
    login = _bao(service, *arguments)
    assert (login.status, login.out) == (0, "in\n"), login.err + sshd.log()
    assert "ID deploy-agent:llmops (serial 1)" in sshd.log()
    refused = _bao(service, *(word.replace("-valid-principals=llmops", "-valid-principals=root") for word in arguments))
    assert not refused.ok
    assert "root is not a valid value for valid_principals" in refused.err
