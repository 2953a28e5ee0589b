"""What the chart makes of its values: defaults that are safe, and each switch."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from circuit_breakers.settings import ServeSettings

from .conftest import CASES, ROUTER, Case, Render, Rendered


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


def _model(rendered: Rendered) -> str:
    (argument,) = (a for a in rendered.server()["args"] if a.startswith("--model="))
    return argument.partition("=")[2]
