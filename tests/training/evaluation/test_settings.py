from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.evaluation.llm_judge import JudgePrompt
from circuit_breakers_training.evaluation.settings import EvaluationSettings

PROMPT = JudgePrompt("{behavior} {generation}")
PLACE = {"artifact": Path("breaker"), "out": Path("results")}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"limit": 0}, "got limit 0"),
        ({"per_prompt": 0}, "got per_prompt 0"),
        ({"stop_within": 0}, "got stop_within 0"),
        ({"temperature": -1.0}, "got temperature -1.0"),
        ({"temperature": float("nan")}, "got temperature nan"),
        ({"degenerate_share": 1.0}, "got a degenerate share of 1.0"),
        ({"backend": "jax"}, "got backend 'jax'"),
        ({"suites": ()}, "got no suites"),
        ({"judge_url": "http://x/v1"}, "--judge-url and --judge-model"),
        ({"judge_model": "m"}, "--judge-url and --judge-model"),
        ({"judge_url": "ftp://x", "judge_model": "m"}, "expected an http or https URL"),
        ({"judge_prompt": PROMPT}, "got --judge-prompt without --judge-url"),
        ({"suites": ("lm-eval",)}, "got no tasks"),
        ({"lm_eval_tasks": ("arc_easy",)}, "without the suite lm-eval"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EvaluationSettings(**{**PLACE, **wrong})
    assert said in str(caught.value)


def test_a_missing_harness_is_named() -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed here")
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        EvaluationSettings(**PLACE, suites=("lm-eval",), lm_eval_tasks=("arc_easy",))


def test_recorded_settings_say_what_the_judge_was_asked() -> None:
    judge = {"judge_url": "http://x/v1", "judge_model": "m"}
    own = EvaluationSettings(**PLACE, **judge).to_json()
    other = EvaluationSettings(**PLACE, **judge, judge_prompt=PROMPT).to_json()
    assert own["judge_prompt_sha256"] is None
    assert other["judge_prompt_sha256"] == hashlib.sha256(PROMPT.template.encode()).hexdigest()


def test_recorded_settings_hold_no_path_of_this_machine(tmp_path: Path) -> None:
    settings = EvaluationSettings(
        artifact=tmp_path / "breaker", out=tmp_path / "out", prompt_files=(tmp_path / "p.jsonl",)
    )
    assert str(tmp_path) not in str(settings.to_json())
    assert settings.to_json()["prompt_files"] == ["p.jsonl"]
