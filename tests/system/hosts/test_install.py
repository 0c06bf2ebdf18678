"""The host kit's `install`, against a real sshd: nobody is locked out, whatever a host is like or is killed."""

from __future__ import annotations

import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import pytest

from tests.parts.eventually import eventually
from tests.parts.kit_hosts import ACCOUNT, DROP_IN, FOLDER, INCLUDE, PROGRAMS, STATE, KitHost, KitHosts, Said
from tests.parts.ports import LOOPBACK

CLOUD_INIT: Final = "/etc/ssh/sshd_config.d/50-cloud-init.conf"
# sshd before 9.4 drops an AuthorizedPrincipalsCommand that follows.
KEYS_COMMAND: Final = "AuthorizedKeysCommand /bin/true\nAuthorizedKeysCommandUser nobody\n"


def effective(host: KitHost, account: str = ACCOUNT) -> dict[str, str]:
    said = host.run("/usr/sbin/sshd", "-T", "-C", f"user={account},host=x,addr=127.0.0.1")
    assert said.ok, said.err
    return dict(line.partition(" ")[::2] for line in said.out.splitlines())


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_install_confirm_verify_and_uninstall(hosts: KitHosts, host: KitHost) -> None:
    before = host.snapshot()
    certificate = hosts.keys.certificate(host.folder)
    assert not host.login(certificate=certificate).ok

    checked = host.install("--check")
    assert checked.ok, checked.out + checked.err
    assert re.search(rf"^would write   {DROP_IN}$", checked.out, re.MULTILINE)
    assert host.snapshot() == before

    master = f"-oControlPath={host.folder}/master"
    assert host.login(account="root", options=("-oControlMaster=yes", "-oControlPersist=60", master)).ok
    said = host.install()
    assert said.ok, said.out + said.err
    assert host.login(certificate=certificate).ok
    assert host.run(f"{PROGRAMS}/verify").failed() == {"installed"}

    # Only a new login from elsewhere, with the code, makes it final.
    wrong = host.confirm("0" * 10)
    assert "the code is wrong" in wrong.err
    local = host.run(f"{PROGRAMS}/install", "--confirm", said.code)
    assert "this is not a login over ssh" in local.err
    own = host.confirm(said.code, source=LOOPBACK)
    assert "this login comes from this host itself" in own.err
    # Through a master connection every session looks new, but it proves nothing about the new configuration.
    old = host.login(f"{PROGRAMS}/install --confirm {said.code}", account="root", options=(master,))
    assert "this login is older than the reload" in old.err
    assert (wrong.status, local.status, own.status, old.status) == (1, 1, 1, 1)
    assert host.exists(f"{STATE}/pending")
    confirmed = host.confirm(said.code)
    assert confirmed.ok, confirmed.err
    assert not host.exists(f"{STATE}/pending")

    verified = host.run(f"{PROGRAMS}/verify")
    assert verified.ok, verified.out
    assert hosts.keys.ca.fingerprint in verified.out
    again = host.install()
    assert (again.status, again.out.splitlines()[-1]) == (
        0,
        "nothing to change for sshd: this host trusts the CA already",
    )
    assert host.login().ok

    gone = host.run(f"{PROGRAMS}/uninstall")
    assert gone.ok, gone.err
    assert host.snapshot() == before
    assert host.login().ok
    assert not host.login(certificate=certificate).ok


def test_an_awkward_host(hosts: KitHosts) -> None:
    """Include last, cloud-init's file, an AuthorizedKeysCommand before ours, and a revocation list of its own."""
    host = hosts.new()
    host.write("/etc/ssh/own-revoked", f"# lost\n{hosts.keys.user.public_line}\n")
    cloud_init = f"PasswordAuthentication no\n{KEYS_COMMAND}RevokedKeys /etc/ssh/own-revoked\n"
    host.write(CLOUD_INIT, cloud_init)
    host.configure(include="", last=INCLUDE)
    host.start_sshd()
    certificate = hosts.keys.certificate(host.folder)
    before = host.snapshot()

    host.installed()
    found = effective(host)
    assert found["trustedusercakeys"] == f"{FOLDER}/ca.pub"
    assert found["authorizedprincipalsfile"] == f"{FOLDER}/principals/%u"
    assert (found["authorizedkeyscommand"], found["passwordauthentication"]) == ("/bin/true", "no")
    # The host's own list holds the user's key: refused still, and not because of anything else.
    assert not host.login(certificate=certificate).ok
    assert re.search(r"revoked by file /etc/ssh/safe-session/revoked\.krl", host.read(f"{host.folder}/sshd.log"))
    assert host.login().ok
    host.write("/etc/ssh/own-revoked", "# found again\n")
    assert host.run(f"{PROGRAMS}/update").ok
    assert host.login(certificate=certificate).ok
    # While it cannot be read, the last good one stays, and says so.
    host.path("/etc/ssh/own-revoked").unlink()
    failed = host.run(f"{PROGRAMS}/update")
    assert (failed.status, "/etc/ssh/own-revoked cannot be read" in failed.err) == (1, True)
    assert host.login(certificate=certificate).ok
    host.write("/etc/ssh/own-revoked", f"# lost\n{hosts.keys.user.public_line}\n")

    assert host.run(f"{PROGRAMS}/uninstall").ok
    assert host.snapshot() == before


def test_without_run_sshd_nothing_is_made_there(hosts: KitHosts) -> None:
    """As with socket activation: sshd -t refuses while /run/sshd is missing; systemd makes that with the service."""
    host = hosts.new()
    host.path("/run/sshd").rmdir()
    assert "Missing privilege separation directory" in host.run("/usr/sbin/sshd", "-t").err
    said = host.install()
    assert said.ok, said.out + said.err
    assert "no sshd runs" in said.out
    assert host.exists(DROP_IN)
    assert not host.exists("/run/sshd")
    assert host.run(f"{PROGRAMS}/rollback", "--now").ok
    assert not host.exists(DROP_IN)


# --- refusals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A host on which nothing is done: what its sshd_config holds, the code, and a part of what is said."""

    code: str
    said: str
    first: str = ""
    include: str = INCLUDE
    last: str = ""
    cloud_init: str = ""


REFUSALS: Final = {
    "no Include": Refusal("no_include", "Include /etc/ssh/sshd_config.d/*.conf", include=""),
    "Include in a Match block": Refusal(
        "include_in_match", "inside Match User nobody", include="", last=f"Match User nobody\n{INCLUDE}"
    ),
    "CA of somebody else, behind ours": Refusal(
        "foreign_ca", "/etc/ssh/sshd_config:1", first="TrustedUserCAKeys /etc/ssh/theirs.pub\n"
    ),
    "CA of somebody else in a drop-in": Refusal(
        "foreign_ca", f"{CLOUD_INIT}:2", cloud_init="# theirs\ntrustedusercakeys=/etc/ssh/theirs.pub\n"
    ),
    "principals of somebody else": Refusal(
        "foreign_principals", "authorizedprincipalsfile", last="AuthorizedPrincipalsFile /etc/ssh/theirs/%u\n"
    ),
    "a principals command that sshd -T does not show": Refusal(
        "foreign_principals",
        "authorizedprincipalscommand /bin/true",
        cloud_init=f"{KEYS_COMMAND}AuthorizedPrincipalsCommand /bin/true\nAuthorizedPrincipalsCommandUser nobody\n",
    ),
    "a Match block for others than the accounts": Refusal(
        "foreign_ca", "Match Address 192.0.2.0/24", last="Match Address 192.0.2.0/24\n  TrustedUserCAKeys none\n"
    ),
    "a Match block with a list of its own": Refusal(
        "foreign_revoked_keys", "Match User llmops", last="Match User llmops\n  RevokedKeys /etc/ssh/own\n"
    ),
    "a list before ours": Refusal(
        "foreign_revoked_keys", "behind the Include line", first="RevokedKeys /etc/ssh/own-revoked\n"
    ),
    "no public keys for an account": Refusal(
        "other_value_wins", "pubkeyauthentication no", last=f"Match User {ACCOUNT}\n  PubkeyAuthentication no\n"
    ),
    "a broken configuration": Refusal("sshd_config_broken", "sshd -t fails before any change", last="nonsense yes\n"),
    "a CA key of a kind that sshd takes none of": Refusal(
        "ca_algorithm_off", "ssh-ed25519", last="CASignatureAlgorithms rsa-sha2-512\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_hosts_that_are_refused_stay_as_they_are(quiet_host: KitHost, name: str) -> None:
    refusal = REFUSALS[name]
    quiet_host.write("/etc/ssh/own-revoked", "")
    quiet_host.write(CLOUD_INIT, refusal.cloud_init)
    quiet_host.configure(first=refusal.first, include=refusal.include, last=refusal.last)
    before = quiet_host.snapshot()
    said = quiet_host.install()
    assert said.status == 1
    assert said.failed() == {refusal.code}, said.out
    assert refusal.said in said.out
    assert quiet_host.snapshot() == before


def test_a_principals_command_is_hidden_from_sshd_itself(quiet_host: KitHost) -> None:
    """The reason why the text is read: where this fails, OpenSSH has the fix of 9.4."""
    quiet_host.write(CLOUD_INIT, REFUSALS["a principals command that sshd -T does not show"].cloud_init)
    quiet_host.configure()
    version = quiet_host.run("ssh", "-V").err
    if "OpenSSH_9.2" in version:
        assert effective(quiet_host)["authorizedprincipalscommand"] == "none"
    assert quiet_host.install("--check").failed() == {"foreign_principals"}


def test_what_else_is_refused(quiet_host: KitHost) -> None:
    quiet_host.write(CLOUD_INIT, "")
    quiet_host.configure()
    before = quiet_host.snapshot()
    assert quiet_host.install(principals=("nobody-here=llmops",)).failed() == {"account_missing"}
    private = quiet_host.install_arguments()
    quiet_host.write(f"{quiet_host.folder}/ca.pub", quiet_host.keys.ca.private.read_text())
    assert quiet_host.kit("install", *private).failed() == {"ca_not_keys"}
    quiet_host.write(f"{quiet_host.folder}/ca.pub", f'principals="x" {quiet_host.keys.ca.public_line}\n')
    assert quiet_host.kit("install", *private).failed() == {"ca_not_keys"}
    quiet_host.path("/etc/ssh").chmod(0o777)
    assert quiet_host.install().failed() == {"path_unsafe"}
    quiet_host.path("/etc/ssh").chmod(0o755)
    assert quiet_host.snapshot() == before
    quiet_host.write(f"{FOLDER}/ca.pub", "somebody's own\n")
    assert quiet_host.install().failed() == {"not_ours"}
    quiet_host.run("rm", "-r", FOLDER)


def test_a_read_only_etc_is_refused(quiet_host: KitHost) -> None:
    quiet_host.write(CLOUD_INIT, "")
    quiet_host.configure()
    before = quiet_host.snapshot()
    arguments = [f"{quiet_host.folder}/kit/install", *quiet_host.install_arguments()]
    said = quiet_host.run(
        "unshare", "-m", "sh", "-c", 'mount -o remount,bind,ro /etc && exec "$@"', "sh", *arguments
    )  # fmt: skip
    assert (said.status, said.failed()) == (1, {"read_only"}), said.out + said.err
    assert quiet_host.snapshot() == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "--ca is missing"),
        (("--ca", "x"), "--principals is missing"),
        (("--principals", "llmops"), "is not ACCOUNT=PRINCIPAL"),
        (("--principals", "../x=y"), "is not ACCOUNT=PRINCIPAL"),
        (("--principals", "llmops=a,,b"), "empty principal"),
        (("--principals", 'llmops=command="x"'), "is not a principal"),
        (("--ca", "x", "--principals", "a=b", "--url", "http://x"), "--url needs --publisher"),
        (("--ca", "x", "--principals", "a=b", "--url", "-o/etc/x", "--publisher", "p"), "is not an http or https URL"),
        (("--ca", "x", "--principals", "a=b", "--rollback-after", "3601"), "from 1 to 3600"),
        (("--confirm",), "--confirm needs a value"),
        (("now",), "unexpected argument now"),
    ],
)
def test_wrong_use(quiet_host: KitHost, arguments: tuple[str, ...], said: str) -> None:
    done = quiet_host.kit("install", *arguments)
    assert (done.status, said in done.err) == (2, True), done.err


def test_nixos_gets_its_settings_and_no_change(quiet_host: KitHost) -> None:
    quiet_host.write("/etc/NIXOS", "")
    before = quiet_host.snapshot()
    said = quiet_host.install(principals=(f"{ACCOUNT}=llmops,deploy", "root=admin"))
    quiet_host.path("/etc/NIXOS").unlink()
    assert said.status == 3
    assert quiet_host.keys.ca.public_line in said.out
    assert f'users.users.{ACCOUNT}.openssh.authorizedPrincipals = [ "llmops" "deploy" ];' in said.out
    assert 'users.users.root.openssh.authorizedPrincipals = [ "admin" ];' in said.out
    assert 'RevokedKeys = "/var/lib/safe-session-host/revoked.krl";' in said.out
    assert quiet_host.snapshot() == {name: facts for name, facts in before.items() if name != "/etc/NIXOS"}


# --- rollback --------------------------------------------------------------------------------------------------------


def test_it_rolls_back_when_nobody_can_log_in_any_more(host: KitHost) -> None:
    before = host.snapshot()
    said = host.install("--rollback-after", "15")
    assert said.ok, said.err
    host.write(f"{FOLDER}/revoked.krl", "no list\n")  # sshd refuses every key now
    assert not host.login().ok
    assert not host.confirm(said.code).ok
    eventually(lambda: not host.exists(STATE), "the rollback is done")
    assert host.login().ok
    assert host.snapshot() == before


def test_files_stay_until_sshd_has_forgotten_them(host: KitHost) -> None:
    """An sshd that is slow to reload still names the list; while that is missing it would refuse every key."""
    before = host.snapshot()
    assert host.install().ok
    listener = host.read("/run/sshd.pid").strip()
    host.run("kill", "-STOP", listener)
    undo = subprocess.Popen(host.command(f"{PROGRAMS}/rollback", "--now"), stdout=subprocess.DEVNULL)
    eventually(lambda: not host.exists(DROP_IN), "the drop-in is gone")
    time.sleep(1)
    assert host.exists(f"{FOLDER}/revoked.krl")
    host.run("kill", "-CONT", listener)
    assert undo.wait(60) == 0
    assert host.snapshot() == before
    assert host.login().ok


def test_a_change_that_nobody_confirms_goes_back_to_the_confirmed_state(hosts: KitHosts, host: KitHost) -> None:
    host.installed()
    certificate = hosts.keys.certificate(host.folder)
    before = {name: facts for name, facts in host.snapshot().items() if name.startswith("/etc/ssh")}
    said = host.install("--rollback-after", "3600", principals=(f"{ACCOUNT}=other", "root=llmops"))
    assert said.ok, said.err
    assert not host.login(certificate=certificate).ok
    assert host.login(certificate=certificate, account="root").ok
    # After a reboot nothing sleeps any more: what each minute runs finds that the time is up.
    pending = re.sub(r"^deadline=\d+$", "deadline=1", host.read(f"{STATE}/pending"), flags=re.MULTILINE)
    host.write(f"{STATE}/pending", pending, 0o600)
    assert host.run(f"{PROGRAMS}/rollback", "--if-due").out == "rolled back: this host is as it was before\n"
    assert host.login(certificate=certificate).ok
    assert not host.login(certificate=certificate, account="root").ok
    assert {name: facts for name, facts in host.snapshot().items() if name.startswith("/etc/ssh")} == before
    assert host.run(f"{PROGRAMS}/verify").ok


# Each moment: the program of the system that install has just run, a part of its arguments, how often before.
MOMENTS: Final = {
    "first program": ("sync", f"{PROGRAMS}/.common.new", 1),
    "settings": ("mv", f"{FOLDER}/host.conf", 1),
    "empty list": ("mv", f"{STATE}/krl", 1),
    "list": ("mv", f"{FOLDER}/revoked.krl", 1),
    "armed": ("sync", f"{STATE}/.pending.new", 1),
    "CA file": ("mv", f"{FOLDER}/ca.pub", 1),
    "principals": ("mv", f"{FOLDER}/principals/{ACCOUNT}", 1),
    "drop-in written": ("sync", "/.00-safe-session.conf.new", 1),
    "drop-in in place": ("mv", DROP_IN, 1),
    "reloading": ("sleep", "0.1", 1),
    "waiting": ("mv", f"{STATE}/pending", 2),
}
SHIM: Final = """\
#!/bin/sh
/usr/bin/{program} "$@"
status=$?
case " $* " in
    *"{argument} "*)
        echo >>/run/count
        if [ "$(wc -l </run/count)" = {times} ]; then
            for path in /proc/[0-9]*; do
                case $(tr '\\0' ' ' <$path/cmdline 2>/dev/null) in *kit/install*) kill -9 ${{path#/proc/}} ;; esac
            done
        fi
        ;;
esac
exit $status
"""


def login_beside_a_reload(host: KitHost) -> Said:
    """A login; sshd refuses connections for a moment while it reads its configuration again."""
    while "Connection refused" in (said := host.login()).err:
        time.sleep(0.05)
    return said


def kill_at(hosts: KitHosts, host: KitHost, moment: str) -> None:
    program, argument, times = MOMENTS[moment]
    host.start_sshd()
    shim = f"/usr/local/sbin/{program}"
    before = host.snapshot()
    host.write(shim, SHIM.format(program=program, argument=argument, times=times), 0o755)
    said = host.install("--rollback-after", "2")
    host.path(shim).unlink()
    assert said.status == -9, (moment, said.out, said.err)
    assert login_beside_a_reload(host).ok, moment
    named = [f"{STATE}/pending", *(f"{FOLDER}/{name}" for name in ("ca.pub", "revoked.krl", f"principals/{ACCOUNT}"))]
    missed = [name for name in named if not host.exists(name)]
    # In this order: the rollback may begin between two looks, and takes the drop-in away before all that it names.
    assert not (host.exists(DROP_IN) and missed), (moment, missed)
    if host.exists(f"{STATE}/pending") and moment != "armed":
        eventually(lambda: not host.exists(STATE), f"rolled back by itself, killed at {moment}")
    else:
        assert not host.exists(DROP_IN)
        gone = host.kit("uninstall")
        assert gone.ok, (moment, gone.err)
    assert host.snapshot() == before, moment
    assert host.login().ok, moment


def test_killed_after_every_step_nobody_is_locked_out(hosts: KitHosts) -> None:
    prepared = [(hosts.new(), moment) for moment in MOMENTS]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: kill_at(hosts, *pair), prepared))


def test_after_a_kill_install_begins_again(hosts: KitHosts, host: KitHost) -> None:
    program, argument, times = MOMENTS["drop-in in place"]
    shim = f"/usr/local/sbin/{program}"
    before = host.snapshot()
    host.write(shim, SHIM.format(program=program, argument=argument, times=times), 0o755)
    assert host.install().status == -9
    host.path(shim).unlink()
    said = host.install()
    assert said.ok, said.err
    assert "an earlier installation was not confirmed: rolling it back first" in said.out
    assert host.confirm(said.code).ok
    assert host.login(certificate=hosts.keys.certificate(host.folder)).ok
    assert host.run(f"{PROGRAMS}/uninstall").ok
    assert host.snapshot() == before
