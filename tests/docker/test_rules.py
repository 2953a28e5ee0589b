"""Each alert fires when it should and not when it should not, and says what to do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from .alert_cases import CASES, GENERATED, POLICY, TARGET, Series, requests
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


def run_promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [find_program("promtool"), *arguments], capture_output=True, text=True, timeout=300
    )


def group(name: str, alert: str, at: str, series: Series, labels: str | None) -> dict[str, Any]:
    """A group of promtool's: at the time `at` the alert fires with these labels, or not (None)."""
    severity = alerts()[alert]["labels"]["severity"]
    fixed = f'alertname="{alert}",alertstate="firing"'
    fires = [{"labels": f'ALERTS{{{fixed},severity="{severity}",{labels}}}', "value": 1}]
    return {
        "interval": "1m",
        "input_series": [{"series": k, "values": v} for k, v in series.items()],
        "promql_expr_test": [
            {
                # promtool names a group that fails by its expression.
                "expr": f"ALERTS{{{fixed}}} # {alert}: {name}",
                "eval_time": at,
                "exp_samples": fires if labels is not None else [],
            }
        ],
    }


def failed(tmp_path: Path, groups: list[dict[str, Any]]) -> list[str]:
    """Names of the groups that are not as they say."""
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": groups}))
    # One run for all: promtool takes longer to start than to evaluate.
    done = run_promtool("test", "rules", path)
    names = re.findall(r'expr: ".* # (.+)", time: ', done.stderr + done.stdout)
    assert (done.returncode == 0) == (not names), done.stdout + done.stderr
    return names


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    assert set(CASES) == set(alerts())
    assert all(case.near for case in CASES.values())


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    groups = []
    for alert, case in CASES.items():
        groups.append(group("fires", alert, case.at, case.fires, case.labels))
        groups += [group(why, alert, case.at, series, None) for why, series in case.near.items()]
    assert len(groups) > 3 * len(CASES)
    assert failed(tmp_path, groups) == []


def test_promtool_would_find_an_alert_that_does_otherwise(tmp_path: Path) -> None:
    alert, case = "CircuitBreakersTripBurst", CASES["CircuitBreakersTripBurst"]
    near = next(iter(case.near.values()))
    groups = [
        group("fires", alert, case.at, case.fires, None),
        group("keeps quiet", alert, case.at, near, case.labels),
        group("as it says", alert, case.at, case.fires, case.labels),
    ]
    assert failed(tmp_path, groups) == [f"{alert}: fires", f"{alert}: keeps quiet"]


def test_absence_and_policies(tmp_path: Path) -> None:
    # 20 % of policy p, and with policy q's requests together 2 %.
    quiet = requests("ok").replace('policy="p"', 'policy="q"')
    burst, dead = "CircuitBreakersTripBurst", "CircuitBreakersDeadProbe"
    no_target = 'job="circuit-breakers"'
    groups = [
        group("one policy of two", burst, "65m", CASES[burst].fires | {quiet: "0+90x70"}, POLICY),
        group("no series of scores", dead, "30m", {GENERATED: "0+1x40"}, TARGET),
        group("no such job", "CircuitBreakersDown", "10m", {"a": "1x20"}, no_target),
    ]
    assert failed(tmp_path, groups) == []


def test_promtool_accepts_the_rules() -> None:
    assert f"{len(rules())} rules found" in run_promtool("check", "rules", RULES).stdout


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
