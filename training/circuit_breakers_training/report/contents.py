"""The report's table of contents: which sections there are, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuit_breakers_training.report.adapter import adapter_section, text_section
from circuit_breakers_training.report.document import Document
from circuit_breakers_training.report.headline import headline_blocks
from circuit_breakers_training.report.limits import limits_section
from circuit_breakers_training.report.probe import (
    calibration_section,
    probe_section,
    selection_section,
)
from circuit_breakers_training.report.run import (
    cost_section,
    data_section,
    environment_section,
    identity_section,
)
from circuit_breakers_training.report.trips import trip_sections

__all__ = ["build_document"]


def build_document(metrics: Mapping[str, Any], *, digest: str | None = None) -> Document:
    """The report of `metrics`, without the sections whose values are missing.

    Args:
        digest: of the saved artifact; None while it is being made, as it covers the report.
    """
    sections = (
        adapter_section(metrics),
        probe_section(metrics),
        calibration_section(metrics),
        *trip_sections(metrics),
        text_section(metrics),
        selection_section(metrics),
        identity_section(metrics, digest),
        data_section(metrics),
        cost_section(metrics),
        environment_section(metrics),
        limits_section(metrics),
    )
    return Document(
        name=metrics["name"],
        summary=headline_blocks(metrics),
        sections=tuple(section for section in sections if section is not None),
    )
