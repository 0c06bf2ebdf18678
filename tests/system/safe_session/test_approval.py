"""safe-session where a role asks humans: agents that get JSON and come back, people who wait, and what is left over."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.ssh.statement import APPROVAL_NAMESPACE, approval_statement, request_digest
from tests.parts import ports
from tests.parts.eventually import eventually
from tests.parts.humans import Humans, ThreadedStandin, kept_secrets
from tests.parts.keys import Key, KeyRing
from tests.parts.standin import Asked, Client, Signer, Standin, problem

PENDING = {"state", "request", "digest", "expires", "may_approve", "retry_after_s", "next"}


@pytest.fixture
def humans(client: Client, ca: Key) -> Humans:
    return Humans(Signer(client.folder, ca))


@pytest.fixture
def api(humans: Humans) -> Iterator[ThreadedStandin]:
    with ThreadedStandin(humans) as running:
        yield running


@pytest.fixture
def memory(client: Client) -> Iterator[Path]:
    """A private folder in memory, which XDG_RUNTIME_DIR names on a desktop."""
    folder = Path(tempfile.mkdtemp(prefix="xdg-", dir="/dev/shm"))
    disk, client.runtime = client.runtime, folder
    yield folder
    client.runtime = disk
    shutil.rmtree(folder)


def marked(client: Client, api: ThreadedStandin, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that leaves a mark, which must be there only after success."""
    mark = client.folder / "ran"
    mark.unlink(missing_ok=True)
    done = client.run(api.address, *words, "exec", "--", "touch", str(mark), **more)
    assert mark.exists() == (done.returncode == 0), done
    return done


# --- programs --------------------------------------------------------------------------------------------------------


def test_a_program_gets_one_line_at_once_and_the_same_command_goes_on_later(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    words = ("--reason", "restart the queue")
    first = marked(client, api, *words)
    assert (first.returncode, first.stderr) == (75, "")
    said = json.loads(first.stdout)
    assert first.stdout.count("\n") == 1
    assert said.keys() >= PENDING
    (request,) = humans.requests.values()
    assert (said["state"], said["request"], said["digest"]) == ("pending", request["request"], request["digest"])
    assert (said["may_approve"], said["retry_after_s"], said["expires"]) == (["anna", "ben"], 10, request["expires"])
    assert (said["may_retry"], said["exit_status"]) == (True, 75)

    again = marked(client, api, *words)
    assert (again.returncode, json.loads(again.stdout)["request"]) == (75, said["request"])
    humans.decide("approved")
    done = marked(client, api, *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(humans.requests) == 1
    assert kept_secrets(memory) == []

    humans.decide("denied") if marked(client, api, *words).returncode == 75 else None
    assert len(humans.requests) == 2, "one approval is good for one certificate"


def test_the_secret_is_kept_private_in_memory_and_said_nowhere(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    done = marked(client, api)
    (kept,) = kept_secrets(memory)
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    secret, request = kept.read_text().split()
    assert request == json.loads(done.stdout)["request"]
    asked = api.asked[0]
    assert secret not in done.stdout + done.stderr + asked.raw_body.decode()
    assert asked.body["public_key"] != ""
    humans.decide("approved")
    assert marked(client, api).returncode == 0
    claimed = api.asked[-1]
    assert claimed.line.startswith(f"POST /api/requests/{request}/claim")
    assert claimed.body["claim_secret"] == secret
    first_keys = [asked.body["public_key"] for asked in api.asked if "/sign/" in asked.line]
    assert claimed.body["public_key"] not in first_keys, "the key is made at the claim"


def test_with_ssh_the_line_is_on_stderr_for_rsync_and_git_and_on_stdout_with_json(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    done = client.run(api.address, "ssh", "h", "true")
    assert (done.returncode, done.stdout) == (75, "")
    assert json.loads(done.stderr).keys() >= PENDING
    done = client.run(api.address, "--json", "ssh", "h", "true")
    assert (done.returncode, done.stderr) == (75, "")
    assert json.loads(done.stdout).keys() >= PENDING
    assert len(humans.requests) == 1


@pytest.mark.parametrize(
    "more",
    [("--reason", "another"), ("--principal", "llmops"), ("--ttl", "5m"), ("--role", "other")],
    ids=lambda words: words[0],
)
def test_another_ask_is_another_request(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path, more: tuple[str, ...]
) -> None:
    assert marked(client, api).returncode == marked(client, api, *more).returncode == 75
    assert len(humans.requests) == 2
    assert len(kept_secrets(memory)) == 2


def test_another_token_or_service_does_not_get_the_secret(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    assert marked(client, api).returncode == 75
    client.token_file.write_text("sgn_another\n")
    assert marked(client, api).returncode == 75
    assert len({asked.body["claim_sha256"] for asked in api.asked}) == 2


def test_denied_is_final_and_says_who_and_why(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    marked(client, api)
    humans.decide("denied", by="ben", why="not on a\x1b[2J Friday")
    for _ in range(2):  # the same command later asks nobody again
        done = marked(client, api)
        assert (done.returncode, done.stderr) == (77, "")
        said = json.loads(done.stdout)
        assert (said["state"], said["by"], said["why"]) == ("denied", "ben", "not on a\x1b[2J Friday")
        assert said["may_retry"] is False
        assert "\x1b" not in done.stdout
    assert len(humans.requests) == 1


@pytest.mark.parametrize("state", ["expired", "withdrawn", "lapsed"])
def test_a_request_that_is_over_makes_room_for_another(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path, state: str
) -> None:
    waiting = client.start(api.address, "--wait", "20s", "exec", "--", "true")
    humans.decide(state)
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err, json.loads(out)["state"]) == (77, "", state)
    assert kept_secrets(memory) == []
    assert marked(client, api).returncode == 75
    assert len(humans.requests) == 2


def test_wait_ends_with_the_approval_or_with_75(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    done = marked(client, api, "--wait", "1s")
    assert done.returncode == 75
    assert json.loads(done.stdout)["state"] == "pending"
    waiting = client.start(api.address, "--wait", "30s", "exec", "--", "touch", str(client.folder / "ran"))
    time.sleep(0.5)
    humans.decide("approved")
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out, err) == (0, "", "")
    assert len(humans.requests) == 1


def test_without_a_folder_in_memory_only_waiting_is_possible(
    client: Client, api: ThreadedStandin, humans: Humans
) -> None:
    """The client's own runtime folder is on a disk, or there is none."""
    if Path("/proc/mounts").read_text().count(" /tmp tmpfs"):
        client.runtime.chmod(0o755)
    for place in (str(client.runtime), ""):
        done = marked(client, api, XDG_RUNTIME_DIR=place)
        assert done.returncode == 78
        assert "no private folder in memory" in done.stderr
        assert "--wait 10m" in done.stderr
    assert [request["state"] for request in humans.requests.values()] == ["withdrawn", "withdrawn"]
    assert not list(client.runtime.rglob("*claims*"))
    waiting = client.start(api.address, "--wait", "30s", "exec", "--", "true")
    humans.decide("approved")
    assert waiting.communicate(timeout=60)[1] == ""
    assert waiting.returncode == 0
    done = marked(client, api, "--wait", "1s")
    assert done.returncode == 75
    assert "withdrawn" in json.loads(done.stdout)["next"]
    assert humans.requests[json.loads(done.stdout)["request"]]["state"] == "withdrawn"


def test_two_same_commands_at_once_make_one_request(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    """Both have filed one before either kept its secret; the second withdraws its own and goes on with the first."""
    barrier = threading.Barrier(2, timeout=60)
    answer = humans._sign

    def together(asked: Asked, role: str) -> bytes:
        reply = answer(asked, role)
        if len(humans.requests) <= 2 and not done.is_set():
            barrier.wait()
            done.set()
        return reply

    done = threading.Event()
    humans._sign = together  # type: ignore[method-assign]
    both = [client.start(api.address, "exec", "--", "true") for _ in range(2)]
    said = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert said[0]["request"] == said[1]["request"]
    assert sorted(request["state"] for request in humans.requests.values()) == ["pending", "withdrawn"]


@pytest.mark.parametrize("content", ["", "zz r-a", "00 r-a", 64 * "0", f"{64 * '0'} ../x", f"{64 * '0'} r-a\nb"])
def test_a_damaged_secret_is_replaced(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path, content: str
) -> None:
    marked(client, api)
    (kept,) = kept_secrets(memory)
    kept.write_text(content)
    assert marked(client, api).returncode == 75
    assert len(humans.requests) == 2


def test_a_secret_that_others_could_have_made_is_not_used(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    marked(client, api)
    (kept,) = kept_secrets(memory)
    kept.chmod(0o644)
    assert marked(client, api).returncode == 75
    elsewhere = memory / "elsewhere"
    kept.chmod(0o600)
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)
    digest = api.asked[0].body["claim_sha256"]
    assert marked(client, api).returncode == 75
    assert [asked.body["claim_sha256"] == digest for asked in api.asked if "/sign/" in asked.line] == [
        True, False, False,
    ]  # fmt: skip


def test_a_binding_to_another_secret_is_not_waited_for(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    answer = humans._sign

    def other(asked: Asked, role: str) -> bytes:
        return answer(asked, role).replace(str(asked.body["claim_sha256"]).encode(), 64 * b"0")

    humans._sign = other  # type: ignore[method-assign]
    done = marked(client, api)
    assert done.returncode == 69
    assert "a request with another claim secret" in done.stderr


def test_exact_asks_for_the_command_as_ssh_sends_it(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    words = ("ssh", "--exact", "-p", "22", "h", "systemctl", "restart", "a b")
    assert client.run(api.address, *words).returncode == 75
    (request,) = humans.requests.values()
    assert request["frozen"]["critical_options"] == {"force-command": "systemctl restart a b"}
    assert client.run(api.address, *words[:-1], "c").returncode == 75
    assert len(humans.requests) == 2, "the approval of one command is not that of another"


def test_a_terminated_wait_leaves_the_request_to_the_next_command(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    waiting = client.start(api.address, "--wait", "60s", "exec", "--", "true")
    humans.wait_for()
    eventually(lambda: kept_secrets(memory), "its secret is kept")
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(60) == 128 + signal.SIGTERM
    humans.decide("approved")
    assert marked(client, api).returncode == 0
    assert len(humans.requests) == 1


def test_a_service_older_than_approvals_still_certifies(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca)
    unknown = problem(400, "field 'claim_sha256': extra inputs are not permitted", code="field_malformed")
    with Standin(lambda asked: unknown if "claim_sha256" in asked.body else signer(asked)) as api:
        assert client.run(api.address, "exec", "--", "true").returncode == 0
    assert len(api.asked) == 2


# --- people ----------------------------------------------------------------------------------------------------------


class Terminal:
    """safe-session on a terminal: what it has shown, and keys to press."""

    def __init__(self, client: Client, address: str, *words: str, **more: str) -> None:
        self.shown = ""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execve(  # noqa: S606
                sys.executable,
                [sys.executable, "-m", "signer.safe_session", *words],
                client.environment(address, **more),
            )

    def press(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def read_until(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            if not select.select([self._terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {text!r} in {self.shown!r}")
            self.shown += os.read(self._terminal, 4096).decode()

    def end(self) -> int:
        """The exit status."""
        while select.select([self._terminal], [], [], 60)[0]:
            try:
                self.shown += os.read(self._terminal, 4096).decode()
            except OSError:
                break
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._terminal)
        return status


def test_a_person_sees_the_request_waits_and_goes_on(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    terminal = Terminal(client, api.address, "--reason", "ticket\x1b[31m 812", "exec", "--", "echo", "in")
    terminal.read_until("Ctrl-C withdraws the request")
    terminal.read_until("0:01")
    (request,) = humans.requests.values()
    humans.decide("approved")
    assert terminal.end() == 0
    shown = terminal.shown.replace("\r\n", "\n")
    assert f"safe-session: request {request['request']} needs the approval of anna or ben:\n" in shown
    assert "safe-session:   role        llmops\n" in shown
    assert "safe-session:   reason      ticket [31m 812\n" in shown
    assert f"safe-session:   digest\n{' ' * 28}{request['digest']}\n" in shown, "it fits no line of 80 columns"
    assert "\r\x1b[K" in shown, "the line of the wait is removed"
    assert shown.endswith(f"request {request['request']} approved by anna\nin\n")


def test_ctrl_c_withdraws(client: Client, api: ThreadedStandin, humans: Humans, memory: Path) -> None:
    terminal = Terminal(client, api.address, "ssh", "h")
    terminal.read_until("Ctrl-C withdraws the request")
    terminal.press(b"\x03")
    assert terminal.end() == 130
    (request,) = humans.requests.values()
    assert request["state"] == "withdrawn"
    assert f"request {request['request']} withdrawn" in terminal.shown
    assert kept_secrets(memory) == []


def test_a_person_who_does_not_want_to_wait_gets_the_line_of_a_program(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    terminal = Terminal(client, api.address, "--no-wait", "exec", "--", "true")
    assert terminal.end() == 75
    assert json.loads(terminal.shown).keys() >= PENDING


def test_json_on_a_terminal_says_what_is_waited_for(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    terminal = Terminal(client, api.address, "--json", "exec", "--", "true")
    terminal.read_until("}")
    said = json.loads(terminal.shown)
    assert said["state"] == "pending"
    assert said.keys() >= PENDING
    humans.decide("approved")
    assert terminal.end() == 0


def test_a_denial_is_a_sentence_for_a_person(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    terminal = Terminal(client, api.address, "exec", "--", "true")
    terminal.read_until("waiting for anna or ben")
    name = humans.decide("denied", why="not today")
    assert terminal.end() == 77
    assert f"safe-session: error: anna denied request {name}: not today" in terminal.shown


# --- questions -------------------------------------------------------------------------------------------------------


def test_wait_and_requests_show_what_the_service_has(
    client: Client, api: ThreadedStandin, humans: Humans, memory: Path
) -> None:
    name = json.loads(marked(client, api, "--reason", "why").stdout)["request"]
    listed = client.run(api.address, "requests")
    assert listed.returncode == 0
    assert [line.split() for line in listed.stdout.splitlines()] == [
        ["REQUEST", "STATE", "ROLE", "EXPIRES", "MAY", "APPROVE", "REASON"],
        [name, "pending", "llmops", "2026-11-29T10:00:00Z", "anna", "or", "ben", "why"],
    ]
    as_json = json.loads(client.run(api.address, "requests", "--json").stdout)
    assert [row["request"] for row in as_json["requests"]] == [name]
    waited = client.run(api.address, "wait", name, "--for", "1s", SAFE_SESSION_ROLE="")
    assert (waited.returncode, json.loads(waited.stdout)["state"]) == (75, "pending")
    waiting = client.start(api.address, "wait", name, "--for", "30s")
    humans.decide("approved")
    out, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, json.loads(out)["state"]) == (0, "approved")
    withdrawn = client.run(api.address, "withdraw", name)
    assert (withdrawn.returncode, withdrawn.stdout) == (0, f"request {name} is withdrawn\n")
    over = client.run(api.address, "wait", name)
    assert (over.returncode, json.loads(over.stdout)["state"]) == (77, "withdrawn")
    unknown = client.run(api.address, "wait", "r-unknown")
    assert (unknown.returncode, unknown.stderr) == (77, "safe-session: error: there is no request r-unknown\n")
    assert client.run(api.address, "wait", "../x").returncode == 64


def test_whoami(client: Client, api: ThreadedStandin) -> None:
    done = client.run(api.address, "whoami", SAFE_SESSION_ROLE="")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(maxsplit=1) for line in done.stdout.splitlines()] == [
        ["identity", "deploy-agent (agent)"],
        ["roles", "llmops"],
        ["token", "ends 2099-01-01T00:00:00Z"],
        ["service", api.address],
    ]
    assert json.loads(client.run(api.address, "whoami", "--json").stdout)["identity"] == "deploy-agent"


# --- the asker's own signature ---------------------------------------------------------------------------------------


def check_signature(humans: Humans, key: Key, folder: Path) -> None:
    """By ssh-keygen itself, over the statement that the tests build from the request."""
    (request,) = humans.requests.values()
    statement = approval_statement(request["request"], request_digest(request["frozen"]), humans.identity, None)
    (folder / "allowed").write_text(f"asker {key.public_line}\n")
    (folder / "signature").write_text(humans.signatures[-1])
    subprocess.run(
        ["ssh-keygen", "-Y", "verify", "-f", folder / "allowed", "-I", "asker", "-n", APPROVAL_NAMESPACE,
         "-s", folder / "signature"],
        input=statement, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def asker(client: Client, humans: Humans, keyring: KeyRing) -> Key:
    """The key of a person who has to sign their own ask, and no human besides."""
    key = keyring("ed25519", "asker")
    humans.identity, humans.kind, humans.presence_keys = "operator", "human", [" ".join(key.public_line.split()[:2])]
    return key


def test_the_askers_own_signature_is_made_by_ssh_keygen(
    client: Client, api: ThreadedStandin, humans: Humans, asker: Key, memory: Path
) -> None:
    done = marked(client, api, "--sign-key", str(asker.private), "--reason", "the database does not answer")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    check_signature(humans, asker, client.folder)


def test_the_key_is_found_in_the_home_or_in_the_agent(
    client: Client, api: ThreadedStandin, humans: Humans, asker: Key, memory: Path
) -> None:
    folder = client.folder / ".ssh"
    folder.mkdir(mode=0o700)
    shutil.copy(asker.private, folder / "id_approve")
    (folder / "id_approve.pub").write_text(asker.public_line + " me@home\n")
    (folder / "a.pub").write_text("ssh-ed25519 AAAA other\n")
    assert marked(client, api).returncode == 0
    check_signature(humans, asker, client.folder)
    shutil.rmtree(folder)
    humans.requests.clear()
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", client.folder / "agent"], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: ports.takes(client.folder / "agent"), "the agent listens")
        environment = {"SSH_AUTH_SOCK": str(client.folder / "agent")}
        subprocess.run(["ssh-add", "-q", asker.private], env=environment | {"PATH": os.environ["PATH"]}, check=True)
        assert marked(client, api, **environment).returncode == 0
    finally:
        agent.kill()
        agent.wait()
    check_signature(humans, asker, client.folder)


def test_without_a_key_nothing_is_signed(
    client: Client, api: ThreadedStandin, humans: Humans, asker: Key, memory: Path
) -> None:
    done = marked(client, api, "--sign-key", "/nowhere")
    assert (done.returncode, humans.signatures) == (69, [])
    assert "your own signature could not be made with /nowhere" in done.stderr
    humans.presence_keys = []
    done = marked(client, api, "--reason", "other")
    assert (done.returncode, humans.signatures) == (78, [])
    assert "--sign-key FILE" in done.stderr


def test_a_digest_that_is_not_of_what_was_shown_is_not_signed(
    client: Client, api: ThreadedStandin, humans: Humans, asker: Key, memory: Path
) -> None:
    answer = humans._sign
    humans._sign = lambda *words: answer(*words).replace(b"llmops", b"others")  # type: ignore[method-assign]
    done = marked(client, api, "--sign-key", str(asker.private))
    assert (done.returncode, humans.signatures) == (69, [])
    assert "the digest is not that of the request" in done.stderr
