/** The panel of the latest trips in the audit log. */

import { type Api, ApiError, type Trip, type TripPage } from './api';
import { byId, el, whileVisible } from './dom';
import { clock, logit } from './format';

const POLL_MS = 10_000;
/** While trips are on their way to the log. */
const PENDING_MS = 1_000;
const NUM_SHOWN = '20';

export class TripPanel {
  readonly #api: Api;
  #again = 0;

  constructor(api: Api) {
    this.#api = api;
  }

  /** Begins to poll; returns the end of it. */
  start(): () => void {
    return whileVisible(() => void this.poll(), POLL_MS);
  }

  async poll(): Promise<void> {
    const table = byId('trips-table', HTMLTableElement);
    const status = byId('trips-status', HTMLElement);
    try {
      const page = await this.#api.get<TripPage>('/v1/breaker/trips', { limit: NUM_SHOWN });
      clearTimeout(this.#again);
      if (page.num_pending > 0) this.#again = window.setTimeout(() => void this.poll(), PENDING_MS);
      table.hidden = page.data.length === 0;
      byId('trips-rows', HTMLTableSectionElement).replaceChildren(...page.data.map(row));
      status.textContent = page.data.length === 0 ? 'Nothing has tripped.' : '';
    } catch (error) {
      const isOff = error instanceof ApiError && error.code === 'audit_log_off';
      if (isOff) table.hidden = true;
      status.textContent = isOff
        ? 'This server keeps no audit log. Start it with --audit-db FILE to see its trips here.'
        : `No trips shown: ${(error as Error).message}`;
    }
  }
}

function row(trip: Trip): HTMLTableRowElement {
  const cell = (main: string, more: string) =>
    el('td', {}, el('span', {}, main), el('small', {}, more));
  return el(
    'tr',
    { title: `request ${trip.request_id}, model ${trip.model}` },
    cell(clock(trip.time), trip.key_id === 'anonymous' ? 'no key' : `key ${trip.key_id}`),
    cell(trip.phase, `token ${trip.token_index ?? 'unknown'}`),
    cell(`${logit(trip.score)} of ${logit(trip.threshold)}`, trip.probe ?? 'no score'),
    cell(trip.policy, trip.action),
  );
}
