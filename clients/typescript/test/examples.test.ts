/** The examples and the token scores, on the real server. */

import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { APIError } from 'openai';
import { expect, test } from 'vitest';
import { tighten, tokenScoresOf } from '../src/index.js';
import { ADMIN_KEY, BEFORE_PARIS, FRANCE, ITALY, ROME, ZEBRA, chat, newClient } from './servers.js';

const admin = newClient({ apiKey: ADMIN_KEY });
const withScores = tighten({ token_scores: true });

/** What an example writes, which is a program of its own and has the package as its users do. */
async function run(name: string, questions: string[], env = {}): Promise<string> {
  const file = fileURLToPath(new URL(`../examples/${name}.mjs`, import.meta.url));
  const options = { env: { ...process.env, ...env } };
  return (await promisify(execFile)(process.execPath, [file, ...questions], options)).stdout;
}

test('chat.mjs', async () => {
  const said = await run('chat', [ITALY, ZEBRA]);
  expect(said).toContain(`${ROME} {`);
  expect(said).toMatch(/tripped: false[^]*the prompt was stopped: \{[^]*probe: 'zebra'/);
});

test('stream.mjs', async () => {
  const said = await run('stream', [ITALY, FRANCE, ZEBRA]);
  expect(said).toContain(`${ROME}\n${BEFORE_PARIS}\n[the completion tripped at token `);
  expect(said).toContain('\n[the prompt tripped at token ');
});

test('fetch.mjs', async () => {
  const said = await run('fetch', [FRANCE], { OPENAI_API_KEY: ADMIN_KEY });
  const lines = said.trim().split('\n');
  expect(lines[0]).toBe('prompt "<|im_start|>" not judged');
  expect(lines.at(-2)).toMatch(/^completion " is" -[\d.]+ of 0\.000$/);
  expect(lines.at(-1)).toMatch(/^completion \(withheld\) [\d.]+ of 0\.000$/);
});

test('token scores are typed', async () => {
  const answer = await admin.chat.completions.create({ ...chat(ITALY), ...withScores });
  const scores = tokenScoresOf(answer.choices[0]);
  expect(scores?.map((one) => one.index)).toEqual(scores?.map((_, i) => i));
  const said = scores?.filter((one) => one.phase === 'completion').map((one) => one.token);
  expect(said?.join('')).toBe(ROME);
  expect(tokenScoresOf(answer)).toBeNull();
  const wrong = [{ ...scores?.[1], score: 'high' }];
  expect(tokenScoresOf({ token_scores: wrong })).toBeNull();
});

test('a prompt that trips has them too', async () => {
  const raising = admin.withOptions({ onTrip: 'raise' });
  for (const client of [admin, raising]) {
    const asked = client.chat.completions.create({ ...chat(ZEBRA), ...withScores });
    const error = await asked.catch((thrown: unknown) => thrown);
    expect(tokenScoresOf(error)?.at(-1)).toMatchObject({ phase: 'prompt', token: ' zebra' });
  }
});

test('no admin, no scores', async () => {
  const asked = newClient().chat.completions.create({ ...chat(ITALY), ...withScores });
  const error = await asked.catch((thrown: unknown) => thrown);
  expect(error).toBeInstanceOf(APIError);
  expect(error).toMatchObject({ status: 403, param: 'guard.token_scores' });
  expect(tokenScoresOf(error)).toBeNull();
});
