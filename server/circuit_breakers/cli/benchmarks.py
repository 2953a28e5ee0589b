"""`bench`: what the guard and its training cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuit_breakers.cli.apps import bench_app, import_extra, reported_errors
from circuit_breakers.errors import ConfigError

__all__ = ["bench_api", "bench_guards", "bench_serve", "bench_train"]


@bench_app.command(
    "serve",
    epilog="Example: `circuit-breakers bench serve --batch 1 --batch 32 --arm all --json out.json`",
)
def bench_serve(
    model: Annotated[
        str, typer.Option(help="Built-in name, directory or hub id.")
    ] = "smollm2-135m-instruct",
    breaker: Annotated[
        Path | None, typer.Option(help="Breaker directory. [the one that ships for the model]")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="observe, enforce, probes, dynamic, hidden-states, guard-model, or all; may be "
            "repeated. [observe and enforce]"
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at once; may be repeated. [1 and 32]")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="decode (32:256), prompt (512:16), or PROMPT:OUTPUT in tokens; may be repeated. "
            "[decode and prompt]"
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="Pairs of neighbouring blocks of each comparison.")
    ] = 8,
    num_probes: Annotated[
        int, typer.Option(min=2, max=16, help="What --arm probes compares with one probe.")
    ] = 16,
    probe_layers: Annotated[
        int, typer.Option(min=1, max=16, help="Layers that those probes share.")
    ] = 4,
    compiled: Annotated[
        bool, typer.Option("--compiled/--eager", help="With torch.compile, or without.")
    ] = False,
    startup: Annotated[
        bool, typer.Option("--startup", help="Start-up time too: three starts of each kind.")
    ] = False,
    kv_cache_gib: Annotated[
        int, typer.Option(min=1, help="KV cache of each engine, in GiB; two may be alive at once.")
    ] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all raw pairs and the machine.")
    ] = None,
) -> None:
    """Measure the guard against plain vLLM, switched on and off in one engine."""
    with reported_errors(exit_code=2):
        _check_json(json_file)
    with reported_errors():
        from circuit_breakers.settings import load_settings

        settings = load_settings(model=model, breaker=breaker)
        bench = import_extra("circuit_breakers.engine.bench", extra="serve")
        parts = import_extra("circuit_breakers.api.lifecycle", extra="serve").load_parts(settings)
    with reported_errors(exit_code=2):
        unknown = sorted(set(arm or ()) - {*bench.ARMS, "all"})
        if unknown:
            raise ConfigError(f"got --arm {unknown[0]!r}, expected {', '.join(bench.ARMS)} or all")
        options = {
            "arms": bench.ARMS if arm and "all" in arm else tuple(dict.fromkeys(arm or ())),
            "batches": tuple(dict.fromkeys(batch or ())),
            "workloads": tuple(bench.parse_workload(text) for text in workload or ()),
        }
        wanted = bench.BenchSettings(
            num_pairs=pairs,
            num_probes=num_probes,
            num_probe_layers=probe_layers,
            compiled=compiled,
            startup_pairs=3 if startup else 0,
            kv_cache_gib=kv_cache_gib,
            **{name: values for name, values in options.items() if values},
        )
    with reported_errors():
        from rich.console import Console

        report = bench.bench_serving(*parts, wanted, Console(stderr=True))
    bench.print_report(report)
    _write_json(json_file, bench.report_json(report))


@bench_app.command(
    "api",
    epilog="Example: `circuit-breakers bench api --at-once 16 --pairs 4 --json out.json`",
)
def bench_api(
    model: Annotated[
        str, typer.Option(help="Built-in name, directory or hub id.")
    ] = "smollm2-135m-instruct",
    breaker: Annotated[
        Path | None, typer.Option(help="Breaker directory. [the one that ships for the model]")
    ] = None,
    at_once: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests at once; may be repeated. [1, 16 and 64]"),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="Pairs of neighbouring blocks of each comparison.")
    ] = 8,
    rounds: Annotated[
        int, typer.Option(min=1, help="Requests of a block, for each one at once; at least 8.")
    ] = 2,
    output_len: Annotated[int, typer.Option(min=1, max=256, help="Tokens of each answer.")] = 64,
    kv_cache_gib: Annotated[
        int, typer.Option(min=1, help="KV cache of each of the two servers, in GiB.")
    ] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all raw pairs and the machine.")
    ] = None,
) -> None:
    """Measure our HTTP server's requests a second against vLLM's own, by `vllm bench serve`."""
    with reported_errors(exit_code=2):
        _check_json(json_file)
    with reported_errors():
        from rich.console import Console

        from circuit_breakers.settings import load_settings

        settings = load_settings(model=model, breaker=breaker)
        bench = import_extra("circuit_breakers.engine.bench.http_servers", extra="serve")
        parts = import_extra("circuit_breakers.api.lifecycle", extra="serve").load_parts(settings)
        chosen = {"concurrencies": tuple(dict.fromkeys(at_once))} if at_once else {}
        wanted = bench.ApiSettings(
            num_pairs=pairs,
            rounds=rounds,
            output_len=output_len,
            kv_cache_gib=kv_cache_gib,
            **chosen,
        )
        report = bench.bench_api(model, *parts, wanted, Console(stderr=True))
    bench.print_api_report(report)
    _write_json(json_file, report.to_json())


@bench_app.command(
    "train",
    epilog="Example: `circuit-breakers bench train --rows-per-kind 8 --pairs 5 --json out.json`",
)
def bench_train(
    model: Annotated[
        str | None, typer.Option(help="Built-in name, directory or hub id. [the recipe's]")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Name of a recipe, or path of a TOML file.")
    ] = "smollm2-135m-instruct",
    rows_per_kind: Annotated[
        int, typer.Option(min=1, help="Conversations a step, of each kind.")
    ] = 8,
    pairs: Annotated[
        int, typer.Option(min=1, help="Pairs of neighbouring steps of each comparison.")
    ] = 5,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare with our step; may be repeated: published, published-dropout, "
            "published-cut, published-eager, published-unchecked, padding, upper-blocks, "
            "lower-blocks-twice, head, fused-attention, float32-weights, dropout, micro-batches, "
            "checkpointing, compile, or all, which leaves published-unchecked out for its memory. "
            "[published]"
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option(help="Peak memory too, of each arm and ours in fresh processes.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all raw pairs and the machine.")
    ] = None,
) -> None:
    """Measure a training step against the published loop, and each shortcut's share."""
    with reported_errors(exit_code=2):
        _check_json(json_file)
        bench = import_extra("circuit_breakers_training.bench", extra="train")
        arms = bench.chosen_arms(arm or ["published"])
    with reported_errors():
        from rich.console import Console

        from circuit_breakers.models import resolve_model

        resolution = import_extra("circuit_breakers_training.recipes.resolution", extra="train")
        overrides = []
        if model is not None:
            overrides.append(resolution.Override(field="model", value=model, flag="--model"))
        loaded = resolution.resolve_recipe(recipe, overrides).recipe
        report = bench.bench_training(
            loaded,
            resolve_model(loaded.model).path,
            bench.BenchSettings(
                rows_per_kind=rows_per_kind,
                num_pairs=pairs,
                arms=arms,
                memory=memory,
            ),
            Console(stderr=True),
        )
    bench.print_report(report)
    _write_json(json_file, bench.report_json(report))


@bench_app.command(
    "guards",
    epilog="Example: `circuit-breakers bench guards --artifact my-breaker --data data --out guards "
    "--limit 100`",
)
def bench_guards(
    artifact: Annotated[Path, typer.Option(help="Breaker directory.")],
    data: Annotated[Path, typer.Option(help="Built dataset; its test split is what counts.")],
    out: Annotated[Path, typer.Option(help="Directory of the results, made new.")],
    model: Annotated[
        str | None, typer.Option(help="Built-in name, directory or hub id. [the breaker's own]")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Test conversations of each label at most, and benign calibration ones, but never "
            "fewer than the promise needs. [all]",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="minilm, tfidf, words, rules, judge, adapter, probe or both; may be repeated."
        ),
    ] = None,
) -> None:
    """Compare the breaker with text classifiers, filters and a judge, on the same conversations."""
    with reported_errors(exit_code=2):
        evaluation = import_extra("circuit_breakers_training.evaluation.settings", extra="train")
        parsed = import_extra("circuit_breakers_training.peers.settings", extra="train")
        bench = import_extra("circuit_breakers_training.peers.run", extra="train")
        settings = parsed.GuardsSettings(
            artifact=artifact,
            data=data,
            out=out,
            model=model,
            limit=limit,
            skip=evaluation.check_skips(skip or (), parsed.GUARDS),
        )
    with reported_errors():
        from rich.console import Console

        report = import_extra("circuit_breakers_training.peers.report", extra="train")
        results = import_extra("circuit_breakers_training.evaluation.results", extra="train")
        found = bench.bench_guards(settings, Console(stderr=True))
        results.write_results(out, report.guards_files(found))
    report.print_guards(found, Console())
    typer.echo(f"report: {out / 'guards.html'}")


def _check_json(json_file: Path | None) -> None:
    """Passes if there is a place for the file, before anything is measured."""
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ConfigError(f"got --json {json_file}, expected a file in an existing directory")


def _write_json(json_file: Path | None, text: str) -> None:
    if json_file is not None:
        json_file.write_text(text, "utf-8")
        typer.echo(f"ok: {json_file}")
