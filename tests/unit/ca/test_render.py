"""Where a CA key may be written, what is mended in one that was fetched, and that its bytes stay in `KeyMaterial`."""

from __future__ import annotations

import base64
import contextlib
import copy
import fcntl
import os
import pickle
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_private_key
from hypothesis import given
from hypothesis import strategies as st

from signer.ca import render as module
from signer.ca.key import KeyMaterial, load_ca_key
from signer.ca.render import Rendered, create, file_system_of, render
from signer.cli.arguments import KEY_KINDS
from signer.errors import BadKeyFile, SignerError
from signer.files import lock, open_lock_of
from tests.parts import missing
from tests.parts.keys import CA_KINDS, Key, KeyRing, ssh_keygen
from tests.parts.memory import MEMORY, memory_folder

OWNER = f"{os.geteuid()}:{os.getegid()}"


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


@pytest.fixture
def key(keyring: KeyRing) -> Key:
    return keyring("ed25519", "ca")


def text_of(key: Key) -> str:
    return key.private.read_text()


def fetching(key: Key) -> Callable[[], KeyMaterial]:
    return lambda: KeyMaterial.repair(text_of(key), key.fingerprint)


def never() -> KeyMaterial:
    raise AssertionError("it went on although the target is refused")


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(SignerError) as caught:
        act()
    assert caught.value.hint
    return caught.value.code


def facts(path: Path) -> tuple[object, ...]:
    """All that would show a change: content, inode, mode, owner, links, times."""
    seen = path.lstat()
    return (path.read_bytes(), *(seen[:7]), seen.st_mtime_ns, seen.st_ctime_ns)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CA_KINDS)
def test_a_key_of_each_kind_is_written_so_that_the_keeper_takes_it(kind: str, folder: Path, keyring: KeyRing) -> None:
    key, target = keyring(kind, "ca"), folder / "ca"
    assert render(fetching(key), target) == Rendered("written", key.fingerprint, key.public_line.split()[0])
    assert target.read_text() == text_of(key)
    assert stat.S_IMODE(target.stat().st_mode) == 0o400
    assert load_ca_key(target, OWNER, key.fingerprint).fingerprint == key.fingerprint
    assert sorted(folder.iterdir()) == [target]


def test_mode_and_owner_do_not_depend_on_the_umask_or_the_directory(folder: Path, key: Key) -> None:
    if os.geteuid() == 0:
        os.chown(folder, 0, 65534)
    folder.chmod(0o2750)
    before = os.umask(0o777)
    try:
        render(fetching(key), folder / "ca")
    finally:
        os.umask(before)
    load_ca_key(folder / "ca", OWNER, key.fingerprint)
    assert stat.S_IMODE((folder / "ca").stat().st_mode) == 0o400


def test_the_same_key_is_left_as_it_is(folder: Path, key: Key) -> None:
    target = folder / "ca"
    render(fetching(key), target)
    before, folder_before = facts(target), folder.stat()
    assert render(fetching(key), target).result == "unchanged"
    assert facts(target) == before
    assert folder.stat().st_mtime_ns == folder_before.st_mtime_ns


def test_a_file_0600_is_as_good_as_one_0400(folder: Path, key: Key) -> None:
    target = folder / "ca"
    render(fetching(key), target)
    target.chmod(0o600)
    assert render(fetching(key), target).result == "unchanged"


def _other_content(target: Path) -> None:
    target.chmod(0o600)
    target.write_text("an older key\n")


def _longer_content(target: Path) -> None:
    target.chmod(0o600)
    target.write_text(target.read_text() + "\n")


def _other_mode(target: Path) -> None:
    target.chmod(0o440)


def _other_owner(target: Path) -> None:
    os.chown(target, 65534, -1)


def _other_group(target: Path) -> None:
    os.chown(target, -1, 65534)


def _second_link(target: Path) -> None:
    os.link(target, target.with_name("second"))


@pytest.mark.parametrize(
    "spoil, where",
    [
        (_other_content, "content"),
        (_longer_content, "content"),
        (_other_mode, "mode"),
        pytest.param(_other_owner, "owner", marks=missing.needs_root),
        pytest.param(_other_group, "owner", marks=missing.needs_root),
        (_second_link, "links"),
    ],
)
def test_what_differs_is_told_by_check_and_mended_by_render(
    spoil: Callable[[Path], None], where: str, folder: Path, key: Key
) -> None:
    target = folder / "ca"
    render(fetching(key), target)
    spoil(target)
    before = facts(target)
    checked = render(fetching(key), target, check=True)
    assert (checked.result, checked.differs_in) == ("differs", (where,))
    assert facts(target) == before
    assert render(fetching(key), target).result == "written"
    assert render(fetching(key), target, check=True).result == "agrees"
    load_ca_key(target, OWNER, key.fingerprint)


def test_check_of_a_file_that_is_not_there_makes_none(folder: Path, key: Key) -> None:
    assert render(fetching(key), folder / "ca", check=True).result == "missing"
    assert list(folder.iterdir()) == []


def test_a_fetch_that_fails_leaves_the_old_file(folder: Path, key: Key) -> None:
    target = folder / "ca"
    render(fetching(key), target)
    before = facts(target)
    assert code_of(lambda: render(lambda: KeyMaterial.repair("", "x"), target)) == "ca_key_empty"
    assert facts(target) == before


def test_a_leftover_is_removed_before_anything_else_even_if_nothing_can_be_fetched(folder: Path, key: Key) -> None:
    leftover = folder / ".ca.new"
    leftover.write_text("from before the power cut")
    code_of(lambda: render(lambda: KeyMaterial.repair("", "x"), folder / "ca"))
    assert list(folder.iterdir()) == []


def test_a_leftover_that_cannot_be_removed_is_told(folder: Path, key: Key) -> None:
    (folder / ".ca.new").mkdir()
    assert code_of(lambda: render(fetching(key), folder / "ca")) == "leftover_stays"
    assert not (folder / "ca").exists()


def test_check_leaves_a_leftover(folder: Path, key: Key) -> None:
    (folder / ".ca.new").write_text("from before the power cut")
    render(fetching(key), folder / "ca", check=True)
    assert (folder / ".ca.new").exists()


def test_a_leftover_that_is_a_link_does_not_lead_anywhere(folder: Path, key: Key) -> None:
    (folder / "other").write_text("other")
    (folder / ".ca.new").symlink_to("other")
    assert render(fetching(key), folder / "ca").result == "written"
    assert (folder / "other").read_text() == "other"
    assert not (folder / "ca").is_symlink()
    assert not os.path.lexists(folder / ".ca.new")


def test_it_waits_for_another_renderer_and_says_so_in_the_end(
    folder: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_FOR_ANOTHER", 0.1)
    other = open_lock_of(folder)
    try:
        assert lock(other)
        assert code_of(lambda: render(fetching(key), folder / "ca")) == "target_busy"
        assert render(fetching(key), folder / "ca", check=True).result == "missing"
    finally:
        os.close(other)
    assert render(fetching(key), folder / "ca").result == "written"


def test_audit_3d3_a_lock_on_the_directory_that_anybody_may_take_stops_no_renderer(
    folder: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_FOR_ANOTHER", 0.1)
    folder.chmod(0o755)
    other = os.open(folder, os.O_RDONLY)  # as any user may
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert render(fetching(key), folder / "ca").result == "written"
    finally:
        os.close(other)


# --- targets ---------------------------------------------------------------------------------------------------------


def refused(target: Path, *, allow_disk: bool = False) -> str:
    """The code; nothing is fetched for a target that is refused, with or without --check."""
    code = code_of(lambda: render(never, target, allow_disk=allow_disk))
    assert code_of(lambda: render(never, target, check=True, allow_disk=allow_disk)) == code
    return code


def test_a_target_must_be_absolute() -> None:
    assert refused(Path("ca")) == "target_not_absolute"
    assert refused(MEMORY / "x" / ".." / "ca") == "target_not_absolute"


def test_a_target_that_is_a_link_is_refused(folder: Path) -> None:
    (folder / "real").write_text("")
    (folder / "ca").symlink_to("real")
    (folder / "dangling").symlink_to("nothing")
    assert refused(folder / "ca") == "target_is_a_link"
    assert refused(folder / "dangling") == "target_is_a_link"


def test_a_target_behind_a_link_is_refused(folder: Path) -> None:
    (folder / "real" / "deep").mkdir(parents=True)
    (folder / "link").symlink_to("real")
    assert refused(folder / "link" / "ca") == "target_is_a_link"
    assert refused(folder / "link" / "deep" / "ca") == "target_is_a_link"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777, 0o720, 0o702])
def test_a_target_where_others_may_write_is_refused(mode: int, folder: Path) -> None:
    folder.chmod(mode)
    assert refused(folder / "ca") == "target_directory_not_private"


def test_a_target_below_a_directory_where_others_may_write_is_refused(folder: Path) -> None:
    (folder / "deep" / "deeper").mkdir(parents=True)
    folder.chmod(0o777)
    assert refused(folder / "deep" / "deeper" / "ca") == "target_directory_not_private"


@missing.needs_root
def test_a_target_below_somebody_elses_directory_is_refused(folder: Path) -> None:
    (folder / "deep").mkdir()
    os.chown(folder, 65534, 65534)
    assert refused(folder / "deep" / "ca") == "target_directory_not_private"


@missing.needs_acl
def test_a_list_that_lets_others_write_is_seen(tmp_path: Path) -> None:
    done = subprocess.run(["setfacl", "-m", "u:daemon:rwx", tmp_path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no access control lists on this file system")
    assert refused(tmp_path / "ca", allow_disk=True) == "target_directory_not_private"


@pytest.mark.parametrize("form", ["directory", "file", "dangling link"])
def test_a_target_in_a_git_work_tree_is_refused(form: str, folder: Path) -> None:
    match form:
        case "directory":
            (folder / ".git").mkdir()
        case "file":  # of a linked work tree, or a submodule
            (folder / ".git").write_text("gitdir: /elsewhere")
        case _:
            (folder / ".git").symlink_to("/not/mounted/now")
    (folder / "deep").mkdir()
    assert refused(folder / "ca") == "target_in_git_work_tree"
    assert refused(folder / "deep" / "ca", allow_disk=True) == "target_in_git_work_tree"


def test_a_target_that_is_no_regular_file_is_refused(folder: Path) -> None:
    (folder / "directory").mkdir()
    os.mkfifo(folder / "pipe")
    assert refused(folder / "directory") == "target_not_a_regular_file"
    assert refused(folder / "pipe") == "target_not_a_regular_file"


def test_a_target_without_a_directory_is_refused(folder: Path) -> None:
    (folder / "file").write_text("")
    assert refused(folder / "none" / "ca") == "target_directory_unusable"
    assert refused(folder / "file" / "ca") == "target_directory_unusable"


def test_a_target_on_a_disk_is_refused_unless_it_is_allowed(
    folder: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "file_system_of", lambda _folder: "ext4")
    assert refused(folder / "ca") == "target_on_disk"
    assert render(fetching(key), folder / "ca", allow_disk=True).result == "written"


def test_the_kind_of_a_file_system_is_the_kernels_word(folder: Path) -> None:
    assert file_system_of(folder) == "tmpfs"
    assert file_system_of(Path("/proc")) == "proc"
    assert file_system_of(Path(__file__).parent) not in ("tmpfs", "ramfs", "?")


# --- ca new ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_a_new_key_is_one_that_ssh_keygen_and_the_keeper_take(kind: str, folder: Path) -> None:
    key = create(folder / "ca", lambda: KeyMaterial.generate(kind))
    assert ssh_keygen("-y", "-P", "", "-f", folder / "ca").split()[:2] == key.public_line.split()
    assert load_ca_key(folder / "ca", OWNER, key.fingerprint).kind == key.kind
    assert stat.S_IMODE((folder / "ca").stat().st_mode) == 0o400
    assert [path.name for path in folder.iterdir()] == ["ca"]


def test_a_new_key_may_lie_in_a_directory_where_others_can_only_add(folder: Path) -> None:
    folder.chmod(0o1777)
    create(folder / "ca", lambda: KeyMaterial.generate("ed25519"))
    assert (folder / "ca").exists()


def test_a_new_key_is_not_made_where_others_may_write(folder: Path) -> None:
    folder.chmod(0o777)
    assert code_of(lambda: create(folder / "ca", never)) == "target_directory_not_private"


def test_a_new_key_replaces_nothing(folder: Path) -> None:
    (folder / "ca").write_text("here already")
    before = facts(folder / "ca")
    assert code_of(lambda: create(folder / "ca", never)) == "target_exists"
    assert facts(folder / "ca") == before


def test_a_file_that_comes_meanwhile_is_not_replaced(folder: Path) -> None:
    def slowly() -> KeyMaterial:
        (folder / "ca").write_text("somebody was faster")
        return KeyMaterial.generate("ed25519")

    assert code_of(lambda: create(folder / "ca", slowly)) == "target_exists"
    assert (folder / "ca").read_text() == "somebody was faster"
    assert [path.name for path in folder.iterdir()] == ["ca"]


# --- what a secret store does to a key -------------------------------------------------------------------------------


MENDED: dict[str, Callable[[str], str]] = {
    "as it was": lambda text: text,
    "lost final newline": lambda text: text.rstrip("\n"),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CR alone": lambda text: text.replace("\n", "\r"),
    "CRLF, last one lost": lambda text: text.replace("\n", "\r\n").rstrip("\r\n"),
    "blanks before": lambda text: f" \t{text}",
    "blanks after": lambda text: f"{text} \t ",
    "blank lines around": lambda text: f"\n\r\n{text}\n\n",
    "blank lines inside": lambda text: text.replace("\n", "\n\n"),
    "indented": lambda text: "".join(f"    {line}\n" for line in text.splitlines()),
    "blanks at the ends of lines": lambda text: text.replace("\n", "  \n"),
}
# Once one sentence for all of these, and wrong for some.
PROVED_BY_THE_PIN: dict[str, Callable[[str], str]] = {
    "no line breaks": lambda text: text.replace("\n", " "),
    "line breaks written out": lambda text: text.replace("\n", "\\n"),
    "line breaks written out twice": lambda text: text.replace("\n", "\\\\n"),
    "line breaks of Windows written out": lambda text: text.replace("\n", "\\r\\n"),
    "line breaks gone": lambda text: text.replace("\n", ""),
    "in quotes": lambda text: f'"{text}"',
    "in single quotes, on one line": lambda text: "'" + text.replace("\n", "\\n") + "'",
    "in JSON": lambda text: '{"key": "' + text + '"}',
    "in JSON as PHP writes it": lambda text: '{"key": "' + text.replace("\n", "\\n").replace("/", "\\/") + '"}',
    "in HTML": lambda text: text.replace("\n", "<br>"),
    "as numbers of HTML": lambda text: text.replace("\n", "&#10;"),
    "each line in quotes": lambda text: "".join(f'"{line}\\n" \\\n' for line in text.splitlines()),
    "a line before": lambda text: f"the CA key:\n{text}",
    "a line after": lambda text: f"{text}of rs2000\n",
    "a comment inside": lambda text: text.replace("\n", "\n# comment\n", 1),
    "a byte order mark": lambda text: f"\ufeff{text}",
    "a no-break space": lambda text: f"\u00a0{text}",
    "no-break spaces for blanks": lambda text: text.replace(" ", "\u00a0"),
    "dashes of a word processor": lambda text: text.replace("-----", "\u2014\u2014-"),
    "too few dashes": lambda text: text.replace("-----", "----"),
    "a NUL": lambda text: text + "\0",
    "first line lost": lambda text: text.split("\n", 1)[1],
    "last line lost": lambda text: text.rstrip("\n").rsplit("\n", 1)[0],
    "both lost": lambda text: "\n".join(text.splitlines()[1:-1]),
    "base64 of the file": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of the file in lines": lambda text: base64.encodebytes(text.encode()).decode(),
}
NAMED: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "twice": ("ca_key_several", "contains 2 private keys", lambda text: text + text),
    "a line lost": (
        "ca_key_not_a_private_key", "is damaged",
        lambda text: "\n".join(text.split("\n")[:2] + text.split("\n")[3:]),
    ),
    "cut in the middle": ("ca_key_not_a_private_key", "is damaged", lambda text: text[: len(text) // 2 // 4 * 4 + 2]),
    "nothing but its first line": ("ca_key_not_a_private_key", "is cut off", lambda text: text.split("\n")[0]),
    "nothing between the lines": (
        "ca_key_not_a_private_key", "is damaged", lambda text: text.split("\n")[0] + "\n" + text.split("\n")[-2],
    ),
    "lower case": ("ca_key_not_a_private_key", "have lost their case", str.lower),
    "a public half": (
        "ca_key_not_a_private_key", "is a public key", lambda _: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA== ca",
    ),
    "a public half in PEM": (
        "ca_key_not_a_private_key", "is a public key", lambda _: "-----BEGIN PUBLIC KEY-----\nMCow\n-----END",
    ),
    "a certificate": (
        "ca_key_not_a_private_key", "is of type certificate", lambda _: "-----BEGIN CERTIFICATE-----\nMIIB\n",
    ),
    "a path": ("ca_key_not_a_private_key", "is a path", lambda _: "/run/signer-ca/ca"),
    "a reference": ("ca_key_not_a_private_key", "was not resolved", lambda _: "${prod.ca.SSH_CA_KEY}"),
    "a key of PuTTY": (
        "ca_key_not_a_private_key", "is a key of PuTTY", lambda _: "PuTTY-User-Key-File-3: ssh-ed25519\n",
    ),
    "another secret": (
        "ca_key_not_a_private_key", "is not an OpenSSH private key", lambda _: "correct horse battery staple",
    ),
    "an encrypted key in PEM": (
        "ca_key_has_passphrase", "has a passphrase",
        lambda _: "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIGb\n-----END ENCRYPTED PRIVATE KEY-----\n",
    ),
    "an encrypted key of the old form": (
        "ca_key_has_passphrase", "has a passphrase",
        lambda _: "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\nMIGb\n-----END RSA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
@pytest.mark.parametrize("kind", ["ed25519", "rsa3072"])
def test_what_secret_stores_do_to_a_key_is_mended(name: str, kind: str, keyring: KeyRing, folder: Path) -> None:
    key = keyring(kind, "ca")
    spoiled = MENDED[name](text_of(key))
    render(lambda: KeyMaterial.repair(spoiled, key.fingerprint), folder / "ca")
    assert (folder / "ca").read_text() == text_of(key)


@pytest.mark.parametrize("name", PROVED_BY_THE_PIN)
@pytest.mark.parametrize("kind", ["ed25519", "rsa3072"])
def test_audit_5f14_what_the_pin_proves_right_is_mended(name: str, kind: str, keyring: KeyRing, folder: Path) -> None:
    key, other = keyring(kind, "ca"), keyring("ed25519", "other")
    spoiled = PROVED_BY_THE_PIN[name](text_of(key))
    render(lambda: KeyMaterial.repair(spoiled, key.fingerprint), folder / "ca")
    assert (folder / "ca").read_text() == text_of(key)
    assert code_of(lambda: KeyMaterial.repair(spoiled, other.fingerprint)) == "ca_key_fingerprint_differs"


@pytest.mark.parametrize("name", NAMED)
def test_audit_5f14_all_else_is_called_what_it_is_and_not_shown(name: str, key: Key) -> None:
    code, words, spoil = NAMED[name]
    spoiled = spoil(text_of(key))
    with pytest.raises(BadKeyFile) as caught:
        KeyMaterial.repair(spoiled, key.fingerprint)
    assert (caught.value.code, words in caught.value.text) == (code, True), caught.value.text
    told = f"{caught.value!r} {caught.value} {caught.value.hint}"
    assert not [line for line in spoiled.split() if len(line) > 12 and line in told]


@pytest.mark.parametrize(
    "kind, form", [("ecdsa256", "TraditionalOpenSSL"), ("rsa3072", "TraditionalOpenSSL"), ("ed25519", "PKCS8"),
                   ("ecdsa384", "PKCS8"), ("rsa3072", "PKCS8")],
)  # fmt: skip
def test_audit_5f14_older_forms_become_openssh_s_and_always_the_same_bytes(
    kind: str, form: str, keyring: KeyRing, folder: Path
) -> None:
    key = keyring(kind, "ca")
    loaded = load_ssh_private_key(key.private.read_bytes(), password=None)
    text = loaded.private_bytes(Encoding.PEM, getattr(PrivateFormat, form), NoEncryption()).decode()
    for spoiled in (text, text.replace("\n", "\\n"), text.replace("\n", "\r\n")):
        render(partial(KeyMaterial.repair, spoiled, key.fingerprint), folder / "ca")
        assert load_ca_key(folder / "ca", OWNER, key.fingerprint).fingerprint == key.fingerprint
        assert ssh_keygen("-y", "-P", "", "-f", folder / "ca").split()[:2] == key.public_line.split()[:2]
    assert render(lambda: KeyMaterial.repair(text, key.fingerprint), folder / "ca").result == "unchanged"


def test_audit_5f14_the_time_of_a_hostile_secret_grows_with_its_length() -> None:
    def cost(text: str) -> float:
        taken = []
        for _ in range(5):
            began = time.thread_time()
            with pytest.raises(BadKeyFile):
                KeyMaterial.repair(text, "SHA256:x")
            taken.append(time.thread_time() - began)
        return min(taken)

    for piece in ("-", "\\", "BEGIN ", "-----BEGIN A", "<br ", "# \n", "A", "\\n", "BEGIN PRIVATE KEY"):
        short = cost(piece * (8_000 // len(piece)))
        # Eight times the length: linear is 8, quadratic 64, and the bound lies between, by ratio.
        assert cost(piece * (64_000 // len(piece))) < max(8**1.5 * short, 0.02), piece


@pytest.mark.parametrize("text", ["", " ", "\r\n\t\n"])
def test_an_empty_secret_has_its_own_code(text: str) -> None:
    assert code_of(lambda: KeyMaterial.repair(text, "x")) == "ca_key_empty"


def test_a_huge_secret_has_its_own_code(key: Key) -> None:
    first, *rest = text_of(key).splitlines()
    huge = "\n".join([first, *["A" * 70] * 300, *rest])
    assert code_of(lambda: KeyMaterial.repair(huge, key.fingerprint)) == "ca_key_too_large"


def test_a_key_with_a_passphrase_has_its_own_code(new_key: Callable[..., Key]) -> None:
    key = new_key("ed25519", "locked", passphrase="open sesame")
    assert code_of(lambda: KeyMaterial.repair(text_of(key), key.fingerprint)) == "ca_key_has_passphrase"


def test_a_short_rsa_key_has_its_own_code(keyring: KeyRing) -> None:
    key = keyring("rsa2048")
    assert code_of(lambda: KeyMaterial.repair(text_of(key), key.fingerprint)) == "ca_key_rsa_too_short"


def test_another_key_than_the_pinned_one_has_its_own_code(key: Key, keyring: KeyRing) -> None:
    other = keyring("ed25519", "other")
    with pytest.raises(BadKeyFile) as caught:
        KeyMaterial.repair(text_of(other), key.fingerprint)
    assert caught.value.code == "ca_key_fingerprint_differs"
    assert key.fingerprint in caught.value.text
    assert other.fingerprint in caught.value.text


@given(data=st.data())
def test_a_key_with_changed_bytes_is_the_same_key_or_none(data: st.DataObject, keyring: KeyRing) -> None:
    key = keyring(data.draw(st.sampled_from(["ed25519", "ecdsa256"])), "ca")
    lines = text_of(key).splitlines()
    body = bytearray(base64.b64decode("".join(lines[1:-1])))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    changed = "\n".join([lines[0], base64.b64encode(bytes(body)).decode(), lines[-1]])
    with contextlib.suppress(BadKeyFile):
        assert KeyMaterial.repair(changed, key.fingerprint).fingerprint == key.fingerprint


@given(text=st.text(max_size=200))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(BadKeyFile):
        KeyMaterial.repair(text, "SHA256:x")


# --- the bytes stay inside -------------------------------------------------------------------------------------------


def test_a_key_does_not_show_itself(key: Key) -> None:
    material = KeyMaterial.repair(text_of(key), key.fingerprint)
    told = f"{material} {material!r} {[material]} {material.public_line} {material.fingerprint} {material.kind}"
    assert not [line for line in text_of(key).splitlines() if line in told]


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_is_not_copied_or_serialised(copying: Callable[[object], object], key: Key) -> None:
    with pytest.raises(TypeError, match="never serialised"):
        copying(KeyMaterial.repair(text_of(key), key.fingerprint))
