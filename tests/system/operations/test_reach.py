"""runbooks/install/reach.md: its private CA and its nginx, run, with a client that signs through each."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.parts import missing, ports
from tests.parts.documents import blocks, document
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.service import Service, StartService

PAGE = document("runbooks/install/reach.md")
NAME = "signer.example"
ELSEWHERE = "127.0.0.9"  # the client's own address: loopback has many


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the page's openssl commands were run; the name is this machine's here."""
    folder = tmp_path_factory.mktemp("tls")
    (script,) = blocks(PAGE, "sh")
    subprocess.run(
        ["bash", "-euc", script.replace(f"DNS:{NAME}", f"DNS:{NAME},IP:127.0.0.1")],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    assert (folder / "ca-key.pem").stat().st_mode & 0o777 == 0o400
    return folder


def ask(service: Service, address: str, tls: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`signer whoami` against an address, trusting the private CA alone."""
    token = service.folder / "operator.token"
    token.write_text(service.tokens["operator"])
    token.chmod(0o400)
    environ = {**service.environment(), "SSL_CERT_FILE": str(tls / "ca.pem"), **more}
    return subprocess.run(
        ["signer", "whoami", "--address", address, "--token-file", str(token)],
        env=environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def settings(tls: Path) -> Mapping[str, str]:
    return {"SIGNER_TLS_CERT_FILE": str(tls / "tls.crt"), "SIGNER_TLS_KEY_FILE": str(tls / "tls.key")}


class TlsService(Service):
    """It serves TLS, and the page's CA vouches for it."""

    tls: Path

    def is_ready(self) -> bool:
        return ask(self, f"https://127.0.0.1:{self.port}", self.tls).returncode == 0


def test_the_private_ca_of_the_page_lets_a_client_in_and_no_other_ca_does(keyring: KeyRing, tls: Path) -> None:
    service = TlsService(tls / "service", keyring("ed25519", "ca"), environ=settings(tls))
    service.tls = tls
    with service:
        done = ask(service, f"https://127.0.0.1:{service.port}", tls)
        assert (done.returncode, "operator" in done.stdout) == (0, True), done.stderr
        stranger = ask(service, f"https://127.0.0.1:{service.port}", tls, SSL_CERT_FILE="/nonexistent")
        assert stranger.returncode == 1
        assert "certificate" in stranger.stderr


def test_a_unix_socket_beside_it_speaks_no_tls(keyring: KeyRing, tls: Path) -> None:
    """Its clients have no name to look for in a certificate."""
    place, port = tls / "api.sock", ports.free_port()
    listen = {"SIGNER_LISTEN": f"127.0.0.1:{port},unix:{place}"}
    service = TlsService(tls / "beside", keyring("ed25519", "ca"), environ={**settings(tls), **listen})
    service.tls, service.port = tls, port
    with service:
        done = ask(service, f"unix:{place}", tls)
        assert (done.returncode, "operator" in done.stdout) == (0, True), done.stderr
        assert ask(service, f"https://127.0.0.1:{service.port}", tls).returncode == 0


@pytest.fixture
def proxied(start_service: StartService, tls: Path, tmp_path: Path) -> Iterator[tuple[Service, str]]:
    """The service behind the nginx of the page, and nginx's address."""
    service = start_service(environ={"SIGNER_TRUSTED_PROXIES": "127.0.0.1/32"})
    port = ports.free_port()
    (server,) = blocks(PAGE, "nginx")
    moved = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/signer/": f"{tls}/",
        "http://127.0.0.1:8222": f"http://127.0.0.1:{service.port}",
    }
    for before, after in moved.items():
        assert before in server
        server = server.replace(before, after)
    temporary = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"daemon off;\npid {tmp_path}/pid;\nerror_log {tmp_path}/log;\nuser root;\nevents {{}}\n"
        f"http {{\naccess_log {tmp_path}/access;\n{temporary}{server}}}\n"
    )
    nginx = subprocess.Popen([missing.NGINX, "-c", configuration, "-p", tmp_path])
    address = f"https://127.0.0.1:{port}"
    try:
        eventually(lambda: ask(service, address, tls).returncode == 0, "nginx passes requests on")
        yield service, address
    finally:
        ports.stop(nginx)


@missing.needs_nginx
@missing.needs_root
def test_the_nginx_of_the_page_says_who_calls_whatever_the_caller_writes(
    proxied: tuple[Service, str], tls: Path, keyring: KeyRing, tmp_path: Path
) -> None:
    service, address = proxied
    header = tmp_path / "header"
    header.write_text(f"X-Vault-Token: {service.tokens['deploy-agent']}\nX-Forwarded-For: 203.0.113.7\n")
    signed = subprocess.run(
        ["curl", "-fsS", "--interface", ELSEWHERE, "--cacert", str(tls / "ca.pem"), "-H", f"@{header}",
         "--json", f'{{"public_key":"{keyring("ed25519", "user").public_line}"}}', f"{address}/api/sign/llmops"],
        capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert signed.returncode == 0, signed.stderr
    listed = service.command("events", "list", "--kind", "certificate.issued", "--json")
    assert f'"{ELSEWHERE}"' in listed.stdout
    assert "203.0.113.7" not in listed.stdout
    assert service.tokens["deploy-agent"] not in (tmp_path / "access").read_text()
