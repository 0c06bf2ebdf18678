"""`scripts/bench/console`: how long the console's pages take with very many certificates on record, and their size.

Beside them, what notices cost a signature. A page is fetched as a browser with a session does, from the real service;
the time is that of the whole HTTP request on loopback, the client's part included.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median, quantiles
from typing import Final
from urllib.parse import quote, urlencode

from scripts.bench.figures import Target, render_json, render_table, render_targets
from scripts.bench.filling import IDENTITIES, RARE, ROLES, fill_ledger
from scripts.bench.load import BadRun, Missing, require_wrk
from scripts.bench.machine import describe_machine, render_machine
from scripts.bench.notices_cost import measure_notices
from scripts.bench.options import read_console_options
from scripts.bench.sides import new_service
from scripts.bench.terminal import show_progress
from signer.ledger.audit import rebuild
from signer.ledger.pages import CertificateReader
from signer.ledger.store import Ledger
from signer.model import Filter
from tests.parts.keys import make_key
from tests.parts.service import Service

REFUSAL_EVERY: Final = 20  # certificates
PAUSE: Final = 0.25  # seconds between two pages: an identity that asks without pause gets a tenth of the reader's time
MOST_MS: Final = 100
MOST_BYTES: Final = 50_000
Figures = dict[str, float]


def main() -> int:
    asked = read_console_options()
    machine = describe_machine()
    print(render_machine(machine))
    try:
        require_wrk()
        with tempfile.TemporaryDirectory(prefix="signer-bench-", dir=asked.dir) as folder:
            signing = measure_notices(Path(folder), asked.turns)
        pages = measure(asked)
    except (Missing, BadRun) as error:
        print(f"scripts/bench/console: error: {error}", file=sys.stderr)
        return 1
    rows: list[list[str | float | None]] = [
        [path, page["median_ms"], page["p99_ms"], page["first_ms"], page["bytes"]] for path, page in pages.items()
    ]
    print(render_table(("page", "median ms", "p99 ms", "first ms", "bytes"), rows))
    print(render_table(("what", "figure"), [[name, value] for name, value in signing.items()]))
    targets = [
        Target("slowest page, median", max(page["median_ms"] for page in pages.values()), "at most", MOST_MS, " ms"),
        Target("largest page", max(page["bytes"] for page in pages.values()), "at most", MOST_BYTES, " bytes"),
        Target("keeper's CPU for a signature, with notices", signing["notices_ratio"], "at most", 1.03, " x without"),
    ]
    print(render_targets(targets))
    if asked.json is not None:
        asked.json.write_text(
            render_json(machine, {"pages": pages, "signing": signing}, targets, certificates=asked.certificates)
        )
    return 0


def measure(asked: argparse.Namespace) -> dict[str, Figures]:
    """The figures of each page."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="signer-bench-", dir=asked.dir)))
        service = new_service(folder / "service", make_key(folder, "ed25519", "bench-ca"))
        service.run_dir.mkdir(mode=0o700)
        service.data_dir = asked.ledger or service.data_dir
        if not service.data_dir.exists():
            fill(service.data_dir, asked.certificates)
        paths = page_paths(service.data_dir)
        running.enter_context(service)
        return fetch_pages(service, paths, asked.repeats)


def fill(data_dir: Path, certificates: int) -> None:
    """Makes a ledger of so many certificates, with its views."""
    data_dir.mkdir(mode=0o700, parents=True)
    fill_ledger(
        data_dir,
        certificates,
        min(2_000, certificates // 2),
        int(time.time()),
        lambda done, of: show_progress(f"filling: {done:,} of {of:,}"),
        REFUSAL_EVERY,
    )
    show_progress("folding")
    with closing(Ledger(data_dir)) as ledger:
        rebuild(ledger)


def page_paths(data_dir: Path) -> list[str]:
    """Each search where it is easy and where it is hard, and pages that the navigation does not name."""
    with closing(CertificateReader(data_dir)) as reader:
        (middle,) = reader.page(Filter(before=reader.head().seq // 2, limit=1))[0]

    def certificates(**wanted: str) -> str:
        return f"/console/certificates?{urlencode({'live': 'no', **wanted})}"

    def ledger(**wanted: str) -> str:
        return f"/console/ledger?{urlencode(wanted)}"

    return [
        certificates(),
        certificates(before=str(middle.seq)),
        certificates(identity=IDENTITIES[7]),
        certificates(role=ROLES[2], principal=ROLES[1]),
        certificates(identity=RARE, role=ROLES[2]),
        certificates(principal=RARE),
        certificates(fingerprint=middle.fingerprint),
        certificates(live="yes", identity=RARE),
        f"/console/certificates/{middle.serial}",
        "/console/people/" + quote("operator"),
        ledger(kind="others"),
        ledger(kind="certificate", identity=RARE),
        ledger(kind="request.refused", identity=IDENTITIES[7]),
        ledger(identity=IDENTITIES[7], since="2h"),
        ledger(identity=IDENTITIES[7], before=str(middle.seq)),
        ledger(kind="freeze"),
    ]


def fetch_pages(service: Service, paths: list[str], repeats: int) -> dict[str, Figures]:
    """The figures of each page of the navigation and of `paths`, in rounds over all of them.

    Raises `BadRun` for an answer that is not 200.
    """
    sizes: dict[str, int] = {}
    with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)) as connection:
        cookie = sign_in(service, connection)
        paths = [*pages_of_navigation(connection, cookie), *paths]
        times: dict[str, list[float]] = {path: [] for path in paths}
        for number in range(repeats):
            show_progress(f"pages, round {number + 1} of {repeats}")
            for path in paths:
                time.sleep(PAUSE)
                clock = time.perf_counter()
                connection.request("GET", path, headers={"Cookie": cookie})
                answer = connection.getresponse()
                body = answer.read()
                times[path].append((time.perf_counter() - clock) * 1000)
                if answer.status != 200:
                    raise BadRun(f"GET {path}: {answer.status} {body[-400:]!r}")
                sizes[path] = max(len(body), sizes.get(path, 0))
    show_progress("")
    return {
        path: {
            "median_ms": median(found),
            "p99_ms": quantiles(found, n=100, method="inclusive")[98] if len(found) > 1 else found[0],
            "first_ms": found[0],
            "bytes": float(sizes[path]),
        }
        for path, found in times.items()
    }


def pages_of_navigation(connection: http.client.HTTPConnection, cookie: str) -> list[str]:
    """The pages that the navigation links to; raises `BadRun`."""
    connection.request("GET", "/console", headers={"Cookie": cookie})
    page = connection.getresponse().read().decode()
    found = re.findall(r'<li><a href="(/console[^"]*)"', page.partition("</nav>")[0])
    if "/console" not in found:
        raise BadRun(f"GET /console: no navigation: {page[-400:]!r}")
    return found


def sign_in(service: Service, connection: http.client.HTTPConnection) -> str:
    """The cookie of a new session of the operator."""
    form = urlencode({"token": service.tokens["operator"]})
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Origin": service.address}
    connection.request("POST", "/console/sign-in", form, headers)
    answer = connection.getresponse()
    answer.read()
    cookie = answer.headers.get("Set-Cookie", "").partition(";")[0]
    if answer.status != 303 or not cookie:
        raise BadRun(f"POST /console/sign-in: {answer.status} {json.dumps(dict(answer.headers))[:200]}")
    return cookie


if __name__ == "__main__":
    sys.exit(main())
