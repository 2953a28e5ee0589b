"""A saved breaker's report, written again, elsewhere: from its metrics.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from circuit_breakers.artifact import load_breaker
from circuit_breakers.errors import ArtifactError, ConfigError
from circuit_breakers_training.report.contents import build_document
from circuit_breakers_training.report.markdown import to_markdown
from circuit_breakers_training.report.page import to_html

__all__ = ["RebuiltReport", "rebuild_report"]

_METRICS = "metrics.json"
_NEEDED = ("name", "model", "probe", "test")


class RebuiltReport(NamedTuple):
    page: Path
    markdown: Path
    """Without pictures, which are in the page."""


def rebuild_report(directory: Path, page: Path, *, overwrite: bool = False) -> RebuiltReport:
    """Write `page` and the Markdown beside it, for the breaker in `directory`.

    The artifact is verified first and left as it is: its manifest has a digest of every file.

    Raises:
        ArtifactError: the breaker is not sound, or has no metrics that a report can be made of.
        ConfigError: `page` is no .html file, is taken, or lies in a breaker.
    """
    markdown = page.with_suffix(".md")
    _check_place(page, markdown, overwrite)
    breaker = load_breaker(directory)
    if _METRICS not in breaker.manifest.files:
        raise ArtifactError(
            f"{directory}: got a breaker without {_METRICS}, expected one that training saved; "
            "train it again to have a report"
        )
    metrics = _read_metrics(directory / _METRICS)
    metrics.setdefault("created", f"{breaker.manifest.created:%Y-%m-%dT%H:%M:%SZ}")
    try:
        document = build_document(metrics, digest=breaker.digest)
        texts = {page: to_html(document), markdown: to_markdown(document, pictures=False)}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{directory / _METRICS}: got values that make no report ({error!r}), expected those "
            "that training saved; train the breaker again, or upgrade circuit-breakers if a newer "
            "version wrote it"
        ) from error
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return RebuiltReport(page, markdown)


def _check_place(page: Path, markdown: Path, overwrite: bool) -> None:
    if page.suffix != ".html":
        raise ConfigError(f"got {str(page)!r} for the report, expected a path that ends in .html")
    folder = page.absolute().parent
    if not folder.is_dir():
        raise ConfigError(
            f"got {str(page)!r} for the report, expected a file in a directory that exists; "
            "make the directory first"
        )
    for parent in (folder.resolve(), *folder.resolve().parents):
        if (parent / "manifest.json").is_file() and (parent / "probes.safetensors").is_file():
            raise ConfigError(
                f"got {str(page)!r} for the report, which lies in the breaker {parent}; expected a "
                "path outside: a breaker with a file that its manifest does not list is refused"
            )
    for path in (page, markdown):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists, expected a new file; choose another or overwrite it")


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: got text that is not JSON ({error}), expected the metrics of a training run; "
            "train the breaker again"
        ) from error
    missing = [key for key in _NEEDED if not isinstance(metrics, dict) or key not in metrics]
    if missing:
        raise ArtifactError(
            f"{path}: got no {', '.join(missing)}, expected the metrics of a training run; train "
            "the breaker again"
        )
    return dict(metrics)
