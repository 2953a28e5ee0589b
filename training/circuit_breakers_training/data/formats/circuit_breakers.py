"""circuit_breakers_train.json of Representation Rerouting (Zou et al., arXiv 2406.04313).

A JSON list with `prompt`, `output` (a harmful answer), `llama3_output` (a refusal) and `category`.
The harmful answers and the refusals are two formats of one file: they are repeated and limited
apart, as in the paper (4,994 rows of the former, 2,000 twice of the latter).
"""

from circuit_breakers_training.data.formats.format import Format, Loaded, answered, text
from circuit_breakers_training.data.records import Record

__all__ = ["CIRCUIT_BREAKERS", "CIRCUIT_BREAKERS_REFUSALS"]


def _harmful(record: Record) -> Loaded:
    return answered(
        text(record, "prompt"),
        text(record, "output"),
        "harmful",
        source="circuit-breakers",
        category=text(record, "category"),
    )


def _refusal(record: Record) -> Loaded:
    return answered(
        text(record, "prompt"),
        text(record, "llama3_output"),
        "benign",
        source="refusal",
        category=text(record, "category"),
        kind="refusal",
    )


CIRCUIT_BREAKERS = Format(
    name="circuit-breakers",
    columns=("prompt", "output"),
    # Any instruction data has prompt and output; only the published file is harmful for sure.
    signature=("prompt", "output", "llama3_output"),
    load=_harmful,
)
CIRCUIT_BREAKERS_REFUSALS = Format(
    name="circuit-breakers-refusals", columns=("prompt", "llama3_output"), load=_refusal
)
