"""Averaging before the dot product against the shared aggregation, and what is drawn to fit on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.errors import DataError
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.probe.activations import ResidualRows
from circuit_breakers_training.probe.fit_tokens import (
    OPENING,
    FitTokens,
    collect_fit_tokens,
    running_mean,
)
from circuit_breakers_training.render import Rendered

from .fixed_reader import FixedReader, opposite_conversations

linear_aggregations = st.one_of(
    st.builds(
        lambda alpha, skip: Aggregation(kind="ema", alpha=alpha, skip_tokens=skip),
        st.floats(0.01, 1.0),
        st.integers(1, 3),
    ),
    st.builds(
        lambda window, skip: Aggregation(kind="rolling_mean", window=window, skip_tokens=skip),
        st.integers(1, 20),
        st.integers(1, 3),
    ),
)


@given(linear_aggregations, st.integers(0, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_probe_on_the_mean_is_the_mean_of_the_probe(
    aggregation: Aggregation, num_tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    hidden_TD = rng.normal(0, 3, (num_tokens, 5)).astype(np.float32)
    weight_D = rng.normal(size=5).astype(np.float32)
    served_T = aggregate(hidden_TD @ weight_D + 0.5, aggregation)[aggregation.skip_tokens :]
    fitted_T = running_mean(hidden_TD, aggregation) @ weight_D + 0.5
    np.testing.assert_allclose(fitted_T, served_T, atol=1e-4)


def test_maximum_is_fitted_on_single_tokens() -> None:
    hidden_TD = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert np.array_equal(running_mean(hidden_TD, Aggregation(kind="max")), hidden_TD[1:])


AGGREGATIONS = (Aggregation(kind="max"), Aggregation(kind="rolling_mean", window=4))


def _collect(directory: Path, reader: Any, rows: Any, harmful: Any, count: int | None) -> FitTokens:
    return collect_fit_tokens(
        reader,
        rows,
        harmful,
        directory=directory,
        aggregations=AGGREGATIONS,
        tokens_per_conversation=count,
        seed=4,
    )


def test_labels_and_conversations_weigh_the_same(tmp_path: Path) -> None:
    rows, harmful, hidden = opposite_conversations(20)
    rows, harmful, hidden = rows[:30], harmful[:30], hidden[:30]
    tokens = _collect(tmp_path, FixedReader(hidden, (3, 5)), rows, harmful, 6)
    assert tokens.weight_N.mean() == pytest.approx(1)
    opening = len(tokens.weight_N) - 3  # positions 1 to 3; position 0 is skipped
    benign = tokens.weight_N[:opening][~tokens.harmful_N[:opening]].sum()
    assert tokens.weight_N[tokens.harmful_N].sum() == pytest.approx(benign, rel=1e-5)
    assert not tokens.harmful_N[opening:].any()


def test_opening_tokens_enter_once_and_as_benign(tmp_path: Path) -> None:
    rows, harmful, hidden = opposite_conversations(5)
    tokens = _collect(tmp_path, FixedReader(hidden, (3, 5)), rows, harmful, None)
    assert np.array_equal(tokens.hidden((3,), AGGREGATIONS[0])[-3:, 0], [1, 2, 3])
    assert len(tokens.harmful_N) == sum(len(row.ids) - 4 for row in rows) + 3


def test_hidden_states_are_the_running_means_side_by_side(tmp_path: Path) -> None:
    rows, harmful, hidden = opposite_conversations(3)
    reader = FixedReader(hidden, (3, 5))
    tokens = _collect(tmp_path, reader, rows, harmful, None)
    for aggregation in AGGREGATIONS:
        both_ND = tokens.hidden((3, 5), aggregation)
        assert both_ND.shape == (len(tokens.harmful_N), 12)
        for at, layer in enumerate((3, 5)):
            # In the order of reading, from position 4 on, which is where the shared opening ends.
            expected = [
                running_mean(part.hidden_TLD[:, at], aggregation)[3:] for part in reader.read(rows)
            ]
            alone_ND = tokens.hidden((layer,), aggregation)
            np.testing.assert_array_equal(alone_ND[:-3], np.concatenate(expected))
            np.testing.assert_array_equal(both_ND[:, 6 * at : 6 * (at + 1)], alone_ND)


def test_hidden_states_wait_on_the_disk(tmp_path: Path) -> None:
    rows, harmful, hidden = opposite_conversations(5)
    tokens = _collect(tmp_path, FixedReader(hidden, (3, 5)), rows, harmful, 3)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    # 2 layers and 2 aggregations, float32 of width 6.
    assert sizes == [len(tokens.harmful_N) * 6 * 4] * 4
    first = tokens.hidden((5,), AGGREGATIONS[1])
    first[:] = 0
    assert tokens.hidden((5,), AGGREGATIONS[1]).any(), "each call reads its own"


def test_draw_does_not_depend_on_reading_order(tmp_path: Path) -> None:
    rows, harmful, hidden = opposite_conversations(5)

    class Forward(FixedReader):
        def read(self, rows: Sequence[Rendered], *, progress: Any = None) -> Iterator[ResidualRows]:
            return reversed(list(super().read(rows)))

    drawn = []
    for reader in (FixedReader(hidden, (3, 5)), Forward(hidden, (3, 5))):
        directory = tmp_path / type(reader).__name__
        directory.mkdir()
        drawn.append(_collect(directory, reader, rows, harmful, 3))
    ordered = [np.sort(tokens.hidden((3,), AGGREGATIONS[1])[:, 0]) for tokens in drawn]
    assert np.array_equal(*ordered)


def test_one_label_alone_is_refused(tmp_path: Path) -> None:
    rows, _, hidden = opposite_conversations(2)
    with pytest.raises(DataError, match="got 4 harmful of 4"):
        _collect(tmp_path, FixedReader(hidden, (3, 5)), rows, [True] * 4, 4)


def test_tokens_of_some_conversations_are_what_these_alone_would_give(tmp_path: Path) -> None:
    rows, harmful, hidden = opposite_conversations(20)
    tokens = _collect(tmp_path, FixedReader(hidden, (3, 5)), rows, harmful, 6)
    keeps_N, weight_N = tokens.of_rows(range(len(rows)))
    assert keeps_N.all()
    np.testing.assert_allclose(weight_N, tokens.weight_N, rtol=1e-5)
    # Three harmful ones and one benign.
    kept = [1, 3, 5, 8]
    keeps_N, weight_N = tokens.of_rows(kept)
    assert set(tokens.row_N[keeps_N].tolist()) == {*kept, OPENING}
    assert all(harmful[row] == tokens.harmful_N[tokens.row_N == row].all() for row in kept)
    alone_dir = tmp_path / "alone"
    alone_dir.mkdir()
    alone = _collect(
        alone_dir,
        FixedReader([hidden[i] for i in kept], (3, 5)),
        [rows[i] for i in kept],
        [harmful[i] for i in kept],
        6,
    )
    assert weight_N.mean() == pytest.approx(1)
    of_alone = [
        np.sort(w[h])
        for w, h in (
            (weight_N, tokens.harmful_N[keeps_N]),
            (alone.weight_N, alone.harmful_N),
        )
    ]
    np.testing.assert_allclose(*of_alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("kept", "missing"), [([0, 2], "harmful"), ([1], "benign"), ([], "harmful")]
)
def test_conversations_of_one_label_alone_are_refused(
    tmp_path: Path, kept: list[int], missing: str
) -> None:
    rows, harmful, hidden = opposite_conversations(3)
    tokens = _collect(tmp_path, FixedReader(hidden, (3, 5)), rows, harmful, 6)
    with pytest.raises(DataError, match=f"got no {missing} one"):
        tokens.of_rows(kept)
