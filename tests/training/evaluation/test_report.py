"""A report of results written by hand; whole ones are read in test_run.py."""

from __future__ import annotations

from typing import Any

from circuit_breakers_training.evaluation.report import result_files

EMPTY: dict[str, Any] = {
    "schema_version": 1,
    "breaker": {"name": "b", "digest": "0" * 64},
    "model": {"id": "m"},
    "settings": {},
    "overlap_with_training": "unknown",
    "degenerate_limits": None,
    "suites": {},
    "failures": {},
    "environment": {"backend": "transformers", "device": "d", "versions": {"torch": "1"}},
    "rows": [],
}


def test_capability_alone_has_no_plots() -> None:
    tasks = {"arc": {"base": {"acc": 0.25}, "adapter": {"acc": 0.24}}}
    suites = {
        "capability": {
            "kind": "capability",
            "num_conversations": {"all": 9, "twin": 1},
            "perplexity": {
                "all": {
                    **{"base": 2.0, "adapter": 2.1, "adapter_change": 0.05},
                    **{"adapter_doubled": 1, "adapter_change_of_rest": 0.002},
                },
                "twin": {
                    **{"base": 2.0, "adapter": 6.0, "adapter_change": 2.0},
                    **{"adapter_doubled": 1, "adapter_change_of_rest": None},
                },
            },
        },
        "lm-eval": {"kind": "capability", "limit": 7, "tasks": tasks},
    }
    files = result_files({**EMPTY, "suites": suites}, [], [])
    assert set(files) == {"results.json", "report.md"}
    report = files["report.md"].decode()
    assert "| all | 9 | 2.00 | 2.10 | +5.0% | 1 | +0.2% |" in report
    assert "| twin | 1 | 2.00 | 6.00 | +200.0% | 1 |  |" in report
    assert "| arc | acc | 0.2500 | 0.2400 |" in report
    assert "**Overlap with training is unknown**" in report
    assert "## Attack success" not in report


def test_failures_come_first() -> None:
    failed = {"direct": ["got 3 texts"]}
    report = result_files({**EMPTY, "failures": failed}, [], [])["report.md"].decode()
    assert "- `direct`: got 3 texts" in report.split("## ")[1]
