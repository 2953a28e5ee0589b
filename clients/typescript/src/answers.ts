/**
 * What an answer says of its guard, whole or chunk by chunk, and what to do about it.
 *
 *     chat completions, completions   `guard` on each choice and on the body or chunk
 *     responses                       `guard` on the response, in a stream on the last event's
 */

import { APIError } from 'openai';
import { TrippedError, UnguardedError } from './errors.js';
import { type GuardReport, asObject, guardIn, parseReport, worst } from './report.js';

/** A stopped answer is returned as openai's client returns it, or thrown as TrippedError. */
export type OnTrip = 'return' | 'raise';

const NO_CHOICE = -1;

/** What is made, kept, cancelled or compacted; input_tokens counts, and render makes token ids. */
const GUARDED_PATH = /\/(completions|responses)(\/(?!(input_tokens|render)\/*$)[^/]+(\/cancel)?)?\/*$/;
const OTHER_TEXT = ['reasoning', 'reasoning_content', 'refusal', 'tool_calls', 'function_call'];

/** Whether a request makes the model's text, or gives out text that was made. */
export function isGuarded(method: string, path: string): boolean {
  return /^(get|post)$/i.test(method) && GUARDED_PATH.test(path.replace(/[?#].*/s, ''));
}

/** What a client does with what it finds. */
export class Rules {
  constructor(
    readonly onTrip: OnTrip,
    readonly requireGuard: boolean,
  ) {}

  /** Passes an answer that is complete, or throws TrippedError or UnguardedError. */
  checkWhole(body: unknown): void {
    const report = guardIn(body);
    if (report === null) this.miss('an answer without one');
    else if (wasStopped(report, body)) this.stop(report, textOf(body));
  }

  /** Passes an error that is no trip, and every error where onTrip is 'return'. */
  checkError(error: unknown, said = ''): GuardReport | null {
    const report = error instanceof APIError ? guardIn({ error: error.error }) : null;
    if (report === null || !report.tripped) return null;
    this.stop(report, said, error);
    return report;
  }

  /** There is no report where one belongs. */
  miss(got: string): void {
    if (this.requireGuard) throw new UnguardedError(got);
  }

  /** The server has stopped a request. */
  stop(report: GuardReport, text: string, cause?: unknown): void {
    if (this.onTrip !== 'raise') return;
    throw new TrippedError(report, text, ...(cause === undefined ? [] : [{ cause }]));
  }
}

/** Follows one stream to its reports. */
export class StreamWatch {
  /** What each choice has said that has not ended. */
  readonly #text = new Map<number, string[]>();
  readonly #reports = new Map<number, GuardReport>();

  constructor(readonly rules: Rules) {}

  /** The report so far: of the first choice that tripped, else of the closest to it. */
  get report(): GuardReport | null {
    return worst(this.#reports.values());
  }

  /** Takes the next chunk or event in; throws as for a whole answer. */
  see(item: unknown): void {
    const event = asObject(item);
    const type = event?.['type'];
    if (type === 'response.output_text.delta') this.#say(0, event?.['delta']);
    else if (type === 'response.completed' || type === 'response.incomplete') {
      this.#end(0, event?.['response']);
    } else if (typeof type === 'string') this.#pass(0, event?.['delta'], event?.['text']);
    for (const one of listOf(event?.['choices'])) {
      const choice = asObject(one);
      const index = typeof choice?.['index'] === 'number' ? choice['index'] : 0;
      const delta = asObject(choice?.['delta']);
      this.#say(index, choice?.['text'] ?? delta?.['content']);
      this.#pass(index, ...OTHER_TEXT.map((name) => delta?.[name]));
      if (choice?.['finish_reason'] != null) this.#end(index, choice);
    }
  }

  /** Takes the error in that broke the stream off; throws if it is a trip that is to be thrown. */
  seeError(error: unknown): void {
    const report = error instanceof APIError ? guardIn({ error: error.error }) : null;
    // The error does not say which choice it was.
    if (report?.tripped) this.#reports.set(NO_CHOICE, report);
    this.rules.checkError(error, [...this.#text.values()].flat().join(''));
  }

  /** The stream is over; throws if something of it has no report and one is required. */
  seeEnd(): void {
    if (this.#reports.size === 0 || this.#text.size > 0) {
      this.rules.miss('a stream that ended without one');
    }
  }

  #say(index: number, text: unknown): void {
    this.#pass(index, text);
    // Annotations of a choice may follow its end.
    if (this.#reports.has(index)) return;
    const said = this.#text.get(index) ?? [];
    if (typeof text === 'string') said.push(text);
    this.#text.set(index, said);
  }

  #pass(index: number, ...said: unknown[]): void {
    // No report speaks for what comes after it.
    const isSaid = said.some((one) => (Array.isArray(one) ? one.length > 0 : Boolean(one)));
    if (isSaid && this.#reports.has(index)) this.rules.miss('text after its report');
  }

  #end(index: number, ended: unknown): void {
    const text = (this.#text.get(index) ?? []).join('');
    this.#text.delete(index);
    const report = parseReport(asObject(ended)?.['guard']);
    if (report === null) {
      this.rules.miss('a stream that ended without one');
      return;
    }
    this.#reports.set(index, report);
    if (wasStopped(report, ended)) this.rules.stop(report, text);
  }
}

/** A trip in observe mode stops nothing, except where a token had no score. */
function wasStopped(report: GuardReport, ended: unknown): boolean {
  if (!report.tripped) return false;
  const body = asObject(ended);
  return (
    report.mode === 'enforce' ||
    body?.['finish_reason'] === 'content_filter' ||
    asObject(body?.['incomplete_details'])?.['reason'] === 'content_filter' ||
    listOf(body?.['choices']).some((choice) => wasStopped(report, choice))
  );
}

/** What the choice that was stopped says, or the whole response. */
function textOf(body: unknown): string {
  const answer = asObject(body);
  for (const one of listOf(answer?.['choices'])) {
    const choice = asObject(one);
    if (!parseReport(choice?.['guard'])?.tripped) continue;
    const text = choice?.['text'] ?? asObject(choice?.['message'])?.['content'];
    return typeof text === 'string' ? text : '';
  }
  return listOf(answer?.['output'])
    .flatMap((item) => listOf(asObject(item)?.['content']))
    .map((part) => asObject(part)?.['text'])
    .filter((text) => typeof text === 'string')
    .join('');
}

function listOf(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}
