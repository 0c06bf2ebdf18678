"""The preflight's checks of the running container, the clock and sshd; its arguments, its codes and its JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from signer.errors import BadKeyFile
from tests.parts.hosts import SCRIPT, Host

Change = Callable[[Host], None]
TABLE: dict[str, tuple[set[str], Change]] = {}


def a_host_where(*codes: str) -> Callable[[Change], Change]:
    """Adds a host to the table; `codes` are all that is not `ok` there."""

    def add(change: Change) -> Change:
        TABLE[change.__name__] = (set(codes), change)
        return change

    return add


@a_host_where("container_not_running")
def no_container_runs(host: Host) -> None:
    (host.folder / "container.txt").unlink()


@a_host_where("engine_not_answering", "image_missing")
def the_engine_does_not_answer(host: Host) -> None:
    host.write("engine-fails", "")


@a_host_where()
def the_container_is_moved_over_already(host: Host) -> None:
    host.change("container.txt", "mode vault", "mode local")


@a_host_where("container_mode_unexpected")
def the_container_says_no_mode(host: Host) -> None:
    host.change("container.txt", "mode vault", "mode ")


@a_host_where()
def the_container_is_in_shadow_mode(host: Host) -> None:
    host.change("container.txt", "mode vault", "mode shadow")
    host.arguments += ["--expect-mode", "shadow"]


@a_host_where("container_mode_unexpected")
def the_container_is_in_a_mode_that_there_is_not(host: Host) -> None:
    host.change("container.txt", "mode vault", "mode shadows")


@a_host_where("container_mode_unexpected")
def the_container_is_not_in_the_mode_that_is_asked_for(host: Host) -> None:
    host.arguments += ["--expect-mode", "local"]


@a_host_where("container_user_differs")
def the_container_runs_as_somebody(host: Host) -> None:
    host.change("container.txt", "user ", "user 1001:1001")


@a_host_where("compose_not_allowed")
def the_container_runs_as_root_by_another_spelling(host: Host) -> None:
    host.change("container.txt", "user ", "user 0:0")
    host.change("merged.yaml", "    image:", "    user: root\n    image:")


@a_host_where("compose_not_allowed", "container_user_differs")
def the_container_runs_as_root_though_it_should_not(host: Host) -> None:
    host.change("merged.yaml", "    image:", "    user: '1001'\n    image:")


@a_host_where("container_capabilities_differ")
def the_container_has_a_capability_too_many(host: Host) -> None:
    host.change("container.txt", "CAP_SETUID", "CAP_SETUID CAP_SYS_ADMIN")


@a_host_where("container_capabilities_differ")
def the_container_lacks_one(host: Host) -> None:
    host.change("container.txt", "CAP_SETUID", "")


@a_host_where("container_capabilities_differ")
def the_container_is_privileged(host: Host) -> None:
    host.change("container.txt", "privileged false", "privileged true")


@a_host_where("container_capabilities_differ")
def the_container_may_gain_privileges(host: Host) -> None:
    host.change("container.txt", "security no-new-privileges", "security seccomp=x")


@a_host_where("container_capabilities_differ")
def the_docker_container_drops_little(host: Host) -> None:
    host.use_docker()
    host.change("container.txt", "/ ALL", "/ NET_RAW")


@a_host_where("container_capabilities_differ")
def the_docker_container_adds_more(host: Host) -> None:
    host.use_docker()
    host.change("container.txt", "powers CAP_SETGID", "powers SYS_PTRACE CAP_SETGID")


@a_host_where("container_root_writable")
def the_root_of_the_container_can_be_written(host: Host) -> None:
    host.change("container.txt", "root true", "root false")


@a_host_where("container_can_write_key")
def the_container_can_write_the_key(host: Host) -> None:
    host.change("container.txt", "mount false", "mount true")


@a_host_where("container_can_write_key")
def the_container_can_write_a_folder_above_the_key(host: Host) -> None:
    (host.memory / 'a "quoted" name').symlink_to(host.key.parent)
    host.change("container.txt", "mount false", f'mount true "{host.memory}/a \\"quoted\\" name"\nmount false')


@a_host_where("container_root_writable", "container_mode_unexpected")
def a_second_container_is_worse(host: Host) -> None:
    path = host.folder / "container.txt"
    first = path.read_text()
    path.write_text(first.replace("exit 0\n", "") + first.replace("root true", "root false").replace("vault", "x"))


@a_host_where("clock_not_synchronised")
def the_clock_is_not_synchronised(host: Host) -> None:
    host.program("timedatectl", "#!/bin/sh\necho no\n")


@a_host_where("clock_unknown")
def nobody_tells_about_the_clock(host: Host) -> None:
    host.program("timedatectl", "#!/bin/sh\necho 'System has not been booted with systemd' >&2\nexit 1\n")


@a_host_where()
def systemd_timesyncd_tells_about_the_clock(host: Host) -> None:
    nobody_tells_about_the_clock(host)
    host.lay_over_run("systemd/timesync/synchronized")


@a_host_where("sshd_does_not_trust_ca")
def sshd_trusts_no_ca(host: Host) -> None:
    host.configure_sshd("TrustedUserCAKeys none")


@a_host_where("sshd_does_not_trust_ca")
def the_file_of_cas_is_missing(host: Host) -> None:
    (host.folder / "etc" / "ca.pub").unlink()


@a_host_where("sshd_does_not_trust_ca")
def the_ca_is_in_a_comment_only(host: Host) -> None:
    host.write("etc/ca.pub", f"#{host.ca.public_line}\n")


@a_host_where("sshd_does_not_trust_ca")
def another_ca_is_trusted(host: Host) -> None:
    host.write("etc/ca.pub", f"{(host.ca.public_line[:-30])}AAAA other\n")


@a_host_where("sshd_ca_file_unsafe")
def others_may_write_the_file_of_cas(host: Host) -> None:
    (host.folder / "etc" / "ca.pub").chmod(0o664)


@a_host_where("sshd_ca_file_unsafe")
def somebody_owns_the_file_of_cas(host: Host) -> None:
    os.chown(host.folder / "etc" / "ca.pub", 1001, 0)


@a_host_where("principals_file_unsafe")
def others_may_write_the_principals(host: Host) -> None:
    (host.folder / "etc" / "principals").chmod(0o646)


@a_host_where("principals_file_unsafe")
def an_account_owns_its_own_principals(host: Host) -> None:
    path = host.folder / "home" / "llmops" / ".ssh" / "principals"
    path.write_text("llmops\n")
    os.chown(path, 1001, 1001)
    host.configure_sshd("AuthorizedPrincipalsFile .ssh/principals")


@a_host_where("principals_file_unsafe")
def others_may_write_where_the_principals_lie(host: Host) -> None:
    folder = host.folder / "open"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "llmops").write_text("llmops\n")
    host.configure_sshd(f"AuthorizedPrincipalsFile {folder}/%u")


@a_host_where("principals_file_unsafe", "sshd_login_not_proved")
def others_may_write_the_principals_command(host: Host) -> None:
    host.program("principals", "#!/bin/sh\n")
    (host.folder / "bin" / "principals").chmod(0o777)
    host.configure_sshd(
        "AuthorizedPrincipalsFile none",
        f"AuthorizedPrincipalsCommand {host.folder}/bin/principals %u",
        "AuthorizedPrincipalsCommandUser nobody",
    )


@a_host_where("principals_file_missing")
def there_is_no_principals_file(host: Host) -> None:
    (host.folder / "etc" / "principals").unlink()


@a_host_where()
def the_account_is_the_principal(host: Host) -> None:
    host.configure_sshd("AuthorizedPrincipalsFile none")


@a_host_where()
def the_ca_is_trusted_for_one_account_only(host: Host) -> None:
    ca = host.folder / "etc" / "ca.pub"
    host.lay_over(
        "/etc/ssh/sshd_config",
        f"HostKey {host.folder}/etc/host_key\nMatch User llmops\n  TrustedUserCAKeys {ca}\n",
    )


@a_host_where("sshd_does_not_trust_ca")
def the_ca_is_trusted_for_another_account_only(host: Host) -> None:
    the_ca_is_trusted_for_one_account_only(host)
    host.environ["SAFE_SESSION_LOGIN_USER"] = "root"


@a_host_where("sshd_config_unreadable")
def sshd_cannot_read_its_configuration(host: Host) -> None:
    host.configure_sshd("NoSuchWord yes")


@a_host_where("sshd_elsewhere")
def sshd_runs_elsewhere(host: Host) -> None:
    host.configure_sshd("NoSuchWord yes")
    host.arguments += ["--sshd-elsewhere"]


@pytest.mark.parametrize("name", TABLE)
def test_a_prepared_host_is_told_as_it_is(host: Host, name: str) -> None:
    expected, change = TABLE[name]
    change(host)
    told = host.run()
    assert told.codes("FAIL", "warn") == expected, told.stdout
    failed = told.codes("FAIL")
    assert told.returncode == (1 if failed else 0)
    assert all(line.next for line in told.lines if line.status == "FAIL")


def test_a_host_without_sshd_is_warned_only(host: Host) -> None:
    for name in ("bash", "sh", "env", "timeout", "stat", "ls", "head", "sort", "realpath", "sha256sum", "ssh-keygen",
                 "dirname", "cat"):  # fmt: skip
        (host.folder / "bin" / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    (host.folder / "empty").mkdir()
    host.over["/usr/sbin"] = host.folder / "empty"
    told = host.run()
    assert told.codes("FAIL", "warn") == {"sshd_elsewhere"}
    assert told.returncode == 0
    assert told.codes("skip") == {"sshd_trusts_ca", "sshd_accepts_login", "principals_file"}


# --- form ---------------------------------------------------------------------------------------------------------


def test_json_says_the_same_as_the_text(host: Host) -> None:
    host.key.chmod(0o700)
    os.link(host.key, host.key.with_name("o"))
    host.configure_sshd("TrustedUserCAKeys none")
    host.program("timedatectl", "#!/bin/sh\necho no\n")
    (host.folder / "container.txt").unlink()
    text, told = host.run(), host.run("--json")
    found = json.loads(told.stdout)
    assert told.returncode == text.returncode == 1
    assert [(check["status"], check["code"], check["detail"]) for check in found["checks"]] == [
        (line.status, line.code, line.detail) for line in text.lines
    ]
    assert [check["next"] for check in found["checks"]] == [line.next for line in text.lines]
    assert found["summary"] == text.summary
    assert (found["ready"], found["failed"], found["warnings"]) == (False, 4, 2)
    assert found["ok"] == len(text.codes("ok"))
    assert found["skipped"] == len(text.codes("skip"))


def test_json_of_a_ready_host(host: Host) -> None:
    found = json.loads(host.run("--json").stdout)
    assert found["ready"] is True
    assert found["summary"] == f"ready: {found['ok']} ok"


def test_columns_are_aligned_and_a_failure_is_followed_by_what_to_do(host: Host) -> None:
    host.key.chmod(0o700)
    lines = host.run().stdout.splitlines()
    at = lines.index("FAIL  ca_key_mode_must_be_0400_or_0600   it is 0700")
    assert lines[at + 1] == "      chmod 0400 the rendered file, or fix the mode in the render job"
    assert "ok    ca_key_owner               root:root" in lines
    assert lines[-1] == "not ready: 1 failed, 33 ok"


def test_codes_are_listed_and_each_has_been_seen() -> None:
    listed = subprocess.run(["bash", SCRIPT, "--codes"], capture_output=True, text=True, check=True).stdout.split()
    assert len(listed) == len(set(listed))
    said = set(re.findall(r"\b(?:say |skip |verdict |fault=)[^\n]*", SCRIPT.read_text()))
    used = {word for line in said for word in re.findall(r"[a-z]+(?:_[a-z0-9:]+)+", line)}
    assert set(listed) <= used
    here = Path(__file__).parent
    files = [
        *here.glob("test_preflight_*.py"),
        here / "test_audit_compose.py",
        SCRIPT.parents[2] / "tests" / "parts" / "key_forms.py",
    ]
    tests = "".join(path.read_text() for path in files)
    unseen = {code for code in listed if f'"{code}"' not in tests}
    oks = {code for code in unseen if re.search(rf'^    "ok   {code}"$', SCRIPT.read_text(), re.MULTILINE)}
    assert unseen == oks, "no test has seen these fail"


def test_words_for_a_bad_key_are_those_of_the_keeper() -> None:
    keeper = (SCRIPT.parents[2] / "signer" / "ca" / "key.py").read_text()
    keepers = set(re.findall(r'"(ca_key_[a-z0-9_]+)"', keeper)) | {"ca_key_owner_must_be_root:root"}
    # What only a program meets that opens the file itself, signs with it, or is told another owner.
    keepers -= {"ca_key_unreadable", "ca_key_self_test_failed", "ca_key_owner_unknown", "ca_key_replaced"}
    listed = subprocess.run(["bash", SCRIPT, "--codes"], capture_output=True, text=True, check=True).stdout.split()
    assert keepers <= set(listed)
    assert issubclass(BadKeyFile, Exception)


def test_help_names_every_option_and_variable() -> None:
    told = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    script = SCRIPT.read_text()
    options = set(re.findall(r"^\s+(--[a-z-]+)[ |)]", script, re.MULTILINE))
    assert {"--json", "--codes", "--base", "--overlay", "--expect-mode", "--sshd-elsewhere"} <= options
    variables = set(re.findall(r"\b(?:PLATFORM_RUNTIME|SAFE_SESSION)_[A-Z_]+", script))
    assert {name for name in options | variables if name not in told} == set()


@pytest.mark.parametrize(
    "arguments",
    [["--nonsense"], ["extra"], ["--base"], ["--overlay", ""], ["--expect-mode", "shadows"], ["--expect-mode"]],
)
def test_wrong_use_is_told_apart_and_checks_nothing(host: Host, arguments: list[str]) -> None:
    told = host.run(*arguments)
    assert told.returncode == 2
    assert told.stdout == ""
    assert re.fullmatch(r"preflight: error: .+\npreflight: hint: .+\n", told.stderr)


def test_anybody_but_root_is_sent_away(host: Host) -> None:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-s"]
    done = subprocess.run(
        command, input=SCRIPT.read_bytes(), capture_output=True, env=host.environment(), cwd="/", timeout=60
    )
    assert done.returncode == 2
    assert b"run it with sudo" in done.stderr


def test_another_shell_is_sent_away() -> None:
    done = subprocess.run(["sh", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "bash" in done.stderr


def test_a_bare_environment_is_enough(host: Host) -> None:
    done = subprocess.run(["env", "-i", *[f"{k}={v}" for k, v in host.environ.items()], *host.command()],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert "ok    ca_key_parses" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "name, value",
    [("LC_ALL", "C.UTF-8"), ("IFS", "a/:"), ("POSIXLY_CORRECT", "1"), ("CDPATH", "/etc:/usr"), ("TZ", "x"),
     ("SSH_ASKPASS_REQUIRE", "force"), ("LS_COLORS", "fi=31"), ("QUOTING_STYLE", "c"), ("TIME_STYLE", "+%s")],
)  # fmt: skip
def test_the_environment_does_not_change_what_is_said(host: Host, name: str, value: str) -> None:
    before = host.run()
    host.environ[name] = value
    after = host.run()
    assert (after.stdout, after.stderr) == (before.stdout, "")


def test_it_runs_from_anywhere_and_takes_relative_names(host: Host) -> None:
    host.arguments = ["--base", "safe-session.yaml", "--overlay", "./local-ca.yaml"]
    done = subprocess.run(host.command(), capture_output=True, text=True, env=host.environment(),
                          cwd=host.folder / "overlays", timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_program_that_hangs_does_not_hang_it(host: Host) -> None:
    """Programs that never answer are given up, all of them side by side."""
    for name in ("podman-compose", "podman"):
        host.program(name, "#!/bin/sh\nexec sleep 1000\n")
    start = time.monotonic()
    told = host.run()
    print(f"gave up after {time.monotonic() - start:.1f} s")
    assert {"compose_merge_failed", "engine_not_answering"} <= told.codes("FAIL")


def test_a_container_that_ends_while_the_engine_is_asked_fails_nothing(host: Host) -> None:
    host.write("container-ends", "")
    done = subprocess.run(host.command(), capture_output=True, text=True, env=host.environment(), timeout=60)
    assert done.returncode == 0, done.stdout
    assert not (host.folder / "container-ends").exists()


def test_time_of_a_run_is_reported(host: Host, record_property: Callable[[str, object], None]) -> None:
    """With the small programs in place of podman and podman-compose, so this is the script's own share."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert host.run().returncode == 0
        times.append(time.perf_counter() - start)
    record_property("preflight_seconds", min(times))
    print(f"preflight: {min(times):.3f} s")


@pytest.mark.parametrize("what", ["function", "BASH_ENV", "PATH"])
def test_audit_4e4_nothing_that_the_caller_exports_steers_it(host: Host, tmp_path: Path, what: str) -> None:
    """Run as `bash SCRIPT`, as an operator may."""
    before = host.run()
    mark = tmp_path / "it-was-run"
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "stat").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (evil / "stat").chmod(0o755)
    (evil / "env").write_text(f"stat() {{ touch {mark}; }}\n")
    environ = host.environment()
    environ |= {
        "function": {"BASH_FUNC_stat%%": f"() {{ touch {mark}; }}", "BASH_FUNC_say%%": "() { :; }"},
        "BASH_ENV": {"BASH_ENV": str(evil / "env")},
        "PATH": {"PATH": f"{evil}:{environ['PATH']}"},
    }[what]
    command = [word for word in host.command() if word != "-p"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd="/", timeout=60)
    assert done.stdout == before.stdout
    assert not mark.exists()


def test_audit_4e4_foreign_digits_are_no_expression(tmp_path: Path) -> None:
    mark = tmp_path / "it-was-run"
    for foreign in (f"\\u$(touch {mark})", "\\uX[$(touch " + str(mark) + ")]", "\\xa[", "\\u12"):
        words = ["-c", 'source "$1"; value=$2; unescape', "test", str(SCRIPT), foreign]
        done = subprocess.run(["/bin/bash", "-p", *words], capture_output=True, timeout=20, check=False)
        assert done.returncode == 1, foreign
        assert not mark.exists(), foreign
