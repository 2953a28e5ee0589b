/** A request as a shell command, with a variable in the place of the key. */

import { CHAT_PATH, type ChatBody } from './api';

export function asCurl(origin: string, body: ChatBody): string {
  const json = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  return [
    `curl -N ${origin}${CHAT_PATH}`,
    `-H "Authorization: Bearer $KEY"`,
    `-H 'Content-Type: application/json'`,
    `--data-raw '${json}'`,
  ].join(' \\\n  ');
}
