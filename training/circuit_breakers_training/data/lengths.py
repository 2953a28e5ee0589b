"""How long conversations are in tokens, so that nothing is cut without notice."""

import math
from collections.abc import Sequence
from typing import Any, Final

from circuit_breakers.errors import ModelError
from circuit_breakers.models import BUILTIN_MODELS, resolve_model
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.recipes.config import ChatTemplate
from circuit_breakers_training.render import render, set_chat_template

__all__ = ["open_tokenizer", "token_lengths"]

_QUANTILES: Final = (0.5, 0.9, 0.99)
_UNLIMITED: Final = 1 << 40


def open_tokenizer(model: str, chat_template: ChatTemplate) -> Any:
    """The tokenizer of a model; of one on the hub, nothing else is downloaded.

    Args:
        model: built-in name, directory or hub id.
        chat_template: what it renders conversations with.
    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    place = str(resolve_model(model).path) if model in BUILTIN_MODELS else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise ModelError(
            f"got model {model!r}, expected a built-in name, a directory or a hub id with a "
            f"tokenizer ({reason}); check the name"
        ) from e
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def token_lengths(
    tokenizer: Any, rows: Sequence[Conversation], *, max_length: int
) -> dict[str, dict[str, int]]:
    """Lengths by label, as tokens of prompt and response under the model's chat template.

    Returns:
        For each label the number of rows, the shortest, quantiles, the longest, how many exceed
        `max_length` and would be cut at the end, and of how many the prompt alone does, so that
        nothing of the response is left.
    Raises:
        DataError: the chat template does not render a conversation as it is.
        ModelError: the tokenizer has no chat template.
    """
    by_label: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        rendered = render(tokenizer, row.messages, max_length=_UNLIMITED)
        length = len(rendered.ids), rendered.num_prompt_tokens
        by_label.setdefault(row.label, []).append(length)
    return {label: _describe(by_label[label], max_length) for label in sorted(by_label)}


def _describe(lengths: Sequence[tuple[int, int]], max_length: int) -> dict[str, int]:
    whole = sorted(total for total, _ in lengths)
    # The smallest length that covers the share: a length that occurs, not a value between two.
    quantiles = {f"p{round(100 * q)}": whole[math.ceil(q * len(whole)) - 1] for q in _QUANTILES}
    return {
        "conversations": len(whole),
        "min": whole[0],
        **quantiles,
        "max": whole[-1],
        "max_length": max_length,
        "over_max_length": sum(total > max_length for total in whole),
        "without_response": sum(prompt >= max_length for _, prompt in lengths),
    }
