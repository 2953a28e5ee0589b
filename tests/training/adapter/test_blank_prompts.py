from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from circuit_breakers.errors import DataError
from circuit_breakers_training.adapter.blank_prompts import blank_prompts
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.render import PLAIN_TEMPLATE, render

from ..conftest import make_conversations


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_llama)


HARMFUL = make_conversations("harmful", 400, 7)


def prompts(rows: list[Conversation]) -> list[str]:
    return [row.prompt for row in rows]


def test_the_share_is_blanked_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    blanked = blank_prompts(HARMFUL, share=0.5, seed=0, tokenizer=tokenizer)
    # 400 draws of 1/2: 200, and six standard deviations of 10.
    assert 140 < blanked.num_blanked < 260
    assert prompts(blanked.conversations).count("") == blanked.num_blanked
    for before, after in zip(HARMFUL, blanked.conversations, strict=True):
        assert after.response == before.response
        assert after.prompt in ("", before.prompt)
        assert (after.label, after.group, after.source) == (
            before.label,
            before.group,
            before.source,
        )


def test_no_share_and_the_whole_share(tokenizer: PreTrainedTokenizerFast) -> None:
    assert blank_prompts(HARMFUL, share=0.0, seed=0, tokenizer=tokenizer) == (HARMFUL, 0)
    whole = blank_prompts(HARMFUL, share=1.0, seed=0, tokenizer=tokenizer)
    assert whole.num_blanked == len(HARMFUL)


def test_a_row_is_decided_by_seed_and_itself_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    first = blank_prompts(HARMFUL, share=0.5, seed=0, tokenizer=tokenizer).conversations
    again = blank_prompts(HARMFUL[::-1], share=0.5, seed=0, tokenizer=tokenizer).conversations
    part = blank_prompts(HARMFUL[100:], share=0.5, seed=0, tokenizer=tokenizer).conversations
    other = blank_prompts(HARMFUL, share=0.5, seed=1, tokenizer=tokenizer).conversations
    assert again[::-1] == first
    assert part == first[100:]
    assert prompts(other) != prompts(first)


def test_a_larger_share_keeps_the_rows_of_a_smaller_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    few = blank_prompts(HARMFUL, share=0.2, seed=0, tokenizer=tokenizer).conversations
    many = blank_prompts(HARMFUL, share=0.6, seed=0, tokenizer=tokenizer).conversations
    assert all(not m.prompt for f, m in zip(few, many, strict=True) if not f.prompt)


def test_only_the_last_user_turn_is_blanked(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (
        Message("system", "b1"),
        Message("user", "b2"),
        Message("assistant", "b3"),
        Message("user", "h4"),
        Message("assistant", "h5"),
    )
    row = Conversation(messages=turns, label="harmful", source="s", group="g")
    (blanked,) = blank_prompts([row], share=1.0, seed=0, tokenizer=tokenizer).conversations
    assert [m.content for m in blanked.messages] == ["b1", "b2", "b3", "", "h5"]
    rendered = render(tokenizer, blanked.messages, max_length=100)
    assert tokenizer.convert_ids_to_tokens(list(rendered.ids))[-4:] == [
        *("<|user|>", "<|end|>", "<|assistant|>", "h5")
    ]


def test_the_plain_template_renders_blank_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert blank_prompts(HARMFUL, share=1.0, seed=0, tokenizer=tokenizer).num_blanked == 400


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages if m.content %}[{{ m.role }}]{{ m.content }}{% endfor %}",
            "leaves out or rewrites",
        ),
        (
            "{% if not messages[0].content %}{{ raise_exception('say something') }}{% endif %}"
            "{{ messages[0].content }}",
            r"refuses them \(say something\)",
        ),
    ],
)
def test_a_template_without_blank_turns_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, said: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said + r".*set data\.blank_prompt_share to 0"):
        blank_prompts(HARMFUL, share=0.5, seed=0, tokenizer=tokenizer)
    # Nobody asks for blank turns: any template will do.
    assert blank_prompts(HARMFUL, share=0.0, seed=0, tokenizer=tokenizer).num_blanked == 0
