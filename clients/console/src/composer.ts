/** The form below the conversation: a message, and how it is asked. */

import type { Breaker, ChatBody, Message, Model, PolicyState } from './api';
import { byId, el } from './dom';
import { logit } from './format';
import { highestThreshold, loosening } from './policies';

export class Composer {
  readonly form = byId('composer', HTMLFormElement);
  readonly #prompt = byId('prompt', HTMLTextAreaElement);
  readonly #model = byId('model', HTMLSelectElement);
  readonly #policy = byId('policy', HTMLSelectElement);
  readonly #enforce = byId('enforce', HTMLInputElement);
  readonly #threshold = byId('threshold', HTMLInputElement);
  readonly #maxTokens = byId('max-tokens', HTMLInputElement);
  readonly #temperature = byId('temperature', HTMLInputElement);
  readonly #system = byId('system', HTMLTextAreaElement);
  readonly #own: PolicyState;
  readonly #policies: PolicyState[];

  constructor(breaker: Breaker, models: Model[]) {
    this.#own = breaker;
    this.#policies = breaker.policies ?? [];
    this.#model.replaceChildren(...models.map(({ id }) => el('option', {}, id)));
    byId('model-field', HTMLElement).hidden = models.length < 2;
    this.#maxTokens.max = String(Math.max(...models.map((model) => model.max_model_len)));
    const names = this.#policies.filter(({ policy }) => policy !== breaker.policy);
    this.#policy.replaceChildren(option(`${breaker.policy} (yours)`, ''), ...names.map((policy) => this.#option(policy)));
    this.#policy.addEventListener('change', () => this.#adjust());
    this.#adjust();
    this.#prompt.addEventListener('input', () => this.#grow());
    this.#prompt.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
  }

  /** What is typed. */
  get text(): string {
    return this.#prompt.value.trim();
  }

  set text(value: string) {
    this.#prompt.value = value;
    this.#grow();
    this.#prompt.focus();
  }

  /** The request that asks for the next answer. */
  body(history: Message[], text: string): ChatBody {
    const system = this.#system.value.trim();
    const threshold = this.#threshold.valueAsNumber;
    return {
      model: this.#model.value,
      messages: [
        ...(system === '' ? [] : [{ role: 'system' as const, content: system }]),
        ...history,
        { role: 'user', content: text },
      ],
      max_tokens: this.#maxTokens.valueAsNumber,
      temperature: this.#temperature.valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
      guard: {
        token_scores: true,
        ...(this.#policy.value === '' ? {} : { policy: this.#policy.value }),
        ...(this.#enforce.checked ? { mode: 'enforce' as const } : {}),
        ...(Number.isNaN(threshold) ? {} : { threshold }),
      },
    };
  }

  #option(policy: PolicyState): HTMLOptionElement {
    const why = loosening(this.#own, policy);
    const made = option(why === null ? policy.policy : `${policy.policy}: ${why}`, policy.policy);
    // The server would refuse it.
    made.disabled = why !== null;
    return made;
  }

  #adjust(): void {
    const chosen = this.#policies.find(({ policy }) => policy === this.#policy.value) ?? this.#own;
    const highest = highestThreshold(chosen);
    this.#threshold.max = String(highest);
    this.#threshold.placeholder = logit(highest);
    const observes = chosen.mode === 'observe';
    byId('enforce-field', HTMLElement).hidden = !observes;
    if (!observes) this.#enforce.checked = false;
  }

  #grow(): void {
    this.#prompt.style.height = 'auto';
    this.#prompt.style.height = `${this.#prompt.scrollHeight + 2}px`;
  }
}

function option(text: string, value: string): HTMLOptionElement {
  const made = el('option', {}, text);
  made.value = value;
  return made;
}
