"""The `signer` command beside a running service: reading while the keeper writes, and what is refused meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from signer.ledger.store import Ledger
from tests.parts.command import issued
from tests.parts.keys import KeyRing
from tests.parts.service import StartService
from tests.parts.terminal import shown_on_terminal


def test_the_ledger_is_read_and_verified_while_the_keeper_writes_it(
    start_service: StartService, keyring: KeyRing
) -> None:
    service, line = start_service(), keyring("ed25519").public_line
    head = service.command("ledger", "head").stdout
    stop = threading.Event()
    signed: list[int] = []

    def sign() -> None:
        while not stop.is_set():
            signed.append(service.sign(line).status)

    writer = threading.Thread(target=sign)
    writer.start()
    try:
        verified = [service.command("ledger", "verify", "--head", head, "--json") for _ in range(3)]
        listed = service.command("certs", "list", "--limit", "5", "--json")
        exported = service.command("ledger", "export", "--from", "2")
        checked = service.command("check", "--json")
    finally:
        stop.set()
        writer.join()
    assert set(signed) == {201}
    assert [(done.returncode, done.stderr) for done in verified] == [(0, "")] * 3
    assert len({json.loads(done.stdout)["events"] for done in verified}) > 1, "nothing was written meanwhile"
    serials = [int(row["serial"]) for row in json.loads(listed.stdout)["certificates"]]
    assert serials == list(range(serials[0], serials[0] - len(serials), -1))
    numbers = [json.loads(text)["seq"] for text in exported.stdout.splitlines()]
    assert numbers == list(range(2, len(numbers) + 2))
    assert json.loads(checked.stdout)["failed"] == 0


def test_what_was_signed_is_listed_and_shown(start_service: StartService, keyring: KeyRing) -> None:
    service, key = start_service(), keyring("ed25519")
    answer = service.sign(key.public_line, reason="ticket 812").json()
    row = json.loads(service.command("certs", "list", "--fingerprint", key.fingerprint, "--json").stdout)
    shown = json.loads(service.command("certs", "show", answer["serial"], "--json").stdout)
    assert [found["serial"] for found in row["certificates"]] == [answer["serial"]]
    assert (shown["identity"], shown["reason"], shown["valid_before"], shown["status"]) == (
        "deploy-agent",
        "ticket 812",
        answer["valid_before"],
        "active",
    )


def test_a_rebuild_waits_until_the_keeper_is_gone(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    service.sign(keyring("ed25519").public_line)
    refused = service.command("ledger", "rebuild")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "signer: error: a keeper writes this ledger\nsigner: hint: stop it, then rebuild\n"
    service.stop()
    rebuilt = service.command("ledger", "rebuild", "--json")
    assert (rebuilt.returncode, json.loads(rebuilt.stdout)["tables"]["certificates"]) == (0, 1)
    service.start()
    assert service.sign(keyring("ed25519").public_line).json()["serial"] == "2"


def test_a_new_token_is_good_after_its_line_was_added_and_sighup(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    made = json.loads(service.command("token", "new", "newcomer", "--expires", "1h", "--json").stdout)
    policy = service.policy_file.read_text()
    service.policy_file.write_text(
        f'{policy}\n[identities.newcomer]\nkind = "agent"\nroles = ["llmops"]\n{made["policy_line"]}\n'
    )
    explained = service.command("policy", "explain", "llmops", "--as", "newcomer", "--json")
    assert json.loads(explained.stdout)["granted"] is True
    os.kill(service.pid, signal.SIGHUP)
    service.tokens["newcomer"] = made["token"]
    deadline = time.monotonic() + 20
    while service.sign(keyring("ed25519").public_line, identity="newcomer").status != 201:
        assert time.monotonic() < deadline, service.log()
        time.sleep(0.05)


def test_an_interrupted_export_ends_quietly(start_service: StartService) -> None:
    service = start_service()
    service.stop()
    with closing(Ledger(service.data_dir)) as ledger:
        last = ledger.head().seq
        ledger.commit([issued(serial) for serial in range(last, last + 2_000)], int(time.time() * 1000))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "signer", "ledger", "export"],
        env=service.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # it is at work, and soon waits for a reader of the pipe
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_the_key_is_read_by_a_process_that_nobody_may_look_into(start_service: StartService) -> None:
    """Looked at from inside, after the verb: `signer ca inspect` itself is over too soon."""
    service = start_service()
    program = (
        "import ctypes, resource, sys; from signer.cli.main import main\n"
        "assert main(['ca', 'inspect', sys.argv[1]]) == 0;"
        "print(ctypes.CDLL(None).prctl(3), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(service.key_file)],
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "0 (0, 0)", done.stderr


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_s_width_is_taken_and_a_pipe_has_none(
    start_service: StartService, keyring: KeyRing, columns: int
) -> None:
    service, key = start_service(), keyring("ed25519")
    serial = service.sign(key.public_line).json()["serial"]
    environ = {**service.environment(), **service.client_environment("deploy-agent"), "COLUMNS": "240"}
    asked = {
        "signer": ([], ["certs", "list"], ["status"], ["certs", "list", "--help"], ["certs", "show", "0"]),
        "signer.safe_session": (["--help"], ["whoami"], ["ssh"], ["requests"], ["--role", "nowhere", "exec", "true"]),
    }
    for program, lines in asked.items():
        for words in lines:
            argv = [sys.executable, "-P", "-m", program, *words]
            piped = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60)
            shown = shown_on_terminal(argv, {**environ, "COLUMNS": ""}, columns)
            limit = min(columns, 100)
            assert [line for line in shown.splitlines() if len(line) > limit and len(line.split()) > 1] == [], words
            words_shown = [word for word in shown.split() if word != "\\"]  # ends a line of an example
            assert sorted(words_shown) == sorted((piped.stdout + piped.stderr).split()) or words == ["status"]
            if words == ["certs", "list"]:
                row = next(line for line in piped.stdout.splitlines() if line.startswith(f"{serial} "))
                assert row.split()[-1] == key.fingerprint
