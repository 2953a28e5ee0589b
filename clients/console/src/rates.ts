/** The panel of the live trip rate: counters of /metrics, seen every few seconds. */

import uPlot from 'uplot';
import type { Api } from './api';
import { Chart, type Ink, axis } from './chart';
import { byId, whileVisible } from './dom';
import { count, hoursAndMinutes, percent } from './format';
import { type Totals, difference, totalsOf } from './metrics';

const POLL_MS = 5_000;
const BIN_S = 10;
const NUM_BINS = 30;

export class RatePanel {
  readonly #api: Api;
  readonly #chart: Chart;
  /** By the number of the bin since 1970. */
  readonly #bins = new Map<number, Totals>();
  #last: Totals | null = null;

  constructor(api: Api) {
    this.#api = api;
    this.#chart = new Chart(byId('rate-chart', HTMLElement), [[], [], []], plan);
  }

  /** Begins to poll; returns the end of it. */
  start(): () => void {
    return whileVisible(() => void this.poll(), POLL_MS);
  }

  async poll(): Promise<void> {
    const status = byId('rate-status', HTMLElement);
    try {
      const now = totalsOf(await this.#api.text('/metrics'));
      if (this.#last !== null) this.#count(difference(now, this.#last));
      this.#last = now;
      status.textContent = '';
      this.#show(now);
    } catch (error) {
      status.textContent = `No figures: ${(error as Error).message}`;
    }
  }

  #count(fresh: Totals): void {
    const bin = Math.floor(Date.now() / 1000 / BIN_S);
    const known = this.#bins.get(bin);
    this.#bins.set(bin, known === undefined ? fresh : added(known, fresh));
    for (const old of this.#bins.keys()) if (old <= bin - NUM_BINS) this.#bins.delete(old);
  }

  #show(total: Totals): void {
    const sum = [...this.#bins.values()].reduce<Totals | null>((a, b) => (a ? added(a, b) : b), null);
    const answered = sum ? sum.ok + sum.tripped : 0;
    const trips = sum ? sum.stopped + sum.observed : 0;
    const text = (id: string, value: string) => (byId(id, HTMLElement).textContent = value);
    text('rate-share', answered > 0 ? percent(trips / answered) : '\u2013');
    text('rate-trips', `${trips}`);
    text('rate-stopped', sum && sum.observed > 0 ? `${sum.observed} only observed` : '');
    text('rate-requests', `${answered}`);
    const others = sum ? { rejected: sum.rejected, aborted: sum.aborted, failed: sum.error } : {};
    const said = Object.entries(others).filter(([, number]) => number > 0);
    text('rate-others', said.map(([name, number]) => `${number} ${name}`).join(', '));
    const since = total.ok + total.tripped;
    text('rate-since', `Since the server's start: ${count(total.stopped + total.observed, 'trip')} in ${count(since, 'request')}.`);

    const last = Math.floor(Date.now() / 1000 / BIN_S);
    const numbers = Array.from({ length: NUM_BINS }, (_, i) => last - NUM_BINS + 1 + i);
    const binOf = (number: number) => this.#bins.get(number);
    this.#chart.set([
      numbers.map((number) => number * BIN_S),
      numbers.map((number) => (binOf(number)?.ok ?? 0) + (binOf(number)?.tripped ?? 0)),
      numbers.map((number) => (binOf(number)?.stopped ?? 0) + (binOf(number)?.observed ?? 0)),
    ]);
    byId('rate-chart', HTMLElement).setAttribute(
      'aria-label',
      `Requests of the last 5 minutes: ${answered}, trips: ${trips}`,
    );
  }
}

function added(a: Totals, b: Totals): Totals {
  const names = Object.keys(a) as (keyof Totals)[];
  return Object.fromEntries(names.map((name) => [name, a[name] + b[name]])) as unknown as Totals;
}

function plan(ink: Ink) {
  const bars = uPlot.paths.bars?.({ size: [0.7, 14], align: 1 });
  const drawn = { width: 0, points: { show: false }, ...(bars && { paths: bars }) };
  return {
    legend: { show: false },
    cursor: { show: false },
    // The newest bar stands to the right of its time.
    scales: { x: { range: (_: uPlot, first: number, last: number): [number, number] => [first, last + BIN_S] }, y: { range: (_: uPlot, __: number | null, high: number | null): [number, number] => [0, Math.max(4, (high ?? 0) * 1.1)] } },
    axes: [
      axis(ink, { size: 22, grid: { show: false }, space: 60, values: (_: uPlot, seconds: number[]) => seconds.map(clockOf) }),
      axis(ink, { size: 28, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }),
    ],
    series: [
      {},
      { label: 'requests', fill: ink.accent, stroke: ink.accent, ...drawn },
      { label: 'trips', fill: ink.danger, stroke: ink.danger, ...drawn },
    ],
  };
}

function clockOf(seconds: number): string {
  return hoursAndMinutes(new Date(seconds * 1000));
}
