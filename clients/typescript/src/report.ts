/** The guard report: what the breaker saw of one answer. */

/** observe reports and never stops; enforce stops the request. */
export type Mode = 'observe' | 'enforce';
export type Phase = 'prompt' | 'completion';

/** What the breaker saw of one answer, with the server's names. */
export interface GuardReport {
  readonly breaker: string;
  readonly policy: string;
  readonly mode: Mode;
  /** In observe mode too, where nothing was stopped. */
  readonly tripped: boolean;
  /** Where it tripped; null without a trip. */
  readonly phase: Phase | null;
  /** The probe that tripped, else the one closest to its threshold; null before any score. */
  readonly probe: string | null;
  /** A logit: at the trip, else the highest; null when unknown. */
  readonly score: number | null;
  readonly threshold: number | null;
  /** 0-based position in prompt + completion of the token that `score` belongs to. */
  readonly token_index: number | null;
}

/** What the breaker saw of one token of a choice, with the server's names. */
export interface TokenScore {
  /** 0-based position in prompt + completion. */
  readonly index: number;
  readonly phase: Phase;
  /** Its text; null where it is withheld, as for the token that trips. */
  readonly token: string | null;
  /** A logit, of the probe that is closest to its threshold; null where no score is judged. */
  readonly score: number | null;
  readonly probe: string | null;
  readonly threshold: number | null;
}

/** The `guard` object of an answer; null for anything that is not one. */
export function parseReport(value: unknown): GuardReport | null {
  const guard = asObject(value);
  if (guard === null) return null;
  const { breaker, policy, mode, tripped } = guard;
  const { phase = null, probe = null, score = null, threshold = null, token_index = null } = guard;
  if (typeof breaker !== 'string' || typeof policy !== 'string') return null;
  if (mode !== 'observe' && mode !== 'enforce') return null;
  if (typeof tripped !== 'boolean') return null;
  if (phase !== null && phase !== 'prompt' && phase !== 'completion') return null;
  if (probe !== null && typeof probe !== 'string') return null;
  if (score !== null && typeof score !== 'number') return null;
  if (threshold !== null && typeof threshold !== 'number') return null;
  if (token_index !== null && !isIndex(token_index)) return null;
  const report = { breaker, policy, mode, tripped, phase, probe, score, threshold, token_index };
  return Object.freeze(report as GuardReport);
}

/** The report that stands for several choices: the first trip, else the closest to one. */
export function worst(reports: Iterable<GuardReport>): GuardReport | null {
  let closest: GuardReport | null = null;
  let closestMargin = -Infinity;
  for (const report of reports) {
    if (report.tripped) return report;
    const { score, threshold } = report;
    const margin = score !== null && threshold !== null ? score - threshold : -Infinity;
    if (closest === null || margin > closestMargin) [closest, closestMargin] = [report, margin];
  }
  return closest;
}

/** A JSON object, or null. */
export function asObject(value: unknown): Record<string, unknown> | null {
  return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : null;
}

/** The report of a whole answer, a choice, a chunk, an event, or an error's JSON. */
export function guardIn(answer: unknown): GuardReport | null {
  const body = asObject(answer);
  for (const place of [body, asObject(body?.['response']), asObject(body?.['error'])]) {
    const report = parseReport(place?.['guard']);
    if (report !== null) return report;
  }
  return null;
}

/** The `token_scores` of a choice, or of an error's JSON; null where there are none. */
export function tokenScoresIn(answer: unknown): readonly TokenScore[] | null {
  const body = asObject(answer);
  const found = body?.['token_scores'] ?? asObject(body?.['error'])?.['token_scores'];
  return Array.isArray(found) && found.every(isTokenScore) ? found : null;
}

function isTokenScore(value: unknown): value is TokenScore {
  const item = asObject(value);
  if (item === null || !isIndex(item['index'])) return false;
  if (item['phase'] !== 'prompt' && item['phase'] !== 'completion') return false;
  const fits = (name: string, type: string) => item[name] === null || typeof item[name] === type;
  return ['token', 'probe'].every((name) => fits(name, 'string')) &&
    ['score', 'threshold'].every((name) => fits(name, 'number'));
}

function isIndex(value: unknown): value is number {
  return Number.isInteger(value);
}
