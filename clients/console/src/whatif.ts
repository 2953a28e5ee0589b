/** The panel that asks what another threshold would have done to the latest requests. */

import { type Api, ApiError, type Breaker, type WhatIf, type WhatIfGroup } from './api';
import { byId, debounced, el } from './dom';
import { count, logit, percent } from './format';
import { highestThreshold } from './policies';

/** Logits on both sides of the threshold in force. */
const REACH = 10;

export class WhatIfPanel {
  readonly #api: Api;
  readonly #slider = byId('what-if-threshold', HTMLInputElement);
  readonly #days = byId('what-if-days', HTMLSelectElement);
  #asked: AbortController | null = null;

  constructor(api: Api, breaker: Breaker) {
    this.#api = api;
    const inForce = highestThreshold(breaker);
    this.#slider.min = String(Math.round(inForce) - REACH);
    this.#slider.max = String(Math.round(inForce) + REACH);
    this.#slider.step = '0.1';
    this.#slider.value = inForce.toFixed(1);
    byId('what-if-in-force', HTMLElement).textContent = `In force: ${logit(inForce)}`;
    const ask = debounced(() => void this.ask(), 150);
    this.#slider.addEventListener('input', () => {
      this.#say();
      ask();
    });
    this.#days.addEventListener('change', ask);
    this.#say();
  }

  async ask(): Promise<void> {
    this.#asked?.abort();
    const { signal } = (this.#asked = new AbortController());
    const status = byId('what-if-status', HTMLElement);
    const table = byId('what-if-table', HTMLTableElement);
    const query = { threshold: this.#slider.value, days: this.#days.value };
    try {
      const answer = await this.#api.get<WhatIf>('/v1/breaker/what-if', query, signal);
      if (signal.aborted) return;
      const groups = answer.data.filter((group) => group.phase === 'all');
      table.hidden = groups.length === 0;
      byId('what-if-rows', HTMLTableSectionElement).replaceChildren(...groups.map(row));
      byId('what-if-notes', HTMLElement).replaceChildren(...answer.notes.map((note) => el('li', {}, note)));
      const part = answer.is_complete ? '' : `Only the newest requests, since ${answer.since}.`;
      status.textContent = groups.length === 0 ? 'No request of this time has a score trace.' : part;
    } catch (error) {
      if (signal.aborted) return;
      const code = error instanceof ApiError ? error.code : null;
      const isOff = code === 'score_traces_off' || code === 'audit_log_off';
      table.hidden = true;
      this.#slider.disabled = this.#days.disabled = isOff;
      status.textContent = isOff
        ? 'This server keeps no score traces. Start it with --audit-db FILE --score-traces to ask this.'
        : `No answer: ${(error as Error).message}`;
    }
  }

  #say(): void {
    const value = logit(this.#slider.valueAsNumber);
    byId('what-if-value', HTMLOutputElement).textContent = value;
    this.#slider.setAttribute('aria-valuetext', `threshold ${value}`);
  }
}

function row(group: WhatIfGroup): HTMLTableRowElement {
  const bar = el('div', { class: 'bar', 'aria-hidden': 'true' });
  const range = el('i');
  range.style.left = `${group.share_low * 100}%`;
  range.style.width = `${(group.share_high - group.share_low) * 100}%`;
  const point = el('b');
  point.style.left = `${(group.share ?? 0) * 100}%`;
  bar.append(range, point);
  const share =
    group.share === null ? '' : ` (${percent(group.share)}; 95 %: ${percent(group.share_low)} to ${percent(group.share_high)})`;
  const unknown = group.num_unknown > 0 ? `, ${group.num_unknown} cannot be told` : '';
  return el(
    'tr',
    {},
    el('td', {}, el('span', {}, group.policy), el('small', {}, count(group.num_requests, 'request'))),
    el(
      'td',
      {},
      el('span', {}, el('b', {}, String(group.num_would_trip)), share),
      bar,
      el('small', {}, `${group.num_tripped} did${unknown}`),
    ),
  );
}
