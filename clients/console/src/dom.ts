/** Elements. Every text goes in as text, never as HTML. */

type Child = Node | string;

interface Attributes {
  class?: string;
  title?: string;
  [name: `aria-${string}` | `data-${string}`]: string;
  role?: string;
  type?: string;
  scope?: string;
}

/** A new element with attributes and children. */
export function el<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[Name] {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** The element of index.html with this id; its absence is a bug of the page. */
export function byId<E extends HTMLElement>(id: string, kind: new () => E): E {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`got no ${kind.name} #${id} in index.html`);
  return element;
}

/** `work` some time after the last call, once. */
export function debounced(work: () => void, delayMs: number): () => void {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = window.setTimeout(work, delayMs);
  };
}

/** Calls `work` now and then every so often, while the page is visible; returns the end of it. */
export function whileVisible(work: () => void, everyMs: number): () => void {
  const tick = () => {
    if (!document.hidden) work();
  };
  tick();
  const timer = setInterval(tick, everyMs);
  document.addEventListener('visibilitychange', tick);
  return () => {
    clearInterval(timer);
    document.removeEventListener('visibilitychange', tick);
  };
}
