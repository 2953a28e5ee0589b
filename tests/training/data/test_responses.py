from pathlib import Path

import pytest

from circuit_breakers_training.data.generate import open_generator
from circuit_breakers_training.data.jsonl import Label, Message
from circuit_breakers_training.data.magpie import turn_template
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.responses import (
    MAX_PROMPT_TOKENS,
    Responses,
    reason_to_drop,
    write_responses,
)

PLANS = [
    ("please b1 b2", "benign"),
    ("b1 " * MAX_PROMPT_TOKENS, "benign"),
    # No answer takes this up: the tiny model has no such word.
    ("telescopes microscopes", "harmful"),
    ("please b3", "benign"),
]


@pytest.fixture(scope="module")
def responses(tiny_llama: Path) -> Responses:
    def plan(prompt: str, label: Label) -> Planned:
        return Planned(messages=(Message("user", prompt),), label=label, source="s", group="g")

    planned = [plan(text, "harmful" if label == "harmful" else "benign") for text, label in PLANS]
    with open_generator(
        tiny_llama, "transformers", seed=0, max_model_len=128, chat_template="model"
    ) as generate:
        template = turn_template(generate.tokenizer, "tiny")
        return write_responses(generate, template, planned, 16)


def test_every_plan_has_a_conversation_or_a_reason(responses: Responses) -> None:
    assert sorted([*responses.rows, *responses.dropped]) == list(range(len(PLANS)))


def test_conversations_answer_the_plan_of_their_index(responses: Responses) -> None:
    assert set(responses.rows) == {0, 3}
    for index, row in responses.rows.items():
        assert row.prompt == PLANS[index][0]
        assert len(row.response.split()) >= 4


def test_plans_without_a_usable_text_say_why(responses: Responses) -> None:
    assert responses.dropped[1] == "benign prompt too long"
    assert responses.dropped[2] == "harmful text is about something else"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Sure, here is bread.", True),
        ("Sure, okay.", False),
        ("当然可以，首先准备面粉、水和酵母，然后揉面二十分钟。", True),
        ("好的。", False),
    ],
)
def test_short_texts_are_told_in_scripts_without_blanks_too(text: str, kept: bool) -> None:
    plan = Planned(messages=(Message("user", "bread"),), label="benign", source="s", group="g")
    assert (reason_to_drop(plan, text) is None) == kept
