"""What the chart makes of its values: defaults that are safe, each switch, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from circuit_breakers.metrics import GuardMetrics, LoadMetrics
from circuit_breakers.settings import ServeSettings

from .conftest import CASES, CHART, Render, Rendered

Case = Callable[[str], Rendered]
SERVERS = "r-circuit-breakers-servers"
ROUTER = "r-circuit-breakers-router"
KEYS = '[[keys]]\nid = "a"\n'


def all_containers(rendered: Rendered) -> list[dict[str, Any]]:
    pods = [o["spec"]["template"]["spec"] for o in rendered.objects if o["kind"] == "Deployment"]
    return [c for pod in pods for c in (*pod.get("initContainers", ()), *pod["containers"])]


def checksums(rendered: Rendered) -> str:
    template = rendered.get("Deployment")["spec"]["template"]
    return str(template["metadata"]["annotations"]["checksum/secrets"])


# Secure defaults.


def test_the_default_is_one_enforcing_server_without_a_way_in_from_outside(render: Render) -> None:
    rendered = render()
    assert rendered.get("Deployment")["spec"]["replicas"] == 1
    assert "--mode=enforce" in rendered.server()["args"]
    assert rendered.kinds() == {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    assert rendered.get("Service")["spec"]["type"] == "ClusterIP"


def test_no_key_and_so_no_admin_by_default(render: Render) -> None:
    assert not [a for a in render().server()["args"] if a.startswith(("--policies", "--pepper"))]


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.name)
def test_no_container_of_any_example_may_do_more_than_it_must(render: Render, path: Any) -> None:
    rendered = render(yaml.safe_load(path.read_text()))
    containers = all_containers(rendered)
    assert len(containers) >= 2
    for container in containers:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
    for deployment in (o for o in rendered.objects if o["kind"] == "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_whatever_writes_is_told_a_folder_that_is_mounted_to_be_written(render: Render) -> None:
    server = render().server()
    written = {m["mountPath"] for m in server["volumeMounts"] if not m.get("readOnly")}
    assert written == {"/tmp", "/dev/shm", "/cache"}
    paths = [e["value"] for e in server["env"] if str(e.get("value", "")).startswith("/")]
    assert len(paths) == 9
    assert [p for p in paths if not p.startswith(("/tmp", "/cache/"))] == []


def test_only_the_servers_port_is_open_and_only_dns_is_let_out(render: Render) -> None:
    spec = render().get("NetworkPolicy", "r-circuit-breakers-server")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]
    (rule,) = spec["egress"]
    assert [port["port"] for port in rule["ports"]] == [53, 53]


# Life and death of a pod.


@pytest.mark.parametrize(
    ("settings", "grace_s"),
    [
        # Drain delay, shutdown time, and 10.
        ({}, 10 + 60 + 10),
        ({"drainDelayS": 2.5, "shutdownTimeoutS": 300}, 3 + 300 + 10),
        ({"shutdownTimeoutS": 0}, 10 + 0 + 10),
        # serve's own defaults where a value is taken out.
        ({"drainDelayS": None, "shutdownTimeoutS": None}, 0 + 25 + 10),
    ],
)
def test_the_grace_period_is_longer_than_the_drain(
    render: Render, settings: dict[str, Any], grace_s: int
) -> None:
    rendered = render({"settings": settings, "router": {"enabled": True}})
    assert rendered.pod()["terminationGracePeriodSeconds"] == grace_s
    assert rendered.pod(ROUTER)["terminationGracePeriodSeconds"] == grace_s


def test_the_charts_picture_of_serves_defaults_is_current() -> None:
    fields = ServeSettings.model_fields
    assert fields["drain_delay_s"].default == 0
    assert fields["shutdown_timeout_s"].default == 25
    assert fields["request_timeout_s"].default == 1800
    assert fields["max_body_bytes"].default == 4194304


def test_a_server_has_half_an_hour_to_become_ready_and_is_not_asked_before(render: Render) -> None:
    server = render().server()
    startup = server["startupProbe"]
    assert startup["httpGet"]["path"] == "/readyz"
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800
    assert server["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert server["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert render().get("Deployment")["spec"]["progressDeadlineSeconds"] > 1800


def test_a_breaker_is_verified_before_every_start(render: Render) -> None:
    for path in CASES:
        rendered = render(yaml.safe_load(path.read_text()))
        last = rendered.pod()["initContainers"][-1]
        assert last["command"] == ["circuit-breakers", "verify"]
        assert last["image"] == rendered.server()["image"]
        served = [a for a in rendered.server()["args"] if a.startswith("--breaker=")]
        # Without --breaker the one that ships for the model, by its name.
        assert last["args"] == ([served[0].partition("=")[2]] if served else [_model(rendered)])


def test_a_change_of_policies_rolls_the_pods_and_of_nothing_else_does_not(render: Render) -> None:
    one = {"policies": {"inline": 'default = "a"\n[policies.a]\n'}}
    other = {"policies": {"inline": 'default = "b"\n[policies.b]\n'}}
    assert checksums(render(one)) != checksums(render(other))
    assert checksums(render(one)) == checksums(render({**one, "service": {"port": 80}}))


def test_sqlite_is_let_go_before_another_server_takes_it(render: Render) -> None:
    rendered = render({"audit": {"store": "sqlite"}})
    assert rendered.get("Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    claim = rendered.get("PersistentVolumeClaim", "r-circuit-breakers-audit")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "--audit-db=/audit/audit.db" in rendered.server()["args"]


# What reaches the command line.


def test_every_flag_of_every_example_is_one_of_serves(case: Case) -> None:
    known = {f"--{name.replace('_', '-')}" for name in ServeSettings.model_fields} | {"--lora"}
    switches = {f"--no-{name[2:]}" for name in known}
    seen = set()
    for path in CASES:
        arguments = case(path.name.removesuffix("-values.yaml")).server()["args"]
        seen |= {argument.partition("=")[0] for argument in arguments}
    assert len(seen) > 15
    assert seen - known - switches == set()


def test_numbers_and_switches_are_written_as_serve_reads_them(render: Render) -> None:
    settings = {
        **{"maxBodyBytes": 4194304, "targetFpr": 0.001, "drainDelayS": 2.5},
        **{"enforceEager": False, "scoreTraces": True},
    }
    arguments = render({"settings": settings, "audit": {"store": "sqlite"}}).server()["args"]
    assert {
        *("--max-body-bytes=4194304", "--target-fpr=0.001", "--drain-delay-s=2.5"),
        *("--no-enforce-eager", "--score-traces"),
    } < set(arguments)


def test_weights_on_a_volume_are_served_under_the_models_name(case: Case) -> None:
    rendered = case("gpu")
    arguments = rendered.server()["args"]
    assert "--model=/models/Llama-3.1-8B-Instruct" in arguments
    assert "--served-name=meta-llama/Llama-3.1-8B-Instruct" in arguments
    assert "--lora=support=/models/Llama-3.1-8B-Instruct/loras/support" in arguments
    mounts = {m["name"]: m for m in rendered.server()["volumeMounts"]}
    assert mounts["model"]["subPath"] == "llama-3.1-8b-instruct/v1"
    assert mounts["model"]["readOnly"] and mounts["breaker"]["readOnly"]
    assert mounts["breaker"]["subPath"] == "llama-3.1-8b/v2"


def test_a_server_asks_for_its_gpus(case: Case) -> None:
    rendered = case("gpu")
    assert rendered.server()["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert rendered.pod()["runtimeClassName"] == "nvidia"
    assert rendered.pod()["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert rendered.pod()["priorityClassName"] == "serving"
    assert len(rendered.pod()["topologySpreadConstraints"]) == 2


def test_the_hubs_token_stays_with_the_download(case: Case) -> None:
    rendered = case("dynamic")
    fetch, copy, verify = rendered.pod()["initContainers"]
    assert "HF_TOKEN" in [e["name"] for e in fetch["env"]]
    assert fetch["command"][3:] == ["Qwen/Qwen3-8B", "b968826d9c46dd6066d109eabc6255188de91218"]
    assert copy["image"] == "registry.example.com/breakers/qwen3-8b:v3"
    for container in (verify, rendered.server()):
        assert "HF_TOKEN" not in [e["name"] for e in container["env"]]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in rendered.server()["env"]


def test_secrets_come_as_files_and_the_audit_url_as_a_variable(case: Case) -> None:
    rendered = case("postgres-audit")
    pod, server = rendered.pod(), rendered.server()
    sources = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert sources == {
        "policies": "r-circuit-breakers-policies",
        "pepper": "breaker-pepper",
        "audit-key": "audit-key",
    }
    (url,) = (e for e in server["env"] if e["name"] == "CIRCUIT_BREAKERS_AUDIT_URL")
    assert url["valueFrom"]["secretKeyRef"] == {"name": "audit-database", "key": "url"}
    assert not [a for a in server["args"] if "audit-url" in a]
    assert [o["metadata"]["name"] for o in rendered.objects if o["kind"] == "Secret"] == [
        "r-circuit-breakers-policies"
    ]


# Many replicas.


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


# Refusals.


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


def _model(rendered: Rendered) -> str:
    (argument,) = (a for a in rendered.server()["args"] if a.startswith("--model="))
    return argument.partition("=")[2]
