"""What a probe gains with data, layers and tokens: many probes on one adapter, on the test split.

    train ─ hidden states ─┬ shares of the conversations, all layers ─┐
                           └ all conversations, each layer alone ─────┴ probes ─ test ─ a row each
    the probe of everything ─ test, answers cut after some tokens ─────────────────────── a row each

As with the curve of adapters (learning_curve.py), it explains and does not choose.

N conversations, T tokens of one of them, P probes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from circuit_breakers.artifact import Aggregation, Breaker, load_breaker
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.errors import ArtifactError, ConfigError, DataError
from circuit_breakers.models import resolve_model
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.evaluation.learning_curve import in_share
from circuit_breakers_training.evaluation.rates import rate
from circuit_breakers_training.evaluation.results import check_out
from circuit_breakers_training.probe.activations import ResidualReader
from circuit_breakers_training.probe.calibration import peak_score
from circuit_breakers_training.probe.fit import fit_probe, token_logits
from circuit_breakers_training.probe.fit_plan import plan_fit
from circuit_breakers_training.probe.fit_tokens import FitTokens, collect_fit_tokens
from circuit_breakers_training.probe.selection import Candidate, expected_verdict, score_quality
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import Rendered, load_tokenizer, render_all
from circuit_breakers_training.work_dir import progress_bar

__all__ = ["ProbeCurveSettings", "print_probe_curve", "probe_curve"]

FloatArray = npt.NDArray[np.float32]

RESULTS_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class ProbeCurveSettings:
    """Which probes are fitted, on what."""

    artifact: Path
    """The breaker whose adapter is read; its first probe says which layers and aggregation."""
    data: Path
    """The dataset that it was made with."""
    out: Path
    """Directory of the results, made new."""
    model: str | None = None
    """Base model; that of the manifest unless given."""
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Shares of the training groups of each label."""
    tokens: tuple[int, ...] = (0, 1, 4, 8, 16, 32)
    """Answers are cut after so many tokens; 0 leaves the prompt alone."""

    def __post_init__(self) -> None:
        """Checks what can be checked without the artifact.

        Raises:
            ConfigError: a share is not above 0 and up to 1, or a number of tokens is negative.
        """
        for share in self.shares:
            if not 0 < share <= 1:
                raise ConfigError(f"got --share {share}, expected a number above 0 and up to 1")
        for num in self.tokens:
            if num < 0:
                raise ConfigError(f"got --tokens {num}, expected 0 or more")


class _Rows(NamedTuple):
    """The conversations of a split that a guard has to be right about."""

    conversations: list[Conversation]
    rendered: list[Rendered]

    @property
    def harmful(self) -> list[bool]:
        return [c.label == "harmful" for c in self.conversations]

    def at(self, places: Sequence[int]) -> _Rows:
        """Some of them."""
        return _Rows([self.conversations[i] for i in places], [self.rendered[i] for i in places])


def probe_curve(settings: ProbeCurveSettings, console: Console | None = None) -> dict[str, Any]:
    """Fits and judges a probe for each share and each layer; also written to `out`/curve.json.

    Returns:
        What curve.json holds: rows of a kind ("data", "layers" or "tokens") with the number of
        conversations fitted on, quality on the test split, and the interval of the true-positive
        rate at 1 % false positives.
    Raises:
        ConfigError: `out` is taken.
        ArtifactError, BreakerMismatchError: the breaker is broken, of another model, or its recipe
            is none of this version.
        ModelError: the base model cannot be read.
        DataError: the dataset is not that of the breaker, or a share lacks a label.
    """
    check_out(settings.out, overwrite=False)
    breaker = load_breaker(settings.artifact)
    recipe = _recipe(breaker)
    dataset = load_dataset(settings.data)
    if dataset.digests != breaker.manifest.data_sha256:
        raise DataError(
            f"got a dataset that breaker {breaker.manifest.name!r} was not made with, expected its "
            "own, as its training has seen other conversations than this training split; give the "
            "one beside it in its working directory"
        )
    model = resolve_model(settings.model or breaker.manifest.base_model.id)
    merged = merged_checkpoint(model, breaker)
    tokenizer = load_tokenizer(merged, "model")
    train, test = (_rows(tokenizer, split, recipe) for split in (dataset.train, dataset.test))
    spec = breaker.manifest.probes[0]
    reader = ResidualReader(merged, spec.read_layers)
    # As the breaker's own probe was fitted.
    plan = plan_fit(
        *train, recipe.probe, num_layers=model.num_layers, hidden_size=model.hidden_size
    )
    train = train.at(plan.kept)
    num_tokens = plan.tokens_per_conversation
    counts, probes = _fitted(settings, recipe, reader, train, num_tokens, spec.aggregation, console)
    with progress_bar(console, "reading test", len(test.rendered)) as progress:
        logits = token_logits(
            reader, test.rendered, [(p.layers, p.weights) for p in probes], progress=progress
        )
    rows = [
        {**count, **_quality([x_TP[:, at] for x_TP in logits], test, spec.aggregation)}
        for at, count in enumerate(counts)
    ]
    # The last probe is that of all data and layers.
    for num in settings.tokens:
        cut = [
            x_TP[: row.num_prompt_tokens + num, -1]
            for x_TP, row in zip(logits, test.rendered, strict=True)
        ]
        quality = _quality(cut, test, spec.aggregation)
        rows.append({**counts[-1], "kind": "tokens", "tokens": num, **quality})
    results = _results(breaker, dataset.digests, test, rows)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "curve.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return results


def _recipe(breaker: Breaker) -> Recipe:
    """How the breaker's own probe was fitted."""
    try:
        return Recipe.model_validate(breaker.manifest.recipe)
    except ValidationError as e:
        raise ArtifactError(
            f"got breaker {breaker.manifest.name!r} with a recipe that cannot be read: {e}; "
            "expected one of this version; train the breaker again"
        ) from e


def _rows(tokenizer: Any, split: Sequence[Conversation], recipe: Recipe) -> _Rows:
    rendered = render_all(tokenizer, split, max_length=recipe.max_length)
    kept = [
        (split[index], row)
        for index, row in zip(rendered.kept, rendered.rows, strict=True)
        if expected_verdict(split[index]) != "refused"
    ]
    return _Rows([c for c, _ in kept], [row for _, row in kept])


def _fitted(
    settings: ProbeCurveSettings,
    recipe: Recipe,
    reader: ResidualReader,
    train: _Rows,
    tokens_per_conversation: int,
    aggregation: Aggregation,
    console: Console | None,
) -> tuple[list[dict[str, Any]], list[Candidate]]:
    """What each probe was fitted on, and the probes; that of all data and layers is the last."""
    layers = tuple(reader.layers)
    wanted = [("data", share, layers) for share in sorted(settings.shares)]
    if len(layers) > 1:
        wanted += [("layers", 1.0, (layer,)) for layer in layers]
    wanted.append(("layers", 1.0, layers))
    harmful = train.harmful
    counts, probes = [], {}
    # Not in the system's place for temporary files, which may be memory.
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=settings.out.parent, prefix="fit-tokens-") as directory:
        with progress_bar(console, "reading train", len(train.rendered)) as progress:
            tokens = collect_fit_tokens(
                reader,
                train.rendered,
                harmful,
                directory=Path(directory),
                aggregations=(aggregation,),
                tokens_per_conversation=tokens_per_conversation,
                seed=recipe.seed,
                progress=progress,
            )
        with progress_bar(console, "fitting probes", len(wanted)) as progress:
            for kind, share, its_layers in wanted:
                rows = [i for i, c in enumerate(train.conversations) if in_share(c, share)]
                # That of all data is also that of all layers.
                if (share, its_layers) not in probes:
                    probes[share, its_layers] = _fit(tokens, rows, its_layers, aggregation, recipe)
                num_harmful = sum(harmful[i] for i in rows)
                counts.append(
                    {
                        "kind": kind,
                        "data_share": share,
                        "num_harmful": num_harmful,
                        "num_benign": len(rows) - num_harmful,
                        "layers": list(its_layers),
                    }
                )
                progress(1)
    return counts, [probes[share, its_layers] for _, share, its_layers in wanted]


def _fit(
    tokens: FitTokens,
    rows: Sequence[int],
    layers: tuple[int, ...],
    aggregation: Aggregation,
    recipe: Recipe,
) -> Candidate:
    keeps_N, weight_N = tokens.of_rows(rows)
    weights = fit_probe(
        tokens.hidden(layers, aggregation)[keeps_N],
        tokens.harmful_N[keeps_N],
        weight_N,
        inverse_l2=recipe.probe.l2_C,
        num_layers=len(layers),
    )
    return Candidate(layers, aggregation, weights)


def _quality(logits: Sequence[FloatArray], test: _Rows, aggregation: Aggregation) -> dict[str, Any]:
    peak_N = np.array([peak_score(logit_T, aggregation) for logit_T in logits])
    harmful_N = np.asarray(test.harmful)
    quality = score_quality(peak_N, harmful_N)
    num_harmful = int(harmful_N.sum())
    num_caught = round(quality.tpr_at_1pct_fpr * num_harmful)
    interval = rate([True] * num_caught + [False] * (num_harmful - num_caught)).to_json()
    return {**quality._asdict(), "tpr_at_1pct_fpr": interval}


def _results(
    breaker: Breaker,
    data_sha256: dict[str, str],
    test: _Rows,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    num_harmful = sum(test.harmful)
    return {
        "schema_version": RESULTS_VERSION,
        "breaker": {"name": breaker.manifest.name, "digest": breaker.digest},
        "data_sha256": data_sha256,
        "num_harmful": num_harmful,
        "num_benign": len(test.rendered) - num_harmful,
        "rows": rows,
    }


def print_probe_curve(results: dict[str, Any]) -> None:
    """A table on standard output, one row a probe."""
    table = Table(
        *("probe", "harmful", "benign", "layers", "AUROC", "up to 5 % FPR", "TPR at 1 % FPR"),
        title=f"on {results['num_harmful']} harmful and {results['num_benign']} benign test "
        "conversations",
    )
    for row in results["rows"]:
        caught = row["tpr_at_1pct_fpr"]
        table.add_row(
            _title(row),
            str(row["num_harmful"]),
            str(row["num_benign"]),
            ",".join(map(str, row["layers"])),
            f"{row['auroc']:.3f}",
            f"{row['low_fpr_auroc']:.3f}",
            f"{caught['share']:.3f} ({caught['low']:.3f} to {caught['high']:.3f})",
        )
    Console(width=None if Console().is_terminal else 140).print(table)


def _title(row: dict[str, Any]) -> str:
    if row["kind"] == "data":
        return f"{row['data_share']:.1%} of the data"
    if row["kind"] == "layers":
        return "one layer" if len(row["layers"]) == 1 else "all layers"
    if row["tokens"] == 0:
        return "prompt alone"
    return f"up to token {row['tokens']} of the answer"
