"""The benchmarks' own parts: what wrk said, requests, turns, targets, options, and a filled ledger that verifies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scripts.bench import (
    attack,
    console_bench,
    ledger_bench,
    login_bench,
    options,
    sign_bench,
    soak_bench,
    strangers_bench,
)
from scripts.bench.filling import RARE, fill_ledger
from scripts.bench.load import BadRun, Run, new_public_line, read_run, write_bodies
from scripts.bench.machine import cpu_seconds, process_tree, pss_megabytes
from signer.ledger.audit import verify
from signer.ledger.pages import CertificateReader
from signer.model import EventFilter, Filter
from signer.ssh.publickey import parse_public_key

NOW = 2_000_000_000


def test_what_wrk_measured_is_read_from_among_what_else_it_says() -> None:
    said = 'Running 1s test\nBENCH {"answers": 500, "errors": 2, "us": 2000000, "p50_us": 1500, "p99_us": 20000}\n'
    run = read_run(said)
    assert run == Run(answers=500, errors=2, seconds=2.0, p50=1.5, p99=20.0)
    assert run.rate == 250


def test_a_wrk_that_measured_nothing_is_no_result() -> None:
    with pytest.raises(BadRun, match="cannot connect"):
        read_run("unable to connect: cannot connect\n")


def test_no_two_bodies_ask_for_the_same_key(tmp_path: Path) -> None:
    write_bodies(tmp_path / "bodies", 500)
    keys = {json.loads(line)["public_key"] for line in (tmp_path / "bodies").read_text().splitlines()}
    assert len(keys) == 500


def test_the_keys_that_are_sent_are_ones_that_the_service_takes() -> None:
    assert parse_public_key(new_public_line()).kind == "ssh-ed25519"


def test_every_way_to_log_in_comes_first_as_often() -> None:
    rounds = [login_bench.rotated(["a", "b", "c"], number) for number in range(4)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_added_time_is_against_the_plain_login_of_the_same_round() -> None:
    times = {
        login_bench.PLAIN: [100.0, 200.0, 300.0],
        login_bench.OURS: [110.0, 215.0, 312.0],
        login_bench.BAO: [150.0, 230.0, 340.0],
    }
    assert login_bench.added_times(times) == {login_bench.OURS: 12.0, login_bench.BAO: 40.0}


def _figures(rate: float, p99: float) -> sign_bench.Figures:
    return {"rate": rate, "p99_ms": p99}


def test_signing_is_judged_by_rate_latency_and_memory() -> None:
    middle = {at: {"OpenBao": _figures(1000, 20), "signer": _figures(1200, 5)} for at in (1, 8, 32)}
    targets = sign_bench.read_targets(middle, 90.0)
    assert [(target.found, target.reached) for target in targets] == [
        (1.2, True), (1.2, True), (0.25, True), (1.2, False), (0.25, True), (90.0, True),
    ]  # fmt: skip


def test_one_side_alone_is_not_judged_against_the_other() -> None:
    targets = sign_bench.read_targets({8: {"signer": _figures(1200, 5)}}, None)
    assert [(target.what, target.reached) for target in targets] == [("keeper, launcher and one api worker", None)]


def test_memory_is_that_of_launcher_keeper_and_one_worker() -> None:
    parts: dict[str, float | None] = {
        "together": 140.0, "0 serve": 13.0, "1 api": 26.0, "2 api": 31.5, "3 keeper": 43.0, "4 others": 14.0
    }  # fmt: skip
    assert sign_bench.memory_of_three(parts) == 87.5
    assert sign_bench.memory_of_three({**parts, "3 keeper": None}) is None, "of a keeper that forbids it to this user"
    assert sign_bench.memory_of_three({}) is None


def test_both_servers_and_their_ratio_stand_in_the_table() -> None:
    middle = {8: {"OpenBao": _figures(1000, 20) | _rest(), "signer": _figures(1500, 5) | _rest()}}
    text = sign_bench.render_results(middle, {"signer": {"together": None}})
    assert ["8", "signer", "/", "OpenBao", "1.50", "1.00", "0.25"] in [line.split()[:7] for line in text.splitlines()]
    assert "can be read as root only" in text


def _rest() -> sign_bench.Figures:
    return {"p50_ms": 1.0, "cpu_us": 300.0, "cpus": 1.5, "pss_mb": 80.0}


@pytest.mark.parametrize("words", [["--connections", "8,x"], ["--connections", "0"], ["--seconds", "0"]])
def test_options_that_cannot_be_measured_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.read_sign_options(words)
    assert "usage: scripts/bench/sign" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--rate", "-1"], ["--samples", "2"]])
def test_a_soak_that_shows_no_slope_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.read_soak_options(words)
    assert "usage: scripts/bench/soak" in capsys.readouterr().err


def test_the_slope_of_a_soak_leaves_the_first_window_out() -> None:
    samples = [{"PSS MB": value} for value in (500.0, 100.0, 102.0, 104.0)]
    found = soak_bench.summarize(samples, window_minutes=2)
    assert found == {"PSS MB": {"start": 100.0, "end": 104.0, "slope": 60.0}}


def test_a_request_of_a_soak_that_fails_ends_it() -> None:
    load = soak_bench.Load("http://127.0.0.1:1/sign", "token", rate=300, seconds=[0.1], faults=["503 b''"])
    with pytest.raises(BadRun, match="1 requests failed, first: 503"):
        load.take_window()


def test_a_ledger_needs_more_certificates_than_active_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.read_ledger_options(["--certificates", "100", "--active", "100"])
    assert "must be more than" in capsys.readouterr().err


def test_a_filled_ledger_verifies_and_holds_what_was_asked_for(tmp_path: Path) -> None:
    middle, events = fill_ledger(tmp_path, 12_000, 300, NOW, lambda _done, _of: None)
    reader = CertificateReader(tmp_path, max_missing=12_000)
    assert verify(reader).seq == events == 12_000
    assert len(reader.certificates(Filter(active_at=NOW, limit=1_000))) == 300
    assert len(reader.certificates(Filter(fingerprint=middle))) == 1
    reader.close()


def test_rare_names_come_once_in_very_many_and_are_never_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.bench.filling.RARE_EVERY", 4_000)
    fill_ledger(tmp_path, 12_000, 300, NOW, lambda _done, _of: None)
    reader = CertificateReader(tmp_path, max_missing=12_000)
    assert len(reader.certificates(Filter(identity=RARE))) == 3
    assert reader.certificates(Filter(identity=RARE, active_at=NOW)) == []
    reader.close()


def test_every_kind_of_page_is_asked_for_in_words_that_a_url_can_carry() -> None:
    queries = ledger_bench.page_queries("SHA256:a+b/c", 1_000_000)
    assert queries["fingerprint"] == "fingerprint=SHA256:a%2Bb%2Fc"
    assert all("+" not in query and " " not in query for query in queries.values())


def test_the_console_is_asked_for_each_page_and_each_search_in_words_that_a_url_can_carry(tmp_path: Path) -> None:
    console_bench.fill(tmp_path / "data", 300)
    paths = console_bench.page_paths(tmp_path / "data")
    assert len(paths) == len(set(paths))
    assert all(" " not in path and "SHA256:" not in path for path in paths)
    reader = CertificateReader(tmp_path / "data")
    assert len(reader.matching_events(EventFilter(kind="request.refused"))) == 300 // console_bench.REFUSAL_EVERY
    reader.close()


def test_a_process_tree_is_measured_from_its_root() -> None:
    tree = process_tree(os.getpid())
    assert tree[0] == os.getpid()
    assert cpu_seconds(tree) > 0
    memory = pss_megabytes(tree)
    assert memory is not None
    assert memory > 1


def test_an_attacker_that_was_late_does_not_catch_up_in_a_burst() -> None:
    now = [0.0]
    numbers = attack.paced(100, lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + seconds))
    times = []
    for number in numbers:
        times.append(round(now[0], 3))
        if number == 3:
            now[0] += 1  # it waits for the processor
        if number == 8:
            break
    assert times == [0, 0.01, 0.02, 0.03, 1.03, 1.03, 1.03, 1.04, 1.05]


def test_what_an_attack_costs_is_what_its_turn_used_beyond_its_certificates() -> None:
    quiet: strangers_bench.Figures = {"rate": 1000.0, "p99": 4.0, "answers": 4000.0, "keeper": 2.0, "whole": 4.0}
    loud: strangers_bench.Figures = {"rate": 900.0, "p99": 6.0, "answers": 3600.0, "keeper": 1.9, "whole": 4.1}
    found = strangers_bench.compare(quiet, loud, 2000)
    assert found == {
        "slower": 0.9,
        "tail": 1.5,
        "keeper_us": pytest.approx(50),
        "whole_us": pytest.approx(250),
    }
    text = strangers_bench.render_figures({"quiet": [quiet], "body": [loud | found]}, 500)
    assert "body: p99 of quiet 1.50 (at most 2.00: reached)" in text
