"""Two janos behind a gateway: real nginx, HAProxy and LiteLLM proxy, each with its file in contrib.

Only addresses are put into the files; the backends are fake. Run with `pytest -m gateway`; .ci/run
installs Debian's nginx-light and haproxy and requirements-gateway.txt first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from test_jano import JANO, Backend, Running, entry, event, running_jano, swap_script, until

pytestmark = [pytest.mark.gateway, pytest.mark.filterwarnings("ignore")]  # libraries' warnings

KEY = "the-right-key"
MODELS = ("chat", "code")
PLACES = {"one": "192.168.1.11:8082", "two": "192.168.1.12:8082"}  # in the files
STARTS = 120  # seconds that a gateway may take to start; LiteLLM is large
NOTICES = 30  # seconds that it may take to notice that a jano is dead, or back
NGINX = """
daemon off; pid nginx.pid; error_log stderr warn; events {}
http {
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    include jano.conf;
}
"""

# ------------------------------------------------------------------------------- machines ----


class Machine:
    """A jano and its backends, each of which says who it is: the machine and the model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.port = name, folder, 0
        self.backends = [Backend(model) for model in MODELS]
        self.seen = asyncio.Event()  # a client has the first chunk; only then comes the second
        self.exits = contextlib.AsyncExitStack()
        self.jano: Running
        folder.mkdir()

    async def speak(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        who, head = f"{self.name}/{body['model']}", {"id": "chatcmpl-1", "created": 1, "model": "m"}
        if not body.get("stream"):
            message = {"role": "assistant", "content": who}
            return web.json_response({**head, "object": "chat.completion", "choices": [
                {"index": 0, "message": message, "finish_reason": "stop"}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for text in (f"first of {who}", f"last of {who}"):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            data = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            await response.write(f"data: {json.dumps(data)}\n\n".encode())
            await self.seen.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async def start(self) -> None:
        """Its jano, on the same port each time."""
        jano = running_jano(
            self.folder, [entry(backend) for backend in self.backends],
            swap_script(self.folder, f'[ ! -e "{self.folder}/broken" ]'),
            JANO_API_KEY=KEY, JANO_PORT=self.port, SWAP_FAILURE_LIMIT=100)
        self.jano = await self.exits.enter_async_context(jano)
        self.port = self.jano.port

    async def die(self) -> None:
        self.jano.process.kill()
        with contextlib.suppress(AssertionError):  # its exit code is not 0
            await self.exits.aclose()

    def enqueued(self) -> int:
        return sum(line["msg"] == "enqueued" for line in self.jano.lines)


async def next_enqueued(machines: Iterable[Machine]) -> Machine:
    """Which jano gets the next request."""
    before = {machine: machine.enqueued() for machine in machines}
    await until(lambda: any(machine.enqueued() > count for machine, count in before.items()))
    return next(machine for machine, count in before.items() if machine.enqueued() > count)


@pytest.fixture
async def machines(tmp_path: Path) -> AsyncIterator[list[Machine]]:
    both = [Machine(name, tmp_path / name) for name in PLACES]
    for machine in both:
        for backend in machine.backends:
            backend.answer = machine.speak
            await backend.start()
        await machine.start()
    yield both
    for machine in both:
        machine.seen.set()
        await machine.exits.aclose()
        for backend in machine.backends:
            await backend.stop()


# ------------------------------------------------------------------------------- gateways ----


class Gateway:
    """One that runs, as a client sees it."""

    def __init__(self, kind: str, url: str, log: Path, session: aiohttp.ClientSession) -> None:
        self.kind, self.url, self.log, self.session = kind, url, log, session

    async def post(self, model: str, stream: bool = False) -> aiohttp.ClientResponse:
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]}
        return await self.session.post(f"{self.url}/v1/chat/completions", json=body)

    async def ask(self, model: str) -> tuple[str, Any]:
        """Who answered, and the headers."""
        async with await self.post(model) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            return json.loads(text)["choices"][0]["message"]["content"], answer.headers

    async def begun(self, model: str) -> tuple[str, aiohttp.ClientResponse]:
        """A stream whose first chunk is here, and who sends it."""
        answer = await self.post(model, stream=True)
        assert answer.status == 200, await answer.text()
        return await self.said(answer), answer

    async def said(self, answer: aiohttp.ClientResponse) -> str:
        """The text of the next event."""
        data = (await answer.content.readuntil(b"\n\n")).removeprefix(b"data: ")
        return str(json.loads(data)["choices"][0]["delta"]["content"])

    async def knows_of_a_dead_one(self) -> bool:
        """Whether it spares the dead jano the requests for chat."""
        if self.kind == "litellm":  # which counts the janos that it asked in vain
            return bool((await self.ask("chat"))[1]["x-litellm-attempted-fallbacks"] == "0")
        words = {"nginx": "temporarily disabled", "haproxy": "is DOWN, reason: Layer4 connection"}
        return words[self.kind] in self.log.read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def running_gateway(
    kind: str, machines: list[Machine], folder: Path
) -> AsyncIterator[Gateway]:
    name = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg", "litellm": "litellm.yaml"}[kind]
    text, port = (JANO.parent / "contrib" / name).read_text(), free_port()
    ours = {place: f"127.0.0.1:{machine.port}"
            for place, machine in zip(PLACES.values(), machines, strict=True)}
    if kind != "litellm":  # there it is an option
        ours |= {"listen 8080;": f"listen {port};"} if kind == "nginx" else {
            "bind :8080": f"bind 127.0.0.1:{port}"}
    for theirs, our in ours.items():
        assert theirs in text
        text = text.replace(theirs, our)
    file = folder / ("jano.conf" if kind == "nginx" else name)
    file.write_text(text)
    (folder / "nginx.conf").write_text(NGINX)
    argv = {"nginx": ["nginx", "-p", f"{folder}", "-c", "nginx.conf"],
            "haproxy": ["haproxy", "-f", f"{file}"],
            "litellm": [f"{Path(sys.executable).parent}/litellm", "--config", f"{file}",
                        "--host", "127.0.0.1", "--port", f"{port}"]}[kind]
    path = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has nginx and HAProxy
    key = "sk-of-litellm" if kind == "litellm" else KEY
    environ = {**os.environ, "PATH": path, "JANO_API_KEY": KEY, "LITELLM_MASTER_KEY": key,
               "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # or it fetches a table of prices
    log = folder / "gateway.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=folder, env=environ, stdout=output, stderr=output)

    def answers() -> bool:
        assert process.returncode is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        await asyncio.wait_for(until(answers), STARTS)
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            yield Gateway(kind, f"http://127.0.0.1:{port}", log, session)
    finally:
        process.terminate()
        await event(process.wait())


@pytest.fixture(params=["nginx", "haproxy", "litellm"])
async def gateway(
    request: pytest.FixtureRequest, machines: list[Machine], tmp_path: Path
) -> AsyncIterator[Gateway]:
    async with running_gateway(request.param, machines, tmp_path) as gateway:
        yield gateway


async def eventually(true: Callable[[], Awaitable[bool]]) -> None:
    """What the gateway finds out by itself, or through the requests that ask for it."""
    async def found() -> None:
        while not await true():
            await asyncio.sleep(0.2)
    await asyncio.wait_for(found(), NOTICES)


# ------------------------------------------------------------------------------- the tests ----


async def test_two_janos_behind_a_gateway_do_as_one(
    gateway: Gateway, machines: list[Machine]
) -> None:
    """One test, as LiteLLM takes long to start."""
    await model_that_one_jano_cannot_load_is_answered_by_the_other(gateway, *machines)
    await both_janos_work_and_each_chunk_arrives_before_the_next_is_sent(gateway, *machines)
    await client_that_hangs_up_leaves_janos_queue(gateway, *machines)
    await killed_jano_is_taken_over_noticed_and_used_again(gateway, *machines)


async def model_that_one_jano_cannot_load_is_answered_by_the_other(
    gateway: Gateway, one: Machine, two: Machine
) -> None:
    (two.folder / "broken").touch()
    found = []
    for _ in range(2):
        async with await event(gateway.post("code")) as answer:
            found.append((answer.status, "one/code" in await answer.text()))
    await two.jano.logged("swap failed", model="code")
    # nginx would take the whole jano for dead, so the client, which knows 503, has to ask again.
    assert sorted(found) == [(200, True), (503, False) if gateway.kind == "nginx" else (200, True)]
    (two.folder / "broken").unlink()


async def both_janos_work_and_each_chunk_arrives_before_the_next_is_sent(
    gateway: Gateway, *machines: Machine
) -> None:
    begun = [await event(gateway.begun(model)) for model in MODELS]
    assert {who.split("/")[0] for who, _ in begun} == {"first of one", "first of two"}
    for machine in machines:
        machine.seen.set()
    for who, answer in begun:
        assert await event(gateway.said(answer)) == who.replace("first", "last")
        assert (await event(answer.text())).endswith("data: [DONE]\n\n")
    for machine in machines:
        machine.seen.clear()


async def client_that_hangs_up_leaves_janos_queue(gateway: Gateway, *machines: Machine) -> None:
    begun = [await event(gateway.begun(model)) for model in MODELS]
    asked: list[Machine] = []
    for stream in (True, False):
        waiting = asyncio.create_task(gateway.post("chat", stream))
        machine = await event(next_enqueued(machines))
        waiting.cancel()
        asked.append(machine)
        await machine.jano.logged("client disconnected", count=asked.count(machine))
    for machine in machines:
        machine.seen.set()
    for _, answer in begun:
        await event(answer.text())
    for machine in machines:
        machine.seen.clear()


async def killed_jano_is_taken_over_noticed_and_used_again(
    gateway: Gateway, *machines: Machine
) -> None:
    # Streams for chat, until a jano has one that runs and one that waits.
    asks: dict[Machine, list[asyncio.Task[Any]]] = {machine: [] for machine in machines}
    while max(map(len, asks.values())) < 2:
        ask = asyncio.create_task(gateway.begun("chat"))
        asks[machine := await event(next_enqueued(machines))].append(ask)
        if asks[machine] == [ask]:
            await event(asyncio.shield(ask))
    dead, other = sorted(machines, key=lambda machine: -len(asks[machine]))
    (_, running), waiting = await asks[dead][0], asks[dead][1]
    await dead.die()

    with contextlib.suppress(aiohttp.ClientPayloadError):  # what it had begun ends visibly,
        assert '"error"' in await event(running.text())  # in LiteLLM's way
    other.seen.set()
    assert (await event(waiting))[0] == f"first of {other.name}/chat"
    for model in MODELS * 3:
        assert (await event(gateway.ask(model)))[0] == f"{other.name}/{model}"
    await eventually(gateway.knows_of_a_dead_one)

    await dead.start()

    async def used_again() -> bool:
        return any([(await gateway.ask(model))[0].startswith(dead.name) for model in MODELS])

    await eventually(used_again)
