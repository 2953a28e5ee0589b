"""What a breaker was made from is known, or refused, or said to be unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from circuit_breakers.artifact import Breaker, load_breaker
from circuit_breakers.errors import ArtifactError, DataError
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.data.overlap import (
    nearly_overlapping,
    prompt_digests,
    user_turns,
)
from circuit_breakers_training.evaluation.held_out import (
    DIGESTS_FILE,
    check_held_out,
    read_digests,
)


@pytest.fixture(scope="module")
def breaker(breaker_dir: Path) -> Breaker:
    return load_breaker(breaker_dir)


@pytest.fixture(scope="module")
def dataset(data_dir: Path) -> Dataset:
    return load_dataset(data_dir)


@pytest.fixture(scope="module")
def silent(breaker: Breaker) -> Breaker:
    """The breaker as if it had been made before digests were stored."""
    files = {name: d for name, d in breaker.manifest.files.items() if name != DIGESTS_FILE}
    return replace(breaker, manifest=breaker.manifest.model_copy(update={"files": files}))


def test_training_stores_the_digests_of_every_split(breaker: Breaker, dataset: Dataset) -> None:
    stored = json.loads((breaker.path / DIGESTS_FILE).read_text())
    assert set(stored) == {"train", "selection", "calibration", "test"}
    assert stored["train"] == list(prompt_digests(dataset.train))
    assert DIGESTS_FILE in breaker.manifest.files


def test_prompts_of_the_test_split_are_fine(breaker: Breaker, dataset: Dataset) -> None:
    requests = {"direct": [row.prompt for row in dataset.test]}
    assert check_held_out(breaker, None, requests, allow_unknown=False) == "none"


@pytest.mark.parametrize("split", ["train", "selection", "calibration"])
def test_prompts_of_other_splits_are_refused_and_named(
    breaker: Breaker, dataset: Dataset, split: str
) -> None:
    seen = [row.prompt.upper() for row in getattr(dataset, split)[:5]]
    requests = {"direct": ["new"], "prefill": ["new", *seen]}
    with pytest.raises(DataError) as caught:
        # Also when an unknown overlap would be allowed: this one is known.
        check_held_out(breaker, None, requests, allow_unknown=True)
    said = str(caught.value)
    assert f"suite 'prefill': got 5 of 6 prompts that the breaker's {split} split holds" in said
    assert "direct" not in said
    assert repr(seen[0]) in said
    assert ", ...)" in said  # three are shown


def test_near_duplicates_are_refused_where_the_very_dataset_is_at_hand(
    breaker: Breaker, dataset: Dataset
) -> None:
    requests = {"direct": ["new", dataset.selection[0].prompt.replace(" ", ", ", 1)]}
    said = r"got 1 of 2 prompts that the breaker's selection split holds, in these words or nearly"
    with pytest.raises(DataError, match=said):
        check_held_out(breaker, dataset, requests, allow_unknown=False)
    other = replace(dataset, digests={"train.jsonl": "0" * 64})
    assert check_held_out(breaker, other, requests, allow_unknown=False) == "none"


def test_the_own_test_split_may_share_words_with_training(
    breaker: Breaker, dataset: Dataset
) -> None:
    test = [row.prompt for row in dataset.test]
    assert nearly_overlapping(user_turns(dataset.train), test)
    assert check_held_out(breaker, dataset, {"direct": test}, allow_unknown=False) == "none"


def test_long_prompts_are_cut_in_the_message(breaker: Breaker, dataset: Dataset) -> None:
    row = dataset.train[0]
    spaced = row.prompt.replace(" ", " " * 40)
    with pytest.raises(DataError) as caught:
        check_held_out(breaker, None, {"direct": [spaced]}, allow_unknown=False)
    assert " " * 40 not in str(caught.value)


def test_a_breaker_without_digests_is_refused_unless_allowed(silent: Breaker) -> None:
    with pytest.raises(DataError, match="--allow-unknown-overlap"):
        check_held_out(silent, None, {"direct": ["new"]}, allow_unknown=False)
    assert check_held_out(silent, None, {"direct": ["new"]}, allow_unknown=True) == "unknown"


def test_the_very_dataset_of_training_stands_in_for_the_file(
    silent: Breaker, dataset: Dataset
) -> None:
    test = {"direct": [row.prompt for row in dataset.test]}
    assert check_held_out(silent, dataset, test, allow_unknown=False) == "none"
    with pytest.raises(DataError, match="train split holds"):
        check_held_out(silent, dataset, {"direct": [dataset.train[0].prompt]}, allow_unknown=True)
    other = replace(dataset, digests={"train.jsonl": "0" * 64})
    assert read_digests(silent, other) is None


def test_a_file_of_another_layout_is_refused(breaker: Breaker, tmp_path: Path) -> None:
    (tmp_path / DIGESTS_FILE).write_text('{"train": []}')
    with pytest.raises(ArtifactError, match="expected train, selection, calibration, test"):
        read_digests(replace(breaker, path=tmp_path), None)
