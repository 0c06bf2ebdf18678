"""`signer init`: what it writes is good, private where it must be, whole or not there, and never over anything."""

from __future__ import annotations

import io
import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from signer.ca.key import load_ca_key
from signer.policy.file import load_policy
from signer.policy.tokens import token_digest
from signer.settings import load_settings
from tests.parts.builders import public_line
from tests.parts.command import run
from tests.parts.documents import ROOT

PIN = "SHA256:" + "P" * 43


def made(folder: Path, *words: str) -> dict[str, Any]:
    ran = run("init", str(folder), "--yes", "--json", *words)
    assert ran.status == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def settings_of(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if not line.startswith("#"))


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


def test_what_it_writes_for_a_host_is_what_a_start_needs(tmp_path: Path) -> None:
    folder = tmp_path / "etc" / "signer"
    old = os.umask(0o077)
    try:
        told = made(folder, "--operator", "alice", "--role", "deploy", "--principal", "llmops")
    finally:
        os.umask(old)
    assert modes(folder) == {
        "policy.toml": 0o644, "environment": 0o644, "client": 0o644, "alice.token": 0o400, "ca": 0o400,
    }  # fmt: skip
    policy = load_policy(folder / "policy.toml")
    settings = load_settings(settings_of(folder / "environment"))
    key = load_ca_key(settings.ca_key_file, settings.ca_key_owner, policy.ca.fingerprint)
    assert key.fingerprint == policy.ca.fingerprint == told["ca_fingerprint"]
    assert policy.roles["deploy"].principals == ("llmops",)
    (token,) = policy.tokens.values()
    assert (token.identity, token.sha256) == ("alice", token_digest((folder / "alice.token").read_text().strip()))
    assert policy.identities["alice"].roles == {"deploy"}
    client = settings_of(folder / "client")
    assert client["SAFE_SESSION_TOKEN_FILE"] == str(folder / "alice.token")
    assert "SAFE_SESSION_PUBLISHERS_FILE" not in client, "the key is made when the service starts"
    checked = run("policy", "check", str(folder / "policy.toml"))
    assert (checked.status, checked.err) == (0, "")


@pytest.mark.parametrize(
    "role, principal, opens_all",
    [
        ("root", "root", True), ("ops", "root", True), ("prod-admin", "deploy", True), ("llmops", "llmops", False),
        ("Administrator", "x", True), ("chroots", "rooted", False),
    ],
)  # fmt: skip
def test_a_role_that_opens_everything_is_written_for_keys_of_openssh_alone(
    tmp_path: Path, role: str, principal: str, opens_all: bool
) -> None:
    made(tmp_path / "new", "--role", role, "--principal", principal)
    path = tmp_path / "new" / "policy.toml"
    text = path.read_text()
    assert ("# approval = " in text) is opens_all
    assert load_policy(path).roles[role].approval is None
    if not opens_all:
        return
    key = f'approval_keys = [{{ kind = "ssh", key = "{public_line("sk-ssh-ed25519@openssh.com")}" }}]'
    text = text.replace("# approval = ", "approval = ").replace('may = ["', f'{key}\nmay = ["approve", "')
    path.write_text(text)
    approval = load_policy(path).roles[role].approval
    assert approval is not None
    assert approval.key_kinds == {"ssh"}


COMBINATIONS = [
    (runs_in, source, words)
    for runs_in in ("host", "container")
    for source in ("new", "infisical", "systemd-creds", "ssh-agent")
    for words in ((), ("--ca-fingerprint", PIN))
    if (source, bool(words)) not in (("new", True), ("ssh-agent", False))
]


@pytest.mark.parametrize("runs_in, source, words", COMBINATIONS)
def test_all_that_it_writes_passes_the_check_and_ends_with_three_commands_up_to_a_login(
    tmp_path: Path, runs_in: str, source: str, words: tuple[str, ...]
) -> None:
    folder = tmp_path / "new"
    ran = run("init", str(folder), "--yes", "--for", runs_in, "--ca", source, *words)
    assert ran.status == 0, ran.err
    checked = run("policy", "check", str(next(folder.rglob("policy.toml"))))
    assert (checked.status, checked.err) == (0, "")
    _, _, last = ran.out.partition("\nnext:\n")
    commands = [line.strip() for line in last.splitlines() if line.startswith("     ")]
    assert len(commands) == 3
    start, trust, login = commands
    on_host = "systemctl enable --now signer-api.socket" if source == "systemd-creds" else "signer serve"
    assert ("scripts/container/compose" if runs_in == "container" else on_host) in start
    assert trust == "signer hosts install root@HOST --principals llmops=llmops"
    assert login.endswith("safe-session ssh llmops@HOST")
    assert "curl" not in ran.out


def test_a_role_may_have_several_principals(tmp_path: Path) -> None:
    told = made(tmp_path / "new", "--principal", "llmops", "--principal", "deploy")
    role = load_policy(tmp_path / "new" / "policy.toml").roles["llmops"]
    assert role.principals == role.default_principals == ("llmops", "deploy")
    assert "signer hosts install root@HOST --principals llmops=llmops,deploy" in [
        step["command"] for step in told["next"]
    ]


def test_a_credential_is_given_to_the_unit_by_a_file(tmp_path: Path) -> None:
    told = made(tmp_path / "new", "--ca", "systemd-creds")
    (line,) = [step["command"] for step in told["next"] if "LoadCredentialEncrypted" in step["command"]]
    unit = tmp_path / "unit"
    script = line.replace("/etc/systemd/system/signer-keeper.service.d", str(unit))
    subprocess.run(["sh", "-c", script], check=True, timeout=30)
    assert (unit / "ca.conf").read_text() == (
        f"[Service]\nEnvironmentFile={tmp_path}/new/environment\nLoadCredentialEncrypted=ca:{tmp_path}/new/ca.cred\n"
    )


def test_the_policy_of_a_container_lies_in_a_folder_without_a_secret(tmp_path: Path) -> None:
    made(tmp_path / "new", "--for", "container")
    assert modes(tmp_path / "new") == {
        "policy/policy.toml": 0o644, "compose.env": 0o644, "client": 0o644, "operator.token": 0o400, "ca-key/ca": 0o400,
    }  # fmt: skip
    variables = settings_of(tmp_path / "new" / "compose.env")
    assert variables["PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR"] == str(tmp_path / "new" / "policy")
    assert variables["PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR"] == str(tmp_path / "new" / "ca-key")
    assert (tmp_path / "new" / "ca-key").stat().st_mode & 0o777 == 0o700


def test_what_a_shell_exports_does_not_beat_what_was_written_for_compose(tmp_path: Path) -> None:
    told = made(tmp_path / "new", "--for", "container")
    (start,) = [step["command"] for step in told["next"] if "scripts/container/compose" in step["command"]]
    compose = "#!/bin/sh\ncase $* in version | *config) exit 0 ;; esac\nenv; printf '%s\\n' \"$@\"\n"
    (tmp_path / "podman-compose").write_text(compose)
    (tmp_path / "podman-compose").chmod(0o755)
    exported = {"PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR": "/elsewhere", "PLATFORM_RUNTIME_SAFE_SESSION_IMAGE": "mine"}
    done = subprocess.run(
        ["bash", "-c", f"{start}; echo after: $PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **exported},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert f"PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR={tmp_path / 'new' / 'policy'}" in lines
    assert "PLATFORM_RUNTIME_SAFE_SESSION_IMAGE=mine" in lines  # what it does not say is the shell's
    assert lines[-3:] == ["up", "-d", "after: /elsewhere"]


def test_a_strict_umask_hides_nothing_from_the_user_of_the_service(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made(tmp_path / "new", "--for", "container")
    finally:
        os.umask(before)
    for name in (".", "policy", "vault"):
        assert (tmp_path / "new" / name).stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("source", ["infisical", "systemd-creds"])
def test_a_key_that_is_elsewhere_is_pinned_and_none_is_made(tmp_path: Path, source: str) -> None:
    told = made(tmp_path / "new", "--ca", source, "--ca-fingerprint", PIN)
    assert not (tmp_path / "new" / "ca").exists()
    assert load_policy(tmp_path / "new" / "policy.toml").ca.fingerprint == PIN
    assert not any("shred" in step["command"] for step in told["next"])
    made_here = made(tmp_path / "other", "--ca", source)
    assert any("shred" in step["command"] for step in made_here["next"])


def test_a_container_with_an_encrypted_key_has_it_decrypted_by_the_unit(tmp_path: Path) -> None:
    told = made(tmp_path / "new", "--for", "container", "--ca", "systemd-creds")
    variables = settings_of(tmp_path / "new" / "compose.env")
    assert variables["PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR"] == "/run/signer-ca"
    unit = (ROOT / "scripts" / "systemd" / "signer-ca-credential.service").read_text()
    assert "LoadCredentialEncrypted=ca:/etc/signer/ca.cred\n" in unit
    key = tmp_path / "new" / "ca-key" / "ca"
    assert key.stat().st_mode & 0o777 == 0o400
    encrypts, enables, starts = (step["command"] for step in told["next"][:3])
    assert encrypts.endswith(f"systemd-creds encrypt --name=ca {key} /etc/signer/ca.cred && shred -u {key}")
    assert enables == "systemctl enable --now signer-ca-credential"
    assert "-f overlays/safe-session-local-ca.yaml up -d" in starts


def test_a_key_in_an_agent_is_asked_for_at_its_socket(tmp_path: Path) -> None:
    told = made(tmp_path / "new", "--ca", "ssh-agent", "--ca-fingerprint", PIN)
    lines = (tmp_path / "new" / "environment").read_text().splitlines()
    settings = load_settings(dict(line.split("=", 1) for line in lines if not line.startswith("#")))
    assert (settings.ca_key_source, str(settings.ca_agent_socket)) == ("agent", "/run/signer-agent/agent.sock")
    assert not any(line.startswith("SIGNER_CA_KEY_FILE") for line in lines)
    assert not (tmp_path / "new" / "ca").exists()
    commands = [step["command"] for step in told["next"]]
    (adds,) = (number for number, command in enumerate(commands) if "ssh-add -s" in command)
    (starts,) = (number for number, command in enumerate(commands) if "signer serve" in command)
    assert adds < starts


def test_a_container_with_a_key_in_an_agent_gets_the_overlay_for_it(tmp_path: Path) -> None:
    told = made(tmp_path / "new", "--for", "container", "--ca", "ssh-agent", "--ca-fingerprint", PIN)
    assert (
        "PLATFORM_RUNTIME_SAFE_SESSION_CA_AGENT_DIR=/run/signer-agent\n"
        in (tmp_path / "new" / "compose.env").read_text()
    )
    (start,) = (step["command"] for step in told["next"] if "scripts/container/compose" in step["command"])
    assert "-f overlays/safe-session-agent.yaml up -d" in start
    assert "local-ca" not in start


def test_the_secrets_are_in_their_files_alone(tmp_path: Path) -> None:
    ran = run("init", str(tmp_path / "new"), "--yes")
    token = (tmp_path / "new" / "operator.token").read_text().strip()
    others = "".join(p.read_text() for p in (tmp_path / "new").iterdir() if p.suffix != ".token" and p.name != "ca")
    assert token not in ran.out + ran.err + others
    assert "PRIVATE KEY" not in ran.out + ran.err + others


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("mine")
    ran = run("init", str(tmp_path), "--yes")
    assert ran.status == 1
    assert "is there and not an empty directory" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["policy.toml"]
    assert (tmp_path / "policy.toml").read_text() == "mine"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _content: bytes, _mode: int) -> None:
        if path.name == "client":
            raise OSError(28, "No space left on device")
        path.write_bytes(b"x")

    monkeypatch.setattr("signer.files.write_new", full)
    ran = run("init", str(tmp_path / "new"), "--yes")
    assert ran.status == 1
    assert "client (in DIR) cannot be written: No space left on device" in ran.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--ca-fingerprint", PIN], "cannot be new"),
        (["--ca", "ssh-agent"], "give --ca-fingerprint"),
        (["--role", "a b"], "policy"),
        (["--principal", "a\nb"], "policy"),
        (["--principal", "\udcff"], "policy"),
        (["--platform", "a\nb"], "platform's name"),
    ],
)
def test_answers_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path, words: list[str], said: str
) -> None:
    ran = run("init", str(tmp_path / "new"), "--yes", *words)
    assert ran.status == 1
    assert said in ran.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a b", "$(id)", "a\nSIGNER_MODE=vault", "a;b", "\udcff", "a'b"])
def test_a_directory_that_a_shell_would_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    ran = run("init", str(tmp_path / name), "--yes")
    assert ran.status == 1
    assert "the directory cannot be" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_it_asks_for_what_no_flag_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("edge\n\nbob\n\n\n"))
    ran = run("init", str(tmp_path / "new"), "--role", "deploy")
    assert ran.status == 0, ran.err
    assert "platform [" in ran.err
    assert "role [" not in ran.err
    assert "principals, with commas [deploy]" in ran.err
    policy = load_policy(tmp_path / "new" / "policy.toml")
    assert set(policy.identities) == {"bob"}
    assert policy.roles["deploy"].principals == ("deploy",)
    assert "on edge" in (tmp_path / "new" / "policy.toml").read_text()


@pytest.mark.parametrize("source, pin, status", [("infisical", PIN, 0), ("infisical", "", 0), ("ssh-agent", "x", 1)])
def test_on_a_terminal_it_asks_which_key_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, pin: str, status: int
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"edge\nllmops\nllmops, deploy\nbob\nhost\n{source}\n{pin}\n"))
    ran = run("init", str(tmp_path / "new"))
    assert ran.status == status, ran.err
    assert "fingerprint of the CA key, if there is one [none]" in ran.err
    if status:
        assert "the CA key's fingerprint cannot be x" in ran.err
        assert not (tmp_path / "new").exists()
        return
    policy = load_policy(tmp_path / "new" / "policy.toml")
    assert policy.roles["llmops"].principals == ("llmops", "deploy")
    assert (policy.ca.fingerprint == PIN) is bool(pin)


@pytest.mark.parametrize("source", ["new", "infisical", "ssh-agent"])
def test_an_ordinary_user_gets_places_that_are_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(os, "geteuid", lambda: nobody.pw_uid)
    monkeypatch.setattr(os, "getegid", lambda: nobody.pw_gid)
    pinned = () if source == "new" else ("--ca-fingerprint", PIN)
    told = made(tmp_path / "new", "--ca", source, *pinned)
    settings = settings_of(tmp_path / "new" / "environment")
    assert settings.get("SIGNER_CA_KEY_OWNER", "nobody:nogroup") == "nobody:nogroup"
    assert "SIGNER_KEEPER_USER" not in settings
    run_dir = f"/run/user/{nobody.pw_uid}"
    key = settings.get("SIGNER_CA_KEY_FILE") or settings["SIGNER_CA_AGENT_SOCKET"]
    assert key.startswith(str(tmp_path) if source == "new" else run_dir)
    commands = " ".join(step["command"] for step in told["next"])
    assert not any(word in commands for word in ("useradd", "runuser", "systemctl", " /run/signer"))
    refused = run("init", str(tmp_path / "other"), "--yes", "--ca", "systemd-creds")
    assert (refused.status, "cannot be systemd-creds" in refused.err) == (1, True)
