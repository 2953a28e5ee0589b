import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.data.split import (
    DEFAULT_FRACTIONS,
    SPLITS,
    split_conversations,
    split_of,
)


def _row(i: int, group: str) -> Conversation:
    messages = (Message("user", f"question {i}"), Message("assistant", "answer"))
    return Conversation(messages=messages, label="benign", source="s", group=group)


def test_splits_do_not_change_from_version_to_version() -> None:
    # First 16 bits of sha256("0\\0a"), ("0\\0b") and ("0\\0g") over 2**16: 0.371, 0.659 and 0.600;
    # the fractions add up to 0.55, 0.65, 0.85, 1.
    assert [split_of(name, seed=0) for name in "abg"] == ["train", "calibration", "selection"]


def test_fractions_are_met() -> None:
    names = [split_of(str(i), seed=3) for i in range(20_000)]
    for split, fraction in DEFAULT_FRACTIONS.items():
        # Standard error of a share of 20,000 draws: at most 0.0035.
        assert abs(names.count(split) / 20_000 - fraction) < 0.015


def test_groups_stay_together_and_nothing_is_lost() -> None:
    rows = [_row(i, f"g{i // 3}") for i in range(300)]
    parts = split_conversations(rows)
    assert set(parts) == set(SPLITS)
    assert sorted(r.prompt for part in parts.values() for r in part) == sorted(
        r.prompt for r in rows
    )
    homes = {name: {row.group for row in part} for name, part in parts.items()}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not homes[a] & homes[b]


def test_seed_changes_the_splits() -> None:
    names = [str(i) for i in range(100)]
    assert [split_of(n, seed=0) for n in names] != [split_of(n, seed=1) for n in names]


@pytest.mark.parametrize(
    "fractions",
    [
        {"train": 1.0},
        {"train": 0.5, "selection": 0.5, "calibration": 0.5, "test": 0.5},
        {"train": 0.5, "selection": 0.2, "calibration": 0.2, "dev": 0.1},
    ],
)
def test_wrong_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(DataError, match="got fractions"):
        split_of("a", seed=0, fractions=fractions)
