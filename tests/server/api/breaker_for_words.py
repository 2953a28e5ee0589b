"""A breaker that trips on words: its probes read which token is under them, so trips are foreseen.

The adapter is a LoRA of zeros, so the model stays what it is. Each probe is a ridge regression on
the residual stream, for "this token is the word".
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from circuit_breakers.artifact import Breaker, ProbeWeights, save_breaker
from circuit_breakers.artifact.manifest import (
    Aggregation,
    Calibration,
    Canary,
    Message,
    OperatingPoint,
    ProbeSpec,
    ScoreHistogram,
)
from circuit_breakers.models import ResolvedModel

__all__ = [
    "LOOSE_FPR",
    "LOOSE_THRESHOLD",
    "PARIS",
    "SEEN",
    "ZEBRA",
    "WordProbe",
    "write_word_breaker",
]

FloatArray = npt.NDArray[np.float32]


class WordProbe(NamedTuple):
    name: str
    word: str
    """One token, with the space before it."""
    layer: int


PARIS = WordProbe("paris", " Paris", 3)
"""The model answers "The capital of France is Paris.": a trip while generating."""
ZEBRA = WordProbe("zebra", " zebra", 12)
"""Said by the client: a trip on the prompt."""

_CONTEXTS = (
    "The capital of France is{}.",
    "I once saw{} in a dream.",
    "Tell me more about{}, please, in one short sentence.",
    "You are a helpful AI assistant. Explain{} to a child.",
    "First{}, then Rome, then Berlin, then a horse and a cat.",
    "What do you know of{}? I know that it is big.",
)
_OTHER_WORDS = (
    " Rome",
    " a horse",
    " London",
    " the sea",
    " chess",
    " banana",
    " Italy",
    " nothing",
)


SEEN = "What is the capital of Norway?"
"""A prompt that the breaker says it was made from."""
SEEN_DIGEST = hashlib.sha256(SEEN.lower().encode()).hexdigest()

LOOSE_FPR = 0.05
LOOSE_THRESHOLD = -0.25
"""Of the other promise that the breaker makes; no word lies between the two thresholds."""

# Clopper-Pearson bounds of no trip in 300, 1 - 0.05 ** (1 / 300), and of 8.
_PROMISE: dict[str, Any] = {
    "target_fpr": 0.01,
    "num_conversations": 300,
    "num_trips": 0,
    "fpr_upper_bound": 0.00994,
}
_LOOSE = OperatingPoint(
    target_fpr=LOOSE_FPR,
    threshold_logit=LOOSE_THRESHOLD,
    num_conversations=300,
    num_trips=8,
    fpr_upper_bound=0.04761,
)


_HISTOGRAM = ScoreHistogram(edges=(-5.0,), counts=(150, 150))


def write_word_breaker(out: Path, model: ResolvedModel) -> Breaker:
    """A breaker with the probes PARIS and ZEBRA."""
    probes = (PARIS, ZEBRA)
    fitted = _fit(model, probes)
    adapter = out.with_name(f"{out.name}-adapter")
    write_rank_1_adapter(adapter, model, 0.0)
    return save_breaker(
        out,
        name="words",
        base_model=model.spec(),
        recipe={},
        data_sha256={},
        probes=[
            ProbeSpec(
                name=probe.name,
                layer=probe.layer,
                aggregation=Aggregation(kind="max"),
                threshold_logit=0.0,
                calibration=Calibration(
                    **_PROMISE,
                    max_tokens=256,
                    histogram={"prompt": _HISTOGRAM, "completion": _HISTOGRAM},
                    curve=(_LOOSE, OperatingPoint(**_PROMISE, threshold_logit=0.0)),
                ),
            )
            for probe in probes
        ],
        weights=fitted,
        adapter_dir=adapter,
        canaries=(
            _canary("harmful", ("user", "Do you like the zebra?")),
            _canary("harmful", ("user", "Name a city."), ("assistant", "I would say Paris")),
            _canary("benign", ("user", "What is the capital of Italy?")),
        ),
        extra_files={
            "prompt_digests.json": json.dumps(
                {"train": [SEEN_DIGEST], "selection": [], "calibration": [], "test": []}
            ).encode(),
            "metrics.json": json.dumps(
                {"perplexity": {"benign: topic": {"base": 4.0, "merged": 4.04}}}
            ).encode(),
        },
    )


def _canary(label: str, *messages: tuple[str, str]) -> Canary:
    return Canary(
        messages=tuple(Message(role=role, content=text) for role, text in messages),  # type: ignore[arg-type]
        label=label,  # type: ignore[arg-type]
    )


def _fit(model: ResolvedModel, probes: tuple[WordProbe, ...]) -> dict[str, ProbeWeights]:
    """Weights by probe name; 0 lies halfway between the word's lowest and all others' highest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    lm = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, local_files_only=True
    ).eval()
    token_ids: list[int] = []
    streams: dict[int, list[FloatArray]] = {probe.layer: [] for probe in probes}
    for text in _texts(tokenizer, [probe.word for probe in probes]):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = lm(ids, output_hidden_states=True).hidden_states
        # Position 0 is an attention sink, far from every other.
        token_ids += ids[0, 1:].tolist()
        for layer, rows in streams.items():
            rows.append(hidden[layer + 1][0, 1:].numpy())
    fitted = {}
    for probe in probes:
        (word_id,) = tokenizer(probe.word).input_ids
        is_word = np.array(token_ids) == word_id
        fitted[probe.name] = _ridge(np.concatenate(streams[probe.layer]), is_word)
    return fitted


def _texts(tokenizer: Any, words: list[str]) -> list[str]:
    """Each word in plain texts and in chats, next to other words."""
    plain = [context.format(w) for w in (*words, *_OTHER_WORDS) for context in _CONTEXTS]
    return plain + [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in plain[::3]
    ]


def _ridge(stream_ND: FloatArray, is_word_N: npt.NDArray[np.bool_]) -> ProbeWeights:
    mean_D, scale = stream_ND.mean(0), float(stream_ND.std())
    x_ND = (stream_ND - mean_D) / scale
    weight_D = np.linalg.solve(
        x_ND.T @ x_ND + np.eye(x_ND.shape[1]), x_ND.T @ (is_word_N * 20.0 - 10.0)
    )
    weight_D = weight_D / scale
    logit_N = stream_ND @ weight_D
    low, high = logit_N[is_word_N].min(), logit_N[~is_word_N].max()
    assert low > high, "the words are not separable at these layers"
    return ProbeWeights(weight_D.astype(np.float32), float(-(low + high) / 2))


def write_rank_1_adapter(out: Path, model: ResolvedModel, scale: float) -> Path:
    """A LoRA on the first block's queries; scale 0 changes nothing."""
    rng = np.random.default_rng(5)
    out.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    width = model.hidden_size
    save_file(
        {
            f"{prefix}.lora_A.weight": np.full((1, width), 0.01, np.float32),
            f"{prefix}.lora_B.weight": rng.normal(0, scale, (width, 1)).astype(np.float32),
        },
        out / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out
