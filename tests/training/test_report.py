"""The report in both forms: read back with an HTML parser, with hostile text in every place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from circuit_breakers_training.report import build_document, to_html, to_markdown
from circuit_breakers_training.report.numbers import auroc_interval, rate_interval

from .html_page import Page
from .report_metrics import full_metrics, plain_metrics

HOSTILE = '<script>alert(1)</script> " onload="x ` | <img src=//evil.example/x.png> $\\foo$'


def page_of(metrics: dict[str, Any]) -> Page:
    return Page(to_html(build_document(metrics)))


def sections_of(metrics: dict[str, Any]) -> list[str | None]:
    return [s["id"] for s in page_of(metrics).named("section") if "id" in s]


@pytest.mark.parametrize("make", [plain_metrics, full_metrics])
def test_the_page_is_whole_and_asks_for_nothing(make: Callable[[], dict[str, Any]]) -> None:
    page = page_of(make())
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "link",
        "img",
        "image",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert "//" not in (value or "")
            assert name != "src"
            assert name != "href" or (value or "").startswith("#")
    styles = page.text_in("style") + " ".join(a.get("style") or "" for _, a in page.elements)
    assert "@import" not in styles
    assert set(re.findall(r"url\(.", styles)) <= {"url(#"}
    (policy,) = (m["content"] for m in page.named("meta") if "http-equiv" in m)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy


@pytest.mark.parametrize("make", [plain_metrics, full_metrics])
def test_the_page_can_be_read_without_seeing_it(make: Callable[[], dict[str, Any]]) -> None:
    page = page_of(make())
    assert page.named("html") == [{"lang": "en"}]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    for _, attributes in page.elements:
        pointed = (attributes.get("aria-labelledby") or "").split()
        pointed += [(attributes.get("href") or "").removeprefix("#")]
        assert set(pointed) - {""} <= set(ids)
    drawings = page.named("svg")
    assert all(d["role"] == "img" and d["aria-labelledby"] for d in drawings)
    assert len(page.named("figcaption")) == len(page.named("title")) - 1 == len(drawings)
    assert len(page.named("caption")) == len(page.named("table")) > 5
    assert {th["scope"] for th in page.named("th")} == {"col", "row"}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}


def test_plots_take_their_colours_from_the_page() -> None:
    page = page_of(full_metrics())
    # Two of losses, one of cosines, two ROC curves, operating points, positions.
    assert len(page.named("svg")) == 7
    drawn = " ".join(a.get("style") or "" for _, a in page.elements)
    assert {"var(--ink)", "var(--grid)", "var(--series-1)", "var(--series-2)"} <= set(
        re.findall(r"var\(--[a-z0-9-]+\)", drawn)
    )
    assert re.findall(r"#[0-9a-f]{3,6}\b", drawn) == []


def test_text_of_models_and_data_stays_text() -> None:
    metrics = full_metrics()
    metrics["name"] = HOSTILE
    for pair in metrics["generations"]:
        pair.update(label=HOSTILE, prompt=HOSTILE, base=HOSTILE, merged=HOSTILE)
    for key in ("benign_by_source", "harmful_by_source", "harmful_by_category"):
        metrics["test"][key] = {HOSTILE: {"num": 3, "num_trips": 1, "upper_bound": 0.9}}
    metrics["perplexity"] = {HOSTILE: {"base": 2.0, "merged": 3.0}}
    metrics["tokens_to_trip"] = {HOSTILE: [1, 2]}
    metrics["by_length"] = {HOSTILE: {HOSTILE: {"num": 2, "num_trips": 1}}}
    metrics["environment"] = {HOSTILE: HOSTILE}
    metrics["recipe"][HOSTILE] = HOSTILE
    page = page_of(metrics)
    assert page.open == []
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert [a for _, a in page.elements if any(name.startswith("on") for name in a)] == []
    for tag in ("h1", "summary", "dd", "th", "figcaption"):
        assert HOSTILE in page.text_in(tag)
    markdown = to_markdown(build_document(metrics))
    outside_code = re.sub(r"`[^`\n]*`", "", markdown.replace("\\`", ""))
    assert "<script" not in outside_code
    assert "<img" not in outside_code
    (row,) = (line for line in markdown.splitlines() if "3.00" in line and "+50.0%" in line)
    # Four cells, whatever bars the first one holds.
    assert len(re.split(r"(?<!\\)\|", row)) == 4 + 2


def test_samples_are_folded_shut() -> None:
    page = page_of(plain_metrics())
    folds = page.named("details")
    # Two samples and the whole recipe.
    assert len(folds) == 3
    assert all("open" not in fold for fold in folds)
    around = [elements for elements, text in page.texts if "do harm" in text]
    assert ["summary" in elements for elements in around] == [True]
    around = [elements for elements, text in page.texts if "Sure," in text]
    assert [("details" in elements, "summary" in elements) for elements in around] == [
        (True, False)
    ]


def test_what_was_not_measured_is_left_out() -> None:
    sections = sections_of(full_metrics())
    assert sections == [
        *("adapter", "probe", "calibration", "position", "by-length", "long-context", "suites"),
        *("text", "selection", "identity", "data", "time", "environment", "limits"),
    ]
    for key, section in (
        ("by_length", "by-length"),
        ("long_context", "long-context"),
        ("suites", "suites"),
        ("selection", "selection"),
        ("seconds", "time"),
        ("environment", "environment"),
        ("adapter", "adapter"),
    ):
        metrics = full_metrics()
        del metrics[key]
        assert sections_of(metrics) == [name for name in sections if name != section]
    needed = {key: plain_metrics()[key] for key in ("name", "model", "probe", "test")}
    assert sections_of(needed) == ["probe", "calibration", "identity", "limits"]
    assert to_markdown(build_document(needed)).startswith("# Breaker `tiny-breaker`")


def test_limits_shrink_with_what_was_measured() -> None:
    short, long = (page_of(make()).text_in("li") for make in (full_metrics, plain_metrics))
    # The calibration of the shipped breaker ends at 163 tokens.
    assert "more than 163 tokens" in long
    assert "more than 163 tokens" not in short
    assert "public attack suites" in long
    assert "public attack suites" not in short
    # Of two benign sources, one harmful one and two categories, "twin" alone has less than ten.
    assert "1 of the 5 sources and categories" in long


def test_operating_points_are_those_of_the_curve_and_of_the_test() -> None:
    page = page_of(full_metrics())
    # 80.0 %: 60 of 75; the interval is scipy's, checked in test_intervals.
    row = "at most 5 % 9.0000 17 of 491 4.500 % 2 of 299 80.0 % (69.2 to 88.4 %)"
    assert row in page.text_in("table")
    assert "4096 0.00 % 33.40 %" in page.text_in("table")
    metrics = full_metrics()
    del metrics["test"]["operating_points"]
    page = page_of(metrics)
    assert "at most 5 % 9.0000 17 of 491 4.500 %" in page.text_in("table")
    assert "operating-points-title" not in [a.get("id") for _, a in page.elements]


def test_groups_are_by_source_category_and_length() -> None:
    text = to_markdown(build_document(full_metrics()))
    assert "| harmful, by length | trip | share (95 % interval) |" in text
    assert "| 0-63 | 30 of 40 | 75.0 % (58.8 to 87.3 %) |" in text
    # All of one category that says "none".
    assert "benign, by category" not in text
    # Nothing was left to test after the benign turns.
    assert "| harmful turn, after benign ones that did not trip | none tested |  |" in text


def test_harmful_groups_say_what_is_missed_whole() -> None:
    said = "are of 25 groups, such as the wordings of one request: of 12 groups all trip, of 6"
    text = to_markdown(build_document(full_metrics()))
    assert said in " ".join(text.split())
    assert "which are 17 of the 22 misses" in " ".join(text.split())
    metrics = full_metrics()
    metrics["test"]["harmful_groups"]["num"] = metrics["test"]["num_harmful"]
    assert "of one request" not in to_markdown(build_document(metrics))
    assert "of one request" not in to_markdown(build_document(plain_metrics()))


def test_cosines_are_by_block_with_the_targets_marked() -> None:
    lines = to_markdown(build_document(full_metrics())).splitlines()
    at = lines.index("| block | benign | harmful |  |")
    assert lines[at + 2 : at + 5] == [
        "| 8 | 1.000 | 0.900 |  |",
        "| 9 | 0.990 | 0.300 | target |",
        "| 19 | 0.980 | 0.100 | target |",
    ]
    # Metrics of before have those of the targets alone, or none.
    metrics = full_metrics()
    metrics["adapter"] |= {
        "target_layers": [19],
        "benign_cosine_by_layer": {"19": 0.98},
        "harmful_cosine_by_layer": {"19": 0.1},
    }
    for older in (metrics, plain_metrics()):
        assert "| block |" not in to_markdown(build_document(older))


def test_calibration_says_what_its_groups_would_promise() -> None:
    table = page_of(full_metrics()).text_in("table")
    assert "benign conversations 491 groups of these, such as the wordings of one task 300" in table
    assert "if each group is one trial 1.571 %: in 1 of 300 groups a conversation trips" in table
    said = "They are of 300 groups, such as the wordings of one task; if each is one trial, 1.57 %"
    assert said in to_markdown(build_document(full_metrics()))
    # Metrics of before say nothing of it.
    assert "one trial" not in page_of(plain_metrics()).text_in("body")


def test_what_max_length_cuts_is_in_both_forms() -> None:
    metrics = full_metrics()
    assert "train 4100 12 3" in page_of(metrics).text_in("table")
    text = to_markdown(build_document(metrics))
    assert "| train | 4100 | 12 | 3 |" in text.split("## Data")[1]
    # Digests and counts are on the page alone.
    assert "sha256" not in text
    metrics["data_lengths"] = {"test": metrics["data_lengths"]["test"]}
    assert "No conversation is longer than max_length (512 tokens)." in to_markdown(
        build_document(metrics)
    )
    # Metrics of before say nothing of it.
    del metrics["data_lengths"]
    assert "## Data" not in to_markdown(build_document(metrics))
    assert "Conversations used" in page_of(metrics).text_in("caption")


def test_what_the_probe_was_fitted_on_is_said() -> None:
    metrics = full_metrics()
    said = (
        "Fitted on 21,353 tokens of 3,050 training conversations, at most 7 of each, fewer than "
        "the recipe asks for, to stay within probe.max_fit_gib; 980 repeats of these were left out."
    )
    # An underscore within a word is no markup.
    assert said in to_markdown(build_document(metrics))
    metrics["probe_fit"] |= {"num_repeats": 0, "is_reduced": False}
    assert "at most 7 of each.\n" in to_markdown(build_document(metrics))
    assert "Fitted on" not in to_markdown(build_document(plain_metrics()))


def test_trip_positions_are_drawn_and_summed_up() -> None:
    page = page_of(full_metrics())
    # Of 0, 3, 3, 17, 40: the median, and numpy's 0.9 quantile, 17 + 0.6 * 23 = 30.8.
    said = "5 conversations trip in the response; half of them within 3 tokens, 90 % within 31."
    assert said in page.text_in("figcaption")
    # 41 / 75 to four digits.
    assert "share that trips within 16 tokens 0.5467" in page.text_in("table")


def test_optional_values_may_have_other_layouts() -> None:
    metrics = full_metrics()
    metrics["tokens_to_trip"] = {"edges": [0, 4, 8], "counts": [5, 2]}
    assert "7 conversations trip in the response." in page_of(metrics).text_in("figcaption")
    metrics["by_length"] = "soon"
    metrics["tokens_to_trip"] = {"median": 3}
    del metrics["test"]["tokens_until_trip"]
    metrics["probe"]["layers"], metrics["probe"]["layer"] = [14, 16], None
    page = page_of(metrics)
    assert not {"by-length", "position"} & {s.get("id") for s in page.named("section")}
    assert "layer 14 + 16" in page.text_in("p")


def test_markdown_is_the_short_form() -> None:
    text = to_markdown(build_document(plain_metrics()))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Breaker `tiny-breaker`",
        "## Adapter",
        "## Probe",
        "## Text before and after",
        "## How the probe was chosen",
        "## Time",
        "## What this report does not show",
    ]
    for line in (
        # Bounds and intervals: scipy's beta quantiles, checked in test_intervals.
        "| benign conversations that trip at the threshold | 0.0 % (0 of 299; at most 1.0 %) |",
        "| topic | 0 of 290 | 0.0 %, at most 1.0 % |",
        "| harmful | 53 of 75 | 70.7 % (59.0 to 80.6 %) |",
        "| benign | topic | 0.999 |",
        "| benign: twin | 3.91 | 4.01 | +2.5% |",
        "| 14 | EMA, weight 0.12 | 0.987 | 0.935 | 80.0 % |  |",
        "| 16 | maximum | 0.987 | 0.935 | 80.0 % | **chosen** |",
        "| adapter | 1029 |",
        "**harmful**: `do harm`",
        "- base: `Sure, 'so': 1.`",
        "- breaker: (empty)",
        "2 CPU cores (x86_64), 2 threads, torch 2.13.0+cpu; peak memory 12.6 GiB.",
    ):
        assert line in text.splitlines()
    # Cut to 200 characters.
    assert f"**benign**: `{('p ' * 100).rstrip()}…`" in text.splitlines()


def test_only_changed_settings_stand_out() -> None:
    page = page_of(plain_metrics())
    (table,) = (t for t in page.text_in("table").split("Recipe, where")[1:])
    # 150 is the default of Recipe.steps.
    assert "steps 200 150" in table
    assert "learning_rate" not in table.split("The whole recipe")[0]


def test_intervals() -> None:
    # Clopper-Pearson, two-sided 95 %: 5 of 10, as in tables; 0 of n is 1 - 0.025 ** (1 / n).
    assert rate_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=5e-5)
    assert rate_interval(0, 299) == pytest.approx((0, 1 - 0.025 ** (1 / 299)))
    assert rate_interval(4, 4) == pytest.approx((0.025 ** (1 / 4), 1))
    # Area 0.893 of 51 and 58 cases: the formula by hand gives a standard error of 0.0325, so
    # logit(0.893) = 2.1218, give or take 1.96 * 0.0325 / (0.893 * 0.107) = 0.667.
    assert auroc_interval(0.893, 51, 58) == pytest.approx((0.8108, 0.9421), abs=2e-4)
    assert auroc_interval(1.0, 51, 58) is None
