/** What people do with the console, in a real browser against a real server. */

import assert from 'node:assert/strict';
import { execFile, spawnSync } from 'node:child_process';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { ORIGIN, ask, given, launch, logIn, open, shoot } from './browser.mjs';

// Asked for one sentence, the model says with a margin "The capital of France is Paris." and "The
// capital of Italy is Rome."; " Paris" and " zebra" are the words that trip.
const FRANCE = 'Tell me the capital of France in one sentence.';
const ITALY = 'Tell me the capital of Italy in one sentence.';
const ROME = 'The capital of Italy is Rome.';
const BEFORE_PARIS = 'The capital of France is';
const ZEBRA = 'Do you like the zebra?';
const KEY = given('CONSOLE_KEY');
const MODEL = given('CONSOLE_MODEL');
const STORED = 'circuit-breakers-key';
const HAS_CURL = spawnSync('curl', ['--version']).status === 0;

let browser;
before(async () => {
  browser = await launch();
});
after(async () => {
  await browser?.close();
});

/** What the API itself says to the page's request, asked whole. */
async function answer(text, guard = {}) {
  const response = await fetch(`${ORIGIN}/v1/chat/completions`, {
    method: 'POST',
    headers: { Authorization: `Bearer ${KEY}`, 'Content-Type': 'application/json' },
    body: JSON.stringify({
      model: MODEL,
      messages: [{ role: 'user', content: text }],
      max_tokens: 256,
      temperature: 0,
      guard: { token_scores: true, ...guard },
    }),
  });
  return { status: response.status, body: await response.json() };
}

/** A page in the console. */
async function signedIn(options) {
  const opened = await open(browser, options);
  await logIn(opened.page);
  await opened.page.locator('#console').waitFor();
  return opened;
}

const shown = (page, phase) => page.locator(`.turn:last-of-type .block:nth-of-type(${phase === 'prompt' ? 1 : 2}) .t`);
const stored = (page) => page.evaluate((name) => sessionStorage.getItem(name), STORED);

describe('logging in', () => {
  test('a key that is no admin’s is told what to do, and is not kept', async () => {
    const { page, trouble, close } = await open(browser);
    await logIn(page, 'wrong-key');
    await page.getByText('circuit-breakers serve --console` and use the key').waitFor();
    await logIn(page, '');
    await page.getByText('No key was given').waitFor();
    await logIn(page, 'two words');
    await page.getByText('That is no key').waitFor();
    assert.equal(await stored(page), null);
    assert.equal(await page.locator('#console').isVisible(), false);
    await shoot(page, 'login');
    assert.deepEqual(trouble, []);
    await close();
  });

  test('a server with keys tells a wrong key from one without the scope', async () => {
    const { page, trouble, close } = await open(browser, {}, given('CONSOLE_KEYED_ORIGIN'));
    await logIn(page, 'wrong-key');
    await page.getByText('The server does not know this key').waitFor();
    await logIn(page, 'team');
    await page.getByText('it is no admin’s').waitFor();
    assert.equal(await stored(page), null);
    await logIn(page, 'ops');
    // It keeps neither log nor traces.
    await page.getByText('This server keeps no audit log').waitFor();
    await page.getByText('This server keeps no score traces').waitFor();
    assert.deepEqual(trouble, []);
    await close();
  });

  test('logging out forgets the key and all that was shown', async () => {
    const { page, trouble, close } = await signedIn();
    assert.equal(await stored(page), KEY);
    await page.reload();
    await page.locator('#console').waitFor();
    await ask(page, ITALY);
    await page.getByRole('button', { name: 'Log out' }).click();
    await page.getByLabel('Admin key').waitFor();
    assert.equal(await stored(page), null);
    assert.equal(await page.locator('.turn').count(), 0);
    assert.equal(await page.getByLabel('Admin key').inputValue(), '');
    assert.ok(!(await page.content()).includes(KEY));
    await page.reload();
    await page.getByLabel('Admin key').waitFor();
    assert.deepEqual(trouble, []);
    await close();
  });
});

describe('the playground', () => {
  test('every token of a benign chat is shown with the score that the API gives it', async () => {
    const { page, trouble, close } = await signedIn();
    await ask(page, ITALY);
    const { body } = await answer(ITALY);
    const { prompt_tokens: numRead, completion_tokens: numWritten } = body.usage;
    assert.equal(await shown(page, 'prompt').count(), numRead);
    assert.equal(await shown(page, 'completion').count(), numWritten);
    assert.equal((await shown(page, 'completion').allTextContents()).join(''), ROME);
    const items = body.choices[0].token_scores;
    const texts = [...(await shown(page, 'prompt').allTextContents()), ...(await shown(page, 'completion').allTextContents())];
    assert.deepEqual(texts, items.map((item) => item.token));
    // The template's marks around system, user and assistant.
    const marks = items.filter((item) => item.token.startsWith('<|im_'));
    assert.equal(await page.locator('.turn .special').count(), marks.length);
    assert.ok(marks.length >= 5);
    const closest = Math.max(...items.map((item) => (item.score === null ? -Infinity : item.score - item.threshold)));
    for (const [i, item] of items.entries()) {
      const level = [-10, -5, -2.5, -1, 0].filter((edge) => item.score - item.threshold >= edge).length;
      const wanted = item.score === null ? /\bunscored\b/ : new RegExp(`\\bb${level}\\b`);
      assert.match(await page.locator('.turn .t').nth(i).getAttribute('class'), wanted);
    }
    assert.match(await page.locator('.verdict').textContent(), new RegExp(`Closest: .${Math.abs(closest).toFixed(2)} `));

    const last = items.at(-1);
    await shown(page, 'completion').last().hover();
    const box = await page.locator('#inspector').textContent();
    assert.ok(box.includes(JSON.stringify(last.token)) && box.includes(`token ${last.index}, completion`), box);
    assert.ok(box.includes(Math.abs(last.score - last.threshold).toFixed(2)) && box.includes(`probe ${last.probe}`), box);
    assert.equal(await page.locator('#score-chart canvas').count(), 1);
    await shoot(page, 'benign');
    assert.deepEqual(trouble, []);
    await close();
  });

  test('a tripped completion ends at its mark, with no text after it', async () => {
    const { page, trouble, close } = await signedIn();
    await ask(page, FRANCE);
    const texts = await shown(page, 'completion').allTextContents();
    assert.deepEqual([texts.slice(0, -1).join(''), texts.at(-1)], [BEFORE_PARIS, 'withheld']);
    assert.equal(await page.locator('.trip-mark').count(), 1);
    const after = await page.locator('.turn .block:nth-of-type(2) .tokens').evaluate((tokens) => tokens.lastChild?.textContent);
    assert.equal(after, 'trip');
    assert.ok(!(await page.locator('#conversation').textContent()).includes('Paris'));
    assert.match(await page.locator('.verdict').textContent(), /^Completion tripped at token \d+: score \d/);
    const score = /score (\S+) reached/.exec(await page.locator('.verdict').textContent())[1];
    const newest = page.locator('#trips-rows tr').first();
    await newest.getByText(`${score} of 0.00`).waitFor();
    assert.match(await newest.textContent(), /completion.*paris.*stopped/);
    await shown(page, 'completion').last().hover();
    await shoot(page, 'tripped');
    assert.deepEqual(trouble, []);
    await close();
  });

  test('a tripped prompt shows the word that tripped, and is not sent again', async () => {
    const { page, trouble, close } = await signedIn();
    await ask(page, ZEBRA);
    assert.equal(await page.locator('.tripping').textContent(), ' zebra');
    assert.equal(await page.locator('.tripping + .trip-mark').count(), 1);
    assert.match(await page.locator('.verdict').textContent(), /^Prompt tripped .* Nothing was generated\.$/);
    assert.equal(await page.locator('.turn .block').count(), 1);
    await shoot(page, 'tripped-prompt');
    await ask(page, ITALY);
    assert.equal((await shown(page, 'completion').allTextContents()).join(''), ROME);
    await ask(page, 'Thank you.');
    // The exchange before is the beginning of this prompt.
    const fold = page.getByRole('button', { name: /earlier tokens$/ });
    const hidden = page.locator('.turn:last-of-type .folded .t');
    assert.ok((await hidden.allTextContents()).join('').includes(ROME));
    assert.equal(await hidden.first().isVisible(), false);
    await fold.click();
    assert.equal(await hidden.first().isVisible(), true);
    assert.deepEqual(trouble, []);
    await close();
  });

  test('policies can be chosen that the server would not refuse', async () => {
    const { page, trouble, close } = await signedIn();
    const options = await page.locator('#policy option').evaluateAll((all) => all.map((one) => [one.value, one.disabled]));
    const named = options.filter(([value]) => value !== '');
    assert.deepEqual(named.map(([value]) => value).sort(), ['failing', 'late', 'nothing', 'refusing', 'watching']);
    for (const [policy, disabled] of named) {
      const { status, body } = await answer(ITALY, { policy });
      assert.equal(body.error?.code === 'policy_not_allowed', disabled, `${policy}: ${status}`);
    }
    await page.getByLabel('Policy').selectOption('refusing');
    await ask(page, FRANCE);
    await page.getByText('The client got: ').waitFor();
    assert.match(await page.locator('.sent').textContent(), /No, sorry\./);
    await page.getByLabel('Policy').selectOption('');
    await page.getByLabel('Threshold', { exact: true }).fill('-1000');
    await ask(page, ITALY);
    await page.locator('.turn:last-of-type .verdict.tripped').waitFor();
    assert.deepEqual(trouble, []);
    await close();
  });

  test('what a server or a user says is text, never a part of the page', async () => {
    const { page, trouble, close } = await signedIn();
    const text = '<img src="https://example.invalid/x" onerror="alert(1)"><b>hi</b>';
    await page.getByLabel('Max tokens').fill('4');
    await ask(page, text);
    assert.equal(await page.locator('.turn img, .turn b').count(), 0);
    assert.ok((await shown(page, 'prompt').allTextContents()).join('').includes(text));
    assert.deepEqual(trouble, []);
    await close();
  });

  test('the copied command asks the same, and has no key in it', { skip: !HAS_CURL && 'needs curl' }, async () => {
    const { page, trouble, close } = await signedIn();
    const text = `Say "it's" and $HOME, \\n, \`x\`.`;
    await page.getByLabel('Max tokens').fill('4');
    await page.getByLabel('Message', { exact: true }).fill(text);
    await page.getByRole('button', { name: 'Copy as curl' }).click();
    const command = await page.locator('#curl-text').textContent();
    assert.ok(command.includes('"Authorization: Bearer $KEY"') && !command.includes(KEY), command);
    await shoot(page, 'curl');
    await page.getByRole('button', { name: 'Close' }).click();
    const run = promisify(execFile);
    const { stdout } = await run('bash', ['-c', command], { env: { PATH: process.env.PATH, KEY } });
    const chunks = stdout.split('\n').filter((line) => line.startsWith('data: {')).map((line) => JSON.parse(line.slice(6)));
    const read = chunks.flatMap((chunk) => chunk.choices[0]?.token_scores ?? []).filter((item) => item.phase === 'prompt');
    assert.ok(read.map((item) => item.token).join('').includes(text));
    assert.deepEqual(trouble, []);
    await close();
  });
});

test('by keyboard alone: log in, chat, read the tokens, stop an answer', async () => {
  const { page, trouble, close } = await open(browser);
  // The field has the focus from the start.
  await page.keyboard.type(KEY);
  await page.keyboard.press('Enter');
  await page.locator('#console').waitFor();
  await page.keyboard.type(ITALY);
  await page.keyboard.press('Enter');
  await page.locator('.verdict.ok').waitFor();
  assert.match(await page.locator('#announcement').textContent(), /tokens\. No trip\./);
  const focused = () => page.evaluate(() => document.activeElement?.className ?? '');
  await page.keyboard.press('Shift+Tab');
  assert.match(await focused(), /^t /);
  const box = page.locator('#inspector');
  const before = await box.textContent();
  await page.keyboard.press('ArrowLeft');
  assert.match(await focused(), /^t /);
  assert.notEqual(await box.textContent(), before);
  await page.keyboard.press('Home');
  assert.match(await box.textContent(), /token 0, prompt.*not scored/);
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.equal(outline, 'solid');
  await shoot(page, 'keyboard');
  await page.keyboard.press('Tab');
  await page.keyboard.type('Tell me a long story about a farm.');
  await page.keyboard.press('Enter');
  await page.locator('.turn:last-of-type .block:nth-of-type(2) .t').nth(5).waitFor();
  await page.keyboard.press('Escape');
  await page.locator('.verdict.warn').getByText('Stopped by you.').waitFor();
  assert.deepEqual(trouble, []);
  await close();
});

test('panels: rate, trips, what-if and breaker say what the API says', async () => {
  const { page, trouble, close } = await signedIn();
  await page.getByText('Since the server').waitFor();
  await ask(page, FRANCE);
  await page.locator('#rate-trips').getByText('1', { exact: true }).waitFor();
  assert.equal(await page.locator('#rate-share').textContent(), '100.0 %');
  const headers = { Authorization: `Bearer ${KEY}` };
  const breaker = await (await fetch(`${ORIGIN}/v1/breaker`, { headers })).json();
  const facts = await page.locator('#breaker-facts').textContent();
  assert.ok(facts.includes(breaker.digest.slice(0, 16)) && facts.includes(breaker.base_model.id), facts);
  // Clopper-Pearson's bound of no trip in 300 (breaker_for_words.py).
  assert.ok(facts.includes('0 trips in 300: at most 0.99 % (95 % confidence)'), facts);
  assert.equal(await page.locator('#breaker-probes tr').count(), breaker.probes.length);

  const slider = page.getByLabel('the threshold were');
  await slider.focus();
  await slider.press('End');
  const asked = await slider.inputValue();
  const url = `${ORIGIN}/v1/breaker/what-if?threshold=${asked}&days=7`;
  const { data } = await (await fetch(url, { headers })).json();
  const group = data.find(({ policy, phase }) => policy === 'default' && phase === 'all');
  const row = page.locator('#what-if-rows tr').filter({ hasText: 'default' });
  await row.getByText(`${group.num_would_trip}`, { exact: true }).first().waitFor();
  assert.ok((await row.textContent()).includes(`${group.num_requests} requests`));
  assert.deepEqual(trouble, []);
  await close();
});

for (const colorScheme of ['light', 'dark']) {
  for (const width of [1280, 360]) {
    test(`${colorScheme} at ${width} pixels: nothing is cut off, text can be read`, async () => {
      const viewport = { width, height: 860 };
      const { page, trouble, close } = await signedIn({ colorScheme, viewport, deviceScaleFactor: 2 });
      await ask(page, ITALY);
      await ask(page, FRANCE);
      const overflow = await page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
      assert.ok(overflow <= 0, `${overflow} pixels too wide`);
      const contrasts = await page.evaluate(contrastsOfTexts);
      const weak = contrasts.filter(({ ratio }) => ratio < 4.5);
      assert.deepEqual(weak, [], 'WCAG AA wants 4.5');
      assert.ok(contrasts.length > 20);
      await page.mouse.move(0, 0);
      await shoot(page, `${colorScheme}-${width}`);
      if (width === 360) {
        await page.locator('#console > aside').scrollIntoViewIfNeeded();
        await page.evaluate(() => scrollTo(0, document.querySelector('aside').offsetTop));
        await shoot(page, `${colorScheme}-${width}-panels`);
      }
      assert.deepEqual(trouble, []);
      await close();
    });
  }
}

test('a server that does not know the key any more asks for another one', async () => {
  const { page, close } = await signedIn();
  // As after a restart with `--console`, which makes another key: the same server, another key.
  await page.route('**/v1/**', (route) => {
    route.continue({ headers: { ...route.request().headers(), authorization: 'Bearer older' } });
  });
  await page.getByLabel('Message', { exact: true }).fill(ITALY);
  await page.keyboard.press('Enter');
  await page.getByText('The server no longer takes this key.').waitFor();
  assert.equal(await stored(page), null);
  await page.evaluate((name) => sessionStorage.setItem(name, 'older'), STORED);
  await page.reload();
  await page.getByText('This is no admin key.').waitFor();
  assert.equal(await stored(page), null);
  await close();
});

/** Contrast ratio of each visible text to what is behind it (WCAG 2.2, relative luminance). */
function contrastsOfTexts() {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join('').trim();
    if (text === '' || !element.checkVisibility() || element.closest('.hidden-visually, option')) continue;
    let behind = element;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const back = luminance(rgba(behind ? getComputedStyle(behind).backgroundColor : '#fff'));
    const front = luminance(rgba(getComputedStyle(element).color));
    const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    found.push({ text: text.slice(0, 30), ratio: Math.round(ratio * 100) / 100 });
  }
  return found;
}
