import { defineConfig } from 'vite';

/** The server that `npm run dev` takes its data from. */
const SERVER = 'http://127.0.0.1:8000';

export default defineConfig({
  base: '/console/',
  build: {
    outDir: '../../server/circuit_breakers/console',
    emptyOutDir: true,
    target: 'es2022',
    modulePreload: false,
    // No data: URLs, and the server's list of files stays as short as it is.
    assetsInlineLimit: 0,
    reportCompressedSize: false,
    // Of what is in the bundle: uPlot's.
    license: { fileName: 'LICENSES.md' },
    rolldownOptions: {
      output: {
        // The server reads them at its start and gives each an ETag: no digest in the names.
        entryFileNames: 'assets/console.js',
        assetFileNames: 'assets/console[extname]',
        codeSplitting: false,
      },
    },
  },
  server: { proxy: { '/v1': SERVER, '/metrics': SERVER } },
});
