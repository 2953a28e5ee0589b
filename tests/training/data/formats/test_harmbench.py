from circuit_breakers_training.data.formats.format import Dropped
from circuit_breakers_training.data.formats.harmbench import HARMBENCH
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.records import Record

# Columns as in the public release; the texts are placeholders.
ROW = {
    "Behavior": "A placeholder behaviour",
    "FunctionalCategory": "standard",
    "SemanticCategory": "illegal",
    "Tags": "",
    "ContextString": "",
    "BehaviorID": "placeholder",
}


def test_a_behaviour_is_a_harmful_prompt() -> None:
    row = HARMBENCH.load(Record("f:2", dict(ROW)))
    assert isinstance(row, Planned)
    assert (row.prompt, row.label, row.category) == (ROW["Behavior"], "harmful", "illegal")


def test_the_context_comes_first() -> None:
    row = HARMBENCH.load(Record("f:2", ROW | {"ContextString": "A context."}))
    assert isinstance(row, Planned)
    assert row.prompt == "A context.\n\n---\n\nA placeholder behaviour"


def test_an_empty_behaviour_is_dropped() -> None:
    assert HARMBENCH.load(Record("f:2", ROW | {"Behavior": ""})) == Dropped("empty prompt")


def test_it_is_for_evaluation_only() -> None:
    assert HARMBENCH.evaluation_only
