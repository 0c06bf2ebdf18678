"""The CA key changes under a running service: real processes, two users where we are root, a real sshd."""

from __future__ import annotations

import base64
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from signer.ssh.certificate import decode_certificate
from signer.ssh.signature import check_signature
from tests.parts import missing, rotation
from tests.parts.builders import rotations
from tests.parts.eventually import eventually
from tests.parts.keys import Key, KeyRing, make_key
from tests.parts.processes import children, open_files
from tests.parts.rotation import Rotating, line_of, rotating_service
from tests.parts.sshd import StartSshd


@pytest.fixture
def old(keyring: KeyRing) -> Key:
    return keyring("ed25519", "ca")


@pytest.fixture
def new(keyring: KeyRing) -> Key:
    return keyring("ecdsa384", "new-ca")


@pytest.fixture
def user(keyring: KeyRing) -> Key:
    return keyring("ed25519", "user")


@pytest.fixture
def world(old: Key) -> Iterator[Rotating]:
    with rotating_service(old) as running:
        yield running


def metric(world: Rotating, name: str) -> float:
    text = world.service.ask("GET", "/metrics").body.decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@missing.needs_sshd
def test_a_whole_rotation_locks_nobody_out(
    world: Rotating, old: Key, new: Key, user: Key, start_sshd: StartSshd, tmp_path: Path
) -> None:
    assert world.bundle() == [f"{line_of(old)} signer-ca current {old.fingerprint}"]
    host = start_sshd(world.bundle())

    def opens(certificate: Path) -> bool:
        return host.login("true", identity=user.private, certificate=certificate).ok

    # publish, and hosts take it
    world.say(old, new)
    world.hup()
    published = [
        f"{line_of(old)} signer-ca current {old.fingerprint}",
        f"{line_of(new)} signer-ca next {new.fingerprint}",
    ]
    assert world.bundle() == published
    host.trust(world.bundle())
    by_old = world.certificate(user, tmp_path, "old")
    assert opens(by_old)
    issuer = world.service.ask("GET", "/v1/ssh/config/ca", identity="operator").json()

    # switch
    age = metric(world, "signer_key_age_seconds")
    world.place(new)
    world.hup()
    assert world.in_use() == new.fingerprint
    assert metric(world, "signer_key_age_seconds") < age
    assert world.bundle() == published, "hosts must go on trusting both, whichever signs"
    by_new = world.certificate(user, tmp_path, "new")
    assert opens(by_new)
    assert opens(by_old), "the overlap"
    assert rotations(world.events("ca.rotated")) == [{"from": old.fingerprint, "to": new.fingerprint}]
    assert [event["ca"] for event in world.events("certificate.issued")] == [old.fingerprint, new.fingerprint]
    assert [event["serial"] for event in world.events("certificate.issued")] == ["1", "2"]

    # what Vault's clients see is the key in use alone
    now = world.service.ask("GET", "/v1/ssh/config/ca", identity="operator").json()
    assert now["data"]["public_key"].split() == line_of(new).split()
    assert now["data"] != issuer["data"]
    assert world.service.ask("GET", "/v1/ssh/public_key").body.decode().split() == line_of(new).split()

    # retire: first it signs no more, then hosts forget it
    world.say(new, None, old)
    world.hup()
    assert [line.split()[3] for line in world.bundle()] == ["current", "retired"]
    host.trust(world.bundle())
    assert opens(by_old)
    world.say(new)
    world.hup()
    host.trust(world.bundle())
    assert not opens(by_old)
    assert opens(by_new)
    assert world.service.command("ledger", "verify").returncode == 0


def test_the_command_prints_what_the_service_answers(world: Rotating, old: Key, new: Key) -> None:
    for pinned, following, retired in ((old, new, ()), (old, None, (new,))):
        world.say(pinned, following, *retired)
        world.hup()
        done = world.service.command("ca", "bundle")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == world.bundle()


@missing.needs_root
def test_the_keepers_user_cannot_read_the_file_that_the_keeper_takes(world: Rotating, old: Key, new: Key) -> None:
    if reason := rotation.why_not_two_users():
        pytest.skip(reason)
    keeper = world.service.keeper_pid()
    assert keeper is not None
    world.say(old, new)
    world.place(new)
    entry = pwd.getpwnam(rotation.KEEPER_USER)
    read = [sys.executable, "-c", "import sys; open(sys.argv[1], 'rb').read(1)", str(world.service.key_file)]
    ids = {"user": entry.pw_uid, "group": entry.pw_gid}
    done = subprocess.run(read, **ids, extra_groups=[], capture_output=True, text=True)  # type: ignore[call-overload]
    assert "PermissionError" in done.stderr
    world.hup()
    assert world.in_use() == new.fingerprint
    assert world.service.keeper_pid() == keeper, "the same process, without root"


@missing.needs_strace
def test_the_launcher_opens_the_file_and_reads_nothing_of_it(
    world: Rotating, old: Key, new: Key, tmp_path: Path
) -> None:
    world.say(old, new)
    world.place(new)
    trace = tmp_path / "trace"
    calls = "trace=openat,read,pread64,readv,preadv,mmap,sendfile,sendmsg,close,dup,dup2,dup3,fcntl"
    tracer = subprocess.Popen(
        ["strace", "-y", "-e", calls, "-o", str(trace), "-p", str(world.service.pid)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        assert tracer.stderr is not None
        assert b"attached" in tracer.stderr.readline()
        world.hup()
        assert world.in_use() == new.fingerprint
    finally:
        tracer.terminate()
        tracer.communicate()
    touching = [line for line in trace.read_text().splitlines() if str(world.service.key_file) in line]
    assert [re.split(r"\W", line)[0] for line in touching] == ["openat", "sendmsg", "close"], touching
    assert "O_NOFOLLOW" in touching[0]
    assert "SCM_RIGHTS" in touching[1]


def listening() -> set[Path]:
    """The TCP sockets that listen, which launcher and api share."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {Path(f"socket:[{row[9]}]") for row in rows if row[3] == "0A"}


def sockets(pid: int) -> set[Path]:
    return {Path(link) for link in open_files(pid) if link.startswith("socket:")}


def test_the_api_has_neither_end_of_the_keepers_channel(world: Rotating) -> None:
    """It could otherwise hand the keeper a file of its choice, though none with a key that policy does not name."""
    keeper, launcher = world.service.keeper_pid(), world.service.pid
    assert keeper is not None
    words = Path(f"/proc/{keeper}/cmdline").read_text().split("\0")
    theirs = Path(f"/proc/{keeper}/fd/{words[words.index('--channel') + 1]}").readlink()
    ours = sockets(launcher) - listening()  # to the keeper, to the api, and the control socket
    assert len(ours) == 3
    (gunicorn,) = [child for child in children(launcher) if child != keeper]
    workers = children(gunicorn)
    assert workers
    for pid in (gunicorn, *workers):
        assert not sockets(pid) & {*ours, theirs}


def test_a_killed_keeper_comes_back_with_the_new_key_and_takes_the_next_one_too(
    world: Rotating, old: Key, new: Key, user: Key
) -> None:
    world.say(old, new)
    world.place(new)
    world.hup()
    assert world.service.sign(user.public_line).json()["serial"] == "1"
    keeper = world.service.keeper_pid()
    assert keeper is not None
    os.kill(keeper, signal.SIGKILL)
    eventually(lambda: world.service.is_ready() and world.service.keeper_pid() != keeper, "the keeper is back")
    assert world.in_use() == new.fingerprint
    answer = world.service.sign(user.public_line).json()
    assert (answer["serial"], answer["ca_fingerprint"]) == ("2", new.fingerprint)
    world.place(old)
    world.hup()
    assert world.in_use() == old.fingerprint, "the restarted keeper has a channel of its own"
    assert [event["ca"] for event in world.events("keeper.started")] == [old.fingerprint, new.fingerprint]
    assert world.service.command("ledger", "verify").returncode == 0


def test_a_start_takes_the_next_key_but_no_retired_one(old: Key, new: Key) -> None:
    def switch(world: Rotating) -> None:
        world.say(old, new)
        world.place(new)

    with rotating_service(old, switch) as world:
        assert world.in_use() == new.fingerprint
        world.service.stop()
        world.say(old, None, new)
        done = world.service.command("serve")
        assert done.returncode == 1
        assert "ca_key_fingerprint_differs" in done.stderr
        world.say(old, new)
        world.service.start()


def test_a_wrong_key_is_refused_and_the_service_goes_on(
    world: Rotating, old: Key, new: Key, user: Key, keyring: KeyRing
) -> None:
    stranger = keyring("ed25519", "stranger-ca")
    world.say(old, new)
    world.place(stranger)
    world.hup()
    assert world.in_use() == old.fingerprint
    (event,) = world.events("ca.refused")
    assert (event["code"], event["kept"]) == ("ca_key_fingerprint_differs", old.fingerprint)
    assert f"the key {old.fingerprint} stays in use" in world.service.log()
    assert world.service.sign(user.public_line).json()["ca_fingerprint"] == old.fingerprint
    world.place(new)
    world.hup()
    assert world.in_use() == new.fingerprint, "and takes the right one afterwards"


def test_a_policy_without_the_key_in_use_is_refused_and_both_stay(world: Rotating, old: Key, new: Key) -> None:
    before = world.service.ask("GET", "/readyz").json()
    world.say(new)
    world.hup()
    after = world.service.ask("GET", "/readyz").json()
    assert after | {"list_age": 0} == before | {"list_age": 0}, "the list's age apart, which is in seconds"
    assert [event["code"] for event in world.events("policy.refused")] == ["policy_pins_another_key"]
    world.place(new)
    world.hup()
    assert world.in_use() == new.fingerprint, "with its key it is taken"


def _link(world: Rotating) -> None:
    path = world.service.key_file
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


def _passphrase(world: Rotating) -> None:
    world.place(make_key(world.service.folder, "ed25519", "locked", passphrase="correct horse"))


FAULTS: dict[str, Callable[[Rotating], None]] = {
    "ca_key_mode_must_be_0400_or_0600": lambda world: world.service.key_file.chmod(0o444),
    "ca_key_is_a_link": _link,
    "ca_key_missing": lambda world: world.service.key_file.unlink(),
    "ca_key_has_passphrase": _passphrase,
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_of_the_file_leaves_the_key_in_use(world: Rotating, old: Key, new: Key, user: Key, code: str) -> None:
    world.say(old, new)
    world.place(new)
    FAULTS[code](world)
    world.hup()
    assert [event["code"] for event in world.events("ca.refused")] == [code]
    assert world.in_use() == old.fingerprint
    assert world.service.sign(user.public_line).json()["ca_fingerprint"] == old.fingerprint
    assert new.private.read_text().splitlines()[2] not in world.service.log()


def test_who_asks_while_keys_change_gets_a_certificate_that_verifies(
    world: Rotating, old: Key, new: Key, user: Key
) -> None:
    world.say(old, new)
    world.hup()
    stop = threading.Event()
    answers: list[dict[str, str]] = []
    refused: list[bytes] = []

    def ask() -> None:
        while not stop.is_set():
            answer = world.service.sign(user.public_line)
            if answer.status == 201:
                answers.append(answer.json())
            else:
                refused.append(answer.body)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for key in (new, old) * 5:
            world.place(key)
            world.hup()
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    assert refused == []
    named = {old.fingerprint: old.blob, new.fingerprint: new.blob}
    for answer in answers:
        blob = base64.b64decode(answer["certificate"].split()[1])
        fields, unsigned, signature = decode_certificate(blob)
        assert fields.ca_key == named[answer["ca_fingerprint"]]
        check_signature(fields.ca_key, unsigned, signature)
    assert {answer["ca_fingerprint"] for answer in answers} == set(named)
    serials = sorted(int(answer["serial"]) for answer in answers)
    assert len(set(serials)) == len(serials)
    assert len(world.events("ca.rotated")) == 10


def test_a_hundred_signals_at_once_leave_it_serving_with_the_newest_key(
    world: Rotating, old: Key, new: Key, user: Key
) -> None:
    world.say(old, new)
    world.hup()
    for round_ in range(100):
        world.place(new if round_ % 2 else old)
        os.kill(world.service.pid, signal.SIGHUP)
    eventually(lambda: world.in_use() == new.fingerprint, "the newest key is in use")
    world.hup()
    assert world.in_use() == new.fingerprint
    assert world.service.sign(user.public_line).status == 201
    # A file that was replaced before the keeper came to look at it is refused; the one in its place came later.
    assert {event["code"] for event in world.events("ca.refused")} <= {"ca_key_replaced"}
