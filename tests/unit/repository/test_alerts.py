"""overlays/monitoring/alerts.yaml: rules that Prometheus reads, about metrics and codes that exist, and that fire."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

from scripts.documents.facts import metric_families
from signer.cli.parser import read_words
from signer.error_catalogue import CATALOGUE
from tests.parts import missing
from tests.parts.documents import ROOT
from tests.parts.yaml_files import parse_yaml

FILE: Final = ROOT / "overlays" / "monitoring" / "alerts.yaml"
RULES: Final[list[dict[str, Any]]] = parse_yaml(FILE.read_text())["groups"][0]["rules"]
METRICS: Final = {row[0].strip("`") for row in metric_families().rows}
# Alert, minutes that pass, the series of a minute each, and the labels of the alert.
FIRING: Final[tuple[tuple[str, int, str, str, dict[str, str]], ...]] = (
    ("SignerDown", 3, 'up{job="signer",instance="a:1"}', "0+0x9", {"job": "signer", "instance": "a:1"}),
    ("SignerCannotRecord", 3, 'signer_refusals_total{code="ledger_unavailable"}', "0 0 5+0x9",
     {"code": "ledger_unavailable"}),
    ("SignerClockBehind", 3, 'signer_refusals_total{code="clock_behind"}', "0 0 1+0x9", {"code": "clock_behind"}),
    ("SignerCannotSign", 3, 'signer_refusals_total{code="vault_sealed"}', "1 1 2+0x9", {"code": "vault_sealed"}),
    ("SignerTokenEndsSoon", 1, 'signer_token_expires_timestamp_seconds{identity="ci"}', "1209000+0x9",
     {"identity": "ci"}),
    ("SignerTokenEnded", 3, 'signer_token_expires_timestamp_seconds{identity="ci"}', "60+0x9", {"identity": "ci"}),
    ("SignerFrozen", 62, "signer_freezes", "1+0x70", {}),
    ("SignerListOld", 1, "signer_list_age_seconds", "400+0x9", {}),
    ("SignerNotCosigned", 61, "signer_ledger_cosigned_timestamp_seconds", "0+0x70", {}),
    ("SignerNoticesDown", 7, "signer_notices_up", "0+0x20", {}),
    ("SignerNoticesFail", 20, 'signer_notices_failed_total{channel="phone"}', "0+1x30", {"channel": "phone"}),
    ("SignerNoticesDropped", 3, 'signer_notices_dropped_total{channel="phone"}', "0 0 2+0x9", {"channel": "phone"}),
    ("SignerListNotCurrent", 4, "signer_list_current", "0+0x9", {}),
    ("SignerIncidentOverdue", 1, "signer_incidents_overdue", "1+0x9", {}),
    ("SignerShadowDiffers", 3, 'signer_shadow_differences_total{field="ttl"}', "0 0 3+0x9", {"field": "ttl"}),
)  # fmt: skip
QUIET: Final = (
    ('up{job="signer",instance="a:1"}', "1+0x70"),
    ('signer_refusals_total{code="frozen"}', "0+3x70"),
    ('signer_refusals_total{code="ledger_unavailable"}', "7+0x70"),
    ('signer_token_expires_timestamp_seconds{identity="ci"}', "99999999+0x70"),
    ("signer_freezes", "0+0x70"),
    ("signer_list_age_seconds", "60+0x70"),
    ("signer_ledger_cosigned_timestamp_seconds", "99999999+0x70"),
    ("signer_notices_up", "1 0 1+0x70"),
    ('signer_notices_failed_total{channel="phone"}', "3+0x70"),
    ("signer_list_current", "1 0 1+0x70"),
)


def test_each_rule_says_what_is_wrong_and_what_to_do() -> None:
    for rule in RULES:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        for command in re.findall(r"`signer ([a-z ]+?)(?: \{\{.*?)?`", rule["annotations"]["action"]):
            assert isinstance(read_words([*command.split(), "--help"]), str)
        for path in re.findall(r"runbooks/\S+\.md", rule["annotations"]["action"]):
            assert (ROOT / path).is_file()


def test_rules_name_metrics_and_codes_that_exist() -> None:
    expressions = "\n".join(rule["expr"] for rule in RULES)
    named = set(re.findall(r"\bsigner_\w+", expressions))
    assert {re.sub(r"_bucket$", "", name) for name in named} <= METRICS
    assert len(named) > 5
    codes = list(CATALOGUE)
    for pattern in re.findall(r'code=~?"([^"]+)"', expressions):
        for part in pattern.split("|"):
            assert [code for code in codes if re.fullmatch(part, code)], part


def _promtool(*words: str | Path) -> str:
    ran = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@missing.needs_promtool
def test_prometheus_reads_the_rules() -> None:
    assert f"{len(RULES)} rules found" in _promtool("check", "rules", FILE)


@missing.needs_promtool
def test_rules_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in RULES}
    tests: list[dict[str, Any]] = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values}],
            "alert_rule_test": [
                {
                    "eval_time": f"{minutes}m",
                    "alertname": alert,
                    "exp_alerts": [{"exp_labels": {**labels, "severity": severities[alert]}}],
                }
            ],
        }
        for alert, minutes, series, values, labels in FIRING
    ]
    tests.append(
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in QUIET],
            "alert_rule_test": [
                {"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": []}
                for alert in severities
                for minutes in (1, 65)
            ],
        }
    )
    rules, cases = tmp_path / "rules.yaml", tmp_path / "test.yaml"
    # promtool would compare annotations, too: here only whether a rule fires is tried
    bare = [{key: value for key, value in rule.items() if key != "annotations"} for rule in RULES]
    rules.write_text(yaml.safe_dump({"groups": [{"name": "signer", "rules": bare}]}))
    cases.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    _promtool("test", "rules", cases)


def test_most_rules_are_tried() -> None:
    assert len({alert for alert, *_ in FIRING}) >= len(RULES) - 2  # the others are about a histogram


def test_alerts_are_named_once() -> None:
    names = [rule["alert"] for rule in RULES]
    assert sorted(set(names)) == sorted(names)
