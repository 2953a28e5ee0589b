"""Where transformers writes; what it writes is compared in ../evaluation/test_completions.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from circuit_breakers_training.data.generate import Generated, Request, open_generator

REQUEST = Request(prompt_ids=(2, 5, 6), max_new_tokens=4, temperature=0.0, stop_id=4)


def _write(model_dir: Path, device: str | None) -> list[Generated]:
    with open_generator(
        model_dir,
        "transformers",
        seed=0,
        max_model_len=64,
        chat_template="model",
        device=device,
    ) as generate:
        return generate([REQUEST], "test")


# Meta is the one device besides the CPU that every machine has.
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ids_go_where_the_model_is(
    tiny_llama: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, str]] = []

    # A model on meta has no values to write with, so the text is one that ends at once.
    def stop(model: Any, *, input_ids: Any, attention_mask: Any, **_: Any) -> torch.Tensor:
        seen.append((model.device.type, input_ids.device.type, attention_mask.device.type))
        return torch.full((len(input_ids), input_ids.shape[1] + 1), REQUEST.stop_id)

    monkeypatch.setattr(LlamaForCausalLM, "generate", stop)
    assert _write(tiny_llama, device) == [Generated("", True)]
    assert seen == [(device, device, device)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_there_writes_what_the_cpu_would(tiny_llama: Path) -> None:
    on_cpu = _write(tiny_llama, "cpu")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert _write(tiny_llama, None) == on_cpu
    assert torch.cuda.max_memory_allocated() > before
