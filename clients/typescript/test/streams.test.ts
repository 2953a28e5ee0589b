/** Streams on the real server: the report is there at the end, and a trip is thrown before it. */

import { APIError } from 'openai';
import { expect, test } from 'vitest';
import { GuardedStream, TrippedError, guardOf, tighten } from '../src/index.js';
import { BEFORE_PARIS, FRANCE, ITALY, MODEL, ROME, chat, newClient } from './servers.js';

const client = newClient();
const raising = client.withOptions({ onTrip: 'raise' });

/** Everything that a stream gives, and what it throws. */
async function read<Item>(stream: AsyncIterable<Item>): Promise<{ items: Item[]; error: unknown }> {
  const items: Item[] = [];
  try {
    for await (const item of stream) items.push(item);
  } catch (error) {
    return { items, error };
  }
  return { items, error: null };
}

test('the report is on the last chunk and on the stream', async () => {
  const stream = await client.chat.completions.create({ ...chat(ITALY), stream: true });
  expect(stream).toBeInstanceOf(GuardedStream);
  expect(guardOf(stream)).toBeNull();
  const { items, error } = await read(stream);
  expect(error).toBeNull();
  expect(items.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('')).toBe(ROME);
  expect(items.slice(0, -1).map(guardOf).filter(Boolean)).toEqual([]);
  expect(guardOf(items.at(-1))).toMatchObject({ tripped: false });
  expect(guardOf(stream)).toEqual(guardOf(items.at(-1)));
});

test('a trip is returned', async () => {
  const stream = await client.chat.completions.create({ ...chat(FRANCE), stream: true });
  expect((await read(stream)).error).toBeNull();
  expect(guardOf(stream)).toMatchObject({ tripped: true, probe: 'paris' });
});

test('a trip is thrown with what was said', async () => {
  const stream = await raising.chat.completions.create({ ...chat(FRANCE), stream: true });
  const { items, error } = await read(stream);
  expect(error).toBeInstanceOf(TrippedError);
  expect((error as TrippedError).partialText).toBe(BEFORE_PARIS);
  expect(items.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('')).toBe(BEFORE_PARIS);
  expect(guardOf(stream)).toEqual(guardOf(error));
});

test('a policy that answers trips by an error', async () => {
  const body = { ...chat(FRANCE), ...tighten({ policy: 'failing' }), stream: true as const };
  const thrown = (await read(await raising.chat.completions.create(body))).error;
  expect(thrown).toBeInstanceOf(TrippedError);
  expect(thrown).toMatchObject({ policy: 'failing', partialText: BEFORE_PARIS });
  const returned = (await read(await client.chat.completions.create(body))).error;
  expect(returned).toBeInstanceOf(APIError);
  expect(guardOf(returned)).toMatchObject({ policy: 'failing', tripped: true });
});

test('completions and responses are streamed', async () => {
  const fields = { model: MODEL, temperature: 0, stream: true as const };
  const completion = await client.completions.create({ ...fields, prompt: BEFORE_PARIS, max_tokens: 8 });
  await read(completion);
  expect(guardOf(completion)?.probe).toBe('paris');
  const response = await client.responses.create({ ...fields, input: ITALY, max_output_tokens: 32 });
  const { items } = await read(response);
  expect(guardOf(items.at(-1))).toMatchObject({ tripped: false });
  expect(guardOf(response)).toEqual(guardOf(items.at(-1)));
  const tripped = await raising.responses.create({ ...fields, input: FRANCE, max_output_tokens: 32 });
  expect((await read(tripped)).error).toMatchObject({ partialText: BEFORE_PARIS });
});

test('the helper has the report in its final completion', async () => {
  const final = await client.chat.completions.stream(chat(ITALY)).finalChatCompletion();
  expect(final.choices[0]?.message.content).toBe(ROME);
  expect(guardOf(final)).toMatchObject({ tripped: false });
});

test('who aborts a stream gets no error', async () => {
  const stream = await client.chat.completions.create({ ...chat(ITALY), stream: true });
  for await (const chunk of stream) {
    expect(guardOf(chunk)).toBeNull();
    break;
  }
  expect(stream.controller.signal.aborted).toBe(true);
  expect(guardOf(stream)).toBeNull();
});
