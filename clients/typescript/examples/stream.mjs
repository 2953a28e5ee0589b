// Answers as they come; a trip ends one with an exception, whether the prompt or the answer tripped.
//
//     OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none node examples/stream.mjs 'Say hello.'

import process from 'node:process';
import { CircuitBreakers, TrippedError } from 'circuit-breakers-client';

const model = process.env.CIRCUIT_BREAKERS_MODEL ?? 'smollm2-135m-instruct';
const client = new CircuitBreakers({ onTrip: 'raise' });

for (const question of process.argv.slice(2)) {
  try {
    const stream = await client.chat.completions.create({
      model,
      messages: [{ role: 'user', content: question }],
      temperature: 0,
      max_tokens: 32,
      stream: true,
    });
    for await (const chunk of stream) {
      process.stdout.write(chunk.choices[0]?.delta.content ?? '');
    }
    process.stdout.write('\n');
  } catch (error) {
    if (!(error instanceof TrippedError)) throw error;
    const { phase, tokenIndex, score, threshold } = error;
    process.stdout.write(
      `\n[the ${phase} tripped at token ${tokenIndex}: score ${score}, threshold ${threshold}]\n`,
    );
  }
}
