"""From a recipe file, flags and the model to one resolved recipe, which says what came from where.

    recipe file ─ flags over it ─ "auto" asked of the model ─ checked ─ Recipe
                                                              origins ─ Setting per field

The later of two sources wins. What nobody set takes its default. A Recipe never holds "auto": its
digest, its manifest and its training see the values that were settled here.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from circuit_breakers.errors import ConfigError
from circuit_breakers.hardware import quick_dtype
from circuit_breakers.models import resolve_model
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.recipes.files import read_recipe_file

__all__ = [
    "AUTO",
    "Override",
    "ResolvedRecipe",
    "Setting",
    "auto_learning_rate",
    "parse_override",
    "resolve_recipe",
]

AUTO = "auto"

# Learning rates that are known to work: (parameters, rate). SmolLM2-135M was measured here, 8B is
# the published run. Between them, and above, the rate follows the line through both on log scales.
_SMALL, _LARGE = (135e6, 1e-3), (8e9, 1e-4)


@dataclass(frozen=True, kw_only=True)
class Override:
    """A field that a flag sets."""

    field: str
    """Dotted name, such as lora.rank."""
    value: Any
    """As TOML parses it."""
    flag: str
    """--set, --model."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of a resolved recipe that is not left at its default."""

    field: str
    value: Any
    origin: str
    """The recipe, the flag, or the fact of the model that decided it."""


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe and where its fields come from."""

    recipe: Recipe
    source: str
    """Name of the recipe, or path of its file."""
    settings: tuple[Setting, ...]
    """In the order of the recipe's fields, notes left out."""

    def describe(self) -> str:
        """What was set and by whom, a line each."""
        rows = [(s.field, _short(s.value), s.origin) for s in self.settings]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"recipe {self.source}: what is no default, and where it comes from"]
        lines += [f"  {f:<{widths[0]}}  {v:<{widths[1]}}  {origin}" for f, v, origin in rows]
        return "\n".join(lines)


def parse_override(text: str) -> Override:
    """The override that `--set` gives as FIELD=VALUE.

    Raises:
        ConfigError: it is no FIELD=VALUE, or VALUE is not TOML.
    """
    field, equals, raw = (part.strip() for part in text.partition("="))
    if not equals or not all(part.isidentifier() for part in field.split(".")):
        raise ConfigError(
            f"got --set {text!r}, expected FIELD=VALUE with a dotted field; write for example "
            "--set lora.rank=8"
        )
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"got --set {field}={raw}, whose value is not TOML ({error}), expected a number, true, "
            f"false, a quoted text or a list; quote text: --set '{field}=\"...\"'"
        ) from error
    if set(parsed) != {"value"}:
        raise ConfigError(
            f"got --set {field} with more than one value, expected one; repeat --set for each field"
        )
    return Override(field=field, value=parsed["value"], flag="--set")


def resolve_recipe(
    name_or_path: str | Path,
    overrides: Sequence[Override] = (),
    *,
    find_model: Callable[[str], Path] = lambda name: resolve_model(name).path,
) -> ResolvedRecipe:
    """The recipe of that name or file, with `overrides`, and with "auto" asked of the model.

    Args:
        find_model: local directory of a model by its name; called only where something is "auto".
    Raises:
        ConfigError: no such recipe, not TOML, or a field is unknown, missing, out of range or set
            by two flags.
        ModelError: the model is asked and cannot be read.
    """
    file = read_recipe_file(name_or_path)
    fields: dict[str, Any] = deepcopy(dict(file.fields))
    origins = {field: "recipe" for field, _ in _leaves(fields)}
    flags: dict[str, str] = {}
    for override in overrides:
        for field, value in _leaves(override.value, override.field):
            if field in flags:
                raise ConfigError(
                    f"got {field} from {flags[field]} and again from {override.flag}, expected it "
                    "once; leave one out"
                )
            flags[field] = override.flag
            _set(fields, field, value)
            origins[field] = override.flag
    if "model" not in fields:
        raise ConfigError(
            f"recipe {file.name!r} is not valid: model is missing; expected a value; pass --model "
            "or add it"
        )
    _ask_model(fields, origins, find_model)
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_explain(file.name, error, flags)) from error
    settings = tuple(
        Setting(field=field, value=value, origin=origins[field])
        for field, value in _in_order(recipe, dict(_leaves(fields)))
        if field != "notes"
    )
    return ResolvedRecipe(recipe=recipe, source=file.name, settings=settings)


def auto_learning_rate(num_parameters: int) -> float:
    """Peak learning rate for a base model of that size, to two digits.

    1e-3 up to 135M parameters and 1e-4 at 8B, as these two are known to work; between them and
    above, the power law through both: 1e-3 * (135e6 / parameters) ** 0.564.
    """
    exponent = math.log(_SMALL[1] / _LARGE[1]) / math.log(_LARGE[0] / _SMALL[0])
    rate = _SMALL[1] * min(1.0, (_SMALL[0] / num_parameters) ** exponent)
    return float(f"{rate:.1e}")


def _ask_model(
    fields: dict[str, Any], origins: dict[str, str], find_model: Callable[[str], Path]
) -> None:
    """Replace "auto" by what the model says, or the machine."""
    if fields.get("precision") == AUTO:
        quick = quick_dtype()
        fields["precision"] = "fp32" if quick == "float32" else "bf16"
        origins["precision"] = "machine (slow at bfloat16)" if quick == "float32" else "machine"
    asked = [name for name in ("learning_rate", "chat_template") if fields.get(name) == AUTO]
    if not asked:
        return
    # Deferred: it brings torch and transformers, which listing and checking recipes do without.
    from circuit_breakers_training.recipes.skeleton import count_parameters, has_chat_template

    model_dir = find_model(str(fields["model"]))
    if "learning_rate" in asked:
        count = count_parameters(model_dir)
        fields["learning_rate"] = auto_learning_rate(count)
        origins["learning_rate"] = f"model ({count / 1e6:,.1f}M parameters)"
    if "chat_template" in asked:
        own = has_chat_template(model_dir)
        fields["chat_template"] = "model" if own else "plain"
        origins["chat_template"] = f"model (its tokenizer has {'a' if own else 'no'} template)"


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything that is not a table."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _set(fields: dict[str, Any], field: str, value: Any) -> None:
    *tables, last = field.split(".")
    table = fields
    for depth, name in enumerate(tables):
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"got field {field}, but {'.'.join(tables[: depth + 1])} is no table and has no "
                "fields; correct the name"
            )
        table = inner
    table[last] = value


def _in_order(recipe: Recipe, leaves: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`leaves` in the order of the recipe's fields."""
    order = list(_field_names(type(recipe)))
    return sorted(leaves.items(), key=lambda leaf: order.index(leaf[0]))


def _field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _field_names(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _short(value: Any) -> str:
    text = str(value)
    # A path is worth its width; a table of aggregations is not.
    return text if isinstance(value, str) or len(text) <= 60 else f"{text[:57]}..."


def _explain(source: str, error: ValidationError, flags: Mapping[str, str]) -> str:
    """Every broken field of a recipe with what was got and expected."""
    names = list(_field_names(Recipe))
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or "recipe"
        set_by = f" (from {flags[field]})" if field in flags else ""
        if field == "recipe":  # two fields that do not go together; the message names them
            lines.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "missing":
            lines.append(f"{field} is missing; expected a value; add it")
        elif item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(field, names, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it or correct its name"
            lines.append(f"{field}{set_by} is not a field of a recipe; {hint}")
        else:
            lines.append(f"{field} = {item['input']!r}{set_by}: {item['msg']}; change it")
    return f"recipe {source!r} is not valid: " + " | ".join(lines)
