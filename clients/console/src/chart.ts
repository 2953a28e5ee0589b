/** A uPlot chart in the page's colours, as wide as its place, in light and dark. */

import uPlot from 'uplot';
import 'uplot/dist/uPlot.min.css';

/** The page's colours, as its style sheet has them now. */
export interface Ink {
  text: string;
  muted: string;
  line: string;
  accent: string;
  danger: string;
  shade: string;
}

export type Plan = Omit<uPlot.Options, 'width' | 'height'>;

export class Chart {
  readonly #root: HTMLElement;
  readonly #plan: (ink: Ink) => Plan;
  #data: uPlot.AlignedData;
  #plot: uPlot | null = null;

  constructor(root: HTMLElement, data: uPlot.AlignedData, plan: (ink: Ink) => Plan) {
    this.#root = root;
    this.#data = data;
    this.#plan = plan;
    new ResizeObserver(() => this.#fit()).observe(root);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.#draw());
  }

  get plot(): uPlot | null {
    return this.#plot;
  }

  set(data: uPlot.AlignedData): void {
    this.#data = data;
    if (this.#plot === null) this.#fit();
    else this.#plot.setData(data);
  }

  #fit(): void {
    const { clientWidth: width, clientHeight: height } = this.#root;
    if (width === 0 || height === 0) return;
    if (this.#plot === null) this.#draw();
    else if (width !== this.#plot.width || height !== this.#plot.height) this.#plot.setSize({ width, height });
  }

  #draw(): void {
    this.#plot?.destroy();
    const { clientWidth: width, clientHeight: height } = this.#root;
    this.#plot = new uPlot({ ...this.#plan(ink()), width, height }, this.#data, this.#root);
  }
}

/** An axis in small muted letters. */
export function axis(ink: Ink, more: uPlot.Axis = {}): uPlot.Axis {
  const thin = { stroke: ink.line, width: 1 };
  return { stroke: ink.muted, font: '11px system-ui, sans-serif', grid: thin, ticks: { ...thin, size: 4 }, gap: 4, ...more };
}

function ink(): Ink {
  const style = getComputedStyle(document.documentElement);
  const colour = (name: string) => style.getPropertyValue(`--${name}`).trim();
  return {
    text: colour('text'),
    muted: colour('muted'),
    line: colour('line'),
    accent: colour('accent'),
    danger: colour('danger'),
    shade: colour('shade'),
  };
}
