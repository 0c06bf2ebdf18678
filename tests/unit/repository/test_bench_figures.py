"""Figures of the benchmarks: medians, ratios, targets, and how they are shown."""

from __future__ import annotations

import json

import pytest

from scripts.bench.figures import (
    Target,
    medians,
    ratio,
    render_json,
    render_number,
    render_table,
    render_targets,
)


def test_medians_are_taken_for_each_figure_alone() -> None:
    assert medians([{"a": 1, "b": 10}, {"a": 3, "b": 30}, {"a": 2, "b": 20}]) == {"a": 2, "b": 20}


def test_a_figure_that_one_sample_lacks_is_the_median_of_the_others() -> None:
    assert medians([{"a": 1.0}, {"a": None}, {"a": 3.0}]) == {"a": 2.0}


def test_a_figure_that_no_sample_has_stays_unmeasured() -> None:
    assert medians([{"memory": None}, {"memory": None}]) == {"memory": None}


@pytest.mark.parametrize("ours, theirs", [(None, 1.0), (1.0, None), (1.0, 0.0)])
def test_there_is_no_ratio_to_what_was_not_measured(ours: float | None, theirs: float | None) -> None:
    assert ratio(ours, theirs) is None


def test_a_ratio_is_ours_in_multiples_of_theirs() -> None:
    assert ratio(3.0, 2.0) == 1.5


@pytest.mark.parametrize(
    "found, sense, reached",
    [
        (1.0, "at least", True),
        (0.99, "at least", False),
        (1.0, "at most", True),
        (1.01, "at most", False),
        (None, "at least", None),
        (None, "at most", None),
    ],
)
def test_a_target_is_reached_at_its_bound_and_not_beyond(found: float | None, sense: str, reached: bool | None) -> None:
    target = Target("x", found, "at least" if sense == "at least" else "at most", 1.0)
    assert target.reached is reached


def test_targets_say_what_was_reached_what_was_not_and_what_nobody_measured() -> None:
    line = render_targets(
        [
            Target("rate", 1.25, "at least", 1.0, " x theirs"),
            Target("p99", 0.75, "at most", 0.5),
            Target("memory", None, "at most", 150, " MB"),
        ]
    )
    assert line == (
        "targets: rate 1.25 x theirs (at least 1.00 x theirs: reached); p99 0.75 (at most 0.50: NOT reached); "
        "memory - MB (at most 150 MB: not measured)"
    )


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (0, "0.00"), (0.0123, "0.012"), (0.5, "0.50"), (12.34, "12.3"), (123.4, "123"), (98765.4, "98,765")],
)
def test_numbers_keep_the_digits_that_matter(value: float | None, text: str) -> None:
    assert render_number(value) == text


def test_a_table_lines_names_up_to_the_left_and_numbers_to_the_right() -> None:
    table = render_table(("server", "rate"), [("ours", 1234.0), ("theirs", None)])
    assert table.splitlines() == ["server   rate", "------  -----", "ours    1,234", "theirs      -"]


def test_json_holds_machine_settings_figures_and_verdicts() -> None:
    target = Target("rate", 2.0, "at least", 1.0, " x theirs")
    told = json.loads(render_json({"cores": 2}, {"rate": 2.0}, [target], seconds=8))
    assert told == {
        "machine": {"cores": 2},
        "settings": {"seconds": 8},
        "figures": {"rate": 2.0},
        "targets": [
            {"what": "rate", "found": 2.0, "sense": "at least", "bound": 1.0, "unit": "x theirs", "reached": True}
        ],
    }
