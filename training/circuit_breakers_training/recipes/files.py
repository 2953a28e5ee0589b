"""Recipes as files: those of this package (`<name>.toml` beside this module) and those of the user.

A file holds the fields of a Recipe that are not defaults. Two of them may be "auto", which only the
model decides (resolution.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from circuit_breakers.errors import ConfigError

__all__ = [
    "AUTO_RECIPE",
    "DEFAULT_RECIPE",
    "RecipeFile",
    "read_recipe_file",
    "recipe_for_model",
    "recipe_names",
]

DEFAULT_RECIPE = "smollm2-135m-instruct"
AUTO_RECIPE = "auto"
"""For every model that has no recipe of its own."""


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """What a recipe file says, not yet checked field by field."""

    name: str
    """Name of the recipe, or path of the file."""
    fields: Mapping[str, Any]
    """Parsed TOML."""

    @property
    def model(self) -> str | None:
        """Base model; None leaves it to the user."""
        return self.fields.get("model")

    @property
    def notes(self) -> str:
        """What it does and why, for people, as one line."""
        return " ".join(str(self.fields.get("notes", "")).split())


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with this package."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(f.name[: -len(".toml")] for f in files if f.name.endswith(".toml")))


def recipe_for_model(model: str | None) -> str:
    """Name of the recipe that was written for `model`; the auto recipe if none was.

    None stands for the default model.
    """
    if model is None:
        return DEFAULT_RECIPE
    files = (read_recipe_file(name) for name in recipe_names())
    return next((file.name for file in files if file.model == model), AUTO_RECIPE)


def read_recipe_file(name_or_path: str | Path) -> RecipeFile:
    """The recipe of that name in this package, or of that TOML file.

    Raises:
        ConfigError: no such recipe, or not TOML.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(
                f"recipe file {name!r} does not exist; expected a TOML file or one of the "
                f"names {', '.join(recipe_names())}; check the path"
            )
        raw = path.read_bytes()
    elif name in recipe_names():
        raw = resources.files(__package__).joinpath(f"{name}.toml").read_bytes()
    else:
        raise ConfigError(
            f"got recipe {name!r}, expected one of {', '.join(recipe_names())} or a path ending in "
            f".toml; use {AUTO_RECIPE!r} or write a recipe file for another model"
        )
    try:
        fields = tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib's own, and those that it lets through
        raise ConfigError(
            f"recipe {name!r} is not TOML: {error}; expected UTF-8 `field = value` lines; correct "
            "the file at that place"
        ) from error
    return RecipeFile(name=name, fields=fields)
