"""A process that holds one vLLM engine and continues texts; generate.py starts it.

JSON lines. In: one object with model_dir, dtype, seed and max_model_len, then one list of requests
per call. Out: {"ready": true}, then per call {"done": n} as texts come in, and {"results": [...]}.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_SEQUENCES = 256  # rows of one step: 300 tokens/s at 128, 510 at 256 (two idle cores)


def main() -> None:
    """Serves requests from stdin until it closes."""
    # A parent that is killed closes nothing in time: a batch may run for many minutes.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The engine's own prints must not mix with the protocol.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    config = json.loads(sys.stdin.readline())

    from vllm import LLM, SamplingParams

    # The seed belongs to the engine: a seed per request kills the CPU engine when a prompt is
    # prefilled in chunks.
    engine = LLM(
        model=config["model_dir"],
        dtype=config["dtype"],
        seed=config["seed"],
        max_model_len=config["max_model_len"],
        max_num_seqs=_SEQUENCES,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    _send(channel, {"ready": True})
    bar = _reporting_bar(channel)
    for line in sys.stdin:
        requests = json.loads(line)
        params = [
            SamplingParams(
                temperature=request["temperature"],
                max_tokens=request["max_new_tokens"],
                stop_token_ids=[request["stop_id"]],
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request["prompt_ids"]} for request in requests]
        outputs = engine.generate(prompts, params, use_tqdm=bar)
        results = []
        for output in outputs:
            written = output.outputs[0]
            finished = written.finish_reason == "stop"
            # vLLM lists the token that ended the text, too.
            ids = written.token_ids[:-1] if finished else written.token_ids
            results.append([written.text, finished, list(ids)])
        _send(channel, {"results": results})


def _send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def _reporting_bar(channel: TextIO) -> Callable[..., Any]:
    from tqdm import tqdm

    class ReportingBar(tqdm):
        """vLLM's progress, sent to the parent instead of drawn."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # vLLM draws a first bar while it reads the prompts.
            self._counts = kwargs.get("desc") == "Processed prompts"
            super().__init__(*args, **{**kwargs, "file": sys.stderr})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                _send(channel, {"done": n})
            return None

    return ReportingBar


if __name__ == "__main__":
    main()
