"""Rules and dashboard read series that there are: our own, vLLM's, or recorded ones."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from circuit_breakers.api.service import Service
from circuit_breakers.settings import ServeSettings

from .panel_queries import metrics_of, panel_queries
from .test_rules import rules

OF_PROMETHEUS = {"up", "ALERTS"}


@pytest.fixture(scope="module")
def registered() -> CollectorRegistry:
    """The series that a server announces before it has its engine."""
    registry = CollectorRegistry()
    Service(ServeSettings(), registry)
    return registry


def test_every_metric_exists(registered: CollectorRegistry) -> None:
    known = (
        _names_of(registered)
        | OF_PROMETHEUS
        | {rule["record"] for rule in rules() if "record" in rule}
    )
    expressions = [expr for _, expr in panel_queries()] + [rule["expr"] for rule in rules()]
    used = {name for expr in expressions for name in metrics_of(expr)}
    of_vllm = {name for name in used if name.startswith("vllm:")}
    assert sorted(used - of_vllm - known) == []
    assert sorted(of_vllm - _names_of_vllm()) == []
    assert len(of_vllm) >= 5 and len(used) > 30


def _names_of(registry: CollectorRegistry) -> set[str]:
    names: set[str] = set()
    for family in registry.collect():
        names |= _sample_names(family.name, family.type)
    return names


def _sample_names(name: str, kind: str) -> set[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + suffix for suffix in suffixes.get(kind, ("",))}


def _names_of_vllm() -> set[str]:
    """Of the series in the source of the vLLM that is installed; to import it takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    kinds = "counter", "gauge", "histogram"
    found = re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    assert {kind for kind, _ in found} == set(kinds)
    return {name for kind, base in found for name in _sample_names(base, kind)}
