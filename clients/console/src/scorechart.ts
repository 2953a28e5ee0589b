/** The chart under the conversation: the score of each token of one exchange, and the threshold. */

import type uPlot from 'uplot';
import { Chart, type Ink, axis } from './chart';
import { byId } from './dom';
import type { Turn } from './turn';

export class ScoreChart {
  readonly #chart: Chart;
  readonly #onPick: (element: HTMLElement | undefined) => void;
  #turn: Turn | null = null;

  /** @param onPick called with the token under the chart's cursor, undefined when it leaves */
  constructor(onPick: (element: HTMLElement | undefined) => void) {
    this.#onPick = onPick;
    this.#chart = new Chart(byId('score-chart', HTMLElement), [[], [], []], (ink) => this.#plan(ink));
  }

  get turn(): Turn | null {
    return this.#turn;
  }

  show(turn: Turn | null): void {
    this.#turn = turn;
    this.refresh();
  }

  /** Draws what the exchange has gained. */
  refresh(): void {
    this.#chart.set(this.#turn?.curve ?? [[], [], []]);
  }

  /** Puts the cursor on a position, without telling anybody. */
  point(index: number): void {
    const { plot } = this.#chart;
    if (plot !== null) plot.setCursor({ left: plot.valToPos(index, 'x'), top: plot.over.clientHeight / 2 }, false);
  }

  #plan(ink: Ink) {
    return {
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
      scales: { x: { time: false, range: wholeTokens }, y: { range: withThreshold } },
      axes: [
        axis(ink, { label: 'token', labelSize: 16, labelFont: '11px system-ui, sans-serif', size: 24, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] }),
        axis(ink, { label: 'score', labelSize: 16, labelFont: '11px system-ui, sans-serif', size: 36, values: (_: uPlot, scores: number[]) => scores.map((score) => String(score).replace('-', '\u2212')) }),
      ],
      series: [
        {},
        { label: 'score', stroke: ink.accent, width: 2, points: { show: false } },
        { label: 'threshold', stroke: ink.danger, width: 1.5, dash: [6, 4], points: { show: false } },
      ],
      hooks: {
        drawClear: [(plot: uPlot) => this.#shadePrompt(plot, ink)],
        draw: [(plot: uPlot) => this.#markTrip(plot, ink)],
        setCursor: [(plot: uPlot) => this.#pick(plot)],
      },
    };
  }

  #pick(plot: uPlot): void {
    const { idx, left } = plot.cursor;
    const index = idx == null || (left ?? -1) < 0 ? undefined : this.#turn?.curve[0][idx];
    this.#onPick(index === undefined ? undefined : this.#turn?.elementAt(index));
  }

  #shadePrompt(plot: uPlot, ink: Ink): void {
    if (this.#turn === null || this.#turn.items.length === 0) return;
    const { left, top, width, height } = plot.bbox;
    const end = this.#turn.completionStart ?? this.#turn.items.length;
    const x = Math.min(Math.max(plot.valToPos(end - 0.5, 'x', true), left), left + width);
    const { ctx } = plot;
    ctx.save();
    ctx.fillStyle = ink.shade;
    ctx.fillRect(left, top, x - left, height);
    ctx.fillStyle = ink.muted;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textBaseline = 'bottom';
    ctx.textAlign = 'left';
    const pad = 4 * devicePixelRatio;
    if (x - left > ctx.measureText('prompt').width + pad) ctx.fillText('prompt', left, top - pad);
    if (this.#turn.completionStart !== null && left + width - x > ctx.measureText('completion').width) {
      ctx.fillText('completion', x, top - pad);
    }
    ctx.restore();
  }

  #markTrip(plot: uPlot, ink: Ink): void {
    const index = this.#turn?.tripIndex ?? null;
    const position = index === null ? -1 : (this.#turn?.curve[0].indexOf(index) ?? -1);
    const score = this.#turn?.curve[1][position] ?? null;
    if (index === null || score === null) return;
    const { ctx, bbox } = plot;
    const x = plot.valToPos(index, 'x', true);
    const y = plot.valToPos(score, 'y', true);
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = ink.danger;
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.beginPath();
    ctx.arc(x, y, 5 * devicePixelRatio, 0, 2 * Math.PI);
    ctx.fill();
    ctx.restore();
  }
}

/** A little room at both ends; at least some tokens wide. */
function wholeTokens(_plot: uPlot, first: number | null, last: number | null): [number, number] {
  return [(first ?? 0) - 0.5, Math.max(last ?? 0, (first ?? 0) + 15) + 0.5];
}

function withThreshold(_plot: uPlot, low: number | null, high: number | null): [number, number] {
  const bottom = low ?? -1;
  const top = high ?? 1;
  const room = Math.max((top - bottom) * 0.1, 0.5);
  return [bottom - room, top + room];
}
