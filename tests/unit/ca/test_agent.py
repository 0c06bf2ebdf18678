"""The CA key in an ssh-agent: found by its fingerprint alone, its signatures verified, every wrong agent refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.ca import agent as ca_agent
from signer.ca.agent import MAX_SIGNATURE_REPLY, AgentKey, CaAgent
from signer.errors import BadFormat, BadKeyFile, SignerError
from signer.ssh.agent import read_identities, read_signature
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import parse_public_key
from signer.ssh.signature import check_signature
from signer.ssh.wire import Reader, string, uint32
from tests.parts import builders, missing
from tests.parts.agents import Agent, FakeAgent, data_of
from tests.parts.eventually import eventually
from tests.parts.fake_vault import ForeignCa
from tests.parts.keys import KeyRing

pytestmark = pytest.mark.unix_socket

DATA = b"what is signed"
RSA_SHA2_512 = uint32(4)


@pytest.fixture
def fake() -> Iterator[FakeAgent]:
    with FakeAgent() as agent:
        yield agent


def impatient(call: Callable[[], object]) -> str:
    """The code of the error of a call that gives up soon; others have time to be answered on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ca_agent, "ANSWERS_WITHIN", 0.3)
        return code(call)


def key_of(fake: FakeAgent) -> AgentKey:
    """The stand-in's key, found while it was honest."""
    honest, fake.reply = fake.reply, fake.honest
    key = CaAgent(fake.socket).find_key(fingerprint_of(fake.ca.blob))
    fake.reply = honest
    return key


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def code(call: Callable[[], object]) -> str:
    with pytest.raises(SignerError) as caught:
        call()
    return caught.value.code


# --- a real agent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, algorithm", [
    ("ed25519", "ssh-ed25519"), ("ecdsa256", "ecdsa-sha2-nistp256"), ("ecdsa521", "ecdsa-sha2-nistp521"),
    ("rsa3072", "rsa-sha2-512"),
])  # fmt: skip
@missing.needs_ssh_keygen
def test_a_key_in_a_real_agent_signs(keyring: KeyRing, kind: str, algorithm: str) -> None:
    ca = keyring(kind, "ca")
    with Agent() as real:
        real.add(keyring("ed25519", "another"), ca)
        key = CaAgent(real.socket).find_key(ca.fingerprint)
        assert (key.blob, key.fingerprint, key.public.fingerprint) == (ca.blob, ca.fingerprint, ca.fingerprint)
        signature = key.sign(DATA)
    assert Reader(signature).text() == algorithm
    check_signature(ca.blob, DATA, signature)


@missing.needs_ssh_keygen
def test_a_key_that_a_real_agent_does_not_hold_is_missing(keyring: KeyRing, tmp_path: Path) -> None:
    ca = keyring("ed25519", "ca")
    with Agent() as real:
        agent = CaAgent(real.socket)
        assert code(lambda: agent.find_key(ca.fingerprint)) == "ca_agent_key_missing", "it is empty"
        real.add(ca)
        key = agent.find_key(ca.fingerprint)
        real.remove(ca)
        assert code(lambda: key.sign(DATA)) == "ca_agent_refused"
        real.add(ca)
        ask = tmp_path / "ask"
        ask.write_text("#!/bin/sh\necho a passphrase\n")
        ask.chmod(0o700)
        locked = real.ssh_add("-x", env={"SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"})
        assert locked.returncode == 0, locked.stderr
        assert code(lambda: agent.find_key(ca.fingerprint)) == "ca_agent_key_missing", "it is locked"


@missing.needs_ssh_keygen
def test_an_agent_that_dies_hangs_and_comes_back(keyring: KeyRing) -> None:
    ca = keyring("ed25519", "ca")
    with Agent() as real:
        real.add(ca)
        key = CaAgent(real.socket).find_key(ca.fingerprint)
        real.hang()
        assert impatient(lambda: key.sign(DATA)) == "ca_agent_slow"
        real.go_on()
        check_signature(ca.blob, DATA, key.sign(DATA))
        real.kill()
        assert code(lambda: key.sign(DATA)) == "ca_agent_down"
        real.start()
        real.add(ca)
        check_signature(ca.blob, DATA, key.sign(DATA))


def test_where_nothing_listens_the_agent_is_down(tmp_path: Path) -> None:
    assert code(CaAgent(tmp_path / "nothing").identities) == "ca_agent_down"


# --- whose it is -----------------------------------------------------------------------------------------------------

_LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
while True:
    connection, _ = listener.accept()
    print(len(connection.recv(100)), flush=True)
    connection.close()
"""


@missing.needs_root
def test_an_agent_of_another_user_is_told_nothing() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        path = Path(folder) / "s"
        foreign = subprocess.Popen(
            [sys.executable, "-c", _LISTEN, str(path)], user="nobody", stdout=subprocess.PIPE, text=True
        )
        assert foreign.stdout is not None
        try:
            foreign.stdout.readline()
            assert code(CaAgent(path).identities) == "ca_agent_not_trusted"
            assert foreign.stdout.readline() == "0\n", "it was sent something"
            nobody = int(subprocess.run(["id", "-u", "nobody"], capture_output=True, text=True).stdout)
            assert code(CaAgent(path, nobody).identities) == "ca_agent_down", "its own user may have such an agent"
        finally:
            foreign.kill()
            foreign.wait()
            foreign.stdout.close()


def test_an_agent_of_root_serves_every_keeper(fake: FakeAgent) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root")
    assert CaAgent(fake.socket, owner=12_345).identities() == [fake.ca.blob]


# --- wrong agents ----------------------------------------------------------------------------------------------------


def test_the_stand_in_is_good_as_long_as_it_is_honest(fake: FakeAgent) -> None:
    check_signature(fake.ca.blob, DATA, key_of(fake).sign(DATA))


def test_a_signature_of_another_key_is_refused(fake: FakeAgent) -> None:
    key, other = key_of(fake), ForeignCa(name="mallory")
    fake.reply = lambda message: b"\x0e" + string(other.sign(data_of(message)))
    assert code(lambda: key.sign(DATA)) == "ca_agent_wrong_signature"


def test_a_signature_over_other_data_is_refused(fake: FakeAgent) -> None:
    key = key_of(fake)
    fake.reply = lambda message: b"\x0e" + string(fake.ca.sign(data_of(message) + b"."))
    assert code(lambda: key.sign(DATA)) == "ca_agent_wrong_signature"


def test_an_rsa_key_is_asked_for_sha512_and_taken_at_nothing_less() -> None:
    with FakeAgent("ssh-rsa") as fake:
        key = key_of(fake)
        check_signature(fake.ca.blob, DATA, key.sign(DATA))
        assert fake.messages[-1].endswith(RSA_SHA2_512)
        for algorithm in ("rsa-sha2-256", "ssh-rsa"):
            fake.ca.algorithm = algorithm
            assert code(lambda: key.sign(DATA)) == "ca_agent_wrong_signature", algorithm


def test_a_key_of_another_kind_is_asked_without_flags(fake: FakeAgent) -> None:
    key_of(fake).sign(DATA)
    assert fake.messages[-1].endswith(string(DATA) + uint32(0))


@pytest.mark.parametrize("body", [
    b"\x0e", b"\x06", b"\x0c\0\0\0\0", b"\x0e\xff\xff\xff\xff", b"\x0e\0\0\0\1x\0", b"garbage", b"\x1c",
    b"\x0e" + string(b"x" * MAX_SIGNATURE_REPLY),
])  # fmt: skip
def test_garbage_instead_of_a_signature_is_malformed(fake: FakeAgent, body: bytes) -> None:
    key = key_of(fake)
    fake.reply = lambda _message: body
    assert code(lambda: key.sign(DATA)) == "ca_agent_malformed"


@pytest.mark.parametrize("body", [
    b"\x05", b"\x06", b"\x0c", b"\x0c\0\0\0\1", b"\x0c\xff\xff\xff\xff", b"\x0c\0\0\0\0\0",
    b"\x0e" + string(b"x"), b"\x0c" + uint32(1) + string(b"key"),
])  # fmt: skip
def test_garbage_instead_of_a_list_is_malformed(fake: FakeAgent, body: bytes) -> None:
    fake.reply = lambda _message: body
    assert code(CaAgent(fake.socket).identities) == "ca_agent_malformed"


@pytest.mark.parametrize("blob", [b"", b"x", string(b"ssh-ed25519") + string(b"short"), string(b"\xff")])
def test_a_listed_key_that_is_none_is_malformed(fake: FakeAgent, blob: bytes) -> None:
    fake.held = [blob, fake.ca.blob]
    agent = CaAgent(fake.socket)
    assert code(lambda: agent.find_key(fingerprint_of(blob))) == "ca_agent_malformed"
    assert agent.find_key(fingerprint_of(fake.ca.blob)).blob == fake.ca.blob, "another one is nobody's business"


@pytest.mark.parametrize("kind, refused", [
    ("sk-ssh-ed25519@openssh.com", "ca_key_kind_not_allowed"), ("ssh-rsa/2048", "ca_key_rsa_too_short"),
])  # fmt: skip
def test_a_key_that_may_be_no_ca_key_is_refused_before_it_signs(fake: FakeAgent, kind: str, refused: str) -> None:
    public = builders.public_key(kind)
    fake.held = [public.blob]
    with pytest.raises(BadKeyFile) as caught:
        CaAgent(fake.socket).find_key(public.fingerprint)
    assert caught.value.code == refused
    assert [message[0] for message in fake.messages] == [11]


def test_a_key_that_does_not_sign_is_not_found(fake: FakeAgent) -> None:
    fake.ca = ForeignCa(name="mallory")
    assert code(lambda: CaAgent(fake.socket).find_key(fingerprint_of(fake.held[0]))) == "ca_agent_wrong_signature"


def test_one_that_hangs_up_is_down(fake: FakeAgent) -> None:
    fake.reply = lambda _message: None
    assert code(CaAgent(fake.socket).identities) == "ca_agent_down"


def test_one_that_keeps_silent_or_drips_is_slow_in_time(fake: FakeAgent) -> None:
    key = key_of(fake)
    for reply, pieces in ((lambda _message: b"", 0), (fake.honest, 1)):
        fake.reply, fake.pieces = reply, pieces
        began = time.monotonic()
        assert impatient(lambda: key.sign(DATA)) == "ca_agent_slow"
        assert time.monotonic() - began < 30


def test_a_reply_that_says_it_is_huge_is_not_read(fake: FakeAgent) -> None:
    key = key_of(fake)
    fake.reply = lambda _message: b"\x0e" + b"x" * 200_000
    assert code(lambda: key.sign(DATA)) == "ca_agent_malformed"
    fake.reply = lambda _message: b"\x0c" + b"x" * 300_000
    assert code(CaAgent(fake.socket).identities) == "ca_agent_malformed"


def test_every_call_has_a_connection_of_its_own_and_leaves_none(fake: FakeAgent) -> None:
    key = key_of(fake)
    before = open_files()
    for reply in (fake.honest, lambda _message: b"garbage", lambda _message: None):
        fake.reply = reply
        for _ in range(10):
            try:
                key.sign(DATA)
            except SignerError:
                continue
    eventually(lambda: open_files() <= before, "every connection is closed")


def test_no_path_is_in_an_error_and_nothing_private_is_in_a_repr(fake: FakeAgent, tmp_path: Path) -> None:
    with pytest.raises(SignerError) as caught:
        CaAgent(tmp_path / "nothing").identities()
    assert str(tmp_path) not in f"{caught.value.text}{caught.value.hint}"
    assert repr(key_of(fake)) == f"AgentKey(ssh-ed25519, {fingerprint_of(fake.ca.blob)})"


# --- the readers -----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_the_readers_raise_bad_format_and_nothing_else(body: bytes) -> None:
    for read in (read_identities, read_signature):
        if body == b"\x05" and read is read_signature:
            continue  # the agent's word for a refusal
        try:
            read(body)
        except BadFormat:
            continue


@given(st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=50))))
def test_a_list_reads_back(keys: list[tuple[bytes, bytes]]) -> None:
    body = b"\x0c" + uint32(len(keys)) + b"".join(string(key) + string(comment) for key, comment in keys)
    assert read_identities(body) == [key for key, _ in keys]


def test_a_list_as_long_as_may_be_is_read_in_linear_time() -> None:
    body = b"\x0c" + uint32(32_000) + (string(b"") + string(b"")) * 32_000
    began = time.perf_counter()
    assert len(read_identities(body)) == 32_000
    assert time.perf_counter() - began < 30


def test_the_stand_in_holds_a_key_that_parses(fake: FakeAgent) -> None:
    assert parse_public_key(fake.ca.line).blob == fake.ca.blob
