"""What of the command line is ours and what goes to ssh or the command untouched."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.safe_session.arguments import SHORT_TTL, parse_arguments, read_duration
from signer.safe_session.command import SSH_OPTIONS, ssh_command
from signer.safe_session.statuses import UsageError

# words after `safe-session` → what ssh is given, and what we take for ourselves
SSH = [
    ("ssh rs2000", "rs2000", {}),
    ("ssh rs2000 uptime", "rs2000 uptime", {}),
    ("ssh rs2000 --principal root", "rs2000", {"principals": ["root"]}),
    ("ssh --principal root rs2000", "rs2000", {"principals": ["root"]}),
    ("ssh --principal=root rs2000", "rs2000", {"principals": ["root"]}),
    ("ssh rs2000 --principal root uptime", "rs2000 uptime", {"principals": ["root"]}),
    ("ssh rs2000 --principal a --principal b", "rs2000", {"principals": ["a", "b"]}),
    ("--principal a ssh --principal b rs2000", "rs2000", {"principals": ["a", "b"]}),
    ("--role r --ttl 5m --reason why ssh h", "h", {"role": "r", "ttl": "5m", "reason": "why"}),
    ("ssh h --role r --ttl 5m --reason why", "h", {"role": "r", "ttl": "5m", "reason": "why"}),
    # The remote command is never looked at.
    ("ssh rs2000 uptime --principal root", "rs2000 uptime --principal root", {}),
    ("ssh rs2000 grep --role x -v -p", "rs2000 grep --role x -v -p", {}),
    ("ssh rs2000 sudo --help", "rs2000 sudo --help", {}),
    ("ssh rs2000 -- --role x", "rs2000 -- --role x", {}),
    ("ssh -- rs2000 --role x", "-- rs2000 --role x", {}),
    ("ssh rs2000 cmd -- --role x", "rs2000 cmd -- --role x", {}),
    # ssh's options that take a value, so that the value is not taken for the host.
    ("ssh -p 22 rs2000 --role r", "-p 22 rs2000", {"role": "r"}),
    ("ssh -p22 rs2000 cmd --role r", "-p22 rs2000 cmd --role r", {}),
    ("ssh -o User=x -i k rs2000 cmd --role r", "-o User=x -i k rs2000 cmd --role r", {}),
    ("ssh -oUser=x rs2000 cmd --role r", "-oUser=x rs2000 cmd --role r", {}),
    ("ssh -tt rs2000 cmd --role r", "-tt rs2000 cmd --role r", {}),
    ("ssh -tp 22 rs2000 --role r", "-tp 22 rs2000", {"role": "r"}),
    ("ssh -tp22 rs2000 cmd", "-tp22 rs2000 cmd", {}),
    ("ssh -J a,b -L 1:h:2 -W h:3 rs2000", "-J a,b -L 1:h:2 -W h:3 rs2000", {}),
    ("ssh rs2000 -p 22 cmd --role r", "rs2000 -p 22 cmd --role r", {}),
    ("ssh rs2000 -p 22 --role r cmd", "rs2000 -p 22 cmd", {"role": "r"}),
    ("ssh -o --role rs2000", "-o --role rs2000", {}),  # the value of -o, as ssh sees it
    ("ssh -v rs2000", "-v rs2000", {"verbose": False}),  # ssh's own -v
    ("-v ssh rs2000", "rs2000", {"verbose": True}),
    ("ssh ssh://u@h:22", "ssh://u@h:22", {}),
    ("ssh ssh", "ssh", {}),
    ("--json --wait 1m ssh h", "h", {"json": True, "wait": 60}),
    ("ssh h --wait=0 --json cmd --json", "h cmd --json", {"json": True, "wait": 0}),
]

EXEC = [
    ("exec -- ssh h --role x", "ssh h --role x", {}),
    ("exec --role r -- ssh h", "ssh h", {"role": "r"}),
    ("--role r exec -- ssh h", "ssh h", {"role": "r"}),
    ("exec rsync -a x h:", "rsync -a x h:", {}),
    ("exec --reason why rsync --role x", "rsync --role x", {"reason": "why"}),
    ("exec -v -- true", "true", {"verbose": True}),
    ("exec -- -- x", "-- x", {}),
    ("exec -- -v", "-v", {}),
]


@pytest.mark.parametrize("line,passed,ours", SSH)
def test_ssh_words_are_passed_and_ours_are_taken(line: str, passed: str, ours: dict[str, object]) -> None:
    asked = parse_arguments(line.split())
    assert asked.verb == "ssh"
    assert asked.command == passed.split()
    defaults = {"role": "", "reason": "", "ttl": "", "principals": []}
    assert {name: getattr(asked, name) for name in defaults | ours} == defaults | ours


@pytest.mark.parametrize("line,passed,ours", EXEC)
def test_exec_takes_ours_before_the_command_only(line: str, passed: str, ours: dict[str, object]) -> None:
    asked = parse_arguments(line.split())
    assert (asked.verb, asked.command) == ("exec", passed.split())
    assert {name: getattr(asked, name) for name in ours} == ours


@pytest.mark.parametrize(
    "line,complaint",
    [
        ("", "no command given"),
        ("-v", "no command given"),
        ("login h", "unknown command login"),
        ("--rôle x ssh h", "unknown option --rôle"),
        ("-x ssh h", "unknown option -x"),
        ("ssh", "no host given"),
        ("ssh --", "no host given"),
        ("ssh -p 22", "no host given"),
        ("ssh -p", "ssh option -p has no value"),
        ("ssh -tp", "ssh option -tp has no value"),
        ("ssh --foo h", "unknown option --foo"),
        ("ssh h --role", "--role has no value"),
        ("ssh h --role --ttl 5m", "--role has no value"),
        ("ssh h --role=", "--role has no value"),
        ("ssh h --role a --role b", "--role is given twice"),
        ("--ttl 5m ssh h --ttl 6m", "--ttl is given twice"),
        ("ssh h --ttl soon", "--ttl soon is not a duration"),
        ("ssh h --ttl 0", "--ttl 0 is not a duration"),
        ("ssh h --ttl -5m", "--ttl -5m is not a duration"),
        ("ssh h --ttl 1d", "--ttl 1d is not a duration"),
        ("ssh h --ttl m", "--ttl m is not a duration"),
        ("exec", "no command given"),
        ("exec --", "no command given"),
        ("exec -x -- true", "unknown option -x"),
        ("ssh h --json=yes", "--json takes no value"),
        ("ssh h --wait", "--wait has no value"),
        ("ssh h --wait soon", "--wait soon is not a duration"),
        ("--wait 0 ssh h --wait 5", "--wait is given twice"),
        ("--wait 5 --no-wait ssh h", "--wait and --no-wait exclude each other"),
        ("ssh --exact h", "--exact needs a remote command"),
        ("exec --exact -- true", "--exact is an option of `ssh`"),
        ("--exact whoami", "--exact is an option of `ssh`"),
        ("whoami me", 'unexpected argument "me"'),
        ("wait", "no request given"),
        ("withdraw --json", "no request given"),
        ("wait r-a r-b", 'unexpected argument "r-b"'),
        ("wait r-a --for soon", "--for soon is not a duration"),
        ("requests --for 5s", "unknown option --for"),
        ("ssh --for 5s h", "unknown option --for"),
    ],
)
def test_what_cannot_be_understood_is_a_usage_error(line: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arguments(line.split())
    assert caught.value.text == complaint
    assert caught.value.hint


@pytest.mark.parametrize("line", ["--help", "-h", "ssh --help", "ssh h --help", "exec --help", "exec -h", "-v --help"])
def test_help_is_given_wherever_it_is_asked_before_the_command(line: str) -> None:
    assert parse_arguments(line.split()).verb == "help"


def test_the_version_is_told() -> None:
    assert parse_arguments(["--version"]).verb == "version"


@pytest.mark.parametrize(
    "line,remote",
    [
        ("ssh h", ""),
        ("ssh h uptime -a", "uptime -a"),
        ("ssh -p 22 h -v uptime", "uptime"),
        ("ssh h -- uptime -a", "uptime -a"),
        ("ssh -- h uptime", "uptime"),
        ("ssh -p 22 -- h -v", "-v"),
    ],
)
def test_the_remote_command_is_what_ssh_takes_for_it(line: str, remote: str) -> None:
    assert parse_arguments(line.split()).remote == remote.split()


def test_exact_forces_the_remote_command_as_ssh_sends_it() -> None:
    asked = parse_arguments(["ssh", "h", "--exact", "sh", "-c", "a  b"])
    assert asked.force_command() == "sh -c a  b"
    assert asked.command == ["h", "sh", "-c", "a  b"]
    assert parse_arguments(["ssh", "h", "sh"]).force_command() == ""


@pytest.mark.parametrize(
    "line,sets",
    [
        ("ssh h", False),
        ("ssh -o ControlPersist=10m h", True),
        ("ssh -ocontrolpersist=no h", True),
        ("ssh -to ControlPersist=yes h", True),
        ("ssh h -o ControlPersist=yes x", True),
        ("ssh -o ControlPath=ControlPersist h", False),
        ("ssh h echo -o ControlPersist=yes", False),
        ("ssh -i ControlPersist h", False),
    ],
)
def test_a_control_persist_of_the_command_line_is_seen(line: str, sets: bool) -> None:
    assert parse_arguments(line.split()).sets_persist == sets


@pytest.mark.parametrize("words", ["whoami", "requests", "wait r-a", "withdraw r-a"])
def test_questions_run_nothing(words: str) -> None:
    asked = parse_arguments([*words.split(), "--json"])
    assert (asked.verb, asked.request, asked.command, asked.json) == (
        words.split(maxsplit=1)[0], " ".join(words.split()[1:]), [], True,
    )  # fmt: skip
    assert parse_arguments(["--wait", "3s", *words.split()]).wait == 3
    assert parse_arguments([*words.split(), "-h"]).verb == "help"


def test_wait_says_for_how_long() -> None:
    assert parse_arguments(["wait", "r-a", "--for", "50s"]).wait == 50


@pytest.mark.parametrize("text,seconds", [("1", 1), ("900", 900), ("15m", 900), ("1h", 3600), ("30s", 30)])
def test_times_are_read(text: str, seconds: int) -> None:
    assert read_duration("--ttl", text) == seconds


@pytest.mark.parametrize(
    "line,seconds",
    [
        ("ssh h", SHORT_TTL),
        ("ssh h uptime", SHORT_TTL),
        ("exec -- ssh h uptime", SHORT_TTL),
        ("exec -- /usr/bin/scp a h:", SHORT_TTL),
        ("exec rsync -a x h:", SHORT_TTL),
        ("exec sftp h", SHORT_TTL),
        # They may log in again after minutes.
        ("exec -- bash", 0),
        ("exec -- git fetch", 0),
        ("exec -- ansible-playbook site.yml", 0),
        ("ssh h --ttl 5m", 0),
        ("--ttl 5m exec -- ssh h", 0),
    ],
)
def test_a_single_login_asks_for_two_minutes(line: str, seconds: int) -> None:
    assert parse_arguments(line.split()).short_ttl() == seconds


def test_a_reason_may_hold_anything_in_one_word() -> None:
    asked = parse_arguments(["ssh", "--reason", "restart the queue, ticket 812", "h", "--principal", "-x"])
    assert (asked.reason, asked.principals) == ("restart the queue, ticket 812", ["-x"])


WORDS = (
    "ssh", "exec", "wait", "--", "-", "-p", "-v", "--role", "--role=x", "x", "-tp", "--help", "--exact", "-o", "",
)  # fmt: skip


@given(st.lists(st.sampled_from(WORDS)))
def test_no_words_raise_anything_but_usage_errors(words: list[str]) -> None:
    with contextlib.suppress(UsageError):
        parse_arguments(words)


@given(st.lists(st.text()))
def test_a_remote_command_is_passed_untouched_whatever_it_is(words: list[str]) -> None:
    assert parse_arguments(["ssh", "host", "command", *words]).command == ["host", "command", *words]
    assert parse_arguments(["exec", "--", "command", *words]).command == ["command", *words]


def test_our_options_come_first_because_ssh_keeps_the_first_value() -> None:
    command = ssh_command(["-o", "IdentityAgent=/other", "host"])
    assert command[0] == "ssh"
    assert command[-3:] == ["-o", "IdentityAgent=/other", "host"]
    assert command.index("IdentityAgent=SSH_AUTH_SOCK") < command.index("IdentityAgent=/other")
    assert len(command) == 1 + 2 * len(SSH_OPTIONS) + 3
