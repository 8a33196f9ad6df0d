// The official openai client for Node, as test_clients.py asks for it:
//   node openai.mjs URL KEY ACTION MODEL
// prints {"answer": …} or {"status": …, "error": …} as JSON.
import OpenAI from "openai";

const [url, apiKey, action, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Who are you?" }];
const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "weather", parameters } }];

const actions = {
  async chat() {
    const answer = await client.chat.completions.create({ model, messages });
    return answer.choices[0].message.content;
  },
  async stream() {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ model, messages, stream: true }))
      text += chunk.choices[0]?.delta.content ?? "";
    return text;
  },
  async tools() {
    const answer = await client.chat.completions.create({ model, messages, tools });
    const call = answer.choices[0].message.tool_calls[0].function;
    return [call.name, JSON.parse(call.arguments).city];
  },
  async embeddings() {
    return (await client.embeddings.create({ model, input: "text" })).data[0].embedding;
  },
  async models() {
    return (await client.models.list()).data.map((entry) => entry.id);
  },
};

try {
  console.log(JSON.stringify({ answer: await actions[action]() }));
} catch (error) {
  console.log(JSON.stringify({ status: error.status, error: error.message }));
}
