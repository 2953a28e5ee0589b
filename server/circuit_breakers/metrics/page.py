"""docs/metrics.md, made of the list of series."""

from __future__ import annotations

from prometheus_client import Histogram

from circuit_breakers.metrics import series
from circuit_breakers.metrics.series import LABEL_VALUES, Series

__all__ = ["ALL_SERIES", "metrics_page"]

ALL_SERIES: tuple[Series, ...] = tuple(  # type: ignore[type-arg]
    value for value in vars(series).values() if isinstance(value, Series)
)

_HEAD = """\
# Metrics

<!-- Written by `python -m circuit_breakers.metrics > docs/metrics.md`; do not edit. -->

`GET /metrics` gives these series beside vLLM's own (`vllm:*`), in Prometheus' text format. It is
open to everybody unless the policy file says `metrics = "key"`. No label ever
holds a request, a user or a text.

| series | type | labels | unit | meaning | while all is well |
|---|---|---|---|---|---|
"""

_LABELS = """
## Labels

| label | values |
|---|---|
"""

_TAIL = """
## Reading them

- A request that a limit or a missing key turned away on arrival is in `refused_requests_total`
  alone, not in `requests_total`.
- Canaries are in none of the series about requests. vLLM counts their tokens, so
  `scored_tokens_total` does too.
- Scores are logits; a probability is `1 / (1 + exp(-score))`.
- A request enters the counters when it ends, vLLM's token counters while it runs: compare the two
  over windows longer than the longest answers.
- `score_drift` looks at answers that ended by themselves under a policy that judges the prompt;
  requests to `/v1/moderations` are left out. With several probes it is that of the one that moved
  most. It says that traffic is unlike the calibration's, not that it is harmful.
"""


def metrics_page() -> str:
    """The page as Markdown."""
    rows = "".join(_row(one) for one in ALL_SERIES)
    labels = "".join(
        f"| `{name}` | {values if isinstance(values, str) else _code(values)} |\n"
        for name, values in LABEL_VALUES.items()
    )
    return _HEAD + rows + _LABELS + labels + _TAIL


def _row(one: Series) -> str:  # type: ignore[type-arg]
    kind = one.kind.__name__.lower()
    if one.kind is Histogram:
        kind += f", {one.buckets[0]:g} to {one.buckets[-1]:g}"
    cells = (f"`{one.exposed_name}`", kind, _code(one.labels), one.unit, one.meaning, one.holds)
    return f"| {' | '.join(cells)} |\n"


def _code(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)
