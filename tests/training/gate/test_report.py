"""The report of a gate, with hostile text in every place that comes from outside."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from circuit_breakers.errors import EvaluationError
from circuit_breakers_training.gate.report import gate_files, print_table
from circuit_breakers_training.gate.rows import Bar, NotRun, Row, share_row
from circuit_breakers_training.gate.run import Check, Result, run_gate
from circuit_breakers_training.gate.target import Target

from ..html_page import Page
from .conftest import MakeTarget, ScriptedServer

HOSTILE = '<script>alert(1)</script> " onload="x [bold]'


def good(target: Target) -> list[Row]:
    return [
        share_row("share", "a share", [True, False], source="here", bar=Bar(at_least=0.5)),
        Row(name="change", what="a change", count=2, value=-0.031, unit="points", source="here"),
    ]


def bad(target: Target) -> list[Row]:
    return [
        Row(
            name="hostile",
            what=HOSTILE,
            count=3,
            value=0.25,
            bar=Bar(at_most=0.1, min_count=2),
            source=HOSTILE,
            notes=(HOSTILE,),
        )
    ]


def broken(target: Target) -> list[Row]:
    raise EvaluationError(HOSTILE)


CHECKS: dict[str, Check] = {
    "identity": good,
    "detection": bad,
    "live": broken,
    "garak": lambda target: NotRun(f"no package {HOSTILE}"),
}


@pytest.fixture
def result(scripted: ScriptedServer, make_target: MakeTarget) -> Result:
    return run_gate(make_target(scripted), checks=CHECKS)


def test_the_page_escapes_and_asks_for_nothing(result: Result) -> None:
    hostile = replace(
        result,
        target=replace(result.target, served={**result.target.served, "policy": HOSTILE}),
    )
    text = gate_files(hostile)["gate.html"].decode()
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not {"onload", "src"} & {name for _, named in page.elements for name in named}
    said = "".join(text for _, text in page.texts)
    # In the policy, the row twice, its note, and both reasons.
    assert said.count(HOSTILE) == 6
    assert "default-src 'none'" in text
    assert "Release gate of breaker words" in said


def test_the_json_has_every_row_and_the_verdict(result: Result) -> None:
    found = json.loads(gate_files(result)["gate.json"])
    assert found["passed"] is False
    assert found["missed"] == ["detection", "live", "garak"]
    assert [check["status"] for check in found["checks"]] == [
        *("passed", "failed", "failed", "not run")
    ]
    (row, _) = found["checks"][0]["rows"]
    assert row["bar"] == {"at_least": 0.5, "at_most": None, "min_count": 1}
    assert (row["count"], row["value"], row["passed"]) == (2, 0.5, True)
    assert found["checks"][1]["rows"][0]["notes"] == [HOSTILE]


def test_the_table_shows_figures_bars_and_verdict(result: Result) -> None:
    console = Console(width=200, file=io.StringIO())
    print_table(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (share,) = (line for line in text.splitlines() if "share" in line)
    # Clopper-Pearson's interval of 1 in 2.
    assert "50.0 % (1.3 % to 98.7 %)" in share and "at least 50.0 %" in share and "yes" in share
    (hostile,) = (line for line in text.splitlines() if "hostile" in line)
    assert "at most 0.1, of 2 or more" in hostile and "NO" in hostile
    assert "change" not in text, "no bar, not in the short table"
    assert "NOT passed: detection, live, garak" in text
    assert "[bold]" in text, "no markup in what comes from outside"


def test_a_gate_passes_when_what_is_missing_was_named(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    target = make_target(scripted)
    checks = {name: CHECKS[name] for name in ("identity", "garak")}
    assert run_gate(target, checks=checks).missed == ("garak",)
    named = replace(target, settings=replace(target.settings, skip=("garak",)))
    assert run_gate(named, checks=checks).passed
    # Named, and yet nothing was proved.
    nothing = replace(target, settings=replace(target.settings, skip=("identity", "garak")))
    assert run_gate(nothing, checks=checks).missed == ()
    assert not run_gate(nothing, checks=checks).passed


def test_a_note_of_a_changed_bar_is_on_the_page(result: Result) -> None:
    bars = replace(result.target.bars, changed=("detection.auroc",))
    changed = replace(result, target=replace(result.target, bars=bars))
    assert "not the default ones: detection.auroc" in gate_files(changed)["gate.html"].decode()
    assert "All bars are the default ones" in gate_files(result)["gate.html"].decode()
