"""The session around the command: the agent it sees, its status and signals, and that nothing is left afterwards."""

from __future__ import annotations

import base64
import ctypes
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.keys import Key
from tests.parts.standin import TOKEN, Client, Signer, Standin


@pytest.fixture
def api(client: Client, ca: Key) -> Iterator[Standin]:
    with Standin(Signer(client.folder, ca)) as running:
        yield running


def eventually(true: Callable[[], object], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def command_line(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def agents(client: Client) -> list[int]:
    """Processes, zombies apart, that are about a socket in this client's folder: agents and their shells."""
    place = str(client.runtime).encode()
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if any(word.startswith(place) for word in command_line(pid))]


def started(client: Client, process: subprocess.Popen[str]) -> Path:
    """Waits until the command of a session runs, which leaves `running` behind; returns the folder of its socket."""
    assert eventually((client.folder / "running").exists), process.stderr.read() if process.stderr else ""
    (folder,) = client.left_behind()
    return folder


SLEEP = ("exec", "--", "sh", "-c", "echo $$ > running.tmp; mv running.tmp running; exec sleep 60")


def start_sleeping(client: Client, api: Standin, **more: str) -> subprocess.Popen[str]:
    command = SLEEP[-1].replace("running", str(client.folder / "running"))
    return client.start(api.address, *SLEEP[:-1], command, **more)


def pid_of_command(client: Client) -> int:
    return int((client.folder / "running").read_text())


def test_the_agent_holds_this_certificate_and_nothing_else_while_the_command_runs(client: Client, api: Standin) -> None:
    done = client.run(api.address, "exec", "--", "ssh-add", "-L")
    certificates = [path.read_text().split()[1] for path in client.folder.glob("*-cert.pub")]
    assert [line.split()[1] for line in done.stdout.splitlines()] == certificates
    assert "safe-session llmops 4711" in done.stdout


HOSTILE = """
import os, socket, struct
long = struct.pack(">I", 300000) + bytes(300000)
for data in (b"", b"\\0", b"\\0\\0\\0\\0", b"\\xff\\xff\\xff\\xff", long, b"GET / HTTP/1.1\\r\\n"):
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(os.environ["SSH_AUTH_SOCK"])
        try:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
            assert link.recv(10) == b"", data
        except OSError:
            pass
held = [socket.socket(socket.AF_UNIX) for _ in range(600)]
for link in held:
    link.connect(os.environ["SSH_AUTH_SOCK"])
for link in held:
    link.close()
"""


def test_what_speaks_no_agent_protocol_stops_no_login(client: Client, api: Standin) -> None:
    """A host that gets the agent forwarded can send it anything, on as many connections as it likes."""
    script = f'{sys.executable} -c "$HOSTILE" && ssh-add -l'
    done = client.run(api.address, "exec", "--", "sh", "-c", script, HOSTILE=HOSTILE)
    assert done.returncode == 0, done.stderr
    assert "ED25519-CERT" in done.stdout
    assert client.left_behind() == []


def test_the_private_place_is_private(client: Client, api: Standin) -> None:
    done = client.run(
        api.address, "exec", "--", "sh", "-c", 'stat -c %a "$SSH_AUTH_SOCK" "$(dirname "$SSH_AUTH_SOCK")"'
    )
    assert done.stdout.split() == ["600", "700"]


def test_the_agent_lets_the_key_go_when_the_certificate_ends(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca, expires_in=4)  # seconds enough for a busy machine to look at it first
    with Standin(signer) as api:
        script = "while ssh-add -l; do sleep 0.2; done"
        done = client.run(api.address, "-v", "exec", "--", "sh", "-c", script)
    assert "ED25519-CERT" in done.stdout
    assert done.stdout.endswith("The agent has no identities.\n")
    assert "llmops for 4 s (serial 4711, until " in done.stderr


def test_the_command_sees_our_agent_and_not_the_users(client: Client, api: Standin) -> None:
    more = {"SSH_AUTH_SOCK": "/users/agent", "SSH_AGENT_PID": "1", "KEPT": "yes"}
    done = client.run(api.address, "exec", "--", "env", **more)
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert seen["SSH_AUTH_SOCK"].startswith(f"{client.runtime}/safe-session-")
    assert "SSH_AGENT_PID" not in seen
    assert seen["KEPT"] == "yes"


@pytest.mark.parametrize("status", [0, 1, 2, 42, 255])
def test_the_status_is_the_commands(client: Client, api: Standin, status: int) -> None:
    done = client.run(api.address, "exec", "--", "sh", "-c", f"echo out; echo err >&2; exit {status}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "out\n", "err\n")
    assert client.left_behind() == []


@pytest.mark.parametrize("name", ["TERM", "KILL", "PIPE", "SEGV", "INT"])
def test_a_command_ended_by_signal_n_gives_128_and_n(client: Client, api: Standin, name: str) -> None:
    done = client.run(api.address, "exec", "--", "sh", "-c", f"ulimit -c 0; kill -{name} $$")
    assert done.returncode == 128 + signal.Signals[f"SIG{name}"]
    assert client.left_behind() == []


def test_arguments_and_standard_input_reach_the_command_untouched(client: Client, api: Standin) -> None:
    words = ["a b", "", "--role", "-v", "$HOME", "\u00e9"]
    code = "import sys; print(sys.argv[1:], sys.stdin.read())"
    done = client.run(api.address, "exec", "--", sys.executable, "-c", code, *words)
    assert done.stdout == f"{words} \n"


def test_a_broken_pipe_ends_the_command_as_in_a_shell(client: Client, api: Standin) -> None:
    done = client.run(api.address, "exec", "--", "sh", "-c", "(yes; echo $? >&2) | head -1")
    assert (done.stdout, done.stderr) == ("y\n", "141\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_passed_on_and_nothing_is_left(client: Client, api: Standin, number: signal.Signals) -> None:
    process = start_sleeping(client, api)
    started(client, process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert (client.left_behind(), agents(client)) == ([], [])


def test_a_command_that_survives_the_signal_is_waited_for(client: Client, api: Standin) -> None:
    mark = client.folder / "running"
    script = f"trap 'echo cleaning; exit 3' TERM; touch {mark}; while :; do sleep 0.05; done"
    process = client.start(api.address, "exec", "--", "sh", "-c", script)
    started(client, process)
    process.terminate()
    assert (process.communicate(timeout=60)[0], process.returncode) == ("cleaning\n", 3)
    assert client.left_behind() == []


def test_signals_ignored_by_our_parent_stay_ignored(client: Client, api: Standin) -> None:
    """nohup safe-session exec ..."""
    code = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "signer.safe_session", "exec", "--", sys.executable, "-c", code],
        env=client.environment(api.address), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.communicate(timeout=20)[0] == b"True\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_the_service_is_asked_leaves_nothing(client: Client, ca: Key, number: signal.Signals) -> None:
    signer = Signer(client.folder, ca)
    over = threading.Event()

    def never(asked: object) -> bytes:
        over.wait(100)
        return b""

    with Standin(never) as api:
        process = client.start(api.address, "exec", "--", "touch", str(client.folder / "ran"))
        assert eventually(lambda: api.asked)
        process.send_signal(number)
        try:
            assert process.wait(60) == 128 + number
        finally:
            over.set()
        assert eventually(lambda: not agents(client) and not client.left_behind())
    assert process.communicate()[1] == ""
    assert not (client.folder / "ran").exists()
    assert signer.count == 0


def test_killed_with_9_no_agent_outlives_us(client: Client, api: Standin) -> None:
    process = start_sleeping(client, api)
    folder = started(client, process)
    assert agents(client)
    process.kill()
    process.wait()
    try:
        assert eventually(lambda: not agents(client))
        assert eventually(lambda: not folder.exists())
    finally:
        os.kill(pid_of_command(client), signal.SIGKILL)


@pytest.mark.slow
def test_killed_with_9_and_the_shell_too_no_agent_outlives_us_by_a_minute(client: Client, api: Standin) -> None:
    process = start_sleeping(client, api)
    folder = started(client, process)
    (agent,) = agents(client)
    shell = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(shell, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        assert (folder / "agent").exists()
        assert eventually(lambda: not agents(client))
        assert not (folder / "agent").exists()
    finally:
        os.kill(pid_of_command(client), signal.SIGKILL)


def test_no_zombie_is_left_for_a_process_1_that_reaps_nothing(client: Client, api: Standin) -> None:
    """This process plays process 1: what safe-session orphans would become its child."""
    libc = ctypes.CDLL(None)
    mine = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = set(mine.read_text().split())  # other tests' servers, which stay
    libc.prctl(36, 1, 0, 0, 0)
    try:
        assert client.run(api.address, "exec", "--", "true").returncode == 0
        assert set(mine.read_text().split()) <= before
    finally:
        libc.prctl(36, 0, 0, 0, 0)


def test_no_pipe_of_ours_leaks_into_the_command(client: Client, api: Standin) -> None:
    done = client.run(api.address, "exec", "--", "sh", "-c", "ls /proc/$$/fd")
    assert done.stdout.split() == ["0", "1", "2"]


def test_closed_standard_descriptors_do_not_become_pipes_of_ours(client: Client, api: Standin) -> None:
    code = "import os; [os.write(2, os.readlink(f'/proc/self/fd/{n}').encode() + b' ') for n in (0, 1)]"
    ours = [sys.executable, "-m", "signer.safe_session", "exec", "--"]
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "-", *ours, sys.executable, "-c", code],
        env=client.environment(api.address),
        capture_output=True,
        text=True,
    )
    assert process.stderr.split() == ["/dev/null", "/dev/null"]


# Runs in safe-session's own process and writes down the seed it made, turned over so that the file does not count.
SPY = """
import sys
if "signer.safe_session" in sys.orig_argv:
    import signer.safe_session.keypair as newkey
    made = newkey.make_key
    def make_key():
        key = made()
        with open(PLACE, "wb") as file:
            file.write(bytes(255 - byte for byte in memoryview(key.seed).cast("B")))
        return key
    newkey.make_key = make_key
"""


@missing.needs_root
def test_the_private_key_is_in_no_argument_environment_file_or_memory_of_ours(client: Client, api: Standin) -> None:
    spy = client.folder / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(SPY.replace("PLACE", repr(str(spy / "seed"))))
    path = f"{spy}:{client.environment('')['PYTHONPATH']}"
    process = start_sleeping(client, api, PYTHONPATH=path)
    started(client, process)
    try:
        seed = bytes(255 - b for b in (spy / "seed").read_bytes())
        assert len(set(seed)) > 4
        shapes = [seed, seed.hex().encode(), base64.b64encode(seed)[:40]]
        pids = [process.pid, pid_of_command(client), *agents(client)]
        assert len(pids) >= 3
        seen = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in ("cmdline", "environ")]
        assert not [text for text in seen if TOKEN.encode() in text]
        exposed = seen
        for place in (client.folder, client.runtime):
            exposed += [path.read_bytes() for path in place.rglob("*") if path.is_file()]
        assert not [shape for shape in shapes for text in exposed if shape in text]
        memory = readable_memory(process.pid)
        assert b"safe-session" in memory, "this must be able to see"
        assert seed not in memory
    finally:
        process.terminate()
        process.wait(60)


def readable_memory(pid: int) -> bytes:
    """Everything writable in the process, as root may read it."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode = line.split()[:2]
            if mode.startswith("rw") and "[v" not in line:
                start, end = (int(number, 16) for number in span.split("-"))
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)


def test_ctrl_c_in_a_terminal_goes_to_the_command_and_we_wait(client: Client, api: Standin) -> None:
    """A real terminal: the command catches Ctrl-C, its agent still answers afterwards, and its status is ours."""
    pid, terminal = pty.fork()
    if pid == 0:
        script = "trap 'sleep 0.2; ssh-add -l; exit 7' INT; echo ready; while :; do sleep 0.05; done"
        os.execve(  # noqa: S606
            sys.executable,
            [sys.executable, "-m", "signer.safe_session", "exec", "--", "sh", "-c", script],
            client.environment(api.address),
        )
    said = b""
    sent = False
    while select.select([terminal], [], [], 60)[0]:
        try:
            said += os.read(terminal, 1000)
        except OSError:
            break
        if b"ready" in said and not sent:
            sent = True
            os.write(terminal, b"\x03")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    assert (status, b"ED25519-CERT" in said) == (7, True), said
    assert client.left_behind() == []


def test_only_the_main_thread_takes_signals(client: Client, api: Standin) -> None:
    """Those of the relay took a Ctrl-C that came while the command was being started, and we ended without it."""
    process = start_sleeping(client, api)
    started(client, process)
    ours = {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP}
    others = [task for task in Path(f"/proc/{process.pid}/task").iterdir() if int(task.name) != process.pid]
    assert others
    for task in others:
        blocked = int(re.findall(r"SigBlk:\t(\w+)", (task / "status").read_text())[0], 16)
        assert {number for number in ours if blocked >> (number - 1) & 1} == ours
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize("place", ["", "/nowhere", "open", "relative", "odd name"])
def test_without_a_suitable_runtime_folder_the_socket_is_in_tmp(client: Client, api: Standin, place: str) -> None:
    if place in ("open", "odd name"):
        (client.folder / place).mkdir(mode=0o700)
        (client.folder / place).chmod(0o755 if place == "open" else 0o700)
        place = str(client.folder / place)
    done = client.run(api.address, "exec", "--", "sh", "-c", 'echo "$SSH_AUTH_SOCK"', XDG_RUNTIME_DIR=place)
    socket = Path(done.stdout.strip())
    assert socket.parent.parent == Path("/tmp"), done.stderr
    assert not socket.parent.exists()
