"""Sections about the run itself: what the breaker is, what went in, and what it took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.report.document import Block, Paragraph, Section, Table
from circuit_breakers_training.report.numbers import flat_fields

__all__ = ["cost_section", "data_section", "environment_section", "identity_section"]


def identity_section(m: Mapping[str, Any], digest: str | None) -> Section:
    """Name, digests, base model, date and recipe.

    Args:
        digest: of the artifact. None while it is being made: it covers the report, too.
    """
    model = m["model"]
    rows = [
        ("breaker", m["name"]),
        ("digest", digest or "that of manifest.json, which covers this file"),
        ("created", m.get("created")),
        ("adapter weights, sha256", m.get("adapter_sha256")),
        ("base model", model["id"]),
        ("revision", model["revision"]),
        ("architecture, sha256", model["config_sha256"]),
        ("size", f"{model['num_layers']} blocks, width {model['hidden_size']}"),
    ]
    blocks: list[Block] = [
        Table(
            caption="Names and digests",
            header=("", "value"),
            rows=tuple((name, str(value)) for name, value in rows if value is not None),
        ),
        *_recipe_tables(m.get("recipe") or {}),
    ]
    return Section(name="identity", title="Identity", blocks=tuple(blocks), page_only=True)


def data_section(m: Mapping[str, Any]) -> Section | None:
    """What max_length cuts, conversations of each split by label and source, digests of the files.

    The short form has the first of these.
    """
    blocks: list[Block] = [*_lengths(m)]
    is_short = bool(blocks)
    counts = m.get("data_counts")
    if counts:
        rows = tuple(
            (split, verdict, source, str(num))
            for split, verdicts in counts.items()
            for verdict, sources in verdicts.items()
            for source, num in sources.items()
        )
        header = ("split", "label", "source", "conversations")
        caption = "Conversations used"
        blocks.append(Table(caption=caption, header=header, rows=rows, page_only=True))
    if m.get("data_sha256"):
        rows = tuple(m["data_sha256"].items())
        names = ("file", "sha256")
        blocks.append(Table(caption="Data files", header=names, rows=rows, page_only=True))
    if not blocks:
        return None
    return Section(name="data", title="Data", blocks=tuple(blocks), page_only=not is_short)


def _lengths(m: Mapping[str, Any]) -> Iterator[Block]:
    """Conversations of each split that max_length cuts or leaves out."""
    lengths = m.get("data_lengths")
    if not lengths:
        return
    max_length = (m.get("recipe") or {}).get("max_length")
    of = "max_length" if max_length is None else f"max_length ({max_length} tokens)"
    if not any(lost["num_truncated"] or lost["num_dropped"] for lost in lengths.values()):
        yield Paragraph(f"No conversation is longer than {of}.")
        return
    yield Paragraph(
        f"Conversations longer than {of} are cut at the end of the response; they are left out "
        "where no response token fits, or there is none. Nothing is known of what was cut:"
    )
    yield Table(
        caption="Conversations that are too long",
        header=("split", "conversations", "cut", "left out"),
        rows=tuple(
            (split, *(str(lost[key]) for key in ("num", "num_truncated", "num_dropped")))
            for split, lost in lengths.items()
        ),
    )


def cost_section(m: Mapping[str, Any]) -> Section | None:
    """Time and memory of each stage."""
    if not m.get("seconds"):
        return None
    peaks = m.get("peak_rss_mib_by_stage") or {}
    blocks: list[Block] = []
    if "machine" in m and "peak_rss_mib" in m:
        peak = f"{m['peak_rss_mib'] / 1024:.1f} GiB"
        blocks.append(Paragraph(f"{m['machine']}; peak memory {peak}."))
    if peaks:
        header: tuple[str, ...] = ("stage", "seconds", "peak memory so far, GiB")
        rows: tuple[tuple[str, ...], ...] = tuple(
            (stage, f"{seconds:.0f}", f"{peaks[stage] / 1024:.1f}" if stage in peaks else "")
            for stage, seconds in m["seconds"].items()
        )
    else:
        header = ("stage", "seconds")
        rows = tuple((stage, f"{seconds:.0f}") for stage, seconds in m["seconds"].items())
    blocks.append(Table(caption="Time by stage", header=header, rows=rows))
    return Section(name="time", title="Time", blocks=tuple(blocks))


def environment_section(m: Mapping[str, Any]) -> Section | None:
    """Versions, machine and seeds: what it takes to do it again."""
    environment = m.get("environment")
    if not environment:
        return None
    recipe = m.get("recipe") or {}
    rows = [*flat_fields(environment)]
    rows += [
        (f"seed of {what}", str(seed))
        for what, seed in (
            ("training", recipe.get("seed")),
            ("data", (recipe.get("data") or {}).get("seed")),
        )
        if seed is not None
    ]
    table = Table(caption="Versions, machine and seeds", header=("", "value"), rows=tuple(rows))
    return Section(name="environment", title="Environment", blocks=(table,), page_only=True)


def _recipe_tables(recipe: Mapping[str, Any]) -> Iterator[Table]:
    """Fields that differ from their defaults, then all."""
    if not recipe:
        return
    default = dict(flat_fields(Recipe(model=recipe.get("model", "-")).model_dump(mode="json")))
    ran = dict(flat_fields(recipe))
    changed = tuple(
        (field, value, default.get(field, "no such field now"))
        for field, value in ran.items()
        if value != default.get(field)
    )
    if changed:
        header = ("field", "value", "default")
        yield Table(
            caption="Recipe, where it differs from the defaults", header=header, rows=changed
        )
    yield Table(
        caption="The whole recipe", header=("field", "value"), rows=tuple(ran.items()), folded=True
    )
