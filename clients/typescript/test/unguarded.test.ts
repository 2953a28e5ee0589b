/** A server without a guard: nothing of what it says gets through, unless that is asked for. */

import { afterEach, beforeEach, expect, test } from 'vitest';
import { CircuitBreakers, UnguardedError, guardOf } from '../src/index.js';
import { type Unguarded, startUnguarded } from './servers.js';

let server: Unguarded;
let client: CircuitBreakers;
const body = { model: 'm', messages: [{ role: 'user' as const, content: 'hi' }] };

beforeEach(async () => {
  server = await startUnguarded();
  client = new CircuitBreakers({ baseURL: server.baseURL, apiKey: 'none', maxRetries: 0 });
});
afterEach(() => server.close());

async function refuses(promise: PromiseLike<unknown>): Promise<void> {
  await expect(promise).rejects.toBeInstanceOf(UnguardedError);
}

test('no answer gets through', async () => {
  await refuses(client.chat.completions.create(body));
  await refuses(client.chat.completions.create({ ...body, model: 'says-text' }));
  await refuses(client.chat.completions.parse(body));
  await refuses(client.completions.create({ model: 'm', prompt: 'hi' }));
  await refuses(client.responses.create({ model: 'm', input: 'hi' }));
  await refuses(client.post('/chat/completions', { body }));
  await refuses(client.chat.completions.create(body).withResponse());
});

test('a stream is not even asked for', async () => {
  await refuses(client.chat.completions.create({ ...body, stream: true }));
  await refuses(client.chat.completions.stream(body).finalChatCompletion());
  await refuses(client.breaker.retrieve());
  expect(new Set(server.asked)).toEqual(new Set(['/v1/breaker']));
});

test.each(['m', 'says-done'])('a stream of %s without a report ends in an error', async (model) => {
  // As when another replica, without a guard, answers than the one that said it has a breaker.
  client.breaker.retrieve = async () => ({}) as never;
  const stream = await client.chat.completions.create({ ...body, model, stream: true });
  await refuses((async () => { for await (const _ of stream); })());
});

test('what is not generated passes', async () => {
  const asked = { model: 'm', input: 'hi', encoding_format: 'float' as const };
  expect((await client.embeddings.create(asked)).data).toEqual([]);
});

test('an unguarded answer can be asked for', async () => {
  const open = client.withOptions({ requireGuard: false });
  const answer = await open.chat.completions.create(body);
  expect(answer.choices[0]?.message.content).toBe('hi');
  expect(guardOf(answer)).toBeNull();
  const said: unknown[] = [];
  for await (const chunk of await open.chat.completions.create({ ...body, stream: true })) {
    said.push(chunk.choices[0]?.delta.content);
  }
  expect(said).toEqual(['hi']);
  expect(server.asked).not.toContain('/v1/breaker');
});

test('options that cannot be meant are refused', () => {
  const baseURL = server.baseURL;
  const onTrip = 'rais' as 'raise';
  expect(() => new CircuitBreakers({ baseURL, apiKey: 'x', onTrip })).toThrow("expected 'return'");
  const given = process.env['OPENAI_BASE_URL'];
  delete process.env['OPENAI_BASE_URL'];
  try {
    expect(() => new CircuitBreakers({ apiKey: 'x' })).toThrow('got no base URL');
  } finally {
    process.env['OPENAI_BASE_URL'] = given;
  }
});
