/** The breaker's identity and the operators' routes on the real server. */

import { PermissionDeniedError } from 'openai';
import { expect, test } from 'vitest';
import type { Trip, TripPage } from '../src/index.js';
import { ADMIN_KEY, FRANCE, ZEBRA, chat, newClient } from './servers.js';

const client = newClient();
const admin = client.withOptions({ apiKey: ADMIN_KEY });

/** Until the log has what was written in the background as each request ended. */
async function waitForLog(): Promise<void> {
  for (;;) {
    const page = (await admin.breaker.tripPages({ limit: 1 }).next()).value as TripPage;
    if (page.num_pending === 0) return;
  }
}

test('the breaker says what it is', async () => {
  const breaker = await client.breaker.retrieve();
  expect(breaker).toMatchObject({ name: 'words', policy: 'default', mode: 'enforce' });
  expect(breaker.judged).toEqual(['paris', 'zebra']);
  expect(breaker.policies).toBeUndefined();
  const policies = (await admin.breaker.retrieve()).policies ?? [];
  expect(policies.map((policy) => policy.policy)).toContain('refusing');
});

test('trips come page by page', async () => {
  const since = new Date();
  for (const text of [FRANCE, ZEBRA, FRANCE]) {
    await client.chat.completions.create(chat(text)).catch(() => undefined);
  }
  await waitForLog();
  const pages: TripPage[] = [];
  for await (const page of admin.breaker.tripPages({ since, key: 'user', limit: 2 })) pages.push(page);
  expect(pages.map((page) => page.data.length)).toEqual([2, 1]);
  const trips: Trip[] = [];
  for await (const trip of admin.breaker.trips({ since, key: 'user', limit: 2 })) trips.push(trip);
  expect(trips).toEqual(pages.flatMap((page) => page.data));
  expect(trips.map((trip) => trip.phase)).toEqual(['completion', 'prompt', 'completion']);
  const prompts: Trip[] = [];
  for await (const trip of admin.breaker.trips({ since, phase: 'prompt' })) prompts.push(trip);
  expect(prompts).toEqual([trips[1]]);
});

test('what-if and reload answer', async () => {
  const found = await admin.breaker.whatIf({ threshold: -1000, days: 1 });
  expect(found.thresholds).toEqual({ paris: -1000, zebra: -1000 });
  // No score is below the threshold.
  for (const group of found.data.filter(({ phase }) => phase === 'all')) {
    expect(group.num_would_trip).toBe(group.num_requests);
  }
  const reloaded = await admin.breaker.reload();
  expect(reloaded).toMatchObject({ default: 'default', key_ids: ['ops', 'user', 'watched'] });
});

test('only admins may', async () => {
  await expect(client.breaker.reload()).rejects.toBeInstanceOf(PermissionDeniedError);
  await expect(client.breaker.trips().next()).rejects.toBeInstanceOf(PermissionDeniedError);
});
