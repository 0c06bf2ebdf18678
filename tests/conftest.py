"""Fixtures that every test may ask for, and the rule that unit tests reach for no network.

Real parts live in tests/parts; here they get a life time. What is made once for a session must not be changed by a
test: start your own (`start_sshd`, `OpenBao(tmp_path)`) for that.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
import pytest_socket

from tests.parts import missing
from tests.parts.keys import Key, KeyRing, make_key
from tests.parts.openbao import OpenBao
from tests.parts.service import STANDARD_POLICY, Service, StartService
from tests.parts.sshd import Sshd, StartSshd

LONG_REASON = "takes many minutes: scripts/test --long"
UNIT = Path(__file__).parent / "unit"
# With several workers a file's tests stay on one (`--dist loadfile`), so the files that take minutes come first.
LONG = ("test_cutover_kill", "test_cutover_", "test_container", "test_crash", "test_decommission_parts")

# No deadline for one example: two cores are shared with whatever else runs. A failure prints how to repeat it.
hypothesis.settings.register_profile("signer", deadline=None, print_blob=True)
hypothesis.settings.load_profile("signer")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take many minutes")


def pytest_configure() -> None:
    """A shell ignores Ctrl-C for what it starts with `&`, and so would each process that a test presses Ctrl-C on."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, then all the other real ones; within that everything keeps its place.

    Tests marked `long` are skipped without `--long`, and so counted in the last line.
    """
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason=LONG_REASON))

    def rank(item: pytest.Item) -> int:
        long = next((at for at, stem in enumerate(LONG) if item.path.stem.startswith(stem)), len(LONG))
        return len(LONG) + 1 if item.path.is_relative_to(UNIT) else long

    items.sort(key=rank)


@pytest.hookimpl(trylast=True)  # after pytest-socket's own, which would open them again
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.is_relative_to(UNIT):
        pytest_socket.disable_socket(allow_unix_socket=item.get_closest_marker("unix_socket") is not None)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    pytest_socket.enable_socket()


@pytest.fixture(autouse=True)
def no_watch_left() -> Iterator[None]:
    """Each `ApiClient` and `VaultAdmin` has a thread: a test fails whose clients are not closed at its end."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "http-watch" and thread not in before]
    assert not left, "a client is not closed: use it in a with statement"


@pytest.fixture(scope="session")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    """`keyring("rsa3072")`, `keyring("ed25519", "ca")`: the same key for the whole session."""
    if reason := missing.ssh_keygen():
        pytest.skip(reason)
    return KeyRing(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def new_key(tmp_path: Path) -> Callable[..., Key]:
    """`new_key("ed25519", "name")`: a key of this test's own, in its `tmp_path`."""
    if reason := missing.ssh_keygen():
        pytest.skip(reason)

    def make(kind: str = "ed25519", name: str = "", *, comment: str = "", passphrase: str = "") -> Key:
        return make_key(tmp_path, kind, name, comment=comment, passphrase=passphrase)

    return make


@pytest.fixture
def start_sshd(tmp_path: Path, keyring: KeyRing) -> Iterator[StartSshd]:
    """Real sshd's; the test is skipped where none can be run."""
    if reason := missing.sshd():
        pytest.skip(reason)
    with ExitStack() as running:
        started = 0

        def start(
            trusted_ca: str | Sequence[str],
            *,
            principals: Sequence[str] = ("llmops",),
            extra: Sequence[str] = (),
        ) -> Sshd:
            nonlocal started
            started += 1
            return running.enter_context(
                Sshd(
                    tmp_path / f"sshd-{started}",
                    trusted_ca,
                    principals=principals,
                    extra=extra,
                    host_key=keyring("ed25519", "host").private,
                )
            )

        yield start


@pytest.fixture
def start_service(tmp_path: Path, keyring: KeyRing) -> Iterator[StartService]:
    """Our own service, real processes and all; each call starts another one."""
    with ExitStack() as running:
        started = 0

        def start(
            policy: str = STANDARD_POLICY, *, ca_kind: str = "ed25519", environ: Mapping[str, str] | None = None
        ) -> Service:
            nonlocal started
            started += 1
            ca = keyring(ca_kind, "ca")
            return running.enter_context(Service(tmp_path / f"service-{started}", ca, policy, environ=environ))

        yield start


@pytest.fixture(scope="session")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """A development OpenBao, shared by the session: mount under a path of your own."""
    if reason := missing.bao():
        pytest.skip(reason)
    with OpenBao(tmp_path_factory.mktemp("bao")) as server:
        yield server


@pytest.fixture(scope="session")
def bao_raft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """An OpenBao as in production, with raft storage and a file audit device; shared by the session."""
    if reason := missing.bao():
        pytest.skip(reason)
    with OpenBao(tmp_path_factory.mktemp("bao-raft"), raft=True) as server:
        yield server


def pytest_unconfigure(config: pytest.Config) -> None:
    """After pytest's closing line: how many tests were skipped and why, so that no gap goes unseen."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    reasons = Counter(_reason(report) for report in reporter.stats.get("skipped", []))
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    reporter.write_line(f"not run here: {reasons.total()}" + (f" ({listed})" if listed else ""))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
