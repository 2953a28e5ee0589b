/** The page: from the login to the console. */

import './style.css';
import { Api, ApiError, type Breaker, type Model } from './api';
import { showBreaker } from './breaker';
import { byId, whileVisible } from './dom';
import { Playground } from './playground';
import { RatePanel } from './rates';
import { SignInError, forgetKey, signIn, signOut, storeKey, storedKey, takeNotice } from './signin';
import { TripPanel } from './trips';
import { WhatIfPanel } from './whatif';

const BREAKER_MS = 60_000;
const REFUSED = 'The server no longer takes this key. Log in again.';

const form = byId('login-form', HTMLFormElement);
const keyField = byId('key', HTMLInputElement);
const message = byId('login-message', HTMLElement);

form.addEventListener('submit', (event) => {
  event.preventDefault();
  void enter(keyField.value.trim());
});
byId('logout', HTMLButtonElement).addEventListener('click', () => signOut());

const stored = storedKey();
if (stored === null) {
  message.textContent = takeNotice();
  showLogin();
} else {
  void enter(stored);
}

async function enter(key: string): Promise<void> {
  const button = byId('login-button', HTMLButtonElement);
  button.disabled = true;
  message.textContent = '';
  try {
    const breaker = await signIn(key);
    const api = new Api(key, () => signOut(REFUSED));
    const { data: models } = await api.get<{ data: Model[] }>('/v1/models');
    storeKey(key);
    open(api, breaker, models);
  } catch (error) {
    if (!(error instanceof SignInError || error instanceof ApiError)) throw error;
    if (error instanceof SignInError) forgetKey();
    showLogin();
    message.textContent = error.message;
    keyField.setAttribute('aria-invalid', 'true');
    keyField.select();
  } finally {
    button.disabled = false;
  }
}

function showLogin(): void {
  byId('login', HTMLElement).hidden = false;
  keyField.focus();
}

function open(api: Api, breaker: Breaker, models: Model[]): void {
  keyField.value = '';
  byId('login', HTMLElement).hidden = true;
  for (const element of document.querySelectorAll<HTMLElement>('.signed-in')) element.hidden = false;
  byId('served', HTMLElement).textContent = models[0]?.id ?? '';
  byId('mode', HTMLElement).textContent = breaker.mode;
  byId('mode', HTMLElement).dataset['mode'] = breaker.mode;
  showBreaker(breaker);
  const rates = new RatePanel(api);
  const trips = new TripPanel(api);
  const whatIf = new WhatIfPanel(api, breaker);
  void whatIf.ask();
  rates.start();
  trips.start();
  whileVisible(() => void refreshBreaker(api), BREAKER_MS);
  new Playground(api, breaker, models, () => {
    void rates.poll();
    void trips.poll();
    void whatIf.ask();
  });
  byId('prompt', HTMLElement).focus();
}

async function refreshBreaker(api: Api): Promise<void> {
  try {
    showBreaker(await api.get<Breaker>('/v1/breaker'));
  } catch (error) {
    // The other panels say that the server is away.
    if (!(error instanceof ApiError)) throw error;
  }
}
