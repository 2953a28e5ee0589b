// Plain fetch, in a browser or in Node: a stream with the score of each token, for an admin key.
//
//     OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=ADMIN_KEY node examples/fetch.mjs 'Say hello.'

import process from 'node:process';

const url = `${process.env.OPENAI_BASE_URL}/chat/completions`;

/**
 * The chunks of one streamed answer.
 *
 * @param {string} question
 * @returns {AsyncGenerator<any, void>}
 */
async function* ask(question) {
  const response = await fetch(url, {
    method: 'POST',
    headers: {
      Authorization: `Bearer ${process.env.OPENAI_API_KEY}`,
      'Content-Type': 'application/json',
    },
    body: JSON.stringify({
      messages: [{ role: 'user', content: question }],
      temperature: 0,
      max_tokens: 32,
      stream: true,
      guard: { token_scores: true },
    }),
  });
  if (!response.ok || response.body === null) throw new Error(await response.text());
  let rest = '';
  for await (const bytes of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + bytes).split('\n\n');
    rest = events.pop() ?? '';
    for (const event of events) {
      const data = event.slice('data: '.length);
      if (data !== '[DONE]') yield JSON.parse(data);
    }
  }
}

for (const question of process.argv.slice(2)) {
  for await (const { choices } of ask(question)) {
    for (const item of choices[0]?.token_scores ?? []) {
      // Without a text it was withheld: the token that tripped.
      const token = item.token === null ? '(withheld)' : JSON.stringify(item.token);
      const { score, threshold } = item;
      const scored = score === null ? 'not judged' : `${score.toFixed(3)} of ${threshold.toFixed(3)}`;
      console.log(item.phase, token, scored);
    }
  }
}
