/** openai's client for a server that runs a circuit breaker: every answer has a guard report. */

export type { OnTrip } from './answers.js';
export type {
  Breaker,
  PolicyState,
  ReloadedPolicies,
  Trip,
  TripPage,
  TripQuery,
  WhatIf,
  WhatIfGroup,
  WhatIfQuery,
} from './breaker.js';
export { CircuitBreakers, type CircuitBreakersOptions, guardOf, tokenScoresOf } from './client.js';
export { TrippedError, UnguardedError } from './errors.js';
export type { GuardReport, Mode, Phase, TokenScore } from './report.js';
export { GuardedStream } from './stream.js';
export { POLICY_HEADER, type Tightening, tighten } from './tightening.js';
