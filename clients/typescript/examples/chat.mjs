// Questions, their answers, and what the guard saw of each.
//
//     OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none node examples/chat.mjs 'Say hello.'

import process from 'node:process';
import { CircuitBreakers, guardOf } from 'circuit-breakers-client';

const model = process.env.CIRCUIT_BREAKERS_MODEL ?? 'smollm2-135m-instruct';
const client = new CircuitBreakers();

for (const question of process.argv.slice(2)) {
  try {
    const answer = await client.chat.completions.create({
      model,
      messages: [{ role: 'user', content: question }],
      temperature: 0,
      max_tokens: 32,
    });
    console.log(answer.choices[0]?.message.content, guardOf(answer));
  } catch (error) {
    // A prompt that trips is an error 400 with the report in it; every other error has none.
    const report = guardOf(error);
    if (report === null) throw error;
    console.log('the prompt was stopped:', report);
  }
}
