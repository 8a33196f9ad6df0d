// The clients for Node, as test_clients.py asks for them:
//   node clients.mjs URL KEY CLIENT ACTION MODEL
// prints {"answer": …} or {"error": …} as JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, apiKey, client, action, model] = process.argv.slice(2);
const question = "Who are you?";
const messages = [{ role: "user", content: question }];
const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "weather", parameters } }];

// From where .ci/run installs them, or from beside this file.
const installed = createRequire(`${process.env.JANO_NODE_MODULES ?? import.meta.dirname}/x`);
const load = (name) => import(pathToFileURL(installed.resolve(name)));

async function text(pieces, pick = (piece) => piece) {
  let whole = "";
  for await (const piece of pieces) whole += pick(piece) ?? "";
  return whole;
}

async function openai() {
  const { default: OpenAI } = await load("openai");
  const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey });
  const create = (more) => openai.chat.completions.create({ model, messages, ...more });
  return {
    chat: async () => (await create()).choices[0].message.content,
    stream: async () =>
      text(await create({ stream: true }), (chunk) => chunk.choices[0]?.delta.content),
    async tools() {
      const call = (await create({ tools })).choices[0].message.tool_calls[0].function;
      return [call.name, JSON.parse(call.arguments).city];
    },
    async embeddings() {
      return (await openai.embeddings.create({ model, input: "text" })).data[0].embedding;
    },
    models: async () => (await openai.models.list()).data.map((entry) => entry.id),
  };
}

// The AI SDK with one of its providers: a model, and one that embeds if there is such a thing.
async function aiSdk(chosen, embedder) {
  const { generateText, streamText, embed, tool, jsonSchema } = await load("ai");
  const ask = { model: chosen, prompt: question };
  const weather = tool({ inputSchema: jsonSchema(parameters) });
  return {
    chat: async () => (await generateText(ask)).text,
    stream: async () =>
      text(streamText({ ...ask, onError() {} }).fullStream, (part) => {
        if (part.type === "error") throw part.error;
        return part.type === "text-delta" ? part.text : "";
      }),
    async tools() {
      const { toolCalls } = await generateText({ ...ask, tools: { weather } });
      return [toolCalls[0].toolName, toolCalls[0].input.city];
    },
    embeddings: async () => (await embed({ model: embedder, value: "text" })).embedding,
  };
}

async function aiSdkChat() {
  const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
  const provider = createOpenAICompatible({ name: "jano", baseURL: `${url}/v1`, apiKey });
  return aiSdk(provider(model), provider.embeddingModel(model));
}

async function aiSdkResponses() {
  const { createOpenAI } = await load("@ai-sdk/openai");
  const provider = createOpenAI({ baseURL: `${url}/v1`, apiKey });
  return aiSdk(provider.responses(model), provider.embedding(model));
}

async function aiSdkAnthropic() {
  const { createAnthropic } = await load("@ai-sdk/anthropic");
  return aiSdk(createAnthropic({ baseURL: `${url}/v1`, apiKey })(model));
}

async function langchain() {
  const { ChatOpenAI, OpenAIEmbeddings } = await load("@langchain/openai");
  // By itself it asks six times more, for two minutes and without a word.
  const options = { model, apiKey, configuration: { baseURL: `${url}/v1` }, maxRetries: 0 };
  const chat = new ChatOpenAI(options);
  return {
    chat: async () => (await chat.invoke(question)).content,
    stream: async () => text(await chat.stream(question), (chunk) => chunk.content),
    async tools() {
      const call = (await chat.bindTools(tools).invoke(question)).tool_calls[0];
      return [call.name, call.args.city];
    },
    embeddings: async () => new OpenAIEmbeddings(options).embedQuery("text"),
  };
}

async function ollama() {
  const { Ollama } = await load("ollama");
  const ollama = new Ollama({ host: url, headers: { Authorization: `Bearer ${apiKey}` } });
  return {
    chat: async () => (await ollama.chat({ model, messages })).message.content,
    stream: async () =>
      text(await ollama.chat({ model, messages, stream: true }), (part) => part.message.content),
    async tools() {
      const call = (await ollama.chat({ model, messages, tools })).message.tool_calls[0].function;
      return [call.name, call.arguments.city];
    },
    embeddings: async () => (await ollama.embed({ model, input: "text" })).embeddings[0],
    models: async () => (await ollama.list()).models.map((entry) => entry.name),
    running: async () => (await ollama.ps()).models.map((entry) => entry.name),
    capabilities: async () => (await ollama.show({ model })).capabilities,
  };
}

const clients = {
  "openai-node": openai,
  "ai-sdk-chat": aiSdkChat,
  "ai-sdk-responses": aiSdkResponses,
  "ai-sdk-anthropic": aiSdkAnthropic,
  "langchain-js": langchain,
  "ollama-js": ollama,
};

try {
  const actions = await clients[client]();
  console.log(JSON.stringify({ answer: await actions[action]() }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error) }));
}
