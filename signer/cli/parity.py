"""`signer policy import-vault` and `signer cutover parity`: Vault's roles as policy, and both sides compared."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signer.api_client import ApiClient
from signer.cli import output
from signer.migration.config import CutoverFile, load_cutover_file
from signer.migration.import_vault import Imported, import_vault, write_policy
from signer.migration.parity import ParityReport, RoleParity, SignLocally, check_parity
from signer.migration.trial import trial
from signer.policy.file import load_policy
from signer.units import plain
from signer.vault.admin import VaultAdmin
from signer.vault.parity import Difference

if TYPE_CHECKING:
    from signer.settings import Settings


def policy_import_vault(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Writes the policy that equals Vault's roles, or shows it."""
    ca_file = Path(arguments.ca_file) if arguments.ca_file else None
    with VaultAdmin(arguments.address, Path(arguments.token_file), ca_file) as vault:
        vault.check_ready()
        made = import_vault(vault, arguments.mount, tuple(arguments.role or ()), arguments.fingerprint)
    if arguments.out:
        write_policy(Path(arguments.out), made.policy)
    if arguments.json:
        output.show_json({**made.as_json(), "out": arguments.out})
    elif not arguments.out:
        for line in made.policy.splitlines():
            output.show(plain(line))
    _say_import(made, arguments.out)
    return 0


def _say_import(made: Imported, out: str | None) -> None:
    for role in made.roles:
        for text in role.not_carried():
            output.warn(f"{role.name}: not carried over: {text}")
    carried = sum(role.is_carried for role in made.roles)
    where = f" in {out}" if out else ""
    output.say(f"{carried} of {output.count(len(made.roles), 'role')}{where}; fill in what the comments ask for")


def cutover_parity(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Compares Vault with the local CA, and says where they differ; 1 if the local CA would give something else."""
    file = load_cutover_file(Path(arguments.config))
    policy = load_policy(file.signer.policy_file)
    with VaultAdmin(file.vault.address, file.vault.token_file, file.vault.ca_file) as vault:
        vault.check_ready()
        with local_side(file) as (sign, who):
            report = check_parity(policy, vault, file.vault.mount, sign, file.vault.roles, arguments.samples)
    if arguments.json:
        output.show_json({**report.as_json(), "signed_locally_by": who})
    else:
        _show_report(report, who)
    return 0 if report.is_parity else 1


@contextmanager
def local_side(file: CutoverFile) -> Iterator[tuple[SignLocally, str]]:
    """How to have the local CA sign, and who does: the running service in mode `local`, else one on trial beside it."""
    with ApiClient(file.signer.address, file.signer.token_file) as running:
        if running.ready().mode == "local":
            yield _signing(running), "the running service"
            return
    with trial(file.compose) as tried, ApiClient(tried.address, file.signer.token_file) as api:
        yield _signing(api), "a service on trial beside the running one"


def _signing(api: ApiClient) -> SignLocally:
    def sign(role: str, body: dict[str, Any]) -> str:
        return str(api.sign(role, body).get("certificate"))

    return sign


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
        output.show(f"         ours {_short(difference.ours)} | Vault's {_short(difference.vaults)}")
        output.show(f"         {plain(difference.why)}")
    output.show()


def _short(text: str) -> str:
    shown = plain(text)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
