"""What a request may not ask for when it comes to the engine by one of vLLM's own routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.request_policy import own_args
from circuit_breakers.engine.requests import (
    check_prompt,
    check_sampling_params,
    control_token_ids,
)
from circuit_breakers.errors import ConfigError
from circuit_breakers.guard.policy import Policy
from circuit_breakers.models import ResolvedModel

from ...vllm_release import needs_vllm_0_32


def params(**changes: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0, "seed": 1, "logprobs": 2, "stop": ["end"]},
        {"n": 3, "extra_args": {}, "logit_bias": {5: 1.0}, "min_tokens": 2},
        {"stop_token_ids": [2]},
    ],
)
def test_ordinary_parameters_pass(changes: dict[str, Any]) -> None:
    check_sampling_params(params(**changes), control_token_ids=frozenset({2}), on_cpu=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"stop_token_ids": [2, 5]}, "stop_token_ids"),
        ({"include_stop_str_in_output": True, "stop": ["x"]}, "include_stop_str_in_output"),
        ({"extra_args": {"kv_transfer_params": {}}}, "extra_args"),
        ({"trace_decode_token_ids": [5, 6]}, "trace_decode_token_ids"),
        ({"seed": 1, "temperature": 0.5}, "seed"),
    ],
)
def test_parameter_that_tells_of_unscored_tokens_is_refused(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"got {named}.*expected none"):
        check_sampling_params(params(**changes), control_token_ids=frozenset({2}), on_cpu=True)


def test_a_policy_passes_only_as_the_guard_makes_it(breaker: Breaker) -> None:
    own = own_args(Policy.from_manifest(breaker.manifest, "observe"))
    check_sampling_params(params(extra_args=own))
    with pytest.raises(ConfigError, match="got extra_args"):
        check_sampling_params(params(extra_args=dict(own)))


def test_repetition_detection_is_refused() -> None:
    from vllm.sampling_params import RepetitionDetectionParams

    detection = RepetitionDetectionParams(max_pattern_size=4, min_count=2)
    with pytest.raises(ConfigError, match="repetition_detection"):
        check_sampling_params(params(repetition_detection=detection))


def test_seed_is_refused_on_the_cpu_only() -> None:
    check_sampling_params(params(seed=1, temperature=0.5), on_cpu=False)


def test_pooling_is_refused() -> None:
    from vllm import PoolingParams

    with pytest.raises(ConfigError, match="got PoolingParams"):
        check_sampling_params(PoolingParams())


@pytest.mark.parametrize(
    "prompt", ["text", [1, 2], {"prompt": "text"}, {"type": "token", "prompt_token_ids": [1]}]
)
def test_text_and_tokens_pass(prompt: Any) -> None:
    check_prompt(prompt)


async def _stream() -> AsyncGenerator[str, None]:
    yield "text"


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ({"type": "multimodal"}, "multimodal"),
        ({"type": "enc_dec"}, "enc_dec"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "multimodal"),
        ({"prompt_embeds": 1}, "embeds"),
        (_stream(), "async_generator"),
    ],
)
def test_other_prompts_are_refused(prompt: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"kind '{kind}'"):
        check_prompt(prompt)


def test_control_tokens_are_those_that_the_tokenizer_marks(smollm2: ResolvedModel) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.path, local_files_only=True)
    special = control_token_ids(tokenizer)
    assert tokenizer.eos_token_id in special
    (word,) = tokenizer(" Paris").input_ids
    assert word not in special


@needs_vllm_0_32
def test_beam_search_does_not_start_offline(llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    search = BeamSearchParams(beam_width=2, max_tokens=2)
    with pytest.raises(VLLMValidationError, match="beam search"):
        llm.beam_search([{"prompt": "Hello"}], search)
