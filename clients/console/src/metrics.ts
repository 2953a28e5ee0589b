/** Counters of requests and trips out of Prometheus' text format. */

/** Sums over models and policies since the server's start. */
export interface Totals {
  ok: number;
  /** Requests that ended in a trip that stopped them. */
  tripped: number;
  rejected: number;
  aborted: number;
  error: number;
  stopped: number;
  observed: number;
}

const SAMPLE = /^circuit_breakers_(requests|trips)_total\{(.*)\} (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

export function totalsOf(text: string): Totals {
  const totals: Totals = { ok: 0, tripped: 0, rejected: 0, aborted: 0, error: 0, stopped: 0, observed: 0 };
  for (const line of text.split('\n')) {
    const [, series, labels = '', value] = SAMPLE.exec(line) ?? [];
    if (series === undefined) continue;
    const wanted = series === 'requests' ? 'outcome' : 'action';
    const found = [...labels.matchAll(LABEL)].find(([, name]) => name === wanted)?.[2] ?? '';
    const name = found.startsWith('tripped_') ? 'tripped' : found;
    if (name in totals) totals[name as keyof Totals] += Number(value);
  }
  return totals;
}

/** What was counted between two scrapes; after a restart, what the new process has counted. */
export function difference(now: Totals, before: Totals): Totals {
  const names = Object.keys(now) as (keyof Totals)[];
  const hasRestarted = names.some((name) => now[name] < before[name]);
  return hasRestarted ? now : (Object.fromEntries(names.map((name) => [name, now[name] - before[name]])) as unknown as Totals);
}
