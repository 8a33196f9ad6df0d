"""Two janos behind a gateway: real nginx, HAProxy and LiteLLM proxy, each with its file in contrib.

Only addresses are put into the files; the backends are fake. They need Debian's nginx-light and
haproxy, and requirements-litellm.txt: `python -m pytest integration/test_gateways.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import CONTRIB, KEY, running, serving
from speaker import Speaker

from test_jano import PATIENCE, Running, entry, event, free_port, running_jano, swap_script, until

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries' warnings

MODELS = ["chat", "code"]
PLACES = {"one": "192.168.1.11:8082", "two": "192.168.1.12:8082"}  # in contrib's files
STARTS = 120  # seconds that a gateway may take to start; LiteLLM is large
NOTICES = 30  # seconds that it may take to notice that a jano is dead, or back

# ------------------------------------------------------------------------------- machines ----


class Machine:
    """A jano and its backends, which say "I am one/chat." and the like."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.port = free_port()
        self.backends = [Speaker(model, place=f"{name}/") for model in MODELS]
        self.exits = contextlib.AsyncExitStack()
        self.jano: Running
        folder.mkdir()

    async def start(self) -> None:
        """Start its jano, on the same port each time."""
        models = [entry(backend) for backend in self.backends]
        script = swap_script(self.folder, f'[ ! -e "{self.folder}/broken" ]')
        jano = running_jano(
            *(self.folder, models, script),
            JANO_API_KEY=KEY,
            JANO_PORT=self.port,
            SWAP_FAILURE_LIMIT=100,
        )
        self.jano = await self.exits.enter_async_context(jano)

    async def die(self) -> None:
        self.jano.process.kill()
        with contextlib.suppress(AssertionError):  # its exit code is not 0
            await self.exits.aclose()

    async def load(self, model: str) -> None:
        """Ask its jano itself for this model, so that it is loaded."""
        url = f"{self.jano.url}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {KEY}"}
        async with self.jano.session.post(url, json={"model": model}, headers=headers) as answer:
            assert answer.status == 200, await answer.text()

    def hold_streams(self) -> None:
        """From now on its streams stop after their first piece."""
        for backend in self.backends:
            backend.seen.clear()

    def go_on(self) -> None:
        """Its streams come to their end."""
        for backend in self.backends:
            backend.seen.set()

    def enqueued(self) -> int:
        return len(self.jano.log("enqueued"))


@pytest.fixture(scope="module")
async def machines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Machine]]:
    folder = tmp_path_factory.mktemp("machines")
    both = [Machine(name, folder / name) for name in PLACES]
    async with serving(*both[0].backends, *both[1].backends):
        for machine in both:
            await machine.start()
        yield both
        for machine in both:
            machine.go_on()
            await machine.exits.aclose()


@contextlib.contextmanager
def held_streams(machines: list[Machine]) -> Any:
    """Within this block every stream stops after its first piece, until `go_on`."""
    for machine in machines:
        machine.hold_streams()
    try:
        yield
    finally:
        for machine in machines:
            machine.go_on()


async def next_enqueued(machines: list[Machine]) -> Machine:
    """The machine whose jano gets the next request."""
    before = {machine: machine.enqueued() for machine in machines}
    grown: list[Machine] = []

    def any_has_grown() -> bool:
        grown.extend(machine for machine in machines if machine.enqueued() > before[machine])
        return bool(grown)

    await event(until(any_has_grown))
    return grown[0]


# ------------------------------------------------------------------------------- gateways ----


class Gateway:
    """One that runs, as its clients see it."""

    def __init__(self, kind: str, url: str, log: Path, session: aiohttp.ClientSession) -> None:
        self.kind = kind
        self.url = url
        self.log = log
        self.session = session

    async def post(self, model: str, stream: bool = False) -> aiohttp.ClientResponse:
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]}
        url = f"{self.url}/v1/chat/completions"
        return await asyncio.wait_for(self.session.post(url, json=body), PATIENCE)

    async def ask(self, model: str) -> tuple[str, Any]:
        """What was said, and the answer's headers."""
        async with await self.post(model) as answer:
            text = await answer.text()
            assert answer.status == 200, text
        return json.loads(text)["choices"][0]["message"]["content"], answer.headers

    async def begun(self, model: str) -> tuple[str, aiohttp.ClientResponse]:
        """The first piece of a stream, and its answer."""
        answer = await self.post(model, stream=True)
        assert answer.status == 200, await answer.text()
        data = await event(answer.content.readuntil(b"\n\n"))
        choice = json.loads(data.removeprefix(b"data: "))["choices"][0]
        return choice["delta"]["content"], answer

    async def knows_of_a_dead_one(self) -> bool:
        """Whether it spares the dead jano the requests for chat."""
        if self.kind == "litellm":  # which counts the janos that it asked in vain
            _, headers = await self.ask("chat")
            return bool(headers["x-litellm-attempted-fallbacks"] == "0")
        words = {"nginx": "temporarily disabled", "haproxy": "is DOWN, reason: Layer4 connection"}
        return words[self.kind] in self.log.read_text()


NGINX = """
daemon off; pid nginx.pid; error_log stderr warn; events {}
http {
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    include jano.conf;
}
"""


def with_addresses(file: Path, addresses: dict[str, str]) -> str:
    """A file of contrib with our addresses in the place of those in it."""
    text = file.read_text()
    for theirs, ours in addresses.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    return text


def command(kind: str, janos: dict[str, str], port: int, folder: Path) -> list[str]:
    """Write the gateway's files; the command that starts it on this port.

    `janos` maps the janos' addresses in contrib's file to the real ones.
    """
    if kind == "nginx":
        addresses = {**janos, "listen 8080;": f"listen {port};"}
        (folder / "jano.conf").write_text(with_addresses(CONTRIB / "nginx.conf", addresses))
        (folder / "nginx.conf").write_text(NGINX)
        return ["nginx", "-p", str(folder), "-c", "nginx.conf"]
    if kind == "haproxy":
        addresses = {**janos, "bind :8080": f"bind 127.0.0.1:{port}"}
        (folder / "haproxy.cfg").write_text(with_addresses(CONTRIB / "haproxy.cfg", addresses))
        return ["haproxy", "-f", "haproxy.cfg"]
    (folder / "litellm.yaml").write_text(with_addresses(CONTRIB / "litellm.yaml", janos))
    program = str(Path(sys.executable).with_name("litellm"))
    return [program, "--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(port)]


@pytest.fixture(scope="module", params=["nginx", "haproxy", "litellm"])
async def gateway(
    request: pytest.FixtureRequest,
    machines: list[Machine],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Gateway]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    port = free_port()
    janos = {PLACES[machine.name]: f"127.0.0.1:{machine.port}" for machine in machines}
    key = "sk-of-litellm" if kind == "litellm" else KEY
    environ = {
        "JANO_API_KEY": KEY,
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it fetches a table of prices
    }
    argv = command(kind, janos, port, folder)
    log = folder / "gateway.log"
    async with running(*argv, folder=folder, log=log, **environ) as process:

        def answers() -> bool:
            assert process.returncode is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        await asyncio.wait_for(until(answers), STARTS)
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            yield Gateway(kind, f"http://127.0.0.1:{port}", log, session)


async def eventually(true: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what the gateway finds out by itself, or through the requests that ask for it."""

    async def found() -> None:
        while not await true():
            await asyncio.sleep(0.2)

    await asyncio.wait_for(found(), NOTICES)


# ------------------------------------------------------------------------------- the tests ----


async def test_model_that_one_jano_cannot_load_is_answered_by_the_other(
    gateway: Gateway, machines: list[Machine]
) -> None:
    _, two = machines
    await two.load("chat")
    failures = len(two.jano.log("swap failed"))
    broken = two.folder / "broken"
    broken.touch()
    found = []
    for _ in range(2):
        async with await gateway.post("code") as answer:
            found.append((answer.status, "one/code" in await answer.text()))
    broken.unlink()
    await two.jano.logged("swap failed", failures + 1, model="code")
    # nginx would take the whole jano for dead, so it passes the 503 on and the client asks again.
    second = (503, False) if gateway.kind == "nginx" else (200, True)
    assert sorted(found) == [(200, True), second]


async def test_both_janos_work_and_each_piece_arrives_before_the_next_is_sent(
    gateway: Gateway, machines: list[Machine]
) -> None:
    with held_streams(machines):
        begun = [await gateway.begun(model) for model in MODELS]
    assert {piece.split("/")[0] for piece, _ in begun} == {"I am one", "I am two"}
    for _, answer in begun:
        assert (await event(answer.text())).endswith("data: [DONE]\n\n")


async def test_client_that_hangs_up_leaves_janos_queue(
    gateway: Gateway, machines: list[Machine]
) -> None:
    with held_streams(machines):
        begun = [await gateway.begun(model) for model in MODELS]
        for stream in (True, False):
            left = {machine: len(machine.jano.log("client disconnected")) for machine in machines}
            waiting = asyncio.create_task(gateway.post("chat", stream))
            machine = await next_enqueued(machines)
            waiting.cancel()
            await machine.jano.logged("client disconnected", left[machine] + 1)
    for _, answer in begun:
        await event(answer.text())


async def test_killed_jano_is_taken_over_noticed_and_used_again(
    gateway: Gateway, machines: list[Machine]
) -> None:
    with held_streams(machines):
        # Streams for chat, until a jano has one that runs and one that waits.
        asks: dict[Machine, list[asyncio.Task[Any]]] = {machine: [] for machine in machines}
        while max(len(tasks) for tasks in asks.values()) < 2:
            ask = asyncio.create_task(gateway.begun("chat"))
            machine = await next_enqueued(machines)
            asks[machine].append(ask)
            if len(asks[machine]) == 1:
                await event(asyncio.shield(ask))
        dead, other = sorted(machines, key=lambda machine: -len(asks[machine]))
        _, running_answer = await asks[dead][0]
        await dead.die()

        with contextlib.suppress(aiohttp.ClientPayloadError):  # what had begun ends visibly,
            assert '"error"' in await event(running_answer.text())  # in LiteLLM's way
    piece, _ = await event(asks[dead][1])
    assert piece == f"I am {other.name}/chat"
    for model in MODELS * 3:
        said, _ = await gateway.ask(model)
        assert said == f"I am {other.name}/{model}."
    await eventually(gateway.knows_of_a_dead_one)

    await dead.start()

    async def used_again() -> bool:
        said = [(await gateway.ask(model))[0] for model in MODELS]
        return any(text.startswith(f"I am {dead.name}/") for text in said)

    await eventually(used_again)
