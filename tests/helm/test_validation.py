"""Every example of helm/ci against Helm's lint, Kubernetes's schemas and typed models of CRDs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from .conftest import CASES, CHART, Render, Rendered

CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}
OBJECTS = {
    "cpu-minimal": {"Deployment": 1, "Service": 2, "NetworkPolicy": 1, "PodDisruptionBudget": 1},
    "gpu": {"Deployment": 1, "Service": 2, "NetworkPolicy": 1, "PodDisruptionBudget": 1},
    "many-replicas": {
        **{"Deployment": 2, "Service": 2, "NetworkPolicy": 2, "PodDisruptionBudget": 2},
        **{"ConfigMap": 2, "ServiceMonitor": 1, "PrometheusRule": 1, "ScaledObject": 1},
        "HTTPRoute": 1,
    },
    "postgres-audit": {
        **{"Deployment": 2, "Service": 2, "NetworkPolicy": 2, "PodDisruptionBudget": 2},
        **{"ConfigMap": 1, "Secret": 1, "Ingress": 1},
    },
    "dynamic": {
        **{"Deployment": 1, "Service": 2, "NetworkPolicy": 1, "PodDisruptionBudget": 1},
        **{"PersistentVolumeClaim": 1, "ServiceMonitor": 1},
    },
    "hpa": {
        **{"Deployment": 1, "Service": 2, "NetworkPolicy": 1, "PodDisruptionBudget": 1},
        **{"HorizontalPodAutoscaler": 1, "Secret": 2},
    },
}
"""By example, how many of each kind it makes: no tool below may pass by checking nothing."""


@pytest.fixture(scope="module", autouse=True)
def schemas_read_once(tools: Path) -> Iterator[None]:
    """They are read for each object anew, megabytes of JSON, which would take most of the time."""
    from kubernetes_validate import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def counts(rendered: Rendered) -> dict[str, int]:
    kinds = [o["kind"] for o in rendered.objects]
    return {kind: kinds.count(kind) for kind in kinds}


def case_name(path: Path) -> str:
    return path.name.removesuffix("-values.yaml")


def rendered_case(render: Render, path: Path) -> Rendered:
    return render(yaml.safe_load(path.read_text()))


def test_each_example_is_known() -> None:
    assert {case_name(path) for path in CASES} == set(OBJECTS)


@pytest.mark.parametrize("path", CASES, ids=case_name)
def test_helm_lints_strictly_and_finds_nothing(tools: Path, path: Path) -> None:
    import helm_python

    report = helm_python.lint(CHART, yaml.safe_load(path.read_text()), strict=True)
    assert report["total_charts_linted"] == 1
    assert report["errors"] == []
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
@pytest.mark.parametrize("path", CASES, ids=case_name)
def test_kubernetes_takes_every_object(render: Render, path: Path, version: str) -> None:
    import kubernetes_validate

    rendered = rendered_case(render, path)
    assert counts(rendered) == OBJECTS[case_name(path)]
    checked = [
        kubernetes_validate.validate(o, version, strict=True)
        for o in rendered.objects
        if o["kind"] not in CUSTOM
    ]
    num_custom = sum(OBJECTS[case_name(path)].get(kind, 0) for kind in CUSTOM)
    assert checked == [version] * (len(rendered.objects) - num_custom)


def test_kubernetes_would_refuse_an_unknown_field(render: Render) -> None:
    import kubernetes_validate

    deployment = render().get("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["runAsRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.33", strict=True)


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_the_operators_models_keep_every_key(render: Render, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, of fields that these models name
        from cloudcoil.models.prometheus_operator import v1

    checked = 0
    for path in CASES:
        for given in rendered_case(render, path).objects:
            if given["kind"] == kind:
                model = getattr(v1, kind).model_validate(given)
                kept = model.model_dump(by_alias=True, exclude_none=True, mode="json")
                assert _paths(given) - _paths(kept) == set()
                checked += 1
    assert checked == {"ServiceMonitor": 2, "PrometheusRule": 1}[kind]


def test_the_scaled_object_has_kedas_fields_and_no_other(render: Render) -> None:
    """Names as in KEDA's ScaledObject, v1alpha1."""
    spec = rendered_case(render, CHART / "ci" / "many-replicas-values.yaml").get("ScaledObject")[
        "spec"
    ]
    assert set(spec) == {
        *("scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval"),
        *("advanced", "triggers"),
    }
    assert spec["scaleTargetRef"] == {"name": "r-circuit-breakers"}
    assert set(spec["advanced"]) == {"horizontalPodAutoscalerConfig"}
    assert [t["metricType"] for t in spec["triggers"]] == ["AverageValue", "Value"]
    for trigger in spec["triggers"]:
        assert set(trigger) == {"type", "name", "metricType", "metadata"}
        assert set(trigger["metadata"]) == {"serverAddress", "threshold", "query"}
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        promql_parser.parse(trigger["metadata"]["query"])


def test_the_route_has_the_gateways_fields_and_no_other(render: Render) -> None:
    """Names as in the Gateway API's HTTPRoute, v1."""
    route = rendered_case(render, CHART / "ci" / "many-replicas-values.yaml").get("HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert set(route["spec"]) == {"parentRefs", "hostnames", "rules"}
    (rule,) = route["spec"]["rules"]
    assert rule == {
        "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
        "backendRefs": [{"name": "r-circuit-breakers", "port": 8000}],
        # serve's own 1800, and 10 so that its error comes first.
        "timeouts": {"request": "1810s"},
    }


def _paths(value: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    """Every key of a document, with the keys and indexes above it."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return {path}
    return {path}.union(*(_paths(below, (*path, key)) for key, below in pairs))
