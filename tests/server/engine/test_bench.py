"""The benchmark's arms differ in what they claim, and its ratios are right; no time is judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from circuit_breakers.engine.bench.arms import (
    PLAIN,
    GuardState,
    GuardSwitch,
    breaker_with_probes,
    switched,
)
from circuit_breakers.engine.bench.blocks import BenchEngine, Block, Step, Workload, parse_workload
from circuit_breakers.engine.bench.engines import BenchSettings
from circuit_breakers.engine.bench.footprint import footprint, store_bytes
from circuit_breakers.engine.bench.machine import describe_machine
from circuit_breakers.engine.bench.own_time import own_time
from circuit_breakers.engine.bench.ratios import (
    RowBuilder,
    alternating_pairs,
    equal_work_ratio,
    latency,
    pair_of,
    spread,
)
from circuit_breakers.engine.bench.report import report_json
from circuit_breakers.engine.bench.run import BenchReport
from circuit_breakers.engine.block_scores import BlockScores
from circuit_breakers.engine.score_rows import nan_rows
from circuit_breakers.errors import ConfigError, NotReadyError

from . import tiny

BATCH, PROMPT, OUTPUT = 3, 40, 6


def block(elapsed_s: float, num_tokens: int = 100, steps: list[Step] | None = None) -> Block:
    return Block(
        elapsed_s=elapsed_s,
        num_tokens=num_tokens,
        num_scored=None,
        steps=steps or [],
        ttft_s=[elapsed_s / 10],
        itl_s=[elapsed_s / 100, elapsed_s / 50],
        token_ids=[],
        params=[],
    )


def test_ratio_is_that_of_speeds() -> None:
    # 100 tokens in 2 s against 100 tokens in 1.5 s: 50 / 66.7 tokens a second.
    pair = pair_of(block(2.0), block(1.5))
    assert pair.ratio == pytest.approx(0.75)
    assert pair.arm.tokens_per_s == pytest.approx(50)
    assert pair.decode_step_ratio is None


def test_step_ratio_compares_equal_steps_only() -> None:
    plain = [Step(4.0, 32, 1, True), Step(1.0, 1, 1, False), Step(2.0, 1, 1, False)]
    # One step more than plain, which is left out, and a slower one of another shape.
    guarded = [
        Step(5.0, 32, 1, True),
        Step(1.1, 1, 1, False),
        Step(2.2, 1, 1, False),
        Step(9.0, 1, 1, False),
    ]
    assert equal_work_ratio(guarded, plain, True) == pytest.approx(1.25)
    # (1.1 + 2.2) / 2 over (1 + 2) / 2
    assert equal_work_ratio(guarded, plain, False) == pytest.approx(1.1)
    other_shape = [Step(4.0, 64, 2, True)]
    assert equal_work_ratio(other_shape, plain, True) is None


def test_spread_has_quartiles_and_extremes() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found is not None
    assert (found.low, found.q1, found.median, found.q3, found.high) == (1, 2, 3, 4, 5)
    assert spread([]) is None
    one = spread([2.0])
    assert one is not None
    assert (one.low, one.median, one.high, one.count) == (2, 2, 2, 1)


def test_p99_is_a_value_that_occurred() -> None:
    found = latency([i / 100 for i in range(1, 201)])
    assert found is not None
    # 198 of 200 values are at most 1.98.
    assert found.p99_s == pytest.approx(1.98)
    assert latency([]) is None


def test_pairs_alternate_and_keep_their_sides() -> None:
    order: list[str] = []

    def arm() -> Block:
        order.append("A")
        return block(1.0)

    def baseline() -> Block:
        order.append("B")
        return block(2.0)

    pairs = list(alternating_pairs(4, arm, baseline))
    assert "".join(order) == "BAABBAAB"
    assert {(a.elapsed_s, b.elapsed_s) for a, b in pairs} == {(1.0, 2.0)}


def test_row_pools_latencies_and_goes_to_json() -> None:
    builder = RowBuilder()
    builder.add(block(2.0), block(1.0))
    builder.add(block(1.0), block(1.0))
    row = builder.row("observe", "plain", Workload("decode", 32, 256), 1, False)
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(0.75)
    assert row.arm_itl is not None
    assert row.arm_itl.count == 4
    report = BenchReport(
        command="x",
        machine=describe_machine(),
        model="m",
        breaker="b",
        breaker_digest="d",
        settings=BenchSettings(),
        rows=[row],
    )
    written = json.loads(report_json(report))
    assert [p["arm"]["elapsed_s"] for p in written["rows"][0]["pairs"]] == [2.0, 1.0]
    assert written["settings"]["num_pairs"] == 8


def test_workloads_are_names_or_lengths() -> None:
    assert parse_workload("decode") == Workload("decode", 32, 256)
    assert parse_workload("8:4") == Workload("8:4", 8, 4)
    for wrong in ("8", "8:", "0:4", "a:b", "8:4:2"):
        with pytest.raises(ConfigError, match="workload"):
            parse_workload(wrong)


def test_store_bytes_grow_with_what_is_held() -> None:
    store = BlockScores(block_size=4, capacity=8)
    empty = store_bytes(store)
    store.put(b"x" * 32, nan_rows(4, 2))
    # 4 tokens x 2 probes x 4 bytes, the hash, and the headers of both objects.
    assert store_bytes(store) - empty >= 4 * 2 * 4 + 32


class Live:
    """A tiny engine with its switch."""

    def __init__(self, engine: BenchEngine, switch: GuardSwitch) -> None:
        self.engine = engine
        self.switch = switch

    def run(self, state: GuardState) -> Block:
        return switched(self.engine, self.switch, state)(BATCH, PROMPT, OUTPUT)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIRCUIT_BREAKERS_CACHE", str(root / "cache"))
        model = tiny.write_llama(root / "model")
        breaker = tiny.write_tiny_breaker(root / "breaker", model)
        engine = BenchEngine(tiny.tiny_engine(model, breaker), tiny.VOCAB)
        others = [breaker_with_probes(root / f"p{n}", breaker, n) for n in (1, 5)]
        switch = GuardSwitch(engine.llm, *others)
    yield Live(engine, switch)
    switch.restore()
    engine.close()


@pytest.mark.parametrize(
    ("state", "num_probes"),
    [
        (GuardState("observe"), 3),
        (GuardState("enforce"), 3),
        (GuardState("enforce", 1), 1),
        (GuardState("enforce", 5), 5),
    ],
)
def test_guarded_arms_score_every_token(live: Live, state: GuardState, num_probes: int) -> None:
    ran = live.run(state)
    assert ran.num_scored == BATCH * (PROMPT + OUTPUT)
    assert ran.num_tokens == BATCH * OUTPUT
    assert len(ran.ttft_s) == BATCH
    assert len(ran.itl_s) == BATCH * (OUTPUT - 1)
    assert len(live.switch.guard.policy.probes) == num_probes
    assert live.switch.guard.policy.mode == state.mode
    counted = footprint(live.engine.scheduler, live.switch.guard, num_probes)
    # Prompts of 40 tokens fill one block of 32 each.
    assert counted.live_blocks == BATCH
    rows = next(iter(live.switch.guard.block_scores._rows.values()))
    assert len(rows) == 32 * num_probes * 4
    assert 0 < counted.live_bytes < counted.full_bytes


def test_plain_arm_has_no_guard_at_all(live: Live) -> None:
    guarded = live.run(GuardState("enforce"))
    ran = live.run(PLAIN)
    assert ran.num_scored is None
    assert ran.num_tokens == BATCH * OUTPUT
    assert live.engine.scheduler._circuit_breakers is None
    assert not live.switch.probes._handles
    for name in ("execute_model", "sample_tokens"):
        module = getattr(live.switch.runner, name).__globals__["__name__"]
        assert not module.startswith("circuit_breakers")
    # The step that scores the last token is the guard's alone.
    assert len(guarded.steps) == len(ran.steps) + 1
    # Until the first request ends, which takes as many steps as it has tokens.
    guarded_shapes, shapes = ([s[1:] for s in b.steps[:OUTPUT]] for b in (guarded, ran))
    assert guarded_shapes == shapes
    assert ran.steps[0].prefill
    assert not ran.steps[-1].prefill


def test_an_arm_that_was_not_switched_is_an_error(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = switched(live.engine, live.switch, PLAIN)
    live.switch.set(GuardState("observe"))
    monkeypatch.setattr(live.switch, "set", lambda _state: None)
    with pytest.raises(NotReadyError, match="not switched"):
        run(BATCH, PROMPT, OUTPUT)


def test_own_time_sees_every_part_and_leaves_nothing_behind(live: Live) -> None:
    live.switch.set(GuardState("enforce"))
    prompts = live.engine.prompts(BATCH, PROMPT)

    def run() -> Block:
        return live.engine.run(prompts, OUTPUT)

    engine: Any = live.engine.llm.llm_engine
    before = dict(vars(engine)), dict(vars(live.switch.guard)), live.switch.probes._hooks
    times = own_time(live.switch, engine, run, compiled=False)
    assert [t.prefill for t in times] == [True, False]
    for t in times:
        assert all(value > 0 for value in t.part_s.values()), t.part_s
        assert sum(t.side_s.values()) == pytest.approx(sum(t.part_s.values()))
        assert sum(t.side_s.values()) < t.step_s
    assert (dict(vars(engine)), dict(vars(live.switch.guard)), live.switch.probes._hooks) == before
    assert live.run(GuardState("enforce")).num_scored == BATCH * (PROMPT + OUTPUT)
