"""Requests a second of our HTTP server beside vLLM's own: `circuit-breakers bench api`.

Two server processes on the same merged checkpoint with the same engine flags, both up, one of them
loaded at a time: blocks alternate (A B B A ...), and a ratio compares two neighbours, which get
the same prompts. The load is `vllm bench serve`, inside this process. Ours observes, as a random
prompt may trip, and an answer that is stopped would be a shorter one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.bench.machine import Machine, command_line, describe_machine
from circuit_breakers.engine.bench.ratios import Spread, spread
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.errors import NotReadyError
from circuit_breakers.hardware import quick_dtype
from circuit_breakers.models import ResolvedModel

__all__ = ["ApiReport", "ApiRow", "ApiSettings", "bench_api", "print_api_report"]

_START_S = 600
_LOG_CHARS = 2000
_SAID_PREFIX = "CIRCUIT_BREAKERS_"


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """How much is measured."""

    concurrencies: tuple[int, ...] = (1, 16, 64)
    """Requests at once."""
    num_pairs: int = 8
    """Pairs of neighbouring blocks of each concurrency."""
    rounds: int = 2
    """Requests of a block, for each one at once."""
    least_requests: int = 8
    """Of a block."""
    input_len: int = 32
    """Random tokens of a prompt."""
    output_len: int = 64
    """Tokens of an answer."""
    max_model_len: int = 512
    kv_cache_gib: int = 2
    """Of each server."""


@dataclass(frozen=True, kw_only=True)
class ApiRow:
    """One concurrency; requests a second, block by block, in pairs."""

    concurrency: int
    ours: list[float]
    vllms: list[float]
    ratio: Spread
    """Ours over vLLM's; 1 is as fast, less is slower."""


@dataclass(frozen=True, kw_only=True)
class ApiReport:
    """What was measured, and on what."""

    command: str
    machine: Machine
    model: str
    breaker: str
    settings: ApiSettings
    rows: list[ApiRow]

    def to_json(self) -> str:
        """Everything, with all raw pairs."""
        return json.dumps(asdict(self), indent=1) + "\n"


def bench_api(
    model_option: str,
    model: ResolvedModel,
    breaker: Breaker,
    settings: ApiSettings,
    console: Console,
) -> ApiReport:
    """Both servers, started, loaded in turns, and ended.

    Args:
        model_option: what `serve --model` is given for `model`.
    Raises:
        NotReadyError: a server does not start, or does not answer a request in full.
    """
    machine = describe_machine()
    checkpoint = merged_checkpoint(model, breaker)
    with tempfile.TemporaryDirectory() as logs:
        ours = _ours(model_option, model.name, breaker, settings)
        vllms = _vllms(model.name, checkpoint, settings)
        with (
            _server(ours, "/readyz", Path(logs, "ours"), settings) as our_url,
            _server(vllms, "/health", Path(logs, "vllms"), settings) as their_url,
        ):
            urls = {"ours": our_url, "vllms": their_url}
            rows = [
                _measured(concurrency, urls, model.name, checkpoint, settings, console)
                for concurrency in settings.concurrencies
            ]
    return ApiReport(
        command=command_line(),
        machine=machine,
        model=model.name,
        breaker=breaker.manifest.name,
        settings=settings,
        rows=rows,
    )


def print_api_report(report: ApiReport, console: Console | None = None) -> None:
    """A line for each concurrency, on standard output unless told otherwise."""
    console = console or Console()
    lines = [f"$ {report.command}", "at once  ours req/s  vLLM req/s  ratio (quartiles)"]
    for row in report.rows:
        ours, vllms = spread(row.ours), spread(row.vllms)
        assert ours is not None and vllms is not None, "a row has blocks"
        lines.append(
            f"{row.concurrency:7d}  {ours.median:10.3f}  {vllms.median:10.3f}  "
            f"{row.ratio.median:.3f} ({row.ratio.q1:.3f} to {row.ratio.q3:.3f})"
        )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _measured(
    concurrency: int,
    urls: dict[str, str],
    model_name: str,
    checkpoint: Path,
    settings: ApiSettings,
    console: Console,
) -> ApiRow:
    found: dict[str, list[float]] = {name: [] for name in urls}
    # The first pair warms both servers up, and is left out.
    for pair in range(-1, settings.num_pairs):
        for name in ("ours", "vllms") if pair % 2 == 0 else ("vllms", "ours"):
            # One seed for both: the same prompts, and new ones to either's prefix cache.
            seed = concurrency * 1000 + pair + 1
            options = _load_options(
                urls[name], model_name, checkpoint, settings, concurrency, seed=seed
            )
            per_s = _requests_per_s(options, settings)
            console.print(f"{concurrency} at once, pair {pair + 1}, {name}: {per_s:.3f} requests/s")
            if pair >= 0:
                found[name].append(per_s)
    ratio = spread(a / b for a, b in zip(found["ours"], found["vllms"], strict=True))
    assert ratio is not None, "there is at least one pair"
    return ApiRow(concurrency=concurrency, ours=found["ours"], vllms=found["vllms"], ratio=ratio)


def _load_options(
    url: str,
    model_name: str,
    checkpoint: Path,
    settings: ApiSettings,
    concurrency: int,
    *,
    seed: int,
) -> list[str]:
    """The command line of `vllm bench serve` for one block."""
    num_prompts = max(settings.least_requests, concurrency * settings.rounds)
    return [
        *("--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions"),
        *("--model", model_name, "--tokenizer", str(checkpoint)),
        *("--dataset-name", "random", "--random-input-len", str(settings.input_len)),
        *("--random-output-len", str(settings.output_len), "--num-prompts", str(num_prompts)),
        *("--max-concurrency", str(concurrency), "--seed", str(seed), "--temperature", "0"),
        *("--ready-check-timeout-sec", "0", "--ignore-eos", "--disable-tqdm"),
    ]


def _requests_per_s(options: list[str], settings: ApiSettings) -> float:
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args(options)
    # It prints a page of its own for each block.
    with contextlib.redirect_stdout(io.StringIO()):
        result: dict[str, Any] = asyncio.run(main_async(arguments))
    expected = arguments.num_prompts, arguments.num_prompts * settings.output_len
    if (got := (result["completed"], result["total_output_tokens"])) != expected:
        raise NotReadyError(
            f"a block had (requests, tokens) {got} answered, expected {expected}; a ratio of "
            "unequal work says nothing"
        )
    return float(result["request_throughput"])


def _ours(model_option: str, model_name: str, breaker: Breaker, settings: ApiSettings) -> list[str]:
    return [
        *("circuit_breakers.cli", "serve", "--model", model_option, "--mode", "observe"),
        *("--served-name", model_name, "--breaker", str(breaker.path)),
        *("--kv-cache-gib", str(settings.kv_cache_gib)),
        *_engine_flags(settings),
    ]


def _vllms(model_name: str, checkpoint: Path, settings: ApiSettings) -> list[str]:
    return [
        *("vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--served-model-name", model_name, "--enforce-eager", "--seed", "0"),
        # As our engine has them (engine/launch.py), and no log line for each request.
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
        *("--uvicorn-log-level", "warning", "--host", "127.0.0.1"),
        *_engine_flags(settings),
    ]


def _engine_flags(settings: ApiSettings) -> tuple[str, ...]:
    max_num_seqs = max(settings.concurrencies)
    return (
        *("--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(max_num_seqs)),
        *("--dtype", quick_dtype()),
    )


@contextmanager
def _server(module: list[str], probe: str, log: Path, settings: ApiSettings) -> Iterator[str]:
    """The URL of a server that is ready; ended on exit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_SAID_PREFIX)}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_AOT_COMPILE": "0",
    }
    if module[0].startswith("vllm."):
        environment["VLLM_PLUGINS"] = "none"  # a name that no plugin has
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, "--port", str(port)],
            stdout=out,
            stderr=out,
            env=environment,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(f"{url}{probe}", process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        # Refused before the port is bound, 503 while the model loads: both are URLErrors.
        with contextlib.suppress(URLError, ConnectionError), urlopen(url, timeout=5):  # noqa: S310
            return
        time.sleep(0.5)
    raise NotReadyError(
        f"the server for {url} is not ready (exit code {process.poll()}): "
        f"{log.read_text('utf-8', 'replace')[-_LOG_CHARS:]}"
    )
