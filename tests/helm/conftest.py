"""Helm's own engine, and the chart rendered by it; what it takes is fetched on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ..fetched_packages import fetched_packages

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
CASES = sorted((CHART / "ci").glob("*-values.yaml"))
ROUTER = "r-circuit-breakers-router"
KEYS = '[[keys]]\nid = "a"\n'


class Rendered(NamedTuple):
    """What the chart gives for some values."""

    objects: list[dict[str, Any]]
    notes: str

    def get(self, kind: str, name: str = "r-circuit-breakers") -> dict[str, Any]:
        (found,) = (o for o in self.objects if (o["kind"], o["metadata"]["name"]) == (kind, name))
        return found

    def kinds(self) -> set[str]:
        return {o["kind"] for o in self.objects}

    def pod(self, name: str = "r-circuit-breakers") -> dict[str, Any]:
        """Spec of a Deployment's pods."""
        spec: dict[str, Any] = self.get("Deployment", name)["spec"]["template"]["spec"]
        return spec

    def server(self) -> dict[str, Any]:
        (container,) = self.pod()["containers"]
        return dict(container)


Render = Callable[..., Rendered]
Case = Callable[[str], Rendered]


@pytest.fixture(scope="session")
def tools() -> Iterator[Path]:
    """Folder with requirements/helm.txt, on sys.path for the rest of the run."""
    folder = fetched_packages("helm")
    # Last: nothing in it takes the place of what is installed.
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def render(tools: Path) -> Render:
    """Renders the chart; takes values as a dict, or none."""
    import helm_python

    chart = helm_python.Chart.load(CHART)

    def rendered(values: dict[str, Any] | None = None) -> Rendered:
        chart.validate_schema(values)
        files = chart.render(values, name="r", namespace="ns")
        notes = files.pop("circuit-breakers/templates/NOTES.txt")
        objects = [o for text in files.values() for o in yaml.safe_load_all(text) if o]
        return Rendered(objects, notes)

    return rendered


@pytest.fixture(scope="session")
def case(render: Render) -> Case:
    """One of the examples in helm/ci, rendered."""
    return lambda name: render(yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text()))
