"""Real Prometheus and Alertmanager on the configurations that ship, thirty times as fast."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from ..server.api.conftest import free_port
from .tools import find_program

__all__ = ["FASTER", "MonitoringStack", "Webhook", "faster"]

FASTER = 30
"""What all windows and waits of the rules are divided by; Alertmanager keeps its own."""
_ROOT = Path(__file__).parents[2]
_UNIT_S = {"s": 1, "m": 60, "h": 3600}
_START_S = 60


def faster(rules: str) -> str:
    """The rules with every `[5m]` and `for: 5m` divided, and nothing else changed."""

    def divided(match: re.Match[str]) -> str:
        seconds = int(match[2]) * _UNIT_S[match[3]]
        assert seconds % FASTER == 0, f"{match[0]} cannot be divided by {FASTER}"
        return f"{match[1]}{seconds // FASTER}s"

    return re.sub(r"(\[|for: )(\d+)([smh])\b", divided, rules)


class Webhook:
    """Takes what Alertmanager sends."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def alerts(self, status: str, name: str = "") -> list[dict[str, Any]]:
        """Alerts that came with this status, all or those of one name."""
        found = [a for body in self.received for a in body["alerts"] if a["status"] == status]
        return [a for a in found if name in ("", a["labels"]["alertname"])]

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class MonitoringStack:
    """Prometheus that scrapes `target`, and Alertmanager that tells `webhook`."""

    def __init__(self, root: Path, target: str, webhook: str) -> None:
        self._root = root
        self._processes: list[subprocess.Popen[bytes]] = []
        alertmanager_port, prometheus_port = free_port(), free_port()
        self._write_alertmanager(webhook)
        self._write_prometheus(target, f"127.0.0.1:{alertmanager_port}")
        self._start(
            "alertmanager",
            f"--config.file={root}/alertmanager.yml",
            f"--storage.path={root}/alertmanager",
            f"--web.listen-address=127.0.0.1:{alertmanager_port}",
            "--cluster.listen-address=",
        )
        self._start(
            "prometheus",
            f"--config.file={root}/prometheus.yml",
            f"--storage.tsdb.path={root}/prometheus",
            f"--web.listen-address=127.0.0.1:{prometheus_port}",
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{prometheus_port}", timeout=30)
        self._ports = (prometheus_port, alertmanager_port)

    def _write_alertmanager(self, webhook: str) -> None:
        config = yaml.safe_load((_ROOT / "docker/alertmanager/alertmanager.yml").read_text())
        (receiver,) = config["receivers"]
        receiver["webhook_configs"][0]["url"] = webhook
        (self._root / "alertmanager.yml").write_text(yaml.safe_dump(config))

    def _write_prometheus(self, target: str, alertmanager: str) -> None:
        rules = (_ROOT / "helm/monitoring/rules.yaml").read_text()
        (self._root / "rules.yaml").write_text(faster(rules))
        config = yaml.safe_load((_ROOT / "docker/prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [f"{self._root}/rules.yaml"]
        config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
        guard = config["scrape_configs"][0]
        del guard["dns_sd_configs"]
        guard["static_configs"] = [{"targets": [target]}]
        config["scrape_configs"] = [guard]
        (self._root / "prometheus.yml").write_text(yaml.safe_dump(config))

    def _start(self, name: str, *arguments: str) -> None:
        with (self._root / f"{name}.log").open("wb") as log:
            program = find_program(name)
            self._processes.append(
                subprocess.Popen(
                    [program, *arguments], stdout=log, stderr=log, cwd=program.parents[2]
                )
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not all(self._is_ready(port) for port in self._ports):
            for process in self._processes:
                assert process.poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def _is_ready(self, port: int) -> bool:
        try:
            return self._http.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200
        except httpx.TransportError:
            return False  # the port is not bound yet

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Samples of an instant query: `metric`, and `value` with time and number as text."""
        answer = self._http.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in self._root.glob("*.log"))

    def stop(self) -> None:
        self._http.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)
