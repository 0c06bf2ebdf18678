"""A change of the CA key: what the core, the reload at SIGHUP, the hand-over of the file and the bundle do."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from signer.authority.core import Core
from signer.ca.agent import CaAgent
from signer.ca.backends import AgentBackend, FileBackend, VaultBackend
from signer.ca.bundle import render_bundle, trusted_keys
from signer.ca.key import load_ca_key
from signer.errors import BadFile, Unavailable
from signer.model import CaKeys, PublicKey
from signer.service import key_channel
from signer.service.key_source import AgentSource, FileSource
from signer.service.reload import Reloaded, Reloader
from signer.settings import load_settings
from signer.ssh.certificate import decode_certificate
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import parse_public_key
from signer.ssh.signing import SigningKey
from tests.parts import builders, missing
from tests.parts.agents import FakeAgent
from tests.parts.builders import NOW, POLICY, Bench, PretendKey, policy, policy_text, public_key, public_line, rotations
from tests.parts.eventually import eventually
from tests.parts.fake_vault import ForeignCa
from tests.parts.keys import Key, KeyRing, make_key, ssh_keygen
from tests.parts.vault_episodes import backend

OWNER = f"{os.geteuid()}:{os.getegid()}"


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def ca_of(reply: object) -> bytes:
    return decode_certificate(builders.certificate_of(reply))[0].ca_key


def policy_with(pinned: str, next_line: str = "", *retired: str) -> str:
    """The standard policy with these keys, given as public lines."""
    lines = [f'fingerprint = "{parse_public_key(pinned).fingerprint}"', f'public_key = "{pinned}"']

    def table(line: str) -> str:
        return f'{{ fingerprint = "{parse_public_key(line).fingerprint}", public_key = "{line}" }}'

    if next_line:
        lines.append(f"next = {table(next_line)}")
    if retired:
        lines.append(f"retired = [{', '.join(map(table, retired))}]")
    return policy_text(POLICY.replace('fingerprint = "{ca}"', "\n".join(lines)))


# --- the core --------------------------------------------------------------------------------------------------------


def test_the_next_certificate_is_signed_with_the_new_key_and_serials_go_on_rising() -> None:
    bench, new = Bench(), PretendKey("new")
    before = bench.sign()
    assert bench.core.use_key(new) is None
    after = bench.sign()
    assert (ca_of(before), ca_of(after)) == (bench.key.blob, new.blob)
    assert (before["serial"], after["serial"]) == ("1", "2")
    assert (before["ca_fingerprint"], after["ca_fingerprint"]) == (bench.key.fingerprint, new.fingerprint)
    assert [body["ca"] for body in bench.store.bodies("certificate.issued")] == [
        bench.key.fingerprint,
        new.fingerprint,
    ]
    assert rotations(bench.store.bodies("ca.rotated")) == [{"from": bench.key.fingerprint, "to": new.fingerprint}]


@pytest.mark.parametrize("fail", ["before", "after", "read"])
def test_a_key_whose_coming_cannot_be_recorded_signs_nothing(fail: str) -> None:
    bench, new = Bench(), PretendKey("new")
    bench.store.fail = fail
    assert isinstance(bench.core.use_key(new), Unavailable)
    bench.store.fail = ""
    assert ca_of(bench.sign()) == bench.key.blob
    assert new.signed == []


def test_a_batch_that_is_being_signed_ends_with_the_key_it_began_with() -> None:
    bench, new = Bench(), PretendKey("new")
    replies = bench.core.run([builders.sign(), builders.sign()])
    first = next(replies)[1]
    bench.core.use_key(new)
    second = next(replies)[1]
    assert ca_of(first) == ca_of(second) == bench.key.blob
    assert new.signed == []
    assert len(bench.key.signed) == 2
    assert ca_of(bench.sign()) == new.blob


def test_serials_rise_over_a_restart_with_the_new_key_and_the_change_is_recorded() -> None:
    bench = Bench()
    bench.sign()
    former = bench.key
    bench.key = PretendKey("new")
    bench.restart()
    bench.restart()
    assert rotations(bench.store.bodies("ca.rotated")) == [{"from": former.fingerprint, "to": bench.key.fingerprint}]
    reply = bench.sign()
    assert (reply["serial"], ca_of(reply)) == ("2", bench.key.blob)


def test_a_policy_that_names_the_key_in_use_as_next_is_taken() -> None:
    bench = Bench()
    other = policy_with(public_line("ssh-ed25519", "other"), public_line("ssh-ed25519", "ca"))
    taken = policy(other)
    assert bench.core.use_policy(taken) is None
    assert bench.core.policy is taken


def test_a_policy_that_names_the_key_in_use_as_retired_is_refused() -> None:
    bench = Bench()
    with pytest.raises(BadFile, match="pins") as caught:
        bench.core.use_policy(
            policy(policy_with(public_line("ssh-ed25519", "other"), "", public_line("ssh-ed25519", "ca")))
        )
    assert caught.value.code == "policy_pins_another_key"
    assert bench.core.policy is bench.policy


# --- SIGHUP ----------------------------------------------------------------------------------------------------------


def reload(reloader: Reloader) -> Reloaded:
    """One reload, from SIGHUP to what is in force."""
    reloader.start()
    taken = eventually(reloader.collect, "policy and key were read")
    assert taken is not None
    assert not reloader.is_busy
    return taken


@dataclass
class Reload:
    """A core with a real key, its two files, and a reloader."""

    folder: Path
    old: Key
    new: Key
    channel: socket.socket | None = None

    def __post_init__(self) -> None:
        self.key_file, self.policy_file = self.folder / "ca", self.folder / "policy.toml"
        self.place(self.old)
        self.say(self.old)
        self.store = builders.MemoryStore()
        environ = {
            "SIGNER_POLICY_FILE": str(self.policy_file),
            "SIGNER_CA_KEY_FILE": str(self.key_file),
            "SIGNER_CA_KEY_OWNER": OWNER,
        }
        self.backend: FileBackend | VaultBackend = FileBackend(load_ca_key(self.key_file, OWNER))
        self.settings = load_settings(environ)
        self.core = Core(
            policy=policy(self.policy_file.read_text()),
            backend=self.backend,
            ledger=self.store,
            clock=lambda: NOW,
            random=os.urandom,
            report=lambda _fault: None,
        )
        self.core.begin({})
        self.reloader = Reloader(self.core, self.backend, self.settings, FileSource(self.settings, self.channel))

    def place(self, key: Key) -> None:
        """Renders a key, as `signer ca render` does: another file under the same name."""
        fresh = self.folder / ".ca"
        fresh.write_bytes(key.private.read_bytes())
        fresh.chmod(0o400)
        fresh.replace(self.key_file)

    def say(self, pinned: Key, following: Key | None = None, *retired: Key) -> None:
        """Writes policy.toml."""
        line = {key: " ".join(key.public_line.split()[:2]) for key in (pinned, following, *retired) if key}
        following_line = line[following] if following else ""
        self.policy_file.write_text(policy_with(line[pinned], following_line, *(line[key] for key in retired)))

    def run(self) -> tuple[bool, bool]:
        taken = reload(self.reloader)
        return taken.policy, taken.key

    def in_use(self) -> str:
        """The fingerprint of the key that signs, as its signature shows."""
        reply: Any = dict(self.core.run([builders.sign()]))[0]
        blob = ca_of(reply)
        return {self.old.blob: "old", self.new.blob: "new"}[blob]

    def codes(self, kind: str) -> list[str]:
        return [body["code"] for body in self.store.bodies(kind)]


@pytest.fixture
def world(tmp_path: Path, keyring: KeyRing) -> Reload:
    return Reload(tmp_path, keyring("ed25519", "ca"), keyring("ecdsa256", "new-ca"))


def test_the_next_key_is_taken_when_its_file_is_there(world: Reload) -> None:
    world.say(world.old, world.new)
    assert world.run() == (True, False)
    assert world.in_use() == "old"
    world.place(world.new)
    assert world.run() == (True, True)
    assert world.in_use() == "new"
    assert world.backend.public_key().fingerprint == world.new.fingerprint
    assert rotations(world.store.bodies("ca.rotated")) == [{"from": world.old.fingerprint, "to": world.new.fingerprint}]


def test_policy_and_key_may_change_together(world: Reload) -> None:
    world.say(world.new, None, world.old)
    world.place(world.new)
    assert world.run() == (True, True)
    assert world.in_use() == "new"


def test_the_way_back_is_the_same_way(world: Reload) -> None:
    world.say(world.old, world.new)
    world.place(world.new)
    world.run()
    world.place(world.old)
    assert world.run() == (True, True)
    assert world.in_use() == "old"


def test_a_file_with_the_key_in_use_is_nothing_new(world: Reload) -> None:
    world.place(world.old)
    assert world.run() == (True, False)
    assert "ca.rotated" not in world.store.kinds()


def test_a_key_that_no_policy_names_is_refused_and_the_policy_taken(world: Reload) -> None:
    world.place(world.new)
    assert world.run() == (True, False)
    assert world.in_use() == "old"
    assert world.codes("ca.refused") == ["ca_key_fingerprint_differs"]
    assert world.store.bodies("ca.refused")[0]["kept"] == world.old.fingerprint
    assert world.codes("policy.refused") == []


def test_a_retired_key_is_refused(world: Reload) -> None:
    world.say(world.old, None, world.new)
    world.place(world.new)
    assert world.run() == (True, False)
    assert world.codes("ca.refused") == ["ca_key_fingerprint_differs"]


def test_a_policy_whose_key_does_not_come_is_refused(world: Reload) -> None:
    world.say(world.new)
    assert world.run() == (False, False)
    assert world.in_use() == "old"
    assert world.codes("policy.refused") == ["policy_pins_another_key"]
    assert world.store.bodies("policy.refused")[0]["kept"] == world.core.policy.digest
    assert world.codes("ca.refused") == [], "the file still holds the key in use, which is no fault of the file"


def test_a_broken_policy_does_not_keep_a_next_key_from_coming(world: Reload) -> None:
    world.say(world.old, world.new)
    world.run()
    world.policy_file.write_text("nonsense")
    world.place(world.new)
    assert world.run() == (False, True)
    assert world.in_use() == "new"


def test_a_broken_policy_does_not_let_in_a_key_that_the_old_one_does_not_name(world: Reload) -> None:
    world.policy_file.write_text("nonsense")
    world.place(world.new)
    assert world.run() == (False, False)
    assert world.in_use() == "old"


def test_a_change_that_cannot_be_recorded_leaves_both_as_they_were(world: Reload) -> None:
    world.say(world.new, None, world.old)
    world.place(world.new)
    world.store.fail = "before"
    assert world.run() == (False, False)
    world.store.fail = ""
    assert world.in_use() == "old"
    assert world.run() == (True, True)
    assert world.in_use() == "new"


def _missing(world: Reload) -> None:
    world.key_file.unlink()


def _link(world: Reload) -> None:
    world.key_file.rename(world.folder / "real")
    world.key_file.symlink_to(world.folder / "real")


def _hard_links(world: Reload) -> None:
    (world.folder / "another").hardlink_to(world.key_file)


def _passphrase(world: Reload) -> None:
    world.place(make_key(world.folder, "ed25519", "locked", passphrase="correct horse"))


def _pipe(world: Reload) -> None:
    world.key_file.unlink()
    os.mkfifo(world.key_file, 0o400)


def _content(world: Reload, data: bytes) -> None:
    world.key_file.chmod(0o600)
    world.key_file.write_bytes(data)


FAULTS: dict[str, Callable[[Reload], None]] = {
    "ca_key_missing": _missing,
    "ca_key_is_a_link": _link,
    "ca_key_has_links": _hard_links,
    "ca_key_mode_must_be_0400_or_0600": lambda world: world.key_file.chmod(0o440),
    "ca_key_has_passphrase": _passphrase,
    "ca_key_not_a_regular_file": _pipe,
    "ca_key_empty": lambda world: _content(world, b""),
    "ca_key_not_a_private_key": lambda world: _content(world, b"x"),
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_of_the_file_leaves_the_key_in_use_and_is_recorded(
    world: Reload, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.say(world.old, world.new)
    world.place(world.new)
    FAULTS[code](world)
    assert world.run() == (True, False)
    assert world.in_use() == "old"
    assert world.codes("ca.refused") == [code]
    assert code in caplog.text
    assert str(world.folder) not in str(world.store.bodies("ca.refused")), "paths are nobody else's business"


def test_no_descriptor_stays_open_whatever_the_file_is(world: Reload) -> None:
    world.say(world.old, world.new)
    world.run()
    before = open_files()
    for spoil in FAULTS.values():
        world.key_file.unlink(missing_ok=True)
        (world.folder / "another").unlink(missing_ok=True)
        world.place(world.new)
        spoil(world)
        world.run()
    assert open_files() == before


def test_where_vault_signs_no_key_file_is_looked_at(world: Reload) -> None:
    world.reloader = Reloader(world.core, backend(), world.settings, None)
    world.key_file.unlink()
    assert world.run() == (True, False)
    assert "ca.refused" not in world.store.kinds()


# --- a keeper that may not open the file ------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = key_channel.make_channel()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.unix_socket
def test_the_file_comes_opened_and_unread(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    key_channel.hand_over(ends[0], path)
    path.unlink()
    descriptor = key_channel.take_over(ends[1])
    assert descriptor is not None
    assert not os.get_inheritable(descriptor)
    assert os.read(descriptor, 100) == b"content"
    os.close(descriptor)


@pytest.mark.unix_socket
def test_only_the_newest_of_several_hand_overs_counts(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    before = open_files()
    for text in ("first", "second", "third"):
        (tmp_path / text).write_text(text)
        key_channel.hand_over(ends[0], tmp_path / text)
    descriptor = key_channel.take_over(ends[1])
    assert descriptor is not None
    assert os.read(descriptor, 100) == b"third"
    os.close(descriptor)
    assert key_channel.take_over(ends[1]) is None
    assert open_files() == before


@pytest.mark.unix_socket
def test_why_the_file_could_not_be_opened_is_handed_over_too(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    key_channel.hand_over(ends[0], tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        key_channel.take_over(ends[1])
    (tmp_path / "link").symlink_to("/etc/passwd")
    key_channel.hand_over(ends[0], tmp_path / "link")
    with pytest.raises(OSError, match="symbolic links"):
        key_channel.take_over(ends[1])


@pytest.mark.unix_socket
def test_a_launcher_that_is_gone_hands_nothing_over(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].close()
    assert key_channel.take_over(ends[1]) is None


@pytest.mark.unix_socket
def test_a_keeper_takes_what_its_launcher_opened(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path, keyring: KeyRing
) -> None:
    world = Reload(tmp_path, keyring("ed25519", "ca"), keyring("ecdsa256", "new-ca"), ends[1])
    world.say(world.old, world.new)
    elsewhere = tmp_path / "new"
    elsewhere.write_bytes(world.new.private.read_bytes())
    elsewhere.chmod(0o400)
    key_channel.hand_over(ends[0], elsewhere)
    assert world.run() == (True, True)
    assert world.in_use() == "new"


@pytest.mark.unix_socket
def test_a_file_that_is_replaced_on_its_way_is_refused_for_what_it_is(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path, keyring: KeyRing
) -> None:
    world = Reload(tmp_path, keyring("ed25519", "ca"), keyring("ecdsa256", "new-ca"), ends[1])
    world.say(world.old, world.new)
    key_channel.hand_over(ends[0], world.key_file)
    world.place(world.new)
    assert world.run() == (True, False)
    assert world.codes("ca.refused") == ["ca_key_replaced"]
    key_channel.hand_over(ends[0], world.key_file)
    assert world.run() == (True, True)


@pytest.mark.unix_socket
def test_what_the_launcher_could_not_open_is_refused(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path, keyring: KeyRing
) -> None:
    world = Reload(tmp_path, keyring("ed25519", "ca"), keyring("ecdsa256", "new-ca"), ends[1])
    key_channel.hand_over(ends[0], tmp_path / "nothing")
    assert world.run() == (True, False)
    assert world.codes("ca.refused") == ["ca_key_missing"]


def forbid_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `path` were root's and we were not."""
    really = os.open

    def open_(name: Any, *rest: Any, **named: Any) -> int:
        if Path(name) == path:
            raise PermissionError(13, "Permission denied")
        return really(name, *rest, **named)

    monkeypatch.setattr(os, "open", open_)


def test_a_keeper_alone_that_may_not_open_the_file_says_how_to_bring_a_new_key(
    world: Reload, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forbid_opening(world.key_file, monkeypatch)
    assert world.run() == (True, False)
    assert "restart the keeper to take a new key" in caplog.text
    assert "ca.refused" not in world.store.kinds(), "nothing was refused, it was not looked at"


@pytest.mark.unix_socket
def test_a_signal_past_the_launcher_says_where_to_send_it(
    ends: tuple[socket.socket, socket.socket],
    tmp_path: Path,
    keyring: KeyRing,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = Reload(tmp_path, keyring("ed25519", "ca"), keyring("ecdsa256", "new-ca"), ends[1])
    forbid_opening(world.key_file, monkeypatch)
    assert world.run() == (True, False)
    assert "send SIGHUP to `signer serve`" in caplog.text


# --- a key in an ssh-agent --------------------------------------------------------------------------------------------


class AgentReload:
    """A core whose key is in a stand-in of an agent, and policy.toml beside it."""

    def __init__(self, folder: Path, fake: FakeAgent) -> None:
        self.fake = fake
        self.old, self.new = fake.ca, ForeignCa(name="new-ca")
        self.policy_file = folder / "policy.toml"
        self.say(self.old)
        agent = CaAgent(fake.socket)
        self.backend = AgentBackend(agent, agent.find_key(fingerprint_of(self.old.blob)))
        self.store = builders.MemoryStore()
        self.core = Core(
            policy=policy(self.policy_file.read_text()),
            backend=self.backend,
            ledger=self.store,
            clock=lambda: NOW,
            random=os.urandom,
            report=lambda _fault: None,
        )
        self.core.begin({})
        environ = {"SIGNER_POLICY_FILE": str(self.policy_file), "SIGNER_CA_KEY_SOURCE": "agent"}
        self.settings = load_settings(environ)
        self.reloader = Reloader(self.core, self.backend, self.settings, AgentSource(agent))

    def say(self, pinned: ForeignCa, following: ForeignCa | None = None, *retired: ForeignCa) -> None:
        self.policy_file.write_text(
            policy_with(pinned.line, following.line if following else "", *(key.line for key in retired))
        )

    def run(self) -> tuple[bool, bool]:
        taken = reload(self.reloader)
        return taken.policy, taken.key

    def in_use(self) -> str:
        return {self.old.blob: "old", self.new.blob: "new"}[self.backend.public_key().blob]

    def codes(self, kind: str) -> list[str]:
        return [body["code"] for body in self.store.bodies(kind)]


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[AgentReload]:
    with FakeAgent() as fake:
        yield AgentReload(tmp_path, fake)


@pytest.mark.unix_socket
def test_the_next_key_of_an_agent_is_taken_only_once_it_is_pinned(agents: AgentReload) -> None:
    agents.fake.held = [agents.old.blob, agents.new.blob]
    agents.say(agents.old, agents.new)
    assert agents.run() == (True, False)
    assert agents.in_use() == "old"
    agents.fake.ca = agents.new
    agents.say(agents.new, None, agents.old)
    assert agents.run() == (True, True)
    assert agents.in_use() == "new"
    changes = {"from": fingerprint_of(agents.old.blob), "to": fingerprint_of(agents.new.blob)}
    assert rotations(agents.store.bodies("ca.rotated")) == [changes]


@pytest.mark.unix_socket
def test_an_agent_is_not_asked_if_the_pin_is_the_same(agents: AgentReload) -> None:
    count = len(agents.fake.messages)
    agents.fake.reply = lambda _message: None
    assert agents.run() == (True, False)
    assert len(agents.fake.messages) == count
    assert "ca.refused" not in agents.store.kinds()


@pytest.mark.unix_socket
def test_a_pinned_key_that_the_agent_does_not_hold_or_sign_with_leaves_key_and_policy(agents: AgentReload) -> None:
    agents.say(agents.new)
    assert agents.run() == (False, False)
    agents.fake.held = [agents.new.blob]  # it signs with the old one all the same
    assert agents.run() == (False, False)
    assert agents.in_use() == "old"
    assert agents.codes("ca.refused") == ["ca_agent_key_missing", "ca_agent_wrong_signature"]
    assert agents.codes("policy.refused") == ["policy_pins_another_key"] * 2
    agents.fake.ca = agents.new
    assert agents.run() == (True, True)


@pytest.mark.unix_socket
def test_a_slow_agent_does_not_hold_up_the_one_who_reloads(agents: AgentReload) -> None:
    agents.fake.reply = lambda _message: b""
    agents.say(agents.new, agents.old)
    agents.reloader.start()
    assert agents.reloader.is_busy
    assert agents.reloader.collect() is None, "the call waited for the agent"
    taken = eventually(agents.reloader.collect, "it is given up")
    assert taken is not None
    assert (taken.policy, taken.key) == (True, False)
    assert (agents.in_use(), agents.codes("ca.refused")) == ("old", ["ca_agent_slow"])


@pytest.mark.unix_socket
def test_a_look_for_a_key_that_ends_in_a_fault_of_ours_is_a_refusal(agents: AgentReload) -> None:
    class Broken(AgentSource):
        def look_again(self, ca: CaKeys, in_use: PublicKey) -> SigningKey | None:
            raise RuntimeError("a fault of ours")

    source = Broken(CaAgent(agents.fake.socket))
    agents.reloader = Reloader(agents.core, agents.backend, agents.settings, source)
    agents.say(agents.new, agents.old)
    assert agents.run() == (True, False)
    assert agents.codes("ca.refused") == ["internal_error"]


# --- the bundle ------------------------------------------------------------------------------------------------------


def test_the_bundle_names_each_key_once_with_what_it_is() -> None:
    a, b, c, d = (public_key("ssh-ed25519", name) for name in "abcd")
    ca = CaKeys(a.fingerprint, a, b, (c, d))
    for in_use in (None, a, b):
        assert trusted_keys(ca, in_use) == [("current", a), ("next", b), ("retired", c), ("retired", d)]
    text = render_bundle(ca, a)
    assert text.splitlines()[1] == f"{public_line('ssh-ed25519', 'b')} signer-ca next {b.fingerprint}"
    assert text.endswith("\n")
    assert [base64.b64decode(line.split()[1]) for line in text.splitlines()] == [a.blob, b.blob, c.blob, d.blob]


def test_the_key_in_use_is_in_the_bundle_if_the_policy_pins_it_by_fingerprint_only() -> None:
    a, b = public_key("ssh-ed25519", "a"), public_key("ssh-ed25519", "b")
    assert trusted_keys(CaKeys(a.fingerprint, retired=(b,)), a) == [("current", a), ("retired", b)]


def test_the_key_of_vault_is_in_the_bundle_beside_those_of_the_policy() -> None:
    a, b, vault = (public_key("ssh-ed25519", name) for name in ("a", "b", "vault"))
    ca = CaKeys(a.fingerprint, a, b)
    assert trusted_keys(ca, vault) == [("vault", vault), ("current", a), ("next", b)]
    known = replace(ca, retired=(vault,))
    assert trusted_keys(known, vault) == [("current", a), ("next", b), ("retired", vault)]


def test_a_key_that_is_compared_is_in_the_bundle_even_if_the_policy_pins_it_by_fingerprint_only() -> None:
    a, b, vault = (public_key("ssh-ed25519", name) for name in ("a", "b", "vault"))
    assert trusted_keys(CaKeys(a.fingerprint), vault, a) == [("vault", vault), ("current", a)]
    assert trusted_keys(CaKeys(a.fingerprint, a, b), vault, b) == [("vault", vault), ("current", a), ("next", b)]
    assert trusted_keys(CaKeys(a.fingerprint), a, a) == [("current", a)], "Vault has our key"


@missing.needs_ssh_keygen
def test_ssh_keygen_reads_the_bundle(tmp_path: Path) -> None:
    a, b = public_key("ssh-ed25519", "a"), public_key("ecdsa-sha2-nistp256", "b")
    path = tmp_path / "bundle"
    path.write_text(render_bundle(CaKeys(a.fingerprint, a, b), a))
    listed = ssh_keygen("-l", "-f", path).splitlines()
    assert [line.split()[1] for line in listed] == [a.fingerprint, b.fingerprint]
    assert [" ".join(line.split()[2:4]) for line in listed] == ["signer-ca current", "signer-ca next"]
