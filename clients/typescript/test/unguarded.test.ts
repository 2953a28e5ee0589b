/** A server without a guard: nothing of what it says gets through, unless that is asked for. */

import { afterEach, beforeEach, expect, test } from 'vitest';
import { CircuitBreakers, UnguardedError, guardOf } from '../src/index.js';
import { type Says, type Unguarded, startUnguarded } from './servers.js';

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
  for (const model of ['says-text', 'labelled-stream', 'labelled-text', 'moved']) {
    await refuses(client.chat.completions.create({ ...body, model }));
  }
  await refuses(client.chat.completions.parse(body));
  await refuses(client.completions.create({ model: 'm', prompt: 'hi' }));
  await refuses(client.responses.create({ model: 'm', input: 'hi' }));
  await refuses(client.post('/chat/completions', { body }));
  await refuses(client.post('/chat/completions?x=1', { body }));
  await refuses(client.request({ method: 'POST' as 'post', path: '/chat/completions', body }));
  await refuses(client.chat.completions.create(body).withResponse());
});

test('nor one that was kept', async () => {
  await refuses(client.responses.retrieve('kept'));
  await refuses(client.responses.cancel('kept'));
  await refuses(client.responses.compact({ model: 'gpt-5' }));
  await refuses(client.chat.completions.retrieve('kept'));
  await refuses(client.responses.retrieve('kept', { stream: true }));
  expect(server.asked.at(-1)).toBe('/v1/breaker');
});

test.each([
  '<html>welcome</html>',
  'null',
  '[]',
  '{}',
  '{"object": "breaker"}',
  '{"object": "breaker", "digest": null}',
  '{"object": "list", "digest": "d"}',
])('no stream is begun where %s is found', async (breaker) => {
  // As where a web page, or a gateway, says 200 to every path.
  const [found, asking] = await startSaying({ breaker });
  await refuses(asking.breaker.retrieve());
  await refuses(asking.chat.completions.create({ ...body, stream: true }));
  expect(new Set(found.asked)).toEqual(new Set(['/v1/breaker']));
  await found.close();
});

const guard = { breaker: 'b', policy: 'p', mode: 'enforce', tripped: false };
const ended = { choices: [{ index: 0, delta: { content: 'hi' }, finish_reason: 'stop', guard }] };
const responseEnded = { type: 'response.completed', response: { id: 'x', guard } };
const next = (delta: object) => ({ choices: [{ index: 0, delta, finish_reason: null }] });

test.each([
  [ended, next({ content: 'more' })],
  [ended, ended],
  [ended, next({ reasoning: 'more' })],
  [ended, next({ tool_calls: [{ index: 0, function: { name: 'more' } }] })],
  [ended, { choices: [{ index: 0, text: 'more', finish_reason: null }] }],
  [responseEnded, { type: 'response.output_text.delta', delta: 'more' }],
  [responseEnded, { type: 'response.refusal.delta', delta: 'more' }],
])('text after its report is withheld: %o, %o', async (...events) => {
  const [found, asking] = await startSaying({ events });
  const read: unknown[] = [];
  const stream = await asking.chat.completions.create({ ...body, stream: true });
  await refuses((async () => { for await (const item of stream) read.push(item); })());
  expect(read.length).toBe(1);
  const open = asking.withOptions({ requireGuard: false });
  for await (const item of await open.chat.completions.create({ ...body, stream: true })) read.push(item);
  expect(read.length).toBe(3);
  await found.close();
});

test.each([{}, { content: '' }, { content: null, tool_calls: [] }])(
  'an empty %o may follow a report',
  async (delta) => {
    const [found, asking] = await startSaying({ events: [ended, next(delta), { choices: [] }] });
    const read: unknown[] = [];
    for await (const item of await asking.chat.completions.create({ ...body, stream: true })) read.push(item);
    expect(read.length).toBe(3);
    await found.close();
  },
);

/** A server, with a breaker if nothing else is said, and a client of it. */
async function startSaying(says: Says): Promise<[Unguarded, CircuitBreakers]> {
  const found = await startUnguarded({ breaker: '{"object": "breaker", "digest": "d"}', ...says });
  return [found, new CircuitBreakers({ baseURL: found.baseURL, apiKey: 'none', maxRetries: 0 })];
}

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
  expect(await client.responses.inputTokens.count({ model: 'm', input: 'hi' })).toBeTruthy();
  expect(await client.moderations.create({ model: 'm', input: 'hi' })).toBeTruthy();
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
