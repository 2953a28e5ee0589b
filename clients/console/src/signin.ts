/** Whether a key is an admin's, and what to do where it is not. */

import { Api, ApiError, type Breaker } from './api';

const STORED = 'circuit-breakers-key';
const NOTICE = 'circuit-breakers-notice';
const START = 'start the server with `circuit-breakers serve --console` and use the key that it prints';

/** Why nobody was let in, for people. */
export class SignInError extends Error {}

export function storedKey(): string | null {
  return sessionStorage.getItem(STORED);
}

export function storeKey(key: string): void {
  sessionStorage.setItem(STORED, key);
}

export function forgetKey(): void {
  sessionStorage.removeItem(STORED);
}

/** Forgets the key and all that was read with it; the page begins anew and says `notice`. */
export function signOut(notice = ''): void {
  forgetKey();
  sessionStorage.setItem(NOTICE, notice);
  location.reload();
}

/** What the page before this one wanted to have said, once. */
export function takeNotice(): string {
  const notice = sessionStorage.getItem(NOTICE) ?? '';
  sessionStorage.removeItem(NOTICE);
  return notice;
}

/**
 * The breaker as an admin sees it.
 *
 * Throws SignInError where the key is none, is wrong, or is no admin's.
 */
export async function signIn(key: string): Promise<Breaker> {
  if (key === '') throw new SignInError(`No key was given. Enter an admin key, or ${START}.`);
  if (!/^[\x21-\x7e]+$/.test(key)) {
    throw new SignInError('That is no key: keys have neither spaces nor letters outside ASCII.');
  }
  const breaker = await ask(new Api(key));
  if (breaker === null) throw new SignInError('The server does not know this key, or it has expired. Check it, and enter it again.');
  if (breaker.policies !== undefined) return breaker;
  // A server that wants no keys takes any, and takes nobody for an admin.
  if ((await ask(new Api(null))) === null) {
    throw new SignInError('This key is valid, but it is no admin’s. Use one whose scope in the policy file has "admin".');
  }
  throw new SignInError(
    `This is no admin key. The server serves everybody without one, so it may have no admin at all: ${START}, ` +
      'or name admin keys in a policy file (--policies).',
  );
}

/** What GET /v1/breaker says; null for 401. */
async function ask(api: Api): Promise<Breaker | null> {
  try {
    return await api.get<Breaker>('/v1/breaker');
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) return null;
    throw new SignInError(error.status === 503 ? `Not yet: ${error.message}` : `No answer to log in with: ${error.message}`);
  }
}
