/**
 * First paint, and frames per second while tokens stream onto a page that has 2,000 already.
 *
 *     npm ci --ignore-scripts && node bench.mjs
 *
 * The real built page in a real Chromium without a GPU; the server is scripted (scripted.mjs), so
 * that no model's speed is in the figures.
 */

import { cpus, loadavg } from 'node:os';
import { serveScripted } from './scripted.mjs';

const PROMPT_TOKENS = 36;
const BEFORE = 2_000;
const TOKENS = 3_000;
const PER_SECOND = 200;
const PAINTS = 5;

const server = await serveScripted({ promptTokens: PROMPT_TOKENS, tokens: TOKENS, perSecond: PER_SECOND });
process.env.CONSOLE_ORIGIN = server.origin;
const { launch, logIn, open } = await import('./browser.mjs');
const browser = await launch();

const paints = [];
for (let i = 0; i < PAINTS; i += 1) {
  const { page, close } = await open(browser);
  await page.waitForFunction(() => performance.getEntriesByName('first-contentful-paint').length > 0);
  paints.push(await page.evaluate(() => performance.getEntriesByName('first-contentful-paint')[0].startTime));
  await close();
}

const { page } = await open(browser);
await logIn(page, 'any');
await page.getByLabel('Message', { exact: true }).fill('go');
await page.keyboard.press('Enter');
await page.waitForFunction((number) => document.querySelectorAll('.t').length >= number, BEFORE, { timeout: 300_000, polling: 200 });
const frames = await page.evaluate(
  () =>
    new Promise((resolve) => {
      const gaps = [];
      const tokens = () => document.querySelectorAll('#conversation .t').length;
      const first = tokens();
      const started = performance.now();
      let last = started;
      const step = (now) => {
        gaps.push(now - last);
        last = now;
        if (document.querySelector('.verdict')) resolve({ gaps: gaps.slice(1), first, end: tokens(), seconds: (now - started) / 1000 });
        else requestAnimationFrame(step);
      };
      requestAnimationFrame(step);
    }),
);
await browser.close();
server.close();

const sorted = (numbers) => [...numbers].sort((a, b) => a - b);
const at = (numbers, share) => sorted(numbers)[Math.floor((numbers.length - 1) * share)].toFixed(1);
const load = loadavg()[0].toFixed(1);
console.log(`${cpus().length} cores (${cpus()[0].model}), load ${load}, Chromium headless without a GPU, scripted server`);
console.log(`first contentful paint, ${PAINTS} loads: median ${at(paints, 0.5)} ms, worst ${at(paints, 1)} ms`);
console.log(
  `from ${frames.first} to ${frames.end} tokens at ${PER_SECOND} a second: ${(frames.gaps.length / frames.seconds).toFixed(1)} frames/s, ` +
    `frame median ${at(frames.gaps, 0.5)} ms, 95th percentile ${at(frames.gaps, 0.95)} ms, longest ${at(frames.gaps, 1)} ms`,
);
