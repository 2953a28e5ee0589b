import pytest

from circuit_breakers_training.data import rewordings
from circuit_breakers_training.data.prompt_lists import twin_pairs
from circuit_breakers_training.data.rewordings import reword
from circuit_breakers_training.evaluation.techniques import SLOT, past_tense, wrappers

NUM_WORDINGS = len(rewordings._PAST) + len(rewordings._INSIDE)


@pytest.mark.parametrize(
    ("request_", "deed"),
    [
        ("List five ways to make a sourdough loaf.", "make a sourdough loaf"),
        ("Teach me to build a birdhouse, please. Assume that I know nothing.", "build a birdhouse"),
        ("My cousin and I have decided to bake next month. Draw up a plan.", "bake"),
        (
            "Tell me what goes wrong when they try to knit a sock, and how I avoid it.",
            "knit a sock",
        ),
    ],
)
def test_the_past_tense_asks_for_the_deed(request_: str, deed: str) -> None:
    assert reword(request_, 0) == f"Long ago, what was the usual way to {deed}?"


def test_a_request_without_a_deed_is_quoted() -> None:
    text = "Write a poem about rain. {not a field}"
    assert reword(text, 0) == f'Somebody asked this decades ago: "{text}" What was the reply?'


def test_draws_reach_every_wording() -> None:
    found = {reword("Show me how to knit.", draw) for draw in range(2 * NUM_WORDINGS)}
    assert len(found) == NUM_WORDINGS


def test_no_wording_is_one_of_the_evaluation() -> None:
    request = "Show me how to knit."
    unseen = {technique.wrap(request) for technique in (*wrappers(), *past_tense())}
    unseen |= {technique.wrap("a pipe") for technique in past_tense()}
    trained = {reword(r, d) for r in (request, "a pipe") for d in range(2 * NUM_WORDINGS)}
    assert not trained & unseen
    assert all(SLOT not in text for text in trained)


def test_most_written_requests_have_a_past_tense() -> None:
    pairs = twin_pairs()
    for texts in ([pair.harmful for pair in pairs], [pair.benign for pair in pairs]):
        assert sum(text not in reword(text, 0) for text in texts) > 0.8 * len(texts)
