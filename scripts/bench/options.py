"""What the benchmarks take as options: `python -m scripts.bench.options NAME --help` answers without an environment.

Only the standard library, so that the help of a benchmark imports and builds nothing.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.bench.attack import ATTACKS


class _Parser(argparse.ArgumentParser):
    """Help at the width of the terminal, 100 columns at most."""

    def __init__(self, *, prog: str, description: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100) - 2
        formatter = functools.partial(argparse.HelpFormatter, width=width)
        super().__init__(prog=prog, description=description, formatter_class=formatter)


def read_console_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/console",
        description="Time and size of the console's pages with very many certificates; what notices cost a signature.",
    )
    parser.add_argument(
        "--certificates", type=int, metavar="N", default=1_000_000, help="on record (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", default=20, help="of each page (default %(default)s)")
    parser.add_argument(
        "--turns", type=int, metavar="N", default=12, help="of signing, with notices and without (default %(default)s)"
    )
    parser.add_argument(
        "--ledger", type=Path, metavar="DIR", help="keep the ledger there; one that is there is used as it is"
    )
    parser.add_argument("--dir", type=Path, help="where everything else goes (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    asked = parser.parse_args(arguments)
    if min(asked.certificates, asked.repeats, asked.turns) < 1:
        parser.error("--certificates, --repeats and --turns are 1 at least")
    return asked


def read_cutover_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/cutover",
        description="Cutovers and rollbacks of a throwaway platform: alone, then while clients log in without pause.",
    )
    parser.add_argument("--rounds", type=int, metavar="N", default=3, help="of each kind (default %(default)s)")
    parser.add_argument("--clients", type=int, metavar="N", default=30, help="that log in (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1 or asked.clients < 1:
        parser.error("--rounds and --clients are 1 at least")
    return asked


def read_hosts_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(prog="scripts/bench/hosts", description="CPU of the service while hosts poll its revocation list.")
    parser.add_argument(
        "--hosts", type=int, metavar="N", default=1000, help="that poll each minute (default %(default)s)"
    )
    parser.add_argument("--seconds", type=int, metavar="N", default=60, help="of polling (default %(default)s)")
    asked = parser.parse_args(arguments)
    if min(asked.hosts, asked.seconds) < 1:
        parser.error("--hosts and --seconds are 1 at least")
    return asked


def read_ledger_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/ledger", description="What a ledger with very many certificates costs against an empty one."
    )
    parser.add_argument(
        "--certificates",
        type=int,
        metavar="N",
        default=1_000_000,
        help="recorded in the full one (default %(default)s)",
    )
    parser.add_argument(
        "--active", type=int, metavar="N", default=2_000, help="of them still valid (default %(default)s)"
    )
    parser.add_argument("--seconds", type=int, metavar="N", default=6, help="of load, each time (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=3, help="of which the median is told (default %(default)s)"
    )
    parser.add_argument("--connections", type=int, metavar="N", default=8, help="of the load (default %(default)s)")
    parser.add_argument("--dir", type=Path, help="where the data goes, on the disk to be measured (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    asked = parser.parse_args(arguments)
    if not 0 <= asked.active < asked.certificates:
        parser.error("--certificates must be more than --active")
    if min(asked.seconds, asked.rounds, asked.connections) < 1:
        parser.error("--seconds, --rounds and --connections are 1 at least")
    return asked


def read_login_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/login",
        description="`safe-session ssh`, `bao ssh -mode=ca` and plain `ssh` run `true` on a loopback sshd, by turns.",
    )
    parser.add_argument("--logins", type=int, metavar="N", default=25, help="of each kind (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    asked = parser.parse_args(arguments)
    if asked.logins < 1:
        parser.error("--logins is 1 at least")
    return asked


def read_revocation_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/revocation",
        description="Revocation lists of 100,000 serials; `certs who` and `freeze all` with very many certificates.",
    )
    parser.add_argument(
        "--certificates", type=int, metavar="N", default=1_000_000, help="on record (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", default=5, help="of each list (default %(default)s)")
    parser.add_argument("--dir", type=Path, help="where the data goes, on the disk to be measured (default: TMPDIR)")
    asked = parser.parse_args(arguments)
    if min(asked.certificates, asked.repeats) < 1:
        parser.error("--certificates and --repeats are 1 at least")
    return asked


def read_sign_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/sign",
        description="OpenBao (raft storage, file audit device, Ed25519 CA) and this service under the same load.",
    )
    parser.add_argument("--seconds", type=int, metavar="N", default=8, help="of load, each time (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=3, help="of which the median is told (default %(default)s)"
    )
    parser.add_argument(
        "--connections", default="1,8,32", help="numbers of connections to measure at (default %(default)s)"
    )
    parser.add_argument("--only", choices=("OpenBao", "signer"), help="measure one side alone")
    parser.add_argument("--dir", type=Path, help="where the data goes, on the disk to be measured (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    asked = parser.parse_args(arguments)
    try:
        asked.connections = [int(number) for number in asked.connections.split(",")]
    except ValueError:
        parser.error("--connections wants numbers with commas between them")
    if min(asked.seconds, asked.rounds, *asked.connections) < 1:
        parser.error("--seconds, --rounds and --connections are 1 at least")
    return asked


def read_soak_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/soak", description="The service under a steady load for a long time, and what grows."
    )
    parser.add_argument("--minutes", type=float, metavar="N", default=30, help="of load (default %(default)s)")
    parser.add_argument(
        "--rate", type=float, metavar="N", default=300, help="signatures a second (default %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", default=30, help="windows that are measured (default %(default)s)"
    )
    parser.add_argument("--dir", type=Path, help="where the data goes, on the disk to be measured (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    asked = parser.parse_args(arguments)
    if asked.minutes <= 0 or asked.rate <= 0:
        parser.error("--minutes and --rate are more than 0")
    if asked.samples < 3:
        parser.error("--samples is 3 at least: two of them make a slope, and the first warms up")
    return asked


def read_strangers_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/strangers", description="Honest signatures while strangers attack the service."
    )
    parser.add_argument("--seconds", type=int, metavar="N", default=4, help="of load, each time (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=5, help="of which the median is shown (default %(default)s)"
    )
    parser.add_argument("--rate", type=float, metavar="N", default=500, help="attacks a second (default %(default)s)")
    parser.add_argument(
        "--only", choices=sorted(ATTACKS), metavar="KIND", help=f"one attack alone: {', '.join(sorted(ATTACKS))}"
    )
    asked = parser.parse_args(arguments)
    if min(asked.seconds, asked.rounds, asked.rate) < 1:
        parser.error("--seconds, --rounds and --rate are 1 at least")
    return asked


def read_witness_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/bench/witness", description="What the ledger's Merkle tree, its proofs and a witness cost."
    )
    parser.add_argument(
        "--events", type=int, metavar="N", default=1_000_000, help="under the proofs (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=5, help="of which the median is shown (default %(default)s)"
    )
    parser.add_argument("--dir", type=Path, help="where the data goes, on the disk to be measured (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    asked = parser.parse_args(arguments)
    if asked.events < 10 or asked.rounds < 1:
        parser.error("--events is 10 at least, --rounds 1")
    return asked


_OPTIONS = {
    "console": read_console_options,
    "cutover": read_cutover_options,
    "hosts": read_hosts_options,
    "ledger": read_ledger_options,
    "login": read_login_options,
    "revocation": read_revocation_options,
    "sign": read_sign_options,
    "soak": read_soak_options,
    "strangers": read_strangers_options,
    "witness": read_witness_options,
}

if __name__ == "__main__":
    _OPTIONS[sys.argv[1]](sys.argv[2:])
