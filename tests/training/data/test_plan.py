from collections import Counter

from circuit_breakers_training.data.groups import content_words, word_jaccard
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.data.plan import (
    BENIGN_FRACTIONS,
    Planned,
    plan_after_refusals,
    plan_refusals,
    plan_rows,
    plan_sampled,
    plan_written,
)
from circuit_breakers_training.data.prompt_lists import refusals, twin_pairs
from circuit_breakers_training.data.split import DEFAULT_FRACTIONS
from circuit_breakers_training.probe.selection import expected_verdict

TWINS = {pair.benign for pair in twin_pairs()}


def test_no_group_is_in_two_splits() -> None:
    homes: dict[str, set[str]] = {}
    for row in plan_written(0):
        homes.setdefault(row.group, set()).add(row.split)
    assert [group for group, splits in homes.items() if len(splits) > 1] == []


def test_a_prompt_and_its_twin_share_a_split() -> None:
    rows = plan_written(0)
    for harmful, twin in zip(rows[::2], rows[1::2], strict=False):
        if harmful.source != "harmful":
            break
        assert twin.source == "twin"
        assert (harmful.group, harmful.split) == (twin.group, twin.split)


def test_no_near_duplicate_is_in_another_split() -> None:
    rows = [(content_words(row.prompt), row.split) for row in plan_written(0)]
    for i, (words, split) in enumerate(rows):
        for other, other_split in rows[:i]:
            assert split == other_split or word_jaccard(words, other) < 0.6, (words, other)


def test_splits_are_large_enough() -> None:
    # 280 sampled ones join the 550 of calibration; 3 trips in 773 still show an FPR below 1 %.
    rows = plan_written(0)
    counts = Counter((row.split, row.label) for row in rows)
    assert counts["train", "harmful"] >= 250
    assert counts["test", "harmful"] >= 60
    assert counts["calibration", "harmful"] >= 60
    assert counts["train", "benign"] >= 1000
    assert counts["test", "benign"] >= 280
    assert counts["calibration", "benign"] >= 550
    follow_ups = Counter(row.split for row in rows if row.source == "follow_up")
    assert follow_ups["train"] >= 150
    assert follow_ups["test"] >= 40


def test_benign_groups_have_fractions_of_their_own() -> None:
    homes: dict[bool, list[str]] = {True: [], False: []}
    for seed in range(5):
        rows = plan_written(seed)
        harmful = {row.group for row in rows if row.label == "harmful"}
        for group, split in {row.group: row.split for row in rows}.items():
            homes[group in harmful].append(split)
    for kin, fractions in ((True, DEFAULT_FRACTIONS), (False, BENIGN_FRACTIONS)):
        for split, fraction in fractions.items():
            # Three standard errors of a share of so many draws.
            error = (fraction * (1 - fraction) / len(homes[kin])) ** 0.5
            assert abs(homes[kin].count(split) / len(homes[kin]) - fraction) < 3 * error


def test_a_follow_up_of_a_refusal_is_kin_to_the_refused_prompt() -> None:
    rows = plan_written(0)
    [follow_up] = [r for r in rows if r.messages[0].content.startswith("How do I cut the brakes")]
    [pair] = {r.split for r in rows if "cut the brakes of my rival's car" in r.prompt}
    assert follow_up.split == pair


def test_the_plan_depends_on_the_seed_alone() -> None:
    assert plan_written(0) == plan_written(0)
    assert plan_written(0) != plan_written(1)
    rows = plan_written(0)
    once = plan_rows(rows, seed=0, harmful_samples=2)
    assert once == plan_rows(list(reversed(rows)), seed=0, harmful_samples=2)[::-1] or Counter(
        (r.prompt, r.prefill) for r in once
    ) == Counter((r.prompt, r.prefill) for r in plan_rows(rows[::-1], seed=0, harmful_samples=2))


def test_a_limit_keeps_groups_and_splits_of_the_written_lists() -> None:
    few = plan_written(0, limit=5)
    assert Counter(row.source for row in few) == {
        "harmful": 5,
        "twin": 5,
        "homonym": 5,
        "topic": 5,
        "follow_up": 5,
    }


def test_first_words_are_the_same_for_both_labels() -> None:
    rows = plan_rows(plan_written(0), seed=0, harmful_samples=3)
    benign = [r for r in rows if r.label == "benign" and r.original is None]
    # Standard error of a share of about 2,100 fair draws: 0.011.
    assert abs(sum(bool(r.prefill) for r in benign) / len(benign) - 0.5) < 0.05
    assert {r.prefill for r in rows if r.label == "harmful"} == {r.prefill for r in benign}


def test_harmful_train_prompts_are_asked_in_three_ways_and_others_in_two() -> None:
    written = plan_written(0)
    by_request: dict[str, list[Planned]] = {}
    for row in plan_rows(written, seed=0, harmful_samples=3):
        if row.label == "harmful":
            by_request.setdefault(row.request, []).append(row)
    seen = Counter()
    for rows in by_request.values():
        ways = [
            "prefilled" if r.prefill else "as-is" if r.original is None else "reworded"
            for r in rows
        ]
        assert len(ways) == len(set(ways))
        assert ways[0] == "prefilled"
        seen[rows[0].split == "train", *ways[1:]] += 1
        for row in rows:
            assert (row.source == "harmful_reworded") == (row.original is not None)
    assert set(seen) == {(True, "as-is", "reworded"), (False, "as-is"), (False, "reworded")}
    assert all(count > 100 for count in seen.values())


def test_twins_are_reworded_as_harmful_prompts_are() -> None:
    written = plan_written(0)
    twins = Counter(row.split for row in written if row.source == "twin")
    rows = plan_rows(written, seed=0, harmful_samples=3)
    reworded = Counter(row.split for row in rows if row.source == "twin_reworded")
    # In train, each harmful prompt has a text in other words: without its twin's, words would tell.
    assert reworded["train"] == twins["train"]
    others = twins.total() - twins["train"]
    # Standard error of a share of 429 fair draws: 0.024.
    assert abs((reworded.total() - reworded["train"]) / others - 0.5) < 0.08
    asked = Counter((r.split, r.request) for r in rows if r.label == "benign")
    # Calibration and test count each conversation as one of its own; messages before it may differ.
    twice = {split for (split, request), n in asked.items() if n > 1 and request in TWINS}
    assert twice == {"train", "selection"}
    for row in rows:
        if row.original is not None:
            assert row.prompt != row.original
            assert not row.prefill
    # Groups were made from the first words: a reworded prompt stays with its twin.
    homes = {row.prompt: (row.group, row.split) for row in written}
    assert all(homes[row.request] == (row.group, row.split) for row in rows)


def test_after_a_refused_request_it_is_asked_again_and_so_is_its_twin() -> None:
    written = plan_written(0)
    pairs = {pair.harmful: pair.benign for pair in twin_pairs()}
    homes = {row.prompt: row.group for row in written if row.split == "train"}
    rows = plan_after_refusals(written, seed=0)
    again, twins = rows[::2], rows[1::2]
    train = sum(row.source == "harmful" and row.split == "train" for row in written)
    # Standard error of a share of 540 draws: 0.019.
    assert abs(len(again) / train - 0.25) < 0.06
    for harmful, twin in zip(again, twins, strict=True):
        asked, refusal, prompt = harmful.messages
        assert [m.role for m in harmful.messages] == ["user", "assistant", "user"]
        assert refusal.content in refusals()
        assert asked == prompt
        assert twin.messages == (asked, refusal, Message("user", pairs[asked.content]))
        assert (harmful.label, twin.label) == ("harmful", "benign")
        assert homes[asked.content] == harmful.group == twin.group
        # So that a probe is neither fitted nor calibrated on it.
        assert expected_verdict(twin.finish("Here is how.")) == "refused"
        assert expected_verdict(harmful.finish("Here is how.")) == "harmful"
    assert len({row.messages[1] for row in rows}) > len(refusals()) / 2


def test_one_sample_is_prefilled_and_nothing_is_reworded() -> None:
    rows = plan_rows(plan_written(0), seed=0, harmful_samples=1)
    assert all(row.original is None for row in rows)
    assert all(row.prefill for row in rows if row.label == "harmful")


def test_refusals_are_benign_train_rows() -> None:
    rows = plan_written(0)
    train = {row.prompt: row.group for row in rows if row.split == "train"}
    refused = plan_refusals(rows, seed=0, count=60)
    assert len(refused) == len({row.prompt for row in refused}) == 60
    for row in refused:
        assert (row.label, row.kind, row.source) == ("benign", "refusal", "refusal")
        assert train[row.prompt] == row.group


def test_sampled_prompts_mostly_serve_calibration_and_test() -> None:
    rows = plan_sampled([f"prompt number {i}" for i in range(2000)], seed=0)
    counts = Counter(row.split for row in rows)
    # Standard error of a share of 2,000 draws: 0.011.
    assert abs(counts["calibration"] / 2000 - 0.40) < 0.04
    assert abs(counts["test"] / 2000 - 0.20) < 0.04
