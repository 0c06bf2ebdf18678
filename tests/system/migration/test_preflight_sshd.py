"""What the preflight says of this host's sshd is what that sshd, a real one, answers to a certificate of the CA.

The certificate's private key is withheld, so no test logs in.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.parts.hosts import Host, Line
from tests.parts.keys import Key, make_key, sign_with_ssh_keygen, ssh_keygen

Change = Callable[[Host], None]
REFUSING: dict[str, tuple[str, Change]] = {}
ACCEPTING: dict[str, Change] = {}
GROUPS: Final = "root:x:0:\nops:x:500:llmops\nllmops:x:1001:\nnogroup:x:65534:\n"
SHADOW: Final = "root:*:19000:0:99999:7:::\nllmops:{0}:19000:0:99999:7::{1}:\n"


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Key:
    """The key that the certificates are for."""
    return make_key(tmp_path_factory.mktemp("user"), "ed25519", "user")


@pytest.fixture
def certificate(user: Key, keys_for_hosts: tuple[Key, Key]) -> Path:
    """A certificate of the hosts' CA for principal llmops."""
    return sign_with_ssh_keygen(keys_for_hosts[0], user)


def refusing(code: str) -> Callable[[Change], Change]:
    """Adds a host whose sshd refuses the certificate; `code` is the only FAIL there."""

    def add(change: Change) -> Change:
        REFUSING[change.__name__] = (code, change)
        return change

    return add


def accepting(change: Change) -> Change:
    """Adds a host whose sshd accepts the certificate; there is no FAIL and no warning."""
    ACCEPTING[change.__name__] = change
    return change


def ca_file(host: Host, text: str) -> None:
    host.write("etc/ca.pub", text.replace("CA", " ".join(host.ca.public_line.split()[:2])))


# --- the file of CAs ----------------------------------------------------------------------------------------------


@refusing("sshd_ca_line_malformed")
def cert_authority_in_front_of_the_key(host: Host) -> None:
    ca_file(host, "cert-authority CA\n")


@refusing("sshd_ca_line_malformed")
def options_in_front_of_the_key(host: Host) -> None:
    ca_file(host, 'from="10.0.0.0/8" CA\n')


@refusing("sshd_ca_line_malformed")
def a_line_before_it_is_no_key(host: Host) -> None:
    ca_file(host, "ssh-ed25519 AAAA other\nCA\n")


@refusing("sshd_ca_line_malformed")
def a_carriage_return_alone_before_it(host: Host) -> None:
    ca_file(host, "\r\nCA\n")


@refusing("sshd_ca_line_malformed")
def the_line_before_it_has_another_kind_than_its_key(host: Host) -> None:
    ca_file(host, f"ssh-rsa {host.ca.public_line.split()[1]}\nCA\n")


@refusing("sshd_does_not_trust_ca")
def a_comma_at_the_end_of_the_key(host: Host) -> None:
    ca_file(host, "CA,\n")


@accepting
def blanks_comments_and_line_ends_of_windows(host: Host) -> None:
    ca_file(host, "# a comment\r\n \t \n  CA comment\r\nno key after it\n")


@accepting
def a_tab_between_kind_and_key(host: Host) -> None:
    ca_file(host, "\t".join(host.ca.public_line.split()[:2]))


@accepting
def another_ca_before_it(host: Host) -> None:
    other = (host.folder / "etc" / "host_key.pub").read_text()
    ca_file(host, f"{other}\nCA")


# --- algorithms ---------------------------------------------------------------------------------------------------


@refusing("sshd_ca_algorithm_refused")
def the_cas_algorithm_is_not_accepted(host: Host) -> None:
    host.configure_sshd("CASignatureAlgorithms rsa-sha2-512,ecdsa-sha2-nistp256")


@refusing("sshd_ca_algorithm_refused")
def the_cas_algorithm_is_taken_out(host: Host) -> None:
    host.configure_sshd("CASignatureAlgorithms -ssh-ed25519")


@refusing("sshd_refuses_key_kind")
def certificates_are_not_accepted(host: Host) -> None:
    host.configure_sshd("PubkeyAcceptedAlgorithms ssh-ed25519,ecdsa-sha2-nistp256-cert-v01@openssh.com")


@accepting
def algorithms_are_given_as_patterns(host: Host) -> None:
    host.configure_sshd("PubkeyAcceptedAlgorithms ssh-ed25519*", "CASignatureAlgorithms ssh-ed25519")


# --- how one may log in -------------------------------------------------------------------------------------------


@refusing("sshd_refuses_keys")
def no_public_keys(host: Host) -> None:
    host.configure_sshd("PubkeyAuthentication no")


@refusing("sshd_refuses_keys")
def no_public_keys_for_this_account(host: Host) -> None:
    host.configure_sshd()
    path = host.over["/etc/ssh/sshd_config"]
    path.write_text(f"{path.read_text()}Match User llmops\n  PubkeyAuthentication no\n")


@accepting
def no_public_keys_for_others(host: Host) -> None:
    host.configure_sshd("PubkeyAuthentication yes")
    path = host.over["/etc/ssh/sshd_config"]
    path.write_text(f"{path.read_text()}Match User root\n  PubkeyAuthentication no\n")


@accepting
def one_method_of_several_is_the_key_alone(host: Host) -> None:
    host.configure_sshd("AuthenticationMethods publickey,password publickey")


# --- who may log in -----------------------------------------------------------------------------------------------


@refusing("sshd_refuses_user")
def others_are_allowed(host: Host) -> None:
    host.configure_sshd("AllowUsers root llm llmops2 [l]lmops")


@accepting
def it_is_allowed_by_pattern(host: Host) -> None:
    host.configure_sshd("AllowUsers root llm?ps")


@refusing("sshd_refuses_user")
def it_is_denied(host: Host) -> None:
    host.configure_sshd("DenyUsers root llm*", "AllowUsers llmops")


@refusing("sshd_refuses_user")
def its_group_is_denied(host: Host) -> None:
    host.lay_over("/etc/group", GROUPS)
    host.configure_sshd("DenyGroups wheel o?s")


@refusing("sshd_refuses_user")
def other_groups_are_allowed(host: Host) -> None:
    host.lay_over("/etc/group", GROUPS)
    host.configure_sshd("AllowGroups wheel root")


@accepting
def its_second_group_is_allowed(host: Host) -> None:
    host.lay_over("/etc/group", GROUPS)
    host.configure_sshd("AllowGroups ops", "DenyGroups wheel")


@refusing("sshd_account_unusable")
def there_is_no_such_account(host: Host) -> None:
    passwd = host.over["/etc/passwd"]
    passwd.write_text(passwd.read_text().replace("llmops:x", "somebody:x"))
    (host.folder / "etc" / "principals").write_text("llmops\n")


@refusing("sshd_account_unusable")
def its_shell_is_missing(host: Host) -> None:
    passwd = host.over["/etc/passwd"]
    passwd.write_text(passwd.read_text().replace("llmops:/bin/sh", "llmops:/bin/none"))


@refusing("sshd_account_unusable")
def it_is_locked(host: Host) -> None:
    host.lay_over("/etc/shadow", SHADOW.format("!", ""))


@refusing("sshd_account_unusable")
def it_has_expired(host: Host) -> None:
    host.lay_over("/etc/shadow", SHADOW.format("*", int(time.time()) // 86400 - 1))


@accepting
def it_has_no_password_and_expires_later(host: Host) -> None:
    host.lay_over("/etc/shadow", SHADOW.format("*", int(time.time()) // 86400 + 9))


# --- revocation ---------------------------------------------------------------------------------------------------


@refusing("sshd_revocation_list_unusable")
def the_list_of_revoked_keys_is_missing(host: Host) -> None:
    host.configure_sshd(f"RevokedKeys {host.folder}/etc/revoked")


@refusing("sshd_revocation_list_unusable")
def the_list_of_revoked_keys_is_broken(host: Host) -> None:
    path = host.write("etc/revoked", "")
    ssh_keygen("-k", "-q", "-f", path)
    path.write_bytes(path.read_bytes()[:20])
    host.configure_sshd(f"RevokedKeys {path}")


@refusing("sshd_revocation_list_unusable")
def the_list_of_revoked_keys_has_a_line_that_is_no_key(host: Host) -> None:
    host.configure_sshd(f"RevokedKeys {host.write('etc/revoked', 'all of them')}")


@refusing("sshd_ca_revoked")
def the_ca_is_revoked(host: Host) -> None:
    path = host.folder / "etc" / "revoked"
    ssh_keygen("-k", "-q", "-f", path, host.ca.public)
    host.configure_sshd(f"RevokedKeys {path}")


@refusing("sshd_ca_revoked")
def the_ca_is_revoked_as_a_line(host: Host) -> None:
    host.configure_sshd(f"RevokedKeys {host.write('etc/revoked', f'# gone{chr(10)}{host.ca.public_line}')}")


@accepting
def the_list_of_revoked_keys_is_empty(host: Host) -> None:
    path = host.folder / "etc" / "revoked"
    ssh_keygen("-k", "-q", "-f", path)
    host.configure_sshd(f"RevokedKeys {path}")


@accepting
def another_key_is_revoked_as_a_line(host: Host) -> None:
    shutil.copyfile(host.folder / "etc" / "host_key.pub", host.folder / "etc" / "revoked")
    host.configure_sshd(f"RevokedKeys {host.folder}/etc/revoked")


# --- principals ---------------------------------------------------------------------------------------------------


@refusing("principals_file_lacks_principal")
def the_principals_are_others(host: Host) -> None:
    (host.folder / "etc" / "principals").write_text("# llmops\nllmops2\nllmops other\n")


@refusing("principals_file_missing")
def there_is_no_principals_file_for_the_account(host: Host) -> None:
    host.write("etc/of-root", "llmops\n")
    host.configure_sshd(f"AuthorizedPrincipalsFile {host.folder}/etc/of-%u")


@accepting
def the_principal_has_options_before_and_a_comment_after_it(host: Host) -> None:
    (host.folder / "etc" / "principals").write_text('other\n\tcommand="/bin/true",no-pty llmops  # the agents\n')


@accepting
def each_account_has_its_principals(host: Host) -> None:
    host.write("etc/of-llmops-1001", "llmops")
    host.configure_sshd(f"AuthorizedPrincipalsFile {host.folder}/etc/of-%u-%U")


# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSING)
def test_audit_4f2_4f3_4e3_the_preflight_fails_where_that_sshd_refuses(
    host: Host, certificate: Path, name: str
) -> None:
    code, change = REFUSING[name]
    change(host)
    told = host.run()
    assert told.codes("FAIL", "warn") == {code}, told.stdout
    assert told.returncode == 1
    assert not {"sshd_trusts_ca", "sshd_accepts_login", "principals_file"} <= told.codes("ok")
    assert not host.sshd_accepts(certificate), "the preflight is wrong: this sshd accepts it"


@pytest.mark.parametrize("name", ACCEPTING)
def test_audit_4f2_4f3_4e3_the_preflight_is_content_where_that_sshd_accepts(
    host: Host, certificate: Path, name: str
) -> None:
    ACCEPTING[name](host)
    told = host.run()
    assert told.codes("FAIL", "warn") == set(), told.stdout
    assert {"sshd_trusts_ca", "sshd_accepts_login", "principals_file"} <= told.codes("ok")
    assert host.sshd_accepts(certificate), "the preflight is wrong: this sshd refuses it"


@pytest.mark.parametrize("methods", ["publickey,password", "publickey,publickey", "password"])
def test_audit_4e3_a_certificate_alone_must_be_enough(host: Host, methods: str) -> None:
    host.configure_sshd(f"AuthenticationMethods {methods}")
    assert host.run().codes("FAIL", "warn") == {"sshd_requires_more_than_a_key"}


@pytest.mark.parametrize("line, code", [("no", "sshd_refuses_user"), ("forced-commands-only", "sshd_refuses_user"),
                                        ("prohibit-password", None)])  # fmt: skip
def test_audit_4e3_root_may_log_in_by_certificate(host: Host, line: str, code: str | None) -> None:
    host.environ |= {"SAFE_SESSION_LOGIN_USER": "root", "SAFE_SESSION_PRINCIPALS": "llmops"}
    host.configure_sshd(f"PermitRootLogin {line}")
    assert host.run().codes("FAIL", "warn") == ({code} if code else set())


DEPENDS: Final = {
    "AllowUsers with an address": ["AllowUsers root llmops@10.0.0.0/8"],
    "DenyUsers with an address": ["DenyUsers llmops@192.0.2.1"],
    "a command for the principals": [
        "AuthorizedPrincipalsCommand /usr/bin/true", "AuthorizedPrincipalsCommandUser nobody",
    ],
}  # fmt: skip


@pytest.mark.parametrize("lines", DEPENDS.values(), ids=DEPENDS)
def test_audit_4e3_what_depends_on_more_than_sshd_tells_is_a_warning(host: Host, lines: list[str]) -> None:
    host.configure_sshd(*lines)
    told = host.run()
    assert told.codes("FAIL", "warn") == {"sshd_login_not_proved"}, told.stdout
    assert "sshd_accepts_login" not in told.codes("ok")


def test_audit_4e3_a_match_block_for_other_addresses_is_a_warning(host: Host) -> None:
    path = host.over["/etc/ssh/sshd_config"]
    path.write_text(f"{path.read_text()}Match User llmops Address 192.0.2.0/24\n  PubkeyAuthentication no\n")
    told = host.run()
    assert told.codes("FAIL", "warn") == {"sshd_login_not_proved"}, told.stdout
    assert "address 192.0.2.0/24" in told.detail("sshd_login_not_proved")


def test_audit_4e3_a_match_block_for_the_given_address_counts(host: Host) -> None:
    path = host.over["/etc/ssh/sshd_config"]
    path.write_text(f"{path.read_text()}Match Address 192.0.2.0/24\n  PubkeyAuthentication no\n")
    host.environ["SAFE_SESSION_LOGIN_FROM"] = "192.0.2.7"
    assert host.run().codes("FAIL", "warn") == {"sshd_refuses_keys"}


def test_audit_4e3_without_a_principals_file_the_certificate_must_name_the_account(host: Host) -> None:
    host.configure_sshd("AuthorizedPrincipalsFile none")
    host.environ["SAFE_SESSION_PRINCIPALS"] = "deploy,other"
    told = host.run()
    assert told.codes("FAIL") == {"principals_file_lacks_principal"}
    host.environ["SAFE_SESSION_PRINCIPALS"] = "deploy,llmops"
    assert Line("ok", "principals_file", "none; a certificate must name the account itself") in host.run().lines
