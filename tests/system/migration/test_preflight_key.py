"""The preflight's checks of the key file: a table of prepared hosts, each with its one fault, and some with several."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from signer.ca.key import load_ca_key
from signer.errors import BadKeyFile
from tests.parts import missing
from tests.parts.hosts import FOLDER_VARIABLE, KEY_VARIABLE, Host
from tests.parts.key_forms import FORMS
from tests.parts.keys import KeyRing, make_key

Prepare = Callable[[Host], None]
TABLE: dict[str, tuple[set[str], Prepare]] = {}

NO_KEY = {"ca_key_kind", "ca_key_fingerprint", "ca_key_no_login_key", "sshd_trusts_ca"}
NO_CONTENT = NO_KEY | {"ca_key_parses"}
NO_FILE = NO_CONTENT | {
    "ca_key_owner", "ca_key_mode", "ca_key_no_acl", "ca_key_parents", "ca_key_folder", "ca_key_in_memory",
    "ca_key_outside_git",
}  # fmt: skip
NO_MERGE = {
    "compose_merged",
    "compose_allowed",
    "compose_other_services",
    "overlay_mount",
    "overlay_mode",
    "service_hardened",
    "image_present",
}
NO_MERGE |= {"container_user", "container_capabilities", "container_mounts"}


def a_host_where(*codes: str) -> Callable[[Prepare], Prepare]:
    """Adds the host that the function prepares to the table; `codes` are all that is not `ok` there."""

    def add(prepare: Prepare) -> Prepare:
        TABLE[prepare.__name__] = (set(codes), prepare)
        return prepare

    return add


@a_host_where()
def nothing_is_wrong(host: Host) -> None:
    pass


@a_host_where()
def the_key_may_be_written_by_its_owner(host: Host) -> None:
    host.key.chmod(0o600)


@a_host_where("ca_key_variable_not_set")
def the_variable_is_not_set(host: Host) -> None:
    del host.environ[KEY_VARIABLE]


@a_host_where("ca_key_variable_not_set")
def the_variable_is_empty(host: Host) -> None:
    host.environ[KEY_VARIABLE] = ""


@a_host_where("ca_key_path_not_absolute")
def the_path_is_relative(host: Host) -> None:
    host.environ[KEY_VARIABLE] = str(host.key).lstrip("/")


@a_host_where("ca_key_path_not_plain")
def the_path_has_dots(host: Host) -> None:
    host.environ[KEY_VARIABLE] = f"{host.key.parent}/../{host.key.parent.name}/ca"


@a_host_where("ca_key_path_not_plain")
def the_path_ends_with_a_slash(host: Host) -> None:
    host.environ[KEY_VARIABLE] = f"{host.key}/"


@a_host_where("ca_key_missing")
def there_is_no_key(host: Host) -> None:
    host.key.unlink()


@a_host_where("ca_key_missing")
def there_is_no_folder(host: Host) -> None:
    shutil.rmtree(host.key.parent)


@a_host_where("ca_key_not_a_regular_file")
def the_engine_made_a_folder_of_it(host: Host) -> None:
    host.key.unlink()
    host.key.mkdir()


@a_host_where("ca_key_not_a_regular_file")
def it_is_a_pipe_that_nobody_writes(host: Host) -> None:
    host.key.unlink()
    os.mkfifo(host.key, 0o400)


@a_host_where("ca_key_is_a_link")
def it_is_a_link(host: Host) -> None:
    host.key.rename(host.key.with_name("real"))
    host.key.symlink_to("real")


@a_host_where("ca_key_is_a_link")
def it_is_a_link_to_nothing(host: Host) -> None:
    host.key.unlink()
    host.key.symlink_to("nowhere")


@a_host_where("ca_key_parent_is_a_link")
def a_folder_above_it_is_a_link(host: Host) -> None:
    host.key.parent.rename(host.memory / "real")
    (host.memory / "safe-session").symlink_to("real")


@a_host_where("ca_key_has_links")
def it_has_two_names(host: Host) -> None:
    os.link(host.key, host.key.parent.with_name("other"))


@a_host_where("ca_key_owner_must_be_root:root")
def somebody_else_owns_it(host: Host) -> None:
    os.chown(host.key, 1001, 0)


@a_host_where("ca_key_owner_must_be_root:root")
def another_group_owns_it(host: Host) -> None:
    os.chown(host.key, 0, 1001)


@a_host_where("ca_key_mode_must_be_0400_or_0600")
def it_is_0500(host: Host) -> None:
    host.key.chmod(0o500)


@a_host_where("ca_key_mode_must_be_0400_or_0600")
def it_is_0700(host: Host) -> None:
    host.key.chmod(0o700)


@a_host_where("ca_key_mode_must_be_0400_or_0600")
def it_is_0200(host: Host) -> None:
    host.key.chmod(0o200)


@a_host_where("ca_key_mode_must_be_0400_or_0600")
def it_has_no_rights_at_all(host: Host) -> None:
    host.key.chmod(0)


@a_host_where("ca_key_mode_must_be_0400_or_0600")
def it_is_setuid(host: Host) -> None:
    host.key.chmod(0o4400)


@a_host_where("ca_key_mode_must_be_0400_or_0600")
def its_group_may_read_it(host: Host) -> None:
    host.key.chmod(0o440)


@a_host_where("ca_key_mode_must_be_0400_or_0600")
def everybody_may_read_it(host: Host) -> None:
    host.key.chmod(0o644)


@a_host_where("ca_key_has_acl")
def it_has_an_access_control_list(host: Host) -> None:
    if reason := missing.acl():
        pytest.skip(reason)
    # With an empty mask the mode still reads 0400.
    subprocess.run(["setfacl", "-m", "u:1001:r,m::-", host.key], check=True)


@a_host_where("ca_key_parent_owner_must_be_root")
def somebody_else_owns_a_folder_above_it(host: Host) -> None:
    os.chown(host.key.parent, 1001, 0)


@a_host_where("ca_key_parent_writable_by_others")
def a_group_may_write_in_a_folder_above_it(host: Host) -> None:
    host.key.parent.chmod(0o775)


@a_host_where("ca_key_parent_writable_by_others")
def it_lies_below_a_folder_like_tmp(host: Host) -> None:
    host.memory.chmod(0o1777)


@a_host_where("ca_key_parent_writable_by_others")
def an_access_control_list_lets_somebody_write_above_it(host: Host) -> None:
    if reason := missing.acl():
        pytest.skip(reason)
    subprocess.run(["setfacl", "-m", "u:1001:rwx", host.key.parent], check=True)


@a_host_where()
def only_its_public_half_lies_beside_it(host: Host) -> None:
    host.key.with_name("ca.pub").write_bytes(host.ca.public.read_bytes())


@a_host_where("ca_key_folder_holds_more")
def a_hidden_file_lies_beside_it(host: Host) -> None:
    host.key.with_name(".env").write_text("TOKEN=x\n")


@a_host_where("ca_key_folder_holds_more")
def another_folder_lies_beside_it(host: Host) -> None:
    host.key.with_name("vault").mkdir()


@a_host_where()
def compose_is_told_its_folder(host: Host) -> None:
    host.environ[FOLDER_VARIABLE] = str(host.key.parent)


@a_host_where("ca_key_folder_differs")
def compose_is_told_another_folder(host: Host) -> None:
    host.environ[FOLDER_VARIABLE] = str(host.memory)


@a_host_where("overlay_mount_target_differs")
def it_has_another_name_than_the_service_looks_for(host: Host) -> None:
    host.key.rename(host.key.with_name("key"))
    host.key = host.key.with_name("key")


@a_host_where("ca_key_on_disk")
def it_lies_on_a_disk(host: Host) -> None:
    _move_key(host, host.folder / "disk" / "ca")


@a_host_where("ca_key_in_git_work_tree")
def it_lies_in_a_work_tree(host: Host) -> None:
    subprocess.run(["git", "init", "--quiet", host.memory], check=True, env={**os.environ, "HOME": str(host.folder)})


@a_host_where("ca_key_in_git_work_tree")
def it_lies_in_a_linked_work_tree(host: Host) -> None:
    (host.memory / ".git").write_text("gitdir: /somewhere/else\n")


@a_host_where("ca_key_empty")
def it_is_empty(host: Host) -> None:
    host.put_key(b"")


@a_host_where("ca_key_too_large")
def it_is_one_byte_too_large(host: Host) -> None:
    key = host.key.read_bytes()
    host.put_key(key + b"\n" * (16 * 1024 + 1 - len(key)))


@a_host_where("ca_key_malformed")
def it_is_just_not_too_large(host: Host) -> None:
    key = host.key.read_bytes()
    host.put_key(key + b"\n" * (16 * 1024 - len(key)))


@a_host_where("ca_key_not_a_private_key")
def it_is_another_secret(host: Host) -> None:
    host.put_key(b"hunter2-hunter2-hunter2-hunter2-hunter2-hunter2\n")


@a_host_where("ca_key_not_a_private_key")
def it_is_the_public_half(host: Host) -> None:
    host.put_key(host.ca.public.read_bytes())


@a_host_where("ca_key_malformed")
def its_last_line_is_gone(host: Host) -> None:
    host.put_key(b"".join(host.key.read_bytes().splitlines(keepends=True)[:-2]))


@a_host_where("ca_key_not_a_private_key")
def it_is_a_key_of_the_old_form(host: Host) -> None:
    other = make_key(host.folder, "rsa3072", "old")
    subprocess.run(["ssh-keygen", "-q", "-p", "-m", "PEM", "-N", "", "-f", other.private], check=True)
    host.put_key(other.private.read_bytes())


@a_host_where("ca_key_has_passphrase")
def it_has_a_passphrase(host: Host) -> None:
    host.put_key(make_key(host.folder, "ed25519", "locked", passphrase="correct horse").private.read_bytes())


@a_host_where("ca_key_rsa_too_short", "sshd_does_not_trust_ca")
def it_is_a_short_rsa_key(host: Host) -> None:
    host.put_key(make_key(host.folder, "rsa2048").private.read_bytes())


@a_host_where("ca_key_kind_not_allowed", "sshd_does_not_trust_ca")
def it_is_a_dsa_key(host: Host) -> None:
    made = subprocess.run(
        ["ssh-keygen", "-q", "-t", "dsa", "-N", "", "-f", host.folder / "dsa"], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip("this ssh-keygen makes no DSA keys any more")
    host.put_key((host.folder / "dsa").read_bytes())


@a_host_where()
def it_is_pinned(host: Host) -> None:
    host.environ["SAFE_SESSION_CA_FINGERPRINT"] = host.ca.fingerprint


@a_host_where("ca_key_fingerprint_differs")
def another_key_is_pinned(host: Host) -> None:
    host.environ["SAFE_SESSION_CA_FINGERPRINT"] = f"SHA256:{'A' * 43}"


@a_host_where("ca_key_fingerprint_differs")
def the_pin_is_empty(host: Host) -> None:
    host.environ["SAFE_SESSION_CA_FINGERPRINT"] = ""


@a_host_where("ca_key_is_a_login_key")
def root_may_log_in_with_it(host: Host) -> None:
    host.authorize("root", host.ca.public_line)


@a_host_where("ca_key_is_a_login_key")
def somebody_may_log_in_with_it_by_an_older_file(host: Host) -> None:
    host.authorize("llmops", f'\tfrom="10.0.0.0/8",no-pty {host.ca.public_line}', "authorized_keys2")


@a_host_where("ca_key_is_a_login_key")
def somebody_may_log_in_with_it_where_sshd_config_says(host: Host) -> None:
    (host.folder / "keys").mkdir()
    (host.folder / "keys" / "llmops").write_text(f"{host.ca.public_line}\n")
    host.configure_sshd(f"AuthorizedKeysFile none {host.folder}/keys/%u")


@a_host_where()
def others_may_log_in_with_their_own_keys(host: Host) -> None:
    host.authorize("root", make_key(host.folder, "ed25519", "mine").public_line)
    host.authorize("root", f"# {host.ca.public_line}")


@a_host_where("ca_key_has_links", "ca_key_owner_must_be_root:root", "ca_key_mode_must_be_0400_or_0600",
              "ca_key_parent_writable_by_others", "ca_key_in_git_work_tree", "ca_key_on_disk",
              "ca_key_is_a_login_key")  # fmt: skip
def much_is_wrong_at_once(host: Host) -> None:
    _move_key(host, host.folder / "disk" / "ca")
    os.link(host.key, host.key.parent.with_name("other"))
    host.key.chmod(0o700)
    os.chown(host.key, 1001, 1001)
    host.key.parent.chmod(0o777)
    (host.folder / ".git").mkdir()
    host.authorize("root", host.ca.public_line)


@a_host_where("ca_key_has_links", "ca_key_empty")
def it_is_empty_under_two_names(host: Host) -> None:
    host.put_key(b"")
    os.link(host.key, host.key.parent.with_name("other"))


def _move_key(host: Host, path: Path) -> None:
    content = host.key.read_bytes()
    before = host.key
    path.parent.mkdir(exist_ok=True)
    host.key = path
    host.put_key(content)
    host.change("merged.yaml", str(before.parent), str(path.parent))


@pytest.mark.parametrize("name", FORMS)
def test_audit_4f10_a_key_file_has_one_verdict_everywhere(host: Host, name: str) -> None:
    code, change = FORMS[name]
    host.put_key(change(host.key.read_bytes()))
    assert host.run().codes("FAIL") == {code}
    with pytest.raises(BadKeyFile) as refused:
        load_ca_key(host.key, "root:root", None)
    assert refused.value.code == code


@pytest.mark.parametrize("name", TABLE)
def test_a_prepared_host_is_told_as_it_is(host: Host, name: str) -> None:
    expected, prepare = TABLE[name]
    prepare(host)
    told = host.run()
    assert told.codes("FAIL", "warn") == expected, told.stdout
    failed = told.codes("FAIL")
    assert told.returncode == (1 if failed else 0)
    assert told.summary.startswith("not ready: " if failed else "ready: ")
    assert all(line.next for line in told.lines if line.status == "FAIL")
    assert told.stderr == ""


@pytest.mark.parametrize(
    "name, skipped",
    [
        ("the_variable_is_not_set", NO_FILE | NO_MERGE | {"ca_key_present", "ca_key_no_link"}),
        ("the_path_is_relative", NO_FILE | NO_MERGE | {"ca_key_present", "ca_key_no_link"}),
        ("there_is_no_key", NO_FILE),
        ("it_is_a_pipe_that_nobody_writes", NO_FILE),
        ("it_is_a_link", NO_FILE | {"ca_key_present"}),
        ("it_is_empty", NO_CONTENT),
        ("it_is_one_byte_too_large", NO_CONTENT),
        ("everybody_may_read_it", NO_CONTENT),
        ("it_is_another_secret", NO_KEY),
        ("it_has_a_passphrase", NO_KEY),
        ("it_is_0700", set()),
        ("nothing_is_wrong", set()),
    ],
)
def test_what_cannot_be_checked_is_said_to_be_skipped(host: Host, name: str, skipped: set[str]) -> None:
    TABLE[name][1](host)
    assert host.run().codes("skip") == skipped


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa256", "ecdsa384", "ecdsa521", "rsa3072", "rsa4096"])
def test_every_kind_that_the_keeper_takes_is_taken(host: Host, keyring: KeyRing, kind: str) -> None:
    key = keyring(kind, "ca")
    host.put_key(key.private.read_bytes())
    (host.folder / "etc" / "ca.pub").write_text(key.public_line)
    told = host.run()
    assert told.codes("FAIL", "warn", "skip") == set(), told.stdout
    assert key.fingerprint in told.detail("ca_key_parses")


NAMES = [
    "two words",
    "a\nline\nend",
    "*",
    "?[a]",
    "-y",
    "--",
    "$HOME",
    "'\"`",
    "\\",
    "ü",
    "a:b",
    "\x1b[31m",
    "{a}",
    "~",
]


@pytest.mark.parametrize("name", NAMES)
def test_its_folder_may_have_any_name(host: Host, name: str) -> None:
    folder = host.memory / f"{name} folder"
    folder.mkdir()
    (host.memory / f"{name}2 folder").mkdir()  # a neighbour that a pattern might meet
    host.key.rename(folder / "ca")
    host.key = folder / "ca"
    quoted = "".join(f"\\U{ord(char):08X}" for char in str(folder))
    host.change("merged.yaml", str(host.memory / "safe-session"), f'"{quoted}"')
    told = host.run()
    assert told.codes("FAIL", "warn", "skip") == set(), told.stdout
    assert told.stdout.isascii()
    found = json.loads(host.run("--json").stdout)
    assert [check["detail"] for check in found["checks"]] == [line.detail for line in told.lines]


def test_a_name_that_is_no_text_is_no_obstacle(host: Host) -> None:
    target = Path(os.fsdecode(os.fsencode(host.memory) + b"/\xff\xfe"))
    host.key.parent.rename(target)
    host.environ[KEY_VARIABLE] = str(target / "ca")
    told = host.run()
    assert told.codes("FAIL") == {"overlay_mount_missing"}
    assert "\\377\\376" in told.detail("ca_key_path")


def test_a_passphrase_is_not_asked_for_even_at_a_terminal(host: Host) -> None:
    it_has_a_passphrase(host)
    done = subprocess.run(
        ["script", "-qec", " ".join(f"'{word}'" for word in host.command()), "/dev/null"],
        capture_output=True,
        env=host.environment() | {"SSH_ASKPASS": "/bin/false", "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"},
        timeout=60,
    )
    assert b"ca_key_has_passphrase" in done.stdout
    assert b"nter passphrase" not in done.stdout


def test_fingerprint_is_the_one_that_ssh_keygen_tells(host: Host) -> None:
    assert host.ca.fingerprint in host.run().detail("ca_key_fingerprint")


def test_the_comment_in_a_key_goes_nowhere(host: Host) -> None:
    assert "ca of the platform" in host.ca.public_line
    told = host.run()
    assert "ca of the platform" not in told.stdout
