/** One exchange on the page: the tokens that were read and written, and the guard's verdict. */

import type { ApiError } from './api';
import { el } from './dom';
import { count, logit, signed } from './format';
import { type Guard, type TokenScore, band, isSpecial, margin } from './scores';

/** Tokens of earlier exchanges at a prompt's beginning from which on they are folded away. */
const MIN_FOLDED = 8;

const scored = new WeakMap<Element, TokenScore>();

/** The score that a token's element stands for. */
export function scoreOf(element: Element): TokenScore | undefined {
  return scored.get(element);
}

/** Columns of the chart: position, score, threshold. */
export type Curve = [number[], (number | null)[], (number | null)[]];

export class Turn {
  readonly element = el('article', { class: 'turn' });
  readonly items: TokenScore[] = [];
  readonly curve: Curve = [[], [], []];
  /** First position of the completion, once there is one. */
  completionStart: number | null = null;
  /** Position of the token that tripped. */
  tripIndex: number | null = null;
  /** What the client got as the answer's text. */
  content = '';

  readonly #elements = new Map<number, HTMLElement>();
  readonly #context: readonly (string | null)[];
  readonly #said: HTMLElement;
  readonly #read = new Block('Prompt');
  readonly #written = new Block('Completion');
  #queue: TokenScore[] = [];

  /**
   * @param text what the user said, shown until the prompt's tokens are there
   * @param context tokens of the conversation so far, which the prompt repeats
   */
  constructor(text: string, context: readonly (string | null)[]) {
    this.#context = context;
    this.#said = el('p', { class: 'tokens waiting' }, text);
    this.#read.element.append(this.#said);
    this.element.append(this.#read.element);
  }

  /** Takes tokens in; they are shown by the next `flush`. */
  add(items: TokenScore[]): void {
    this.#queue.push(...items);
  }

  elementAt(index: number): HTMLElement | undefined {
    return this.#elements.get(index);
  }

  /** Shows what came in since the last call, in one change of the page; whether there was any. */
  flush(): boolean {
    const fresh = this.#queue;
    if (fresh.length === 0) return false;
    this.#queue = [];
    const isFirst = this.items.length === 0;
    this.items.push(...fresh);
    const [positions, scores, thresholds] = this.curve;
    for (const item of fresh) {
      positions.push(item.index);
      scores.push(item.score);
      thresholds.push(item.threshold);
    }
    const read = fresh.filter((item) => item.phase === 'prompt');
    const written = fresh.filter((item) => item.phase === 'completion');
    if (read.length > 0) {
      this.#said.remove();
      const numFolded = isFirst ? this.#numOfContext(read) : 0;
      if (numFolded > 0) this.#read.addFolded(read.slice(0, numFolded).map(this.#token));
      this.#read.add(read.slice(numFolded).map(this.#token));
    }
    if (written.length > 0) {
      this.completionStart ??= written[0]?.index ?? null;
      if (!this.#written.element.isConnected) this.#read.element.after(this.#written.element);
      this.#written.add(written.map(this.#token));
    }
    return true;
  }

  /** The answer is complete, or was stopped by its guard. */
  end(guard: Guard | null): void {
    this.flush();
    if (guard === null) {
      this.#close('warn', 'The answer has no guard report: this text was not guarded.');
    } else if (guard.tripped) {
      this.#showTrip(guard);
    } else {
      const distance = guard.score === null || guard.threshold === null ? null : guard.score - guard.threshold;
      this.#close(
        'ok',
        distance === null
          ? 'No trip.'
          : `No trip. Closest: ${signed(distance)} to the threshold of ${guard.probe} at token ${guard.token_index}.`,
      );
    }
  }

  /** No answer, or none to its end. */
  fail(error: ApiError): void {
    this.flush();
    // Those of an error begin at the beginning again.
    const known = this.items.at(-1)?.index ?? -1;
    this.add((error.body.token_scores ?? []).filter((item) => item.index > known));
    this.flush();
    if (error.body.guard?.tripped) this.#showTrip(error.body.guard);
    else this.#close('warn', `${error.status > 0 ? `HTTP ${error.status}: ` : ''}${error.message}`);
  }

  /** The user has stopped it. */
  stop(): void {
    this.flush();
    this.#close('warn', 'Stopped by you.');
  }

  #showTrip(guard: Guard): void {
    const wasStopped = guard.mode === 'enforce';
    this.tripIndex = guard.token_index;
    const element = guard.token_index === null ? undefined : this.#elements.get(guard.token_index);
    const where = guard.phase === 'prompt' ? 'Prompt' : 'Completion';
    const verb = wasStopped ? 'tripped' : 'would have tripped';
    const mark = el('span', { class: 'trip-mark' }, wasStopped ? 'trip' : 'trip, observed');
    element?.classList.add('tripping');
    if (element) element.after(mark);
    else (guard.phase === 'prompt' ? this.#read : this.#written).append(mark);
    this.#close(
      'tripped',
      `${where} ${verb} at token ${guard.token_index}: score ${logit(guard.score)} reached the ` +
        `threshold ${logit(guard.threshold)} of ${guard.probe}.` +
        (wasStopped && guard.phase === 'prompt' ? ' Nothing was generated.' : ''),
    );
    const shown = this.items.map((item) => (item.phase === 'completion' ? (item.token ?? '') : '')).join('');
    // Under the action `refuse` the client gets another text than the model's.
    if (wasStopped && this.content !== '' && this.content !== shown) {
      this.element.append(el('p', { class: 'sent' }, 'The client got: ', el('q', {}, this.content)));
    }
  }

  #close(kind: 'ok' | 'tripped' | 'warn', text: string): void {
    const numRead = this.items.filter((item) => item.phase === 'prompt').length;
    this.#read.count(numRead);
    this.#written.count(this.items.length - numRead);
    this.element.dataset['verdict'] = kind;
    this.element.append(el('p', { class: `verdict ${kind}` }, text));
  }

  #numOfContext(read: TokenScore[]): number {
    let same = 0;
    while (same < this.#context.length && this.#context[same] === read[same]?.token) same += 1;
    return same >= MIN_FOLDED ? same : 0;
  }

  readonly #token = (item: TokenScore): HTMLElement => {
    const element = document.createElement('span');
    const level = band(item);
    element.className = `t ${level === null ? 'unscored' : `b${level}`}`;
    if (item.token === null) {
      element.classList.add('withheld');
      element.textContent = 'withheld';
    } else {
      if (isSpecial(item.token)) element.classList.add('special');
      element.append(...textParts(item.token));
    }
    element.tabIndex = -1;
    scored.set(element, item);
    this.#elements.set(item.index, element);
    return element;
  };

  /** The smallest distance so far, for people who cannot see the colours. */
  get closest(): number | null {
    const known = this.items.map(margin).filter((distance) => distance !== null);
    return known.length > 0 ? Math.max(...known) : null;
  }
}

/** A token's text, each line break marked by the style sheet. */
function textParts(text: string): (string | HTMLElement)[] {
  return text.split(/(?=\n)/).map((part) => (part.startsWith('\n') ? el('span', { class: 'newline' }, part) : part));
}

/** The tokens of one phase under their heading. */
class Block {
  readonly element = el('section', { class: 'block' });
  readonly #count = el('small');
  readonly #tokens = el('p', { class: 'tokens' });

  constructor(name: string) {
    this.element.append(el('h3', {}, name, ' ', this.#count), this.#tokens);
  }

  add(tokens: HTMLElement[]): void {
    this.#tokens.append(...tokens);
  }

  append(mark: HTMLElement): void {
    this.#tokens.append(mark);
  }

  /** Tokens that are shown when asked for. */
  addFolded(tokens: HTMLElement[]): void {
    const folded = el('span', { class: 'folded' }, ...tokens);
    folded.hidden = true;
    const button = el(
      'button',
      { type: 'button', class: 'fold', 'aria-expanded': 'false' },
      `${count(tokens.length, 'earlier token')}`,
    );
    button.addEventListener('click', () => {
      folded.hidden = !folded.hidden;
      button.setAttribute('aria-expanded', String(!folded.hidden));
    });
    this.#tokens.append(button, folded);
  }

  count(number: number): void {
    this.#count.textContent = number > 0 ? count(number, 'token') : '';
  }
}
