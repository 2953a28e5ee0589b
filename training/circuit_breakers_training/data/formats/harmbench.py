"""HarmBench's behaviours (Mazeika et al., arXiv 2402.04249): for evaluation alone.

harmbench_behaviors_text_*.csv has `Behavior`, `FunctionalCategory`, `SemanticCategory`, `Tags`,
`ContextString` and `BehaviorID`. A contextual behaviour comes after its context, as in HarmBench's
direct request.
"""

from circuit_breakers_training.data.formats.format import (
    Dropped,
    Format,
    Loaded,
    open_prompt,
    text,
)
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.data.records import Record

__all__ = ["HARMBENCH"]


def _behavior(record: Record) -> Loaded:
    behavior, context = text(record, "Behavior"), text(record, "ContextString")
    if not behavior:
        return Dropped("empty prompt")
    prompt = f"{context}\n\n---\n\n{behavior}" if context else behavior
    return open_prompt(
        (Message("user", prompt),),
        "harmful",
        source="harmbench",
        category=text(record, "SemanticCategory"),
    )


HARMBENCH = Format(
    name="harmbench",
    columns=("Behavior", "BehaviorID"),
    signature=("Behavior", "BehaviorID"),
    load=_behavior,
    evaluation_only=True,
)
