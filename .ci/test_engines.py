"""Model servers behind jano: real ones, swapped by swap.example.sh, and imitations of others.

Real are llama-server and mlx_lm.server with tiny models; every word of an answer ends in the
model's number, 1 or 2. Run with `JANO_ENGINES=DIR pytest -m engines` after `.ci/engines.sh DIR`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from test_jano import JANO, Backend, Running, entry, event, running_jano, swap_script

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]  # openai's own warnings

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
    """A jano with all of these, and what one can tell from outside."""

    def __init__(self, jano: Running, folder: Path, ports: dict[str, int]) -> None:
        self.jano, self.folder, self.ports = jano, folder, ports
        openai = import_module("openai")
        self.client = openai.AsyncOpenAI(base_url=f"{jano.url}/v1", api_key="none")

    async def say(self, model: str, stream: bool, max_tokens: int = 20, **more: Any) -> str:
        """What a model says, to the official client."""
        answer = await self.client.chat.completions.create(
            model=model, messages=HELLO, stream=stream, max_tokens=max_tokens, **more)
        if not stream:
            return str(answer.choices[0].message.content)
        parts = [chunk.choices[0].delta.content async for chunk in answer if chunk.choices]
        return "".join(part or "" for part in parts)

    async def post(self, model: str, path: str, **body: Any) -> Any:
        """The JSON, or the events as text."""
        url = self.jano.url + path
        async with self.jano.session.post(url, json={"model": model, **body}) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            return text if answer.content_type == "text/event-stream" else json.loads(text)

    def pid(self, model: str) -> int:
        """Of its server, as the swap script has noted it."""
        return int((self.folder / "default" / f"{model}.pid").read_text().split()[0])

    def ticks(self, model: str) -> int:
        """Its server's processor time so far, in units of 10 ms."""
        stat = Path(f"/proc/{self.pid(model)}/stat").read_text().rpartition(")")[2].split()
        return int(stat[11]) + int(stat[12])

    async def becomes(self, model: str, idle: bool) -> None:
        """Wait until its server takes no processor time for a second, or takes some. Nobody asks
        it: busy with an answer about its slots, llama-server looks for no client that left."""
        found = not idle
        while found != idle:
            before = self.ticks(model)
            await asyncio.sleep(1)
            found = self.ticks(model) - before < 20


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def own_words(text: str) -> set[str]:
    """The numbers that its words end in."""
    return {word[-1] for word in text.split()}


@pytest.fixture
async def engines(tmp_path: Path) -> AsyncIterator[Engines]:
    installed = os.environ.get("JANO_ENGINES")
    if not installed:
        pytest.fail("JANO_ENGINES is not set: run .ci/engines.sh DIR, then set it to DIR")
    sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in SERVERS}
    ports = {name: free.getsockname()[1] for name, free in sockets.items()}
    table, models = "table() {\n", []
    for name, (command, file) in SERVERS.items():
        sockets[name].close()
        argv = command.format(file=Path(installed, "models", file), name=name, port=ports[name])
        table += f"  model {name} {installed}/bin/{argv}\n"
        models.append({"name": name, "url": f"http://127.0.0.1:{ports[name]}"})
        if command == MLX:  # which would look up our name as that of a model
            models[-1]["upstream_model"] = "default_model"
    example = JANO.with_name("swap.example.sh").read_text()
    head, _, rest = example.partition("table() {\n")
    swap = tmp_path / "swap.sh"
    swap.write_text(head + table + rest[rest.index("}\n"):])
    swap.chmod(0o755)
    places = {"SWAP_STATE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    try:
        async with running_jano(tmp_path, models, swap, **places) as jano:
            engines = Engines(jano, tmp_path, ports)
            async with engines.client:
                yield engines
    finally:
        unload = await asyncio.create_subprocess_exec(
            str(swap), "unload", env={**os.environ, **places})
        assert await unload.wait() == 0


@pytest.mark.parametrize(("one", "two"), [
    ("llama-1", "llama-2"), ("mlx-1", "mlx-2"), ("llama-1", "mlx-2")])
async def test_each_model_answers_in_its_own_words_and_a_burst_of_six_costs_one_swap(
    engines: Engines, one: str, two: str
) -> None:
    assert own_words(await engines.say(one, stream=False)) == {"1"}
    asked = [one, two, one, one, two, two]
    answers = await asyncio.gather(*(
        engines.say(model, stream=bool(number % 2)) for number, model in enumerate(asked)))
    assert [own_words(answer) for answer in answers] == [{model[-1]} for model in asked]
    swaps = [line["model"] for line in engines.jano.lines if line["msg"] == "swap requested"]
    assert swaps == [one, two]


@pytest.mark.parametrize("model", ["llama-1", "mlx-1"])
async def test_server_killed_between_two_requests_is_brought_back(
    engines: Engines, model: str
) -> None:
    await engines.say(model, stream=False)
    killed = engines.pid(model)
    os.kill(killed, signal.SIGKILL)
    while listens(engines.ports[model]):
        pass
    assert own_words(await engines.say(model, stream=False)) == {"1"}
    assert engines.pid(model) != killed


@pytest.mark.parametrize(("model", "stream"), [
    ("slow-1", True), ("slow-1", False), ("mlx-1", True)])  # mlx ends what it does not stream
async def test_client_that_leaves_stops_the_generation(
    engines: Engines, model: str, stream: bool
) -> None:
    endless = {"max_tokens": 8000, "temperature": 0}  # for long after this test has given up
    asking = asyncio.create_task(engines.say(model, stream, **endless))
    await engines.jano.logged("swap ready")
    await event(engines.becomes(model, idle=False))
    asking.cancel()
    await engines.jano.logged("served", aborted=True)
    await event(engines.becomes(model, idle=True))


ROUTES: list[tuple[str, dict[str, Any], str]] = [  # path, body, where the answer has its words
    ("/v1/chat/completions", {"messages": HELLO}, "choices 0 message content"),
    ("/v1/completions", {"prompt": "Once"}, "choices 0 text"),
    ("/v1/messages", {"messages": HELLO}, "content 0 text"),
    ("/v1/responses", {"input": "Hello"}, "output 0 content 0 text"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "content")]


async def test_llama_server_answers_on_its_routes(engines: Engines) -> None:
    for path, body, where in ROUTES:
        found = await engines.post("llama-1", path, **body, n_predict=20)
        for key in where.split():
            found = found[int(key) if key.isdigit() else key]
        assert own_words(found) == {"1"}, path
        events = await engines.post("llama-1", path, **body, n_predict=20, stream=True)
        assert set(re.findall(r"[a-z]{4}([12])\b", events)) == {"1"}, path
    tokens = await engines.post("llama-1", "/tokenize", content="th")
    assert len(tokens["tokens"]) == 1
    city = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
    answer = await engines.post("llama-1", ROUTES[0][0], messages=HELLO, tools=[tool])
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Rome"})


async def test_llama_servers_that_embed_and_rerank_are_models_like_others(engines: Engines) -> None:
    answer = await engines.client.embeddings.create(model="embed-2", input=["one", "two"])
    assert [len(found.embedding) for found in answer.data] == [128, 128]
    ranked = await engines.post("rerank-1", "/v1/rerank", query="a", documents=["b", "c", "d"])
    assert sorted(found["index"] for found in ranked["results"]) == [0, 1, 2]


async def test_mlx_gets_a_length_for_a_body_that_came_in_chunks(engines: Engines) -> None:
    """It answers 411 to a body without one."""
    body, url = b'{"model": "mlx-1", "prompt": "Once"}', f"{engines.jano.url}/v1/completions"
    async with engines.jano.session.post(url, data=body, chunked=True) as answer:
        assert own_words((await answer.json())["choices"][0]["text"]) == {"1"}


# ------------------------------------------------------------------------ imitated engines ----


class Imitation(Backend):
    """Answers GETs with these statuses, other paths with `else`; knows one model, or any."""

    def __init__(self, gets: dict[str, int], knows: str = "") -> None:
        super().__init__("chat")
        self.gets, self.knows = gets, knows
        self.probed: list[str] = []
        self.answer = self.by_name

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            self.probed.append(request.path)
            return web.json_response({}, status=self.gets.get(request.path, self.gets["else"]))
        return await super().handle(request)

    async def by_name(self, request: web.Request) -> web.StreamResponse:
        model = json.loads(self.bodies[-1]).get("model")
        if self.knows and model != self.knows:
            error = {"message": f"model '{model}' not found", "type": "not_found_error"}
            return web.json_response({"error": error}, status=404)
        return web.json_response({"model": model})


# What they answer to GET, what their entry needs, and what jano asks until they are ready.
OLLAMA = {"/": 200, "/api/version": 200, "/v1/models": 200, "else": 404}
READINESS = [
    pytest.param(OLLAMA, {}, ["/health", "/v1/models"], id="Ollama"),
    pytest.param({"else": 200}, {}, ["/health"], id="LM Studio"),
    pytest.param({"/v1/models": 200, "else": 404}, {}, ["/health", "/v1/models"], id="KoboldCpp"),
    pytest.param({"/v1/models": 200, "else": 404}, {"health": "/v1/models"}, ["/v1/models"],
                 id="stable-diffusion.cpp"),
    pytest.param({"/readyz": 200, "else": 404}, {"health": "/readyz"}, ["/readyz"], id="LocalAI"),
]


@pytest.mark.parametrize(("gets", "keys", "probes"), READINESS)
async def test_engine_that_refuses_while_it_loads_is_asked_as_soon_as_it_is_ready(
    tmp_path: Path, gets: dict[str, int], keys: dict[str, Any], probes: list[str]
) -> None:
    engine = Imitation(gets)
    await engine.start()
    await engine.stop()  # the port is known, and nothing listens there
    async with running_jano(tmp_path, [entry(engine, **keys)]) as jano:
        asking = asyncio.create_task(jano.ask("chat"))
        await jano.logged("swap requested")
        await engine.start(engine.port)
        assert await asking == (200, {"model": "chat"})
        assert engine.probed == probes
    await engine.stop()


async def test_ollama_and_vllm_know_a_model_by_their_own_name_only(tmp_path: Path) -> None:
    """Both answer 404 to others, so models.json has their name as upstream_model."""
    engine = Imitation(OLLAMA, knows="qwen3:8b")
    await engine.start()
    wrong = {**entry(engine), "name": "wrong"}
    right = {**entry(engine), "name": "right", "upstream_model": "qwen3:8b"}
    async with running_jano(tmp_path, [wrong, right]) as jano:
        assert await jano.ask("right", temperature=0.5) == (200, {"model": "qwen3:8b"})
        assert json.loads(engine.bodies[-1])["temperature"] == 0.5
        status, answer = await jano.ask("wrong")
        assert (status, answer["error"]["message"]) == (404, "model 'wrong' not found")
        url = f"{jano.url}/api/chat"  # Ollama's own
        async with jano.session.post(url, json={"model": "right"}) as native:
            assert await native.json() == {"model": "qwen3:8b"}
        assert engine.requests[-1].path == "/api/chat"
    await engine.stop()


async def test_ollamas_own_streams_are_lines_of_json_however_long_the_swap(tmp_path: Path) -> None:
    """Its clients parse each line, so that a comment, or an empty line, would be an error."""
    async def lines(request: web.Request) -> web.Response:
        return web.Response(text=text, content_type="application/x-ndjson")

    engine, text = Imitation(OLLAMA), '{"done":false}\n{"done":true}\n'
    await engine.start()
    engine.answer = lines
    script = swap_script(tmp_path, f"""[ $1 = status ] ||
        until [ -e "{tmp_path}/go" ]; do sleep 0.02; done""")
    models = [entry(engine), {**entry(engine), "name": "other"}]
    async with running_jano(tmp_path, models, script, HEARTBEAT_MS=20) as jano:
        body = {"model": "chat", "stream": True}
        native = asyncio.create_task(jano.session.post(f"{jano.url}/api/chat", json=body))
        await jano.logged("swap requested", model="chat")
        async with jano.session.post(f"{jano.url}/v1/chat/completions", json=body) as beaten:
            for _ in range(3):  # as long a wait as that of the other one
                await event(beaten.content.readuntil(b": waiting\n\n"))
            assert not native.done()
            (tmp_path / "go").touch()
            async with await event(native) as answer:
                assert answer.content_type == "application/x-ndjson"
                assert await answer.text() == text
    await engine.stop()


async def test_image_server_that_works_on_for_nobody_holds_up_nobody(tmp_path: Path) -> None:
    """stable-diffusion.cpp's requests name no model, and it does not notice that a client left."""
    engine = Imitation({"/v1/models": 200, "else": 404})
    await engine.start()
    engine.answer = engine.held
    models = [entry(engine, endpoints=["images/generations"])]
    async with running_jano(tmp_path, models) as jano:
        url, body = f"{jano.url}/v1/images/generations", {"prompt": "a cat"}
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
    await engine.stop()
