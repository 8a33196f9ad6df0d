"""What people have works through jano as it is: real client libraries, the real jano process.

Only the backends are fake; they answer in the shapes of OpenAI's and Anthropic's API references.
Run with `pytest -m clients`; `.ci/run` installs requirements-clients.txt and package.json first.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from aiohttp import web

from test_jano import Backend, Running, calls, entry, event, running_jano, swap_script

# What is tried with which client. A "-" is what the client cannot do: Anthropic's API has no
# embeddings, and LangChain lists no models.
MATRIX = """
              chat  stream  tools  embeddings  models  unknown  key  swap  heartbeat  late
openai         x      x       x        x         x        x      x     x       x        x
openai-async   x      x       x        x         x        x      x     x       x        x
openai-node    x      x       x        x         x        x      x     x       x        x
anthropic      x      x       x        -         x        x      x     x       x        x
litellm        x      x       x        x         x        x      x     x       x        x
langchain      x      x       x        x         -        x      x     x       x        x
llm            x      x       x        x         x        x      x     x       x        x
curl           x      x       x        x         x        x      x     x       x        x
"""

# Libraries may warn about what they like.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

KEY = "the-right-key"
ASK = [{"role": "user", "content": "Who are you?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
OPENAIS_MODEL = "text-embedding-3-small"  # an alias of chat
VECTOR = [0.5, -0.25, 1.0]
USAGE = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}

# -------------------------------------------------------------------------------- backend ----


async def speak(request: web.Request) -> web.StreamResponse:
    """Says "I am <model>.", or calls the tool that it is offered, or embeds."""
    body = json.loads(await request.read())
    words = ["I ", "am ", f"{body['model']}."]
    tool = "tools" in body and body["messages"][-1]["role"] != "tool"
    if request.path == "/v1/embeddings":
        packed = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
        vector = packed if body.get("encoding_format") == "base64" else VECTOR
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        return web.json_response({"object": "list", "model": "m", "data": data, "usage": USAGE})
    shape = {"/v1/chat/completions": openai_shape, "/v1/messages": anthropic_shape}[request.path]
    answer, events = shape(words, tool)
    if not body.get("stream"):
        return web.json_response(answer)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for data in events:
        kind = f"event: {data['type']}\n" if "type" in data else ""
        await response.write(f"{kind}data: {json.dumps(data)}\n\n".encode())
    if shape is openai_shape:
        await response.write(b"data: [DONE]\n\n")
    return response


def openai_shape(words: list[str], tool: bool) -> tuple[Any, list[Any]]:
    """A whole answer, and the events of a stream."""
    head = {"id": "chatcmpl-1", "created": 1, "model": "m", "object": "chat.completion"}
    message: Any = {"role": "assistant", "content": None if tool else "".join(words)}
    if tool:
        function = {"name": "weather", "arguments": '{"city": "Rome"}'}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if tool else "stop"}
    steps = [*(({"role": "assistant", "content": word}, None) for word in words), ({}, "stop")]
    return {**head, "choices": [choice], "usage": USAGE}, [
        {**head, "object": "chat.completion.chunk",
         "choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in steps]


def anthropic_shape(words: list[str], tool: bool) -> tuple[Any, list[Any]]:
    head: Any = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
                 "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 3}}
    end = {"stop_reason": "tool_use" if tool else "end_turn"}
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
    text = {"type": "text", "text": "".join(words)}
    deltas = [{"type": "text_delta", "text": word} for word in words]
    return {**head, **end, "content": [use if tool else text]}, [
        {"type": "message_start", "message": head},
        {"type": "content_block_start", "index": 0, "content_block": {**text, "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 3}},
        {"type": "message_stop"}]


# -------------------------------------------------------------------------------- clients ----


class Address(NamedTuple):
    url: str
    key: str

    def options(self) -> dict[str, Any]:
        """As most clients call them. No retries: the first answer is the one to look at."""
        return {"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, "timeout": 30}


class Failure(Exception):
    """Of a client that is a program of its own."""

    def __init__(self, status_code: int | None, text: str) -> None:
        super().__init__(text)
        self.status_code = status_code


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, input="")


def openai(jano: Address, action: str, model: str) -> Any:
    openai = import_module("openai")
    with openai.OpenAI(**jano.options()) as client:
        return in_openais_shape(
            action, partial(client.chat.completions.create, model=model, messages=ASK),
            lambda: client.embeddings.create(model=model, input="text").data[0].embedding,
            lambda: [entry.id for entry in client.models.list()])


def in_openais_shape(
    action: str, create: Callable[..., Any], embed: Callable[[], Any], models: Callable[[], Any]
) -> Any:
    """For the clients whose answers look like those of OpenAI's."""
    if action == "chat":
        return create().choices[0].message.content
    if action == "stream":
        deltas = [chunk.choices[0].delta for chunk in create(stream=True)]
        return "".join(getattr(delta, "content", None) or "" for delta in deltas)
    if action == "tools":
        call = create(tools=[TOOL]).choices[0].message.tool_calls[0].function
        return [call.name, json.loads(call.arguments)["city"]]
    return embed() if action == "embeddings" else models()


async def openai_async(jano: Address, action: str, model: str) -> Any:
    openai = import_module("openai")
    async with openai.AsyncOpenAI(**jano.options()) as client:
        create = partial(client.chat.completions.create, model=model, messages=ASK)
        if action == "chat":
            return (await create()).choices[0].message.content
        if action == "stream":
            chunks = [chunk async for chunk in await create(stream=True)]
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        if action == "tools":
            call = (await create(tools=[TOOL])).choices[0].message.tool_calls[0].function
            return [call.name, json.loads(call.arguments)["city"]]
        if action == "embeddings":
            return (await client.embeddings.create(model=model, input="text")).data[0].embedding
        return [entry.id async for entry in client.models.list()]


def openai_node(jano: Address, action: str, model: str) -> Any:
    script = Path(__file__).with_name("openai.mjs")
    done = run("node", str(script), jano.url, jano.key, action, model)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "error" in found:
        raise Failure(found.get("status"), found["error"])
    return found["answer"]


def anthropic(jano: Address, action: str, model: str) -> Any:
    anthropic = import_module("anthropic")
    ask: Any = {"model": model, "max_tokens": 9, "messages": ASK}
    with anthropic.Anthropic(**{**jano.options(), "base_url": jano.url}) as client:
        if action == "chat":
            return client.messages.create(**ask).content[0].text
        if action == "stream":
            with client.messages.stream(**ask) as stream:
                return "".join(stream.text_stream)
        if action == "tools":
            tools = [{"name": "weather", "input_schema": CITY}]
            use = client.messages.create(**ask, tools=tools).content[0]
            return [use.name, use.input["city"]]
        return [entry.id for entry in client.models.list()]


def litellm(jano: Address, action: str, model: str) -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches a table of prices
    litellm = import_module("litellm")
    known: dict[str, Any] = {"api_base": f"{jano.url}/v1", "api_key": jano.key}
    create = partial(litellm.completion, f"openai/{model}", ASK, max_retries=0, **known)
    return in_openais_shape(
        action, create,
        lambda: litellm.embedding(f"openai/{model}", ["text"], **known).data[0]["embedding"],
        lambda: litellm.get_valid_models(True, "openai", **{**known, "api_base": jano.url}))


def langchain(jano: Address, action: str, model: str) -> Any:
    langchain_openai = import_module("langchain_openai")
    chat = langchain_openai.ChatOpenAI(model=model, **jano.options())
    if action == "chat":
        return chat.invoke("Who are you?").content
    if action == "stream":
        return "".join(chunk.content for chunk in chat.stream("Who are you?"))
    if action == "tools":
        call = chat.bind_tools([TOOL]).invoke("Who are you?").tool_calls[0]
        return [call["name"], call["args"]["city"]]
    return langchain_openai.OpenAIEmbeddings(  # whose check of the length fetches OpenAI's tokens
        model=model, check_embedding_ctx_length=False, **jano.options()).embed_query("text")


def llm(jano: Address, action: str, model: str) -> Any:
    """The command line program. Tools it runs by itself, and tells the model what came out. It
    embeds with OpenAI's models only, by whose name a model of ours goes, too."""
    tool = "def weather(city): __import__('sys').stderr.write(f'weather {city}')"
    more = {"chat": ["--no-stream", "Who are you?"], "stream": ["Who are you?"],
            "tools": ["--no-stream", "--functions", tool, "Who are you?"], "models": ["--models"]}
    what = ["openai", "endpoint", f"{jano.url}/v1", "--key", jano.key, "-m", model]
    if action == "embeddings":
        what = ["embed", "-m", OPENAIS_MODEL, "-c", "text"]
    done = run("env", f"OPENAI_BASE_URL={jano.url}/v1", f"OPENAI_API_KEY={jano.key}",
               sys.executable, "-m", "llm", *what, *more.get(action, ()))
    if done.returncode:
        code = re.search("Error code: ([0-9]+)", done.stderr)
        raise Failure(code and int(code[1]), done.stderr)
    if action == "tools":
        assert done.stdout.strip() == f"I am {model}."
        return done.stderr.split()
    if action == "embeddings":
        return json.loads(done.stdout)
    return done.stdout.split() if action == "models" else done.stdout.strip()


def curl(jano: Address, action: str, model: str) -> Any:
    def get(path: str, **body: Any) -> str:
        data = ["-H", "Content-Type: application/json", "-d", json.dumps({"model": model, **body})]
        done = run("curl", "-sSN", "-w", "%{stderr}%{http_code}", f"{jano.url}/v1/{path}",
                   "-H", f"Authorization: Bearer {jano.key}", *(data if body else []))
        if done.stderr != "200":
            raise Failure(int(done.stderr[-3:]), done.stdout)
        return done.stdout

    def create(stream: bool = False, **more: Any) -> Any:
        found = get("chat/completions", messages=ASK, stream=stream, **more)
        if not stream:
            return parse(found)
        fields = [line.split(": ", 1) for line in found.splitlines() if line]
        *parts, end = [data for field, data in fields if field == "data"]
        if end != "[DONE]":
            raise Failure(None, end)
        return map(parse, parts)

    def parse(text: str) -> Any:
        return json.loads(text, object_hook=lambda found: SimpleNamespace(**found))

    return in_openais_shape(
        action, create, lambda: parse(get("embeddings", input="text")).data[0].embedding,
        lambda: [entry.id for entry in parse(get("models")).data])


CLIENTS: dict[str, Callable[[Address, str, str], Any]] = {
    "openai": openai, "openai-async": openai_async, "openai-node": openai_node,
    "anthropic": anthropic, "litellm": litellm, "langchain": langchain, "llm": llm, "curl": curl}

# ------------------------------------------------------------------------------- the tests ----

BROKEN = 'swap to "broken" failed: the script exited with code 1'
COLUMNS: dict[str, tuple[str, str, str, Any]] = {  # what is asked, of which model, with which key
    "chat": ("chat", "chat", KEY, "I am chat."),
    "stream": ("stream", "my-chat", KEY, "I am my-chat."),
    "tools": ("tools", "chat", KEY, ["weather", "Rome"]),
    "embeddings": ("embeddings", "chat", KEY, VECTOR),
    "models": ("models", "", KEY, ["chat", "code", "broken"]),
    "unknown": ("chat", "no", KEY, (400, 'unknown model "no"; accepted: chat, my-chat,')),
    "key": ("chat", "chat", "the-wrong-key", (401, "the API key is missing or wrong")),
    "swap": ("chat", "broken", KEY, (503, BROKEN)),
    "heartbeat": ("stream", "code", KEY, "I am code."),
    "late": ("stream", "broken", KEY, (200, BROKEN)),
}


def cells() -> list[tuple[str, str]]:
    """The crosses of the matrix, and of no other one, column by column."""
    head, *rows = [line.split() for line in MATRIX.strip().splitlines()]
    assert set(head) == set(COLUMNS)
    return [(row[0], name) for at, name in enumerate(head, 1) for row in rows if row[at] == "x"]


async def heartbeats(jano: Running, model: str) -> None:
    """Wait until the client that has asked for model before us has had three at least."""
    url, body = f"{jano.url}/v1/chat/completions", {"model": model, "stream": True}
    async with jano.session.post(url, json=body, headers={"x-api-key": KEY}) as answer:
        for _ in range(3):
            assert await event(answer.content.readuntil(b"\n\n")) == b": waiting\n\n"


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    yield
    gc.collect()  # what libraries have left open, while their warnings are still ignored


@pytest.fixture
async def jano(tmp_path: Path) -> AsyncIterator[Running]:
    """With chat, which is loaded, and code, and broken, which fails; swaps wait for a file go."""
    script = swap_script(tmp_path, f"""[ $1 != status ] || {{ echo "chat: loaded"; exit; }}
        until [ -e "{tmp_path}/go" ]; do sleep 0.02; done
        [ $1 != broken ]""")
    backends = [Backend("chat"), Backend("code"), Backend("broken")]
    for backend in backends:
        backend.answer = speak
        await backend.start()
    models = [entry(backend, aliases=[f"my-{backend.name}"]) for backend in backends]
    models[0]["aliases"].append(OPENAIS_MODEL)
    async with running_jano(tmp_path, models, script, JANO_API_KEY=KEY, HEARTBEAT_MS=50) as jano:
        yield jano
    for backend in backends:
        await backend.stop()


@pytest.mark.parametrize(("client", "column"), cells())
async def test_client_works_through_jano_and_tells_its_user_what_fails(
    jano: Running, tmp_path: Path, client: str, column: str
) -> None:
    action, model, key, expected = COLUMNS[column]
    ask = partial(CLIENTS[client], Address(jano.url, key), action, model)
    native = asyncio.iscoroutinefunction(ask.func)
    asking = asyncio.create_task(ask() if native else asyncio.to_thread(ask))
    if column in ("heartbeat", "late"):
        await jano.logged("enqueued", model=model)
        await heartbeats(jano, model)
    (tmp_path / "go").touch()
    if not isinstance(expected, tuple):
        assert await asking == expected
    else:
        with pytest.raises(Exception) as failed:  # noqa: PT011
            await asking
        assert expected[1] in str(failed.value).replace("\\", "")
        if expected[0] != 200:  # a stream that has begun has no other status
            assert failed.value.status_code == expected[0]  # type: ignore[attr-defined]
    assert calls(tmp_path)[:1] == ([model] if model in ("code", "broken") else [])
