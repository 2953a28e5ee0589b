"""Whole evaluations of the tiny breaker: every suite, every refusal, every failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner

from circuit_breakers.cli import app
from circuit_breakers.errors import (
    BreakerMismatchError,
    CalibrationError,
    ConfigError,
    DataError,
    EvaluationError,
)
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.evaluation.capability import benign_answers
from circuit_breakers_training.evaluation.run import evaluate_breaker
from circuit_breakers_training.evaluation.settings import EvaluationSettings
from circuit_breakers_training.evaluation.suites import DEFAULT_SUITES
from circuit_breakers_training.fluency import LanguageModel
from circuit_breakers_training.fluency import perplexity as perplexity_of
from circuit_breakers_training.render import load_tokenizer, render_all

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 5


class JudgeServer(Protocol):
    url: str
    bodies: list[dict[str, Any]]


def _settings(artifact: Path, base: Path, out: Path, **more: Any) -> EvaluationSettings:
    fields: dict[str, Any] = {
        "artifact": artifact,
        "model": str(base),
        "out": out,
        "limit": LIMIT,
        "max_new_tokens": 8,
        "stop_within": 3,
        "backend": "transformers",
    }
    return EvaluationSettings(**{**fields, **more})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(cache))


@pytest.fixture
def results(
    breaker_dir: Path, roomy_llama: Path, data_dir: Path, tmp_path: Path
) -> tuple[dict[str, Any], Path]:
    out = tmp_path / "results"
    settings = _settings(breaker_dir, roomy_llama, out, data=data_dir)
    return evaluate_breaker(settings), out


def test_default_suites_from_end_to_end(
    results: tuple[dict[str, Any], Path], data_dir: Path, tmp_path: Path
) -> None:
    found, out = results
    assert json.loads((out / "results.json").read_text()) == found
    assert tuple(found["suites"]) == DEFAULT_SUITES
    attacks = [name for name, suite in found["suites"].items() if suite["kind"] == "attack"]
    # Five attack suites with both labels, one of look-alikes.
    assert len(found["rows"]) == 5 * 2 * LIMIT + LIMIT
    for name in attacks:
        suite = found["suites"][name]
        assert (suite["num_harmful"], suite["num_benign"]) == (LIMIT, LIMIT)
        own = [r for r in found["rows"] if r["suite"] == name and r["label"] == "harmful"]
        for side in ("base", "adapter", "adapter_and_probe"):
            complied = sum(row[side]["complied"] for row in own)
            assert suite["attack_success"][side]["count"] == complied
            assert suite["attack_success"][side]["num"] == LIMIT
        assert (out / "plots" / f"roc-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "plots" / "tokens-to-trip.png").read_bytes().startswith(b"\x89PNG")
    for row in found["rows"]:
        delivered = row["adapter_and_probe"]["num_tokens"]
        if row["trip"] is None:
            assert row["adapter_and_probe"] == row["adapter"]
        else:
            assert delivered == row["trip"]["num_delivered"] <= row["adapter"]["num_tokens"]
            assert row["adapter_and_probe"]["stopped"] == (delivered < 3)
    report = (out / "report.md").read_text()
    assert "No request was in the training" in report
    for name in DEFAULT_SUITES[:-1]:
        assert f"| {name} |" in report
    texts = (out / "results.json").read_text() + report
    for row in load_dataset(data_dir).test:
        assert row.prompt not in texts
    assert str(tmp_path) not in texts


def test_greedy_evaluations_repeat_to_the_bit(
    results: tuple[dict[str, Any], Path],
    breaker_dir: Path,
    roomy_llama: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    again = _settings(breaker_dir, roomy_llama, tmp_path / "again", data=data_dir)
    assert evaluate_breaker(again) == results[0]


def test_a_base_model_is_evaluated_on_the_template_that_its_breaker_brings(
    plain_breaker_dir: Path, base_gpt2: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings = _settings(
        plain_breaker_dir,
        base_gpt2,
        tmp_path / "out",
        data=data_dir,
        suites=("direct", "capability"),
    )
    found = evaluate_breaker(settings)
    assert found["failures"] == {}
    assert len(found["rows"]) == 2 * LIMIT
    perplexity = found["suites"]["capability"]["perplexity"]["all"]
    assert perplexity["adapter"] != perplexity["base"]
    # As the pipeline measures it, which renders by the recipe.
    dataset = load_dataset(data_dir)
    tokenizer = load_tokenizer(base_gpt2, "plain")
    answers = benign_answers(dataset, limit=LIMIT)
    rows = render_all(tokenizer, answers, max_length=1024).rows
    losses = LanguageModel(base_gpt2).losses(rows)
    assert perplexity["base"] == pytest.approx(perplexity_of(losses), rel=1e-6)


def test_prompts_of_a_file_and_texts_on_demand(
    breaker_dir: Path, roomy_llama: Path, data_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "please h1 h2 h3 h4 h5 h6 h7", "label": "harmful"}\n')
    out = tmp_path / "results"
    settings = _settings(
        breaker_dir,
        roomy_llama,
        out,
        data=data_dir,
        prompt_files=(file,),
        suites=("direct",),
        keep_texts=True,
    )
    found = evaluate_breaker(settings)
    (row,) = [row for row in found["rows"] if row["label"] == "harmful"]
    assert row["source"] == "own"
    assert row["messages"][-1]["content"] == "please h1 h2 h3 h4 h5 h6 h7"
    assert all(isinstance(row[side]["text"], str) for side in ("base", "adapter"))


def test_a_prompt_seen_in_training_is_refused_before_anything_is_written(
    breaker_dir: Path, roomy_llama: Path, data_dir: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(data_dir)
    file = tmp_path / "own.jsonl"
    rows = [dataset.train[-1], dataset.calibration[-1]]
    records = [{"prompt": row.prompt.title(), "label": "harmful"} for row in rows]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = _settings(
        breaker_dir, roomy_llama, tmp_path / "out", data=data_dir, prompt_files=(file,)
    )
    with pytest.raises(DataError) as caught:
        evaluate_breaker(settings)
    for split in ("train", "calibration"):
        assert f"suite 'direct': got 1 of {2 + LIMIT} prompts that the breaker's {split}" in str(
            caught.value
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"suites": ("direct",)}, DataError, "suite 'direct' is empty"),
        ({"suites": ("capability",)}, DataError, "suite 'capability' is empty"),
        ({"suites": ("garak",)}, DataError, "without the package garak"),
        ({"model": "no-such-model"}, ValueError, "no-such-model"),
    ],
)
def test_what_cannot_work_is_refused(
    breaker_dir: Path,
    roomy_llama: Path,
    tmp_path: Path,
    more: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        evaluate_breaker(_settings(breaker_dir, roomy_llama, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_another_model_and_too_few_benign_prompts_are_refused(
    breaker_dir: Path, roomy_llama: Path, tiny_gpt2: Path, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(BreakerMismatchError):
        evaluate_breaker(_settings(breaker_dir, tiny_gpt2, out, data=data_dir))
    with pytest.raises(CalibrationError, match=r"got 66 benign answers.*--degenerate-share"):
        evaluate_breaker(
            _settings(breaker_dir, roomy_llama, out, data=data_dir, degenerate_share=0.01)
        )
    with pytest.raises(ConfigError, match="together, the model's context"):
        evaluate_breaker(
            _settings(breaker_dir, roomy_llama, out, data=data_dir, max_new_tokens=2040)
        )


def test_the_llm_judge_is_asked_about_what_a_reader_gets(
    breaker_dir: Path,
    roomy_llama: Path,
    data_dir: Path,
    tmp_path: Path,
    judge_server: JudgeServer,
) -> None:
    settings = _settings(
        breaker_dir,
        roomy_llama,
        tmp_path / "out",
        data=data_dir,
        suites=("direct",),
        judge_url=judge_server.url,
        judge_model="judge-1",
    )
    found = evaluate_breaker(settings)
    direct = found["suites"]["direct"]
    # The server says no to everything of this language.
    for side in ("base", "adapter", "adapter_and_probe"):
        assert direct["attack_success_llm"][side]["count"] == 0
        assert direct["llm_failures"][side] == 0
    asked = {
        row[side]["llm"]
        for row in found["rows"]
        for side in ("base", "adapter")
        if row["label"] == "harmful"
    }
    assert asked == {"no"}
    assert {row["base"]["llm"] for row in found["rows"] if row["label"] == "benign"} == {None}
    assert 0 < len(judge_server.bodies) <= 3 * LIMIT
    assert "judge-1" in (tmp_path / "out" / "report.md").read_text()


def test_a_judge_that_fails_fails_the_suite_and_the_rest_is_kept(
    breaker_dir: Path,
    roomy_llama: Path,
    data_dir: Path,
    tmp_path: Path,
    judge_server: JudgeServer,
) -> None:
    file = tmp_path / "own.jsonl"
    records = [
        {"prompt": "please h1 h2 h3 h4 VAGUE", "label": "harmful"},
        {"prompt": "please h9 h8 h7 h6", "label": "harmful"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app,
        [
            "evaluate",
            *("--artifact", str(breaker_dir), "--model", str(roomy_llama)),
            *("--data", str(data_dir), "--prompts", str(file), "--out", str(out)),
            *("--suite", "direct", "--suite", "over-refusal", "--limit", str(LIMIT)),
            *("--max-new-tokens", "8", "--backend", "transformers"),
            *("--judge-url", judge_server.url, "--judge-model", "judge-1"),
        ],
    )
    assert result.exit_code == 1, result.output
    assert "suite 'direct': got" in result.stderr
    assert "did not answer yes or no" in result.stderr
    found = json.loads((out / "results.json").read_text())
    assert set(found["failures"]) == {"direct"}
    assert len(found["rows"]) == 2 + LIMIT + LIMIT
    assert found["suites"]["direct"]["llm_failures"]["base"] == 1
    assert found["suites"]["direct"]["attack_success_llm"]["base"]["count"] == 1
    assert "## Failed" in (out / "report.md").read_text()


def test_an_unknown_overlap_is_labelled_and_a_failed_harness_named(
    breaker_dir: Path,
    roomy_llama: Path,
    tmp_path: Path,
    install_harness: Callable[[str], None],
) -> None:
    from circuit_breakers.artifact import load_breaker, save_breaker
    from circuit_breakers_training.evaluation.held_out import DIGESTS_FILE

    first = load_breaker(breaker_dir)
    silent = save_breaker(
        tmp_path / "silent",
        name=first.manifest.name,
        base_model=first.manifest.base_model,
        recipe=first.manifest.recipe,
        data_sha256=first.manifest.data_sha256,
        probes=first.manifest.probes,
        weights=first.weights,
        adapter_dir=first.adapter_dir,
        canaries=first.manifest.canaries,
        extra_files={},
    )
    assert DIGESTS_FILE not in silent.manifest.files
    install_harness("def simple_evaluate(**options):\n    raise OSError('no data set here')\n")
    settings = _settings(
        silent.path,
        roomy_llama,
        tmp_path / "out",
        suites=("lm-eval",),
        lm_eval_tasks=("arc_easy",),
        allow_unknown_overlap=True,
    )
    with pytest.raises(EvaluationError, match=r"suite 'lm-eval': the harness failed.*no data set"):
        evaluate_breaker(settings)
    assert "**Overlap with training is unknown**" in (tmp_path / "out" / "report.md").read_text()
    refused = _settings(
        silent.path, roomy_llama, tmp_path / "other", suites=("lm-eval",), lm_eval_tasks=("x",)
    )
    with pytest.raises(DataError, match="--allow-unknown-overlap"):
        evaluate_breaker(refused)
