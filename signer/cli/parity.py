"""`signer policy import-vault` and `signer cutover parity`: Vault's roles as policy, and both sides compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from signer.cli import output
from signer.cli.arguments import FILE, FINGERPRINT, config_option, whole
from signer.cli.parser import verb
from signer.units import cut, plain

if TYPE_CHECKING:
    from signer.api_client import ApiClient
    from signer.migration.config import CutoverFile
    from signer.migration.import_vault import Imported
    from signer.migration.parity import ParityReport, RoleParity, SignLocally
    from signer.vault.parity import Difference


@verb(
    "policy import-vault",
    "signer policy import-vault --address https://vault.example:8200 --token-file ~/.vault --mount ssh",
    "signer policy import-vault --address http://127.0.0.1:8200 --token-file t --mount ssh --out policy.toml",
)
@click.option("--address", metavar="URL", required=True, help="the address of Vault or OpenBao")
@click.option("--token-file", type=FILE, metavar="FILE", required=True, help="its token, readable by the owner only")
@click.option("--mount", metavar="NAME", required=True, help="the mount of its SSH engine")
@click.option("--ca-file", type=FILE, metavar="FILE", help="CA certificates for its TLS")
@click.option("--role", "roles", multiple=True, metavar="NAME", help="repeat for more; default: all")
@click.option("--fingerprint", type=FINGERPRINT, metavar="SHA256:…", help="of the local CA key, to pin it")
@click.option("--out", type=FILE, metavar="FILE", help="a file that does not exist; default: stdout")
def policy_import_vault(
    *,
    address: str,
    token_file: Path,
    mount: str,
    ca_file: Path | None,
    roles: tuple[str, ...],
    fingerprint: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Reads the roles and writes a policy.toml that grants the same; a comment marks each place where it grants
    less, and what cannot be carried over is listed. Fill in the identities and the CA key's pin. The token
    needs read and list on MOUNT/roles, and read on MOUNT/config/ca and sys/mounts/MOUNT/tune."""
    from signer.migration.import_vault import import_vault, write_policy
    from signer.vault.admin import VaultAdmin

    with VaultAdmin(address, token_file, ca_file) as vault:
        vault.check_ready()
        imported = import_vault(vault, mount, roles, fingerprint)
    if out:
        write_policy(out, imported.policy)
    if as_json:
        output.show_json({**imported.as_json(), "out": str(out) if out else None})
    elif not out:
        for line in imported.policy.splitlines():
            output.show_exactly(plain(line))
    _note_import(imported, out)


def _note_import(made: Imported, out: Path | None) -> None:
    for role in made.roles:
        for text in role.not_carried():
            output.warn(f"{role.name}: not carried over: {text}")
    carried = sum(role.is_carried for role in made.roles)
    where = f" in {out}" if out else ""
    output.note(f"{carried} of {output.count(len(made.roles), 'role')}{where}; fill in what the comments ask for")


@verb(
    "cutover parity",
    "signer cutover parity --config cutover.toml",
    "signer cutover parity --config cutover.toml --json",
)
@config_option
@click.option("--samples", type=whole(1, 1000), metavar="N", default=20, help="number of requests; default 20")
def cutover_parity(config: Path, samples: int, as_json: bool) -> int:
    """Compares role with role, then sends the same requests to both, for throw-away keys, and compares the
    certificates field by field. A wider grant or other principals are an error, a stricter grant is a note.
    If the running service is not in mode local yet, a trial service signs. Exit status 1 if there is an error."""
    from signer.migration.config import load_cutover_file
    from signer.migration.parity import check_parity
    from signer.policy.file import load_policy
    from signer.vault.admin import VaultAdmin

    file = load_cutover_file(config)
    policy = load_policy(file.signer.policy_file, "signer.policy_file")
    with VaultAdmin(file.vault.address, file.vault.token_file, file.vault.ca_file) as vault:
        vault.check_ready()
        with local_side(file) as (sign, who):
            report = check_parity(policy, vault, file.vault.mount, sign, file.vault.roles, samples)
    if as_json:
        output.show_json({**report.as_json(), "signed_locally_by": who})
    else:
        _show_report(report, who)
    return 0 if report.is_parity else 1


@contextmanager
def local_side(file: CutoverFile) -> Iterator[tuple[SignLocally, str]]:
    """A function that has the local CA sign, and the name of its service: the running one in mode `local`, else one on
    trial beside it, which must have the CA that policy.toml pins."""
    from signer.api_client import ApiClient
    from signer.migration.trial import trial
    from signer.policy.file import load_policy

    with ApiClient(file.signer.address, file.signer.token_file) as running:
        if running.ready().mode == "local":
            yield _signing(running), "the running service"
            return
    pinned = load_policy(file.signer.policy_file, "signer.policy_file").ca.fingerprint
    with trial(file.compose) as tried, tried.client(file.signer.token_file, pinned) as api:
        yield _signing(api), "a trial service beside the running one"


def _signing(api: ApiClient) -> SignLocally:
    return lambda role, body: str(api.sign(role, body).get("certificate"))


def _show_report(report: ParityReport, who: str) -> None:
    for role in report.roles:
        _show_role(role)
    verdict = "parity: the local CA gives what Vault gives, or less" if report.is_parity else "no parity"
    errors = output.count(len(report.errors), "error")
    output.show(f"{verdict} ({output.count(report.sample_count, 'sample')}, {errors}; signed locally by {who})")


def _show_role(role: RoleParity) -> None:
    output.show(f"role {plain(role.role)}")
    output.show(f"  principals  {plain(role.principals)}")
    granted = sum(sample.outcome == "granted" for sample in role.samples)
    output.show(f"  samples     {len(role.samples)}, granted by both {granted}")
    if role.left_out:
        output.show(f"              {plain(role.left_out)}")
    seen: dict[tuple[str, str, str], tuple[Difference, list[str]]] = {}
    for difference in role.differences:
        seen.setdefault((difference.field, difference.severity, difference.why), (difference, []))
    for sample in role.samples:
        for difference in sample.differences:
            key = (difference.field, difference.severity, difference.why)
            seen.setdefault(key, (difference, []))[1].append(sample.sample.name)
    for difference, names in sorted(seen.values(), key=lambda one: (one[0].severity, one[0].field)):
        times = f" in {output.count(len(names), 'sample')}, such as {names[0]}" if names else ""
        output.show(f"  {difference.severity:<5}  {plain(difference.field)}{times}")
        output.show(f"         ours {cut(plain(difference.ours), 60)} | Vault's {cut(plain(difference.vaults), 60)}")
        output.show(f"         {plain(difference.why)}")
    output.show()
