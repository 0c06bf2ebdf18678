"""What Prometheus reads: names, zeros at the start, and clocks that tell the truth."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from signer.authority.shadow import Shadow
from signer.error_catalogue import COUNTED_CODES
from signer.errors import Unavailable
from signer.ledger.schema import FILE_NAME
from signer.model import Event
from signer.service.metrics import Metrics, TimedLedger, commit_histogram

PACKAGE = Path(__file__).parents[3] / "signer"
KEEPERS = (
    "protocol/sign_request",
    "protocol/commands",
    "authority/core",
    "policy/decide",
    "authority/queries",
    "policy/rules",
    "ssh/publickey",
)
ERRORS = {"Refused", "NotAuthenticated", "BadRequest", "BadPublicKey", "NotFound", "Unavailable", "LedgerBroken"}


def make_metrics(*roles: str, shadow: Shadow | None = None) -> Metrics:
    gauges = (GaugeMetricFamily("signer_key_age_seconds", "since", value=3.0),)
    return Metrics(lambda: gauges, lambda: roles, commit_histogram(), shadow)


def samples(metrics: Metrics, *, by_role: bool = True) -> dict[str, float]:
    """`name{label=value}` to value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render(by_role=by_role)):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_every_role_and_every_refusal_has_a_counter_at_zero_from_the_start() -> None:
    found = samples(make_metrics("llmops", "backup"))
    assert found["signer_signatures_total{role=llmops}"] == 0
    assert found["signer_signatures_total{role=backup}"] == 0
    for code in COUNTED_CODES:
        assert found[f"signer_refusals_total{{code={code}}}"] == 0


def test_audit_totals_name_no_role_and_have_every_count() -> None:
    shadow = Shadow(lambda _: None)
    for role, field in (("llmops", "principals"), ("backup", "principals"), ("backup", "key id")):
        shadow.compared[role] += 1
        shadow.differences[role, field] += 1
    metrics = make_metrics("llmops", "backup", shadow=shadow)
    for role in ("llmops", "llmops", "backup"):
        metrics.count_signature(role)
    text = metrics.render(by_role=False)
    assert "llmops" not in text
    assert "backup" not in text
    found = samples(metrics, by_role=False)
    assert found["signer_signatures_total"] == 3
    assert found["signer_shadow_compared_total"] == 3
    assert found["signer_shadow_differences_total{field=principals}"] == 2
    assert found["signer_refusals_total{code=frozen}"] == 0
    bare = {re.sub(r"(?<=[{,])role=\w+,?", "", name).replace("{}", "").replace(",}", "}") for name in samples(metrics)}
    assert found.keys() == bare


def test_what_was_counted_is_told_even_of_a_role_that_is_gone() -> None:
    metrics = make_metrics("llmops")
    for role in ("llmops", "llmops", "gone"):
        metrics.count_signature(role)
    for _ in range(3):
        metrics.count_refusal("frozen")
    found = samples(metrics)
    assert found["signer_signatures_total{role=llmops}"] == 2
    assert found["signer_signatures_total{role=gone}"] == 1
    assert found["signer_refusals_total{code=frozen}"] == 3


def test_what_a_shadow_counted_is_told_by_role_and_field_and_nothing_where_there_is_none() -> None:
    metrics = make_metrics("llmops")
    assert not [name for name in samples(metrics) if name.startswith("signer_shadow_")]
    shadow = Shadow(lambda _fault: None)
    shadow.compared["llmops"] += 3
    shadow.differences["llmops", "key_id"] += 2
    shadow.faults["llmops"] += 1
    found = samples(make_metrics("llmops", shadow=shadow))
    assert found["signer_shadow_compared_total{role=llmops}"] == 3
    assert found["signer_shadow_differences_total{field=key_id,role=llmops}"] == 2
    assert found["signer_shadow_faults_total{role=llmops}"] == 1


def test_the_refusals_of_the_catalogue_contain_every_code_that_the_keepers_modules_raise() -> None:
    raised = set()
    for name in KEEPERS:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                raised |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    assert len(raised) > 40
    assert raised <= set(COUNTED_CODES), "mark them as refusals in the error catalogue"


def test_a_histogram_counts_a_value_in_its_own_bucket_and_all_above() -> None:
    metrics = make_metrics()
    for value in (0.5, 1, 2, 1000):
        metrics.batch.observe(value)
    found = samples(metrics)
    buckets = [found[f"signer_batch_commands_bucket{{le={bound}}}"] for bound in ("1.0", "2.0", "256.0", "+Inf")]
    assert buckets == [2, 3, 3, 4]
    assert (found["signer_batch_commands_sum"], found["signer_batch_commands_count"]) == (1003.5, 4)


def test_names_follow_prometheus_conventions() -> None:
    for name in samples(make_metrics("llmops")):
        family = name.partition("{")[0].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        assert family.startswith("signer_")
        assert family.endswith(("_total", "_seconds", "_commands")), family


def test_every_commit_is_timed_one_that_fails_too(tmp_path: Path) -> None:
    ledger = TimedLedger(tmp_path)
    ledger.commit([Event("keeper.started", "keeper", {})], 1_800_000_000_000)
    ledger.close()
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(Unavailable):
        ledger.commit([Event("keeper.stopped", "keeper", {})], 1_800_000_000_000)
    metrics = Metrics(tuple, tuple, ledger.commit_seconds)
    assert samples(metrics)["signer_ledger_commit_seconds_count"] == 2
