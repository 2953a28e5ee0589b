/**
 * openai's client, for a server that runs a circuit breaker.
 *
 *     request -> server has a breaker? (once, before the first stream) -> openai -> report -> caller
 *
 * Whatever openai's client can be called with works as it does there; so do retries and timeouts.
 */

import { APIError, type APIPromise, type ClientOptions, OpenAI } from 'openai';
import { Stream } from 'openai/core/streaming';
import { type OnTrip, Rules, isGuarded } from './answers.js';
import { BreakerResource } from './breaker.js';
import { TrippedError } from './errors.js';
import { type GuardReport, type TokenScore, guardIn, tokenScoresIn } from './report.js';
import { GuardedStream } from './stream.js';

export interface CircuitBreakersOptions extends ClientOptions {
  /**
   * 'return' hands a stopped answer out as the server gives it: finish reason content_filter, or
   * openai's BadRequestError for a prompt. 'raise' throws TrippedError for both; in a stream, in
   * place of the chunk that ends the choice that was stopped.
   */
  onTrip?: OnTrip;
  /**
   * An answer without a guard report throws UnguardedError and is withheld (the default). A stream
   * is not begun where GET /v1/breaker finds no breaker.
   */
  requireGuard?: boolean;
}

type RequestOptions = Awaited<Parameters<OpenAI['request']>[0]>;

/** OpenAI's client with a guard report on every answer. */
export class CircuitBreakers extends OpenAI {
  /** The breaker that is live, and what operators can ask of it. */
  readonly breaker: BreakerResource;
  readonly #rules: Rules;
  #hasBreaker = false;

  /** Throws TypeError for an unknown onTrip, or without a base URL: a prompt that is meant for a
   * guarded server should not go to OpenAI by default. */
  constructor(options: CircuitBreakersOptions = {}) {
    const { onTrip = 'return', requireGuard = true } = options;
    if (onTrip !== 'return' && onTrip !== 'raise') {
      throw new TypeError(`got onTrip '${onTrip}', expected 'return' or 'raise'; change it`);
    }
    if (!(options.baseURL ?? environment('OPENAI_BASE_URL'))) {
      throw new TypeError(
        "got no base URL, expected the guarded server's; pass baseURL: 'http://HOST:8000/v1', " +
          'or set OPENAI_BASE_URL',
      );
    }
    // Whole, so that withOptions has this package's options too.
    super(options);
    this.#rules = new Rules(onTrip, requireGuard);
    this.breaker = new BreakerResource(this);
  }

  /** A client with other options, this package's or openai's. */
  override withOptions(options: Partial<CircuitBreakersOptions>): this {
    return super.withOptions(options);
  }

  /** Sends one request; everything that openai's methods ask goes through here. */
  override request<Rsp>(
    options: Parameters<OpenAI['request']>[0],
    remainingRetries: number | null = null,
  ): APIPromise<Rsp> {
    const asked = Promise.resolve(options).then((ready) => this.#prepared(ready));
    // openai promises no way to see an answer before its caller does, in whole and in parse();
    // its own helpers use this one. Were it gone, every request would fail.
    return super
      .request<Rsp>(asked, remainingRetries)
      ._thenUnwrap((answer, props) => this.#checked(answer, props.options));
  }

  protected override makeStatusError(
    ...[status, error, message, headers]: Parameters<OpenAI['makeStatusError']>
  ): APIError {
    const made = super.makeStatusError(status, error, message, headers);
    if (status === 400) this.#rules.checkError(made);
    return made;
  }

  async #prepared(options: RequestOptions): Promise<RequestOptions> {
    const { requireGuard } = this.#rules;
    const begins = isGuarded(options.method, options.path) && options.stream;
    if (begins && requireGuard && !this.#hasBreaker) {
      await this.breaker.retrieve();
      this.#hasBreaker = true;
    }
    return options;
  }

  #checked<Answer>(answer: Answer, options: RequestOptions): Answer {
    if (!isGuarded(options.method, options.path) || answer instanceof Response) return answer;
    if (answer instanceof Stream) return new GuardedStream(answer, this.#rules) as Answer;
    this.#rules.checkWhole(answer);
    return answer;
  }
}

/**
 * The guard report of an answer, a choice of it, a chunk or event of a stream, a stream that was
 * read to its end, an error, or plain JSON; null where it carries none.
 */
export function guardOf(source: unknown): GuardReport | null {
  if (source instanceof TrippedError) return source.report;
  if (source instanceof GuardedStream) return source.guard;
  if (source instanceof APIError) return guardIn({ error: source.error });
  return guardIn(source);
}

/**
 * The score of each token that a choice carries, or an error for a prompt, where they were asked for
 * by `tighten({ token_scores: true })`; null where there are none. In a stream, a chunk's choice has
 * those that are new.
 */
export function tokenScoresOf(source: unknown): readonly TokenScore[] | null {
  if (source instanceof TrippedError) return tokenScoresOf(source.cause);
  if (source instanceof APIError) return tokenScoresIn({ error: source.error });
  return tokenScoresIn(source);
}

function environment(name: string): string | undefined {
  const host = globalThis as { process?: { env?: Record<string, string | undefined> } };
  return host.process?.env?.[name];
}
