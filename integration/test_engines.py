"""Model servers behind jano: real ones, swapped by swap.example.sh, and imitations of others.

Real are llama-server and mlx_lm.server with tiny models; every word of an answer ends in the
model's number, 1 or 2. `integration/engines.sh DIR` installs them, then JANO_ENGINES=DIR names
the folder: `JANO_ENGINES=DIR python -m pytest integration/test_engines.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from conftest import serving

from test_jano import (
    Backend,
    Running,
    entry,
    event,
    free_port,
    gate,
    running_example,
    running_jano,
    swap_script,
    until,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # openai's own

HELLO = [{"role": "user", "content": "Hello"}]

# ---------------------------------------------------------------------------- real engines ----

LLAMA = "llama-server -m {file}.gguf --alias {name} --port {port}"
MLX = "mlx_lm.server --model {file} --port {port}"
SERVERS = {  # name in models.json -> command, model file
    "llama-1": (LLAMA, "tiny-a"),
    "llama-2": (LLAMA, "tiny-b"),
    "slow-1": (LLAMA, "slow-a"),
    "embed-2": (f"{LLAMA} --embeddings", "tiny-b"),
    "rerank-1": (f"{LLAMA} --reranking", "tiny-a"),
    "mlx-1": (MLX, "tiny-hf-a"),
    "mlx-2": (MLX, "tiny-hf-b"),
}


class Engines:
    """A jano with all of these servers, and what one can tell of them from outside."""

    def __init__(self, jano: Running, ports: dict[str, int]) -> None:
        self.jano = jano
        self.ports = ports
        self.client: Any = openai.AsyncOpenAI(base_url=f"{jano.url}/v1", api_key="none")

    async def say(self, model: str, stream: bool, max_tokens: int = 20, **more: Any) -> str:
        """What a model says to the official client."""
        request: Any = {"model": model, "messages": HELLO, "max_tokens": max_tokens, **more}
        answer = await self.client.chat.completions.create(stream=stream, **request)
        if not stream:
            return str(answer.choices[0].message.content)
        text = ""
        async for chunk in answer:
            for choice in chunk.choices:
                text += choice.delta.content or ""
        return text

    async def post(self, model: str, path: str, **body: Any) -> Any:
        """The answer: its JSON, or its events as text."""
        url = self.jano.url + path
        async with self.jano.session.post(url, json={"model": model, **body}) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            if answer.content_type == "text/event-stream":
                return text
            return json.loads(text)

    def pid(self, model: str) -> int:
        """The number of its server's process, as the swap script noted it."""
        file = self.jano.folder / "default" / f"{model}.pid"
        return int(file.read_text().split()[0])

    def ticks(self, model: str) -> int:
        """Its server's processor time so far, in units of 10 ms."""
        stat = Path(f"/proc/{self.pid(model)}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    async def becomes(self, model: str, idle: bool) -> None:
        """Wait until its server takes no processor time for a second, or takes some.

        It is not asked: busy with an answer about its slots, llama-server does not notice that a
        client has left.
        """
        while True:
            before = self.ticks(model)
            await asyncio.sleep(1)
            if (self.ticks(model) - before < 20) == idle:
                return

    def listens(self, model: str) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.ports[model])) == 0


def endings(text: str) -> set[str]:
    """What its words end in: the number of the model that said it."""
    return {word[-1] for word in text.split()}


@pytest.fixture
async def engines(tmp_path: Path) -> AsyncIterator[Engines]:
    installed = os.environ.get("JANO_ENGINES")
    if not installed:
        pytest.fail("JANO_ENGINES is not set: run integration/engines.sh DIR, then set it to DIR")
    ports = {name: free_port() for name in SERVERS}
    commands = {}
    models = []
    for name, (command, file) in SERVERS.items():
        path = Path(installed, "models", file)
        argv = command.format(file=path, name=name, port=ports[name])
        commands[name] = f"{installed}/bin/{argv}"
        models.append({"name": name, "url": f"http://127.0.0.1:{ports[name]}"})
        if command == MLX:  # which would look our name up as that of a model
            models[-1]["upstream_model"] = "default_model"
    async with running_example(tmp_path, models, commands) as jano:
        engines = Engines(jano, ports)
        async with engines.client:
            yield engines


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("llama-1", "llama-2"),
        ("mlx-1", "mlx-2"),
        ("llama-1", "mlx-2"),
    ],
)
async def test_each_model_answers_in_its_own_words_and_a_burst_of_six_costs_one_swap(
    engines: Engines, one: str, two: str
) -> None:
    assert endings(await engines.say(one, stream=False)) == {"1"}
    asked = [one, two, one, one, two, two]
    asks = [engines.say(model, stream=number % 2 == 0) for number, model in enumerate(asked)]
    answers = await asyncio.gather(*asks)
    assert [endings(answer) for answer in answers] == [{model[-1]} for model in asked]
    assert [line["model"] for line in engines.jano.log("swap requested")] == [one, two]


@pytest.mark.parametrize("model", ["llama-1", "mlx-1"])
async def test_server_killed_between_two_requests_is_brought_back(
    engines: Engines, model: str
) -> None:
    await engines.say(model, stream=False)
    killed = engines.pid(model)
    os.kill(killed, signal.SIGKILL)
    await event(until(lambda: not engines.listens(model)))
    assert endings(await engines.say(model, stream=False)) == {"1"}
    assert engines.pid(model) != killed


@pytest.mark.parametrize(
    ("model", "stream"),
    [
        ("slow-1", True),
        ("slow-1", False),
        ("mlx-1", True),  # mlx_lm.server ends what it does not stream
    ],
)
async def test_client_that_leaves_stops_the_generation(
    engines: Engines, model: str, stream: bool
) -> None:
    endless = {"max_tokens": 8000, "temperature": 0}  # longer than this test has patience
    asking = asyncio.create_task(engines.say(model, stream, **endless))
    await engines.jano.logged("swap ready")
    await event(engines.becomes(model, idle=False))
    asking.cancel()
    await engines.jano.logged("served", aborted=True)
    await event(engines.becomes(model, idle=True))


ROUTES: list[tuple[str, dict[str, Any], list[str | int]]] = [
    # path, body, where the answer has its text
    ("/v1/chat/completions", {"messages": HELLO}, ["choices", 0, "message", "content"]),
    ("/v1/completions", {"prompt": "Once"}, ["choices", 0, "text"]),
    ("/v1/messages", {"messages": HELLO}, ["content", 0, "text"]),
    ("/v1/responses", {"input": "Hello"}, ["output", 0, "content", 0, "text"]),
    ("/infill", {"input_prefix": "a", "input_suffix": "b"}, ["content"]),
]


async def test_llama_server_answers_whole_and_in_streams_on_each_of_its_routes(
    engines: Engines,
) -> None:
    for path, body, where in ROUTES:
        answer = await engines.post("llama-1", path, **body, n_predict=20)
        for key in where:
            answer = answer[key]
        assert endings(answer) == {"1"}, path
        events = await engines.post("llama-1", path, **body, n_predict=20, stream=True)
        assert set(re.findall(r"[a-z]{4}([12])\b", events)) == {"1"}, path


async def test_llama_server_calls_a_tool(engines: Engines) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
    body = {"messages": HELLO, "tools": [tool]}
    answer = await engines.post("llama-1", "/v1/chat/completions", **body)
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"]) == {"city": "Rome"}


async def test_llama_server_counts_tokens_on_a_route_of_its_own(engines: Engines) -> None:
    answer = await engines.post("llama-1", "/tokenize", content="th")
    assert len(answer["tokens"]) == 1


async def test_llama_servers_that_embed_and_rerank_are_models_like_others(engines: Engines) -> None:
    answer = await engines.client.embeddings.create(model="embed-2", input=["one", "two"])
    assert [len(found.embedding) for found in answer.data] == [128, 128]
    body = {"query": "a", "documents": ["b", "c", "d"]}
    ranked = await engines.post("rerank-1", "/v1/rerank", **body)
    assert sorted(found["index"] for found in ranked["results"]) == [0, 1, 2]


async def test_mlx_gets_a_length_for_a_body_that_came_in_chunks(engines: Engines) -> None:
    """It answers 411 to a body without one."""
    url = f"{engines.jano.url}/v1/completions"
    body = b'{"model": "mlx-1", "prompt": "Once"}'
    async with engines.jano.session.post(url, data=body, chunked=True) as answer:
        text = (await answer.json())["choices"][0]["text"]
    assert endings(text) == {"1"}


# ------------------------------------------------------------------------ imitated engines ----


class Imitation(Backend):
    """Answers GETs with these statuses, 404 to all others; knows one model by name, or any."""

    def __init__(self, statuses: dict[str, int], knows: str = "") -> None:
        super().__init__("chat")
        self.statuses = statuses
        self.knows = knows
        self.probed: list[str] = []  # the paths of its GETs
        self.look = self.by_path
        self.answer = self.by_name

    async def by_path(self, request: web.Request) -> web.Response:
        self.probed.append(request.path)
        other = self.statuses.get("other", 404)
        return web.json_response({}, status=self.statuses.get(request.path, other))

    async def by_name(self, request: web.Request) -> web.Response:
        model = json.loads(await request.read()).get("model")
        if self.knows and model != self.knows:
            error = {"message": f"model '{model}' not found", "type": "not_found_error"}
            return web.json_response({"error": error}, status=404)
        return web.json_response({"model": model})


OLLAMA = {"/": 200, "/api/version": 200, "/v1/models": 200}


@pytest.mark.parametrize(
    ("statuses", "keys", "probes"),
    [
        pytest.param(OLLAMA, {}, ["/health", "/v1/models"], id="Ollama"),
        pytest.param({"other": 200}, {}, ["/health"], id="LM Studio"),
        pytest.param({"/v1/models": 200}, {}, ["/health", "/v1/models"], id="KoboldCpp"),
        pytest.param({"/v1/models": 200}, {"health": "/v1/models"}, ["/v1/models"], id="sd.cpp"),
        pytest.param({"/readyz": 200}, {"health": "/readyz"}, ["/readyz"], id="LocalAI"),
    ],
)
async def test_engine_that_refuses_while_it_loads_is_asked_as_soon_as_it_is_ready(
    tmp_path: Path, statuses: dict[str, int], keys: dict[str, Any], probes: list[str]
) -> None:
    engine = Imitation(statuses)
    port = free_port()
    model = {"name": "chat", "url": f"http://127.0.0.1:{port}", **keys}
    async with running_jano(tmp_path, [model]) as jano:
        asking = asyncio.create_task(jano.ask("chat"))
        await jano.logged("swap requested")
        await engine.start(port)
        assert await asking == (200, {"model": "chat"})
    await engine.stop()
    assert engine.probed == probes


@pytest.fixture
async def ollama() -> AsyncIterator[Imitation]:
    """It answers 404 to names of models that it does not know, as vLLM does."""
    engine = Imitation(OLLAMA, knows="qwen3:8b")
    async with serving(engine):
        yield engine


async def test_ollama_is_asked_by_its_own_name_of_the_model(
    tmp_path: Path, ollama: Imitation
) -> None:
    async with running_jano(tmp_path, [entry(ollama, upstream_model="qwen3:8b")]) as jano:
        assert await jano.ask("chat", temperature=0.5) == (200, {"model": "qwen3:8b"})
    assert json.loads(ollama.bodies[-1])["temperature"] == 0.5


async def test_ollama_is_asked_by_that_name_on_its_own_route_too(
    tmp_path: Path, ollama: Imitation
) -> None:
    async with running_jano(tmp_path, [entry(ollama, upstream_model="qwen3:8b")]) as jano:
        body = {"model": "chat"}
        async with jano.session.post(f"{jano.url}/api/chat", json=body) as answer:
            assert await answer.json() == {"model": "qwen3:8b"}
    assert ollama.requests[-1].path == "/api/chat"


async def test_ollamas_own_error_reaches_who_names_a_model_that_it_does_not_know(
    tmp_path: Path, ollama: Imitation
) -> None:
    async with running_jano(tmp_path, [entry(ollama)]) as jano:
        status, answer = await jano.ask("chat")
    assert (status, answer["error"]["message"]) == (404, "model 'chat' not found")


async def test_ollamas_own_streams_are_lines_of_json_however_long_the_swap(
    tmp_path: Path, ollama: Imitation
) -> None:
    """Its clients parse each line, so that a comment or an empty line would be an error."""
    text = '{"done":false}\n{"done":true}\n'

    async def lines(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type="application/x-ndjson")

    ollama.answer = lines
    body = {"model": "chat", "stream": True}
    script = swap_script(tmp_path, gate(tmp_path))
    models = [entry(ollama), entry(ollama, name="other")]
    async with running_jano(tmp_path, models, script, HEARTBEAT_MS=20) as jano:
        native = asyncio.create_task(jano.session.post(f"{jano.url}/api/chat", json=body))
        await jano.logged("swap requested", model="chat")
        async with jano.session.post(f"{jano.url}/v1/chat/completions", json=body) as beaten:
            for _ in range(3):  # it has waited as long as the other one by then
                await event(beaten.content.readuntil(b": waiting\n\n"))
            assert not native.done()
            (tmp_path / "go").touch()
            async with await event(native) as answer:
                assert answer.content_type == "application/x-ndjson"
                assert await answer.text() == text


async def test_image_server_that_works_on_for_nobody_holds_up_nobody(tmp_path: Path) -> None:
    """stable-diffusion.cpp's requests name no model, and it does not notice that a client left."""
    engine = Imitation({"/v1/models": 200})
    engine.answer = engine.held
    body = {"prompt": "a cat"}
    async with serving(engine):
        models = [entry(engine, endpoints=["images/generations"])]
        async with running_jano(tmp_path, models) as jano:
            url = f"{jano.url}/v1/images/generations"
            leaving = asyncio.create_task(jano.session.post(url, json=body))
            await event(engine.arrived.get())
            leaving.cancel()
            await jano.logged("served", aborted=True)
            staying = asyncio.create_task(jano.session.post(url, json=body))
            await event(engine.arrived.get())
            engine.release.set()
            async with await staying as answer:
                assert answer.status == 200
    assert engine.bodies == [json.dumps(body).encode()] * 2
