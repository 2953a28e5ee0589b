"""XSTest: harmless requests that sound dangerous (Röttger et al., arXiv 2308.01263).

The prompts (xstest_prompts.csv) have `id`, `prompt`, `type`, `label` (safe or unsafe), `focus` and
`note`; the labelled completions (xstest_v2_completions_*.csv) have `prompt`, `type`, `completion`
and `final_label`. A type that starts with `contrast_` marks an unsafe prompt.

Deviation from arXiv 2406.04313, which keeps every full compliance: an answer to an unsafe prompt
has no business among the harmless rows and is left out.
"""

from circuit_breakers_training.data.formats.format import (
    Dropped,
    Format,
    Loaded,
    answered,
    choice,
    open_prompt,
    text,
)
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.data.records import Record

__all__ = ["XSTEST", "XSTEST_PROMPTS"]

_COMPLIANCE = "1_full_compliance"
_LABELS = (_COMPLIANCE, "2_full_refusal", "3_partial_refusal")
_CONTRAST = "contrast_"


def _completion(record: Record) -> Loaded:
    kind, label = text(record, "type"), choice(record, "final_label", _LABELS)
    if kind.startswith(_CONTRAST):
        return Dropped("unsafe prompt")
    if label != _COMPLIANCE:
        return Dropped("no label" if label is None else "refusal of a harmless prompt")
    return answered(
        text(record, "prompt"),
        text(record, "completion"),
        "benign",
        source="xstest",
        category=kind,
    )


def _prompt(record: Record) -> Loaded:
    kind, label = text(record, "type"), choice(record, "label", ("safe", "unsafe"))
    prompt = text(record, "prompt")
    if label == "unsafe" or kind.startswith(_CONTRAST):
        return Dropped("unsafe prompt")
    if label is None:
        return Dropped("no label")
    if not prompt:
        return Dropped("empty prompt")
    return open_prompt((Message("user", prompt),), "benign", source="xstest", category=kind)


XSTEST = Format(
    name="xstest",
    columns=("prompt", "type", "completion", "final_label"),
    signature=("prompt", "type", "completion", "final_label"),
    load=_completion,
)
XSTEST_PROMPTS = Format(
    name="xstest-prompts",
    columns=("prompt", "type", "label"),
    signature=("prompt", "type", "label", "focus"),
    load=_prompt,
)
