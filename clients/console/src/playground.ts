/** The conversation: sends a message, and shows the answer token by token as it comes. */

import { type Api, ApiError, type Breaker, type ChatBody, type Message, type Model } from './api';
import { Composer } from './composer';
import { asCurl } from './curl';
import { byId } from './dom';
import { count, signed } from './format';
import { Inspector } from './inspector';
import { ScoreChart } from './scorechart';
import { type Guard, type TokenScore } from './scores';
import { Turn } from './turn';

/** Redrawing the chart costs more than adding tokens, and no eye follows it at 60 Hz. */
const CHART_MS = 100;
/** Pixels from the end of the conversation within which it is followed. */
const NEAR_END = 40;

export class Playground {
  readonly #api: Api;
  readonly #composer: Composer;
  readonly #onEnd: () => void;
  readonly #conversation = byId('conversation', HTMLElement);
  readonly #send = byId('send', HTMLButtonElement);
  readonly #inspector: Inspector;
  readonly #chart: ScoreChart;
  readonly #turns = new Map<HTMLElement, Turn>();
  #history: Message[] = [];
  /** Tokens that the next prompt begins with. */
  #context: (string | null)[] = [];
  #lastBody: ChatBody | null = null;
  #streaming: AbortController | null = null;
  #frame = 0;
  #charted = 0;
  #follows = true;

  /** @param onEnd called when an answer has ended */
  constructor(api: Api, breaker: Breaker, models: Model[], onEnd: () => void) {
    this.#api = api;
    this.#onEnd = onEnd;
    this.#composer = new Composer(breaker, models);
    const box = byId('inspector', HTMLElement);
    this.#inspector = new Inspector(this.#conversation, box, (token) => this.#point(token));
    this.#chart = new ScoreChart((token) => {
      if (token) this.#inspector.show(token);
      else this.#inspector.hide();
    });
    this.#composer.form.addEventListener('submit', (event) => {
      event.preventDefault();
      if (this.#streaming) this.#streaming.abort();
      else void this.#ask();
    });
    byId('clear', HTMLButtonElement).addEventListener('click', () => this.#clear());
    byId('curl', HTMLButtonElement).addEventListener('click', () => void this.#copyCurl());
    byId('curl-close', HTMLButtonElement).addEventListener('click', () => byId('curl-dialog', HTMLDialogElement).close());
    document.addEventListener('keydown', (event) => {
      if (event.key !== 'Escape') return;
      this.#inspector.hide();
      this.#streaming?.abort();
    });
    this.#conversation.addEventListener(
      'scroll',
      () => {
        const { scrollHeight, scrollTop, clientHeight } = this.#conversation;
        this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
      },
      { passive: true },
    );
    for (const example of document.querySelectorAll<HTMLButtonElement>('#welcome button')) {
      example.addEventListener('click', () => (this.#composer.text = example.textContent ?? ''));
    }
  }

  async #ask(): Promise<void> {
    const text = this.#composer.text;
    if (text === '') return;
    const body = (this.#lastBody = this.#composer.body(this.#history, text));
    const turn = new Turn(text, this.#context);
    this.#turns.set(turn.element, turn);
    byId('welcome', HTMLElement).hidden = true;
    this.#conversation.append(turn.element);
    this.#composer.text = '';
    this.#chart.show(turn);
    this.#follows = true;
    this.#scrollToEnd();
    const { signal } = (this.#streaming = new AbortController());
    this.#setStreaming(true);
    try {
      const guard = await this.#stream(body, turn, signal);
      turn.end(guard);
      if (guard !== null && !(guard.tripped && guard.mode === 'enforce')) this.#keep(text, turn);
      this.#announce(turn, guard?.tripped ?? false);
    } catch (error) {
      if (signal.aborted) turn.stop();
      else turn.fail(error instanceof ApiError ? error : new ApiError(0, { message: String(error) }));
      this.#announce(turn, turn.tripIndex !== null);
    } finally {
      this.#streaming = null;
      this.#setStreaming(false);
      this.#charted = 0;
      this.#draw(turn);
      this.#inspector.makeReachable();
      this.#onEnd();
    }
  }

  async #stream(body: ChatBody, turn: Turn, signal: AbortSignal): Promise<Guard | null> {
    let guard: Guard | null = null;
    for await (const chunk of this.#api.chat(body, signal)) {
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      turn.content += choice.delta?.content ?? '';
      const items: TokenScore[] = choice.token_scores ?? [];
      if (items.length > 0) {
        turn.add(items);
        this.#schedule(turn);
      }
      guard = choice.guard ?? guard;
    }
    return guard;
  }

  /** What was tripped or broken off is not said again, as it would trip again. */
  #keep(text: string, turn: Turn): void {
    this.#history.push({ role: 'user', content: text }, { role: 'assistant', content: turn.content });
    this.#context = turn.items.map((item) => item.token);
  }

  #schedule(turn: Turn): void {
    if (this.#frame !== 0) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      turn.flush();
      this.#draw(turn);
    });
  }

  #draw(turn: Turn): void {
    this.#scrollToEnd();
    if (this.#chart.turn !== turn || performance.now() - this.#charted < CHART_MS) return;
    this.#charted = performance.now();
    this.#chart.refresh();
  }

  #scrollToEnd(): void {
    if (this.#follows) this.#conversation.scrollTop = this.#conversation.scrollHeight;
  }

  #point(token: HTMLElement): void {
    const turn = this.#turns.get(token.closest<HTMLElement>('.turn') ?? token);
    if (turn === undefined) return;
    if (this.#chart.turn !== turn) this.#chart.show(turn);
    const index = turn.items.find((item) => turn.elementAt(item.index) === token)?.index;
    if (index !== undefined) this.#chart.point(index);
  }

  #setStreaming(streams: boolean): void {
    this.#send.textContent = streams ? 'Stop' : 'Send';
    this.#send.dataset['state'] = streams ? 'stop' : 'send';
    this.#conversation.setAttribute('aria-busy', String(streams));
    byId('clear', HTMLButtonElement).disabled = streams;
  }

  #announce(turn: Turn, tripped: boolean): void {
    const verdict = turn.element.querySelector('.verdict')?.textContent ?? '';
    const closest = turn.closest;
    byId('announcement', HTMLElement).textContent =
      `${count(turn.items.length, 'token')}. ${verdict}` +
      (tripped || closest === null ? '' : ` Highest score is ${signed(closest)} from its threshold.`);
  }

  #clear(): void {
    this.#history = [];
    this.#context = [];
    for (const element of this.#turns.keys()) element.remove();
    this.#turns.clear();
    this.#chart.show(null);
    byId('welcome', HTMLElement).hidden = false;
    byId('announcement', HTMLElement).textContent = 'The conversation is empty.';
  }

  /** What is typed, else what was asked last, as a command. */
  async #copyCurl(): Promise<void> {
    const { text } = this.#composer;
    const body = text === '' && this.#lastBody !== null ? this.#lastBody : this.#composer.body(this.#history, text);
    const command = asCurl(location.origin, body);
    byId('curl-text', HTMLElement).textContent = command;
    const status = byId('curl-status', HTMLElement);
    try {
      await navigator.clipboard.writeText(command);
      status.textContent = 'Copied. Set KEY to your key in the shell.';
    } catch {
      // Without HTTPS browsers have no clipboard.
      status.textContent = 'Copy it from here, and set KEY to your key in the shell.';
    }
    byId('curl-dialog', HTMLDialogElement).showModal();
  }
}
