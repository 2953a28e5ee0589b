"""`evaluate`: a breaker beside its base model. Curves: what more data, steps or layers give."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuit_breakers.cli.apps import app, import_extra, reported_errors

__all__ = ["evaluate", "learning_curve", "probe_curve"]


@app.command(
    epilog="Example: `circuit-breakers evaluate --artifact my-breaker --data data --out results`"
)
def evaluate(
    artifact: Annotated[Path, typer.Option(help="Breaker directory.")],
    out: Annotated[Path, typer.Option(help="Directory of the results, made new.")],
    model: Annotated[
        str | None, typer.Option(help="Built-in name, directory or hub id. [the breaker's]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Built dataset, whose test split is used. [none]")
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of prompts; may be repeated. A label that it has is not taken from --data."
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="direct, prefill, wrappers, many-shot, past-tense, garak, pyrit, over-refusal, "
            "capability, lm-eval; may be repeated. [all but garak, pyrit, lm-eval]"
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Requests of each label in each suite, at most.")
    ] = 100,
    per_prompt: Annotated[
        int, typer.Option(min=1, help="Techniques of a suite that each request is put under.")
    ] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a completion.")] = 64,
    stop_within: Annotated[
        int, typer.Option(min=1, help="Fewer tokens than this before a trip count as stopped.")
    ] = 16,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="vllm or transformers. [vllm if it is installed]")
    ] = None,
    degenerate_share: Annotated[
        float, typer.Option(help="Base-model benign answers that may count as degenerate.")
    ] = 0.05,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible URL of an LLM judge, with /v1. [none]")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model behind --judge-url.")] = None,
    judge_prompt: Annotated[
        Path | None,
        typer.Option(
            help="Text with {behavior} and {generation} that the judge gets, as HarmBench's "
            "classifier does. [our own wording]"
        ),
    ] = None,
    lm_eval_task: Annotated[
        list[str] | None, typer.Option(help="Task of the suite lm-eval; may be repeated.")
    ] = None,
    allow_unknown_overlap: Annotated[
        bool,
        typer.Option(
            "--allow-unknown-overlap",
            help="Go on if nobody knows which prompts the breaker was made from.",
        ),
    ] = False,
    keep_texts: Annotated[
        bool, typer.Option("--keep-texts", help="Requests and answers go into results.json.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the results at OUT.")] = False,
) -> None:
    """Compare a breaker with its base model: attacks, over-refusal, capability."""
    with reported_errors(exit_code=2):
        suites = import_extra("circuit_breakers_training.evaluation.suites", extra="train")
        judge = import_extra("circuit_breakers_training.evaluation.llm_judge", extra="train")
        parsed = import_extra("circuit_breakers_training.evaluation.settings", extra="train")
        settings = parsed.EvaluationSettings(
            artifact=artifact,
            out=out,
            model=model,
            data=data,
            prompt_files=tuple(prompts or ()),
            suites=suites.pick_suites(suite or ()),
            limit=limit,
            per_prompt=per_prompt,
            max_new_tokens=max_new_tokens,
            stop_within=stop_within,
            temperature=temperature,
            seed=seed,
            backend=backend,
            degenerate_share=degenerate_share,
            judge_url=judge_url,
            judge_model=judge_model,
            judge_prompt=None if judge_prompt is None else judge.read_judge_prompt(judge_prompt),
            lm_eval_tasks=tuple(lm_eval_task or ()),
            allow_unknown_overlap=allow_unknown_overlap,
            keep_texts=keep_texts,
            overwrite=overwrite,
        )
    with reported_errors():
        run = import_extra("circuit_breakers_training.evaluation.run", extra="train")
        from rich.console import Console

        results = run.evaluate_breaker(settings, console=Console(stderr=True))
    for name, summary in results["suites"].items():
        if summary["kind"] == "attack":
            sides = summary["attack_success"]
            typer.echo(f"{name}: attack success {_shares(sides)}")
    typer.echo(f"ok: {len(results['rows'])} attempts on each model")
    typer.echo(f"report: {out / 'report.md'}")


@app.command(
    "learning-curve",
    epilog="Example: `circuit-breakers learning-curve --data data --out curve "
    "--variant data_share=0.5 --variant steps=100 --variant layers=[14,19]`",
)
def learning_curve(
    data: Annotated[Path, typer.Option(help="Built dataset.")],
    out: Annotated[Path, typer.Option(help="Directory of adapters and results.")],
    variant: Annotated[
        list[str],
        typer.Option(
            metavar="FIELD=VALUE",
            help="An adapter to train: the recipe with a field changed, or several with ';' "
            "between, or with a share of the data by data_share; may be repeated.",
        ),
    ],
    recipe: Annotated[
        str, typer.Option(help="Name of a recipe, or path of a TOML file.")
    ] = "smollm2-135m-instruct",
    split: Annotated[
        Literal["selection", "test"],
        typer.Option(help="Split that is asked: test to explain, selection to choose a recipe by."),
    ] = "test",
    limit: Annotated[int, typer.Option(min=1, help="Requests of each suite, at most.")] = 50,
) -> None:
    """Train adapters that differ in data, steps or layers, and ask each the same requests."""
    with reported_errors(exit_code=2):
        curve = import_extra("circuit_breakers_training.evaluation.learning_curve", extra="train")
        settings = curve.CurveSettings(
            data=data,
            out=out,
            recipe=recipe,
            variants=tuple(curve.parse_variant(text) for text in variant),
            split=split,
            limit=limit,
        )
    with reported_errors():
        from rich.console import Console

        results = curve.learning_curve(settings, Console(stderr=True))
    curve.print_curve(results)
    typer.echo(f"ok: {settings.curve_path}")


@app.command(
    "probe-curve",
    epilog="Example: `circuit-breakers probe-curve --artifact my-breaker "
    "--data my-breaker.work/data --out curve`",
)
def probe_curve(
    artifact: Annotated[Path, typer.Option(help="Breaker whose adapter is read.")],
    data: Annotated[Path, typer.Option(help="The dataset that it was made with.")],
    out: Annotated[Path, typer.Option(help="Directory of the results, made new.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; that of the breaker unless given.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="A share of the data; may be repeated. [default: 0.125, 0.25, 0.5, 1]"),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Answers are cut after so many tokens; may be repeated. "
            "[default: 0, 1, 4, 8, 16, 32]"
        ),
    ] = None,
) -> None:
    """Fit probes on less data and on single layers of one breaker, and judge each."""
    chosen = {"shares": tuple(share or ()), "tokens": tuple(tokens or ())}
    with reported_errors(exit_code=2):
        curve = import_extra("circuit_breakers_training.evaluation.probe_curve", extra="train")
        settings = curve.ProbeCurveSettings(
            artifact=artifact,
            data=data,
            out=out,
            model=model,
            **{name: values for name, values in chosen.items() if values},
        )
    with reported_errors():
        from rich.console import Console

        results = curve.probe_curve(settings, Console(stderr=True))
    curve.print_probe_curve(results)
    typer.echo(f"ok: {out / 'curve.json'}")


def _shares(sides: dict[str, Any]) -> str:
    base, adapter, both = (
        f"{sides[name]['count']}/{sides[name]['num']}"
        for name in ("base", "adapter", "adapter_and_probe")
    )
    return f"{base} base, {adapter} with adapter, {both} with adapter and probe"
