"""Clients that people have, each as its documentation says, with its own retries and time-outs.

Libraries are imported when they are used: not all of them go together (see the requirements).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import run
from speaker import CITY

QUESTION = "Who are you?"
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


class Client:
    """One client of a jano. Each of its `actions` is a method, and blocks.

    chat, stream   the text that the model says
    tools          the name and the city of the tool's call
    embeddings     a vector
    models         the names of the models
    """

    actions: tuple[str, ...] = ("chat", "stream", "tools", "embeddings", "models")
    gives_up = 5.0  # seconds within which its user knows that a model cannot be loaded

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key
        self.options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": key}

    def do(self, action: str, model: str) -> Any:
        return getattr(self, action)(model)


class Failure(Exception):
    """What a client that is a program of its own told its user."""


# -------------------------------------------------------------------------- OpenAI's shape ----


class ChatCompletions(Client):
    """For the clients whose answers look like those of OpenAI's."""

    def create(self, model: str, **more: Any) -> Any:
        raise NotImplementedError

    def chat(self, model: str) -> Any:
        return self.create(model).choices[0].message.content

    def stream(self, model: str) -> Any:
        text = ""
        for chunk in self.create(model, stream=True):
            text += getattr(chunk.choices[0].delta, "content", None) or ""
        return text

    def tools(self, model: str) -> Any:
        call = self.create(model, tools=[TOOL]).choices[0].message.tool_calls[0].function
        return [call.name, json.loads(call.arguments)["city"]]


class OpenAI(ChatCompletions):
    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        self.client = import_module("openai").OpenAI(**self.options)

    def create(self, model: str, **more: Any) -> Any:
        return self.client.chat.completions.create(model=model, messages=MESSAGES, **more)

    def embeddings(self, model: str) -> Any:
        return self.client.embeddings.create(model=model, input="text").data[0].embedding

    def models(self, model: str) -> Any:
        return [entry.id for entry in self.client.models.list()]


class OpenAIResponses(Client):
    actions = ("chat", "stream", "tools")

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        self.client = import_module("openai").OpenAI(**self.options)

    def create(self, model: str, **more: Any) -> Any:
        return self.client.responses.create(model=model, input=QUESTION, **more)

    def chat(self, model: str) -> Any:
        return self.create(model).output_text

    def stream(self, model: str) -> Any:
        text = ""
        for event in self.create(model, stream=True):
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type == "response.failed":
                raise Failure(event.response.error.message)
        return text

    def tools(self, model: str) -> Any:
        tool = {"type": "function", "name": "weather", "parameters": CITY}
        call = self.create(model, tools=[tool]).output[0]
        return [call.name, json.loads(call.arguments)["city"]]


class OpenAIAsync(Client):
    """In an event loop of its own for each action."""

    def do(self, action: str, model: str) -> Any:
        async def work() -> Any:
            async with import_module("openai").AsyncOpenAI(**self.options) as client:
                return await getattr(self, action)(client, model)

        return asyncio.run(work())

    async def chat(self, client: Any, model: str) -> Any:
        answer = await client.chat.completions.create(model=model, messages=MESSAGES)
        return answer.choices[0].message.content

    async def stream(self, client: Any, model: str) -> Any:
        request = {"model": model, "messages": MESSAGES, "stream": True}
        text = ""
        async for chunk in await client.chat.completions.create(**request):
            text += chunk.choices[0].delta.content or ""
        return text

    async def tools(self, client: Any, model: str) -> Any:
        request = {"model": model, "messages": MESSAGES, "tools": [TOOL]}
        answer = await client.chat.completions.create(**request)
        call = answer.choices[0].message.tool_calls[0].function
        return [call.name, json.loads(call.arguments)["city"]]

    async def embeddings(self, client: Any, model: str) -> Any:
        return (await client.embeddings.create(model=model, input="text")).data[0].embedding

    async def models(self, client: Any, model: str) -> Any:
        return [entry.id async for entry in client.models.list()]


class LiteLLM(ChatCompletions):
    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches a table of prices
        self.library = import_module("litellm")
        self.place: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": key}

    def create(self, model: str, **more: Any) -> Any:
        return self.library.completion(f"openai/{model}", MESSAGES, **self.place, **more)

    def embeddings(self, model: str) -> Any:
        answer = self.library.embedding(f"openai/{model}", ["text"], **self.place)
        return answer.data[0]["embedding"]

    def models(self, model: str) -> Any:
        return self.library.get_valid_models(True, "openai", api_base=self.url, api_key=self.key)


class Curl(ChatCompletions):
    def get(self, path: str, **body: Any) -> str:
        argv = ["curl", "-sSN", "-w", "%{stderr}%{http_code}", f"{self.url}/v1/{path}"]
        argv += ["-H", f"Authorization: Bearer {self.key}"]
        if body:
            argv += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = run(*argv)
        if done.stderr != "200":
            raise Failure(done.stdout)
        return done.stdout

    def create(self, model: str, **more: Any) -> Any:
        text = self.get("chat/completions", model=model, messages=MESSAGES, **more)
        return self.events(text) if more.get("stream") else parsed(text)

    def events(self, text: str) -> Iterator[Any]:
        """What the data fields hold, up to [DONE]."""
        for line in text.splitlines():
            field, _, data = line.partition(": ")
            if field != "data" or data == "[DONE]":
                continue
            if data.startswith('{"error"'):
                raise Failure(data)
            yield parsed(data)

    def embeddings(self, model: str) -> Any:
        return parsed(self.get("embeddings", model=model, input="text")).data[0].embedding

    def models(self, model: str) -> Any:
        return [entry.id for entry in parsed(self.get("models")).data]


def parsed(text: str) -> Any:
    """JSON whose objects have attributes, as in the libraries."""
    return json.loads(text, object_hook=lambda found: SimpleNamespace(**found))


# ----------------------------------------------------------------------- shapes of their own ----


class Anthropic(Client):
    actions = ("chat", "stream", "tools", "models")

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        self.client = import_module("anthropic").Anthropic(base_url=url, api_key=key)

    def chat(self, model: str) -> Any:
        request = {"model": model, "max_tokens": 9, "messages": MESSAGES}
        return self.client.messages.create(**request).content[0].text

    def stream(self, model: str) -> Any:
        request = {"model": model, "max_tokens": 9, "messages": MESSAGES}
        with self.client.messages.stream(**request) as stream:
            return "".join(stream.text_stream)

    def tools(self, model: str) -> Any:
        request: dict[str, Any] = {"model": model, "max_tokens": 9, "messages": MESSAGES}
        request["tools"] = [{"name": "weather", "input_schema": CITY}]
        use = self.client.messages.create(**request).content[0]
        return [use.name, use.input["city"]]

    def models(self, model: str) -> Any:
        return [entry.id for entry in self.client.models.list()]


class LangChain(Client):
    actions = ("chat", "stream", "tools", "embeddings")

    def open(self, model: str) -> Any:
        return import_module("langchain_openai").ChatOpenAI(model=model, **self.options)

    def chat(self, model: str) -> Any:
        return self.open(model).invoke(QUESTION).content

    def stream(self, model: str) -> Any:
        return "".join(chunk.content for chunk in self.open(model).stream(QUESTION))

    def tools(self, model: str) -> Any:
        call = self.open(model).bind_tools([TOOL]).invoke(QUESTION).tool_calls[0]
        return [call["name"], call["args"]["city"]]

    def embeddings(self, model: str) -> Any:
        kind = import_module("langchain_openai").OpenAIEmbeddings
        # Its check of the length would fetch OpenAI's tokens.
        return kind(model=model, check_embedding_ctx_length=False, **self.options).embed_query(
            "text"
        )


class PydanticAI(Client):
    actions = ("chat", "stream", "tools")

    def agent(self, model: str) -> Any:
        models = import_module("pydantic_ai.models.openai")
        provider = import_module("pydantic_ai.providers.openai").OpenAIProvider(**self.options)
        chosen = models.OpenAIChatModel(model, provider=provider)
        return import_module("pydantic_ai").Agent(chosen)

    def chat(self, model: str) -> Any:
        return self.agent(model).run_sync(QUESTION).output

    def stream(self, model: str) -> Any:
        async def work() -> Any:
            async with self.agent(model).run_stream(QUESTION) as answer:
                return await answer.get_output()

        return asyncio.run(work())

    def tools(self, model: str) -> Any:
        """It calls the tool by itself, and tells the model what came out."""
        agent = self.agent(model)
        calls = []

        @agent.tool_plain  # type: ignore[untyped-decorator]
        def weather(city: str) -> str:
            calls.append(city)
            return "sunny"

        assert agent.run_sync(QUESTION).output == f"I am {model}."
        return ["weather", *calls]


class LlamaIndex(Client):
    actions = ("chat", "stream", "tools")

    def open(self, model: str) -> Any:
        library = import_module("llama_index.llms.openai_like")
        kind = {"is_chat_model": True, "is_function_calling_model": True}
        return library.OpenAILike(model=model, api_base=f"{self.url}/v1", api_key=self.key, **kind)

    def messages(self) -> Any:
        return [import_module("llama_index.core.llms").ChatMessage(role="user", content=QUESTION)]

    def chat(self, model: str) -> Any:
        return self.open(model).chat(self.messages()).message.content

    def stream(self, model: str) -> Any:
        return "".join(part.delta for part in self.open(model).stream_chat(self.messages()))

    def tools(self, model: str) -> Any:
        def weather(city: str) -> str:
            """The weather in a city."""
            return "sunny"

        tool = import_module("llama_index.core.tools").FunctionTool.from_defaults(weather)
        opened = self.open(model)
        answer = opened.chat_with_tools([tool], chat_history=self.messages())
        call = opened.get_tool_calls_from_response(answer)[0]
        return [call.tool_name, call.tool_kwargs["city"]]


class Ollama(Client):
    actions = ("chat", "stream", "tools", "embeddings", "models", "running", "capabilities")

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        headers = {"Authorization": f"Bearer {key}"}
        self.client = import_module("ollama").Client(host=url, headers=headers)

    def chat(self, model: str) -> Any:
        return self.client.chat(model, MESSAGES).message.content

    def stream(self, model: str) -> Any:
        parts = self.client.chat(model, MESSAGES, stream=True)
        return "".join(part.message.content for part in parts)

    def tools(self, model: str) -> Any:
        call = self.client.chat(model, MESSAGES, tools=[TOOL]).message.tool_calls[0].function
        return [call.name, call.arguments["city"]]

    def embeddings(self, model: str) -> Any:
        return self.client.embed(model, "text").embeddings[0]

    def models(self, model: str) -> Any:
        return [entry.model for entry in self.client.list().models]

    def running(self, model: str) -> Any:
        return [entry.model for entry in self.client.ps().models]

    def capabilities(self, model: str) -> Any:
        return self.client.show(model).capabilities


# -------------------------------------------------------------------- programs of their own ----


class Llm(Client):
    """The command line program `llm`."""

    def program(self, *argv: str) -> subprocess.CompletedProcess[str]:
        places = {"OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": self.key}
        done = run(sys.executable, "-m", "llm", *argv, **places)
        if done.returncode:
            raise Failure(done.stderr)
        return done

    def endpoint(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.program("openai", "endpoint", f"{self.url}/v1", "--key", self.key, *argv)

    def chat(self, model: str) -> Any:
        return self.endpoint("-m", model, "--no-stream", QUESTION).stdout.strip()

    def stream(self, model: str) -> Any:
        return self.endpoint("-m", model, QUESTION).stdout.strip()

    def tools(self, model: str) -> Any:
        """It calls the tool by itself, and tells the model what came out."""
        function = "def weather(city): __import__('sys').stderr.write(f'weather {city}')"
        done = self.endpoint("-m", model, "--no-stream", "--functions", function, QUESTION)
        assert done.stdout.strip() == f"I am {model}."
        return done.stderr.split()

    def embeddings(self, model: str) -> Any:
        """It embeds by OpenAI's names of models only, one of which is an alias of ours."""
        return json.loads(
            self.program("embed", "-m", "text-embedding-3-small", "-c", "text").stdout
        )

    def models(self, model: str) -> Any:
        return self.endpoint("--models").stdout.split()


class Node(Client):
    """One of the clients in clients.mjs."""

    name = ""

    def do(self, action: str, model: str) -> Any:
        script = str(Path(__file__).with_name("clients.mjs"))
        done = run("node", script, self.url, self.key, self.name, action, model)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if "error" in found:
            raise Failure(found["error"])
        return found["answer"]


class OpenAINode(Node):
    name = "openai-node"


class AISDKChat(Node):
    name = "ai-sdk-chat"
    actions = ("chat", "stream", "tools", "embeddings")
    gives_up = 8.0  # it asks twice again, after two seconds and after four, whatever it is told


class AISDKResponses(Node):
    name = "ai-sdk-responses"
    actions = ("chat", "stream", "tools", "embeddings")
    gives_up = 8.0


class AISDKAnthropic(Node):
    name = "ai-sdk-anthropic"
    actions = ("chat", "stream", "tools")
    gives_up = 8.0


class LangChainJS(Node):
    name = "langchain-js"
    actions = ("chat", "stream", "tools", "embeddings")


class OllamaJS(Node):
    name = "ollama-js"
    actions = Ollama.actions


CLIENTS: dict[str, type[Client]] = {
    "openai": OpenAI,
    "openai-responses": OpenAIResponses,
    "openai-async": OpenAIAsync,
    "anthropic": Anthropic,
    "litellm": LiteLLM,
    "langchain": LangChain,
    "pydantic-ai": PydanticAI,
    "llama-index": LlamaIndex,
    "ollama": Ollama,
    "llm": Llm,
    "curl": Curl,
    "openai-node": OpenAINode,
    "ai-sdk-chat": AISDKChat,
    "ai-sdk-responses": AISDKResponses,
    "ai-sdk-anthropic": AISDKAnthropic,
    "langchain-js": LangChainJS,
    "ollama-js": OllamaJS,
}
