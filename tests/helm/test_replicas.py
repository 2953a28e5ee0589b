"""Many replicas: the router in front of them, what scales them and what watches them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from circuit_breakers.metrics import GuardMetrics, LoadMetrics

from .conftest import CHART, ROUTER, Case, Render

SERVERS = "r-circuit-breakers-servers"


def test_clients_meet_the_router_and_the_router_the_servers(render: Render) -> None:
    rendered = render({"replicas": 2, "router": {"enabled": True}})
    part = "app.kubernetes.io/component"
    assert rendered.get("Service")["spec"]["selector"][part] == "router"
    servers = rendered.get("Service", SERVERS)["spec"]
    assert (servers["clusterIP"], servers["selector"][part]) == ("None", "server")
    conf = rendered.get("ConfigMap", ROUTER)["data"]["nginx.conf"]
    assert f"server {SERVERS}.ns.svc.cluster.local:8000 resolve max_fails=0;" in conf
    # serve's own limits: a body of 4 MiB; 1800 s for a request, whose error comes first.
    assert "client_max_body_size 4194304;" in conf
    assert "client_body_buffer_size 4194304;" in conf
    assert "proxy_read_timeout 1810s;" in conf
    assert "limit_conn callers 128;" in conf
    # Half of the memory, which is what the chart refuses to go beyond.
    limit = rendered.pod(ROUTER)["containers"][0]["resources"]["limits"]["memory"]
    assert (limit, 128 * 4194304) == ("1Gi", 2**30 // 2)
    policy = rendered.get("NetworkPolicy", "r-circuit-breakers-server")["spec"]
    # Nobody else, who would pass the router by: a label is no proof of who a pod is.
    (caller,) = policy["ingress"][0]["from"]
    assert caller["podSelector"]["matchLabels"][part] == "router"
    assert render().get("Service")["spec"]["selector"][part] == "server"


def test_who_may_scrape_is_let_in_beside_the_router(case: Case) -> None:
    policy = case("many-replicas").get("NetworkPolicy", "r-circuit-breakers-server")["spec"]
    router, scraper = policy["ingress"][0]["from"]
    assert "namespaceSelector" not in router
    assert scraper["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "monitoring"
    }


def test_the_router_lets_go_of_a_connection_before_the_server_does(render: Render) -> None:
    conf = render({"router": {"enabled": True}}).get("ConfigMap", ROUTER)["data"]["nginx.conf"]
    (kept_s,) = re.findall(r"keepalive_timeout (\d+)s;", conf)
    source = (CHART.parent / "server/circuit_breakers/api/connection.py").read_text()
    (server_s,) = re.findall(r"_KEEP_ALIVE_S = (\d+)", source)
    assert int(kept_s) < int(server_s)
    assert f"Below the {server_s} s after which" in conf
    assert f"the servers' {server_s} s" in (CHART.parent / "docs" / "replicas.md").read_text()


def test_the_routers_way_out_is_the_servers_dns_and_what_is_named(render: Render) -> None:
    rule = {"to": [{"ipBlock": {"cidr": "169.254.20.10/32"}}], "ports": [{"port": 53}]}

    def rules(**policy: Any) -> list[dict[str, Any]]:
        rendered = render({"router": {"enabled": True}, "networkPolicy": policy})
        egress = rendered.get("NetworkPolicy", ROUTER)["spec"]["egress"]
        return list(egress)

    assert len(rules()) == 2
    assert rules(routerEgress=[rule]) == [*rules(), rule]


@pytest.mark.parametrize("memory", ["1Gi", "1024Mi", "1073741824", 1073741824, "1.1G"])
def test_a_router_holds_the_bodies_of_one_address_in_half_its_memory(
    render: Render, memory: Any
) -> None:
    from helm_python import HelmRenderError

    def with_body(num_bytes: int) -> dict[str, Any]:
        router = {"enabled": True, "resources": {"limits": {"memory": memory}}}
        return {"router": router, "settings": {"maxBodyBytes": num_bytes}}

    render(with_body(4194304))
    with pytest.raises(HelmRenderError, match=r"raise router\.resources\.limits\.memory"):
        render(with_body(8388608))


def test_a_change_of_its_configuration_rolls_the_router(render: Render) -> None:
    def checksum(**settings: Any) -> str:
        rendered = render({"router": {"enabled": True}, "settings": settings})
        template = rendered.get("Deployment", ROUTER)["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum(maxNumSeqs=4)
    assert checksum() != checksum(maxBodyBytes=1024)


def test_scaling_leaves_the_number_of_pods_to_the_scaler(case: Case, render: Render) -> None:
    for name in ("hpa", "many-replicas"):
        assert "replicas" not in case(name).get("Deployment")["spec"]
    assert "replicas" in render().get("Deployment")["spec"]


def test_what_is_scaled_on_are_series_that_a_server_has(case: Case) -> None:
    registry = CollectorRegistry()
    GuardMetrics(registry, model="m")
    LoadMetrics(registry, num_running=lambda: 0, num_waiting=lambda: 0)
    ours = {s.name for family in registry.collect() for s in family.samples} | {
        f"{family.name}_bucket" for family in registry.collect() if family.type == "histogram"
    }
    triggers = case("many-replicas").get("ScaledObject")["spec"]["triggers"]
    queries = " ".join(t["metadata"]["query"] for t in triggers)
    assert 'namespace="ns",service="r-circuit-breakers-servers"' in queries
    named = set(re.findall(r"circuit_breakers_\w+|vllm:\w+", queries))
    scaler = case("hpa").get("HorizontalPodAutoscaler")["spec"]
    pods = {m["pods"]["metric"]["name"] for m in scaler["metrics"]}
    assert pods == {"circuit_breakers_waiting_requests", "vllm_num_requests_waiting"}
    assert named - ours == {"vllm:num_requests_waiting"}
    assert pods - ours == {"vllm_num_requests_waiting"}


def test_vllm_has_the_series_that_is_scaled_on() -> None:
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    assert '"vllm:num_requests_waiting"' in source


def test_series_get_the_job_that_the_rules_look_for(case: Case) -> None:
    endpoint = case("many-replicas").get("ServiceMonitor")["spec"]["endpoints"][0]
    (relabeling,) = endpoint["relabelings"]
    assert (relabeling["targetLabel"], relabeling["replacement"]) == ("job", "circuit-breakers")
    assert case("dynamic").get("ServiceMonitor")["spec"]["endpoints"][0]["authorization"][
        "credentials"
    ] == {"name": "metrics-key", "key": "key"}


def test_rules_and_dashboard_are_the_files_themselves(case: Case) -> None:
    rendered = case("many-replicas")
    rules = yaml.safe_load((CHART / "monitoring" / "rules.yaml").read_text())
    assert rendered.get("PrometheusRule")["spec"] == rules
    dashboard = rendered.get("ConfigMap", "r-circuit-breakers-dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    text = (CHART / "monitoring" / "dashboard.json").read_text()
    assert dashboard["data"]["circuit-breakers.json"].strip() == text.strip()


def test_metrics_are_on_no_public_path(case: Case) -> None:
    (rule,) = case("postgres-audit").get("Ingress")["spec"]["rules"]
    assert [path["path"] for path in rule["http"]["paths"]] == ["/v1"]
    conf = case("postgres-audit").get("ConfigMap", ROUTER)["data"]["nginx.conf"]
    assert "location = /metrics {\n            return 404;" in conf
