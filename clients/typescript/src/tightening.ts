/** A request may ask for a stricter policy than its caller's; the server refuses a looser one. */

import type { Mode } from './report.js';

/** Header with the name of a policy, e.g. for defaultHeaders of a whole client. */
export const POLICY_HEADER = 'X-Breaker-Policy';

export interface Tightening {
  /** Name of a policy of the server's, to start from instead of the caller's own. */
  policy?: string;
  /** 'enforce' stops where the caller's policy only observes. */
  mode?: Mode;
  /** Thresholds that the breaker's calibration proves this share of false trips for. */
  target_fpr?: number;
  /** A logit for all probes, or one each by name. */
  threshold?: number | Record<string, number>;
  /** The score of each token, for an admin key: see tokenScoresOf. It tightens nothing. */
  token_scores?: boolean;
}

/** Fields that tighten one request: `create({ ...params, ...tighten({ policy: 'strict' }) })`. */
export function tighten(asked: Tightening): { guard: Tightening } {
  if (asked.target_fpr !== undefined && asked.threshold !== undefined) {
    throw new TypeError('got target_fpr and threshold, expected one; remove one');
  }
  const given = Object.entries(asked).filter(([, value]) => value !== undefined);
  if (given.length === 0) {
    throw new TypeError(
      'got nothing, expected policy, mode, target_fpr, threshold or token_scores; pass one',
    );
  }
  return { guard: Object.fromEntries(given) };
}
