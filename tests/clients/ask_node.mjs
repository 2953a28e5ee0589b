// What openai-node shows of an answer, of a trip, and of a prompt that trips: one line of JSON.
// node ask_node.mjs BASE_URL MODEL TEXT...
import OpenAI from "openai";

const [baseURL, model, ...texts] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });

async function ask(content, stream) {
  const request = { model, messages: [{ role: "user", content }], temperature: 0, max_tokens: 32 };
  try {
    if (!stream) {
      const [choice] = (await client.chat.completions.create(request)).choices;
      return { text: choice.message.content, finish_reason: choice.finish_reason };
    }
    let text = "";
    let finish_reason = null;
    for await (const chunk of await client.chat.completions.create({ ...request, stream })) {
      for (const choice of chunk.choices) {
        text += choice.delta.content ?? "";
        finish_reason = choice.finish_reason ?? finish_reason;
      }
    }
    return { text, finish_reason };
  } catch (error) {
    return { error: error.constructor.name, status: error.status, code: error.code };
  }
}

const shown = [];
for (const text of texts) shown.push(await ask(text, false), await ask(text, true));
console.log(JSON.stringify(shown));
