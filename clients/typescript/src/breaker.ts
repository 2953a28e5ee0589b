/** The breaker that is live, and what operators can ask of it: trips, what-if, reload. */

import { NotFoundError, type OpenAI } from 'openai';
import { UnguardedError } from './errors.js';
import { type Mode, type Phase, asObject } from './report.js';

/** How requests are judged under one policy. */
export interface PolicyState {
  policy: string;
  mode: Mode;
  action: 'stop' | 'refuse' | 'error';
  phases: Phase[];
  /** Names of the probes that are judged. */
  judged: string[];
  /** The promise that the policy keeps; null for thresholds of the operator's own, and where means
   * start with the completion. */
  operating_point: Record<string, unknown> | null;
  probes: Record<string, unknown>[];
}

/** The breaker, and the policy of whoever asks. */
export interface Breaker extends PolicyState {
  object: 'breaker';
  name: string;
  digest: string;
  /** ISO 8601. */
  created: string;
  calibration_age_s: number;
  base_model: Record<string, unknown>;
  /** Every policy, for admins. */
  policies?: PolicyState[];
}

/** One trip in the audit log, without content. */
export interface Trip {
  object: 'breaker.trip';
  id: string;
  sequence: number;
  /** ISO 8601. */
  time: string;
  action: string;
  request_id: string;
  key_id: string;
  model: string;
  policy: string;
  breaker: string;
  phase: Phase;
  probe: string | null;
  score: number | null;
  threshold: number | null;
  token_index: number | null;
  choice: number | null;
}

/** Trips, the newest first. */
export interface TripPage {
  object: 'list';
  data: Trip[];
  has_more: boolean;
  next_cursor: number | null;
  /** Trips that the log has not taken in yet. */
  num_pending: number;
}

export interface TripQuery {
  /** Included; a string is ISO 8601 with its offset. */
  since?: Date | string;
  /** Excluded. */
  until?: Date | string;
  /** Public id of an API key. */
  key?: string;
  policy?: string;
  phase?: Phase;
  probe?: string;
  /** Trips on one page, at most 500. */
  limit?: number;
  /** `next_cursor` of the page to go on after. */
  cursor?: number;
}

/** Requests of one policy, by the phase in which they would first trip. */
export interface WhatIfGroup {
  breaker: string;
  policy: string;
  phase: Phase | 'all';
  num_requests: number;
  num_tripped: number;
  num_would_trip: number;
  /** Stopped before it could be told. */
  num_unknown: number;
  share: number | null;
  share_low: number;
  share_high: number;
}

/** What other thresholds would have done to the requests of the last days. */
export interface WhatIf {
  object: 'breaker.what_if';
  breaker: string;
  days: number;
  since: string;
  is_complete: boolean;
  thresholds: Record<string, number>;
  data: WhatIfGroup[];
  /** What the numbers cannot know. */
  notes: string[];
}

/** `threshold` is a logit for every probe; `target_fpr` takes what the calibration proves. */
export type WhatIfQuery = { days?: number } & (
  | { threshold: number; target_fpr?: never }
  | { target_fpr: number; threshold?: never }
);

/** What is in force after the policy file was read again. */
export interface ReloadedPolicies {
  object: 'breaker.policies';
  digest: string | null;
  default: string | null;
  policies: string[];
  key_ids: string[];
}

export class BreakerResource {
  readonly #client: OpenAI;

  constructor(client: OpenAI) {
    this.#client = client;
  }

  /** The breaker that is live; throws UnguardedError where the server names none. */
  async retrieve(): Promise<Breaker> {
    let answer: unknown;
    try {
      answer = await this.#client.get<unknown>('/breaker');
    } catch (error) {
      if (!(error instanceof NotFoundError)) throw error;
      throw new UnguardedError('HTTP 404 on /breaker: no breaker');
    }
    // A catch-all route may say 200 to anything.
    const body = asObject(answer);
    if (body?.['object'] !== 'breaker' || typeof body['digest'] !== 'string') {
      throw new UnguardedError('something else than a breaker on /breaker');
    }
    return answer as Breaker;
  }

  /** Every trip that fits, the newest first, page by page as they are asked for. */
  async *trips(query: TripQuery = {}): AsyncGenerator<Trip> {
    for await (const page of this.tripPages(query)) yield* page.data;
  }

  /** Pages of the trips that fit; for admins. */
  async *tripPages(query: TripQuery = {}): AsyncGenerator<TripPage> {
    const { since, until, ...rest } = query;
    const times = { ...isoTime('since', since), ...isoTime('until', until) };
    let cursor = query.cursor;
    do {
      const page: TripPage = await this.#client.get<TripPage>('/breaker/trips', {
        query: { ...rest, ...times, ...(cursor === undefined ? {} : { cursor }) },
      });
      yield page;
      cursor = page.next_cursor ?? undefined;
    } while (cursor !== undefined);
  }

  /** What other thresholds would have done to the requests of the last days; for admins. */
  async whatIf(query: WhatIfQuery): Promise<WhatIf> {
    return await this.#client.get<WhatIf>('/breaker/what-if', { query: { ...query } });
  }

  /** Makes the server read its policy file again; for admins. */
  async reload(): Promise<ReloadedPolicies> {
    return await this.#client.post<ReloadedPolicies>('/breaker/reload');
  }
}

function isoTime(name: string, time: Date | string | undefined): Record<string, string> {
  if (time === undefined) return {};
  return { [name]: typeof time === 'string' ? time : time.toISOString() };
}
