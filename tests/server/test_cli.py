"""The command line: exit codes, messages on stderr, and quick answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from circuit_breakers.cli import app

GOLDEN = Path(__file__).parents[1] / "golden"
runner = CliRunner()


def test_help_of_every_command_shows_an_example() -> None:
    for command in (
        ["audit", "export"],
        ["audit", "prune"],
        ["audit", "verify"],
        ["bench", "serve"],
        ["bench", "train"],
        ["data", "build"],
        ["data", "import"],
        ["evaluate"],
        ["gate"],
        ["recipes"],
        ["replay"],
        ["report"],
        ["serve"],
        ["train"],
        ["verify"],
    ):
        result = runner.invoke(app, [*command, "--help"])
        assert result.exit_code == 0
        assert "Example:" in result.output


def test_wrong_usage_exits_with_2() -> None:
    for arguments in (["serve", "--nope"], ["verify"], ["nope"], ["serve", "--port", "x"]):
        assert runner.invoke(app, arguments).exit_code == 2


def test_a_setting_out_of_range_is_wrong_usage() -> None:
    result = runner.invoke(app, ["serve", "--mode", "off"])
    assert result.exit_code == 2
    assert "--mode: got 'off'" in result.stderr


def test_a_training_without_a_directory_or_with_an_unreadable_field_is_wrong_usage() -> None:
    for arguments, said in (
        (["train"], "--out"),
        (["train", "--out", "o", "--set", "steps"], "expected FIELD=VALUE"),
        (["train", "--out", "o", "--set", "schedule=cosine"], "--set schedule=cosine"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_recipes_are_listed_with_model_and_notes() -> None:
    result = runner.invoke(app, ["recipes"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    for said in ("auto", "any (--model)", "gpt2", "openai-community/gpt2", "arXiv 2406.04313"):
        assert said in words


def test_a_dry_run_says_what_comes_from_where(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ).save_pretrained(tmp_path)
    arguments = ["train", "--dry-run", "--recipe", "smollm2-135m-instruct"]
    arguments += ["--model", str(tmp_path), "--set", "steps=3"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["model", str(tmp_path), "--model"] in rows
    assert ["steps", "3", "--set"] in rows
    assert ["batch_size", "8", "recipe"] in rows
    assert ["target", "layers", "2"] in rows
    assert "42,272 parameters" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    for name, value, said in (
        ("max_length", "513", "would be refused: max_length is 513"),
        ("steps", "0", "steps = 0 (from --set)"),
    ):
        refused = runner.invoke(app, [*arguments[:-2], "--set", f"{name}={value}"])
        assert refused.exit_code == 1
        assert said in refused.output


def test_a_training_that_cannot_start_exits_with_1(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for arguments in (
        ["train", "--out", out, "--recipe", "no-such-recipe"],
        ["train", "--out", out, "--model", "no-such-model"],
        ["train", "--out", str(tmp_path)],
        ["report", str(tmp_path / "none"), "--out", str(tmp_path / "out.html")],
        ["data", "build", "--out", out, "--model", "no-such-model"],
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_wrong_evaluation_options_exit_with_2(tmp_path: Path) -> None:
    places = ["--artifact", str(tmp_path), "--out", str(tmp_path / "out")]
    for arguments, said in (
        (["--suite", "nope"], "--suite"),
        (["--judge-url", "http://127.0.0.1/v1"], "--judge-model"),
        (["--judge-prompt", str(tmp_path / "none")], "cannot be read"),
        (["--suite", "lm-eval"], "--lm-eval-task"),
        (["--limit", "0"], "limit"),
    ):
        result = runner.invoke(app, ["evaluate", *places, *arguments])
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_an_evaluation_of_no_breaker_exits_with_1(tmp_path: Path) -> None:
    places = ["--artifact", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, ["evaluate", *places])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_benchmark_of_a_model_without_a_breaker_exits_with_1() -> None:
    result = runner.invoke(app, ["bench", "serve", "--model", "no-such-model"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_wrong_benchmark_options_exit_with_2(tmp_path: Path) -> None:
    for arguments, said in (
        (["--arm", "nope"], "--arm"),
        (["--workload", "8"], "workload"),
        (["--json", str(tmp_path / "none" / "out.json")], "--json"),
        (["--num-probes", "17"], "16"),
    ):
        result = runner.invoke(app, ["bench", "serve", *arguments])
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_a_tiny_benchmark_runs_from_end_to_end(tmp_path: Path) -> None:
    """All arms on a random model; no time is judged."""
    # Deferred: it brings torch.
    from .engine import tiny

    environment = os.environ | {"CIRCUIT_BREAKERS_CACHE": str(tmp_path / "cache")}
    model = tiny.write_llama(tmp_path / "tiny")
    write_word_tokenizer(tmp_path / "tiny", tiny.VOCAB)
    breaker = tiny.write_tiny_breaker(tmp_path / "breaker", model)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "circuit_breakers.cli", "bench", "serve"]
    for name, value in {
        "model": model.path,
        "breaker": breaker.path,
        "json": out,
        "arm": "all",
        "batch": 2,
        "workload": "40:4",
        "pairs": 1,
        "num-probes": 4,
        "kv-cache-gib": 1,
    }.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in ("observe / plain", "probes-4 / probes-1", "guard-model / plain *", "ok: "):
        assert expected in done.stdout
    report = json.loads(out.read_text())
    rows = {(row["arm"], row["baseline"]): row for row in report["rows"]}
    assert {arm for arm, _ in rows} == {
        *("observe", "enforce", "probes-1", "probes-4"),
        *("dynamic", "hidden-states", "guard-model"),
    }
    for (arm, _), row in rows.items():
        if row["unavailable"] is not None:
            # vLLM's connector copies through pinned memory, which a machine may not have.
            assert arm == "hidden-states"
            continue
        (pair,) = row["pairs"]
        # 2 requests of 4 tokens in each block.
        assert pair["arm"]["num_tokens"] == pair["baseline"]["num_tokens"] == 8
        assert row["cross_engine"] == (arm in ("hidden-states", "guard-model"))
    assert {row["arm"] for row in report["own_times"]} == {
        *("observe", "enforce", "probes-1", "probes-4")
    }
    assert [counted["num_probes"] for counted in report["footprints"]] == [1, 3, 4]
    assert report["machine"]["vllm"]
    assert "--pairs 1" in report["command"]


def write_word_tokenizer(out: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` words, w0 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w2", bos_token="w0", eos_token="w1"
    ).save_pretrained(out)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "circuit_breakers_training.recipes.resolution", None)
    result = runner.invoke(app, ["train", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "pip install 'circuit-breakers[train]'" in result.stderr


def test_verify_of_a_missing_breaker_exits_with_1_and_no_traceback(tmp_path: Path) -> None:
    result = runner.invoke(app, ["verify", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_verify_names_the_breaker_and_refuses_an_altered_one(tmp_path: Path) -> None:
    (golden,) = (path for path in GOLDEN.iterdir() if (path / "manifest.json").is_file())
    copy = tmp_path / "breaker"
    shutil.copytree(golden, copy)
    name = json.loads((copy / "manifest.json").read_text())["name"]
    result = runner.invoke(app, ["verify", str(copy)])
    assert result.exit_code == 0, result.output
    assert f"ok: breaker {name}" in result.stdout
    probes = copy / "probes.safetensors"
    probes.write_bytes(probes.read_bytes()[:-1] + b"\x7f")
    result = runner.invoke(app, ["verify", str(copy)])
    assert result.exit_code == 1
    assert "probes.safetensors" in result.stderr


def test_version_names_the_engine_too() -> None:
    result = runner.invoke(app, ["version"])
    assert result.exit_code == 0
    assert "circuit-breakers " in result.stdout
    assert "vllm" in result.stdout


@pytest.mark.parametrize("module", ["circuit_breakers.cli", "circuit_breakers.settings"])
def test_import_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "vllm", "transformers", "fastapi", "uvicorn", "numpy", "prometheus_client"}
    assert not heavy & set(loaded)


def test_verify_takes_the_name_of_a_built_in_model() -> None:
    result = runner.invoke(app, ["verify", "smollm2-135m-instruct"])
    assert result.exit_code == 0
    assert "ok: breaker smollm2-135m-instruct" in result.output
