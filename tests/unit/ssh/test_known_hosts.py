"""Files of host keys, as an operator has them from a host or from ssh-keyscan."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from signer.errors import BadRequest
from signer.ssh.known_hosts import key_line, known_hosts_lines, parse_host_key, parse_host_name, read_key_file
from tests.parts.builders import public_key, public_line

ED25519, ECDSA = public_line(), public_line("ecdsa-sha2-nistp256")


def code_of(text: str, *names: str) -> str:
    with pytest.raises(BadRequest) as refused:
        read_key_file(text, names or ("edge1",))
    return refused.value.code


def test_pub_files_and_keyscans_give_each_key_once() -> None:
    scanned = f"# edge1:22 SSH-2.0-OpenSSH_9.2p1\nedge1 {ED25519}\r\n\nEdge1,192.0.2.7 {ECDSA}\n"
    both = [public_key(), public_key("ecdsa-sha2-nistp256")]
    assert read_key_file(scanned, ("edge1", "192.0.2.7")) == both
    assert read_key_file(f"{ED25519} root@edge1\n{ECDSA}\n{ED25519} again", ("edge1",)) == both


def test_a_scan_of_a_port_is_of_that_port() -> None:
    assert read_key_file(f"[edge1]:2222 {ED25519}", ("[edge1]:2222",)) == [public_key()]
    assert code_of(f"[edge1]:2222 {ED25519}", "edge1") == "host_key_of_another"
    assert code_of(f"edge1 {ED25519}", "[edge1]:2222") == "host_key_of_another"


def test_a_file_about_several_hosts_gives_none_the_keys_of_another() -> None:
    assert code_of(f"edge1 {ED25519}\nedge2 {ECDSA}") == "host_key_of_another"
    assert code_of(f"edge1,edge2 {ED25519}") == "host_key_of_another"


@pytest.mark.parametrize(
    "text, code",
    [
        ("", "host_keys_missing"),
        ("# nothing\n", "host_keys_missing"),
        ("x" * 70_000, "host_keys_too_large"),
        (f"@revoked edge1 {ED25519}", "host_key_refused"),
        (f"@cert-authority * {ED25519}", "host_key_refused"),
        (f"* {ED25519}", "host_name_malformed"),
        (f"|1|abc=|def= {ED25519}", "host_name_malformed"),
        ("ssh-dss AAAAB3NzaC1kc3MAAAAA", "host_key_refused"),
        ("ssh-ed25519", "host_key_refused"),
        ("ssh-dss AAAAB3NzaC1kc3MAAAAA root@edge1", "host_key_refused"),
        ("edge1 ssh-dss AAAAB3NzaC1kc3MAAAAA", "host_key_refused"),
        (public_line("sk-ssh-ed25519@openssh.com"), "host_key_refused"),
        (public_line("ssh-rsa/1024"), "host_key_refused"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "host_key_refused"),
        ("ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5LWNlcnQtdjAxQG9wZW5zc2guY29t edge1", "host_key_refused"),
    ],
)
def test_what_is_not_a_plain_strong_key_of_the_host_is_refused(text: str, code: str) -> None:
    assert code_of(text) == code


def test_an_error_names_the_line() -> None:
    with pytest.raises(BadRequest, match="line 2"):
        read_key_file(f"{ED25519}\nssh-dss AAAAB3NzaC1kc3MAAAAA\n", ("edge1",))


def test_ssh_keygen_finds_each_name_in_what_is_written(tmp_path: Path) -> None:
    names = ["edge1.example", "192.0.2.7", "2001:db8::1", "[edge1.example]:2222", "[2001:db8::1]:2222"]
    file = tmp_path / "known_hosts"
    file.write_text(known_hosts_lines([*map(parse_host_name, names)], [key_line(parse_host_key(ED25519))]))
    for name in names:
        found = subprocess.run(["ssh-keygen", "-F", name, "-f", file], capture_output=True, text=True, check=True)
        assert ED25519 in found.stdout
