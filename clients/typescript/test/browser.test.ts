/** The built package in a bundle for browsers: it needs nothing of Node, and it works. */

import { builtinModules } from 'node:module';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { type Plugin, build } from 'vite';
import { ITALY, ROME, chat } from './servers.js';

test('a browser bundle imports nothing of Node', async () => {
  const ofNode: string[] = [];
  const watch: Plugin = {
    name: 'imports-of-node',
    enforce: 'pre',
    resolveId(source, importer) {
      const isOfNode = source.startsWith('node:') || builtinModules.includes(source);
      if (isOfNode) ofNode.push(`${source} in ${importer}`);
      return null;
    },
  };
  const entry = fileURLToPath(new URL('../dist/index.js', import.meta.url));
  const built = await build({
    configFile: false,
    logLevel: 'error',
    plugins: [watch],
    build: { write: false, lib: { entry, formats: ['es'], fileName: 'bundle' } },
  });
  expect(ofNode).toEqual([]);
  const [first] = Array.isArray(built) ? built : [built];
  if (first === undefined || !('output' in first)) throw new Error('vite built nothing');
  const { code } = first.output[0];
  expect(code).not.toMatch(/__vite-browser-external|\bfrom\s*["']node:/);
  console.log(`bundle for browsers: ${code.length} bytes`);

  const url = `data:text/javascript;base64,${Buffer.from(code).toString('base64')}`;
  const { CircuitBreakers, guardOf } = await import(/* @vite-ignore */ url);
  const answer = await new CircuitBreakers().chat.completions.create(chat(ITALY));
  expect(answer.choices[0].message.content).toBe(ROME);
  expect(guardOf(answer).tripped).toBe(false);
});
