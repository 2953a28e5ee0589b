/** What this client throws besides openai's own errors. */

import { OpenAIError } from 'openai';
import type { GuardReport, Phase } from './report.js';

/** The breaker stopped a request, and onTrip is 'raise'. */
export class TrippedError extends OpenAIError {
  override readonly name = 'TrippedError';

  /** @param partialText what came before the trip, or the refusal in its place */
  constructor(
    readonly report: GuardReport,
    readonly partialText = '',
    options?: { cause: unknown },
  ) {
    super(
      `the ${report.phase} was stopped by breaker '${report.breaker}' at token ` +
        `${report.token_index}: score ${report.score} of probe '${report.probe}', threshold ` +
        `${report.threshold}, policy '${report.policy}'`,
    );
    if (options !== undefined) this.cause = options.cause;
  }

  get phase(): Phase | null {
    return this.report.phase;
  }
  get score(): number | null {
    return this.report.score;
  }
  get threshold(): number | null {
    return this.report.threshold;
  }
  get probe(): string | null {
    return this.report.probe;
  }
  get tokenIndex(): number | null {
    return this.report.token_index;
  }
  get policy(): string {
    return this.report.policy;
  }
}

/** There is no guard report where one is required; the answer is withheld. */
export class UnguardedError extends OpenAIError {
  override readonly name = 'UnguardedError';

  constructor(got: string) {
    super(
      `got ${got}, expected a guard report; check baseURL and that the server runs a circuit ` +
        'breaker (GET /v1/breaker), or pass requireGuard: false',
    );
  }
}
