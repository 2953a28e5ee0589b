/**
 * A scripted server for `bench.mjs`: the built page, and made-up answers of the API at any rate.
 *
 * No model and no guard: it only shows how the page copes.
 */

import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { fileURLToPath } from 'node:url';

const BUILT = fileURLToPath(new URL(process.env.CONSOLE_BUILT ?? '../../server/circuit_breakers/console/', import.meta.url));
const FILES = {
  '/console': ['index.html', 'text/html; charset=utf-8'],
  '/console/assets/console.js': ['assets/console.js', 'text/javascript; charset=utf-8'],
  '/console/assets/console.css': ['assets/console.css', 'text/css; charset=utf-8'],
};
const THRESHOLD = 8.53;
const WORDS = 'the cat sat on a mat and looked at all of its small red boats while rain fell over town'.split(' ');
const POINT = { target_fpr: 0.01, confidence: 0.95, num_conversations: 794, num_trips: 3, fpr_upper_bound: 0.0097, max_tokens: 512 };
const POLICY = {
  policy: 'default',
  mode: 'enforce',
  action: 'stop',
  phases: ['completion', 'prompt'],
  judged: ['layer16'],
  operating_point: POINT,
  probes: [{ name: 'layer16', layer: 16, aggregation: { kind: 'max' }, threshold_logit: THRESHOLD }],
};

/** Starts it; a chat has `promptTokens` and `tokens`, of which `perSecond` come in a second. */
export async function serveScripted({ promptTokens, tokens, perSecond }) {
  const answers = {
    '/v1/models': { data: [{ id: 'scripted', max_model_len: 8192 }] },
    '/v1/breaker/trips': { data: [], num_pending: 0 },
    '/v1/breaker/what-if': { since: '', is_complete: true, data: [], notes: [] },
    '/v1/breaker': {
      ...POLICY,
      name: 'scripted',
      digest: 'd'.repeat(64),
      created: '2026-01-01T00:00:00+00:00',
      calibration_age_s: 86_400,
      base_model: { id: 'scripted' },
      policies: [POLICY],
    },
  };
  const server = createServer((request, response) => {
    const path = request.url.split('?')[0];
    const file = FILES[path];
    if (file) {
      response.writeHead(200, { 'Content-Type': file[1], 'Content-Security-Policy': "default-src 'self'; img-src data:" });
      response.end(readFileSync(BUILT + file[0]));
    } else if (answers[path]) {
      response.writeHead(200, { 'Content-Type': 'application/json' }).end(JSON.stringify(answers[path]));
    } else if (path === '/metrics') {
      response.writeHead(200).end('circuit_breakers_requests_total{outcome="ok"} 1\n');
    } else {
      request.resume().on('end', () => stream(response, promptTokens, tokens, perSecond));
    }
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { origin: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}

function stream(response, promptTokens, tokens, perSecond) {
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  const send = (choice) => response.write(`data: ${JSON.stringify({ choices: [{ index: 0, ...choice }] })}\n\n`);
  send({ delta: { role: 'assistant' }, token_scores: Array.from({ length: promptTokens }, (_, i) => item(i, 'prompt')) });
  const started = performance.now();
  let sent = 0;
  const timer = setInterval(() => {
    const due = Math.min(tokens, Math.floor(((performance.now() - started) / 1000) * perSecond));
    for (; sent < due; sent += 1) {
      const one = item(promptTokens + sent, 'completion');
      send({ delta: { content: one.token }, token_scores: [one] });
    }
    if (sent < tokens) return;
    clearInterval(timer);
    const guard = { policy: 'default', mode: 'enforce', tripped: false, phase: null, probe: 'layer16', score: 7, threshold: THRESHOLD, token_index: 9 };
    send({ delta: {}, finish_reason: 'length', guard });
    response.end('data: [DONE]\n\n');
  }, 2);
  response.on('close', () => clearInterval(timer));
}

function item(index, phase) {
  const score = index === 0 ? null : -4 + 5 * Math.sin(index / 40) + 3 * Math.sin(index / 7);
  const token = index % 60 === 59 ? '.\n' : ` ${WORDS[index % WORDS.length]}`;
  return { index, phase, token, score, probe: score === null ? null : 'layer16', threshold: score === null ? null : THRESHOLD };
}
