/** The box that tells a token's numbers, on hover, on focus, and under the chart's cursor. */

import { el } from './dom';
import { logit, signed } from './format';
import { type TokenScore, margin } from './scores';
import { scoreOf } from './turn';

export class Inspector {
  readonly #root: HTMLElement;
  readonly #box: HTMLElement;
  readonly #onShow: (element: HTMLElement) => void;
  #shown: HTMLElement | null = null;

  /**
   * @param root holds the tokens
   * @param onShow called with a token that a pointer or the keyboard is on
   */
  constructor(root: HTMLElement, box: HTMLElement, onShow: (element: HTMLElement) => void) {
    this.#root = root;
    this.#box = box;
    this.#onShow = onShow;
    root.addEventListener('pointerover', (event) => this.#pick(event.target));
    root.addEventListener('pointerleave', () => this.hide());
    root.addEventListener('focusin', (event) => this.#pick(event.target));
    root.addEventListener('focusout', () => this.hide());
    root.addEventListener('scroll', () => this.hide(), { passive: true });
    root.addEventListener('keydown', (event) => this.#move(event));
  }

  /** Shows a token's numbers beside it. */
  show(element: HTMLElement): void {
    const item = scoreOf(element);
    if (item === undefined || element === this.#shown) return;
    this.hide();
    this.#shown = element;
    element.classList.add('shown');
    element.setAttribute('aria-describedby', this.#box.id);
    this.#box.replaceChildren(...lines(item));
    this.#box.hidden = false;
    const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#box;
    const left = Math.min(Math.max(8, at.left + at.width / 2 - width / 2), innerWidth - width - 8);
    const above = at.top - height - 8;
    this.#box.style.left = `${left}px`;
    this.#box.style.top = `${above >= 8 ? above : at.bottom + 8}px`;
  }

  hide(): void {
    this.#shown?.classList.remove('shown');
    this.#shown?.removeAttribute('aria-describedby');
    this.#shown = null;
    this.#box.hidden = true;
  }

  /** Makes one token of the page reachable by Tab: the last one, or where the user was. */
  makeReachable(): void {
    if (this.#root.querySelector('.t[tabindex="0"]')) return;
    const tokens = this.#tokens();
    const last = tokens.at(-1);
    if (last) last.tabIndex = 0;
  }

  #pick(target: EventTarget | null): void {
    const element = target instanceof HTMLElement && target.closest<HTMLElement>('.t');
    if (!element) {
      this.hide();
      return;
    }
    this.show(element);
    this.#onShow(element);
  }

  #move(event: KeyboardEvent): void {
    const from = event.target;
    if (!(from instanceof HTMLElement) || !from.classList.contains('t')) return;
    const steps: Record<string, number> = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const tokens = this.#tokens();
    const wanted = Math.min(Math.max(0, tokens.indexOf(from) + step), tokens.length - 1);
    const to = tokens[wanted];
    if (to === undefined) return;
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  #tokens(): HTMLElement[] {
    return [...this.#root.querySelectorAll<HTMLElement>('.t')].filter((token) => !token.closest('[hidden]'));
  }
}

function lines(item: TokenScore): HTMLElement[] {
  const text = item.token === null ? 'withheld' : JSON.stringify(item.token);
  const head = el('p', {}, el('b', {}, text), ` token ${item.index}, ${item.phase}`);
  const distance = margin(item);
  if (distance === null) return [head, el('p', {}, 'not scored')];
  return [
    head,
    el('p', {}, `score ${logit(item.score)}, threshold ${logit(item.threshold)}`),
    el('p', {}, `margin ${signed(distance)}, probe ${item.probe}`),
  ];
}
