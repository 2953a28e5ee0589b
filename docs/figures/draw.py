"""Draws the site's figures: `python docs/figures/draw.py` writes the SVG files beside this one.

Whatever is computed is computed by the functions that train and serve: the running score, the
schedule of the losses, the bound of a calibration. Colours are the reader's: text and lines take
`currentColor`, and two translucent colours stand for harmless and harmful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import NormalDist

import numpy as np

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.adapter.objective import coefficients
from circuit_breakers_training.probe.calibration import fpr_upper_bound, num_trips_allowed

__all__ = ["figures"]

_STYLE = """
svg.cb-figure{color:#1f2328;font-family:system-ui,sans-serif;font-size:13px}
@media(prefers-color-scheme:dark){svg.cb-figure{color:#e6edf3}}
.cb-figure text{fill:currentColor}
.cb-figure .dim{opacity:.7;font-size:12px}
.cb-figure .head{font-weight:600}
.cb-figure .mid{text-anchor:middle}
.cb-figure .end{text-anchor:end}
.cb-figure .box{fill:currentColor;fill-opacity:.05;stroke:currentColor;stroke-opacity:.4}
.cb-figure .lane{fill:none;stroke:currentColor;stroke-opacity:.25;stroke-dasharray:4 4}
.cb-figure .safe{fill:#3b82f6;fill-opacity:.25;stroke:#3b82f6}
.cb-figure .harm{fill:#f4511e;fill-opacity:.25;stroke:#f4511e}
.cb-figure .line{fill:none;stroke:currentColor;stroke-width:1.5}
.cb-figure .thin{fill:none;stroke:currentColor;stroke-opacity:.35}
.cb-figure .safe-line{fill:none;stroke:#3b82f6;stroke-width:2}
.cb-figure .harm-line{fill:none;stroke:#f4511e;stroke-width:2}
.cb-figure .dash{stroke-dasharray:5 4}
.cb-figure .tip{fill:currentColor}
"""


class Drawing:
    """An SVG that grows by shapes; lengths are pixels at full width."""

    def __init__(self, name: str, width: int, height: int) -> None:
        # Several figures are on one page: the arrow's id has to differ.
        self._tip = f"tip-{name}"
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="cb-figure" '
            f'viewBox="0 0 {width} {height}">',
            f"<style>{''.join(_STYLE.split(chr(10)))}</style>",
            f'<defs><marker id="{self._tip}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse"><path class="tip" d="M0 0 8 4 0 8Z"/>'
            "</marker></defs>",
        ]

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self._parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def box(
        self, x: float, y: float, width: float, lines: Sequence[str], kind: str = "box"
    ) -> None:
        """A box as high as its lines, which stand centred in it."""
        height = 17 * len(lines) + 13
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height}" rx="6" class="{kind}"/>'
        )
        for number, line in enumerate(lines):
            self.text(
                x + width / 2, y + 21 + 17 * number, line, "mid" if number == 0 else "mid dim"
            )

    def lane(self, x: float, y: float, width: float, height: float, title: str) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" class="lane"/>'
        )
        self.text(x + width / 2, y - 8, title, "mid head")

    def path(
        self, points: Sequence[tuple[float, float]], kind: str, *, arrow: bool = False
    ) -> None:
        places = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
        tip = f' marker-end="url(#{self._tip})"' if arrow else ""
        self._parts.append(f'<path d="M{places}" class="{kind}"{tip}/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        self.path(points, "line", arrow=True)

    def dot(self, x: float, y: float, kind: str, radius: float = 3) -> None:
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def figures() -> dict[str, str]:
    """Each figure's SVG, by the name of its file."""
    drawn = (_token_flow, _hold_back, _rerouting, _calibration)
    return {f"{draw.__name__[1:].replace('_', '-')}.svg": draw().svg() for draw in drawn}


def _token_flow() -> Drawing:
    d = Drawing("token-flow", 760, 350)
    d.box(8, 150, 84, ["client"])
    d.lane(140, 40, 190, 300, "API process")
    d.box(152, 56, 166, ["access gate", "key, limits, policy"])
    d.box(152, 126, 166, ["closed field lists", "what is not listed is 400"])
    d.box(152, 196, 166, ["vLLM's serving classes", "templates, tools, streams"])
    d.box(152, 266, 166, ["GuardedEngine", "judges again, reports"])
    d.lane(372, 40, 176, 300, "engine core")
    d.box(384, 56, 152, ["vLLM's scheduler", "which tokens run next"])
    d.box(384, 126, 152, ["rows to positions", "cached ones are known"])
    d.box(384, 196, 152, ["verdict", "same step; NaN trips"], "harm")
    d.box(384, 266, 152, ["hold back, release", "only scored tokens"], "safe")
    d.lane(592, 40, 160, 300, "worker")
    d.box(604, 56, 136, ["blocks up to l"])
    d.box(604, 112, 136, ["probe op", "(h + residual) W + b", "one logit a row"], "harm")
    d.box(604, 202, 136, ["other blocks"])
    d.box(604, 258, 136, ["sampler"])
    for above, below in ((86, 112), (176, 202), (232, 258)):
        d.arrow((672, above), (672, below))
    d.arrow((92, 160), (122, 160), (122, 79), (152, 79))
    for above, below in ((103, 126), (173, 196), (243, 266)):
        d.arrow((235, above), (235, below))
    d.arrow((318, 276), (350, 276), (350, 79), (384, 79))
    d.arrow((536, 70), (604, 70))
    d.arrow((604, 144), (536, 144))
    d.arrow((604, 273), (570, 273), (570, 160), (536, 160))
    d.arrow((460, 173), (460, 196))
    d.arrow((460, 243), (460, 266))
    d.arrow((384, 300), (318, 300))
    d.arrow((152, 300), (50, 300), (50, 180))
    d.text(56, 296, "answer, guard", "dim")
    d.text(10, 140, "request", "dim")
    return d


def _hold_back() -> Drawing:
    d = Drawing("hold-back", 760, 250)
    steps = ("step 1: prefill", "step 2", "step 3", "step 4")
    rows = ("fed to the model", "scored in this step", "sampled", "leaves the engine")
    cells = (
        (("prompt", "box"), ("A", "safe"), ("B", "safe"), ("C", "harm")),
        (
            ("prompt: passes", "safe"),
            ("A: passes", "safe"),
            ("B: passes", "safe"),
            ("C: trips", "harm"),
        ),
        (("A", "box"), ("B", "box"), ("C", "box"), ("D: dropped", "box")),
        (("nothing yet", ""), ("A", "safe"), ("B", "safe"), ("content_filter", "harm")),
    )
    left, width, top, height = 150, 146, 34, 48
    for column, step in enumerate(steps):
        d.text(left + width * column + 65, 20, step, "mid head")
    for number, (row, chips) in enumerate(zip(rows, cells, strict=True)):
        y = top + height * number
        d.text(8, y + 20, row)
        for column, (words, kind) in enumerate(chips):
            x = left + width * column
            if kind:
                d.box(x, y, 130, [words], kind)
            else:
                d.text(x + 65, y + 20, words, "mid dim")
    for column in range(3):
        # A sampled token is fed in the next step, and leaves in that one.
        x = left + width * column
        d.arrow(
            (x + 130, top + 2 * height + 12),
            (x + 138, top + 2 * height + 12),
            (x + 138, top + 15),
            (x + 145, top + 15),
        )
    d.text(
        left,
        242,
        "C was sampled in step 3 and held; its own score stops it. Nobody ever sees D.",
        "dim",
    )
    return d


def _rerouting() -> Drawing:
    d = Drawing("rerouting", 760, 250)
    for x, title, angle, kind, words in (
        (20, "benign token: retain", 8, "safe", "stays: ||adapted - base|| is the loss"),
        (270, "harmful token: reroute", 84, "harm", "turns: ReLU(cosine) is the loss"),
    ):
        d.text(x, 20, title, "head")
        origin = (x + 30, 190)
        base = math.radians(28)
        ends = [(base, "line", "base"), (base + math.radians(angle), f"{kind}-line", "adapted")]
        for direction, style, name in ends:
            tip = (origin[0] + 140 * math.cos(direction), origin[1] - 140 * math.sin(direction))
            d.path([origin, tip], style, arrow=True)
            d.text(tip[0] + 6, tip[1] - 4, name, "dim")
        d.text(x, 238, words, "dim")
    left, right, top, bottom = 560, 740, 44, 190
    d.text(left - 20, 20, "weights of the losses", "head")
    d.path([(left, top), (left, bottom), (right, bottom)], "thin")
    steps = 100
    curves = [coefficients(step, steps, 1.0) for step in range(steps + 1)]
    for kind, values in (
        ("harm-line", [c.reroute for c in curves]),
        ("safe-line", [c.retain for c in curves]),
    ):
        points = [
            (left + (right - left) * i / steps, bottom - (bottom - top) * v)
            for i, v in enumerate(values)
        ]
        d.path([points[0], points[-1]], kind)
    d.text(left + 8, top + 2, "reroute: alpha to alpha / 2", "dim")
    d.text(left + 60, bottom - 12, "retain: 0 to alpha / 2", "dim")
    d.text(left, bottom + 18, "first step", "dim")
    d.text(right, bottom + 18, "last step", "dim end")
    return d


def _calibration() -> Drawing:
    d = Drawing("calibration", 760, 270)
    _one_conversation(d, 30, 340, 44, 210)
    _all_conversations(d, 420, 740, 44, 210)
    return d


def _one_conversation(d: Drawing, left: float, right: float, top: float, bottom: float) -> None:
    d.text(left - 22, 20, "one benign conversation: its highest running score", "head")
    count = 60
    logits = np.array(
        [-4 + 3 * math.sin(i / 7) + 1.5 * math.sin(2.1 * i) for i in range(count)], np.float32
    )
    score = aggregate(logits, Aggregation(kind="ema", alpha=0.12))

    def place(i: int, value: float) -> tuple[float, float]:
        return left + (right - left) * i / count, bottom - (bottom - top) * (value + 9) / 10

    d.path([(left, top), (left, bottom), (right, bottom)], "thin")
    for i, logit in enumerate(logits.tolist()):
        d.dot(*place(i, logit), "thin", 2)
    scored = [(i, value) for i, value in enumerate(score.tolist()) if math.isfinite(value)]
    d.path([place(i, value) for i, value in scored], "safe-line")
    peak = max(scored, key=lambda pair: pair[1])
    d.dot(*place(*peak), "safe", 5)
    d.text(place(*peak)[0] + 8, place(*peak)[1] - 8, "max over tokens")
    d.text(right, bottom + 18, "tokens of prompt and answer", "dim end")
    d.text(left, bottom + 40, "dots: logit of each token; line: running score (EMA)", "dim")


def _all_conversations(d: Drawing, left: float, right: float, top: float, bottom: float) -> None:
    num, target, shown = 1000, 0.01, 40
    allowed = num_trips_allowed(num, target)
    bound, next_bound = (fpr_upper_bound(allowed + more, num) for more in (0, 1))
    d.text(left - 12, 20, f"the {shown} highest of {num:,} such maxima, sorted", "head")
    peaks = [NormalDist().inv_cdf(1 - (i + 0.5) / num) for i in range(shown)]

    def place(i: float, value: float) -> tuple[float, float]:
        span = peaks[0] - peaks[-1]
        x = left + 8 + (right - left - 16) * i / (shown - 1)
        return x, bottom - 12 - (bottom - top - 24) * (value - peaks[-1]) / span

    d.path([(left, top), (left, bottom), (right, bottom)], "thin")
    for i, peak in enumerate(peaks):
        d.dot(*place(i, peak), "harm" if i < allowed else "safe", 4)
    y = place(0, peaks[allowed])[1] - 6
    d.path([(left, y), (right, y)], "harm-line dash")
    d.text(right, y - 8, f"threshold: just above number {allowed + 1}", "end")
    d.text(
        left,
        bottom + 20,
        f"{allowed} trips in {num:,}: at most {bound:.2%} (95 %), within {target:.0%}",
        "dim",
    )
    d.text(
        left, bottom + 40, f"{allowed + 1} would be at most {next_bound:.2%}: one too many", "dim"
    )


if __name__ == "__main__":
    for file_name, content in figures().items():
        (Path(__file__).parent / file_name).write_text(content, encoding="utf-8")
