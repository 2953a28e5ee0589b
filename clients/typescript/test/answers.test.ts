/** Whole answers on the real server: reports, trips returned and trips thrown. */

import { AuthenticationError, BadRequestError } from 'openai';
import { expect, test } from 'vitest';
import { POLICY_HEADER, TrippedError, guardOf, tighten } from '../src/index.js';
import { BEFORE_PARIS, FRANCE, ITALY, MODEL, ROME, WATCHED_KEY, ZEBRA, chat, newClient } from './servers.js';

const client = newClient();
const raising = client.withOptions({ onTrip: 'raise' });

/** What a promise is rejected with. */
async function thrown(promise: PromiseLike<unknown>): Promise<unknown> {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error('nothing was thrown');
}

async function tripOf(promise: PromiseLike<unknown>): Promise<TrippedError> {
  const error = await thrown(promise);
  expect(error).toBeInstanceOf(TrippedError);
  return error as TrippedError;
}

test('a chat that passes has a report', async () => {
  const answer = await client.chat.completions.create(chat(ITALY));
  expect(answer.choices[0]?.message.content).toBe(ROME);
  const report = guardOf(answer);
  expect(report).toMatchObject({ breaker: 'words', policy: 'default', mode: 'enforce' });
  expect(report).toMatchObject({ tripped: false, phase: null, threshold: 0 });
  expect(guardOf(answer.choices[0])).toEqual(report);
  const { data, response } = await client.chat.completions.create(chat(ITALY)).withResponse();
  expect(response.status).toBe(200);
  expect(guardOf(data)).toEqual(report);
});

test('a chat that trips is returned', async () => {
  const answer = await client.chat.completions.create(chat(FRANCE));
  expect(answer.choices[0]?.finish_reason).toBe('content_filter');
  expect(guardOf(answer)).toMatchObject({ tripped: true, phase: 'completion', probe: 'paris' });
});

test('a prompt that trips stays a bad request', async () => {
  const error = await thrown(client.chat.completions.create(chat(ZEBRA)));
  expect(error).toBeInstanceOf(BadRequestError);
  expect((error as BadRequestError).code).toBe('content_filter');
  expect(guardOf(error)).toMatchObject({ tripped: true, phase: 'prompt', probe: 'zebra' });
});

test('completions and responses have reports', async () => {
  const prompt = 'The capital of Italy is';
  const completion = await client.completions.create({ model: MODEL, prompt, max_tokens: 2, temperature: 0 });
  expect(guardOf(completion)?.tripped).toBe(false);
  const response = await client.responses.create({ model: MODEL, input: FRANCE, temperature: 0, max_output_tokens: 32 });
  expect(guardOf(response)?.tripped).toBe(true);
});

test('each way of stopping is thrown as one error', async () => {
  const trip = await tripOf(raising.chat.completions.create(chat(FRANCE)));
  expect(trip).toMatchObject({ phase: 'completion', probe: 'paris', policy: 'default', threshold: 0 });
  expect(trip.partialText).toBe(BEFORE_PARIS);
  // " Paris" comes after the prompt and the five words before it.
  expect(trip.tokenIndex).toBeGreaterThan(5);
  expect(trip.score).toBeGreaterThanOrEqual(0);
  expect(trip.message).toContain("the completion was stopped by breaker 'words'");
  expect(guardOf(trip)).toBe(trip.report);

  const prompt = await tripOf(raising.chat.completions.create(chat(ZEBRA)));
  expect(prompt).toMatchObject({ phase: 'prompt', partialText: '' });
  expect(prompt.cause).toBeInstanceOf(BadRequestError);

  const response = { model: MODEL, input: FRANCE, temperature: 0, max_output_tokens: 32 };
  expect((await tripOf(raising.responses.create(response))).partialText).toBe(BEFORE_PARIS);

  for (const [policy, said] of [['refusing', 'No, sorry.'], ['failing', '']] as const) {
    const body = { ...chat(FRANCE), ...tighten({ policy }) };
    expect(await tripOf(raising.chat.completions.create(body))).toMatchObject({ policy, partialText: said });
  }
});

test('a parsed chat throws with its report', async () => {
  // openai's own error for a filtered answer would come without it.
  expect((await tripOf(raising.chat.completions.parse(chat(FRANCE)))).probe).toBe('paris');
});

test('what is only observed is not thrown', async () => {
  const watched = raising.withOptions({ apiKey: WATCHED_KEY });
  const answer = await watched.chat.completions.create(chat(FRANCE));
  expect(guardOf(answer)).toMatchObject({ mode: 'observe', tripped: true });
  expect(answer.choices[0]?.finish_reason).toBe('stop');
});

test('other errors stay what they are', async () => {
  const loose = { ...chat(ITALY), ...tighten({ mode: 'observe' }) };
  const error = await thrown(raising.chat.completions.create(loose));
  expect(error).toBeInstanceOf(BadRequestError);
  expect((error as BadRequestError).code).toBe('policy_not_allowed');
  const nobody = raising.withOptions({ apiKey: 'nobody' });
  expect(await thrown(nobody.models.list())).toBeInstanceOf(AuthenticationError);
});

test('a request is tightened', async () => {
  // The threshold of the other promise that the breaker makes.
  const body = { ...chat(ITALY), ...tighten({ target_fpr: 0.05, mode: 'enforce' }) };
  expect(guardOf(await client.chat.completions.create(body))?.threshold).toBe(-0.25);
  const strict = raising.withOptions({ defaultHeaders: { [POLICY_HEADER]: 'nothing' } });
  expect((await tripOf(strict.chat.completions.create(chat(ITALY)))).policy).toBe('nothing');
  expect(() => tighten({})).toThrow('expected policy');
  expect(() => tighten({ target_fpr: 0.1, threshold: 1 })).toThrow('expected one');
});

test.each([
  { tripped: 'no' },
  { mode: 'off' },
  { phase: 'reasoning' },
  { score: true },
  { token_index: 1.5 },
  { policy: null },
])('%o is no report', (change) => {
  const fits = { breaker: 'b', policy: 'p', mode: 'enforce', tripped: true, from_a_newer_server: 1 };
  expect(guardOf({ guard: fits })).toMatchObject({ tripped: true, phase: null });
  expect(guardOf({ guard: { ...fits, ...change } })).toBeNull();
});
