/** The guarded server that the tests are given, and one without a guard. */

import { type Server, createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { CircuitBreakers, type CircuitBreakersOptions } from '../src/index.js';

// Asked for one sentence, the model says with a margin "The capital of France is Paris." and "The
// capital of Italy is Rome."; " Paris" and " zebra" are the words that trip.
export const FRANCE = 'Tell me the capital of France in one sentence.';
export const ITALY = 'Tell me the capital of Italy in one sentence.';
export const ROME = 'The capital of Italy is Rome.';
export const BEFORE_PARIS = 'The capital of France is';
export const ZEBRA = 'Do you like the zebra?';

export const MODEL = given('CIRCUIT_BREAKERS_MODEL');
export const ADMIN_KEY = given('CIRCUIT_BREAKERS_ADMIN_KEY');
export const WATCHED_KEY = given('CIRCUIT_BREAKERS_WATCHED_KEY');

/** Made as its users make it: by OPENAI_BASE_URL and OPENAI_API_KEY. */
export function newClient(options: CircuitBreakersOptions = {}): CircuitBreakers {
  given('OPENAI_BASE_URL');
  return new CircuitBreakers({ maxRetries: 0, ...options });
}

/** Parameters of one chat with a known answer. */
export function chat(text: string) {
  const messages = [{ role: 'user' as const, content: text }];
  return { model: MODEL, messages, temperature: 0, max_tokens: 32 };
}

export interface Unguarded {
  baseURL: string;
  /** Paths, in order. */
  asked: string[];
  close(): Promise<void>;
}

/** What a made-up server says: to GET /v1/breaker, and event by event to who asks for a stream. */
export interface Says {
  breaker?: string;
  events?: unknown[];
}

/** Answers as a server does that knows nothing of a breaker: 404 on /v1/breaker. */
export async function startUnguarded(says: Says = {}): Promise<Unguarded> {
  const asked: string[] = [];
  const choice = { index: 0, finish_reason: 'stop', logprobs: null };
  const server: Server = createServer((request, response) => {
    asked.push(request.url ?? '');
    let body = '';
    request.on('data', (part) => (body += part));
    request.on('end', () => {
      const answer = (status: number, type: string, text: string) =>
        response.writeHead(status, { 'Content-Type': type }).end(text);
      const message = { role: 'assistant', content: 'hi' };
      const whole = { id: 'x', output: [], data: [], choices: [{ ...choice, message }] };
      if (request.method === 'GET') {
        if (request.url === '/v1/breaker' && says.breaker !== undefined) {
          return answer(200, says.breaker.startsWith('<') ? 'text/html' : 'application/json', says.breaker);
        }
        if (request.url?.endsWith('/kept') || request.url === '/elsewhere') {
          return answer(200, 'application/json', JSON.stringify(whole));
        }
        return answer(404, 'application/json', '{"error":{}}');
      }
      const { stream, model } = JSON.parse(body || '{}');
      if (model === 'moved') return response.writeHead(303, { Location: '/elsewhere' }).end();
      if (model === 'labelled-stream') return answer(200, 'text/event-stream', JSON.stringify(whole));
      if (model === 'labelled-text') return answer(200, 'text/plain', JSON.stringify(whole));
      if (model === 'says-text') return answer(200, 'text/plain', 'hi');
      if (model === 'says-done') return answer(200, 'text/event-stream', 'data: [DONE]\n\n');
      if (stream) {
        const chunk = { id: 'x', choices: [{ ...choice, delta: { content: 'hi' } }] };
        const sent = (says.events ?? [chunk]).map((event) => `data: ${JSON.stringify(event)}\n\n`);
        return answer(200, 'text/event-stream', sent.join(''));
      }
      return answer(200, 'application/json', JSON.stringify(whole));
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  return {
    baseURL: `http://127.0.0.1:${port}/v1`,
    asked,
    close: () => new Promise((resolve) => server.close(() => resolve())),
  };
}

function given(name: string): string {
  const value = process.env[name];
  if (!value) {
    throw new Error(
      `got no ${name}, expected it to describe a guarded server; run ` +
        'python3 dev.py test tests/clients/test_typescript.py, which starts one',
    );
  }
  return value;
}
