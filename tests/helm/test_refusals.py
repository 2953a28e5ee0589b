"""Values that the chart refuses, and what its notes say of those that it takes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .conftest import KEYS, Case, Render


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicas": 2, "audit": {"store": "sqlite"}}, "set audit.store to postgresql"),
        (
            {"autoscaling": {"kind": "hpa"}, "audit": {"store": "sqlite"}},
            "got audit.store sqlite with autoscaling",
        ),
        ({"audit": {"store": "postgresql"}}, "set audit.url.existingSecret"),
        (
            {"audit": {"store": "postgresql", "url": {"existingSecret": "u"}}},
            "networkPolicy.egress empty",
        ),
        ({"audit": {"url": {"existingSecret": "u"}}}, "set audit.store"),
        ({"settings": {"scoreTraces": True}}, "set audit.store"),
        ({"policies": {"inline": "a", "existingSecret": "b"}}, "leave one out"),
        ({"policies": {"inline": KEYS}}, "set pepper.existingSecret"),
        ({"pepper": {"existingSecret": "s"}}, "set policies.existingSecret"),
        (
            {"router": {"enabled": True}, "monitoring": {"serviceMonitor": {"enabled": True}}},
            "name your Prometheus in networkPolicy.metricsFrom",
        ),
        (
            {
                "networkPolicy": {"from": [{"podSelector": {}}]},
                "monitoring": {"serviceMonitor": {"enabled": True}},
            },
            "name your Prometheus in networkPolicy.metricsFrom",
        ),
        ({"autoscaling": {"kind": "keda"}}, "set monitoring.serviceMonitor.enabled"),
        (
            {"settings": {"otlpEndpoint": "http://collector:4318"}},
            "expected a rule that lets the spans out",
        ),
        ({"model": {"source": "claim"}}, "model.claim.name"),
        ({"model": {"source": "image"}}, "model.image.reference"),
        ({"model": {"source": "hub", "name": "a/b"}}, "allow port 443"),
        ({"model": {"hub": {"revision": "main"}}}, "set model.source"),
        ({"model": {"source": "claim", "claim": {"name": "m"}}}, "set breaker.source"),
        ({"breaker": {"source": "claim"}}, "breaker.claim.name"),
        ({"breaker": {"source": "image"}}, "breaker.image.reference"),
        ({"loras": {"a": "b"}}, "expected claim"),
        ({"gpu": {"count": 2}}, "got gpu.count 2 with 1 ranks"),
        ({"autoscaling": {"kind": "hpa", "maxReplicas": 1, "minReplicas": 2}}, "raise it"),
        ({"strategy": {"maxSurge": 0}}, "no pod could ever be replaced"),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_the_cure(
    render: Render, values: dict[str, Any], said: str
) -> None:
    from helm_python import HelmRenderError

    with pytest.raises(HelmRenderError, match=re.escape(said)):
        render(values)


@pytest.mark.parametrize(
    "values",
    [
        {"replica": 2},
        {"replicas": 0},
        {"settings": {"maxModelLenn": 4096}},
        {"settings": {"maxModelLen": "4096"}},
        {"settings": {"mode": "off"}},
        # The chart's own: they go with volumes and Secrets.
        {"settings": {"auditUrl": "postgresql://u@h/d"}},
        {"settings": {"policies": "/p.toml"}},
        {"image": {"digest": "latest"}},
        {"model": {"claim": {"subPath": "../other"}}},
        {"loras": {"a": "/etc"}},
        {"audit": {"store": "mysql"}},
        {"ingress": {"enabled": True}},
        {"httpRoute": {"enabled": True}},
        {"runAsUser": 0},
        {"networkPolicy": {"open": True}},
    ],
)
def test_what_the_schema_does_not_know_is_refused(render: Render, values: dict[str, Any]) -> None:
    from helm_python import HelmValuesError

    with pytest.raises(HelmValuesError):
        render(values)


def test_the_notes_show_a_request_that_the_server_takes(render: Render, case: Case) -> None:
    assert '"model": "smollm2-135m-instruct"' in render().notes
    assert "Bearer" not in render().notes
    assert "Bearer KEY" in case("postgres-audit").notes


@pytest.mark.parametrize(
    ("policies", "open_"),
    [
        ({}, True),
        ({"inline": "[policies.a]\n# [[keys]] come later\n"}, True),
        ({"inline": KEYS}, False),
        ({"inline": '[[ keys ]]\nid = "a"\n'}, False),
        ({"inline": 'keys = [{id = "a"}]\n'}, False),
        ({"existingSecret": "p"}, False),
    ],
)
def test_the_notes_say_when_nobody_needs_a_key(
    render: Render, policies: dict[str, Any], open_: bool
) -> None:
    values = {"policies": policies, "pepper": {"existingSecret": "s"}} if policies else {}
    notes = render(values).notes
    assert ("There are no API keys" in notes, "Bearer KEY" in notes) == (open_, not open_)


def test_the_notes_say_how_an_image_comes_about_that_is_published_nowhere(render: Render) -> None:
    assert "--set image.repository=" in render().notes
    assert "docker push" in render().notes
    named = render({"image": {"repository": "registry.example.com/circuit-breakers"}})
    assert "docker push" not in named.notes
