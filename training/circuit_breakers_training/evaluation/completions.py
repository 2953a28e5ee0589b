"""What a model writes for each attempt, as the very token ids that it sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from circuit_breakers.errors import ConfigError
from circuit_breakers.models import ResolvedModel
from circuit_breakers_training.data.generate import Backend, Request, open_generator
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.data.magpie import turn_template
from circuit_breakers_training.evaluation.suites import Attempt
from circuit_breakers_training.render import (
    Rendered,
    TemplateSource,
    load_tokenizer,
    render,
    render_prompt,
)

__all__ = [
    "Completion",
    "Prompts",
    "Sampling",
    "check_lengths",
    "continued_ids",
    "prompt_ids",
    "render_attempts",
    "write_completions",
]

_NO_LIMIT = 1 << 30


class Sampling(NamedTuple):
    """How both models write."""

    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    seed: int
    backend: Backend


class Completion(NamedTuple):
    """One text, after prompt and prefill."""

    rendered: Rendered
    """Prompt and prefill count as prompt, as in serving."""
    text: str
    finished: bool
    """The model ended the text itself."""

    @property
    def response_ids(self) -> tuple[int, ...]:
        """Tokens that the model wrote."""
        return self.rendered.ids[self.rendered.num_prompt_tokens :]

    def first_tokens(self, count: int) -> Rendered:
        """Prompt and the first `count` tokens of the response."""
        num_prompt = self.rendered.num_prompt_tokens
        return Rendered(ids=self.rendered.ids[: num_prompt + count], num_prompt_tokens=num_prompt)


class Prompts(NamedTuple):
    """What both models continue."""

    ids: list[tuple[int, ...]]
    """One entry for each attempt."""
    max_model_len: int
    """Tokens of the longest one with its completion."""


def render_attempts(
    model: ResolvedModel,
    attempts: Sequence[Attempt],
    *,
    chat_template: TemplateSource,
    max_new_tokens: int,
) -> Prompts:
    """The attempts as the model reads them, by the template that it is served with.

    Raises:
        ConfigError: an attempt does not fit into the model's context.
    """
    tokenizer = load_tokenizer(model.path, chat_template)
    ids = [prompt_ids(tokenizer, attempt) for attempt in attempts]
    longest = check_lengths(
        attempts, ids, max_new_tokens=max_new_tokens, context=model.max_position_embeddings
    )
    return Prompts(ids, longest)


def prompt_ids(tokenizer: Any, attempt: Attempt) -> tuple[int, ...]:
    """Token ids that the model continues: the template's prompt and the first words given."""
    prefill = (Message("assistant", attempt.prefill),) if attempt.prefill else ()
    return continued_ids(tokenizer, (*attempt.messages, *prefill))


def continued_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids that the model continues; an assistant's turn at the end goes on where it stops."""
    if messages[-1].role == "assistant":
        return render(tokenizer, messages, max_length=_NO_LIMIT).ids
    return render_prompt(tokenizer, messages)


def check_lengths(
    attempts: Sequence[Attempt],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    context: int,
) -> int:
    """Tokens of the longest attempt, prompt and completion.

    Raises:
        ConfigError: an attempt does not fit into the model's context.
    """
    longest = 0
    for attempt, ids in zip(attempts, prompts, strict=True):
        needed = len(ids) + max_new_tokens
        if needed > context:
            raise ConfigError(
                f"suite {attempt.suite!r}, technique {attempt.technique!r}: got a prompt of "
                f"{len(ids)} tokens and {max_new_tokens} to write, expected at most {context} "
                "together, the model's context; lower --max-new-tokens or leave the suite out"
            )
        longest = max(longest, needed)
    return longest


def write_completions(
    model_dir: Path,
    model_name: str,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    *,
    chat_template: TemplateSource,
    max_model_len: int,
    title: str,
) -> list[Completion]:
    """Completion of each prompt, in order; equal prompts are continued once.

    The model is gone from memory afterwards.

    Raises:
        DataError: the chat template has no token that ends a turn.
        ModelError: the model cannot be loaded, or stops.
    """
    distinct = list(dict.fromkeys(prompts))
    with open_generator(
        model_dir,
        sampling.backend,
        seed=sampling.seed,
        max_model_len=max_model_len,
        chat_template=chat_template,
    ) as generate:
        template = turn_template(generate.tokenizer, model_name)
        requests = [
            Request(
                prompt_ids=ids,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                stop_id=template.end_of_turn_id,
            )
            for ids in distinct
        ]
        written = dict(zip(distinct, generate(requests, title), strict=True))
    return [
        Completion(
            Rendered(ids=(*ids, *written[ids].ids), num_prompt_tokens=len(ids)),
            written[ids].text,
            written[ids].finished,
        )
        for ids in prompts
    ]
