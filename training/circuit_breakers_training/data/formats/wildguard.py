"""WildGuardMix (Han et al., arXiv 2406.18495): prompts and answers, each judged for harm.

A row has `prompt`, `adversarial`, `response` (none in half of the training rows),
`prompt_harm_label`, `response_harm_label`, `response_refusal_label` and `subcategory`.
"""

from circuit_breakers_training.data.formats.format import (
    Dropped,
    Format,
    Loaded,
    answered,
    choice,
    flag,
    open_prompt,
    text,
)
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.data.records import Record

__all__ = ["WILDGUARD"]

_HARM = ("harmful", "unharmful")


def _row(record: Record) -> Loaded:
    prompt, response = text(record, "prompt"), text(record, "response")
    asked = choice(record, "prompt_harm_label", _HARM)
    said = choice(record, "response_harm_label", _HARM)
    refused = choice(record, "response_refusal_label", ("refusal", "compliance")) == "refusal"
    source = "wildguard-adversarial" if flag(record, "adversarial") else "wildguard"
    category = text(record, "subcategory")
    if not prompt:
        return Dropped("empty prompt")
    if not response:
        if asked is None:
            return Dropped("no label")
        label = "harmful" if asked == "harmful" else "benign"
        messages = (Message("user", prompt),)
        if label == "harmful":
            return open_prompt(messages, "harmful", source=source, category=category)
        return open_prompt(messages, "benign", source=source, category=category)
    if said is None or (said == "unharmful" and asked is None):
        return Dropped("no label")
    if said == "harmful":
        return answered(prompt, response, "harmful", source=source, category=category)
    if refused and asked == "unharmful":
        return Dropped("refusal of a harmless prompt")
    # A harmless answer to a harmful prompt counts as a refusal: a guard that reads prompts is
    # neither right nor wrong to trip on it, so it must not set the threshold.
    return answered(
        prompt,
        response,
        "benign",
        source=source,
        category=category,
        kind="refusal" if asked == "harmful" else "completion",
    )


WILDGUARD = Format(
    name="wildguard",
    columns=("prompt", "response", "prompt_harm_label", "response_harm_label"),
    signature=("prompt", "response", "prompt_harm_label", "response_harm_label"),
    load=_row,
)
