"""`signer hosts install`: runs the host kit (`scripts/host`) on another machine over ssh, and confirms it.

Both halves of the kit's promise: `install` there arms a rollback, and a second connection, which logs in again, gives
the code back. Where that fails nothing is done about it: the host rolls back by itself.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

import signer
from signer.cli import output
from signer.cli.arguments import FILE, quoted
from signer.cli.connection import Service, service_options
from signer.cli.host_keys import check_may_list, offer_keys, read_seen_keys
from signer.cli.keys import read_public_keys
from signer.cli.parser import verb
from signer.cli.publish import publishing_key, trusted_lines
from signer.errors import BadFile, SignerError
from signer.units import plain

KIT: Final = Path(signer.__file__).parents[1] / "scripts" / "host"
PROGRAMS: Final = "/usr/local/libexec/safe-session-host"  # where the kit installs itself
_NIXOS: Final = 3
_NO_LOGIN: Final = 255  # ssh's own exit status
_CODE: Final = re.compile(r"--confirm ([0-9a-f]{10})$", re.MULTILINE)
_AS_ROOT: Final = 'as_root=""; [ "$(id -u)" = 0 ] || as_root="sudo -n"; '
_UNPACK: Final = (
    'set -eu; folder=$(mktemp -d); trap \'rm -rf "$folder"\' EXIT; tar -xzf - -C "$folder"; '
    f'{_AS_ROOT}$as_root "$folder/kit/install" --ca "$folder/ca.pub"'
)
# Its keys, as sshd has them in use: the connection that has just been verified vouches for them.
_SHOW_KEYS: Final = (
    f"{_AS_ROOT}PATH=$PATH:/usr/sbin:/sbin; for key in $($as_root sshd -T 2>/dev/null | sed -n 's/^hostkey //p'); do"
    ' $as_root ssh-keygen -y -f "$key" </dev/null 2>/dev/null || cat "$key.pub" 2>/dev/null; done; true'
)
# A dead host ends the command; a question of ssh's own may take a human as long as it takes.
_PATIENCE: Final = ("-oConnectTimeout=20", "-oServerAliveInterval=10", "-oServerAliveCountMax=6")
_NEW_CONNECTION: Final = ("-oControlMaster=no", "-oControlPath=none")


@verb(
    "hosts install",
    "signer hosts install edge1 --principals llmops=llmops --check",
    "signer hosts install root@edge1 --ca ca.pub --principals llmops=llmops --principals root=admin",
)
@click.argument("host", metavar="HOST", help="as for ssh: a name, user@name, or a Host of ssh_config")
@click.option(
    "--ca",
    type=FILE,
    metavar="FILE",
    help="public keys of the CA, as of `signer ca bundle`; default: the service's own",
)
@click.option(
    "--principals", multiple=True, required=True, metavar="ACCOUNT=NAME,NAME", help="who may log in; once per account"
)
@click.option("--url", metavar="URL", help="where the revocation list is, such as https://signer.example/api")
@click.option(
    "--publisher", type=FILE, metavar="FILE", help="public key that signs the list; default: the service's own"
)
@click.option("--name", metavar="NAME", help="what the host calls itself when it fetches the list")
@click.option("--rollback-after", metavar="SECONDS", help="how long the host waits for the confirmation; default: 300")
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="OPTION", help="as for ssh -o; repeat for more")
@click.option("--kit", type=FILE, metavar="DIR", help="the host kit; default: scripts/host beside this program")
@click.option("--check", is_flag=True, help="report what is in the way and what would change; change nothing")
@click.option(
    "--add-keys", is_flag=True, help="also list the host's keys, and record its principals, as `hosts add` does"
)
@service_options
def hosts_install(
    *,
    host: str,
    ca: Path | None,
    principals: tuple[str, ...],
    url: str | None,
    publisher: Path | None,
    name: str | None,
    rollback_after: str | None,
    ssh_options: tuple[str, ...],
    kit: Path | None,
    check: bool,
    add_keys: bool,
    service: Service,
    as_json: bool,
) -> int:
    """Copies the host kit to HOST over ssh, runs its `install` there as root (`sudo -n` for other users), and
    confirms it from a second connection. If that connection fails, HOST goes back to its earlier state by itself.
    At the end it shows HOST's keys, by which clients can know it, and lists them with --add-keys. Exit status 1
    if anything is in the way, and on NixOS, where it only prints the settings."""
    if not host or host.startswith("-"):
        raise SignerError("host_malformed", f"{quoted(host)} is not a host", "name it as for ssh")
    names = _principals_of(principals) if add_keys else ()
    if add_keys:
        check_may_list(service)
    given = {"--url": url, "--name": name, "--rollback-after": rollback_after}
    arguments = [word for pair in principals for word in ("--principals", pair)]
    arguments += [word for flag, value in given.items() if value is not None for word in (flag, value)]
    remote = f"{_UNPACK} {shlex.join(arguments)}"
    pinned = None if publisher is None else read_public_keys(publisher)
    if url is not None and pinned is None:
        pinned = publishing_key(service.address)[0].encode()
    if pinned is not None:
        remote += ' --publisher "$folder/publisher.pub"'
    if check:
        remote += " --check"
    options = [f"-o{option}" for option in ssh_options]
    report: list[str] = []
    trusted = trusted_lines(service.address) if ca is None else read_public_keys(ca)
    done = _ssh(host, options, remote, _pack(kit or KIT, trusted, pinned))
    _tell(report, done, as_json=as_json)
    if done.returncode == _NO_LOGIN:
        hint = "see its message above; what began there rolls back by itself"
        raise SignerError("host_not_reached", f"ssh to {plain(host)} failed", hint)
    if done.returncode not in (0, _NIXOS):
        text = f"{plain(host)} was left as it was"
        raise SignerError("host_not_installed", text, "fix what is reported above, then retry")
    code = _CODE.search(done.stdout)
    result = "nixos" if done.returncode == _NIXOS else "checked" if check else "unchanged"
    if code is not None and not check:
        _tell(report, _confirm(host, options, code[1]), as_json=as_json)
        result = "confirmed"
    facts: dict[str, object] = {"host": host, "result": result, "report": report}
    if result in ("confirmed", "unchanged"):
        facts |= _offer_keys(host, options, names, service if add_keys else None, as_json=as_json)
    if as_json:
        output.show_json(facts)
    return 1 if result == "nixos" else 0


def _principals_of(pairs: Sequence[str]) -> tuple[str, ...]:
    """The principals of all accounts, of words `ACCOUNT=NAME,NAME`; raises `BadRequest`."""
    from signer.ssh.known_hosts import parse_host_principals

    return parse_host_principals(name for pair in pairs for name in pair.partition("=")[2].split(","))


def _offer_keys(
    host: str,
    options: Sequence[str],
    principals: Sequence[str],
    service: Service | None,
    *,
    as_json: bool,
) -> dict[str, object]:
    """Shows the keys of a host, and lists them with its principals at the service, if any."""
    seen = _ssh(host, options, _SHOW_KEYS)
    found = read_seen_keys([*options, "--", host], seen.stdout if seen.returncode == 0 else "")
    if found is not None:
        return {"host_keys": offer_keys(found, principals, service, as_json=as_json)}
    if service is not None:
        text = f"{plain(host)} trusts the CA, but its keys cannot be read, so they are not listed"
        raise SignerError("host_keys_missing", text, "list them with `signer hosts add`")
    return {}


def _tell(report: list[str], done: subprocess.CompletedProcess[str], *, as_json: bool) -> None:
    """Shows what a host reports, or keeps it for the JSON; in a failure it is shown on stderr, so that it is seen."""
    lines = [plain(line) for line in done.stdout.splitlines()]
    report += lines
    for line in lines:
        if not as_json:
            output.show(line)
        elif done.returncode != 0:
            output.note(line)


def _confirm(host: str, options: Sequence[str], code: str) -> subprocess.CompletedProcess[str]:
    """Gives the code back in a new login; raises `SignerError` if that fails."""
    done = _ssh(host, [*_NEW_CONNECTION, *options], f"{_AS_ROOT}$as_root {PROGRAMS}/install --confirm {code}")
    if done.returncode != 0:
        text = f"a new login to {plain(host)} did not confirm; it goes back to its earlier state by itself"
        raise SignerError("host_not_confirmed", text, "see the message above; then run this again")
    return done


def _ssh(host: str, options: Sequence[str], script: str, content: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Runs a script of `sh` on the host, with `content` as its stdin; its stderr is shown while it runs. ssh may ask on
    the terminal."""
    command = ["ssh", "-T", *options, *_PATIENCE, "--", host, f"sh -c {shlex.quote(script)}"]
    try:
        done = subprocess.run(command, input=content, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        reason = (error.strerror or "unknown").lower()
        raise SignerError("command_not_started", f"cannot run ssh: {reason}", "install openssh-client") from None
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(errors="replace"))


def _pack(kit: Path, ca: bytes, publisher: bytes | None) -> bytes:
    if not (kit / "install").is_file():
        raise BadFile(
            "host_kit_missing", f"there is no host kit in {kit}", "name scripts/host of a checkout with --kit"
        )
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in sorted(kit.iterdir()):
            if path.is_file():
                _add(archive, f"kit/{path.name}", path.read_bytes(), 0o755 if path.suffix == "" else 0o644)
        _add(archive, "ca.pub", ca, 0o644)
        if publisher is not None:
            _add(archive, "publisher.pub", publisher, 0o644)
    return packed.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    facts = tarfile.TarInfo(name)
    facts.size, facts.mode = len(content), mode
    archive.addfile(facts, io.BytesIO(content))
