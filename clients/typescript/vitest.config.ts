import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // One reads the trips of its own requests from a log that all write into.
    fileParallelism: false,
    // A real model on few cores; no test is about time.
    testTimeout: 240_000,
    hookTimeout: 240_000,
  },
});
