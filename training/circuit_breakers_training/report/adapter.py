"""Sections about the adapter: what training did to representations, and to text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from circuit_breakers_training.report.document import (
    Block,
    Paragraph,
    Plot,
    Sample,
    Samples,
    Section,
    Table,
)
from circuit_breakers_training.report.plots import coefficient_plot, cosine_plot, loss_plot

__all__ = ["SHOWN_CHARACTERS", "adapter_section", "text_section"]

_KINDS = ("benign", "harmful")
SHOWN_CHARACTERS = 200
"""Of a generated text; enough to see what it is, too little to be of use."""


def adapter_section(m: Mapping[str, Any]) -> Section | None:
    """Cosines on held-out responses, and the curves of the run."""
    adapter = m.get("adapter")
    if not adapter:
        return None
    layers = ", ".join(map(str, adapter["target_layers"]))
    blocks: list[Block] = [
        Paragraph(
            f"Representation Rerouting, {adapter['steps']} steps, blocks {layers}. Cosine of "
            "adapted and base hidden states on held-out responses (1 is untouched, 0 is "
            "rerouted):"
        ),
        _cosine_table(adapter),
        *_block_table(adapter),
    ]
    blocks += _curves(m.get("training_log") or {})
    return Section(name="adapter", title="Adapter", blocks=tuple(blocks))


def text_section(m: Mapping[str, Any]) -> Section | None:
    """Perplexity without and with the adapter, and continuations to look at."""
    blocks: list[Block] = []
    if m.get("perplexity"):
        blocks += [
            Paragraph("Perplexity of held-out responses, without and with the adapter:"),
            Table(
                caption="Perplexity by kind of response",
                header=("responses", "base", "breaker", "change"),
                rows=tuple(
                    (
                        stratum,
                        f"{p['base']:.2f}",
                        f"{p['merged']:.2f}",
                        f"{p['merged'] / p['base'] - 1:+.1%}",
                    )
                    for stratum, p in m["perplexity"].items()
                ),
            ),
        ]
    if m.get("generations"):
        blocks += [
            Paragraph(
                "Greedy continuations of test prompts, as they are, cut to "
                f"{SHOWN_CHARACTERS} characters. The server stops tripped ones before they are "
                "sent; here nothing is stopped."
            ),
            Samples(tuple(_sample(pair) for pair in m["generations"])),
        ]
    if not blocks:
        return None
    return Section(name="text", title="Text before and after", blocks=tuple(blocks))


def _cosine_table(adapter: Mapping[str, Any]) -> Table:
    rows = tuple(
        (kind, name, f"{value:.3f}")
        for kind in _KINDS
        for name, value in (adapter.get(f"{kind}_cosine_by_source") or {}).items()
    )
    return Table(caption="Cosine by source", header=("label", "source", "cosine"), rows=rows)


def _block_table(adapter: Mapping[str, Any]) -> Iterator[Table]:
    """How the streams part from block to block; at the targets alone in metrics of before."""
    benign, harmful = (adapter.get(f"{kind}_cosine_by_layer") or {} for kind in _KINDS)
    blocks = sorted({*benign, *harmful}, key=int)
    # A single target says what the cosines by source do.
    if len(blocks) > 1:
        yield Table(
            caption="Cosine by block",
            header=("block", *_KINDS, ""),
            rows=tuple(
                (
                    block,
                    *(f"{of[block]:.3f}" if block in of else "" for of in (benign, harmful)),
                    "target" if int(block) in adapter["target_layers"] else "",
                )
                for block in blocks
            ),
        )


def _curves(log: Mapping[str, Any]) -> Iterator[Plot]:
    """The plots for which the log has columns."""
    if {"step", "retain_loss", "reroute_loss"} <= log.keys():
        yield Plot(
            name="loss",
            title="Losses by step",
            caption="Losses of each step, before their coefficients: "
            + _ends(log, retain="retain_loss", reroute="reroute_loss"),
            draw=partial(loss_plot, log),
        )
    if {"step", "retain_cosine", "reroute_cosine"} <= log.keys():
        yield Plot(
            name="cosine",
            title="Cosine by step",
            caption="Cosine of adapted and base states in the training batches: "
            + _ends(log, benign="retain_cosine", harmful="reroute_cosine"),
            draw=partial(cosine_plot, log),
        )
    if {"step", "retain_coefficient", "reroute_coefficient"} <= log.keys():
        yield Plot(
            name="coefficients",
            title="Coefficients by step",
            caption="What the losses are multiplied by: "
            + _ends(log, retain="retain_coefficient", reroute="reroute_coefficient"),
            draw=partial(coefficient_plot, log),
            page_only=True,
        )


def _ends(log: Mapping[str, Any], **columns: str) -> str:
    """First and last value of each column, in words."""
    parts = [
        f"{name} from {log[key][0]:.3g} to {log[key][-1]:.3g}" for name, key in columns.items()
    ]
    return f"{', '.join(parts)} over {log['step'][-1]} steps."


def _sample(pair: Mapping[str, str]) -> Sample:
    shown = (_cut(pair[key]) for key in ("prompt", "base", "merged"))
    return Sample(pair["label"], *shown)


def _cut(text: str) -> str:
    """One line, of bounded length."""
    line = " ".join(text.split())
    if len(line) > SHOWN_CHARACTERS:
        line = line[:SHOWN_CHARACTERS].rstrip() + "…"
    return line
