"""Prints docs/metrics.md: `python -m circuit_breakers.metrics > docs/metrics.md`."""

from __future__ import annotations

import sys

from circuit_breakers.metrics.page import metrics_page

sys.stdout.write(metrics_page())
