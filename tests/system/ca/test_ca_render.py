"""`signer ca render` with Infisical's real SDK against the stand-in: what is written, faults, and who sees what."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from signer.ca import infisical
from signer.errors import SignerError
from tests.parts import missing, ports
from tests.parts.command import Ran, run
from tests.parts.eventually import eventually
from tests.parts.infisical import ACCESS_TOKEN, CLIENT_SECRET, Infisical
from tests.parts.keys import Key, KeyRing, make_key, ssh_keygen
from tests.parts.memory import memory_folder
from tests.parts.processes import command_line, descendants, environment, family
from tests.parts.selfsigned import write_certificate
from tests.parts.service import StartService

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Infisical]:
    with Infisical(tmp_path_factory.mktemp("infisical")) as running:
        yield running


@pytest.fixture
def key(keyring: KeyRing) -> Key:
    return keyring("ed25519", "ca")


@pytest.fixture
def server(shared: Infisical, key: Key) -> Iterator[Infisical]:
    """The stand-in, holding the CA key; in the end nobody may have asked it for anything but what was recorded."""
    shared.holds(key.private.read_text())
    yield shared
    assert shared.violations == []


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


@pytest.fixture
def target(folder: Path) -> Path:
    return folder / "ca"


@pytest.fixture
def told(server: Infisical, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has the settings of `ca render`."""
    take(server.environ(key.fingerprint), monkeypatch)
    monkeypatch.setattr("signer.cli.ca.forbid_dumps", lambda: None)  # it would bind this whole test run


def take(environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SIGNER_", "INFISICAL_"))]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def secrets_of(key: Key) -> list[str]:
    """What nobody may be shown: each line of the key, the client secret, the access token, an address with either."""
    return [*key.private.read_text().splitlines()[1:-1], CLIENT_SECRET, ACCESS_TOKEN, "user:"]


def check_secret(text: str, *keys: Key) -> None:
    shown = [secret for key in keys for secret in secrets_of(key) if secret in text]
    assert not shown, f"{len(shown)} secrets were shown"


def state(target: Path) -> tuple[object, ...]:
    seen = target.lstat()
    return (target.read_bytes(), *seen[:7], seen.st_mtime_ns, seen.st_ctime_ns)


# --- rendering --------------------------------------------------------------------------------------------------------


def test_a_key_is_fetched_as_recorded_and_written(server: Infisical, told: None, target: Path, key: Key) -> None:
    before = len(server.requests)
    ran = run("ca", "render", "--to", str(target))
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == (
        f"{target}: written, the keeper takes it at its next start or `signer reload` (ssh-ed25519 {key.fingerprint})\n"
    )
    assert ssh_keygen("-y", "-P", "", "-f", target).split()[:2] == key.public_line.split()[:2]
    assert [(asked["method"], asked["path"].split("?")[0]) for asked in server.requests[before:]] == [
        ("POST", "/api/v1/auth/universal-auth/login"),
        ("GET", "/api/v3/secrets/raw/SAFE_SESSION_CA_KEY"),
    ]
    check_secret(ran.out, key)


@pytest.mark.parametrize(
    "setting", ["INFISICAL_CLIENT_ID", "INFISICAL_PROJECT_ID", "INFISICAL_ENVIRONMENT", "INFISICAL_SECRET_PATH"]
)
def test_the_stand_in_refuses_what_was_not_recorded(
    setting: str, key: Key, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Infisical(tmp_path / "infisical") as strict:
        strict.holds(key.private.read_text())
        take({**strict.environ(key.fingerprint), setting: "/another"}, monkeypatch)
        source = infisical.load_source(os.environ)
        with pytest.raises(SignerError):
            infisical.fetch_secret(source)
        assert len(strict.violations) == 1


def test_the_same_key_again_changes_nothing(server: Infisical, told: None, target: Path) -> None:
    run("ca", "render", "--to", str(target))
    before = state(target)
    ran = run("ca", "render", "--to", str(target))
    assert ran.status == 0
    assert ": unchanged (" in ran.out
    assert state(target) == before


@pytest.mark.parametrize("before, end, after", [("", "\n", ""), ("  \n", "\r\n", " \r\n\n")], ids=["cut", "CRLF"])
def test_a_key_that_the_store_has_spoilt_is_mended_on_its_way(
    *, before: str, end: str, after: str, server: Infisical, told: None, target: Path, key: Key
) -> None:
    server.holds(before + end.join(key.private.read_text().splitlines()) + after)
    assert run("ca", "render", "--to", str(target)).status == 0
    assert target.read_text() == key.private.read_text()


def test_check_tells_drift_by_its_exit_status_and_writes_nothing(
    server: Infisical, told: None, target: Path, key: Key, keyring: KeyRing
) -> None:
    ran = run("ca", "render", "--to", str(target), "--check")
    assert (ran.status, ": is not there; nothing was written" in ran.out) == (1, True)
    assert list(target.parent.iterdir()) == []

    run("ca", "render", "--to", str(target))
    before = state(target)
    ran = run("ca", "render", "--to", str(target), "--check")
    assert (ran.status, ": agrees with Infisical" in ran.out) == (0, True)

    other = keyring("ed25519", "other")
    target.unlink()
    target.write_text(other.private.read_text())
    target.chmod(0o440)
    drifted = state(target)
    ran = run("ca", "render", "--to", str(target), "--check", "--json")
    assert ran.status == 1
    assert '"result": "differs"' in ran.out
    assert '"content",\n    "mode"' in ran.out
    assert state(target) == drifted != before
    check_secret(ran.out, key, other)


def test_an_infisical_with_tls_is_trusted_by_its_certificate_alone(
    key: Key, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: None
) -> None:
    with Infisical(tmp_path / "infisical", tls=write_certificate(tmp_path)) as server:
        server.holds(key.private.read_text())
        take(server.environ(key.fingerprint), monkeypatch)
        ran = run("ca", "render", "--to", str(target), "--json")
        assert (ran.status, '"code": "infisical_untrusted"' in ran.out) == (1, True)
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls.crt"))
        assert run("ca", "render", "--to", str(target)).status == 0
        assert server.violations == []


# --- faults -----------------------------------------------------------------------------------------------------------

STATUSES = [
    *((call, 400, "infisical_refused") for call in ("login", "secret")),
    *((call, 401, "infisical_unauthorized") for call in ("login", "secret")),
    *((call, 403, "infisical_forbidden") for call in ("login", "secret")),
    ("login", 404, "infisical_site_wrong"),
    ("secret", 404, "infisical_secret_missing"),
    *((call, 429, "infisical_rate_limited") for call in ("login", "secret")),
    *((call, status, "infisical_failed") for call in ("login", "secret") for status in (500, 502, 503, 504)),
]
OTHER_FAULTS = [
    *(
        (call, fault, code)
        for call in ("login", "secret")
        for fault, code in (
            ("hang", "infisical_slow"),
            ("hang in the body", "infisical_slow"),
            ("drip", "infisical_slow"),
            ("close", "infisical_down"),
            ("not http", "infisical_down"),
            ("not json", "infisical_not_understood"),
            ("other json", "infisical_not_understood"),
            ("to another host", "infisical_down"),
        )
    )
]


@pytest.mark.parametrize("call, fault, code", [*STATUSES, *OTHER_FAULTS])
def test_each_fault_has_its_code_and_leaves_the_old_file(
    *,
    call: str,
    fault: int | str,
    code: str,
    server: Infisical,
    told: None,
    target: Path,
    key: Key,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    if code == "infisical_slow":
        monkeypatch.setattr(infisical, "fetch_secret", partial(infisical.fetch_secret, timeout=1.5))
    target.write_text("the old key")
    target.chmod(0o400)
    before = state(target)
    server.holds(key.private.read_text(), **{call: fault})
    check_fault(run("ca", "render", "--to", str(target), "--json"), code)
    assert state(target) == before
    assert list(target.parent.iterdir()) == [target]
    ran = run("ca", "render", "--to", str(target), "--check")
    assert ran.status == 1
    assert state(target) == before
    check_secret(ran.out + ran.err + caplog.text, key)


def check_fault(ran: Ran, code: str) -> None:
    assert ran.status == 1
    assert f'"code": "{code}"' in ran.out, ran.out
    assert ran.err.startswith("signer: error: ")
    assert "\nsigner: hint: " in ran.err
    assert "http" not in (ran.out + ran.err).replace("https://infisical.example", "")
    assert CLIENT_SECRET not in ran.out + ran.err


def test_an_infisical_that_is_down_has_its_code(
    server: Infisical, told: None, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFISICAL_SITE_URL", f"http://127.0.0.1:{ports.free_port()}")
    check_fault(run("ca", "render", "--to", str(target), "--json"), "infisical_down")
    monkeypatch.setenv("INFISICAL_SITE_URL", "https://infisical.invalid")
    check_fault(run("ca", "render", "--to", str(target), "--json"), "infisical_down")
    assert list(target.parent.iterdir()) == []


def test_a_child_that_dies_has_its_code(
    server: Infisical, told: None, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "infisical_client.py").write_text("import os; print('half a line', flush=True); os.abort()")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    check_fault(run("ca", "render", "--to", str(target), "--json"), "infisical_sdk_failed")


def test_an_sdk_that_hangs_before_it_asks_anything_is_given_up(
    server: Infisical, told: None, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "infisical_client.py").write_text("import time; time.sleep(300)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(infisical, "fetch_secret", partial(infisical.fetch_secret, timeout=1.5))
    check_fault(run("ca", "render", "--to", str(target), "--json"), "infisical_slow")


def _passphrase(folder: Path) -> str:
    return make_key(folder, "ed25519", "locked", passphrase="open sesame").private.read_text()


KINDS_OF_SECRET: dict[str, tuple[str, Callable[[KeyRing, Path], str | None]]] = {
    "empty": ("ca_key_empty", lambda ring, _: ""),
    "blank": ("ca_key_empty", lambda ring, _: " \r\n "),
    "none": ("infisical_not_understood", lambda ring, _: None),
    "a public key": ("ca_key_not_a_private_key", lambda ring, _: ring("ed25519", "ca").public_line),
    "text": ("ca_key_not_a_private_key", lambda ring, _: "correct horse battery staple"),
    "JSON": ("ca_key_not_a_private_key", lambda ring, _: '{"type": "service_account", "private_key": "x"}'),
    "another key in JSON": (
        "ca_key_fingerprint_differs",
        lambda ring, _: '{"private_key": "' + ring("ed25519", "other").private.read_text() + '"}',
    ),
    "another key": ("ca_key_fingerprint_differs", lambda ring, _: ring("ed25519", "other").private.read_text()),
    "RSA of 2048 bits": ("ca_key_rsa_too_short", lambda ring, _: ring("rsa2048").private.read_text()),
    "with a passphrase": ("ca_key_has_passphrase", lambda _, folder: _passphrase(folder)),
    "huge": ("ca_key_too_large", lambda ring, _: "A" * 20_000_000),
    "a little too large": ("ca_key_too_large", lambda ring, _: "A" * 17_000),
    "a lone surrogate": ("infisical_not_understood", lambda ring, _: "\ud800"),
}


@pytest.mark.parametrize("name", KINDS_OF_SECRET)
def test_another_kind_of_secret_is_refused(
    name: str, server: Infisical, told: None, target: Path, keyring: KeyRing, tmp_path: Path
) -> None:
    code, make = KINDS_OF_SECRET[name]
    target.write_text("the old key")
    before = state(target)
    value = make(keyring, tmp_path)
    server.holds(value)
    ran = run("ca", "render", "--to", str(target), "--json")
    check_fault(ran, code)
    assert state(target) == before
    lines = [line for line in (value or "").splitlines() if len(line) > 12]
    assert not [line for line in lines if line[:200] in ran.out + ran.err]


# --- what other processes can see -------------------------------------------------------------------------------------


def start(environ: Mapping[str, str], *words: str, log: Path) -> subprocess.Popen[bytes]:
    """`signer WORDS` as a process of its own."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "signer", *words],
            env={**kept, **environ},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


@missing.needs_root
def test_no_process_shows_a_secret_in_its_arguments_or_environment(
    server: Infisical, target: Path, key: Key, tmp_path: Path
) -> None:
    server.holds(key.private.read_text(), secret="hang")
    proxy = {"HTTPS_PROXY": f"http://user:{CLIENT_SECRET}@127.0.0.1:1"}
    own = server.environ(key.fingerprint)
    process = start({**own, **proxy}, "ca", "render", "--to", str(target), log=tmp_path / "log")
    seen: dict[int, bytes] = {}
    try:
        before = len(server.requests)
        while len(server.requests) < before + 2:  # until it has the token and waits for the key
            assert process.poll() is None, (tmp_path / "log").read_text()
            for pid in descendants(process.pid):
                # Before it becomes another program, a child is its parent, with what the operator gave that.
                if b"signer.ca.infisical" in (words := command_line(pid)):
                    seen[pid] = words + environment(pid)
    finally:
        process.kill()
        process.wait()
    assert len(seen) == 1
    for text in seen.values():
        check_secret(text.decode(errors="replace"), key)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in seen), "the child ended with its parent")


def test_no_temporary_file_is_made_outside_the_targets_directory(
    server: Infisical, told: None, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / "temporary"))
    assert run("ca", "render", "--to", str(target)).status == 0
    assert list((tmp_path / "temporary").iterdir()) == []


@missing.needs_root
def test_the_processes_that_serve_requests_never_load_the_sdk(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    assert service.sign(keyring("ed25519").public_line).status == 201
    members = family(service.pid)
    assert len(members) >= 3
    for pid in members:
        assert "infisical" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_modules_that_serve_requests_do_not_import_the_sdk() -> None:
    code = (
        "import sys, signer.service.launcher, signer.service.keeper\n"
        "import signer.api.asgi, signer.api.edge, signer.cli.main\n"
        "signer.api.asgi.create_app\n"
        "print([name for name in sys.modules if 'infisical' in name or name == 'signer.ca.render'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# --- more than one, and again and again -------------------------------------------------------------------------------


def test_renders_at_once_all_end_well_and_leave_one_file(
    server: Infisical, target: Path, key: Key, tmp_path: Path
) -> None:
    target.write_text("the old key")
    environ = server.environ(key.fingerprint)
    processes = [start(environ, "ca", "render", "--to", str(target), log=tmp_path / "log") for _ in range(6)]
    assert [process.wait(60) for process in processes] == [0] * 6, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert (said.count(": written"), said.count(": unchanged")) == (1, 5)
    assert target.read_text() == key.private.read_text()
    assert list(target.parent.iterdir()) == [target]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def watching(server: Infisical, target: Path, key: Key, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = server.environ(key.fingerprint)
    process = start(environ, "ca", "render", "--to", str(target), "--watch", "1s", log=log)
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def says(log: Path, text: str, times: int = 1) -> None:
    eventually(lambda: log.read_text().count(text) >= times, f"it says {text!r}")


def test_watch_renders_on_a_change_and_says_nothing_when_there_is_none(
    watching: subprocess.Popen[bytes], server: Infisical, target: Path, key: Key, log: Path, tmp_path: Path
) -> None:
    says(log, ": written")
    inode = target.stat().st_ino
    asked = len(server.requests)
    eventually(lambda: len(server.requests) >= asked + 4, "it asks again")
    assert target.stat().st_ino == inode

    changed = tmp_path / "changed"
    changed.write_text(key.private.read_text())
    changed.chmod(0o600)
    ssh_keygen("-q", "-c", "-C", "with another comment", "-P", "", "-f", changed)
    server.holds(changed.read_text())
    says(log, ": written", 2)
    assert target.read_text() == changed.read_text()

    target.unlink()
    says(log, ": written", 3)
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(30) == 0
    assert log.read_text().count("\n") == 3


def test_watch_survives_every_fault_and_goes_on(
    watching: subprocess.Popen[bytes], server: Infisical, target: Path, key: Key, log: Path, keyring: KeyRing
) -> None:
    says(log, ": written")
    before = state(target)
    for orders, sentence in (
        ({"login": 503}, "its own error"),
        ({"secret": 403}, "does not let this identity"),
        ({"secret": "close"}, "cannot be reached"),
    ):
        server.holds(key.private.read_text(), **orders)
        says(log, sentence)
    server.holds(keyring("ed25519", "other").private.read_text())
    says(log, "Infisical holds the key")
    server.holds("")
    says(log, "the secret is empty")
    assert state(target) == before
    target.unlink()
    server.holds(key.private.read_text())
    says(log, ": written", 2)
    check_secret(log.read_text(), key, keyring("ed25519", "other"))


def test_watch_tells_drift_once_and_writes_nothing_with_check(
    server: Infisical, target: Path, key: Key, log: Path
) -> None:
    target.write_text("the old key")
    before = state(target)
    words = ("ca", "render", "--to", str(target), "--check", "--watch", "1s", "--json")
    process = start(server.environ(key.fingerprint), *words, log=log)
    try:
        says(log, '"differs"')
        asked = len(server.requests)
        eventually(lambda: len(server.requests) >= asked + 4, "it asks again")
    finally:
        process.terminate()
        assert process.wait(30) == 0
    assert log.read_text().count("\n") == 1
    assert state(target) == before


@pytest.mark.parametrize("fault", ["hang", None])
def test_watch_ends_at_once_on_sigterm_whether_it_waits_for_infisical_or_for_the_time(
    fault: str | None, server: Infisical, target: Path, key: Key, log: Path
) -> None:
    server.holds(key.private.read_text(), secret=fault)
    asked = len(server.requests)
    process = start(server.environ(key.fingerprint), "ca", "render", "--to", str(target), "--watch", "1h", log=log)
    try:
        eventually(lambda: len(server.requests) >= asked + 2, "it asks for the secret")
        if fault is None:
            says(log, ": written")
        members = family(process.pid)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert "did not answer" not in log.read_text(), "it waited until it gave up"
    assert "error" not in log.read_text()
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists()]
