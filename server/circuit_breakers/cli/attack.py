"""`attack`: an attacker who adapts to the breaker; how many steps or queries until it breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from circuit_breakers.cli.apps import attack_app, import_extra, reported_errors
from circuit_breakers.cli.remote import ApiKeyOption

__all__ = ["attack_search", "attack_soft_prompt"]

_Artifact = Annotated[Path, typer.Option(help="Breaker directory.")]
_Data = Annotated[
    Path, typer.Option(help="Built dataset; the harmful requests of its test split are asked.")
]
_Out = Annotated[Path, typer.Option(help="Directory of the results, made new.")]
_Model = Annotated[
    str | None, typer.Option(help="Built-in name, directory or hub id. [the breaker's]")
]
_Limit = Annotated[int, typer.Option(min=1, help="Requests, at most.")]
_MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of an answer.")]
_Seed = Annotated[int, typer.Option(help="Seed of everything that is random.")]
_Backend = Annotated[
    str | None,
    typer.Option(
        help="vllm or transformers: writes the benign answers by which degenerate text is told. "
        "[vllm if it is installed]"
    ),
]
_DegenerateShare = Annotated[
    float, typer.Option(help="Of these answers, share that may count as degenerate.")
]
_AllowUnknownOverlap = Annotated[
    bool,
    typer.Option(
        "--allow-unknown-overlap",
        help="Go on if nobody knows which prompts the breaker was made from.",
    ),
]
_SaveTexts = Annotated[
    bool,
    typer.Option(
        "--save-texts", help="The last completion of each request goes into OUT/completions.jsonl."
    ),
]
_Overwrite = Annotated[bool, typer.Option(help="Replace the results at OUT.")]


@attack_app.command(
    "soft-prompt",
    epilog="Example: `circuit-breakers attack soft-prompt --artifact my-breaker --data data "
    "--out soft-prompt --limit 10 --steps 100`",
)
def attack_soft_prompt(
    artifact: _Artifact,
    data: _Data,
    out: _Out,
    model: _Model = None,
    limit: _Limit = 20,
    steps: Annotated[int, typer.Option(min=1, help="Updates of a soft prompt, at most.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Embeddings of a soft prompt.")] = 20,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 0.03,
    penalty: Annotated[
        float, typer.Option(help="Weight of scores that are too high, beside the answer's loss.")
    ] = 1.0,
    margin: Annotated[
        float, typer.Option(help="Logits below the threshold that scores are pushed to.")
    ] = 1.0,
    check_every: Annotated[
        int, typer.Option(min=1, help="Steps between two looks at what the model writes.")
    ] = 10,
    max_new_tokens: _MaxNewTokens = 64,
    seed: _Seed = 0,
    backend: _Backend = None,
    degenerate_share: _DegenerateShare = 0.05,
    allow_unknown_overlap: _AllowUnknownOverlap = False,
    save_texts: _SaveTexts = False,
    overwrite: _Overwrite = False,
) -> None:
    """White box: embeddings before each request, moved against model and probe at once."""
    with reported_errors(exit_code=2):
        parsed = import_extra("circuit_breakers_training.attack.settings", extra="train")
        settings = parsed.SoftPromptSettings(
            artifact=artifact,
            data=data,
            out=out,
            model=model,
            limit=limit,
            steps=steps,
            tokens=tokens,
            learning_rate=lr,
            penalty=penalty,
            margin=margin,
            check_every=check_every,
            max_new_tokens=max_new_tokens,
            seed=seed,
            backend=backend,
            degenerate_share=degenerate_share,
            allow_unknown_overlap=allow_unknown_overlap,
            save_texts=save_texts,
            overwrite=overwrite,
        )
    with reported_errors():
        attack = import_extra("circuit_breakers_training.attack.soft_prompt", extra="train")
        from rich.console import Console

        results = attack.run_soft_prompt(settings, console=Console(stderr=True))
    _say(results["targets"], "steps", out)


@attack_app.command(
    "search",
    epilog="Example: `circuit-breakers attack search --url http://127.0.0.1:8000 "
    "--artifact my-breaker --data data --out search --limit 10 --queries 100`",
)
def attack_search(
    url: Annotated[str, typer.Option(help="The server that is attacked.")],
    artifact: _Artifact,
    data: _Data,
    out: _Out,
    model: _Model = None,
    api_key: ApiKeyOption = None,
    limit: _Limit = 20,
    queries: Annotated[
        int, typer.Option(min=1, help="Queries for each request and method, at most.")
    ] = 100,
    method: Annotated[
        list[str] | None, typer.Option(help="best-of-n, genetic; may be repeated. [both]")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    population: Annotated[
        int, typer.Option(min=2, help="Compositions of one generation of the genetic search.")
    ] = 8,
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="Requests that are attacked at once.")
    ] = 8,
    max_new_tokens: _MaxNewTokens = 64,
    seed: _Seed = 0,
    backend: _Backend = None,
    degenerate_share: _DegenerateShare = 0.05,
    allow_unknown_overlap: _AllowUnknownOverlap = False,
    save_texts: _SaveTexts = False,
    overwrite: _Overwrite = False,
) -> None:
    """Black box: best of n and a genetic search, through the API and with what it answers."""
    with reported_errors(exit_code=2):
        parsed = import_extra("circuit_breakers_training.attack.settings", extra="train")
        settings = parsed.SearchSettings(
            url=url,
            api_key=api_key,
            artifact=artifact,
            data=data,
            out=out,
            model=model,
            limit=limit,
            queries=queries,
            methods=tuple(method or parsed.METHODS),
            temperature=temperature,
            population=population,
            concurrency=concurrency,
            max_new_tokens=max_new_tokens,
            seed=seed,
            backend=backend,
            degenerate_share=degenerate_share,
            allow_unknown_overlap=allow_unknown_overlap,
            save_texts=save_texts,
            overwrite=overwrite,
        )
    with reported_errors():
        attack = import_extra("circuit_breakers_training.attack.search", extra="train")
        from rich.console import Console

        results = attack.run_search(settings, console=Console(stderr=True))
    _say(results["methods"], "queries", out)


def _say(attacks: dict[str, Any], unit: str, out: Path) -> None:
    for name, found in attacks.items():
        mark, share = list(found["broken_within"].items())[-1]
        typer.echo(f"{name}: {share['count']} of {share['num']} broken within {mark} {unit}")
    typer.echo(f"ok: {out / 'report.md'}")
