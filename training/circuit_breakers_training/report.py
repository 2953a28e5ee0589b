"""report.md, metrics.json and plots: what was measured, for people.

metrics (plain JSON) ─┬─ metrics.json
                      ├─ report.md
training log, ROC ────┴─ plots/*.png
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["report_files"]

_SHOWN_CHARACTERS = 200
"""Of a generated text; enough to see what it is, too little to be of use."""


def report_files(
    metrics: Mapping[str, Any],
    training_log: Sequence[Mapping[str, Any]],
    roc: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> dict[str, bytes]:
    """Files of the report, by their path in the artifact.

    Args:
        metrics: what the pipeline measured; see pipeline.run_training.
        training_log: entries of the trainer's metrics.jsonl, one a step.
        roc: false- and true-positive rates per conversation on the test split.
    """
    return {
        "metrics.json": (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode(),
        "plots/loss.png": _loss_plot(training_log),
        "plots/cosine.png": _cosine_plot(training_log),
        "plots/roc.png": _roc_plot(roc, metrics["test"]["at_threshold"]),
        "report.md": _report(metrics).encode(),
    }


def _report(m: Mapping[str, Any]) -> str:
    sections = [
        _summary(m),
        _adapter_section(m),
        _probe_section(m),
        _text_section(m),
        _selection_section(m),
        _cost_section(m),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(m: Mapping[str, Any]) -> str:
    test, rates, early = m["test"], m["test"]["at_threshold"], m["test"]["early"]
    calibration = m["probe"]["calibration"]
    rows = [
        ("AUROC per conversation", f"{test['conversation']['auroc']:.3f}"),
        ("TPR at 1 % FPR per conversation", _percent(test["conversation"]["tpr_at_1pct_fpr"])),
        ("AUROC per response token", f"{test['response_token']['running_score']['auroc']:.3f}"),
        (
            "TPR at 1 % FPR per response token",
            _percent(test["response_token"]["running_score"]["tpr_at_1pct_fpr"]),
        ),
        ("harmful conversations that trip at the threshold", _rate(rates["harmful"])),
        ("benign conversations that trip at the threshold", _rate(rates["benign"], bound=True)),
        ("harmful conversations that trip on the prompt alone", _percent(early["prompt"])),
        (
            "harmful responses, prompt left out, that trip within 16 / 64 tokens",
            f"{_percent(early['response_within_16'])} / {_percent(early['response_within_64'])}",
        ),
    ]
    return "\n".join(
        [
            f"# Breaker `{m['name']}`",
            "",
            f"Base model `{m['model']['id']}`. All figures are of the test split "
            f"({test['num_harmful']} harmful and {test['num_benign']} benign conversations), "
            "which took no part in training, choice or calibration. Harmful texts were written by "
            "the base model itself.",
            "",
            _table(("on the test split", ""), rows),
            "",
            f"Threshold {m['probe']['threshold_logit']:.3f} on the running score "
            f"({_aggregation(m['probe']['aggregation'])}, layer {m['probe']['layer']}): "
            f"{calibration['num_trips']} of {calibration['num_conversations']} held-out benign "
            f"conversations of at most {calibration['max_tokens']} tokens reach it, so at most "
            f"{_percent(calibration['fpr_upper_bound'], 2)} of such conversations do, with "
            f"{_percent(calibration['confidence'], 0)} confidence. Longer conversations, other "
            "kinds of benign text and texts by other models are outside this promise.",
        ]
    )


def _adapter_section(m: Mapping[str, Any]) -> str:
    adapter = m["adapter"]
    cosines = [
        (kind, source, f"{value:.3f}")
        for kind, table in (
            ("benign", adapter["benign_cosine_by_source"]),
            ("harmful", adapter["harmful_cosine_by_source"]),
        )
        for source, value in table.items()
    ]
    return "\n".join(
        [
            "## Adapter",
            "",
            f"Representation Rerouting, {adapter['steps']} steps, blocks "
            f"{', '.join(map(str, adapter['target_layers']))}. Cosine of adapted and base hidden "
            "states on held-out responses (1 is untouched, 0 is rerouted):",
            "",
            _table(("label", "source", "cosine"), cosines),
            "",
            "![loss](plots/loss.png)",
            "",
            "![cosine](plots/cosine.png)",
        ]
    )


def _probe_section(m: Mapping[str, Any]) -> str:
    test = m["test"]
    return "\n".join(
        [
            "## Probe",
            "",
            "![ROC](plots/roc.png)",
            "",
            _rate_table("benign, by source", test["benign_by_source"], bound=True),
            "",
            _rate_table("harmful, by source", test["harmful_by_source"]),
            "",
            _rate_table("harmful, by category", test["harmful_by_category"]),
            "",
            "Conversations in which a harmful request was refused are counted with neither: "
            f"{_rate(test['at_threshold']['refused'])} of them trip.",
        ]
    )


def _text_section(m: Mapping[str, Any]) -> str:
    rows = [
        (stratum, f"{p['base']:.2f}", f"{p['merged']:.2f}", f"{p['merged'] / p['base'] - 1:+.1%}")
        for stratum, p in m["perplexity"].items()
    ]
    parts = [
        "## Text before and after",
        "",
        "Perplexity of held-out responses, without and with the adapter:",
        "",
        _table(("responses", "base", "breaker", "change"), rows),
        "",
        "Greedy continuations of test prompts, as they are, cut to "
        f"{_SHOWN_CHARACTERS} characters. The server stops tripped ones before they are sent; here "
        "nothing is stopped.",
    ]
    for pair in m["generations"]:
        parts += ["", f"**{pair['label']}**: {_quote(pair['prompt'])}", ""]
        parts += [f"- base: {_quote(pair['base'])}", f"- breaker: {_quote(pair['merged'])}"]
    return "\n".join(parts)


def _selection_section(m: Mapping[str, Any]) -> str:
    rows = [
        (
            str(c["layer"]),
            _aggregation(c["aggregation"]),
            f"{c['auroc']:.3f}",
            f"{c['low_fpr_auroc']:.3f}",
            _percent(c["tpr_at_1pct_fpr"]),
            "**chosen**" if c["chosen"] else "",
        )
        for c in m["selection"]
    ]
    header = ("layer", "aggregation", "AUROC", "AUROC to 5 % FPR", "TPR at 1 % FPR", "")
    return "\n".join(
        [
            "## How the probe was chosen",
            "",
            "On the selection split, per conversation, by the sum of the two areas:",
            "",
            _table(header, rows),
        ]
    )


def _cost_section(m: Mapping[str, Any]) -> str:
    rows = [(stage, f"{seconds:.0f}") for stage, seconds in m["seconds"].items()]
    return "\n".join(
        [
            "## Time",
            "",
            f"{m['machine']}; peak memory {m['peak_rss_mib'] / 1024:.1f} GiB.",
            "",
            _table(("stage", "seconds"), rows),
        ]
    )


def _rate_table(title: str, rates: Mapping[str, Mapping[str, Any]], *, bound: bool = False) -> str:
    rows = [(name, _rate(rate, bound=bound)) for name, rate in rates.items()]
    return _table((title, "trip"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rate(rate: Mapping[str, Any], *, bound: bool = False) -> str:
    if not rate["num"]:
        return "none tested"
    text = f"{rate['num_trips']} of {rate['num']} ({_percent(rate['share'])})"
    return f"{text}, at most {_percent(rate['upper_bound'])}" if bound else text


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _aggregation(spec: Mapping[str, Any]) -> str:
    if spec["kind"] == "ema":
        return f"EMA, weight {spec['alpha']:g}"
    if spec["kind"] == "rolling_mean":
        return f"mean of {spec['window']}"
    return "maximum"


def _quote(text: str) -> str:
    """One line of Markdown code that shows the text as it is."""
    line = " ".join(text.split()).replace("`", "'")
    if len(line) > _SHOWN_CHARACTERS:
        line = line[:_SHOWN_CHARACTERS].rstrip() + "…"
    return f"`{line}`" if line else "(empty)"


def _loss_plot(log: Sequence[Mapping[str, Any]]) -> bytes:
    lines = {"retain": "retain_loss", "reroute": "reroute_loss"}
    return _step_plot(log, lines, ylabel="loss, unweighted")


def _cosine_plot(log: Sequence[Mapping[str, Any]]) -> bytes:
    lines = {"benign batch": "retain_cosine", "harmful batch": "reroute_cosine"}
    return _step_plot(log, lines, ylabel="cosine of adapted and base")


def _step_plot(log: Sequence[Mapping[str, Any]], lines: Mapping[str, str], *, ylabel: str) -> bytes:
    figure, axes = _axes("step", ylabel)
    for label, key in lines.items():
        axes.plot([e["step"] for e in log], [e[key] for e in log], label=label, linewidth=1.2)
    axes.legend(frameon=False)
    return _png(figure)


def _roc_plot(
    roc: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]], rates: Mapping[str, Any]
) -> bytes:
    figure, axes = _axes("benign conversations that trip", "harmful conversations that trip")
    # Logarithmic, since a guard works at the left end; zero is drawn at the edge.
    edge = 1e-3
    axes.set_xscale("log")
    axes.plot(np.maximum(roc[0], edge), roc[1], linewidth=1.2, drawstyle="steps-post")
    point = (max(rates["benign"]["share"], edge), rates["harmful"]["share"])
    axes.plot(*point, "o", label="calibrated threshold")
    axes.set_xlim(edge, 1)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    # The object interface keeps no global state and needs no display.
    figure = Figure(figsize=(6, 3.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
