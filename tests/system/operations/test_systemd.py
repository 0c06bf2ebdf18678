"""The two systemd units: as hard as they claim, and started as plain commands with what can be had without systemd.

Without systemd as process 1 a unit cannot be run as such. So its commands are run as its lines say, in its order, as
its users, with its capabilities, without a way to gain others, in a network of its own; and every system call that
they make is held against the unit's filter.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from signer.ca.agent import CaAgent
from signer.settings import load_settings
from signer.ssh.publickey import parse_public_key
from tests.parts import missing, ports
from tests.parts.agents import Agent, SoftHsm
from tests.parts.eventually import eventually
from tests.parts.keys import Key, KeyRing
from tests.parts.processes import children
from tests.parts.service import ROOT, STANDARD_POLICY, Service

UNITS = ROOT / "scripts" / "systemd"
NAMES = ("signer-keeper.service", "signer-api.service")
AGENT = "signer-agent.service"
NOTICES = "signer-notices.service"
RENDER = ("signer-ca-render.service", "signer-ca-credential.service")
KEEPER_USER, API_USER = "daemon", "www-data"  # in place of two that an operator makes; each has its own group
RESERVED = 200  # the descriptor of the api's socket on its way
_PR_SET_MDWE, _REFUSE_EXEC_GAIN = 65, 1


@dataclass
class Unit:
    """A unit file: each key of [Service] with all its values in order, an empty one clearing those before it."""

    text: str
    service: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> Unit:
        unit = cls((UNITS / name).read_text())
        section = ""
        for line in unit.text.replace("\\\n", " ").splitlines():
            if line.startswith("["):
                section = line
            elif section == "[Service]" and line and line[0] not in "#;":
                key, _, value = line.partition("=")
                unit.service.setdefault(key, []).append(value)
        return unit

    def one(self, key: str) -> str:
        (value,) = self.service[key]
        return value

    @property
    def environment(self) -> dict[str, str]:
        return dict(item.split("=", 1) for value in self.service["Environment"] for item in shlex.split(value))


# --- what systemd says of them -------------------------------------------------------------------------------------


@missing.needs_systemd_analyze
@pytest.mark.parametrize("name", [*NAMES, AGENT, NOTICES, *RENDER])
def test_exposure_is_at_most_2(name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    level = re.search(rf"Overall exposure level for {name}: ([\d.]+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= 2.0


@missing.needs_systemd_analyze
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    for name in sorted(path.name for path in UNITS.iterdir()):
        text = (UNITS / name).read_text().replace("/opt/signer/.venv/bin/python", sys.executable)
        text = text.replace("/opt/signer/scripts", str(ROOT / "scripts"))
        (tmp_path / name).write_text(re.sub(r"file:/opt/signer/\S+", "https://example.invalid/", text))
    units = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", sorted(UNITS.glob("*.service")), ids=lambda path: path.name)
def test_no_unit_that_is_restarted_is_given_up(path: Path) -> None:
    """systemd gives a unit up that fails five times in ten seconds: one whose key or address comes late for ever."""
    text = path.read_text()
    assert ("\nRestart=" in text) == ("\nStartLimitIntervalSec=0\n" in text.partition("[Service]")[0])


def test_the_units_say_what_the_settings_default_to() -> None:
    defaults = load_settings({})
    for name in NAMES:
        told = load_settings(Unit.read(name).environment)
        assert (told.run_dir, told.data_dir) == (defaults.run_dir, defaults.data_dir)
    listens = re.findall(r"^ListenStream=(.*)$", (UNITS / "signer-api.socket").read_text(), re.MULTILINE)
    assert listens == [str(listen) for listen in defaults.listen]
    keeper, api, notices = map(Unit.read, (*NAMES, NOTICES))
    assert load_settings(notices.environment).notices_dir == defaults.notices_dir
    assert keeper.environment["SIGNER_NOTICES_USER"] == notices.one("User")
    assert notices.environment["SIGNER_KEEPER_USER"] == keeper.environment["SIGNER_KEEPER_USER"]
    assert keeper.environment["SIGNER_API_USER"] == api.one("User")
    assert "User" not in keeper.service  # root, to read the key
    assert {unit.one("Type") for unit in (keeper, api)} == {"notify"}
    assert keeper.environment["SIGNER_KEEPER_USER"] not in (api.one("User"), "root")


# --- as plain commands -----------------------------------------------------------------------------------------------


@dataclass
class Started:
    """Both units' commands, running."""

    service: Service
    processes: dict[str, subprocess.Popen[bytes]]
    traces: dict[str, Path]
    notified: dict[str, socket.socket] = field(default_factory=dict)  # what each says to systemd

    def pid(self, name: str) -> int:
        """The unit's main process; what started here is strace."""
        (child,) = children(self.processes[name].pid)
        return child

    def status(self, name: str) -> dict[str, list[str]]:
        lines = Path(f"/proc/{self.pid(name)}/status").read_text().splitlines()
        return {key: rest.split() for key, _, rest in (line.partition(":") for line in lines)}

    def stop(self) -> dict[str, int]:
        """SIGTERM to each main process, the api's first, as systemd orders it; their exit statuses."""
        ended = {}
        for name in reversed(NAMES):
            os.kill(self.pid(name), signal.SIGTERM)
            ended[name] = self.processes[name].wait(60)
        return ended


@pytest.fixture(scope="module")
def started(keyring: KeyRing) -> Iterator[Started]:
    """Not in pytest's own folder, which is private to root."""
    if reason := missing.root() or missing.strace():
        pytest.skip(reason)
    probe = [sys.executable, "-c", "import flask, signer"]
    if subprocess.run(probe, user=API_USER, capture_output=True).returncode != 0:
        pytest.skip(f"{API_USER} cannot read this interpreter")
    with tempfile.TemporaryDirectory(prefix="units-") as place:
        Path(place).chmod(0o755)
        running = Started(Service(Path(place) / "service", keyring("ed25519", "ca")), {}, {})
        running.service.folder.chmod(0o755)
        running.service.policy_file.chmod(0o644)
        try:
            for name in NAMES:
                start(name, running)
            eventually(running.service.is_ready, "both units are up")
            yield running
        finally:
            for process in running.processes.values():
                if process.poll() is None:  # strace; what it has started would go on without it
                    for child in children(process.pid):
                        os.kill(child, signal.SIGKILL)
                process.kill()
                process.wait()
            for told in running.notified.values():
                told.close()


def start(name: str, running: Started) -> None:
    """Starts a unit's commands; what they see of the host's folders is the service's own."""
    unit, service = Unit.read(name), running.service
    moved = {
        "/opt/signer/.venv/bin/python": sys.executable,
        "/var/lib/signer": str(service.data_dir),
        "/run/signer": str(service.run_dir),
        "signer-keeper": KEEPER_USER,
        "signer-api": API_USER,
    }
    environment = {key: moved.get(value, value) for key, value in unit.environment.items()} | {
        # What an operator's /etc/signer/environment would hold.
        "SIGNER_POLICY_FILE": str(service.policy_file),
        "SIGNER_CA_KEY_FILE": str(service.key_file),
        "SIGNER_CA_KEY_OWNER": "root:root",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }

    if unit.one("Type") == "notify":
        path = service.folder / f"{name}.notify"
        told = running.notified[name] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        told.bind(str(path))
        told.settimeout(30)
        path.chmod(0o777)  # as that of systemd
        environment["NOTIFY_SOCKET"] = str(path)

    def words(line: str) -> list[str]:
        line = re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], line)
        return [moved.get(word, word) for word in shlex.split(line)]

    for line in unit.service.get("ExecStartPre", []):
        assert line.startswith("+")  # with root's powers
        subprocess.run(words(line[1:]), check=True)
    user = moved.get(unit.service.get("User", ["root"])[0], "root")
    powers = [f"+{power.removeprefix('CAP_').lower()}" for power in unit.one("CapabilityBoundingSet").split()]
    as_unit = ["setpriv", f"--bounding-set={','.join(['-all', *powers])}", "--inh-caps=-all", "--no-new-privs"]
    if user != "root":
        as_unit += [f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"]
    alone = ["unshare", "--net"] if unit.service.get("PrivateNetwork") == ["yes"] else []
    trace = service.folder / f"{name}.trace"
    tracer = [
        "strace",
        "--follow-forks",
        "--quiet=all",
        "--signal=none",
        "--decode-fds=none",
        "-s",
        "0",
        "-o",
        str(trace),
    ]
    running.traces[name] = trace
    with_sockets: list[str] = []
    if name == NAMES[1]:  # as systemd passes those of signer-api.socket
        listener = socket.create_server((ports.LOOPBACK, service.port))
        os.dup2(listener.fileno(), RESERVED)
        listener.close()
        with_sockets = ["bash", "-c", f'exec 3<&{RESERVED}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', "sh"]
    with service.log_file.open("ab") as log:
        running.processes[name] = subprocess.Popen(
            [*alone, *tracer, *as_unit, *with_sockets, *words(unit.one("ExecStart"))],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            umask=int(unit.one("UMask"), 8),
            pass_fds=[RESERVED] if with_sockets else [],
            preexec_fn=deny_executable_memory if unit.one("MemoryDenyWriteExecute") == "yes" else None,  # noqa: PLW1509
        )


def deny_executable_memory() -> None:
    """As MemoryDenyWriteExecute does; on a kernel before 6.3 nothing."""
    ctypes.CDLL(None).prctl(_PR_SET_MDWE, _REFUSE_EXEC_GAIN, 0, 0, 0)


@pytest.fixture
def user(keyring: KeyRing) -> Key:
    return keyring("ed25519", "user")


def test_units_issue_certificates_as_plain_commands(started: Started, user: Key) -> None:
    answer = started.service.sign(user.public_line)
    assert answer.status == 201, started.service.log()
    assert started.service.ask("GET", "/readyz").json()["mode"] == "local"


def test_audit_each_unit_tells_systemd_that_it_is_ready_and_then_that_it_is_alive(started: Started) -> None:
    for name in NAMES:
        unit = Unit.read(name)
        assert (unit.one("WatchdogSec"), unit.one("WatchdogSignal")) == ("30s", "SIGKILL")
        said = started.notified[name]
        while said.recv(100) != b"READY=1":
            pass  # until the timeout of the socket
        assert {said.recv(100) for _ in range(2)} == {b"WATCHDOG=1"}


def test_each_unit_runs_as_its_user_without_powers(started: Started) -> None:
    for name, user in zip(NAMES, (KEEPER_USER, API_USER), strict=True):
        status, entry = started.status(name), pwd.getpwnam(user)
        assert set(status["Uid"]) == {str(entry.pw_uid)}
        assert status["Groups"] == []
        assert {status["CapEff"][0], status["CapPrm"][0], status["CapInh"][0]} == {"0" * 16}
        assert status["NoNewPrivs"] == ["1"]
    assert int(started.status(NAMES[0])["CapBnd"][0], 16) == 1 << 6 | 1 << 7  # SETGID, SETUID
    assert int(started.status(NAMES[1])["CapBnd"][0], 16) == 0


def test_reload_reaches_the_keeper(started: Started, user: Key) -> None:
    reload = Unit.read(NAMES[0]).one("ExecReload")
    assert reload.startswith("+")  # the keeper is somebody else's by then
    service = started.service
    service.write_policy(STANDARD_POLICY.replace('max_ttl = "30m"', 'max_ttl = "16m"'))
    subprocess.run(shlex.split(reload[1:].replace("$MAINPID", str(started.pid(NAMES[0])))), check=True)
    eventually(lambda: service.sign(user.public_line, ttl="20m").status == 403, "the new policy is in force")


@missing.needs_systemd_analyze
def test_both_end_in_order_and_every_system_call_was_one_that_the_unit_lets_pass(started: Started) -> None:
    """The last test: it stops them."""
    assert started.stop() == dict.fromkeys(NAMES, 0), started.service.log()
    groups = syscall_groups()
    for name in NAMES:
        text = started.traces[name].read_text()
        calls = set(re.findall(r"^\d+ +(\w+)\(", command_of_the_unit(text), re.MULTILINE))
        assert {"openat", "socket", "exit_group"} <= calls
        assert calls - allowed(Unit.read(name).service["SystemCallFilter"], groups) == set()


def command_of_the_unit(trace: str) -> str:
    """A trace from where Python was started: what comes before is setpriv's."""
    return trace[trace.index("execve(", trace.index("execve(") + 1) :].partition("\n")[2]


def syscall_groups() -> dict[str, list[str]]:
    """systemd's groups of system calls; a group may hold others."""
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager"], capture_output=True, text=True, check=True
    )
    groups: dict[str, list[str]] = {}
    group = ""
    for line in listed.stdout.splitlines():
        if line.startswith("@"):
            group = line.strip()
        elif line.startswith("    ") and not line.strip().startswith("#"):
            groups.setdefault(group, []).append(line.strip())
    return groups


def members(name: str, groups: dict[str, list[str]]) -> set[str]:
    if not name.startswith("@"):
        return {name}
    return {call for member in groups[name] for call in members(member, groups)}


def allowed(filters: list[str], groups: dict[str, list[str]]) -> set[str]:
    """What passes: the first line decides that this is a list of what may; @default always may."""
    passing = members("@default", groups)
    for line in filters:
        named = set().union(*(members(name, groups) for name in line.lstrip("~").split()))
        passing = passing - named if line.startswith("~") else passing | named
    return passing


# --- the agent of the CA key -----------------------------------------------------------------------------------------


def test_the_agent_unit_is_the_keepers_users_and_listens_where_the_keeper_looks() -> None:
    unit, keeper = Unit.read(AGENT), Unit.read(NAMES[0])
    assert unit.one("User") == keeper.environment["SIGNER_KEEPER_USER"]
    socket = str(load_settings({}).ca_agent_socket)
    assert unit.environment["SSH_AUTH_SOCK"] == socket
    assert unit.one("ExecStart").split()[-1] == socket
    assert f"/run/{unit.one('RuntimeDirectory')}" == str(Path(socket).parent)
    assert AGENT in re.findall(r"^After=(.*)$", keeper.text, re.MULTILINE)[0].split()
    assert re.findall(r"^Before=(.*)$", unit.text, re.MULTILINE) == [NAMES[0]]


@missing.needs_systemd_analyze
@missing.needs_strace
@missing.needs_root
@missing.needs_softhsm
def test_the_agent_with_a_token_makes_no_system_call_that_its_unit_forbids() -> None:
    """Its own line, under strace, as its user and without a way to gain powers; a key of a token signs with it."""
    unit = Unit.read(AGENT)
    with tempfile.TemporaryDirectory(prefix="agent-", dir="/tmp") as folder:  # pytest's folders are closed to that user
        place = Path(folder)
        token = SoftHsm(place / "hsm")
        socket, trace = place / "agent.sock", place / "trace"
        place.chmod(0o755)
        for path in (place, *place.rglob("*")):
            shutil.chown(path, KEEPER_USER)
        command = [str(socket) if word == unit.environment["SSH_AUTH_SOCK"] else word for word in
                   shlex.split(unit.one("ExecStart"))]  # fmt: skip
        user = pwd.getpwnam(KEEPER_USER)
        as_unit = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", f"--reuid={user.pw_uid}"]
        as_unit += [f"--regid={user.pw_gid}", "--clear-groups"]
        strace = ["strace", "--follow-forks", "--quiet=all", "--signal=none", "-s", "0", "-o", str(trace)]
        process = subprocess.Popen(
            ["unshare", "--net", *strace, *as_unit, *command],
            env={"PATH": "/usr/bin:/bin", **token.environ},
            stdout=subprocess.DEVNULL,
            umask=int(unit.one("UMask"), 8),
            preexec_fn=deny_executable_memory,  # noqa: PLW1509
        )
        try:
            eventually(lambda: ports.takes(socket), "it listens")
            agent = Agent(socket=socket, environ=token.environ)
            public = parse_public_key(token.load_into(agent))
            signature = CaAgent(socket, user.pw_uid).find_key(public.fingerprint).sign(b"what is signed")
            assert signature
        finally:
            for child in children(process.pid):
                os.kill(child, signal.SIGTERM)
            process.wait(60)
        calls = set(re.findall(r"^\d+ +(\w+)\(", command_of_the_unit(trace.read_text()), re.MULTILINE))
        assert {"socket", "setgid"} & calls
        assert calls - allowed(unit.service["SystemCallFilter"], syscall_groups()) == set()
