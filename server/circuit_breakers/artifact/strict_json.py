"""JSON that every reader takes for the same: keys once, and numbers that JSON can say."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["load_json"]


def load_json(data: bytes | str) -> Any:
    """The value in `data`.

    Raises:
        ValueError: not JSON, a key is there twice, a number is NaN or beyond a float, or it is
            nested too deeply.
    """
    try:
        return json.loads(
            data,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers disagree on which of two equal keys counts, so what was reviewed may not be what runs.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    # Python reads 1e999 as infinity, which JSON cannot say again.
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:24]} is beyond a float")
    return value
