"""Minimum counts are those of the default recipe: see README.md of the data package."""

from collections import Counter
from importlib import resources

import pytest

from circuit_breakers_training.data import prompt_lists


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
    assert len(prompt_lists.homonyms()) >= 160
    assert len(prompt_lists.topics()) >= 240
    assert len(prompt_lists.refusals()) >= 8
    follow_ups = prompt_lists.follow_ups()
    assert len(follow_ups) >= 80
    assert sum(prompt.category == "after_refusal" for prompt in follow_ups) >= 30


def test_no_prompt_appears_twice() -> None:
    prompts = [pair.harmful for pair in prompt_lists.twin_pairs()]
    prompts += [pair.benign for pair in prompt_lists.twin_pairs()]
    prompts += [prompt.messages[0].content for prompt in prompt_lists.homonyms()]
    prompts += [prompt.messages[0].content for prompt in prompt_lists.topics()]
    prompts += [prompt.messages[-1].content for prompt in prompt_lists.follow_ups()]
    counts = Counter(prompt.casefold() for prompt in prompts)
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_follow_ups_end_with_the_user() -> None:
    for prompt in prompt_lists.follow_ups():
        assert [m.role for m in prompt.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize("name", ["harmbench", "xstest", "advbench"])
def test_no_list_names_a_public_benchmark(name: str) -> None:
    folder = resources.files("circuit_breakers_training.data").joinpath("prompts")
    files = list(folder.iterdir())
    assert len(files) == 5
    for file in files:
        assert name not in file.read_text(encoding="utf-8").casefold()
