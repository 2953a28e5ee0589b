/** A real Chromium out of an npm package, with the libraries that it needs: no root, no system's. */

import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { chromium as playwright } from 'playwright-core';

// The package has libraries, too, for places that it knows; it unpacks them for those only.
process.env.AWS_EXECUTION_ENV = 'AWS_Lambda_nodejs20.x';
// Its own font has no bullet, for a password, and Chromium ends when it looks for one.
process.env.FONTCONFIG_PATH ??= '/etc/fonts';
const { default: chromium } = await import('@sparticuz/chromium');

export const ORIGIN = given('CONSOLE_ORIGIN');
const REFUSED = /^Failed to load resource: the server responded with a status of 40[014]/;

export async function launch() {
  return await playwright.launch({
    executablePath: await chromium.executablePath(),
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'],
  });
}

/** A page whose trouble is kept: console errors, broken policies, requests to other places. */
export async function open(browser, options = {}, origin = ORIGIN) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 860 }, locale: 'en-US', ...options });
  // Nothing here is about time: a busy machine may take its own.
  context.setDefaultTimeout(120_000);
  const page = await context.newPage();
  const trouble = [];
  page.on('console', (message) => {
    // An answer that is an error is the page's to tell; browsers note it too.
    if (!/^(error|warning)$/.test(message.type()) || REFUSED.test(message.text())) return;
    trouble.push(message.text());
  });
  page.on('pageerror', (error) => trouble.push(String(error)));
  page.on('request', (request) => {
    const url = request.url();
    if (!url.startsWith(`${origin}/`) && !url.startsWith('data:')) trouble.push(`request to ${url}`);
  });
  await page.addInitScript(() => {
    addEventListener('securitypolicyviolation', (event) => {
      console.error(`policy violated: ${event.violatedDirective} ${event.blockedURI}`);
    });
  });
  await page.goto(`${origin}/console`);
  return { page, trouble, close: () => context.close() };
}

export async function logIn(page, key = given('CONSOLE_KEY')) {
  await page.getByLabel('Admin key').fill(key);
  await page.getByRole('button', { name: 'Log in' }).click();
}

/** Sends a message and waits for the verdict. */
export async function ask(page, text) {
  const before = await page.locator('.verdict').count();
  await page.getByLabel('Message', { exact: true }).fill(text);
  await page.keyboard.press('Enter');
  await page.locator('.verdict').nth(before).waitFor();
}

export async function shoot(page, name) {
  const folder = process.env.CONSOLE_SCREENSHOTS;
  if (!folder) return;
  mkdirSync(folder, { recursive: true });
  await page.screenshot({ path: join(folder, `${name}.png`) });
}

export function given(name) {
  const value = process.env[name];
  if (!value) throw new Error(`got no ${name}, expected test_browser.py to set it; run that`);
  return value;
}
