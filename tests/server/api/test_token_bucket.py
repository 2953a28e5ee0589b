"""The bucket lets its rate through, never more, and tells when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.api.token_bucket import TokenBucket


def test_a_full_bucket_gives_a_minutes_worth_at_once_and_then_one_an_interval() -> None:
    bucket = TokenBucket(4)  # one token every 15 s
    for left in (3, 2, 1, 0):
        assert bucket.token_in_s(0.0) == 0
        bucket.take(0.0)
        assert bucket.remaining(0.0) == left
    assert bucket.token_in_s(0.0) == 15
    assert bucket.full_in_s(0.0) == 60
    assert bucket.token_in_s(14.0) == 1
    assert bucket.token_in_s(15.0) == 0
    bucket.take(15.0)
    assert (bucket.remaining(15.0), bucket.token_in_s(15.0)) == (0, 15)
    assert bucket.remaining(75.0) == 4


def test_taking_from_an_empty_bucket_is_a_mistake_of_the_caller() -> None:
    bucket = TokenBucket(1)
    bucket.take(0.0)
    with pytest.raises(AssertionError):
        bucket.take(59.0)


def test_a_new_rate_keeps_the_share_that_was_taken() -> None:
    bucket = TokenBucket(10)
    for _ in range(5):
        bucket.take(0.0)
    bucket.per_minute = 100  # half of the minute is still taken
    assert bucket.remaining(0.0) == 50


def test_a_burst_of_its_own_is_all_that_comes_at_once() -> None:
    bucket = TokenBucket(60, 2)  # one token a second
    for left in (1, 0):
        bucket.take(0.0)
        assert bucket.remaining(0.0) == left
    assert bucket.token_in_s(0.0) == 1
    assert bucket.remaining(60.0) == 2
    bucket.burst = 1  # less than is in it
    assert bucket.remaining(60.0) == 1


@given(
    per_minute=st.integers(1, 600),
    burst=st.none() | st.integers(1, 900),
    gaps_s=st.lists(st.floats(0, 90), min_size=1, max_size=200),
)
def test_lets_no_more_through_than_a_burst_and_the_rate(
    per_minute: int, burst: int | None, gaps_s: list[float]
) -> None:
    bucket, now_s, taken = TokenBucket(per_minute, burst), 1000.0, []
    size = burst or per_minute
    for gap_s in gaps_s:
        now_s += gap_s
        assert 0 <= bucket.remaining(now_s) <= size
        if bucket.token_in_s(now_s) == 0:
            bucket.take(now_s)
            taken.append(now_s)
        else:
            # What it says is true: a token is there then, and not well before.
            wait_s = bucket.token_in_s(now_s)
            assert bucket.token_in_s(now_s + wait_s) == 0
            assert bucket.token_in_s(now_s + wait_s * 0.9) > 0
            assert bucket.remaining(now_s) == 0
    # The definition of a token bucket: in any window, its depth plus its rate times the time.
    for i, first_s in enumerate(taken):
        for j in range(i, len(taken)):
            most = size + (taken[j] - first_s) * per_minute / 60
            assert j - i + 1 <= most + 1e-6
