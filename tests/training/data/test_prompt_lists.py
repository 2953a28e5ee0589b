"""Minimum counts are those of the default recipe: see README.md of the data package."""

import re
from collections import Counter
from importlib import resources

import pytest
import tokenizers

from circuit_breakers.models import resolve_model
from circuit_breakers_training.data import prompt_lists
from circuit_breakers_training.data.groups import merge_near_duplicates


def test_every_harmful_prompt_has_a_twin() -> None:
    pairs = prompt_lists.twin_pairs()
    assert len(pairs) >= 420
    assert len({pair.category for pair in pairs}) >= 15
    assert min(Counter(pair.category for pair in pairs).values()) >= 20
    for pair in pairs:
        assert pair.harmful.strip()
        assert pair.benign.strip()
        assert pair.harmful != pair.benign


def test_twins_share_frame_and_length() -> None:
    for pair in prompt_lists.twin_pairs():
        harmful, benign = pair.harmful.split(), pair.benign.split()
        assert harmful[0] == benign[0], pair
        assert abs(len(harmful) - len(benign)) <= max(5, len(harmful) // 3), pair
        assert 5 <= len(harmful) <= 40, pair


def test_there_are_enough_benign_prompts() -> None:
    assert len(prompt_lists.homonyms()) >= 500
    topics = Counter(prompt.category for prompt in prompt_lists.topics())
    assert topics.total() >= 600
    assert set(topics) == {"everyday", "code", "mathematics", "other_language"}
    assert topics["code"] >= 100
    assert topics["other_language"] >= 200
    categories = Counter(prompt.category for prompt in prompt_lists.follow_ups())
    assert set(categories) == {"after_chat", "after_hard_topic", "after_refusal"}
    assert categories["after_chat"] >= 200
    assert categories["after_hard_topic"] >= 80
    assert categories["after_refusal"] >= 80


def test_refusals_differ_in_length() -> None:
    refusals = prompt_lists.refusals()
    assert len(refusals) == len(set(refusals)) >= 30
    lengths = [len(refusal.split()) for refusal in refusals]
    assert min(lengths) <= 5
    assert max(lengths) >= 30


@pytest.mark.parametrize("name", ["homonyms", "topics", "follow_ups"])
def test_benign_prompts_are_no_variants_of_one_another(name: str) -> None:
    prompts = getattr(prompt_lists, name)()
    texts = [prompt.messages[-1].content for prompt in prompts]
    groups = merge_near_duplicates(texts, [str(i) for i in range(len(texts))])
    assert len(set(groups)) == len(texts)


def test_topics_come_in_many_languages() -> None:
    texts = [f" {prompt.messages[0].content.casefold()} " for prompt in prompt_lists.topics()]
    # Frequent words of one language that the others lack: a lower bound.
    words = {
        "German": ("eine", "ich", "der", "die", "und", "wie"),
        "French": ("une", "les", "dans", "comment", "quelle", "pour", "est"),
        "Spanish": ("qué", "cómo", "una", "los", "dos", "el", "al"),
    }
    for language, marks in words.items():
        found = [text for text in texts if any(f" {mark} " in text for mark in marks)]
        assert len(found) >= 35, language
    scripts = ("[а-я]", "[\u4e00-\u9fff]", "[\uac00-\ud7af]", "[\u0600-\u06ff]", "[ğışł]")
    for script in scripts:
        assert any(re.search(script, text) for text in texts), script


def test_no_prompt_appears_twice() -> None:
    prompts = [pair.harmful for pair in prompt_lists.twin_pairs()]
    prompts += [pair.benign for pair in prompt_lists.twin_pairs()]
    prompts += [prompt.messages[0].content for prompt in prompt_lists.homonyms()]
    prompts += [prompt.messages[0].content for prompt in prompt_lists.topics()]
    prompts += [prompt.messages[-1].content for prompt in prompt_lists.follow_ups()]
    counts = Counter(prompt.casefold() for prompt in prompts)
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_follow_ups_end_with_the_second_or_third_user_turn() -> None:
    lengths: Counter[int] = Counter()
    for prompt in prompt_lists.follow_ups():
        roles = [m.role for m in prompt.messages]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
        assert all(m.content == m.content.strip() != "" for m in prompt.messages)
        lengths[len(roles)] += 1
    assert set(lengths) == {3, 5}
    assert lengths[5] >= 30


def test_the_build_takes_every_prompt_whole() -> None:
    # The build takes 320 prompt tokens; the chat template adds about 45 with three user turns.
    tokenizer_json = resolve_model("smollm2-135m-instruct").path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    for prompt in prompt_lists.homonyms() + prompt_lists.topics() + prompt_lists.follow_ups():
        ids = [tokenizer.encode(m.content).ids for m in prompt.messages]
        assert sum(map(len, ids)) <= 320 - 45, prompt


@pytest.mark.parametrize("name", ["harmbench", "xstest", "advbench"])
def test_no_list_names_a_public_benchmark(name: str) -> None:
    folder = resources.files("circuit_breakers_training.data").joinpath("prompts")
    files = list(folder.iterdir())
    assert len(files) == 5
    for file in files:
        assert name not in file.read_text(encoding="utf-8").casefold()
