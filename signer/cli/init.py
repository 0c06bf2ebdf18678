"""`signer init`: writes a first policy, settings, token and CA key into one directory. It overwrites nothing."""

from __future__ import annotations

import grp
import os
import pwd
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import click

from signer.cli import output
from signer.cli.arguments import FILE, FINGERPRINT, IDENTITY, OneOf
from signer.cli.parser import verb
from signer.errors import SignerError, write_hint
from signer.hardening import forbid_dumps
from signer.units import plain, timestamp

HOST, CONTAINER = "host", "container"
NEW, INFISICAL, CREDENTIAL, AGENT = KEY_SOURCES = ("new", "infisical", "systemd-creds", "ssh-agent")
TOKEN_DAYS: Final = 90
_DAY: Final = 86_400
_ADDRESS: Final = "127.0.0.1:8222"
_OVERLAYS: Final = "-f overlays/safe-session.yaml -f overlays/safe-session-{}.yaml"
_USERS: Final = ("signer-keeper", "signer-api")
_ADD_USER: Final = "useradd --system --user-group --shell /usr/sbin/nologin"
_PATH: Final = re.compile(r"[A-Za-z0-9._@+:/-]+")
# Names of roles and principals that open everything on a host.
_ROOT_LIKE: Final = re.compile(
    r"(?:^|[._@-])(?:root|toor|admin(?:istrators?|s)?|sudo(?:ers)?|wheel|superuser)(?:$|[._@-])"
)
_CREDENTIAL: Final = "/run/credentials/signer-keeper.service/ca"
_ENCRYPTED: Final = Path("/etc/signer/ca.cred")  # where signer-ca-credential.service looks
_NO_KEY: Final = "none"
_DROP_IN: Final = "/etc/systemd/system/signer-keeper.service.d"
_UNITS: Final = "systemctl daemon-reload && systemctl enable --now signer-api.socket signer-keeper signer-api"
_IMAGE_KEEPER: Final = 8221  # the number of the keeper's user in the image


@dataclass(frozen=True, slots=True)
class Answers:
    platform: str
    role: str
    principals: tuple[str, ...]
    operator: str
    runs_in: str
    key_from: str


class Layout:
    """The paths of an installation in `folder`.

    A container mounts the folder of the policy, that of the key and that of Vault's token, and sees all that is in
    them: nothing else may lie there. `private` directories are root's alone; `key_in_use` is what the service reads, or
    the socket of the agent that holds the key.
    """

    def __init__(self, folder: Path, answers: Answers) -> None:
        in_container = answers.runs_in == CONTAINER
        self.folder, self.answers = folder, answers
        self.policy = folder / ("policy/policy.toml" if in_container else "policy.toml")
        self.key = folder / ("ca-key/ca" if in_container else "ca")
        self.service = folder / ("compose.env" if in_container else "environment")
        self.client = folder / "client"
        self.token = folder / f"{answers.operator}.token"
        self.directories = [folder, self.policy.parent, folder / "vault"] if in_container else [folder]
        self.private_directories = [self.key.parent] if in_container else []
        run = "/run" if in_container or os.geteuid() == 0 else f"/run/user/{os.geteuid()}"
        rendered, agent = f"{run}/signer-ca/ca", f"{run}/signer-agent/agent.sock"
        decrypted = rendered if in_container else _CREDENTIAL
        places = {NEW: str(self.key), INFISICAL: rendered, CREDENTIAL: decrypted, AGENT: agent}
        self.key_in_use = places[answers.key_from]


@verb("init", "signer init /etc/signer", "signer init /etc/safe-session --for container --operator alice --yes")
@click.argument("folder", type=FILE, metavar="DIR", help="a directory that does not exist, or an empty one")
@click.option("--platform", metavar="NAME", help="default: the name of this host")
@click.option("--role", metavar="NAME", help="the first role; default llmops")
@click.option(
    "--principal",
    "principals",
    multiple=True,
    metavar="NAME",
    help="as sshd matches; repeat for more; default: the role's",
)
@click.option("--operator", type=IDENTITY, metavar="IDENTITY", help="the first operator; default operator")
@click.option("--for", "runs_in", type=OneOf((HOST, CONTAINER)), help="default host")
@click.option("--ca", "key_from", type=OneOf(KEY_SOURCES), help="where the CA key comes from; default new")
@click.option("--ca-fingerprint", type=FINGERPRINT, metavar="SHA256:…", help="pin this existing key; create none")
@click.option("--yes", is_flag=True, help="ask nothing; take the defaults")
def init(
    *,
    folder: Path,
    platform: str | None,
    role: str | None,
    principals: tuple[str, ...],
    operator: str | None,
    runs_in: str | None,
    key_from: str | None,
    ca_fingerprint: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Writes policy.toml, the settings of service and client, the operator's token (0400) and a CA key (0400), and
    shows the next commands: what this host lacks, then three up to a login. On a terminal it asks for what no flag
    says."""
    forbid_dumps()
    ask = output.ask if not yes and sys.stdin is not None and sys.stdin.isatty() else lambda _question, default: default
    platform = platform or ask("platform", os.uname().nodename)
    role = role or ask("role", "llmops")
    answers = Answers(
        platform=platform,
        role=role,
        principals=principals or tuple(word.strip() for word in ask("principals, with commas", role).split(",")),
        operator=operator or ask("first operator", "operator"),
        runs_in=runs_in or ask(f"runs on the {HOST} or in a {CONTAINER}", HOST),
        key_from=key_from or ask(f"CA key: {_or(KEY_SOURCES)}", NEW),
    )
    if ca_fingerprint is None and answers.key_from in KEY_SOURCES and answers.key_from != NEW:
        ca_fingerprint = _read_fingerprint(ask("fingerprint of the CA key, if there is one", _NO_KEY))
    _check_answers(answers, ca_fingerprint)
    layout = Layout(folder.absolute(), answers)
    if _PATH.fullmatch(str(layout.folder)) is None:  # shells read the files that name it
        raise _unusable("the directory", str(layout.folder), "use letters, digits and . _ @ + : - only")
    fingerprint = _write(layout, ca_fingerprint)
    steps = _next_steps(layout, fingerprint, is_new=ca_fingerprint is None)
    if as_json:
        files = sorted(str(path) for path in layout.folder.rglob("*") if path.is_file())
        listed = [{"command": command, "purpose": purpose} for purpose, command in [*steps.before, *steps.following]]
        output.show_json({"files": files, "ca_fingerprint": fingerprint, "next": listed})
        return
    _show(layout, fingerprint, steps)


def _read_fingerprint(word: str) -> str | None:
    if word == _NO_KEY:
        return None
    try:
        return str(FINGERPRINT.convert(word, None, None))
    except click.UsageError as error:
        raise _unusable("the CA key's fingerprint", word, error.message) from None


def _check_answers(answers: Answers, fingerprint: str | None) -> None:
    if answers.runs_in not in (HOST, CONTAINER):
        raise _unusable("where it runs", answers.runs_in, f"write {HOST} or {CONTAINER}")
    if answers.key_from not in KEY_SOURCES:
        raise _unusable("where the CA key comes from", answers.key_from, f"write {_or(KEY_SOURCES)}")
    if not answers.platform.isprintable() or len(answers.platform) > 64:
        raise _unusable("the platform's name", answers.platform, "use at most 64 printable characters")
    if answers.key_from == NEW and fingerprint is not None:
        raise _unusable("where the CA key comes from", NEW, "leave out --ca-fingerprint, or name another source")
    if answers.key_from == AGENT and fingerprint is None:
        raise _unusable(
            "where the CA key comes from",
            AGENT,
            "give --ca-fingerprint, as `ssh-add -l` shows it, or name another source",
        )

    if answers.key_from == CREDENTIAL and os.geteuid() != 0:
        raise _unusable("where the CA key comes from", CREDENTIAL, "only root gives a unit its credential: be root")


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _unusable(what: str, value: str, hint: str) -> SignerError:
    return SignerError("init_answer_unusable", f"{what} cannot be {plain(value[:80])}", hint)


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(layout: Layout, fingerprint: str | None) -> str:
    """Writes all files, or none; returns the fingerprint of the CA key."""
    from signer.ca.key import KeyMaterial
    from signer.ca.render import create
    from signer.policy.tokens import SECRET_BYTES, render_token, token_digest

    made: list[Path] = []
    try:
        for directory in layout.directories:
            made += _make_directory(directory)
        for directory in layout.private_directories if fingerprint is None else []:
            made += _make_directory(directory, mode=0o700)
        if fingerprint is None:
            fingerprint = create(layout.key, lambda: KeyMaterial.generate("ed25519")).fingerprint
            made.append(layout.key)
        token = render_token(os.urandom(SECRET_BYTES))
        ends = timestamp(int(time.time()) + TOKEN_DAYS * _DAY)
        for path, content, mode in (
            (layout.policy, _policy_text(layout.answers, fingerprint, token_digest(token), ends), 0o644),
            (layout.service, _service_text(layout), 0o644),
            (layout.client, _client_text(layout), 0o644),
            (layout.token, f"{token}\n", 0o400),
        ):
            _write_file(path, content, mode)
            made.append(path)
        _check_written(layout, fingerprint)
    except BaseException:
        for path in reversed(made):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
        raise
    return fingerprint


def _make_directory(path: Path, mode: int = 0o755) -> list[Path]:
    """The directory if it was created; raises `SignerError` if it is there and has something in it."""
    try:
        path.mkdir(mode=mode, parents=True)
        path.chmod(mode)  # whatever the umask: the keeper's user has to reach the policy
    except FileExistsError:
        if path.is_dir() and not any(path.iterdir()):
            return []
        raise SignerError(
            "init_target_not_empty",
            f"{plain(path)} is there and not an empty directory",
            "nothing is overwritten: name another directory",
        ) from None
    except OSError as error:
        raise _not_written(path, error) from None
    return [path]


def _write_file(path: Path, content: str, mode: int) -> None:
    from signer.files import os_errors, sync_directory, write_new

    with os_errors(lambda error: _not_written(path, error)):
        write_new(path, os.fsencode(content), mode)  # an answer that is not text is found when it is read back
        path.chmod(mode)  # whatever the umask: a policy that others may write is refused, and one they cannot read, too
        sync_directory(path.parent)


def _not_written(path: Path, error: OSError) -> SignerError:
    hint = f"{write_hint(error, plain(path.parent))}, or name another directory"
    return SignerError("init_not_written", f"{plain(path)} cannot be written: {error.strerror}", hint)


def _check_written(layout: Layout, fingerprint: str) -> None:
    """Reads the files back as the service will; raises `SignerError`."""
    from signer.policy.file import load_policy
    from signer.settings import load_settings

    assert load_policy(layout.policy).ca.fingerprint == fingerprint, "the policy pins the key"  # noqa: S101
    if layout.answers.runs_in == HOST:
        load_settings(dict(line.split("=", 1) for line in _settings(layout)))


# --- what is written --------------------------------------------------------------------------------------------------


def _policy_text(answers: Answers, fingerprint: str, digest: str, ends: str) -> str:
    principals = ", ".join(f'"{name}"' for name in answers.principals)
    return f"""\
# Who may get which SSH certificate on {answers.platform}. Every key: runbooks/reference/policy-file.md.
# After a change: `signer policy check`, then `signer reload`. The file holds no secret; keep it in git.

[ca]
fingerprint = "{fingerprint}"  # the only CA key that may sign

[roles.{_quoted_name(answers.role)}]
principals = [{principals}]  # exact names that sshd matches; an empty list means nobody
default_principals = [{principals}]
default_ttl = "15m"
max_ttl = "30m"
key_types = ["ssh-ed25519", "sk-ssh-ed25519@openssh.com", "ecdsa-sha2-nistp256"]
extensions = {{ allowed = ["permit-pty"], default = ["permit-pty"] }}
limits = {{ per_minute = 30 }}
{_approval_lines(answers)}
[identities.{_quoted_name(answers.operator)}]
kind = "human"
groups = ["operators"]
roles = ["{answers.role}"]
may = ["freeze", "hosts", "ledger.read", "operate", "revoke"]
tokens = [{{ sha256 = "{digest}", expires = {ends} }}]

# An agent or a CI job: `signer token new deploy-agent --expires 90d` prints its line `tokens`.
# [identities.deploy-agent]
# kind = "agent"
# roles = ["{answers.role}"]
"""


def _approval_lines(answers: Answers) -> str:
    """For a role that opens everything: how humans approve it, by keys of OpenSSH alone; a comment until one has a key.

    A passkey has no display, so that a taken-over api can have another request signed than the one that it shows.
    """
    if not any(_ROOT_LIKE.search(name.lower()) for name in (answers.role, *answers.principals)):
        return ""
    return """\
# It opens everything: let humans approve what agents and jobs ask. `with` shuts passkeys out, which have no display of
# what they sign. First an operator needs a key (`signer approval-key add`) and the right approve; then take the # away:
# approval = { for = ["agent", "workload"], by = ["operators"], valid_for = "10m", with = ["ssh"] }
"""


def _quoted_name(name: str) -> str:
    """A table name of TOML: bare, or in quotes if it has other characters."""
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else f'"{name}"'


def _settings(layout: Layout) -> list[str]:
    """The settings of a service on the host, `NAME=value`."""
    as_root = os.geteuid() == 0
    state, run = ("/var/lib/signer", "/run/signer") if as_root else (f"{layout.folder}/data", f"{layout.folder}/run")
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    owner = f"{user}:{group}" if layout.answers.key_from != CREDENTIAL else "root:root"
    users = ["SIGNER_KEEPER_USER=signer-keeper", "SIGNER_API_USER=signer-api"] if as_root else []
    key = [f"SIGNER_CA_KEY_FILE={layout.key_in_use}", f"SIGNER_CA_KEY_OWNER={owner}"]
    if layout.answers.key_from == AGENT:
        key = ["SIGNER_CA_KEY_SOURCE=agent", f"SIGNER_CA_AGENT_SOCKET={layout.key_in_use}"]
    return [
        f"SIGNER_POLICY_FILE={layout.policy}",
        *key,
        f"SIGNER_DATA_DIR={state}",
        f"SIGNER_RUN_DIR={run}",
        f"SIGNER_LISTEN={_ADDRESS}",
        *users,
    ]


def _service_text(layout: Layout) -> str:
    if layout.answers.runs_in == HOST:
        return "\n".join(["# The settings of the service: runbooks/reference/settings.md.", *_settings(layout), ""])
    kind = "AGENT" if layout.answers.key_from == AGENT else "KEY"
    return f"""\
# The variables of overlays/: runbooks/install/container.md.
PLATFORM_RUNTIME_SAFE_SESSION_CA_{kind}_DIR={Path(layout.key_in_use).parent}
PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR={layout.policy.parent}
PLATFORM_RUNTIME_SAFE_SESSION_VAULT_DIR={layout.folder / "vault"}
PLATFORM_RUNTIME_SAFE_SESSION_LISTEN={_ADDRESS}
"""


def _client_text(layout: Layout) -> str:
    return f"""\
# The settings of safe-session for this operator.
SAFE_SESSION_ADDR=http://{_ADDRESS}
SAFE_SESSION_ROLE={layout.answers.role}
SAFE_SESSION_TOKEN_FILE={layout.token}
# To know listed hosts by their keys (runbooks/install/clients.md), once the service runs:
#   signer hosts key > {layout.folder / "publishers"}
# SAFE_SESSION_PUBLISHERS_FILE={layout.folder / "publishers"}
"""


# --- what comes next --------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """(purpose, command) of what this host lacks before a start, and of the three commands up to a login."""

    before: list[tuple[str, str]]
    following: list[tuple[str, str]]


def _next_steps(layout: Layout, fingerprint: str, *, is_new: bool) -> Steps:
    answers = layout.answers
    before = _missing_users(layout) + _key_steps(layout, fingerprint, is_new=is_new)
    principals = ",".join(answers.principals)
    trust = f"signer hosts install root@HOST --principals {answers.principals[0]}={principals}"
    login = f"set -a; . {layout.client}; set +a; safe-session ssh {answers.principals[0]}@HOST"
    return Steps(
        before,
        [
            _start(layout),
            (f"each host trusts the CA, and its account {answers.principals[0]} lets them in", trust),
            (f"a login as {answers.principals[0]}", login),
        ],
    )


def _start(layout: Layout) -> tuple[str, str]:
    if layout.answers.runs_in == CONTAINER:
        # Read by the shell, as compose puts what a shell exports above a file of `--env-file`.
        overlays = _OVERLAYS.format("agent" if layout.answers.key_from == AGENT else "local-ca")
        start = f"(set -a; . {layout.service}; scripts/container/compose {overlays} up -d)"
        return "in a checkout, after scripts/container/build", start
    if layout.answers.key_from == CREDENTIAL:  # only a unit has the credential
        return "the service; its units: runbooks/install/systemd.md", _UNITS
    return "the service; as units: runbooks/install/systemd.md", f"set -a; . {layout.service}; set +a; signer serve"


def _missing_users(layout: Layout) -> list[tuple[str, str]]:
    """The users that the service, or in a container its agent, needs on this host."""
    if os.geteuid() != 0:
        return []
    if layout.answers.runs_in == CONTAINER:
        if layout.answers.key_from != AGENT or _has_user(_USERS[0]):
            return []
        return [("the user of the agent, by its number in the image", f"{_ADD_USER} --uid {_IMAGE_KEEPER} {_USERS[0]}")]
    missing = [name for name in _USERS if not _has_user(name)]
    return [("the users of the service", f"for user in {' '.join(missing)}; do {_ADD_USER} $user; done")] * bool(
        missing
    )


def _key_steps(layout: Layout, fingerprint: str, *, is_new: bool) -> list[tuple[str, str]]:
    """How the CA key comes to where the service looks for it."""
    key, in_container = layout.key, layout.answers.runs_in == CONTAINER
    made = _ENCRYPTED if in_container else layout.folder / _ENCRYPTED.name
    steps: list[tuple[str, str]] = []
    if layout.answers.key_from == INFISICAL:
        if is_new:
            steps += [("after its whole content is stored in Infisical as SAFE_SESSION_CA_KEY", f"shred -u {key}")]
        render = f"SIGNER_CA_FINGERPRINT={fingerprint} signer ca render --to {layout.key_in_use}"
        folder = f"install -d -m 0700 {Path(layout.key_in_use).parent}"
        steps += [("with the settings of Infisical: runbooks/ca-key.md", f"{folder} && {render}")]
    if layout.answers.key_from == CREDENTIAL:
        encrypt = "systemd-creds encrypt --name=ca"
        encrypt = f"{encrypt} {key} {made} && shred -u {key}" if is_new else f"{encrypt} FILE {made}"
        if in_container:
            encrypt = f"install -d -m 0755 {made.parent} && {encrypt}"
        steps += [("the key, readable on this host alone", encrypt)]
    if layout.answers.key_from == CREDENTIAL and in_container:
        unit = "systemctl enable --now signer-ca-credential"
        steps += [("the key, before the container starts: runbooks/ca-key.md, section 6", unit)]
    elif layout.answers.key_from == CREDENTIAL:
        lines = f"[Service]\\nEnvironmentFile={layout.service}\\nLoadCredentialEncrypted=ca:{made}\\n"
        steps += [("the unit gets it", f"mkdir -p {_DROP_IN} && printf '{lines}' > {_DROP_IN}/ca.conf")]
    if layout.answers.key_from == AGENT:
        socket, add = layout.key_in_use, "ssh-add -s PROVIDER"
        if layout.answers.runs_in == CONTAINER or os.geteuid() == 0:
            add = f"systemctl enable --now signer-agent && SSH_AUTH_SOCK={socket} runuser -u {_USERS[0]} -- {add}"
        else:
            add = f"install -d -m 0700 {Path(socket).parent} && ssh-agent -a {socket} && SSH_AUTH_SOCK={socket} {add}"
        steps += [("the key, in an agent of the keeper's user: runbooks/operate/ca-key-in-hardware.md", add)]
    return steps


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _show(layout: Layout, fingerprint: str, steps: Steps) -> None:
    rows = [
        ("policy", f"{layout.policy}: role {layout.answers.role}, identity {layout.answers.operator}"),
        ("CA key", f"{fingerprint}, {layout.key if layout.key.exists() else 'not here'}"),
        ("token", f"{layout.token}, for {TOKEN_DAYS}d"),
        ("settings", f"{layout.service}, {layout.client}"),
    ]
    output.show_table(rows)
    number = 0
    for title, listed in (("first:", steps.before), ("next:", steps.following)):
        if listed:
            output.show()
            output.show(title)
        for purpose, command in listed:
            number += 1
            output.show(f"  {number}  {plain(purpose)}")
            output.show_command(f"     {plain(command)}")
