"""Each alert fires when it should and not when it should not, and says what to do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from .alert_cases import CASES, POLICY, TARGET, Series, requests
from .tools import find_program

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "monitoring" / "rules.yaml"
RUNBOOK = ROOT / "docs" / "runbook.md"


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def run_promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [find_program("promtool"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(tmp_path: Path, alert: str, at: str, series: Series, expected: str | None) -> None:
    """Passes when `alert` fires at the time `at` with the labels `expected`, or not, at None."""
    severity = alerts()[alert]["labels"]["severity"]
    labels = f'alertname="{alert}",alertstate="firing",severity="{severity}",{expected}'
    samples = [{"labels": f"ALERTS{{{labels}}}", "value": 1}] if expected is not None else []
    file = {
        "rule_files": [str(RULES)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}',
                        "eval_time": at,
                        "exp_samples": samples,
                    }
                ],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(file))
    run_promtool("test", "rules", path)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    assert set(CASES) == set(alerts())
    assert all(case.near for case in CASES.values())


@pytest.mark.parametrize("alert", CASES)
def test_alert_fires(tmp_path: Path, alert: str) -> None:
    case = CASES[alert]
    check(tmp_path, alert, case.at, case.fires, case.labels)


@pytest.mark.parametrize(
    ("alert", "why"), [(alert, why) for alert, case in CASES.items() for why in case.near]
)
def test_alert_keeps_quiet(tmp_path: Path, alert: str, why: str) -> None:
    check(tmp_path, alert, CASES[alert].at, CASES[alert].near[why], None)


def test_a_dead_probe_fires_without_any_series_of_scores(tmp_path: Path) -> None:
    check(tmp_path, "CircuitBreakersDeadProbe", "20m", {requests("ok"): "0+1x30"}, TARGET)


def test_an_unknown_job_fires_as_down(tmp_path: Path) -> None:
    check(tmp_path, "CircuitBreakersDown", "10m", {"a": "1x20"}, 'job="circuit-breakers"')


def test_a_fast_burst_counts_by_policy(tmp_path: Path) -> None:
    # 20 % of policy p, and with policy q's requests together 2 %.
    quiet = requests("ok").replace('policy="p"', 'policy="q"')
    fires = CASES["CircuitBreakersTripBurst"].fires | {quiet: "0+90x70"}
    check(tmp_path, "CircuitBreakersTripBurst", "65m", fires, POLICY)


def test_promtool_accepts_the_rules() -> None:
    assert f"{len(rules())} rules found" in run_promtool("check", "rules", RULES)


def test_alerts_say_what_to_do() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url"}, name
        assert "First: " in notes["description"], name
        assert notes["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        # A label that the alert does not have would be printed as nothing.
        used = set(re.findall(r"\$labels\.(\w+)", notes["description"]))
        assert used <= set(re.findall(r"(\w+)=", CASES[name].labels)), name


def test_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    sections = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:]
    titles = [section.partition("\n")[0] for section in sections]
    assert sorted(titles) == sorted(alerts())
    for title, section in zip(titles, sections, strict=True):
        parts = re.findall(r"^\*\*(.+?)\.\*\*", section, flags=re.MULTILINE)
        assert parts == ["Means", "Impact", "First checks", "Mend"], title
        assert "```console" in section, title
