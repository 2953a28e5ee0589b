/** Streams that are checked as they are read; otherwise openai's own. */

import { Stream } from 'openai/core/streaming';
import { type Rules, StreamWatch } from './answers.js';
import type { GuardReport } from './report.js';

/** A stream that throws in place of the chunk that ends it, where its client's rules say so. */
export class GuardedStream<Item> extends Stream<Item> {
  readonly #watch: StreamWatch;

  constructor(inner: Stream<Item>, rules: Rules) {
    const watch = new StreamWatch(rules);
    super(() => watched(inner, watch), inner.controller);
    this.#watch = watch;
  }

  /** What the breaker saw; null until the last chunk was read. */
  get guard(): GuardReport | null {
    return this.#watch.report;
  }
}

async function* watched<Item>(inner: Stream<Item>, watch: StreamWatch): AsyncGenerator<Item> {
  try {
    for await (const item of inner) {
      watch.see(item);
      yield item;
    }
  } catch (error) {
    watch.seeError(error);
    throw error;
  }
  // Whoever aborts a stream does not get its end.
  if (!inner.controller.signal.aborted) watch.seeEnd();
}
