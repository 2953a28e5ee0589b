from pathlib import Path

import pytest

from circuit_breakers.errors import ModelError
from circuit_breakers_training.data.jsonl import Conversation, Label, Message
from circuit_breakers_training.data.lengths import open_tokenizer, token_lengths


def _row(prompt_words: int, response_words: int, label: Label = "benign") -> Conversation:
    messages = (
        Message("user", " ".join(["b1"] * prompt_words)),
        Message("assistant", " ".join(["b2"] * response_words)),
    )
    return Conversation(messages=messages, label=label, source="s", group="g")


def test_lengths_are_counted_by_label(tiny_llama: Path) -> None:
    # The tiny template is "<|user|> ... <|end|> <|assistant|> ": three tokens besides the words,
    # each word is one token, and a rendered conversation ends with the last word of the response.
    rows = [_row(2, n) for n in range(1, 101)] + [_row(40, 5, "harmful"), _row(1, 1, "harmful")]
    lengths = token_lengths(open_tokenizer(str(tiny_llama), "model"), rows, max_length=43)
    assert lengths["benign"] == {
        "conversations": 100,
        "min": 6,
        "p50": 55,
        "p90": 95,
        "p99": 104,
        "max": 105,
        "max_length": 43,
        "over_max_length": 62,  # 5 + n > 43
        "without_response": 0,
    }
    assert lengths["harmful"]["over_max_length"] == 1
    assert lengths["harmful"]["without_response"] == 1  # 40 + 3 prompt tokens fill 43


def test_a_base_model_counts_on_the_plain_template(base_gpt2: Path) -> None:
    # "User:" and "Assistant:" besides the words.
    lengths = token_lengths(open_tokenizer(str(base_gpt2), "plain"), [_row(3, 4)], max_length=9)
    assert lengths["benign"]["max"] == 9
    with pytest.raises(ModelError, match=r"has no chat template.*--plain-template for data"):
        token_lengths(open_tokenizer(str(base_gpt2), "model"), [_row(3, 4)], max_length=9)


def test_a_tokenizer_alone_is_enough(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in tiny_llama.glob("chat_template*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = open_tokenizer(str(tmp_path), "model")
    assert token_lengths(tokenizer, [_row(1, 1)], max_length=9)["benign"]["max"] == 5


def test_no_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"got model .*, expected a built-in name, a directory"):
        open_tokenizer(str(tmp_path / "none"), "model")
