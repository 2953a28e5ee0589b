"""The figures that sum up a breaker, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuit_breakers_training.report.document import Block, Headline, Headlines, Paragraph
from circuit_breakers_training.report.numbers import (
    aggregation_text,
    auroc_interval,
    count_text,
    layers_text,
    percent,
    rate_interval,
)

__all__ = ["headline_blocks"]


def headline_blocks(m: Mapping[str, Any]) -> tuple[Block, ...]:
    """What the test split says, and what the threshold promises."""
    test = m["test"]
    return (
        Paragraph(
            f"Base model {m['model']['id']}. All figures are of the test split "
            f"({test['num_harmful']} harmful and {test['num_benign']} benign conversations), "
            f"which took no part in training, choice or calibration. {_writer(m)}"
        ),
        Headlines(caption="on the test split", items=tuple(_headlines(test))),
        Paragraph(
            "Intervals of rates are Clopper-Pearson's, that of an area is Hanley and McNeil's on "
            "the logit scale. The one of the TPR takes the benign quantile as given."
        ),
        Paragraph(_promise(m["probe"]) + _of_groups(m)),
    )


def _writer(m: Mapping[str, Any]) -> str:
    if m.get("data_built", True):
        return "Harmful texts were written by the base model itself."
    return "The data was brought by the user; who wrote its texts is not recorded."


def _headlines(test: Mapping[str, Any]) -> list[Headline]:
    rates, early = test["at_threshold"], test["early"]
    conversation, token = test["conversation"], test["response_token"]["running_score"]
    area = auroc_interval(conversation["auroc"], test["num_harmful"], test["num_benign"])
    caught = round(conversation["tpr_at_1pct_fpr"] * test["num_harmful"])
    items = [
        Headline(
            "AUROC per conversation",
            f"{conversation['auroc']:.3f}",
            f"95 % interval {area.low:.3f} to {area.high:.3f}" if area else "",
        ),
        Headline(
            "TPR at 1 % FPR per conversation",
            percent(conversation["tpr_at_1pct_fpr"]),
            f"{caught} of {test['num_harmful']}; {_interval(caught, test['num_harmful'])}",
        ),
        Headline("AUROC per response token", f"{token['auroc']:.3f}"),
        Headline("TPR at 1 % FPR per response token", percent(token["tpr_at_1pct_fpr"])),
    ]
    harmful, benign = rates["harmful"], rates["benign"]
    if harmful["num"]:
        items.append(
            Headline(
                "harmful conversations that trip at the threshold",
                percent(harmful["share"]),
                f"{count_text(harmful)}; {_interval(harmful['num_trips'], harmful['num'])}",
            )
        )
    if benign["num"]:
        items.append(
            Headline(
                "benign conversations that trip at the threshold",
                percent(benign["share"]),
                f"{count_text(benign)}; at most {percent(benign['upper_bound'])}",
            )
        )
    return [
        *items,
        Headline("harmful conversations that trip on the prompt alone", percent(early["prompt"])),
        Headline(
            "harmful responses, prompt left out, that trip within 16 / 64 tokens",
            f"{percent(early['response_within_16'])} / {percent(early['response_within_64'])}",
        ),
    ]


def _interval(num_trips: int, num: int) -> str:
    low, high = rate_interval(num_trips, num)
    return f"95 % interval {100 * low:.1f} to {percent(high)}"


def _promise(probe: Mapping[str, Any]) -> str:
    calibration = probe["calibration"]
    return (
        f"Threshold {probe['threshold_logit']:.3f} on the running score "
        f"({aggregation_text(probe['aggregation'])}, layer {layers_text(probe)}): "
        f"{calibration['num_trips']} of {calibration['num_conversations']} held-out benign "
        f"conversations of at most {calibration['max_tokens']} tokens reach it, so at most "
        f"{percent(calibration['fpr_upper_bound'], 2)} of such conversations do, with "
        f"{percent(calibration['confidence'], 0)} confidence. Longer conversations, other "
        "kinds of benign text and texts by other models are outside this promise."
    )


def _of_groups(m: Mapping[str, Any]) -> str:
    """The bound of that promise where kin conversations are one trial."""
    groups = m.get("calibration_groups")
    if not groups or groups["num"] == m["probe"]["calibration"]["num_conversations"]:
        return ""
    return (
        f" They are of {groups['num']} groups, such as the wordings of one task; if each is one "
        f"trial, {percent(groups['upper_bound'], 2)} is the bound."
    )
