"""The model's own answers to planned prompts, with those that cannot carry their label dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from circuit_breakers_training.data.generate import Generator, Request
from circuit_breakers_training.data.groups import content_stems
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.magpie import TurnTemplate
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.refusal_words import refuses

__all__ = ["MAX_PROMPT_TOKENS", "TEMPERATURE", "Responses", "reason_to_drop", "write_responses"]

TEMPERATURE: Final = 0.6  # at 0.8 a half of the 135M model's harmful texts lose the subject
MAX_PROMPT_TOKENS: Final = 320
"""Longer prompts get no answer."""

_ATTEMPTS: Final = 3
_MIN_RESPONSE_WORDS: Final = 4
_MIN_RESPONSE_BYTES: Final = 60
"""Twenty Chinese characters; fewer than four words of English are hardly ever as long."""
_SHARED_STEMS: Final = 2
"""Content words of the request that a harmful text must take up."""


@dataclass(frozen=True)
class Responses:
    """What became of the planned prompts."""

    rows: dict[int, Conversation]
    """Finished conversations by index of their plan, ascending."""
    dropped: dict[int, str]
    """Why the other plans have none, by index."""


def write_responses(
    generate: Generator, template: TurnTemplate, planned: Sequence[Planned], max_new_tokens: int
) -> Responses:
    """An answer to each plan, sampled up to three times until it can carry the plan's label."""
    dropped: dict[int, str] = {}
    requests: dict[int, Request] = {}
    for index, plan in enumerate(planned):
        prompt_ids = _prompt_ids(generate.tokenizer, plan)
        if len(prompt_ids) > MAX_PROMPT_TOKENS:
            dropped[index] = f"{plan.label} prompt too long"
            continue
        requests[index] = Request(
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=TEMPERATURE,
            stop_id=template.end_of_turn_id,
        )
    texts: dict[int, str] = {}
    reasons: dict[int, str] = dict.fromkeys(requests, "")
    for attempt in range(_ATTEMPTS):
        title = "responses" if attempt == 0 else "responses, another try"
        waiting = list(reasons)
        results = generate([requests[index] for index in waiting], title)
        for index, generated in zip(waiting, results, strict=True):
            # A text cut at the token limit may end inside a character.
            text = generated.text.rstrip("\ufffd")
            reason = reason_to_drop(planned[index], text)
            if reason is None:
                texts[index] = text
                del reasons[index]
            else:
                reasons[index] = reason
        if not reasons:
            break
    dropped.update(reasons)
    rows = {index: planned[index].finish(texts[index]) for index in sorted(texts)}
    return Responses(rows, dropped)


def reason_to_drop(plan: Planned, text: str) -> str | None:
    """Why `text` cannot carry the label of its prompt; None if it can."""
    # Chinese and Japanese put no blanks between words.
    if len(text.split()) < _MIN_RESPONSE_WORDS and len(text.encode()) < _MIN_RESPONSE_BYTES:
        return f"{plan.label} text too short"
    if plan.label == "benign":
        return None
    if refuses(text):
        return "harmful text refuses"
    # A small model often wanders off, and a text about something else is not harmful.
    asked, said = content_stems(plan.request), content_stems(text)
    if len(asked & said) < min(_SHARED_STEMS, len(asked)):
        return "harmful text is about something else"
    return None


def _prompt_ids(tokenizer: Any, plan: Planned) -> tuple[int, ...]:
    messages = [{"role": m.role, "content": m.content} for m in plan.messages]
    options = {"add_generation_prompt": True}
    if plan.prefill:
        # The template may put something in front of the answer, were it a space.
        messages.append({"role": "assistant", "content": plan.prefill})
        options = {"continue_final_message": True}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tuple(tokenizer.encode(text, add_special_tokens=False))
