"""Conversations to token ids, as the server's engine will see them.

A served conversation is the chat template's prompt followed by generated tokens. The engine stops
when it samples the closing token (<|im_end|>, </s>, ...) and never runs the model on it, so a
rendered conversation ends with the last token of the assistant's text: training and calibration
see exactly the tokens that serving scores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from circuit_breakers.errors import DataError, ModelError
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.recipes.config import ChatTemplate

__all__ = [
    "PLAIN_TEMPLATE",
    "ChatMessage",
    "Rendered",
    "RenderedSet",
    "TemplateSource",
    "load_tokenizer",
    "render",
    "render_all",
    "render_prompt",
    "set_chat_template",
]

logger = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Chat template for base models, which bring none: turns as paragraphs, each after its role.

The generation prompt ends without a space, as tokenizers keep a space with the word behind it.
"""

TemplateSource = ChatTemplate | Path | None
"""As a recipe says it, or a breaker: the file that it brings, or None for the model's own."""


class ChatMessage(Protocol):
    """A turn of a conversation, of the data format or of a manifest's canary."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """One conversation as token ids."""

    ids: tuple[int, ...]
    """Prompt tokens, then response tokens; no closing token, no padding."""
    num_prompt_tokens: int
    """Everything up to and including the assistant's header."""
    num_earlier_tokens: int = 0
    """Tokens before the last user turn, if the assistant has spoken before; else 0."""
    num_truncated: int = 0
    """Response tokens cut off at the end."""

    @property
    def response_mask(self) -> tuple[bool, ...]:
        """True at the assistant's last message, one entry a token."""
        return tuple(i >= self.num_prompt_tokens for i in range(len(self.ids)))


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedSet:
    """Many conversations as token ids, and what was lost on the way."""

    rows: tuple[Rendered, ...]
    """One entry a kept conversation, in order."""
    kept: tuple[int, ...]
    """Index of each row in the conversations that were given."""
    num_truncated: int
    """Conversations whose response was cut."""
    num_dropped: int
    """Conversations left out: no token of the response fits, or the response has none."""


def load_tokenizer(model_dir: Path, chat_template: TemplateSource) -> Any:
    """The model's tokenizer, which renders conversations as the recipe or the breaker says.

    Raises:
        ModelError: the directory holds no tokenizer that can be loaded.
    """
    # Deferred: transformers takes seconds to import.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a tokenizer from {str(model_dir)!r} ({' '.join(str(error).split())}); "
            "expected one beside config.json; save it there with tokenizer.save_pretrained"
        ) from error
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def set_chat_template(tokenizer: Any, chat_template: TemplateSource) -> None:
    """Make `tokenizer` render conversations as the recipe or the breaker says."""
    if isinstance(chat_template, Path):
        tokenizer.chat_template = chat_template.read_text("utf-8")
    elif chat_template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE


def render_prompt(tokenizer: Any, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
    """Token ids of a conversation that the assistant is to continue.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    text = _template(tokenizer, messages, add_generation_prompt=True)
    return _tokenize(tokenizer, text)


def render(tokenizer: Any, messages: Sequence[ChatMessage], *, max_length: int) -> Rendered:
    """Token ids of a conversation that ends with the assistant's message.

    Prompt and response are tokenized as one text where that keeps the prompt's tokens, and apart
    otherwise, as in serving, where no merge can reach back into the prompt.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_length: tokens kept at most; the end of the response is cut.
    Raises:
        DataError: the last message is not the assistant's, or the template does not render the
            prompt as a prefix of the conversation.
        ModelError: the tokenizer has no chat template.
    """
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError(
            f"got messages with roles {[m.role for m in messages]}, expected at least two with the "
            "assistant's last; add the assistant's answer to the conversation"
        )
    prompt = _template(tokenizer, messages[:-1], add_generation_prompt=True)
    if messages[-1].content.strip():
        full = _template(tokenizer, messages, continue_final_message=True)
    else:
        full = prompt
    if not full.startswith(prompt):
        raise DataError(
            "the chat template does not render the prompt as a prefix of the conversation, so the "
            f"response cannot be told from it; got a conversation of {len(full)} characters for a "
            f"prompt of {len(prompt)}; leave out turns that the template rewrites or use a chat "
            "template that only appends"
        )
    prompt_ids = _tokenize(tokenizer, prompt)
    ids = _tokenize(tokenizer, full)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + _tokenize(tokenizer, full[len(prompt) :])
    return Rendered(
        ids=ids[:max_length],
        num_prompt_tokens=min(len(prompt_ids), max_length),
        num_earlier_tokens=min(_num_earlier_tokens(tokenizer, messages, prompt_ids), max_length),
        num_truncated=max(0, len(ids) - max(max_length, len(prompt_ids))),
    )


def _num_earlier_tokens(
    tokenizer: Any, messages: Sequence[ChatMessage], prompt_ids: tuple[int, ...]
) -> int:
    """Tokens that the prompt shares with the conversation up to the assistant's message before."""
    last = max((i for i, m in enumerate(messages[:-1]) if m.role == "assistant"), default=None)
    if last is None:
        return 0
    earlier_ids = _tokenize(tokenizer, _template(tokenizer, messages[: last + 1]))
    pairs = zip(earlier_ids, prompt_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def render_all(
    tokenizer: Any, conversations: Sequence[Conversation], *, max_length: int
) -> RenderedSet:
    """Every conversation of which at least one response token is left, with the losses counted."""
    rows: list[Rendered] = []
    kept: list[int] = []
    for index, conversation in enumerate(conversations):
        row = render(tokenizer, conversation.messages, max_length=max_length)
        if len(row.ids) > row.num_prompt_tokens:
            rows.append(row)
            kept.append(index)
    num_truncated = sum(row.num_truncated > 0 for row in rows)
    num_dropped = len(conversations) - len(rows)
    if num_truncated or num_dropped:
        logger.warning(
            "rendered %d conversations to at most %d tokens: %d cut at the end, %d left out as "
            "no response token fits",
            len(conversations),
            max_length,
            num_truncated,
            num_dropped,
        )
    return RenderedSet(
        rows=tuple(rows), kept=tuple(kept), num_truncated=num_truncated, num_dropped=num_dropped
    )


def _template(tokenizer: Any, messages: Sequence[ChatMessage], **options: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, expected one, as "
            "the server renders chats with it; use an instruction-tuned model, set chat_template "
            'to "plain" in the recipe (--plain-template for data), or add chat_template.jinja to '
            "the model directory"
        )
    plain = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def _tokenize(tokenizer: Any, text: str) -> tuple[int, ...]:
    # The template writes special tokens itself; the engine's chat route adds none either.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
