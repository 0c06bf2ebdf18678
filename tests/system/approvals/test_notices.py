"""Humans are told: the real service, its process that sends notices, and a receiver that checks every signature."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.ledger.marks import DIFFERS, Mark, write_mark
from signer.service.control import ask_launcher
from signer.settings import load_settings
from tests.parts import missing
from tests.parts.deciders import POLICY, Deciders, deciders
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.processes import open_files
from tests.parts.receiver import SECRET, Receiver
from tests.parts.service import Service

CONSOLE = "https://signer.example.org"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(scope="module")
def people(receiver: Receiver, keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deciders]:
    folder = tmp_path_factory.mktemp("notices")
    channels = folder / "notices.toml"
    channels.write_text(
        f"""
        [channels.hook]
        kind = "webhook"
        url = "{receiver.url}/hook"
        secret = "{SECRET}"

        [channels.bens-phone]
        kind = "ntfy"
        url = "{receiver.url}/"
        topic = "top-1c"
        people = ["ben"]
        about = ["requests"]

        [channels.gone]
        kind = "slack"
        url = "http://127.0.0.1:1/hooks/s3cr3t-path"
        about = ["requests"]
        """
    )
    channels.chmod(0o400)
    environ = {
        "SIGNER_NOTICES_FILE": str(channels),
        "SIGNER_NOTICES_DIR": str(folder / "sender"),
        "SIGNER_CONSOLE_URL": CONSOLE,
    }
    if os.geteuid() == 0:
        environ["SIGNER_NOTICES_USER"] = "root"
    with deciders(folder, keyring, environ) as made:
        yield made


def told(people: Deciders, request: str) -> dict[tuple[str, str], Any]:
    shown = people.service.ask("GET", f"/api/requests/{request}", identity="anna").json()
    return {(row["channel"], row["of"]): row for row in shown["told"]}


def sender_pid(people: Deciders) -> int:
    status = ask_launcher(load_settings(people.service.environment()), "status")
    return int(status["notices"]["pid"])


def kill(people: Deciders, name: str) -> None:
    """Kills a process of the launcher, and returns when another one is ready."""

    def state() -> dict[str, Any]:
        found: dict[str, Any] = ask_launcher(load_settings(people.service.environment()), "status")[name]
        return found

    former = int(state()["pid"])
    os.kill(former, signal.SIGKILL)
    eventually(lambda: (found := state())["ready"] and found["pid"] not in (0, former), f"another {name}")
    eventually(people.service.is_ready, "the api reaches the keeper")


def kill_sender(people: Deciders) -> None:
    """Kills the process that sends notices, and returns when another one is ready."""
    kill(people, "notices")


def test_a_request_and_its_decision_are_told_to_asker_and_approvers(people: Deciders, receiver: Receiver) -> None:
    request = people.request(reason="see https://evil.example and sgn_" + "0" * 49)
    first = receiver.wait_for(request)
    assert first.is_signed()
    shown = first.json()
    assert (shown["type"], shown["request"]) == ("approval.requested", request)
    assert shown["people"] == ["anna", "ben", "deploy-agent"]
    assert "deploy-agent asks for role prod" in shown["text"]
    assert "may approve: anna, ben" in shown["text"]
    assert f"{CONSOLE}/console/requests/{request}" == shown["url"]
    assert "https://evil" not in shown["text"], "the only link is the console's"
    assert "sgn_0" not in first.body.decode()
    assert people.approve("anna", request).returncode == 0
    second = receiver.wait_for("approved by anna")
    assert second.is_signed()
    assert second.json()["request"] == request
    assert " ago" in second.json()["text"].splitlines()[0]
    receiver.wait_for("approved by anna", path="/")
    phone = [one for one in receiver.taken() if one.path == "/" and request in one.body.decode()]
    assert [one.json()["topic"] for one in phone] == ["top-1c", "top-1c"]
    assert phone[0].json()["click"] == shown["url"]


def test_a_request_tells_who_was_told_how_and_the_sending_error(people: Deciders, receiver: Receiver) -> None:
    request = people.request(reason="who was told")
    receiver.wait_for("who was told")
    rows = eventually(
        lambda: (found := told(people, request)) and all(row["state"] != "sending" for row in found.values()) and found,
        "reports of all channels",
    )
    assert isinstance(rows, dict)
    states = {channel: row["state"] for (channel, _), row in rows.items()}
    assert states == {"hook": "sent", "bens-phone": "sent", "gone": "failed"}
    gone = rows["gone", "approval.requested"]
    assert gone["error"] == "the connection was refused"
    assert rows["bens-phone", "approval.requested"]["people"] == ["ben"]
    printed = people.signer("anna", "requests", "show", request).stdout
    assert "gone (slack): failed: the connection was refused" in printed
    assert "bens-phone (ntfy, read by ben): sent" in printed
    people.signer("anna", "requests", "deny", request, "--reason", "no")


def test_who_was_told_is_known_after_the_keeper_was_killed_and_after_both_were(
    people: Deciders, receiver: Receiver
) -> None:
    request = people.request(reason="told over a kill")
    receiver.wait_for("told over a kill")
    wanted = {"hook": "sent", "bens-phone": "sent", "gone": "failed"}

    def states() -> dict[str, tuple[str, str | None]]:
        return {channel: (row["state"], row["error"]) for (channel, _), row in told(people, request).items()}

    def are_all_known() -> bool:
        return {channel: state for channel, (state, _) in states().items()} == wanted

    eventually(are_all_known, "reports of all channels")
    before = states()
    for names in (["keeper"], ["notices", "keeper"]):
        for name in names:
            kill(people, name)
        eventually(are_all_known, f"the same after a kill of {names}")
        assert states() == before
    assert "told over a kill" in receiver.taken()[-1].body.decode(), "and nobody was told again"
    people.signer("anna", "requests", "deny", request, "--reason", "no")


def test_nothing_is_lost_or_out_of_order_over_kills_and_a_receiver_that_fails(
    people: Deciders, receiver: Receiver
) -> None:
    begun = len(receiver.got)
    requests = [people.request(reason="before the kill")]
    receiver.wait_for(requests[0])
    receiver.status = 500
    requests.append(people.request(reason="while it answers 500"))
    eventually(lambda: any(one.status == 500 for one in receiver.got), "an attempt that fails")
    kill_sender(people)
    requests.append(people.request(reason="after the kill"))
    kill_sender(people)
    receiver.status = 200
    receiver.wait_for(requests[2])
    hook = [one for one in receiver.taken() if one.path == "/hook" and receiver.got.index(one) >= begun]
    assert all(one.is_signed() for one in hook)
    arrived = [one.json()["request"] for one in hook if one.json()["type"] == "approval.requested"]
    assert list(dict.fromkeys(arrived)) == requests, "in their order, each of them"
    # At least once: a kill between the answer and its record repeats one, with the id that it had.
    assert len({one.id for one in hook}) == len({(one.json()["request"], one.json()["type"]) for one in hook})


def test_another_history_that_a_witness_held_is_told_and_its_end(people: Deciders, receiver: Receiver) -> None:
    mark = people.service.data_dir / "ledger.differs"
    assert write_mark(people.service.data_dir, DIFFERS, Mark(1, int(time.time())))
    told = receiver.wait_for("a witness held another history of the ledger")
    assert (told.json()["type"], told.json()["topic"]) == ("fault.begun", "health")
    mark.unlink()
    assert receiver.wait_for("over after").json()["type"] == "fault.over"


def test_the_process_has_no_key_and_no_ledger(people: Deciders) -> None:
    opened = open_files(sender_pid(people))
    assert opened
    names = [Path(path).name for path in opened]
    assert not [name for name in names if "ledger" in name or "views" in name or name == "ca"]
    environment = Path(f"/proc/{sender_pid(people)}/environ").read_text()
    assert SECRET not in environment


def test_no_secret_is_logged_and_a_test_notice_goes_to_each_channel(people: Deciders, receiver: Receiver) -> None:
    done = people.signer("anna", "notices", "test")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok    hook (webhook) took it within ")
    assert lines[2] == "FAIL  gone (slack) failed: the connection was refused"
    receiver.wait_for("a test of signer's notices")
    for text in (people.service.log(), done.stdout, done.stderr):
        assert "s3cr3t-path" not in text
        assert SECRET.removeprefix("whsec_") not in text
        assert "top-1c" not in text


def test_metrics_count_what_was_sent(people: Deciders) -> None:
    text = people.service.ask("GET", "/metrics", identity="anna").body.decode()
    assert "signer_notices_up 1.0" in text
    assert 'signer_notices_sent_total{channel="hook"}' in text
    assert 'channel="' not in people.service.ask("GET", "/metrics").body.decode(), "without a token, no names"


def test_a_reload_takes_a_good_file_and_keeps_the_channels_for_a_bad_one(people: Deciders, receiver: Receiver) -> None:
    file = Path(people.service.environment()["SIGNER_NOTICES_FILE"])
    former = file.read_text()

    def write(text: str) -> None:
        file.chmod(0o600)
        file.write_text(text)
        file.chmod(0o400)

    pid = sender_pid(people)
    try:
        write(former.replace("[channels.gone]", "[channels.Gone]"))
        refused = people.signer("anna", "reload")
        assert refused.returncode == 1
        assert "notices  kept, bens-phone, gone, hook" in refused.stdout
        assert "channels.Gone" in refused.stderr
        write(former.replace("/hook", "/moved").replace("[channels.gone]", "[channels.away]"))
        assert "notices  away, bens-phone, hook" in people.signer("anna", "reload").stdout
        request = people.request(reason="after the reload")
        assert receiver.wait_for(request, path="/moved").is_signed()
        assert not [one for one in receiver.got if one.path == "/hook" and request in one.body.decode()]
        people.signer("anna", "requests", "deny", request, "--reason", "no")
        receiver.wait_for("denied by anna", path="/moved")
    finally:
        write(former)
    assert people.signer("anna", "reload").returncode == 0
    assert sender_pid(people) == pid, "the same process"


@missing.needs_root
def test_keeper_and_sender_find_each_other_as_three_users(receiver: Receiver, keyring: KeyRing) -> None:
    """Each asks the kernel who is at the other end; the sender can use neither the keeper's files nor its socket."""
    keeper, api, sender = "daemon", "www-data", "nobody"
    probe = [sys.executable, "-c", "import flask, signer"]
    if subprocess.run(probe, user=sender, capture_output=True).returncode != 0:
        pytest.skip(f"{sender} cannot read this interpreter")
    with tempfile.TemporaryDirectory(prefix="notices-") as place:
        folder = Path(place)
        folder.chmod(0o755)
        channels = folder / "notices.toml"
        channels.write_text(f'[channels.hook]\nkind = "webhook"\nurl = "{receiver.url}/users"\nsecret = "{SECRET}"\n')
        channels.chmod(0o400)
        os.chown(channels, pwd.getpwnam(sender).pw_uid, -1)
        users = {"SIGNER_KEEPER_USER": keeper, "SIGNER_API_USER": api, "SIGNER_NOTICES_USER": sender}
        environ = {**users, "SIGNER_NOTICES_FILE": str(channels), "SIGNER_NOTICES_DIR": str(folder / "sender")}
        service = Service(folder / "service", keyring("ed25519", "ca"), POLICY, environ=environ)
        service.folder.chmod(0o755)
        with service:
            checked = service.command("check").stdout
            assert "hook (webhook); `signer notices test` sends one to each" in checked
            answer = service.ask(
                "POST",
                "/api/sign/prod",
                {"public_key": keyring("ed25519").public_line, "reason": "as three users"},
                identity="deploy-agent",
            )
            assert answer.status == 202, answer.body
            assert receiver.wait_for("as three users", path="/users").is_signed()
            pid = int(ask_launcher(load_settings(service.environment()), "status")["notices"]["pid"])
            (uids,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid")]
            assert set(uids.split()[1:]) == {str(pwd.getpwnam(sender).pw_uid)}
            for path in (service.data_dir / "ledger.sqlite3", service.key_file, service.socket):
                reached = subprocess.run(["test", "-r", str(path)], user=sender, group=sender_group(sender))
                assert reached.returncode == 1, path
            tested = service.command("notices", "test")
            assert (tested.returncode, tested.stderr) == (0, "")


def sender_group(user: str) -> int:
    return pwd.getpwnam(user).pw_gid
