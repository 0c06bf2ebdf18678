"""`scripts/bench/revocation`: revocation lists, `certs who` and `freeze all` against the times that were promised."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Final

from scripts.bench.figures import Target, render_number, render_table, render_targets
from scripts.bench.filling import fill_ledger
from scripts.bench.load import BadRun
from scripts.bench.machine import describe_machine, render_machine
from scripts.bench.options import read_revocation_options
from scripts.bench.sides import new_service
from scripts.bench.terminal import show_progress
from signer.ledger.audit import rebuild
from signer.ledger.lookups import FindCertificate
from signer.ledger.pages import CertificateReader
from signer.ledger.store import Ledger
from signer.protocol.commands import MAX_REPLY
from signer.ssh.krl import RevocationList, decode_krl, encode_krl, group_serials, merge_ranges
from tests.parts.keys import Key, make_key

SERIALS: Final = 100_000
CONTIGUOUS: Final = "contiguous, one by one"
SIGNED: Final = (200, 201)
HEAD: Final = 100  # bytes that a list may have beside its serials; the format has no shorter form for these
MAX_GAP: Final = 80  # serials from one to the next, beyond which nothing changes


def build(serials: Iterable[int]) -> tuple[float, bytes]:
    """Milliseconds for the list of these serials of one CA, and the list."""
    started = time.perf_counter()
    certificates = merge_ranges(group_serials(serials))
    made = RevocationList(1, 1, "signer 1", MappingProxyType({b"ca": certificates}))
    data = encode_krl(made)
    return (time.perf_counter() - started) * 1000, data


def build_range(first: int, last: int) -> tuple[float, bytes]:
    """As `build`, of one revocation of a range of serials."""
    started = time.perf_counter()
    certificates = ((first, last),)
    data = encode_krl(RevocationList(1, 1, "signer 1", MappingProxyType({b"ca": certificates})))
    return (time.perf_counter() - started) * 1000, data


def measure_lists(rounds: int) -> dict[str, tuple[float, int]]:
    """Milliseconds (median) and bytes for each pattern; the worst gap is found by trying all."""
    worst_gap = max(range(2, MAX_GAP), key=lambda gap: len(build(range(1, SERIALS // 10 * gap, gap))[1]))
    source = random.Random(1)  # noqa: S311 - the same serials in every run
    patterns = {
        f"every {worst_gap}th, the largest of all gaps": list(range(1, SERIALS * worst_gap, worst_gap)),
        "random, as Vault's are": sorted(source.sample(range(1, 2**63), SERIALS)),
        "every second": list(range(1, 2 * SERIALS, 2)),
        CONTIGUOUS: list(range(1, SERIALS + 1)),
    }
    found = {}
    for name, serials in patterns.items():
        made = [build(serials) for _ in range(rounds)]
        decode_krl(made[0][1])
        found[name] = median(ms for ms, _ in made), len(made[0][1])
    made = [build_range(1, SERIALS) for _ in range(rounds)]
    return {**found, "contiguous, as a range": (median(ms for ms, _ in made), len(made[0][1]))}


def measure_who(data_dir: Path, certificates: int, repeats: int) -> list[float]:
    """Milliseconds of server time for each look-up of one certificate of very many, as `certs who` makes them."""
    source = random.Random(2)  # noqa: S311 - the same serials in every run
    times = []
    with closing(CertificateReader(data_dir)) as reader:
        for _ in range(repeats):
            lookup = FindCertificate("operator", MAX_REPLY, source.randint(1, certificates), None, int(time.time()))
            started = time.perf_counter()
            lookup.answer(reader)
            times.append((time.perf_counter() - started) * 1000)
    return times


def measure_freeze(folder: Path, ca: Key) -> float:
    """Seconds from `freeze all` to its answer; checks that nothing is signed afterwards."""
    user = make_key(folder, "ed25519", "user")
    with new_service(folder, ca) as service:
        if (before := service.sign(user.public_line).status) not in SIGNED:
            raise BadRun(f"before the freeze, signing answers {before}")
        started = time.perf_counter()
        answer = service.ask("POST", "/api/freezes", {"scope": "all", "reason": "benchmark"}, identity="operator")
        seconds = time.perf_counter() - started
        after = service.sign(user.public_line).status
        if answer.status not in SIGNED or after in SIGNED:
            raise BadRun(f"the freeze answers {answer.status}, and signing after it {after}")
    return seconds


def main() -> int:
    asked = read_revocation_options()
    print(render_machine(describe_machine()))
    try:
        lists = measure_lists(asked.repeats)
        with tempfile.TemporaryDirectory(prefix="revocation-", dir=asked.dir) as place:
            folder = Path(place)
            ca = make_key(folder, "ed25519", "ca")
            service = new_service(folder / "service", ca)
            service.data_dir.mkdir(mode=0o700)
            service.run_dir.mkdir(mode=0o700)
            fill_ledger(
                service.data_dir,
                asked.certificates,
                asked.certificates // 500,
                int(time.time()),
                lambda done, of: show_progress(f"filling: {done:,} of {of:,}"),
            )
            with closing(Ledger(service.data_dir)) as ledger:
                rebuild(ledger)
            who = measure_who(service.data_dir, asked.certificates, asked.repeats * 40)
            frozen = measure_freeze(folder / "service", ca)
    except BadRun as error:
        print(f"scripts/bench/revocation: error: {error}", file=sys.stderr)
        return 1
    rows = [[name, render_number(ms), f"{size:,}"] for name, (ms, size) in lists.items()]
    print(render_table([f"{SERIALS:,} serials", "ms", "bytes"], rows))
    print(f"certs who: median {median(who):.2f} ms of server time, slowest {max(who):.2f} ms of {len(who)}")
    largest = max(size for _, size in lists.values())
    targets = [
        Target("list of a range", lists["contiguous, as a range"][0], "at most", 5, " ms"),
        Target("list of contiguous serials, one by one", lists[CONTIGUOUS][0], "at most", 5, " ms"),
        Target("slowest list", max(ms for ms, _ in lists.values()), "at most", 1_000, " ms"),
        Target("largest list, beside 8 bytes a serial", largest - 8 * SERIALS, "at most", HEAD, " bytes"),
        Target(f"certs who over {asked.certificates:,}, the slowest", max(who), "at most", 50, " ms"),
        Target("freeze all", frozen, "at most", 1, " s"),
    ]
    print(render_targets(targets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
