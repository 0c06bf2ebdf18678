"""The host kit's `update`, against a real sshd and a web server: what is revoked is out, and nothing else ever is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from tests.parts.keys import Key, make_key
from tests.parts.kit_hosts import ACCOUNT, FOLDER, PROGRAMS, STATE, KitHost, KitHosts, Said
from tests.parts.list_server import LIST_SPACE, STATEMENT_SPACE, ListServer

NAME: Final = "edge1"
HELD: Final = 10  # the version that the host has at first, and keeps while all that is served is bad


@pytest.fixture(scope="module")
def server(hosts: KitHosts) -> Iterator[ListServer]:
    made = ListServer(hosts.folder, hosts.keys.ca, hosts.keys.publisher)
    yield made
    made.close()


@pytest.fixture(scope="module")
def host(hosts: KitHosts, server: ListServer) -> KitHost:
    """A host that is installed and fetches; each test publishes a higher version than those before."""
    made = hosts.new()
    made.start_sshd()
    server.newest = HELD
    server.publish(HELD)
    made.installed("--url", server.url, "--publisher", f"{made.folder}/publisher.pub", "--name", NAME)
    return made


@pytest.fixture
def version(server: ListServer) -> int:
    """A version above all that were served."""
    server.newest += 10
    return server.newest


def update(host: KitHost) -> Said:
    return host.run(f"{PROGRAMS}/update")


def in_force(host: KitHost) -> bytes:
    return host.path(f"{FOLDER}/revoked.krl").read_bytes()


def test_audit_3d3_another_user_of_the_host_holds_up_neither_update_nor_rollback(host: KitHost) -> None:
    """Whoever may open a folder may lock it, and /etc/ssh is open to all."""
    holder = "setpriv --reuid=65534 --regid=65534 --clear-groups flock {} sleep 45 >/dev/null 2>&1 </dev/null &"
    places = ("/etc/ssh", "/run", STATE, "/run/safe-session-host", "/run/safe-session-host/lock")
    holders = " ".join(holder.format(place) for place in places)
    script = f"{holders} sleep 1; exec {PROGRAMS}/update"
    said = host.run("sh", "-c", script)
    assert said.status == 0, said.out + said.err
    assert said.out.startswith("up to date")


def test_the_first_list_of_a_new_signer_is_a_list_too(hosts: KitHosts, server: ListServer) -> None:
    """Its version is 0, until something is revoked."""
    host = hosts.new()
    host.start_sshd()
    server.publish(0)
    host.installed("--url", server.url, "--publisher", f"{host.folder}/publisher.pub")
    said = host.kit("verify")
    assert said.ok, said.out
    assert "ok    list                 version 0, " in said.out
    server.publish(0, "serial: 3")
    assert "offers version 0 with other bytes" in update(host).err
    server.files = {}
    again = host.install(
        "--url", server.url, "--publisher", f"{host.folder}/publisher.pub", principals=(f"{ACCOUNT}=llmops,deploy",)
    )
    assert again.ok, again.err
    assert "installed, not confirmed" in again.out


def swap(name: str, change: Callable[[bytes], bytes]) -> Callable[[ListServer, int, KitHosts], None]:
    def spoil(server: ListServer, version: int, _hosts: KitHosts) -> None:
        server.publish(version)
        server.files[name] = change(server.files[name])

    return spoil


def missing(name: str) -> Callable[[ListServer, int, KitHosts], None]:
    def spoil(server: ListServer, version: int, _hosts: KitHosts) -> None:
        server.publish(version)
        del server.files[name]

    return spoil


def signed(content: Callable[[bytes], bytes]) -> Callable[[ListServer, int, KitHosts], None]:
    """A list that the publishing key has signed, as by a fault of the signer's own."""

    def spoil(server: ListServer, version: int, _hosts: KitHosts) -> None:
        changed = content(server.krl(version, "serial: 7"))
        server.serve(changed, server.statement(version, changed))

    return spoil


def other_key(server: ListServer, version: int, hosts: KitHosts) -> None:
    server.publish(version)
    stranger = Key("ed25519", hosts.folder / "stranger", hosts.folder / "stranger.pub")
    if not stranger.private.exists():
        make_key(hosts.folder, "ed25519", "stranger")
    server.files["krl.sig"] = server.sign(server.files["krl"], LIST_SPACE, key=stranger)


def other_namespace(server: ListServer, version: int, _hosts: KitHosts) -> None:
    server.publish(version)
    server.files["krl.sig"] = server.sign(server.files["krl"], STATEMENT_SPACE)


def statement_by_the_ca(server: ListServer, version: int, hosts: KitHosts) -> None:
    server.publish(version)
    server.files["krl.statement.sig"] = server.sign(server.files["krl.statement"], STATEMENT_SPACE, key=hosts.keys.ca)


def older(server: ListServer, version: int, _hosts: KitHosts) -> None:
    server.publish(HELD - 1)


def same_version(server: ListServer, version: int, _hosts: KitHosts) -> None:
    server.publish(HELD, "serial: 3")


def other_version(server: ListServer, version: int, _hosts: KitHosts) -> None:
    content = server.krl(version)
    server.serve(content, server.statement(version + 3, content))


def other_list(server: ListServer, version: int, _hosts: KitHosts) -> None:
    """A good list and a good statement, of which one is held back."""
    server.publish(version)
    newer = server.krl(version + 1, "serial: 3")
    server.files |= {"krl": newer, "krl.sig": server.sign(newer, LIST_SPACE)}


def future(server: ListServer, version: int, _hosts: KitHosts) -> None:
    server.publish(version, age=timedelta(hours=-1))


def strange_statement(text: bytes) -> Callable[[ListServer, int, KitHosts], None]:
    def spoil(server: ListServer, version: int, _hosts: KitHosts) -> None:
        server.publish(version)
        server.serve(server.files["krl"], text)

    return spoil


_SHA = b"0" * 64
BAD: Final[dict[str, tuple[Callable[[ListServer, int, KitHosts], None], str]]] = {
    "list changed": (swap("krl", lambda content: content[:-1] + bytes([content[-1] ^ 1])), "/krl is not signed"),
    "list cut off": (swap("krl", lambda content: content[:30]), "/krl is not signed"),
    "list empty": (swap("krl", lambda _: b""), "/krl is not signed"),
    "list unsigned": (missing("krl.sig"), "/krl.sig answers 404"),
    "list missing": (missing("krl"), "/krl answers 404"),
    "statement missing": (missing("krl.statement"), "/krl.statement answers 404"),
    "signature is nonsense": (swap("krl.sig", lambda _: b"signed"), "/krl is not signed"),
    "signature of another key": (other_key, "/krl is not signed"),
    "signature for another use": (other_namespace, "/krl is not signed"),
    "statement of the CA key": (statement_by_the_ca, "/krl.statement is not signed"),
    "list without end": (swap("krl", lambda content: content * 200_000), "/krl is larger than 8388608 bytes"),
    "statement too large": (swap("krl.statement", lambda text: text + b" " * 9000), "is larger than 8192 bytes"),
    "older version": (older, "older than"),
    "same version, other bytes": (same_version, "with other bytes"),
    "statement of another version": (other_version, "the statement of"),
    "statement of another list": (other_list, "is not the list that the statement is about"),
    "statement of the future": (future, "in the future"),
    "signed, but broken": (signed(lambda content: content[:-3]), "cannot be loaded"),
    "signed, but no list": (signed(lambda _: b"nothing"), "is of version"),
    "no JSON": (strange_statement(b"[]"), "krl.statement is not {"),
    "version is a text": (
        strange_statement(b'{"version":"99","sha256":"' + _SHA + b'","as_of":"2026-01-01T00:00:00Z"}'),
        "krl.statement is not {",
    ),
    "no such day": (
        strange_statement(b'{"version":999999,"sha256":"' + _SHA + b'","as_of":"2026-99-01T00:00:00Z"}'),
        "krl.statement is not {",
    ),
    "a command in the text": (
        strange_statement(b'{"version":$(touch /run/evil),"sha256":"' + _SHA + b'","as_of":"`touch /run/evil`"}'),
        "krl.statement is not {",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_list_changes_nothing(
    hosts: KitHosts, host: KitHost, server: ListServer, version: int, name: str
) -> None:
    spoil, expected = BAD[name]
    good = in_force(host)
    spoil(server, version, hosts)
    said = update(host)
    assert said.status == 1
    assert expected in said.err, said.err
    assert in_force(host) == good
    assert not host.exists("/run/evil")
    assert host.read(f"{STATE}/accepted").split()[0] == str(HELD)


def test_a_revoked_certificate_is_out_and_all_others_are_not(
    hosts: KitHosts, host: KitHost, server: ListServer, version: int
) -> None:
    lost = hosts.keys.certificate(host.folder, serial=7, key_id="deploy-agent:llmops")
    assert host.login(certificate=lost).ok
    server.publish(version, "serial: 7")
    said = update(host)
    assert said.ok, said.err
    assert said.out.startswith(f"up to date: version {version}, as of ")
    assert not host.login(certificate=lost).ok
    assert host.login(certificate=hosts.keys.certificate(host.folder, serial=8)).ok
    assert host.login().ok
    server.publish(version + 1, "id: deploy-agent:llmops")
    assert update(host).ok
    again = hosts.keys.certificate(host.folder, serial=9, key_id="deploy-agent:llmops")
    assert not host.login(certificate=again).ok


def test_a_list_that_did_not_change_is_not_sent_again(host: KitHost, server: ListServer, version: int) -> None:
    server.publish(version)
    assert update(host).ok
    server.requests.clear()
    before = host.read(f"{STATE}/accepted")
    later = server.statement(version, server.files["krl"], age=timedelta(seconds=-60))
    server.files |= {"krl.statement": later, "krl.statement.sig": server.sign(later, STATEMENT_SPACE)}
    assert update(host).ok
    ((headers, status),) = server.asked("krl")
    assert (status, headers["signer-host"]) == (304, NAME)
    fields, fields_before = host.read(f"{STATE}/accepted").split(), before.split()
    assert int(fields[2]) - int(fields_before[2]) >= 60  # what the host counts age from
    assert [*fields[:2], *fields[3:]] == [*fields_before[:2], *fields_before[3:]]


@pytest.mark.parametrize("name", ["krl.statement.sig", "krl", "krl.sig"])
def test_a_list_that_is_published_while_a_host_fetches_is_taken_by_the_same_update(
    host: KitHost, server: ListServer, version: int, name: str
) -> None:
    """What comes before that file is of one version, what comes after it of the next."""
    server.publish(version)
    server.before[name] = lambda: server.publish(version + 1, "serial: 7")
    said = update(host)
    assert said.ok, said.err
    assert said.out.startswith(f"up to date: version {version + 1}, as of ")
    assert not server.before


def test_the_last_good_list_lets_people_in_when_all_is_bad(
    hosts: KitHosts, host: KitHost, server: ListServer, version: int
) -> None:
    server.publish(version, "serial: 7")
    assert update(host).ok
    other_key(server, version + 1, hosts)
    assert update(host).status == 1
    assert host.login(certificate=hosts.keys.certificate(host.folder, serial=8)).ok
    assert not host.login(certificate=hosts.keys.certificate(host.folder, serial=7)).ok


def test_an_old_statement_is_an_alarm_and_the_list_stays(
    hosts: KitHosts, host: KitHost, server: ListServer, version: int
) -> None:
    """A server that is down, and somebody on the path who repeats the last answer, look the same: neither is fresh."""
    server.publish(version, "serial: 7", age=timedelta(days=1))
    said = update(host)
    assert said.ok, said.err
    alarm = host.read(f"{STATE}/alarm")
    assert "older than 900 s" in alarm
    assert "safe_session_host_list_alarm 1" in host.read(f"{STATE}/metrics.prom")
    good, served = in_force(host), dict(server.files)
    server.files = {}
    down = update(host)
    assert (down.status, "answers 404" in down.err) == (1, True)
    assert in_force(host) == good
    assert host.login(certificate=hosts.keys.certificate(host.folder, serial=8)).ok
    assert host.run(f"{PROGRAMS}/verify").failed() == {"list"}
    # What had been accepted is fetched again, and stays old.
    server.files = served
    assert update(host).ok
    assert host.read(f"{STATE}/alarm") == alarm
    server.publish(version + 1)
    assert update(host).ok
    assert not host.exists(f"{STATE}/alarm")
    assert f"safe_session_host_list_version {version + 1}" in host.read(f"{STATE}/metrics.prom")


def test_what_is_broken_on_the_host_is_mended(host: KitHost, server: ListServer, version: int) -> None:
    server.publish(version, "serial: 7")
    assert update(host).ok
    good = in_force(host)
    host.path(f"{FOLDER}/revoked.krl").unlink()
    assert not host.login().ok  # sshd refuses every key
    assert update(host).ok
    assert in_force(host) == good
    assert host.login().ok
    # Killed between the list and what is known of it: fetched again, whole.
    host.write(f"{STATE}/krl", b"cut off")
    said = update(host)
    assert said.ok, said.err
    assert host.path(f"{STATE}/krl").read_bytes() == good


def test_versions_count_for_one_publishing_key(
    hosts: KitHosts, host: KitHost, server: ListServer, version: int
) -> None:
    """A signer that begins a new ledger has a new key and low versions: `install` pins it, and nothing else changes."""
    server.publish(version)
    assert update(host).ok
    fresh = make_key(hosts.folder, "ed25519", "publisher-2")
    young = ListServer(hosts.folder, hosts.keys.ca, fresh)
    try:
        young.publish(3, "serial: 7")
        host.write(f"{host.folder}/publisher-2.pub", f"{fresh.public_line}\n")
        more = ("--url", young.url, "--publisher", f"{host.folder}/publisher-2.pub", "--name", NAME)
        said = host.install(*more)
        assert said.ok, said.err
        assert "nothing to change for sshd" in said.out
        assert host.read(f"{STATE}/accepted").split()[0] == "3"
        assert not host.login(certificate=hosts.keys.certificate(host.folder, serial=7)).ok
    finally:
        young.close()
        back = ("--url", server.url, "--publisher", f"{host.folder}/publisher.pub", "--name", NAME)
        assert host.install(*back).ok


def test_without_any_list_nothing_is_installed(hosts: KitHosts, server: ListServer, version: int) -> None:
    host = hosts.new()
    before = host.snapshot()
    other_key(server, version, hosts)
    said = host.install("--url", server.url, "--publisher", f"{host.folder}/publisher.pub")
    assert said.status == 1
    assert "no revocation list could be fetched" in said.err
    assert host.snapshot() == before


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_and_sshd_agree_about_certificates(
    hosts: KitHosts, host: KitHost, server: ListServer, version: int
) -> None:
    server.publish(version, "serial: 7")
    assert update(host).ok
    foreign = make_key(hosts.folder, "ed25519", "foreign-ca")
    sign = hosts.keys.certificate
    cases: dict[str, tuple[dict[str, object], str]] = {
        "good": ({}, ""),
        "revoked": ({"serial": 7}, "revoked"),
        "expired": ({"validity": "-2h:-1h"}, "time"),
        "not yet valid": ({"validity": "+1h:+2h"}, "time"),
        "another CA": ({"ca": foreign}, "trusted"),
        "another principal": ({"principals": ("root",)}, "principal"),
        "another address": ({"options": ("source-address=192.0.2.0/24",)}, "option"),
        "this address": ({"options": ("source-address=127.0.0.0/8",)}, ""),
        "unknown option": ({"options": ("critical:nobody-knows@example.com=x",)}, "option"),
    }
    for name, (choices, reason) in cases.items():
        certificate = sign(host.folder, **choices)
        host.write("/run/c-cert.pub", certificate.read_bytes())
        said = host.run(
            f"{PROGRAMS}/verify", "--certificate", "/run/c-cert.pub", "--account", ACCOUNT, "--address", "127.0.0.2"
        )  # fmt: skip
        assert said.failed() == ({reason} if reason else set()), (name, said.out)
        assert said.ok == (not reason), name
        assert host.login(certificate=certificate).ok == said.ok, name
    host.write("/run/c-cert.pub", b"ssh-ed25519-cert-v01@openssh.com AAAA x\n")
    broken = host.run(f"{PROGRAMS}/verify", "--certificate", "/run/c-cert.pub", "--account", ACCOUNT)
    assert broken.failed() == {"certificate"}


def test_verify_finds_what_was_changed_on_the_host(host: KitHost, server: ListServer, version: int) -> None:
    server.publish(version)
    assert update(host).ok
    assert host.run(f"{PROGRAMS}/verify").ok
    good = in_force(host)
    host.write(f"{FOLDER}/revoked.krl", server.krl(1))
    assert host.run(f"{PROGRAMS}/verify").failed() == {"list"}
    host.write(f"{FOLDER}/revoked.krl", b"")
    assert host.run(f"{PROGRAMS}/verify").failed() == {"list"}
    host.write(f"{FOLDER}/revoked.krl", good)
    host.write("/etc/ssh/sshd_config.d/00-a.conf", "AuthorizedPrincipalsFile none\n")
    assert host.run(f"{PROGRAMS}/verify").failed() == {"account"}
    Path(host.path("/etc/ssh/sshd_config.d/00-a.conf")).unlink()
