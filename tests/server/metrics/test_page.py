"""The page names what the server exposes, no more and no less, and is the one that is committed."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from circuit_breakers.api.service import Service
from circuit_breakers.metrics.page import ALL_SERIES, metrics_page
from circuit_breakers.metrics.series import LABEL_VALUES
from circuit_breakers.settings import ServeSettings

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_committed_page_is_the_generated_one() -> None:
    cure = "run `python -m circuit_breakers.metrics > docs/metrics.md`"
    assert PAGE.read_text() == metrics_page(), cure


def test_the_page_names_the_series_of_a_live_registry_and_no_others() -> None:
    registry = CollectorRegistry()
    Service(ServeSettings(), registry)
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in registry.collect()
    }
    rows = re.findall(r"^\| `(circuit_breakers_\w+)` \| (\w+)", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == exposed
    assert len(rows) == len(exposed) > 20


def test_every_label_has_its_values_and_every_value_a_label() -> None:
    assert {label for one in ALL_SERIES for label in one.labels} == set(LABEL_VALUES)


def test_what_must_stay_0_is_said_to_be_0() -> None:
    strict = [one for one in ALL_SERIES if "must stay 0" in one.meaning]
    assert len(strict) == 3  # unscored and leaked tokens, audit entries
    assert all(one.holds == "0" and one.kind is Counter for one in strict)
