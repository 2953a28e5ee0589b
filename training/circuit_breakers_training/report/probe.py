"""Sections about the probe: how it separates, what trips, how it was calibrated and chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from circuit_breakers_training.report.document import (
    Block,
    Paragraph,
    Plot,
    Section,
    Share,
    Table,
)
from circuit_breakers_training.report.numbers import (
    aggregation_text,
    bounded_share,
    count_text,
    is_rate,
    layers_text,
    percent,
    share_cell,
)
from circuit_breakers_training.report.plots import operating_point_plot, roc_plot
from circuit_breakers_training.report.trips import measured

__all__ = ["calibration_section", "probe_section", "selection_section"]

Rates = Mapping[str, Mapping[str, Any]]


def probe_section(m: Mapping[str, Any]) -> Section | None:
    """ROC curves, and rates at the threshold by source and category."""
    test = m["test"]
    blocks: list[Block] = [
        *_roc_plots(m),
        *_rate_tables(test),
    ]
    groups = test.get("harmful_groups")
    if groups and groups["num"] < test["num_harmful"]:
        missed = test["num_harmful"] - test["at_threshold"]["harmful"]["num_trips"]
        blocks.append(
            Paragraph(
                f"The harmful conversations are of {groups['num']} groups, such as the wordings of "
                f"one request: of {groups['num_all_trip']} groups all trip, of "
                f"{groups['num_none_trips']} none does, which are "
                f"{groups['num_conversations_of_none']} of the {missed} misses. So there are fewer "
                "independent cases than conversations: more is uncertain than the intervals say."
            )
        )
    refused = test["at_threshold"].get("refused")
    if refused and refused["num"]:
        blocks.append(
            Paragraph(
                "Conversations in which a harmful request was refused are counted with neither: "
                f"{count_text(refused)} ({percent(refused['share'])}) of them trip."
            )
        )
    if not blocks:
        return None
    return Section(name="probe", title="Probe", blocks=tuple(blocks))


def calibration_section(m: Mapping[str, Any]) -> Section | None:
    """The promise of the threshold, and what it rests on."""
    calibration = m["probe"]["calibration"]
    groups = m.get("calibration_groups")
    rows = [
        ("threshold, a logit", f"{m['probe']['threshold_logit']:.4f}"),
        ("benign conversations", str(calibration["num_conversations"])),
        ("of these at or above the threshold", str(calibration["num_trips"])),
        ("longest conversation", f"{calibration['max_tokens']} tokens"),
        ("promised rate", f"at most {percent(calibration['target_fpr'], 2)}"),
        (
            "upper bound of the rate",
            f"{percent(calibration['fpr_upper_bound'], 3)}, one-sided Clopper-Pearson at "
            f"{percent(calibration['confidence'], 0)} confidence",
        ),
    ]
    if groups:
        rows.insert(2, ("groups of these, such as the wordings of one task", str(groups["num"])))
        rows.append(
            (
                "the same if each group is one trial",
                f"{percent(groups['upper_bound'], 3)}: in {groups['num_trips']} of "
                f"{groups['num']} groups a conversation trips",
            )
        )
    table = Table(caption="Calibration of the threshold", header=("", "value"), rows=tuple(rows))
    return Section(
        name="calibration",
        title="Calibration",
        blocks=(table, *_operating_points(m), *_extrapolated(m)),
        page_only=True,
    )


def selection_section(m: Mapping[str, Any]) -> Section | None:
    """All candidates on the selection split."""
    candidates = m.get("selection")
    if not candidates:
        return None
    rows = tuple(
        (
            layers_text(c),
            aggregation_text(c["aggregation"]),
            f"{c['auroc']:.3f}",
            f"{c['low_fpr_auroc']:.3f}",
            percent(c["tpr_at_1pct_fpr"]),
            "chosen" if c["chosen"] else "",
        )
        for c in candidates
    )
    table = Table(
        caption="Candidates on the selection split",
        header=("layer", "aggregation", "AUROC", "AUROC to 5 % FPR", "TPR at 1 % FPR", ""),
        rows=rows,
        marked_row=next((i for i, c in enumerate(candidates) if c["chosen"]), None),
    )
    text = "On the selection split, per conversation, by the sum of the two areas:"
    return Section(
        name="selection",
        title="How the probe was chosen",
        blocks=(*_fit(m), Paragraph(text), table),
    )


def _fit(m: Mapping[str, Any]) -> Iterator[Paragraph]:
    """What the candidates were fitted on."""
    fit = m.get("probe_fit")
    if not fit:
        return
    text = (
        f"Fitted on {fit['num_tokens']:,} tokens of {fit['num_conversations']:,} training "
        f"conversations, at most {fit['tokens_per_conversation']} of each"
    )
    if fit["is_reduced"]:
        text += ", fewer than the recipe asks for, to stay within probe.max_fit_gib"
    if fit["num_repeats"]:
        text += f"; {fit['num_repeats']:,} repeats of these were left out"
    yield Paragraph(f"{text}.")


def _operating_points(m: Mapping[str, Any]) -> Iterator[Block]:
    """Thresholds of other promises, and what each catches where that was measured."""
    curve = m["probe"]["calibration"].get("curve") or ()
    promises = {point["target_fpr"]: point for point in curve}
    points = [
        {**promises.get(point["target_fpr"], {}), **point}
        for point in measured(m, "operating_points") or curve
    ]
    if not points:
        return
    table = Table(
        caption="Operating points",
        header=(
            *("promised rate", "threshold", "of the calibration", "upper bound"),
            *("benign, test", "harmful, test (95 % interval)"),
        ),
        rows=tuple(
            (
                f"at most {100 * point['target_fpr']:g} %",
                f"{point['threshold_logit']:.4f}",
                _calibrated(point),
                percent(point["fpr_upper_bound"], 3) if "fpr_upper_bound" in point else "",
                count_text(point["benign"]) if is_rate(point.get("benign")) else "",
                share_cell(point["harmful"]) if is_rate(point.get("harmful")) else "",
            )
            for point in points
        ),
    )
    yield table
    tested = [p for p in points if is_rate(p.get("harmful")) and p["harmful"]["num"]]
    if len(tested) > 1:
        shares = [p["harmful"]["num_trips"] / p["harmful"]["num"] for p in tested]
        bounds = [p.get("fpr_upper_bound", p["target_fpr"]) for p in tested]
        yield Plot(
            name="operating-points",
            title="Operating points",
            caption="Share of harmful test conversations that trip, by the promised upper bound "
            f"of benign ones: {percent(min(shares))} to {percent(max(shares))}.",
            draw=partial(operating_point_plot, bounds, shares),
            page_only=True,
        )


def _calibrated(point: Mapping[str, Any]) -> str:
    if not {"num_trips", "num_conversations"} <= point.keys():
        return ""
    return f"{point['num_trips']} of {point['num_conversations']}"


def _extrapolated(m: Mapping[str, Any]) -> Iterator[Block]:
    """Rates of benign conversations that are longer than the calibrated ones."""
    beyond = m.get("beyond_calibrated_length")
    if not beyond or not beyond.get("rate_at_tokens"):
        return
    yield Paragraph(
        "Beyond the calibrated length, extrapolated and not measured: the rate if every further "
        "token of benign text trips as often as one of the test split "
        f"({beyond['num_trips']} trips in {beyond['num_tokens']} tokens)."
    )
    yield Table(
        caption="Extrapolated rates of long benign conversations",
        header=("tokens", "rate", "upper bound"),
        rows=tuple(
            (tokens, percent(at["rate"], 2), percent(at["upper_bound"], 2))
            for tokens, at in beyond["rate_at_tokens"].items()
        ),
    )


def _roc_plots(m: Mapping[str, Any]) -> Iterator[Plot]:
    roc = m.get("roc")
    if not roc:
        return
    rates = m["test"]["at_threshold"]
    point = None
    said = ""
    if rates["benign"]["num"] and rates["harmful"]["num"]:
        point = (rates["benign"]["share"], rates["harmful"]["share"])
        said = (
            f" The calibrated threshold trips on {percent(point[1])} of the harmful and "
            f"{percent(point[0])} of the benign conversations."
        )
    draw = partial(roc_plot, roc["false_positive_rate"], roc["true_positive_rate"], point)
    area = f"{m['test']['conversation']['auroc']:.3f}"
    yield Plot(
        name="roc",
        title="ROC, low end",
        caption="ROC curve per conversation, benign rates on a logarithmic axis; zero is drawn at "
        f"0.1 %.{said}",
        draw=partial(draw, logarithmic=True),
    )
    yield Plot(
        name="roc-linear",
        title="ROC",
        caption=f"The same curve on a linear axis; the area under it is {area}.",
        draw=partial(draw, logarithmic=False),
        page_only=True,
    )


def _rate_tables(test: Mapping[str, Any]) -> Iterator[Table]:
    for label, cell, what in (
        ("benign", bounded_share, "share (95 % bound)"),
        ("harmful", share_cell, "share (95 % interval)"),
    ):
        for key in ("source", "category", "length"):
            rates = test.get(f"{label}_by_{key}")
            # Where no conversation has a category, the table would say nothing new.
            if rates and set(rates) != {"none"}:
                yield _rate_table(f"{label}, by {key}", rates, cell, what)


def _rate_table(
    title: str, rates: Rates, cell: Callable[[Mapping[str, Any]], Share], what: str
) -> Table:
    rows = tuple((name, count_text(rate), cell(rate)) for name, rate in rates.items())
    return Table(
        caption=f"Trips at the threshold: {title}", header=(title, "trip", what), rows=rows
    )
