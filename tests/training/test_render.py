from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from circuit_breakers.errors import DataError, ModelError
from circuit_breakers.models import ResolvedModel
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.render import (
    PLAIN_TEMPLATE,
    load_tokenizer,
    render,
    render_all,
    render_prompt,
)

CHAT = (Message("user", "please b1 b2"), Message("assistant", "b3 b4 b5"))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_response_is_what_follows_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    row = render(tokenizer, CHAT, max_length=100)
    assert tokenizer.convert_ids_to_tokens(list(row.ids)) == [
        *("<|user|>", "please", "b1", "b2", "<|end|>", "<|assistant|>"),
        *("b3", "b4", "b5"),
    ]
    assert row.num_prompt_tokens == 6
    assert row.response_mask == (False,) * 6 + (True,) * 3
    assert row.ids[:6] == render_prompt(tokenizer, CHAT[:-1])


def test_the_last_turn_begins_behind_the_assistants_message_before(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert render(tokenizer, CHAT, max_length=100).num_earlier_tokens == 0
    system = (Message("system", "please b6"), *CHAT)
    assert render(tokenizer, system, max_length=100).num_earlier_tokens == 0
    twice = render(tokenizer, (*CHAT, *CHAT), max_length=100)
    last_turn = twice.ids[twice.num_earlier_tokens :]
    assert last_turn == render(tokenizer, CHAT, max_length=100).ids
    assert render(tokenizer, (*CHAT, *CHAT), max_length=4).num_earlier_tokens == 4


def test_truncation_cuts_the_response_and_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    row = render(tokenizer, CHAT, max_length=8)
    assert (len(row.ids), row.num_prompt_tokens, row.num_truncated) == (8, 6, 1)


def test_conversations_without_room_for_a_response_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = (Message("user", "please " + "b1 " * 20), CHAT[1])
    rows = [
        Conversation(messages=messages, label="benign", source="s", group=str(i))
        for i, messages in enumerate((long, CHAT, CHAT))
    ]
    with caplog.at_level(logging.WARNING):
        result = render_all(tokenizer, rows, max_length=8)
    assert (len(result.rows), result.kept) == (2, (1, 2))
    assert (result.num_truncated, result.num_dropped) == (2, 1)
    assert "2 cut at the end, 1 left out" in caplog.text


def test_nothing_is_said_when_nothing_is_lost(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [Conversation(messages=CHAT, label="benign", source="s", group="g")]
    assert render_all(tokenizer, rows, max_length=100).num_dropped == 0
    assert not caplog.records


@pytest.mark.parametrize("messages", [(), CHAT[:1], CHAT[::-1]])
def test_last_message_must_be_the_assistants(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> None:
    with pytest.raises(DataError, match="assistant's last; add the assistant's answer"):
        render(tokenizer, messages, max_length=100)


def test_template_that_rewrites_the_prompt_is_refused(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "<|user|> {{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(DataError, match="does not render the prompt as a prefix"):
        render(tokenizer, CHAT, max_length=100)


def test_tokenizer_without_template_is_refused(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"has no chat template.*chat_template to \"plain\""):
        render(tokenizer, CHAT, max_length=100)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="save it there with tokenizer"):
        load_tokenizer(tmp_path, "model")


def test_plain_template_renders_turns_as_paragraphs(smollm2: ResolvedModel) -> None:
    tokenizer = load_tokenizer(smollm2.path, "plain")
    messages = (
        Message("system", "Be brief."),
        Message("user", "Hi there"),
        Message("assistant", "Hello!"),
        Message("user", "Bye"),
        Message("assistant", "See you."),
    )
    row = render(tokenizer, messages, max_length=100)
    bos = tokenizer.bos_token
    prompt = f"{bos}System: Be brief.\n\nUser: Hi there\n\nAssistant: Hello!\n\nUser: Bye\n\n"
    assert tokenizer.decode(row.ids[: row.num_prompt_tokens]) == prompt + "Assistant:"
    # The space belongs to the first word, as it does when the model goes on by itself.
    assert tokenizer.convert_ids_to_tokens(row.ids[row.num_prompt_tokens]) == "ĠSee"
    assert tokenizer.decode(row.ids[row.num_prompt_tokens :]) == " See you."


def test_plain_template_does_without_special_tokens(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama, "plain")
    assert tokenizer.bos_token is None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "b1"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "User: b1\n\nAssistant:"


def test_the_template_of_a_file_takes_the_place_of_the_models(
    tiny_llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ messages[0].content }} b9")
    tokenizer = load_tokenizer(tiny_llama, file)
    prompt = render_prompt(tokenizer, [Message("user", "b1")])
    assert tokenizer.decode(prompt) == "b1 b9"


def test_plain_template_survives_saving(tiny_llama: Path, tmp_path: Path) -> None:
    # A server finds it beside the weights, where it wins over the model's own.
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(PLAIN_TEMPLATE.encode())
    assert load_tokenizer(tmp_path, "model").chat_template == PLAIN_TEMPLATE


def test_default_model_renders_as_it_is_served(smollm2: ResolvedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    messages = (Message("user", "Hi there"), Message("assistant", "Hello! How are you?"))
    row = render(tokenizer, messages, max_length=100)
    # The template of the model, which adds its own system prompt.
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(row.ids[: row.num_prompt_tokens]) == prompt
    assert tokenizer.decode(row.ids[row.num_prompt_tokens :]) == "Hello! How are you?"
    assert row.ids[: row.num_prompt_tokens] == tuple(
        tokenizer(prompt, add_special_tokens=False)["input_ids"]
    )


def test_prompt_tokens_stay_when_the_response_could_merge_into_them(
    smollm2: ResolvedModel,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    messages = (Message("user", "Hi"), Message("assistant", "\n\n  Hello"))
    prompt = render_prompt(tokenizer, messages[:1])
    row = render(tokenizer, messages, max_length=100)
    assert row.ids[: row.num_prompt_tokens] == prompt
    assert tokenizer.decode(row.ids[len(prompt) :]) == "\n\n  Hello"
