"""The base model writes text: one batched run with vLLM when it is there, else transformers."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from circuit_breakers.errors import ConfigError, ModelError
from circuit_breakers.hardware import pick_device, quick_dtype
from circuit_breakers_training.render import TemplateSource, load_tokenizer

__all__ = ["Backend", "Generated", "Generator", "Request", "open_generator", "pick_backend"]

Backend = Literal["vllm", "transformers"]

_BATCH: Final = 64  # rows of one transformers batch; 128 is a quarter faster but takes 6 GB
_CPU_WORKERS: Final = 2
"""vLLM processes on a CPU, each with one thread: threads that wait for each other crawl as soon as
another program needs a core (19 tokens/s against 316 with one thread). A constant, since the texts
depend on which process wrote them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token each time."""
    stop_id: int
    """Token that ends the text; it is not part of the result."""


@dataclass(frozen=True)
class Generated:
    """Text of one request."""

    text: str
    finished: bool
    """The model ended the text itself, before max_new_tokens."""
    ids: tuple[int, ...] = ()
    """Tokens of the text, without the one that ended it."""


class Generator(Protocol):
    """Continues many texts in one call."""

    tokenizer: Any

    def __call__(self, requests: Sequence[Request], title: str) -> list[Generated]:
        """Results in the order of `requests`, with a progress bar called `title`."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


def pick_backend(wanted: Backend | None = None) -> Backend:
    """`wanted`, or vLLM if it is installed, else transformers.

    Raises:
        ConfigError: vLLM is wanted but not installed.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not has_vllm:
        raise ConfigError(
            "got backend 'vllm' without vLLM, expected it installed; "
            "install the serve extra, or pass the backend 'transformers'"
        )
    return wanted or ("vllm" if has_vllm else "transformers")


@contextmanager
def open_generator(
    model_dir: Path,
    backend: Backend,
    *,
    seed: int,
    max_model_len: int,
    chat_template: TemplateSource,
    device: str | None = None,
) -> Iterator[Generator]:
    """A generator on the model in `model_dir`, released at the end of the block.

    Args:
        chat_template: what its tokenizer renders conversations with.
        device: where transformers runs it, as PyTorch names it; by default, where the rest of
            training runs. vLLM chooses its own.
    Raises:
        ModelError: there is no tokenizer, or vLLM cannot load the model, or stops later.
    """
    tokenizer = load_tokenizer(model_dir, chat_template)
    generator: Generator = (
        _VllmGenerator(model_dir, tokenizer, seed=seed, max_model_len=max_model_len)
        if backend == "vllm"
        else _TransformersGenerator(model_dir, tokenizer, seed=seed, device=device or pick_device())
    )
    try:
        yield generator
    finally:
        generator.close()


class _VllmGenerator:
    """vLLM in processes of its own: nothing of it stays in the caller's, which trains next."""

    def __init__(self, model_dir: Path, tokenizer: Any, *, seed: int, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        count = 1 if pick_device() == "cuda" else min(_CPU_WORKERS, os.cpu_count() or 1)
        config = {
            "model_dir": str(model_dir),
            "dtype": quick_dtype(),
            "max_model_len": max_model_len,
        }
        self._workers: list[_Worker] = []
        try:
            for i in range(count):
                self._workers.append(_Worker({**config, "seed": seed + i}))
            for worker in self._workers:
                worker.receive()
        except BaseException:
            self.close()
            raise

    def __call__(self, requests: Sequence[Request], title: str) -> list[Generated]:
        count = len(self._workers)
        results: list[Generated] = [Generated("", False)] * len(requests)
        with _progress() as progress, ThreadPoolExecutor(count) as pool:
            task = progress.add_task(title, total=len(requests))
            parts = [
                pool.submit(worker.generate, requests[i::count], progress, task)
                for i, worker in enumerate(self._workers)
            ]
            for i, part in enumerate(parts):
                results[i::count] = part.result()
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Worker:
    def __init__(self, config: dict[str, Any]) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "",  # the base model writes: no guard
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all workers bind to the first core
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "circuit_breakers_training.data.vllm_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        self._send(config)

    def generate(
        self, requests: Sequence[Request], progress: Progress, task: TaskID
    ) -> list[Generated]:
        self._send([asdict(request) for request in requests])
        while True:
            message = self.receive()
            if "results" in message:
                return [
                    Generated(text, finished, tuple(ids))
                    for text, finished, ids in message["results"]
                ]
            progress.advance(task, message["done"])

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            # Closing flushes, and nobody reads any more.
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> ModelError:
        code = self._process.wait()
        self._log.seek(0)
        tail = "\n".join(self._log.read().splitlines()[-15:])
        return ModelError(
            f"got a vLLM process that stopped with exit code {code}, expected texts from the "
            f"model; free memory, or pass the backend 'transformers'. Its last lines:\n{tail}"
        )


class _TransformersGenerator:
    def __init__(self, model_dir: Path, tokenizer: Any, *, seed: int, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        self.tokenizer = tokenizer
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, local_files_only=True, use_safetensors=True, dtype=quick_dtype()
        )
        self._model.eval().to(device)

    def __call__(self, requests: Sequence[Request], title: str) -> list[Generated]:
        results: list[Generated] = [Generated("", False)] * len(requests)
        # Rows of one batch share their settings and have similar lengths.
        order = sorted(
            range(len(requests)),
            key=lambda i: (*_settings(requests[i]), len(requests[i].prompt_ids)),
        )
        with _progress() as progress:
            task = progress.add_task(title, total=len(requests))
            for batch in _batches(order, requests):
                texts = self._generate([requests[i] for i in batch])
                for i, text in zip(batch, texts, strict=True):
                    results[i] = text
                progress.advance(task, len(batch))
        return results

    def close(self) -> None:
        del self._model

    def _generate(self, batch: Sequence[Request]) -> list[Generated]:
        # B requests, T tokens; padded on the left so that all continue at the same position.
        import torch

        first = batch[0]
        width = max(len(request.prompt_ids) for request in batch)
        ids_BT = torch.full((len(batch), width), first.stop_id)
        mask_BT = torch.zeros((len(batch), width), dtype=torch.long)
        for row, request in enumerate(batch):
            start = width - len(request.prompt_ids)
            ids_BT[row, start:] = torch.tensor(request.prompt_ids)
            mask_BT[row, start:] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if first.temperature:
            sampling = {
                "do_sample": True,
                "temperature": first.temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        with torch.inference_mode():
            out_BT = self._model.generate(
                input_ids=ids_BT.to(self._model.device),
                attention_mask=mask_BT.to(self._model.device),
                max_new_tokens=first.max_new_tokens,
                **sampling,
                eos_token_id=first.stop_id,
                pad_token_id=first.stop_id,
            )
        results = []
        for new_ids in out_BT[:, width:].tolist():
            finished = first.stop_id in new_ids
            kept = new_ids[: new_ids.index(first.stop_id)] if finished else new_ids
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            results.append(Generated(text, finished, tuple(kept)))
        return results


def _batches(order: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        full = len(batch) == _BATCH
        if batch and (full or _settings(requests[i]) != _settings(requests[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _settings(request: Request) -> tuple[float, int, int]:
    return request.temperature, request.max_new_tokens, request.stop_id


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
