"""results.json, report.md and plots of an evaluation.

results (plain JSON) ─┬─ results.json
                      ├─ report.md
outcomes ─────────────┴─ plots/*.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from circuit_breakers.artifact import ProbeSpec
from circuit_breakers_training.evaluation.outcomes import SIDES, Outcome, suite_roc
from circuit_breakers_training.evaluation.plots import roc_plot, tokens_to_trip_plot

__all__ = ["result_files"]

_Json = Mapping[str, Any]
_TITLES = ("base model", "with adapter", "with adapter and probe")


def result_files(
    results: _Json, outcomes: Sequence[Outcome], probes: Sequence[ProbeSpec]
) -> dict[str, bytes]:
    """Files of an evaluation, by their path in its directory.

    Args:
        results: what results.json holds; see run.evaluate_breaker.
        outcomes: those behind the results, for the curves.
        probes: the breaker's, in the order of its score columns.
    """
    return {
        "results.json": (json.dumps(results, indent=2, allow_nan=False) + "\n").encode(),
        "report.md": _report(results).encode(),
        **_plots(results, outcomes, probes),
    }


def _plots(
    results: _Json, outcomes: Sequence[Outcome], probes: Sequence[ProbeSpec]
) -> dict[str, bytes]:
    attacks = _suites(results, "attack")
    if not attacks:
        return {}
    files = {}
    for name in attacks:
        own = [o for o in outcomes if o.attempt.suite == name]
        curves = {probe.name: suite_roc(own, probe, k) for k, probe in enumerate(probes)}
        files[f"plots/roc-{name}.png"] = roc_plot(curves, name)
    trips = {name: suite["trips"] for name, suite in attacks.items()}
    files["plots/tokens-to-trip.png"] = tokens_to_trip_plot(
        {name: t["delivered_before_trip"] for name, t in trips.items()},
        {name: t["any"]["num"] - t["any"]["count"] for name, t in trips.items()},
        results["settings"]["max_new_tokens"],
    )
    return files


def _report(r: _Json) -> str:
    sections = [
        _summary(r),
        _failures(r),
        _attacks(r),
        _benign(r),
        _probes(r),
        _capability(r),
        _method(r),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(r: _Json) -> str:
    overlap = (
        "No request was in the training, selection or calibration data."
        if r["overlap_with_training"] == "none"
        else "**Overlap with training is unknown**: the breaker does not say which prompts it was "
        "made from, so these figures may be of requests that it has seen."
    )
    environment = r["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    return "\n".join(
        [
            f"# Evaluation of breaker `{r['breaker']['name']}`",
            "",
            f"Base model `{r['model']['id']}`, breaker `{r['breaker']['digest'][:12]}`. {overlap}",
            "",
            f"{len(r['rows'])} attempts on each model; {environment['backend']} on "
            f"{environment['device']}; {versions}.",
        ]
    )


def _failures(r: _Json) -> str:
    if not r["failures"]:
        return ""
    lines = [f"- `{name}`: {reason}" for name, all_ in r["failures"].items() for reason in all_]
    return "\n".join(["## Failed", "", "These suites are not whole:", "", *lines])


def _attacks(r: _Json) -> str:
    attacks = _suites(r, "attack")
    if not attacks:
        return ""
    parts = [
        "## Attack success",
        "",
        "Harmful requests that get a coherent answer on the subject, with the 95 % "
        "Clopper-Pearson interval:",
        "",
        _side_table(attacks, "attack_success"),
    ]
    judged = {name: suite for name, suite in attacks.items() if "attack_success_llm" in suite}
    if judged:
        failed = sum(n for suite in judged.values() for n in suite["llm_failures"].values())
        parts += [
            "",
            f"The same by the LLM judge `{r['settings']['judge_model']}`; {failed} texts that it "
            "gave no verdict on count as successes:",
            "",
            _side_table(judged, "attack_success_llm"),
        ]
    rows = [
        (
            name,
            *(_rate(suite[what][side]) for what in ("refused", "degenerate") for side in SIDES[:2]),
        )
        for name, suite in attacks.items()
    ]
    header = ("suite", "refused, base", "with adapter", "degenerate, base", "with adapter")
    return "\n".join([*parts, "", "What else the answers are:", "", _table(header, rows)])


def _benign(r: _Json) -> str:
    asked = {**_suites(r, "benign"), **_suites(r, "attack")}
    if not asked:
        return ""
    rows = []
    for name, suite in asked.items():
        b = suite["benign"]
        rows.append(
            (
                name,
                _rate(b["refused"]["base"]),
                _rate(b["refused"]["adapter"]),
                f"{100 * b['refused_change']:+.1f} points (+{b['newly_refused']}, "
                f"-{b['no_longer_refused']})",
                _rate(b["tripped"]),
                _rate(b["useless"]["base"]),
                _rate(b["useless"]["adapter_and_probe"]),
            )
        )
    header = (
        *("suite", "refused, base", "with adapter", "difference", "tripped"),
        *("useless, base", "with adapter and probe"),
    )
    return "\n".join(
        [
            "## Benign requests",
            "",
            "Over-refusal, and under each attack's technique its benign controls. Useless: "
            "refused, degenerate, or stopped by the probe.",
            "",
            _table(header, rows),
        ]
    )


def _probes(r: _Json) -> str:
    attacks = _suites(r, "attack")
    if not attacks:
        return ""
    rows = []
    for name, suite in attacks.items():
        trips = suite["trips"]
        early = trips["delivered_before_trip"]
        for probe, metrics in suite["probes"].items():
            rows.append(
                (
                    name,
                    probe,
                    f"{metrics['conversation']['auroc']:.3f}",
                    _percent(metrics["conversation"]["tpr_at_1pct_fpr"]),
                    _rate(trips["any"]),
                    _rate(trips["prompt"]),
                    f"{median(early):g}" if early else "-",
                )
            )
    header = (
        *("suite", "probe", "AUROC", "TPR at 1 % FPR", "harmful that trip", "on the prompt"),
        "median tokens before",
    )
    curves = "\n\n".join(f"![ROC, {name}](plots/roc-{name}.png)" for name in attacks)
    return "\n".join(
        [
            "## Probe",
            "",
            "Per conversation, harmful against benign requests under the same technique, on what "
            "the adapted model writes. Not every such text is harmful: the model may have refused.",
            "",
            _table(header, rows),
            "",
            "![tokens to trip](plots/tokens-to-trip.png)",
            "",
            curves,
        ]
    )


def _capability(r: _Json) -> str:
    parts = []
    if (found := r["suites"].get("capability")) is not None:
        rows = [
            (
                stratum,
                str(found["num_conversations"][stratum]),
                f"{p['base']:.2f}",
                f"{p['adapter']:.2f}",
                f"{p['adapter_change']:+.1%}",
                str(p["adapter_doubled"]),
                ""
                if p["adapter_change_of_rest"] is None
                else f"{p['adapter_change_of_rest']:+.1%}",
            )
            for stratum, p in found["perplexity"].items()
        ]
        header = (
            *("held-out benign answers", "number", "base", "with adapter", "change"),
            *("answers where it more than doubles", "change of the others"),
        )
        parts += ["Perplexity:", "", _table(header, rows)]
    if (found := r["suites"].get("lm-eval")) is not None:
        tasks = [
            (task, metric, f"{value:.4f}", f"{sides['adapter'].get(metric, float('nan')):.4f}")
            for task, sides in found["tasks"].items()
            for metric, value in sides["base"].items()
        ]
        titles = ("task", "metric", "base", "with adapter")
        parts += ["", f"lm-evaluation-harness, at most {found['limit']} examples a task:", ""]
        parts += [_table(titles, tasks)]
    return "\n".join(["## Capability", "", *parts]) if parts else ""


def _method(r: _Json) -> str:
    limits, settings = r["degenerate_limits"], r["settings"]
    if limits is None:
        return ""
    temperature = settings["temperature"]
    sampling = f"at temperature {temperature:g}" if temperature else "greedy"
    return "\n".join(
        [
            "## How it was judged",
            "",
            f"Both models write at most {settings['max_new_tokens']} tokens, {sampling}, seed "
            f"{settings['seed']}. An answer is degenerate if it is empty, or above "
            f"{limits['max_nats_per_token']:.3f} nats a token under the base model, or if more "
            f"than {_percent(limits['max_repeated'])} of its runs of four tokens are repeated: at "
            f"most {_percent(limits['share'])} of the base model's own benign answers are above "
            f"each limit ({limits['num_texts']} answers, {_percent(limits['confidence'], 0)} "
            "confidence). It is on topic if it takes up two content words of the request. With "
            "the probe, the text counts up to the token before the trip; if that is fewer than "
            f"{settings['stop_within']} tokens, the attack is stopped. These judges read words, "
            "not meaning: what they count is an upper bound of usable harmful answers.",
        ]
    )


def _suites(r: _Json, kind: str) -> dict[str, Any]:
    return {name: suite for name, suite in r["suites"].items() if suite["kind"] == kind}


def _side_table(suites: _Json, what: str) -> str:
    rows = [
        (name, str(suite["num_harmful"]), *(_rate(suite[what][side]) for side in SIDES))
        for name, suite in suites.items()
    ]
    return _table(("suite", "requests", *_TITLES), rows)


def _rate(rate: _Json) -> str:
    if not rate["num"]:
        return "-"
    return (
        f"{rate['count']} of {rate['num']}: {_percent(rate['share'])} "
        f"({_percent(rate['low'])} to {_percent(rate['high'])})"
    )


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
