"""Harmless prompts sampled from the model's own user turn.

Source: Magpie (Xu et al., arXiv 2406.08464): an aligned model that is given its chat template up to
the start of the user's turn writes a plausible user message. Deviation: prompts with a word of harm
are dropped, since the rows are labelled benign.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.generate import Generator, Request
from circuit_breakers_training.data.groups import drop_near_duplicates

__all__ = ["TurnTemplate", "sample_user_prompts", "turn_template"]

_DRAWS_PER_PROMPT = 1.6  # draws that yield one accepted prompt, measured on SmolLM2-135M-Instruct
_ROUNDS = 3
_MAX_NEW_TOKENS = 64
_MIN_WORDS, _MAX_WORDS = 4, 60

# Starts of words; "$" asks for the whole word, where the start alone would catch robot or warm.
_HARM_STEMS: Final = (  # noqa: SIM905
    "abus addict alcohol antisemit arson assassin assault attack beat$ bigot blackmail bleed blood "
    "bomb brib bully bullie burgla cheat cocaine corpse counterfeit crime$ criminal cruel cyber "
    "danger dead$ deadly death die$ died drug drunk dying erotic exploit explosi extort extremis "
    "fake fascis fentanyl fight firearm forge fraud genocid gun$ guns harass harm$ harmful hate$ "
    "hatred heroin hijack holocaust hostage hurt illegal inject insult intruder jihad kidnap kill "
    "knife lynch malware manipulat massacre meth$ militia missile molest murder naked narcotic "
    "nazi nude opioid overdose phish pirate poison porn prison propaganda prostitut racis racial "
    "rape ransom revenge rifle rob$ robber robbing sabotage scam self-harm sex shoot slave slur "
    "smuggl spy$ spying spyware stab$ stabb stalk steal stole suicid surveil terror theft thief "
    "threat tortur toxic traffick victim violen virus vulnerab war$ wars weapon"
).split()
_HARM = re.compile(
    r"\b(?:" + "|".join(s.replace("$", r"\b") for s in _HARM_STEMS) + ")", re.IGNORECASE
)

_SENTINEL = "USERTURNGOESHERE"


class TurnTemplate(NamedTuple):
    """Token ids around a user turn."""

    before_ids: tuple[int, ...]
    end_of_turn_id: int


def turn_template(tokenizer: Any, model: str) -> TurnTemplate:
    """What the model's chat template puts before a user's text, and the token that ends a turn.

    Raises:
        DataError: the tokenizer has no chat template, or one that changes the user's text.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"model {model!r}: got a tokenizer without a chat template, expected a chat model; "
            "train on an instruct model, choose the plain chat template, or give your own JSONL"
        )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = rendered.partition(_SENTINEL)
    after_ids = tokenizer.encode(after, add_special_tokens=False)
    if not found or not after_ids:
        raise DataError(
            f"model {model!r}: got a chat template that drops or alters the user's text, expected "
            "the text followed by an end-of-turn token; give your own JSONL"
        )
    # A space belongs to the word after it, which the model has to write.
    before_ids = tokenizer.encode(before.rstrip(" "), add_special_tokens=False)
    return TurnTemplate(tuple(before_ids), after_ids[0])


def sample_user_prompts(
    generate: Generator, template: TurnTemplate, count: int, *, against: Sequence[str]
) -> list[str]:
    """Up to `count` distinct harmless prompts in the model's own words.

    Args:
        against: prompts that the sampled ones must not come close to.
    """
    accepted: list[str] = []
    for _ in range(_ROUNDS):
        missing = count - len(accepted)
        if missing <= 0:
            break
        request = Request(
            prompt_ids=template.before_ids,
            max_new_tokens=_MAX_NEW_TOKENS,
            temperature=1.0,
            stop_id=template.end_of_turn_id,
        )
        draws = generate([request] * math.ceil(missing * _DRAWS_PER_PROMPT), "user prompts")
        fresh = [draw.text.strip() for draw in draws if draw.finished and _is_usable(draw.text)]
        accepted += drop_near_duplicates(fresh, against=[*against, *accepted])
    return accepted[:count]


def _is_usable(text: str) -> bool:
    if not _MIN_WORDS <= len(text.split()) <= _MAX_WORDS:
        return False
    return "\ufffd" not in text and "<|" not in text and _HARM.search(text) is None
