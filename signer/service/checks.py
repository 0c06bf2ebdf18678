"""Checks of everything that a start depends on. Leaves nothing behind and prints nothing.

An address is bound for a moment, and a file is created in each directory and removed, as the user that will do it.

Uses the functions of keeper and launcher where possible. Runs in a process that may read the CA key file (`signer
check`, `signer ca inspect`), after `forbid_dumps`.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from signer.ca.key import CaKey, examine_ca_key
from signer.ca.render import IN_MEMORY, UNKNOWN, file_system_of
from signer.errors import BadFile, BadKeyFile, BadSettings, SignerError, Unavailable, write_hint
from signer.files import write_new
from signer.hardening import acting_as, check_users, look_up_user
from signer.ledger.audit import check_recent
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.policy.concerns import LOCKED_OUT, find_concerns, pins_own_address
from signer.policy.decide import Policy
from signer.policy.file import load_policy
from signer.policy.reading import read_policy
from signer.service.control import find_running
from signer.service.file_access import become_reader
from signer.service.key_source import agent_for_check
from signer.service.listeners import try_to_bind
from signer.service.tls import load_tls_pair
from signer.settings import Settings, load_settings
from signer.units import timestamp

SOON: Final = 14 * 86_400  # seconds; tokens that expire within it get a warning
_ROOM: Final = 256 * 1024 * 1024  # bytes; about 300,000 certificates


Outcome = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check: a stable `code`, the observation in `detail`, and the next action in `hint`."""

    outcome: Outcome
    code: str
    detail: str
    hint: str = ""


def _failed(error: SignerError, *, outcome: Outcome = "fail") -> Iterator[Check]:
    """The problems that an error names, one check each."""
    for problem in getattr(error, "problems", ()) or (error.text,):
        yield Check(outcome, error.code, " ".join(problem.split()), error.hint)


def _tried(checks: Iterator[Check]) -> Iterator[Check]:
    """Checks that end with the first error of theirs."""
    try:
        yield from checks
    except SignerError as error:
        yield from _failed(error)


def check_start(environ: Mapping[str, str], now: int) -> Iterator[Check]:
    """Yields every check, in the order of a start. `now` is in seconds since 1970."""
    try:
        settings = load_settings(environ)
    except BadSettings as error:
        yield from _failed(error)
        return
    yield from _check_settings(settings)
    if shutil.which("ssh-keygen", path=environ.get("PATH", os.defpath)) is None:
        text = "without ssh-keygen to read it back, no revocation list is published for hosts"
        yield Check("warn", "ssh_keygen_missing", text, "install openssh-client")
    yield from _tried(_check_users(settings))
    yield from _tried(_check_tls(settings, now))
    if settings.notices_file is not None:
        yield from _check_notices(settings, settings.notices_file)
    policy: Policy | None = None
    try:
        policy = load_policy(settings.policy_file)
    except BadFile as error:
        if error.problems:  # each is a line of that file
            error.hint = f"correct {settings.policy_file} (SIGNER_POLICY_FILE), then run `signer policy check`"
        yield from _failed(error)
    if policy is not None:
        yield from _check_policy(policy, settings, now)
        yield from _check_policy_reader(settings)
    if settings.asks_vault:
        yield from _tried(_check_vault(settings))
    if settings.reads_key_file:
        yield from _check_key(settings, policy)
    elif settings.has_ca_key:
        yield from _tried(_check_agent(settings, policy))
    try:
        become_reader(settings)  # last: root in a container must not read what the keeper's user owns
    except Unavailable as error:
        yield from _failed(error)
        return
    yield from _check_directories(settings)
    yield from _tried(_check_ledger(settings.data_dir, policy))


def _check_settings(settings: Settings) -> Iterator[Check]:
    yield Check("ok", "settings", f"mode {settings.mode}, mounts {', '.join(settings.mounts)}")
    for warning in settings.warnings:
        yield Check("warn", "unknown_setting", warning, "correct its name, or remove it from the environment")
    running: str | None = None
    for listen in settings.listen:
        protection = "reached from this host only" if listen.is_private() else "beyond loopback"
        if settings.tls_cert_file is not None:
            protection += ", TLS"
        if settings.trusted_proxies:
            protection += f", behind {', '.join(map(str, settings.trusted_proxies))}"
        try:
            try_to_bind(listen, settings.socket_group)
        except SignerError as error:
            running = running or (find_running(settings) if error.code == "listen_in_use" else None)
            if running is None:
                yield from _failed(error)
                continue
            protection += f"; in use while {running} runs"
        yield Check("ok", "listen", f"{listen}, {protection}")


def _check_tls(settings: Settings, now: int) -> Iterator[Check]:
    """Certificate and key as the api's user finds them."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return
    with acting_as(None if settings.api_user is None else look_up_user(settings.api_user).pw_uid):
        pair = load_tls_pair(settings.tls_cert_file, settings.tls_key_file)
    end = timestamp(pair.not_after)
    if pair.not_after <= now + SOON:
        what = "has expired on" if pair.not_after <= now else "expires on"
        yield Check("warn", "tls_expires", f"the TLS certificate {what} {end}", "renew it, then `signer reload`")
    else:
        yield Check("ok", "tls", f"{pair.subject}, valid until {end}")


def _check_users(settings: Settings) -> Iterator[Check]:
    check_users(**settings.users)
    if settings.keeper_user is None:
        yield Check("ok", "users", f"keeper and api run as the current user, {os.geteuid()}")
        return
    more = f", notices as {settings.notices_user}" if settings.notices_file is not None else ""
    yield Check("ok", "users", f"keeper runs as {settings.keeper_user}, api as {settings.api_user}{more}")
    for user in sorted({str(user) for user in settings.users.values() if _uid_of(user) == 0}):
        yield Check(
            "warn", "user_is_root", f"a compromised process of {user} compromises the host", "give each its own user"
        )
    if _uid_of(settings.keeper_user) == _uid_of(settings.api_user):
        yield Check("warn", "users_are_one", "the api can access the keeper's files", "give each its own user")


def _uid_of(user: str | None) -> int | None:
    """None for one that is not set or does not exist: names may differ and mean one user."""
    try:
        return None if user is None else look_up_user(user).pw_uid
    except BadSettings:
        return None


def _check_notices(settings: Settings, file: Path) -> Iterator[Check]:
    """The channels as the process finds them that sends notices, and whether the keeper can reach it."""
    from signer.service.channels import load_channels  # which loads an HTTP library

    user = settings.notices_user
    uid, keeper = _uid_of(user), _uid_of(settings.keeper_user)
    if uid is not None and uid in (keeper, _uid_of(settings.api_user)):
        text = f"the process that sends notices to the Internet runs as {user}, and can use that process's files"
        yield Check("warn", "users_are_one", text, "give SIGNER_NOTICES_USER its own user")
    try:
        with acting_as(None if user is None else look_up_user(user).pw_uid):
            channels = load_channels(file)
    except (BadFile, BadSettings) as error:
        yield from _failed(error)
    else:
        names = ", ".join(f"{channel.name} ({channel.facts.kind})" for channel in channels)
        yield Check("ok", "notices", f"{names}; `signer notices test` sends one to each")
    try:
        mode = settings.notices_dir.stat().st_mode
    except FileNotFoundError:  # the start makes it
        return
    except OSError as error:
        hint = "fix the path, or the modes of its parent directories"
        yield Check("fail", "notices_dir_closed", f"{settings.notices_dir}: {error.strerror}", hint)
        return
    if uid != keeper and not mode & 0o001:
        text = f"{settings.notices_dir} has mode {stat.S_IMODE(mode):04o}: the keeper cannot reach the socket in it"
        yield Check("warn", "notices_dir_closed", text, f"chmod 0711 {settings.notices_dir}")


def _check_policy(policy: Policy, settings: Settings, now: int) -> Iterator[Check]:
    counts = f"roles {len(policy.roles)}, identities {len(policy.identities)}, tokens {len(policy.tokens)}"
    yield Check("ok", "policy", f"{settings.policy_file}: {counts}, sha256 {policy.digest[:16]}…")
    for token in sorted(policy.tokens.values(), key=lambda token: (token.expires, token.identity)):
        hint = f"replace it: `signer token new {token.identity}`, then remove this one from policy.toml"
        if token.expires <= now:
            yield Check("warn", "token_expired", f"a token of {token.identity}, on {timestamp(token.expires)}", hint)
        elif token.expires <= now + SOON:
            yield Check(
                "warn", "token_expires_soon", f"a token of {token.identity}, on {timestamp(token.expires)}", hint
            )
    for role in pins_own_address(policy, settings):
        hint = "list the networks of the callers, or name the proxies in the settings"
        yield Check("warn", "caller_is_this_host", f"roles.{role}.source_address: {LOCKED_OUT}", hint)
    for concern in find_concerns(policy):
        yield Check("warn", concern.code, concern.text, concern.hint)


def _check_policy_reader(settings: Settings) -> Iterator[Check]:
    """Whether the keeper's user can read the policy too: a start reads it as root, a reload no longer."""
    try:
        with acting_as(_uid_of(settings.keeper_user), with_groups=True):
            read_policy(settings.policy_file)
    except BadFile as error:
        hint = f"let {settings.keeper_user} read it, or `signer reload` refuses it"
        yield Check("warn", error.code, f"as {settings.keeper_user}: {error.text}", hint)


def _check_key(settings: Settings, policy: Policy | None) -> Iterator[Check]:
    pins = policy.ca.may_sign if policy is not None else ()
    key, found = examine_ca_key(settings.ca_key_file, settings.ca_key_owner, *pins)
    yield from key_checks(key, found, settings.ca_key_owner, pins)
    if key is not None:
        yield from _check_key_place(settings.ca_key_file)


def _check_agent(settings: Settings, policy: Policy | None) -> Iterator[Check]:
    """The ssh-agent, and whether it signs with the pinned key. There is no key file then, and nothing to render."""
    agent = agent_for_check(settings)
    held = len(agent.identities())
    yield Check("ok", "ca_agent", f"{settings.ca_agent_socket} answers, keys {held}; there is no key file to render")
    if policy is None:
        yield Check("warn", "ca_agent_key", "not looked for: no valid policy", "fix the policy first")
        return
    key = agent.find_key(policy.ca.fingerprint)
    yield Check("ok", "ca_agent_key", f"{key.kind} {key.fingerprint} is pinned; its signature verifies")


def _check_vault(settings: Settings) -> Iterator[Check]:
    """The token file as the keeper's user finds it, and whether Vault shows its CA key to that token.

    A start requires only the file.
    """
    from signer.vault.signing import VaultClient  # as in startup.py: only if Vault signs

    assert settings.vault_addr is not None, "checked by load_settings"  # noqa: S101
    assert settings.vault_token_file is not None, "checked by load_settings"  # noqa: S101
    with acting_as(_uid_of(settings.keeper_user), with_groups=True):
        client = VaultClient(
            settings.vault_addr, settings.vault_token_file, settings.vault_mount, settings.vault_ca_file
        )
    yield Check("ok", "vault_token", "the token file holds one token and is private to its owner")
    try:
        key = client.ask_ca()
    except SignerError as error:
        yield Check("warn", error.code, f"{settings.vault_addr}: {error.text}", error.hint)
    else:
        yield Check("ok", "vault_ca", f"{settings.vault_addr} signs with {key.kind} {key.fingerprint}")
    finally:
        client.close()


def key_checks(
    key: CaKey | None, found: list[tuple[str, BadKeyFile | None]], owner: str, pins: Sequence[str]
) -> Iterator[Check]:
    """The findings of `examine_ca_key` as checks; a failed one has the error code of a start."""
    seen = {
        "open": "opened, not a symbolic link",
        "regular file": "a regular file",
        "one link": "one hard link",
        "owner": owner,
        "mode": "0400 or 0600",
        "size": "1 byte to 16 KiB",
        "content": f"{key.kind} {key.fingerprint}, no passphrase" if key is not None else "",
        "pin": _pin_seen(key, pins),
        "self-test": "its signature verifies",
    }
    for name, fault in found:
        code = "ca_key_" + name.replace(" ", "_").replace("-", "_")
        if fault is not None:
            yield Check("fail", fault.code, fault.text, fault.hint)
        elif name == "pin" and not pins:
            yield Check("warn", code, seen[name], "fix the policy first")
        else:
            yield Check("ok", code, seen[name])


def _pin_seen(key: CaKey | None, pins: Sequence[str]) -> str:
    if not pins:
        return "not compared: no valid policy"
    if key is not None and key.fingerprint != pins[0]:
        return "matches ca.next of the policy"
    return "matches ca.fingerprint of the policy"


def _check_key_place(path: Path) -> Iterator[Check]:
    try:
        kind = file_system_of(path)
    except OSError:
        kind = UNKNOWN
    if kind == UNKNOWN or kind in IN_MEMORY:
        yield Check("ok", "ca_key_place", "unknown file system" if kind == UNKNOWN else kind)
    else:
        yield Check(
            "warn", "ca_key_on_disk", f"on {kind}, which keeps the key after a shutdown", "render it to a tmpfs"
        )


def _check_directories(settings: Settings) -> Iterator[Check]:
    keeper = _uid_of(settings.keeper_user) if os.geteuid() == 0 else None
    for code, path in (("data_dir", settings.data_dir), ("run_dir", settings.run_dir)):
        try:
            facts = path.stat()
        except FileNotFoundError:
            parent = next(parent for parent in path.parents if parent.exists())
            fault = _try_to_write(parent, None)
            users = (settings.keeper_user, settings.api_user) if code == "run_dir" else (settings.keeper_user,)
            if (barred := _barred(parent, users)) is not None:
                yield Check(
                    "fail", f"{code}_unusable", f"{path}: {barred}", f"let that user through: chmod o+x {parent}"
                )
            elif fault is None:
                yield Check("ok", code, f"{path} does not exist yet; `signer serve` creates it")
            else:
                hint = f"create it, or let the user that starts the service write {parent}"
                yield Check("fail", f"{code}_unusable", f"{path} cannot be created in {parent}: {fault}", hint)
            continue
        except OSError as error:
            hint = "fix the path, or the modes of its parent directories"
            yield Check("fail", f"{code}_unusable", f"{path}: {error.strerror}", hint)
            continue
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISDIR(facts.st_mode):
            yield Check("fail", f"{code}_unusable", f"{path} is not a directory", "use another path")
        elif mode & 0o027:  # fatal only for the run directory, which holds the socket
            text = f"{path} has mode {mode:04o}: other users can access it"
            yield Check("fail" if code == "run_dir" else "warn", f"{code}_not_private", text, f"chmod 0700 {path}")
        elif not os.access(path, os.W_OK | os.X_OK):
            if os.statvfs(path).f_flag & os.ST_RDONLY:
                frozen = OSError(errno.EROFS, os.strerror(errno.EROFS))
                yield Check("fail", f"{code}_not_writable", f"{path}: {frozen.strerror}", write_hint(frozen, str(path)))
                continue
            hint = "run this as the user that starts the service, or fix the owner"
            yield Check("fail", f"{code}_not_writable", f"{path} belongs to user {facts.st_uid}", hint)
        elif (fault := _try_to_write(path, keeper if facts.st_uid == keeper else None)) is not None:
            yield Check("fail", f"{code}_not_writable", f"{path}: {fault}", "fix the file system or the owner")
        else:
            yield Check("ok", code, f"{path}, mode {mode:04o}, owner {facts.st_uid}")


def _barred(directory: Path, users: Sequence[str | None]) -> str | None:
    """Which of the users may not pass through a directory that a start creates another one in; else None."""
    for user in users:
        try:
            with acting_as(_uid_of(user), with_groups=True):
                os.stat(f"{directory}/.")  # noqa: PTH116 - which a Path would shorten
        except OSError as error:
            return f"{user} cannot pass {directory}: {error.strerror}"
    return None


def _try_to_write(directory: Path, user: int | None) -> str | None:
    """Creates and removes a file there, as `user` or as this user; the reason if that fails."""
    trial = directory / f".signer-check-{os.getpid()}"
    try:
        with acting_as(user):
            write_new(trial, b"", 0o600)
            trial.unlink()
    except OSError as error:
        return error.strerror
    return None


def _check_ledger(data_dir: Path, policy: Policy | None) -> Iterator[Check]:
    if not data_dir.is_dir() or not os.access(data_dir, os.X_OK):
        return
    free = shutil.disk_usage(data_dir).free
    if free < _ROOM:
        yield Check("warn", "disk_nearly_full", f"{free // 2**20} MiB free in {data_dir}", "free disk space")
    if not (data_dir / FILE_NAME).exists():
        yield Check("ok", "ledger", "none yet; the first start of the keeper creates it")
        return
    with closing(LedgerReader(data_dir)) as reader:
        reader.query("BEGIN")  # one snapshot, even while a keeper writes
        head = check_recent(reader)
        ca = reader.last_ca()
    newest = f", newest at {timestamp(head.time_ms // 1000)}" if head.seq else ""
    yield Check("ok", "ledger", f"{head.seq:,} events{newest}; the newest 1,000 are in their places")
    if policy is not None and ca is not None and not policy.ca.names(ca):
        text = f"it was written with CA key {ca}, which policy.toml does not name"
        hint = "if it is another platform's, restore the right ledger before the start"
        yield Check("warn", "ledger_of_another_ca", text, hint)
