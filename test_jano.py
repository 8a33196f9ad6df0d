"""Jano's tests: the real process, real swap scripts, real sockets; only the backends are fake.

Run with `pytest`. What takes long is marked `soak`. First come the helpers, which the tests in
integration/ use too.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import fcntl
import functools
import gzip
import heapq
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

import jano

JANO = Path(jano.__file__).resolve()
PATIENCE = 10  # seconds that an event may take on a slow machine before a test gives up on it
linux_only = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


# ---------------------------------------------------------------------- helpers: waiting ----


async def event(awaitable: Awaitable[Any]) -> Any:
    """Wait for something that must happen within PATIENCE; its result."""
    return await asyncio.wait_for(awaitable, PATIENCE)


async def until(true: Callable[[], bool]) -> None:
    """Wait for what another process does without telling us. Use it within `event`."""
    while not true():
        await asyncio.sleep(0.02)


async def statuses(asks: list[asyncio.Task[aiohttp.ClientResponse]]) -> list[int]:
    """The statuses of the answers that these tasks wait for."""
    answers = await event(asyncio.gather(*asks))
    return [answer.status for answer in answers]


def refuses(port: int) -> bool:
    """Whether nobody listens on this port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def free_port() -> int:
    """A port of this machine that nobody listens on.

    It is below those that the kernel gives to outgoing connections (from 32768 on under Linux), so
    it stays free until the server for which it is meant is started, or started again.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ----------------------------------------------------- helpers: backends in this process ----

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Backend:
    """A backend in this process. It records the POSTs and answers as the test tells it to.

    To script it, assign another function to `look` or `answer`, or False to `ready`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = True  # whether /health says 200 or 503
        self.look: Answer = self.health  # answers each GET
        self.answer: Answer = self.plain  # answers each request of another method
        self.requests: list[web.Request] = []  # in the order in which they came, without GETs
        self.bodies: list[bytes] = []  # of these requests
        self.arrived: asyncio.Queue[web.Request] = asyncio.Queue()  # the same, to wait for
        self.release = asyncio.Event()  # what `held` waits for

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return await self.look(request)
        self.bodies.append(await request.read())
        self.requests.append(request)
        self.arrived.put_nowait(request)
        return await self.answer(request)

    async def health(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if self.ready else 503)

    async def plain(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"answered_by": self.name})

    async def held(self, request: web.Request) -> web.StreamResponse:
        """Answers as `plain` does, once the test has set `release`."""
        await self.release.wait()
        return await self.plain(request)

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", port).start()
        self.port = self.runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self.runner.cleanup()


@contextlib.asynccontextmanager
async def running_backend(name: str) -> AsyncIterator[Backend]:
    backend = Backend(name)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


@pytest.fixture
async def chat() -> AsyncIterator[Backend]:
    async with running_backend("chat") as backend:
        yield backend


@pytest.fixture
async def code() -> AsyncIterator[Backend]:
    async with running_backend("code") as backend:
        yield backend


def entry(backend: Backend, **keys: Any) -> dict[str, Any]:
    """An entry of models.json for this backend, with these keys added or changed."""
    return {"name": backend.name, "url": backend.url, **keys}


def says(*pieces: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """An answer for a Backend. One piece has a Content-Length, several go out in chunks.

    An empty piece stands for a pause of 0.1 s. It is JSON, unless a header says otherwise.
    """

    async def answer(request: web.Request) -> web.StreamResponse:
        all_headers = {"Content-Type": "application/json"} | (headers or {})
        response = web.StreamResponse(status=status, headers=all_headers)
        if len(pieces) == 1:
            response.content_length = len(pieces[0])
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0 if piece else 0.1)
        return response

    return answer


# ----------------------------------------------------------- helpers: a backend in bytes ----

OK = b"HTTP/1.1 200 OK\r\n"
OLD = b"HTTP/1.0 200 OK\r\n"
SIZED = OK + b"Content-Length: 9\r\n\r\n"
IN_CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"

# How a reply of `Raw` ends, if not by closing the connection.
HELD = b"<held>"  # the connection stays open
RESET = b"<reset>"  # the connection is broken
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds


class Raw:
    """A backend that speaks in bytes, behind a jano of its own.

    It answers each POST with `reply` and then closes the connection, unless the reply ends with
    HELD or RESET.
    """

    jano: Running
    port = 0
    reply = OK + b"Content-Length: 2\r\n\r\n{}"
    ready_once = False  # stop listening as soon as the health was asked

    async def listen(self) -> None:
        self.server = await asyncio.start_server(self.talk, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.seen: list[bytes] = []  # POSTs as they came, whole
        self.talks: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()  # their connections
        self.tasks: set[asyncio.Task[None] | None] = set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: one request, one reply."""
        self.tasks.add(asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:  # jano has left
            writer.close()
            return
        if head.startswith(b"GET "):
            if self.ready_once:
                self.server.close()
            self.say(writer, OLD + b"Content-Length: 0\r\n\r\n")
            return
        length = int(re.findall(rb"(?i)\r\ncontent-length: ([0-9]+)\r\n", head)[0])
        self.seen.append(head + await reader.readexactly(length))
        self.talks.put_nowait(writer)
        self.say(writer, self.reply)
        with contextlib.suppress(ConnectionError):
            await reader.read(1)  # until jano is gone, or asks for more
        writer.close()

    def say(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        writer.write(answer.removesuffix(HELD).removesuffix(RESET))
        if answer.endswith(RESET):
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        if not answer.endswith(HELD):
            writer.close()

    async def stop(self) -> None:
        self.server.close()
        if self.tasks:
            await event(asyncio.wait(self.tasks))


# -------------------------------------------------------- helpers: backends as processes ----

TOY_SERVER = r'''
"""A model server as a process of its own.

    toy_server.py NAME PORT [key=value …]     all times are seconds from the start

refuse=2    nothing listens until then
load=3      /health says 503 "Loading model" until then
die=2       then it says "CUDA error: out of memory" and exits with code 1
"""

import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

name, port, *options = sys.argv[1:]
seconds = {key: float(value) for key, value in (option.split("=") for option in options)}
started = time.monotonic()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({"status": "ok"})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"answered_by": name, "pid": os.getpid()})

    def answer(self, body):
        ready = time.monotonic() - started >= seconds.get("load", 0)
        if not ready:
            body = {"error": {"message": "Loading model"}}
        data = json.dumps(body).encode()
        self.send_response(200 if ready else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def die():
    print("CUDA error: out of memory", file=sys.stderr, flush=True)
    os._exit(1)


if "die" in seconds:
    threading.Timer(seconds["die"], die).start()
time.sleep(seconds.get("refuse", 0))
ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
'''


def toy_server(folder: Path, name: str, port: int, **seconds: float) -> str:
    """A shell command that runs a toy model server (TOY_SERVER) in the foreground."""
    file = folder / "toy_server.py"
    file.write_text(TOY_SERVER)
    options = [f"{key}={value}" for key, value in seconds.items()]
    return shlex.join([sys.executable, "-ISE", str(file), name, str(port), *options])


# ----------------------------------------------------------------- helpers: swap scripts ----


def swap_script(
    folder: Path, body: str = "", name: str = "swap.sh", status: str = "exit 1"
) -> Path:
    """A real swap script. It notes each call in folder/calls.

    `status` says in shell what it does when it is asked for the status; as a rule it does not know
    that word. `body` says what it does otherwise: $1 is the model, or `unload`.
    """
    script = folder / name
    script.write_text(f"""#!/bin/sh
echo "$1 previous=$JANO_PREVIOUS_MODEL group=$JANO_GROUP restart=$JANO_RESTART" >>"{folder}/calls"
if [ "$1" = status ]; then
{status}
exit
fi
{body}
""")
    script.chmod(0o755)
    return script


def gate(folder: Path) -> str:
    """Shell that waits until the test creates folder/go, 20 seconds at most."""
    return f'for _ in $(seq 1000); do [ -e "{folder}/go" ] && break; sleep 0.02; done'


def gated_script(folder: Path, model: str = "code", then: str = "") -> Path:
    """A swap script that waits at the gate when it is called for this model, or for `status`."""
    waiting = f"{gate(folder)}\n{then}"
    if model == "status":
        return swap_script(folder, status=waiting)
    return swap_script(folder, f'if [ "$1" = {model} ]; then\n{waiting}\nfi')


def calls(folder: Path, environ: bool = False) -> list[str]:
    """What the script was called for, in order, without `status`; or with its environment."""
    path = folder / "calls"
    if not path.exists():
        return []
    text = path.read_text().replace(" restart=\n", "\n")
    text = text.replace(" group=default", "").replace(f" group={folder}", "")
    lines = [line for line in text.splitlines() if not line.startswith("status ")]
    if environ:
        return lines
    return [line.split()[0] for line in lines]


def example_script(folder: Path, commands: dict[str, str]) -> Path:
    """A copy of swap.example.sh whose table has these models and their servers' commands."""
    example = JANO.with_name("swap.example.sh").read_text()
    head, begin, rest = example.partition("table() {\n")
    assert begin
    rows = "".join(f"  model {shlex.quote(name)} {run}\n" for name, run in commands.items())
    script = folder / "swap.sh"
    script.write_text(head + begin + rows + rest[rest.index("}\n") :])
    script.chmod(0o755)
    return script


@contextlib.asynccontextmanager
async def running_example(
    folder: Path, models: list[dict[str, Any]], commands: dict[str, str], **settings: Any
) -> AsyncIterator[Running]:
    """A jano with swap.example.sh, whose table has these commands. They are stopped at the end.

    The script's pid files and logs are in folder/default.
    """
    script = example_script(folder, commands)
    places: dict[str, Any] = {"SWAP_STATE_DIR": str(folder), "HOME": str(folder)}
    try:
        async with running_jano(folder, models, script, **places, **settings) as running:
            yield running
    finally:
        environ = {"PATH": os.environ["PATH"], **places}
        unload = await asyncio.create_subprocess_exec(str(script), "unload", env=environ)
        await event(unload.wait())


# ------------------------------------------------------------- helpers: the running jano ----


class Running:
    """A jano process: its address, its log, and a session to talk to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, session: aiohttp.ClientSession, folder: Path
    ) -> None:
        self.process = process
        self.session = session
        self.folder = folder  # where it was started
        self.group = "default"  # of each model that is given to `reload` and names none
        self.proc = Path(f"/proc/{process.pid}")  # Linux only
        self.lines: list[dict[str, Any]] = []  # its log so far
        self.log_ended = False  # as the process has
        self.more = asyncio.Condition()
        self.tasks: list[asyncio.Task[Any]] = []
        self.url = ""
        self.port = 0

    async def read_log(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            async with self.more:
                self.lines.append(json.loads(line))
                self.more.notify_all()
        async with self.more:
            self.log_ended = True
            self.more.notify_all()

    def log(self, msg: str, **fields: object) -> list[dict[str, Any]]:
        """The lines of the log so far that have this message and these fields."""
        lines = [line for line in self.lines if line["msg"] == msg]
        return [line for line in lines if fields.items() <= line.items()]

    async def logged(self, msg: str, count: int = 1, **fields: object) -> dict[str, Any]:
        """Wait until the log has so many such lines; the last of them."""

        def enough() -> bool:
            return len(self.log(msg, **fields)) >= count

        async with self.more:
            with contextlib.suppress(TimeoutError):
                await event(self.more.wait_for(lambda: enough() or self.log_ended))
        assert enough(), f"no {msg!r} {fields} in {self.lines}"
        return self.log(msg, **fields)[count - 1]

    def background(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run this beside the test. The end of jano is awaited together with its end."""
        task = asyncio.create_task(coroutine)
        self.tasks.append(task)
        return task

    async def post(self, model: str, **fields: Any) -> aiohttp.ClientResponse:
        """One chat completion; its answer has been read to the end."""
        body = {"model": model, "messages": [], **fields}
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
            await answer.read()
        return answer

    async def ask(self, model: str, **fields: Any) -> tuple[int, Any]:
        """One chat completion: its status and its JSON."""
        answer = await self.post(model, **fields)
        return answer.status, await answer.json(content_type=None)

    async def queued(self, *models: str, **fields: Any) -> list[asyncio.Task[Any]]:
        """Send requests for these models, each once the last has arrived; their answers' tasks."""
        asks = []
        for model in models:
            so_far = len(self.log("enqueued"))
            asks.append(self.background(self.post(model, **fields)))
            await self.logged("enqueued", so_far + 1)
        return asks

    async def get(self, path: str) -> Any:
        """What GET path says: an object where it is JSON, else a text."""
        async with self.session.get(URL(self.url + path, encoded=True)) as answer:
            text = await answer.text()
        return json.loads(text) if text.startswith("{") else text

    async def status(self) -> dict[str, Any]:
        return dict(await self.get("/status"))

    async def shows(self, **wanted: Any) -> dict[str, Any]:
        """/status, where these fields must have these values."""
        found = await self.status()
        assert {name: found[name] for name in wanted} == wanted
        return found

    def bugs(self, may_log: str = "") -> list[dict[str, Any]]:
        """The lines of its log that tell of a bug, but for those with this message."""
        messages = {"worker died", "handler failed", "complaint of a library"} - {may_log}
        return [line for line in self.lines if line["msg"] in messages]

    def kill(self, number: int) -> None:
        """Send it a signal, unless it has ended.

        Not by the process's own send_signal: where jano has just ended, that takes its exit code
        away from asyncio, which then says 255.
        """
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    async def reload(self, models: list[dict[str, Any]]) -> None:
        """Write models.json anew, send SIGHUP and wait until jano has read it."""
        write_models(self.folder, [{"group": self.group, **model} for model in models])
        so_far = len(self.log("models reloaded"))
        self.kill(signal.SIGHUP)
        await self.logged("models reloaded", so_far + 1)

    async def all_over(self, files: int = 999) -> int:
        """Wait until nothing runs or waits, and only so many files are open; how many are."""
        status = await self.status()
        while status["inFlight"] or status["queueDepth"] or len(self.open("fd")) > files:
            status = await self.status()
        return len(self.open("fd"))

    def open(self, what: str) -> list[Path]:
        """Its files (fd) or threads (task)."""
        return [*self.proc.glob(f"{what}/*")]

    def memory(self, line: str) -> int:
        """VmRSS, what it takes now, or VmHWM, what it took at most; in kB."""
        return int((self.proc / "status").read_text().split(f"{line}:")[1].split()[0])


def write_models(folder: Path, models: list[dict[str, Any]]) -> None:
    (folder / "models.json").write_text(json.dumps({"models": models}))


async def start(
    folder: Path,
    *arguments: str,
    redirection: str = "",
    stderr: int | None = None,
    **settings: Any,
) -> asyncio.subprocess.Process:
    """The real process, as its user would start it in this folder, with these settings.

    Its stdout is a pipe, unless the redirection (in shell) says otherwise.
    """
    if "SWAP_COMMAND" not in settings:
        settings["SWAP_COMMAND"] = swap_script(folder)
    temporary = folder.with_name(f"{folder.name}-temporary")
    temporary.mkdir(exist_ok=True)
    environ = {
        "PATH": os.environ["PATH"],
        "JANO_PORT": "0",
        "TMPDIR": str(temporary),
        "SSL_CERT_FILE": os.devnull,  # aiohttp is imported sooner without certificates
    }
    environ |= {name: str(value) for name, value in settings.items()}
    command = [sys.executable, "-W", "error", str(JANO), *arguments]
    return await asyncio.create_subprocess_exec(
        *("sh", "-c", f'exec "$0" "$@" {redirection}', *command),
        cwd=folder,
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        limit=2**24,
    )


@contextlib.asynccontextmanager
async def running_jano(
    folder: Path,
    models: list[dict[str, Any]],
    swap: Path | None = None,
    ends_with: int = 0,
    may_log: str = "",
    **settings: Any,
) -> AsyncIterator[Running]:
    """A jano with these models and settings, once it listens.

    After the block it is told to stop, unless it has ended; its exit code must be `ends_with`. Of
    the messages that tell of a bug, it must have logged none but `may_log`.
    """
    write_models(folder, models)
    if swap:
        settings["SWAP_COMMAND"] = swap
    process = await start(folder, **settings)
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        running = Running(process, session, folder)
        reader = asyncio.create_task(running.read_log())
        try:
            running.port = (await running.logged("jano listening"))["port"]
            running.url = f"http://127.0.0.1:{running.port}"
            yield running
        finally:
            await session.close()  # jano would wait for a connection that stays open, if not long
            running.kill(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await event(process.wait())
            running.kill(signal.SIGKILL)  # if it hangs
            exit_code = await process.wait()
            await reader
            await asyncio.gather(*running.tasks, return_exceptions=True)
        assert exit_code == ends_with, running.lines
        assert not running.bugs(may_log)


@pytest.fixture(scope="session")
async def common_jano(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """A jano for many groups of models, each of which is a folder, with its own swap.sh in it."""
    folder = tmp_path_factory.mktemp("common")
    call = 'exec "$JANO_GROUP/swap.sh" "$@"'
    async with running_jano(folder, [ENTRY], swap_script(folder, call, status=call)) as daemon:
        await daemon.logged("worker started")  # or a test would take it for its own
        yield daemon


Shared = Callable[..., contextlib.AbstractAsyncContextManager[Running]]


@pytest.fixture
def shared_jano(common_jano: Running, tmp_path: Path) -> Shared:
    """As `running_jano(tmp_path, …)` without settings, but one process serves many tests.

    It reads models.json again for each, with the test's models in a new group. So what is loaded,
    waits and fails is the test's own; but ids and what /status counts go on from the last one.
    """
    common_jano.group = str(tmp_path)

    @contextlib.asynccontextmanager
    async def lent(
        models: list[dict[str, Any]], swap: Path | None = None
    ) -> AsyncIterator[Running]:
        assert (swap or swap_script(tmp_path)) == tmp_path / "swap.sh"
        await common_jano.reload(models)
        assert not common_jano.bugs()  # of the test before, if it was late
        del common_jano.lines[: common_jano.lines.index(common_jano.log("models reloaded")[-1])]
        try:
            yield common_jano
            await event(common_jano.all_over())
            assert not common_jano.bugs()
        finally:
            for task in common_jano.tasks:
                task.cancel()
            common_jano.tasks.clear()

    return lent


# ------------------------------------------------------------- helpers: clients in bytes ----

CHUNKED = "Transfer-Encoding: chunked"
GZIP = "Content-Encoding: gzip"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def post_bytes(
    body: bytes = b'{"model":"chat"}',
    *headers: str,
    path: str = "/v1/chat/completions",
    version: str = "1.1",
) -> bytes:
    """A POST as it goes over the wire; the connection ends after it unless a header says not."""
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", *headers]
    if CHUNKED not in headers:
        lines.append(f"Content-Length: {len(body)}")
    if "Connection: keep-alive" not in headers:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + body


def in_chunks(data: bytes) -> bytes:
    """This body in two chunks, with a trailer."""
    return b"1\r\n%c\r\n%x\r\n%b\r\n0\r\nX-T: 1\r\n\r\n" % (data[0], len(data) - 1, data[1:])


@contextlib.asynccontextmanager
async def connected(
    jano_: Running, sent: bytes
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that sends this, and at the end of the block is gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", jano_.port)
    with contextlib.closing(writer):
        writer.write(sent)
        yield reader, writer


async def exchange(jano_: Running, sent: bytes, patience: float = PATIENCE) -> bytes:
    """What comes back for these bytes, until the connection ends."""
    async with connected(jano_, sent) as (reader, _):
        return await asyncio.wait_for(reader.read(-1), patience)


def parsed(message: bytes) -> tuple[str, list[tuple[str, str]], bytes]:
    """The first line, the headers (names in lower case) and the body of a message."""
    head, _, body = message.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    return first, [(name.lower(), value) for name, value in pairs], body


def answered(message: bytes) -> http.client.HTTPResponse:
    """An answer as another implementation than aiohttp reads it."""
    stream: Any = SimpleNamespace(makefile=lambda *_: io.BytesIO(message))
    answer = http.client.HTTPResponse(stream, method="POST")
    answer.begin()
    return answer


OPENAI_KEYS = {"message", "type", "param", "code"}


def error_of(answer: http.client.HTTPResponse) -> tuple[int, str]:
    """Status and code of an answer that must be an error in OpenAI's shape."""
    error = json.loads(answer.read())["error"]
    assert error.keys() == OPENAI_KEYS
    assert error["message"]
    return answer.status, error["code"]


def refused(message: bytes) -> int:
    """The status of an answer that must be such an error."""
    return error_of(answered(message))[0]


# -------------------------------------------------------------------------------- config ----

ENTRY = {"name": "a", "url": "http://127.0.0.1:1"}
Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Check:
    """Runs `jano.py --check` on what it is given: its exit code and what it said.

    `models` is the content of models.json or its entries, `env` that of .env, the rest is the
    environment. The folder in which all of them are is left out of what it said.
    """

    def run(models: Any = (ENTRY,), env: str | bytes = "", **environ: str) -> tuple[int, str]:
        text = models if isinstance(models, str) else json.dumps({"models": models})
        (tmp_path / "models.json").write_text(text)
        (tmp_path / ".env").write_bytes(env if isinstance(env, bytes) else env.encode())
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        code = jano.main()
        out, err = capsys.readouterr()
        assert not out or not err
        return code, (out + err).removeprefix(f"{tmp_path}/").removeprefix("./")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWAP_COMMAND", str(swap_script(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["jano.py", "--check"])
    return run


def fault(checked: tuple[int, str]) -> str:
    """The one line of a check that found a fault."""
    code, said = checked
    assert (code, said.count("\n"), said[-1]) == (2, 1, "\n"), said
    assert ", expected " in said or "not set" in said
    return said


def test_check_of_a_usable_configuration_says_so_in_a_line(check: Check) -> None:
    code, said = check()
    assert (code, said.count("\n")) == (0, 1)


def bad(key: str, *values: Any) -> list[Any]:
    """Rows: a key and a value that it may not have."""
    return [pytest.param(key, value, id=f"{key}={value!r}"[:60]) for value in values]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *bad("name", "", 5, None, "status", "UNLOAD", "two\nlines", "\x7f", "\ud800"),
        *bad("url", "", 5, "h:1", "ftp://h", "http://", "http://h:0", "http://h:65536"),
        *bad("url", "http://h:x", "http://[::1", "http://h?q", "http://h#f", "http://h /"),
        *bad("url", "http://:1", "http://.", "http://a..b", f"http://{'x' * 64}.org"),
        *bad("aliases", "b", [1], [""], {}),
        *bad("endpoints", "x", [None], [""], ["POST /v1/x"], ["http://h/v1/x"], ["/v1/*"]),
        *bad("label", "", 1, "two\nlines"),
        *bad("group", "", None),
        *bad("set", "", 1, [], "status", "Unload", "two\nlines"),
        *bad("slots", 0, -1, 1.0, True, "2"),
        *bad("passthrough", 1, "yes", None),
        *bad("unlisted", 1, "yes", None),
        *bad("upstream_model", "", 3),
        *bad("health", "", "health", "/a b", "/#", 1),
        *bad("headers", [], 1, {"X-Key": 1}, {"X-Key": None}),
        *bad("metadata", [], "x", 1),
    ],
)
def test_bad_value_in_an_entry_is_a_line_that_names_entry_key_and_value(
    check: Check, key: str, value: Any
) -> None:
    model = {**ENTRY, key: value}
    line = fault(check([model]))
    entry_name = json.dumps(model["name"])
    assert line.startswith(f"models.json: models[0] {entry_name}: {key}: found ")
    assert json.dumps(value)[:20] in line


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("headers", "X-Key: s3cret", '"..."'),
        ("headers", {"X-Key": "s3cret\n"}, '{"X-Key": "..."}'),
        ("headers", {"X-Key": "s3crét"}, '{"X-Key": "..."}'),
        ("headers", {"X-Key": ["s3cret"]}, '{"X-Key": ["..."]}'),
        ("headers", {"X Key": "s3cret"}, '{"X Key": "..."}'),
        ("headers", {"": "s3cret"}, '{"": "..."}'),
        ("headers", {"Host": "s3cret"}, '{"Host": "..."}'),
        ("url", "http://me:s3cret@h", '"http://...@h"'),
    ],
)
def test_fault_shows_no_key(check: Check, key: str, value: Any, found: str) -> None:
    """It goes into a log, and says all the same where the fault is."""
    line = fault(check([{**ENTRY, key: value}]))
    assert f"{key}: found {found}, expected " in line
    assert "s3cr" not in line


@pytest.mark.parametrize("models", [{"a": {"headers": {"X-Key": "s3cret"}}}, "s3cret"])
def test_fault_of_the_whole_file_shows_no_key(check: Check, models: Any) -> None:
    assert "s3cret" not in fault(check(json.dumps({"models": models})))


@pytest.mark.parametrize(
    ("entries", "place", "found"),
    [
        ([3], "models[0]", "found 3"),
        ([ENTRY, {"url": "http://h"}], "models[1]: name", "missing"),
        ([{"name": "a"}], 'models[0] "a": url', "missing"),
        ([{**ENTRY, "colour": 1}], 'models[0] "a"', '"colour"'),
        ([], "models", "none to swap"),
        ([{**ENTRY, "passthrough": True}], "models", "none to swap"),
        ([ENTRY, {**ENTRY, "name": "A"}], 'models[1] "A"', 'the name "a"'),
        ([ENTRY, {**ENTRY, "name": "b", "aliases": ["x", "A"]}], 'models[1] "b"', 'the name "a"'),
        ([ENTRY, {**ENTRY, "name": "b", "aliases": ["a"]}], 'models[1] "b"', 'the name "a"'),
    ],
)
def test_entries_that_do_not_fit_are_a_line_that_names_place_and_cause(
    check: Check, entries: Any, place: str, found: str
) -> None:
    line = fault(check(entries))
    assert line.startswith(f"models.json: {place}: ")
    assert found in line


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[]",
        '{"models": {}}',
        '{"models": [{"metadata": {"x": NaN}}]}',
        '{"models": [{"metadata": {"x": 1e400}}]}',
        '{"models": [], "models": []}',
        '{"models": [{"name": "a", "url": "http://h", "name": "b"}]}',
    ],
    ids=lambda text: text[:20],
)
def test_models_json_that_is_no_list_of_models_is_a_line(check: Check, text: str) -> None:
    assert fault(check(text)).startswith("models.json: found ")


def test_key_beside_models_is_a_line(check: Check) -> None:
    text = json.dumps({"models": [ENTRY, {**ENTRY, "name": "b"}], "model": 1})
    line = fault(check(text))
    assert line.startswith("models.json: found ")
    assert '"model"' in line


def test_set_that_is_called_like_a_model_outside_it_is_a_line(check: Check) -> None:
    """Its script could not tell which of the two it is to load."""
    member = {**ENTRY, "name": "b", "set": "a"}
    assert '"a"' in fault(check([ENTRY, member]))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:8082"),
        ("", "http://LOCALHOST:8082"),
        ("", "http://[::1]:8082"),
        ("LocalHost", "http://[::1]:8082"),
        ("0.0.0.0", "http://localhost:8082"),
        ("box.example.org", "http://box.example.org:8082"),
    ],
)
def test_backend_that_is_jano_itself_is_a_line(check: Check, host: str, url: str) -> None:
    line = fault(check([{**ENTRY, "url": url}], JANO_HOST=host))
    assert line.startswith('models.json: models[0] "a": url: found ')
    assert f"{url}, jano itself" in line.replace('"', "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JANO_PORT", "65536"),
        ("JANO_PORT", "x"),
        ("MAX_TURN_MS", "-1"),
        ("LINGER_MS", "1.5"),
        ("MAX_QUEUE", "0"),
        ("MAX_QUEUE", "1_000"),
        ("MAX_QUEUE", "+5"),
        ("MAX_BODY_MB", "9" * 70),
        ("HEARTBEAT_MS", "soon"),
        ("SWAP_FAILURE_LIMIT", "0"),
        ("SWAP_WAIT_TIMEOUT_MS", "0"),
        ("REQUEST_TIMEOUT_MS", "0"),
        ("USAGE_RECORDS_MAX", "0"),
        ("JANO_HOST", "[::1]"),
        ("JANO_HOST", "127.0.0.1:8082"),
        ("JANO_HOST", "http://127.0.0.1"),
        ("JANO_HOST", "127.0.0.1 "),
        ("JANO_ALLOWED_HOSTS", "box, *.lan"),
        ("JANO_ALLOWED_HOSTS", ".lan"),
        ("JANO_ALLOWED_HOSTS", "http://box.lan/"),
        ("SWAP_COMMAND", "no-such-script"),
        ("SWAP_COMMAND", "./models.json"),  # it is not executable
        ("SWAP_COMMAND", "~no-such-user/swap.sh"),
    ],
)
def test_bad_setting_is_a_line_that_names_it_and_its_value(
    check: Check, name: str, value: str
) -> None:
    assert f'{name}: found "{value}"' in fault(check(**{name: value}))


@pytest.mark.parametrize("key", ["s3cret\n", " s3cret", "s3cret\x7f", " "])
def test_key_that_no_client_can_send_is_a_line_that_does_not_show_it(
    check: Check, key: str
) -> None:
    assert 'JANO_API_KEY: found "..."' in fault(check(JANO_API_KEY=key))


@pytest.mark.parametrize("name", ["no.json", "~no-such-user/models.json"])
def test_missing_models_file_is_a_line_that_names_it(check: Check, name: str) -> None:
    line = fault(check(MODELS_FILE=name))
    assert line.startswith(f"{name}: found No such file")


def test_missing_swap_command_is_a_line(check: Check) -> None:
    assert fault(check(SWAP_COMMAND="")).startswith("SWAP_COMMAND: not set")


def test_first_of_many_faults_is_enough(check: Check) -> None:
    assert fault(check([{**ENTRY, "slots": 0, "set": 0}, 3], MAX_QUEUE="0", LINGER_MS="x"))


# JANO_CORS_ORIGINS

USABLE_ORIGINS = [
    "*",
    "null",
    "file://",
    "https://example.org",
    "http://localhost:3000",
    "http://localhost:*",
    "http://[::1]:*",
    "chrome-extension://*",
    "vscode-webview://*",
    "app://obsidian.md",
]
UNUSABLE_ORIGINS = [
    "example.org",
    "localhost:3000",
    "https://",
    "https://example.org/",  # an origin has no path
    "https://example.org/page",
    "https://*.example.org",  # a star is for ports and for whole schemes only
    "https://example.*",
    "http://localhost:*/",
    "http://localhost:80",  # browsers leave out the port that goes without saying
    "https://example.org:443",
    "http://localhost:65536",
    "http://user@localhost",
]


@pytest.mark.parametrize("origin", USABLE_ORIGINS)
def test_origin_that_a_browser_may_send_is_accepted(check: Check, origin: str) -> None:
    assert check(JANO_CORS_ORIGINS=f"https://one.example.org, {origin}")[0] == 0


@pytest.mark.parametrize("origin", UNUSABLE_ORIGINS)
def test_origin_that_can_match_nothing_is_a_line(check: Check, origin: str) -> None:
    line = fault(check(JANO_CORS_ORIGINS=f"https://one.example.org, {origin}"))
    assert "JANO_CORS_ORIGINS: found " in line
    assert origin in line


# .env

SPELLINGS = [  # a line of .env, the value that it gives
    ("  export MAX_QUEUE = k  ", "k"),
    ("MAX_QUEUE=\"k # 'k'\"", "k # 'k'"),
    ("MAX_QUEUE='k' # the key", "k"),
    ("MAX_QUEUE='k' # the 'key'", "k"),
    ('MAX_QUEUE="a b" -c "d e"', '"a b" -c "d e"'),
    ("export\tMAX_QUEUE=k", "k"),
    ("MAX_QUEUE=k#1=2 # the key", "k#1=2"),
    ("MAX_QUEUE=#k # the key", "#k"),
]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(("line", "value"), SPELLINGS)
def test_dotenv_is_read_as_a_shell_would(
    check: Check, line: str, value: str, line_end: str
) -> None:
    """A value that is no number comes back in the fault, as it was read."""
    env = f"# settings\n\n{line}\nLINGER_MS=1\n".replace("\n", line_end)
    assert f"MAX_QUEUE: found {json.dumps(value)}" in fault(check(env=env))


@pytest.mark.parametrize(
    "line",
    ["JANO_API_KEY: s3cret", "JANO_API_KEY s3cret", '"JANO_API_KEY"="s3cret"', "JANO_API_KEY"],
)
def test_dotenv_line_that_only_looks_like_a_setting_is_a_line(check: Check, line: str) -> None:
    """Else jano would be open to everybody. It shows no key."""
    said = fault(check(env=f"MAX_QUEUE=1\n{line}"))
    assert said.startswith(".env: line 2: found JANO_API_KEY without =")


@pytest.mark.parametrize("line", ["# MAX_QUEUE=k", "MAX_QUEUE= # none", "MAX_QUEUE="])
def test_dotenv_line_without_a_value_is_as_none(check: Check, line: str) -> None:
    assert check(env=line)[0] == 0


@pytest.mark.parametrize(
    "line", ["HF_TOKEN=hf_x", "export COMPOSE_PROJECT_NAME='x y'", "COLOUR=$(tput setaf 1)"]
)
def test_what_others_keep_in_dotenv_is_ignored(check: Check, line: str) -> None:
    assert check(env=f"{line}\nMAX_QUEUE=10\n")[0] == 0


def test_environment_wins_over_dotenv(check: Check) -> None:
    assert check(env="MAX_QUEUE=k", MAX_QUEUE="1")[0] == 0


def test_empty_environment_leaves_the_word_to_dotenv(check: Check) -> None:
    assert 'MAX_QUEUE: found "k"' in fault(check(env="MAX_QUEUE=k", MAX_QUEUE=""))


def test_dotenv_that_is_no_text_is_a_line(check: Check) -> None:
    assert ".env: found" in fault(check(env=b"MAX_QUEUE=\xff"))


# The command


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("~/my scripts/swap me.sh", ["HERE/my scripts/swap me.sh"]),
        ("'~/my scripts/swap me.sh' --gpu '# 1'", ["HERE/my scripts/swap me.sh", "--gpu", "# 1"]),
        ("on-path.sh -v", ["HERE/my scripts/on-path.sh", "-v"]),
        (f"./swap.sh {'x' * 300}", ["HERE/swap.sh", "x" * 300]),
    ],
)
def test_swap_command_is_a_path_with_spaces_or_a_command_with_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/my scripts")
    (tmp_path / "my scripts").mkdir()
    for name in ("swap.sh", "my scripts/swap me.sh", "my scripts/on-path.sh"):
        swap_script(tmp_path, name=name)
    found = jano.load_settings({"SWAP_COMMAND": command}).swap_command
    assert [word.replace(str(tmp_path), "HERE") for word in found] == argv


async def output_of(folder: Path, *arguments: str, **settings: str) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    process = await start(folder, *arguments, stderr=asyncio.subprocess.PIPE, **settings)
    out, err = await event(process.communicate())
    return process.returncode, out.decode(), err.decode()


async def test_start_with_a_fault_exits_with_2_and_a_line_on_stderr(tmp_path: Path) -> None:
    write_models(tmp_path, [{**ENTRY, "slots": 0}])
    code, out, err = await output_of(tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert 'models.json: models[0] "a": slots: found 0, expected ' in err


@pytest.mark.parametrize("library", ["3.9.5", "3.13.2rc0"])
def test_start_with_an_aiohttp_that_is_too_old_says_so(library: str) -> None:
    code = (
        f"import aiohttp, runpy; aiohttp.__version__ = {library!r}; runpy.run_path({str(JANO)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "expected 3.11 and 3.14 or later" in done.stderr


async def test_tilde_stands_for_the_home_folder_in_all_of_the_swap_command(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    swap_script(tmp_path)
    settings: dict[str, Any] = {"SWAP_COMMAND": "sh ~/swap.sh", "HOME": tmp_path}
    async with running_jano(tmp_path, [entry(chat), entry(code)], **settings) as daemon:
        assert (await daemon.ask("code"))[0] == 200
    assert calls(tmp_path) == ["code"]


async def test_check_runs_no_script(tmp_path: Path) -> None:
    write_models(tmp_path, [ENTRY])
    code, out, err = await output_of(tmp_path, "--check")
    assert (code, out.count("\n"), err) == (0, 1, "")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("argument", "words"), [("--version", ["jano", jano.__version__]), ("--help", ["--check"])]
)
def test_version_and_help_need_no_configuration(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    words: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["jano.py", argument])
    with pytest.raises(SystemExit) as ended:
        jano.main()
    assert ended.value.code == 0
    assert set(words) <= set(capsys.readouterr().out.split())


# -------------------------------------------------------------------------------- policy ----


@pytest.mark.parametrize(
    ("queue", "loaded", "taken"),
    [
        (["b1", "a1", "a2"], ["a"], "a1"),
        (["c1", "b1", "a1"], ["a", "b"], "b1"),
        (["c1", "b1"], ["a"], "c1"),
        (["c1", "b1"], [], "c1"),
        ([], ["a"], None),
    ],
)
def test_take_next_is_the_oldest_for_what_is_loaded_else_the_oldest(
    queue: list[str], loaded: list[str], taken: str | None
) -> None:
    tickets = {name: jano.Ticket(name[0], second) for second, name in enumerate(queue)}
    ticket = jano.take_next(list(tickets.values()), loaded)
    assert ticket is (tickets[taken] if taken else None)


def schedule_of(turn: float, linger: float, slots: int, sets: dict[str, str]) -> jano.Schedule:
    """Of the models a to d; those without a set are one by themselves."""
    schedule = jano.Schedule(turn, linger)
    schedule.slots = dict.fromkeys("abcd", slots)
    schedule.set_of = {model: sets.get(model, model) for model in "abcd"}
    return schedule


class Course:
    """A Schedule told what happens. The first letter of a ticket's name is its model."""

    def __init__(self, turn: float, linger: float, slots: int, sets: dict[str, str]) -> None:
        self.schedule = schedule_of(turn, linger, slots, sets)
        self.tickets: dict[str, jano.Ticket] = {}

    def happen(self, now: float, event: str) -> None:
        match event.split():
            case ["load", name, *cost]:
                self.schedule.note_unloaded(now)
                self.schedule.note_loaded(name, now, *map(float, cost))
            case ["unload"]:
                self.schedule.note_unloaded(now)
            case ["move", model, name]:  # models.json was reloaded
                self.schedule.set_of[model] = name
            case ["ask", name, "priority"]:
                self.ask(now, name, jano.PRIORITY)
            case ["ask", name, "flex"]:
                self.ask(now, name, jano.FLEX)
            case ["ask", *names]:
                for name in names:
                    self.ask(now, name, jano.DEFAULT)
            case ["leave", *names]:
                for name in names:
                    self.schedule.leave(self.tickets[name], now)

    def ask(self, now: float, name: str, tier: int) -> None:
        """A new ticket, or one that had its turn and comes back."""
        ticket = self.tickets.setdefault(name, jano.Ticket(name[0], now, tier))
        self.schedule.arrive(ticket, now)

    def advance(self, now: float) -> str:
        granted = self.schedule.advance(now)
        decision = self.schedule.decision
        if granted:
            return "grant " + " ".join(n for n, ticket in self.tickets.items() if ticket in granted)
        if decision.swap_to is not None:
            return f"swap to {decision.swap_to}"
        return "wait" if decision.until is None else f"wait until {decision.until:g}"


def tell(
    events: str,
    turn: float = 60,
    linger: float = 5,
    slots: int = 1,
    sets: dict[str, str] | None = None,
) -> tuple[str, jano.Schedule]:
    """Tell a story such as "0 load a, 3 ask b1 b2, 5 leave b1": seconds and events.

    Returns what is decided after the last one, and the schedule.
    """
    story = Course(turn, linger, slots, sets or {})
    outcome = ""
    for moment in events.split(", "):
        second, _, happens = moment.partition(" ")
        for event in happens.split(" and "):
            story.happen(float(second), event)
        outcome = story.advance(float(second))
    return outcome, story.schedule


@pytest.mark.parametrize(
    ("events", "slots", "outcome"),
    [
        ("0 load a", 1, "wait"),
        ("0 ask c1, 1 ask b1", 1, "swap to c"),
        ("0 load b 9, 0 load a 9, 5 unload, 6 ask b1", 1, "swap to b"),
        ("0 ask a1, 0 ask a2, 9 load a", 1, "grant a1"),
        ("0 ask a1, 0 ask a2, 9 load a", 2, "grant a1 a2"),
        ("0 load a, 0 ask a1, 1 ask a2", 1, "wait"),
        ("0 load a, 0 ask a1, 1 ask b1, 2 ask a2", 2, "grant a2"),
        # One that has had its turn comes back in front.
        ("0 load a and ask a1 a2 a3, 1 leave a1, 2 ask a1, 3 leave a2", 1, "grant a1"),
        # One that leaves the queue is not served; leaving twice does no harm.
        ("0 load a and ask a1 a2 a3, 1 leave a2 a1", 1, "grant a3"),
        ("0 load a and ask a1 a2, 1 leave a1, 2 leave a1", 1, "wait"),
    ],
)
def test_the_loaded_models_oldest_goes_first(events: str, slots: int, outcome: str) -> None:
    assert tell(events, slots=slots)[0] == outcome


BUSY = "0 load a and ask a0"  # a0 runs on; there are two slots


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        # It lasts 60 s, from when somebody waits for another model.
        (f"{BUSY}, 100 ask b1, 159 ask a1", "grant a1"),
        (f"{BUSY}, 100 ask b1, 160 ask a1", "swap to b"),
        ("0 ask b1, 1 ask a0, 10 load a, 69 ask a1", "grant a1"),
        ("0 ask b1, 1 ask a0, 10 load a, 70 ask a1", "swap to b"),
        # Nothing of the loaded model waits: what is in flight may still bring more.
        (f"{BUSY}, 1 ask b1, 60 tick", "wait"),
        (f"{BUSY}, 1 ask b1, 61 tick", "swap to b"),
        (f"{BUSY}, 1 ask b1, 2 leave a0", "swap to b"),
        # And two round trips more: 60 + 2 x (20 + 10).
        ("0 load b 10, 0 load a 20 and ask a0, 2 ask b1, 121 ask a1", "grant a1"),
        ("0 load b 10, 0 load a 20 and ask a0, 2 ask b1, 122 ask a1", "swap to b"),
        # A cost is the average of the last one and of those before: 60 + 2 x (10 + 50) / 2.
        ("0 load a 10, 0 load a 50 and ask a0, 2 ask b1, 121 ask a1", "grant a1"),
        ("0 load a 10, 0 load a 50 and ask a0, 2 ask b1, 122 ask a1", "swap to b"),
        # Nobody waits for another model any more.
        (f"{BUSY}, 1 ask b1, 61 tick, 62 leave b1, 63 ask a1", "grant a1"),
    ],
)
def test_a_turn_ends(events: str, outcome: str) -> None:
    assert tell(events, slots=2)[0] == outcome


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        (f"{BUSY}, 1 ask b1, 9999 ask a1", "grant a1"),
        (f"{BUSY}, 1 ask c1, 2 ask b1, 3 leave a0", "swap to c"),
        # The oldest ticket is for b, though c has waited for longer than b has been unloaded.
        ("0 load b and ask b0 b1 b2, 2 ask c1, 3 leave b0 b1 and load a", "swap to b"),
        ("0 ask b1, 1 ask c1, 2 ask b2, 3 leave b1", "swap to c"),
        # It does not linger.
        ("0 load b 9, 0 load a 9, 2 ask a1, 3 leave a1, 4 ask b1", "swap to b"),
    ],
)
def test_without_a_turn_greed_has_no_end(events: str, outcome: str) -> None:
    assert tell(events, turn=0, slots=2)[0] == outcome


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ("0 load a and ask a0, 1 ask c1, 2 ask b1, 3 leave a0", "swap to c"),
        # Since it was asked for, or since it was unloaded: b at 2 or 3.
        ("0 load b and ask b0 b1, 2 leave b0 and load a, 3 ask c1", "swap to b"),
        ("0 load b and ask b0 b1, 2 ask c1, 3 leave b0 and load a", "swap to c"),
        # It is not asked for while it is loaded.
        ("0 load a and ask a0, 1 leave a0 and load b, 2 ask c1, 3 ask a1", "swap to c"),
        # Whoever asked first may have left.
        (
            "0 load a and ask a0, 1 ask b1, 5 ask c1, 6 ask b2, 10 leave b1, 11 leave a0",
            "swap to b",
        ),
    ],
)
def test_next_is_who_has_waited_longest(events: str, outcome: str) -> None:
    assert tell(events)[0] == outcome


BOTH_ASK = f"{BUSY}, 1 ask b1, 5 ask c1"
GAVE_UP = f"{BOTH_ASK}, 10 leave b1"
LOADED = f"{BUSY}, 1 ask b1, 10 leave b1, 11 leave a0 and load b, 12 load a"


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        # For as long as it lasted, 9 s.
        (f"{GAVE_UP}, 19 ask b2, 20 leave a0", "swap to b"),
        (f"{GAVE_UP}, 20 ask b2, 20 leave a0", "swap to c"),
        (f"{GAVE_UP}, 18 leave b1, 20 ask b2, 20 leave a0", "swap to c"),
        (f"{GAVE_UP}, 18 ask b2, 19 leave b2, 30 ask b3, 31 leave a0", "swap to b"),
        (f"{BUSY}, 1 ask b1 b2, 5 ask c1, 10 leave b1, 30 ask b3, 31 leave a0", "swap to b"),
        # For 60 s at most.
        (f"{BOTH_ASK}, 401 leave b1, 461 ask b2, 462 leave a0", "swap to b"),
        (f"{BOTH_ASK}, 401 leave b1, 462 ask b2, 462 leave a0", "swap to c"),
        # Until it is loaded.
        (f"{LOADED}, 13 ask c1, 14 ask b2", "swap to c"),
        (f"{LOADED}, 13 ask c1, 99 ask b2", "swap to c"),
    ],
)
def test_a_wait_outlives_the_waiter(events: str, outcome: str) -> None:
    assert tell(events, turn=1000)[0] == outcome


# Tickets of b queue behind each other for 5 of the 8 s of its turn in which a waits; so b, which is
# unloaded at 8, lets others' turns last until 8 + 8 x 5.
QUEUES = "0 load b and ask b0 b1 a0, 5 leave b0"
QUEUED = f"{QUEUES}, 8 leave b1 and load a"
C_LEAVES = f"{QUEUES}, 7 ask c1, 8 leave b1 and load a, 9 ask b2, 10 leave c1"
ALONE = "0 load b and ask b0 b1, 5 leave b0, 7 ask a0, 8 leave b1 and load a"
SHORTER = f"{QUEUES}, 6 ask b2, 7 leave b1, 8 leave b2 and load a"
LEFT_BEHIND = "0 load b and ask b0 b1 b2, 5 leave b0, 7 ask a0, 8 leave b1 and load a"
BEFORE = "0 ask b0, 20 load b, 21 ask a0, 28 leave b0 and load a"
AGENT = "0 load b and ask b0 a0, 5 leave b0, 6 ask b1, 8 leave b1 and load a"
EARLIER = f"{QUEUES}, 8 leave b1 and load b and ask b2, 16 leave b2 and load a"


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        # Turns of 10 s: that of a ends at 19, and at 48 for what came before.
        (f"{QUEUED}, 9 ask b2, 18 ask a1, 47 leave a0", "grant a1"),
        (f"{QUEUED}, 9 ask b2, 18 ask a1, 48 leave a0", "swap to b"),
        (f"{QUEUED}, 9 ask b2, 19 ask a1, 20 leave a0", "swap to b"),
        (f"{QUEUED}, 9 ask b2, 19 leave a0", "swap to b"),
        (f"{C_LEAVES}, 18 ask a1, 47 leave a0", "grant a1"),
        (f"{SHORTER}, 9 ask b3, 18 ask a1, 47 leave a0", "grant a1"),
        # c has no queue of its own.
        (f"{QUEUED}, 9 ask b2, 10 ask c1, 18 ask a1, 19 leave a0", "swap to b"),
        # b's patience is spent: a turn of 10 s it is.
        (f"{QUEUED}, 45 ask b2, 50 ask a1, 54 leave a0", "grant a1"),
        (f"{QUEUED}, 45 ask b2, 50 ask a1, 55 leave a0", "swap to b"),
        # While nobody else waits queues do not count, nor those of an earlier turn, nor does the
        # time before a load.
        (f"{ALONE}, 9 ask b2, 18 ask a1, 18 leave a0", "grant a1"),
        (f"{ALONE}, 9 ask b2, 18 ask a1, 19 leave a0", "swap to b"),
        (f"{LEFT_BEHIND}, 17 ask a1, 18 leave a0", "swap to b"),
        (f"{BEFORE}, 29 ask b1, 38 ask a1, 39 leave a0", "swap to b"),
        (f"{EARLIER}, 17 ask b3, 26 ask a1, 27 leave a0", "swap to b"),
        # One client alone never queues behind itself.
        (f"{AGENT}, 9 ask b2, 18 ask a1, 19 leave a0", "swap to b"),
    ],
)
def test_a_turn_grows_while_all_who_wait_have_queues_of_their_own(
    events: str, outcome: str
) -> None:
    assert tell(events, turn=10)[0] == outcome


def test_round_trips_come_on_top_of_a_turn_that_grows() -> None:
    queue = f"{QUEUES}, 8 leave b1 and load a 3"  # ends at 9 + 2 x 3 + (48 - 9)
    assert tell(f"{queue}, 9 ask b2, 18 ask a1, 53 leave a0", turn=10)[0] == "grant a1"
    assert tell(f"{queue}, 9 ask b2, 18 ask a1, 54 leave a0", turn=10)[0] == "swap to b"


MEASURED = "0 load b 9, 0 load a 9"
SHORT_GAP = f"{MEASURED}, 2 ask a1, 3 leave a1"
CHEAP = "0 load b 0.5, 0 load a 0.5, 2 ask a1, 3 leave a1, 4 load c"


@pytest.mark.parametrize(
    ("events", "linger", "outcome"),
    [
        (f"{SHORT_GAP}, 4 ask b1", 5, "wait until 8"),
        (f"{SHORT_GAP}, 4 ask b1, 8 tick", 5, "swap to b"),
        (f"{SHORT_GAP}, 4 ask b1, 7 ask a2", 5, "grant a2"),
        (f"{SHORT_GAP}, 4 ask b1, 5 tick", 0, "swap to b"),
        (f"{MEASURED}, 5 ask a1, 6 leave a1, 7 ask b1", 5, "wait until 11"),
        # The shorter one of the last two gaps counts.
        (f"{SHORT_GAP}, 9 ask a2, 10 leave a2, 11 ask b1", 5, "wait until 15"),
        (
            f"{SHORT_GAP}, 9 ask a2, 10 leave a2, 16 ask a3, 17 leave a3, 18 ask b1, 19 tick",
            5,
            "swap to b",
        ),
        # One that comes back after its turn ends no gap.
        (
            f"{MEASURED}, 9 ask a1, 10 leave a1, 11 ask a1, 12 leave a1, 13 ask b1, 14 tick",
            5,
            "swap to b",
        ),
        # A gap begins when nothing is in flight, and a turn that is given back twice begins none.
        (f"{MEASURED}, 2 ask a1 a2, 3 leave a1, 6 leave a2, 7 ask b1", 5, "wait until 11"),
        (f"{SHORT_GAP}, 4 leave a1, 5 ask b1", 5, "wait until 8"),
        # No longer than a round trip from when b was asked for: 4 + 2.
        ("0 load b 1, 0 load a 1, 2 ask a1, 3 leave a1, 4 ask b1", 5, "wait until 6"),
        # Or from when a was loaded, if that was later: 7 + 1.
        (f"{CHEAP}, 5 ask b1, 7 load a and ask a2, 7.5 leave a2", 5, "wait until 8"),
        # Not while requests of a lower tier wait.
        (f"{MEASURED}, 2 ask a1 a2 and ask a3 flex, 4 ask b1, 5 leave a1 a2", 5, "swap to b"),
    ],
)
def test_a_model_with_short_gaps_is_worth_lingering_for(
    events: str, linger: float, outcome: str
) -> None:
    assert tell(events, linger=linger, slots=2)[0] == outcome


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        (f"{MEASURED}, 20 ask b1", "wait until 20.5"),
        (f"{MEASURED}, 20 ask b1, 20.5 tick", "swap to b"),
        (f"{MEASURED}, 20 ask b1, 20.2 ask a1", "grant a1"),
        (f"{MEASURED}, 20 ask b1, 20.2 ask b2", "wait until 20.5"),
        (f"{SHORT_GAP}, 20 ask b1", "wait until 20.5"),
        ("0 load b 1, 0 load a 1, 20 ask b1", "wait until 20.1"),  # 5 % of a trip
        ("0 load a, 20 ask b1", "swap to b"),  # nothing is measured
    ],
)
def test_a_helpers_request_does_not_swap_the_main_model_away(events: str, outcome: str) -> None:
    assert tell(events)[0] == outcome


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        (f"{BUSY}, 1 ask b1 priority", "swap to b"),
        (f"{MEASURED}, 20 ask b1 priority", "swap to b"),
        (f"{BUSY}, 1 ask b1 priority, 2 ask a1 priority", "grant a1"),
        (f"{BUSY}, 1 ask b1, 2 ask a1 priority", "grant a1"),
        (f"{BUSY}, 0 ask a1, 1 ask a2, 2 ask a3 priority, 3 leave a0", "grant a3"),
        (f"{BUSY}, 1 ask b1, 2 ask a1 flex", "wait"),
        (f"{BUSY}, 1 ask b1 flex, 99 ask a1", "grant a1"),
        (f"{BUSY}, 1 ask b1 flex, 2 ask a1 flex", "grant a1"),
    ],
)
def test_priority_ends_a_turn_and_flex_waits_for_everybody(events: str, outcome: str) -> None:
    assert tell(events, slots=2)[0] == outcome


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ("0 load a, 1 ask d1", "swap to s"),
        ("0 ask c1 d1, 2 load s", "grant c1 d1"),
        # Slots belong to each model, and one that is busy does not hold up the other.
        ("0 load s and ask c1 c2, 1 ask a1, 2 ask d1", "grant d1"),
        # The turn belongs to both, and so does its cost: 60 + 2 x (10 + 20).
        ("0 load s and ask c1, 1 ask a1, 60 ask d1", "grant d1"),
        ("0 load s and ask c1, 1 ask a1, 61 ask d1", "swap to a"),
        ("0 load a 10, 0 load s 20 and ask c1, 1 ask a1, 120 ask d1", "grant d1"),
        ("0 load s 10, 0 load a 20 and ask a0, 1 ask d1 a1, 120 leave a0", "grant a1"),
        # They wait, pause and are idle together.
        ("0 load a and ask a0, 1 ask c1, 2 ask b1, 3 ask d1, 4 leave c1, 5 leave a0", "swap to s"),
        ("0 load a 9, 0 load s 9, 2 ask c1 d1, 3 leave d1, 6 leave c1, 7 ask a1", "wait until 11"),
        # A reload of models.json moves b, while it waits.
        ("0 load a and ask a0, 1 ask b1, 2 move b s, 3 leave a0", "swap to s"),
    ],
)
def test_a_set_is_loaded_and_waits_as_one(events: str, outcome: str) -> None:
    assert tell(events, sets={"c": "s", "d": "s"})[0] == outcome


@pytest.mark.parametrize(
    ("events", "since"),
    [
        (f"{BUSY}, 1 ask b1, 60 tick", None),
        (f"{BUSY}, 1 ask b1, 61 tick, 65 tick", 61),
        (f"{BUSY}, 1 ask b1, 61 tick, 65 leave b1", None),
        (f"{BUSY}, 1 ask b1, 61 tick, 65 leave b1, 66 ask b2 priority", 66),
        # Where nothing is loaded there is nothing to drain; and a load ends what was due.
        ("0 ask a1, 5 tick", 5),
        ("0 ask b1 priority, 3 tick, 5 load a", 5),
    ],
)
def test_a_drain_counts_from_when_admission_stopped(events: str, since: float | None) -> None:
    assert tell(events)[1].draining_since == since


def test_what_is_not_loaded_can_be_unloaded() -> None:
    assert tell("0 ask a1, 1 unload")[1].waiting_since == {"a": 0}


def test_who_waits_is_counted_by_set() -> None:
    events = "0 ask a1 and ask a2 flex and ask c1 d1, 1 leave a1"
    _, schedule = tell(events, sets={"c": "s", "d": "s"})
    names = (None, "s", "a", "b")
    assert [len(list(schedule.waiting(name))) for name in names] == [3, 2, 1, 0]
    assert [ticket.model for ticket in schedule.waiting("s")] == ["c", "d"]


def test_what_is_idle_is_known_from_when_nothing_of_it_waits_or_runs() -> None:
    assert tell("0 load a and ask a1, 3 leave a1, 4 tick")[1].idle_since == {"a": 3}
    assert tell("0 load a and ask a1 a2, 3 leave a1")[1].idle_since == {}
    assert tell("0 ask a1, 5 leave a1, 9 load a")[1].idle_since == {"a": 5}


class Group:
    """A worker and its clients in virtual time, that check at each event what must hold."""

    def __init__(self, turn: float, linger: float, slots: int, load: float, sets: dict[str, str]):
        self.schedule = schedule_of(turn, linger, slots, sets)
        self.load = load
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.waiting: set[jano.Ticket] = set()
        self.services: dict[jano.Ticket, float] = {}
        self.shares_of_bound = [0.0]  # each wait of a set, as a share of the longest promised
        self.now = 0.0
        self.swapping = False

    def ask(self, model: str, when: float, service: float, patience: float, tier: int) -> None:
        ticket = jano.Ticket(model, when, tier)
        self.services[ticket] = service
        self.at(when, lambda: self.arrive(ticket))
        if patience < math.inf:
            self.at(when + patience, lambda: self.give_up(ticket))

    def play(self) -> None:
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
            self.advance()
        assert not self.waiting
        assert not self.schedule.in_flight

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), event))

    def arrive(self, ticket: jano.Ticket) -> None:
        self.waiting.add(ticket)
        self.schedule.arrive(ticket, self.now)

    def give_up(self, ticket: jano.Ticket) -> None:
        if ticket in self.waiting:
            self.waiting.remove(ticket)
            self.schedule.leave(ticket, self.now)

    def advance(self) -> None:
        schedule = self.schedule
        for ticket in schedule.advance(self.now):
            assert not self.swapping
            assert schedule.set_of[ticket.model] == schedule.loaded
            self.waiting.remove(ticket)  # so that none is granted twice
            self.at(self.now + self.services[ticket], functools.partial(self.finish, ticket))
        assert set(schedule.waiting()) == self.waiting
        running = Counter(ticket.model for ticket in schedule.in_flight)
        assert all(count <= schedule.slots[model] for model, count in running.items())
        swap_to = schedule.decision.swap_to
        if swap_to is None:  # then whatever can be served is
            for ticket in schedule.heads():
                full = running[ticket.model] == schedule.slots[ticket.model]
                assert full or schedule.set_of[ticket.model] != schedule.loaded
        elif not self.swapping and not schedule.in_flight:
            assert any(schedule.waiting(swap_to))
            schedule.note_unloaded(self.now)
            self.swapping = True
            began = schedule.draining_since or self.now
            self.at(self.now + self.load, functools.partial(self.swapped, swap_to, began))
        if schedule.decision.until is not None:
            self.at(schedule.decision.until, lambda: None)

    def finish(self, ticket: jano.Ticket) -> None:
        self.schedule.leave(ticket, self.now)

    def swapped(self, name: str, began: float) -> None:
        schedule = self.schedule
        since = schedule.waiting_since.get(name, self.now)
        patience = schedule.patient_until.get(name, since) - since
        schedule.note_loaded(name, self.now, self.now - began)
        self.swapping = False
        trip = 2 * max(schedule.cost.values())
        turn = max(schedule.max_turn, patience) + 2 * trip
        others = len({schedule.set_of[model] for model in "abcd"}) - 1
        bound = others * (self.load + turn + max(self.services.values())) + self.load
        self.shares_of_bound.append((self.now - since) / bound)


SERVICES = st.sampled_from([0.5, 3, 10])
PAUSES = st.sampled_from([0, 0, 0, 0.2, 1, 7, 40])  # from one request to the next
TEMPERS = st.sampled_from([math.inf, math.inf, 1, 30])
TIERS = st.sampled_from([jano.DEFAULT, jano.DEFAULT, jano.PRIORITY, jano.FLEX])
REQUESTS = st.lists(
    st.tuples(st.sampled_from("abcd"), PAUSES, SERVICES, TEMPERS, TIERS), max_size=80
)
LOADS = st.sampled_from([0.1, 4, 20])
SETS = st.sampled_from([{}, {"c": "s", "d": "s"}])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    REQUESTS, st.sampled_from([0, 5, 60]), st.sampled_from([0, 5]), st.integers(1, 3), LOADS, SETS
)
def test_whatever_is_asked_is_served_once_within_slots_and_never_in_a_swap(
    requests: list[tuple[str, float, float, float, int]],
    turn: float,
    linger: float,
    slots: int,
    load: float,
    sets: dict[str, str],
) -> None:
    group = Group(turn, linger, slots, load, sets)
    when = 0.0
    for model, pause, service, patience, tier in requests:
        when += pause
        group.ask(model, when, service, patience, tier)
    group.play()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(REQUESTS, st.sampled_from([1, 5, 60]), st.integers(1, 3), LOADS, SETS)
def test_no_model_waits_longer_than_the_bound(
    requests: list[tuple[str, float, float, float, int]],
    turn: float,
    slots: int,
    load: float,
    sets: dict[str, str],
) -> None:
    group = Group(turn, 5, slots, load, sets)
    when = 0.0
    for model, pause, service, _, _ in requests:
        when += pause
        group.ask(model, when, service, math.inf, jano.DEFAULT)
    group.play()
    assert max(group.shares_of_bound) <= 1


# -------------------------------------------------------------------------------- worker ----


async def test_six_requests_of_two_models_cost_one_swap(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat), entry(code)]) as daemon:
        await daemon.logged("worker started", loaded="chat")
        asks = await daemon.queued("chat", "code", "chat", "chat", "code", "code")
        chat.release.set()
        assert await statuses(asks) == [200] * 6
        await daemon.logged("served", 6)
        order = [line["id"] for line in daemon.log("served")]
        assert order == ["1", "3", "4", "2", "5", "6"]
        await daemon.shows(swapsTotal=1, swapsAvoided=2)
    assert calls(tmp_path) == ["code"]


async def test_no_more_than_slots_are_in_flight_at_a_backend(
    shared_jano: Shared, chat: Backend
) -> None:
    chat.answer = chat.held
    async with shared_jano([entry(chat, slots=2)]) as daemon:
        asks = await daemon.queued("chat", "chat", "chat")
        await event(chat.arrived.get())
        await event(chat.arrived.get())
        await daemon.shows(inFlight=2, queueDepth=1)
        chat.release.set()
        assert await statuses(asks) == [200] * 3


async def test_full_queue_takes_nothing_more_but_for_passthrough_models(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    models = [entry(chat), entry(code, name="tts", passthrough=True)]
    async with running_jano(tmp_path, models, MAX_QUEUE=2) as daemon:
        asks = await daemon.queued("chat")
        await event(chat.arrived.get())
        asks += await daemon.queued("chat", "chat")
        over = await daemon.post("chat")
        assert (over.status, over.headers["Retry-After"]) == (503, "5")
        assert (await over.json())["error"]["code"] == "queue_full"
        assert (await daemon.ask("tts"))[0] == 200
        chat.release.set()
        assert await statuses(asks) == [200] * 3


async def test_priority_goes_before_all_and_flex_after_all(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat), entry(code)]) as daemon:
        asks = await daemon.queued("chat")
        await event(chat.arrived.get())
        asks += await daemon.queued("chat", "code", service_tier="flex")
        asks += await daemon.queued("code", "chat")
        asks += await daemon.queued("code", service_tier="priority")
        chat.release.set()
        assert await statuses(asks) == [200] * 6
        told = [line for line in daemon.lines if line["msg"] in ("served", "swap requested")]
        story = [line.get("id") or f"swap to {line['model']}" for line in told]
        swap_to_code, swap_to_chat = "swap to code", "swap to chat"
        assert story == ["1", swap_to_code, "6", "4", swap_to_chat, "5", "2", swap_to_code, "3"]


async def test_groups_swap_independently(tmp_path: Path, chat: Backend, code: Backend) -> None:
    models = [
        entry(chat),
        entry(code),
        entry(chat, name="eyes", group="gpu1"),
        entry(code, name="ears", group="gpu1"),
    ]
    async with running_jano(tmp_path, models, gated_script(tmp_path, "ears")) as daemon:
        slow = await daemon.queued("ears")
        await event(until(lambda: calls(tmp_path) == ["ears"]))
        assert await statuses(await daemon.queued("code")) == [200]
        (tmp_path / "go").touch()
        assert await statuses(slow) == [200]
    assert calls(tmp_path, environ=True) == [
        "ears previous=eyes group=gpu1",
        "code previous=chat",
    ]


async def test_passthrough_model_waits_for_no_swap(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat), entry(code), entry(chat, name="tts", passthrough=True)]
    async with shared_jano(models, gated_script(tmp_path)) as daemon:
        slow = await daemon.queued("code")
        await event(until(lambda: calls(tmp_path) == ["code"]))
        assert (await daemon.ask("tts"))[0] == 200
        (tmp_path / "go").touch()
        assert await statuses(slow) == [200]


@contextlib.asynccontextmanager
async def three_loops(daemon: Running, code: Backend) -> AsyncIterator[None]:
    """Three clients ask for chat without a pause, until code has a request."""

    async def loop() -> None:
        while not code.requests:
            assert (await daemon.ask("chat"))[0] == 200

    async with asyncio.TaskGroup() as loops:
        for _ in range(3):
            loops.create_task(loop())
        yield


async def test_no_stream_of_requests_starves_others(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat), entry(code)]
    async with running_jano(tmp_path, models, MAX_TURN_MS=150) as daemon, three_loops(daemon, code):
        await daemon.logged("served", 5)
        assert (await event(daemon.ask("code")))[0] == 200


async def test_client_that_gives_up_and_asks_again_keeps_its_models_place(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """It gives up after 0.2 s, a turn lasts 0.5 s: by itself no request waits long enough."""
    models = [entry(chat), entry(code)]
    tries = 0
    async with running_jano(tmp_path, models, MAX_TURN_MS=500) as daemon:
        async with three_loops(daemon, code):
            while not code.requests:
                tries += 1
                assert tries < 6, "it was never served"
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(daemon.ask("code"), 0.2)
    assert tries > 1


@pytest.mark.parametrize(("linger_ms", "swaps"), [(0, range(7, 11)), (1000, range(1, 6))])
async def test_lingering_saves_two_agents_most_of_their_swaps(
    tmp_path: Path, chat: Backend, code: Backend, linger_ms: int, swaps: range
) -> None:
    models = [entry(chat), entry(code)]
    script = swap_script(tmp_path, "sleep 0.05")
    async with running_jano(tmp_path, models, script, LINGER_MS=linger_ms) as daemon:

        async def agent(model: str) -> None:
            for _ in range(5):
                assert (await daemon.ask(model))[0] == 200
                await asyncio.sleep(0.005)  # it thinks

        await asyncio.gather(agent("chat"), agent("code"))
    assert len(calls(tmp_path)) in swaps


async def test_drain_that_is_called_off_is_no_cost_of_the_next_swap(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """If the drain of 0.3 s seemed to be part of a swap, a turn would last twice as long."""
    chat.answer, code.answer = chat.held, code.held
    async with running_jano(tmp_path, [entry(chat), entry(code)], MAX_TURN_MS=1) as daemon:
        asks = await daemon.queued("chat")
        await event(chat.arrived.get())
        [waiting] = await daemon.queued("code")
        asks += await daemon.queued("chat")  # the turn is over: it is not admitted
        waiting.cancel()
        await daemon.logged("client disconnected")
        await asyncio.sleep(0.3)
        chat.release.set()
        asks += await daemon.queued("code", "code", "chat")
        await event(code.arrived.get())
        await asyncio.sleep(0.3)
        code.release.set()
        await statuses(asks)
    assert calls(tmp_path) == ["code", "chat", "code"]  # chat came before the second code


async def test_name_that_the_locale_cannot_spell_fails_alone(tmp_path: Path, chat: Backend) -> None:
    models = [entry(chat), entry(chat, name="모델")]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    settings: dict[str, Any] = ascii_only
    async with running_jano(tmp_path, models, **settings) as daemon:
        assert (await daemon.ask("모델"))[0] == 503
        assert (await daemon.ask("chat"))[0] == 200


# Sets: models of a group that are loaded together


async def test_models_of_a_set_are_loaded_by_one_call_and_served_at_once(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """Each has slots of its own, and the other model of the group excludes both."""
    chat.answer, code.answer = chat.held, code.held
    models = [entry(chat, set="pair"), entry(code, set="pair"), entry(chat, name="big")]
    script = swap_script(tmp_path, status='echo "big: loaded"')
    async with shared_jano(models, script) as daemon:
        asks = await daemon.queued("chat", "code")
        await event(chat.arrived.get())
        await event(code.arrived.get())
        await daemon.shows(inFlight=2, currentModel="pair", loadedModels=["chat", "code"])
        chat.release.set()
        code.release.set()
        assert await statuses(asks) == [200, 200]
        assert (await daemon.ask("big"))[0] == 200
        await daemon.shows(currentModel="big", loadedModels=["big"])
    assert calls(tmp_path, environ=True) == ["pair previous=big", "big previous=pair"]


async def test_models_list_shows_each_member_of_the_loaded_set_as_loaded(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat, set="pair"), entry(code, set="pair"), entry(chat, name="big")]
    script = swap_script(tmp_path, status='echo "big: loaded"')
    async with shared_jano(models, script) as daemon:
        assert (await daemon.ask("code"))[0] == 200
        listed = (await daemon.get("/v1/models"))["data"]
    states = {model["id"]: model["status"]["value"] for model in listed}
    assert states == {"chat": "loaded", "code": "loaded", "big": "unloaded"}


async def test_set_is_ready_when_all_its_members_are(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    code.ready = False
    models = [entry(chat, set="pair"), entry(code, set="pair"), entry(chat, name="big")]
    script = swap_script(tmp_path, status='echo "big: loaded"')
    async with shared_jano(models, script) as daemon:
        asks = await daemon.queued("chat")
        await event(until(lambda: calls(tmp_path) == ["pair"]))
        await asyncio.sleep(0.15)  # nothing may happen, so there is nothing to wait for
        assert not chat.requests
        code.ready = True
        assert await statuses(asks) == [200]


async def test_set_of_which_status_names_all_is_found_loaded_at_the_start(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat, name="big"), entry(chat, set="pair"), entry(code, set="pair")]
    script = swap_script(tmp_path, status='echo "chat: loaded"; echo "code: loaded"')
    async with shared_jano(models, script) as daemon:
        asks = await daemon.queued("chat", "code")
        assert await statuses(asks) == [200, 200]
    assert calls(tmp_path) == []


def set_script(folder: Path, sets: dict[str, dict[str, str]]) -> Path:
    """A swap script for sets of real processes: set -> member -> its server's command.

    It stops what is of no use any more and starts what does not run; so it heals, too.
    """
    starts = ""
    for name, members in sets.items():
        lines = [f"run {member} {command}" for member, command in members.items()]
        keep = " ".join(members)
        starts += "\n".join([f'{name}) keep="{keep}"; stop_others', *lines, ";;", ""])
    everybody = " ".join(member for members in sets.values() for member in members)
    body = f"""
cd "{folder}" || exit 1
runs() {{
  [ -e "$1.pid" ] || return 1
  case $(ps -o stat= -p "$(cat "$1.pid")") in ''|Z*) false;; esac
}}
stop_others() {{
  for member in {everybody}; do
    case " $keep " in *" $member "*) continue;; esac
    if runs "$member"; then kill -KILL "$(cat "$member.pid")"; fi
  done
}}
run() {{
  member=$1; shift
  runs "$member" && return
  "$@" >"$member.log" 2>&1 &
  echo $! >"$member.pid"
}}
case $1 in
unload) keep=""; stop_others;;
{starts}
*) echo "no set $1" >&2; exit 1;;
esac"""
    return swap_script(folder, body)


@contextlib.asynccontextmanager
async def two_small_models_and_a_big_one(
    folder: Path,
) -> AsyncIterator[tuple[Running, dict[str, int]]]:
    """Real processes: left and right are loaded together as "small", "big" excludes both."""
    ports = {name: free_port() for name in ("left", "right", "big")}
    run = {name: toy_server(folder, name, port) for name, port in ports.items()}
    sets = {"small": {name: run[name] for name in ("left", "right")}, "big": {"big": run["big"]}}
    script = set_script(folder, sets)
    models = [{"name": name, "url": f"http://127.0.0.1:{port}"} for name, port in ports.items()]
    for model in models[:2]:
        model["set"] = "small"
    try:
        async with running_jano(folder, models, script) as daemon:
            yield daemon, ports
    finally:
        unload = await asyncio.create_subprocess_exec(str(script), "unload")
        await event(unload.wait())


async def test_two_small_servers_run_together_and_make_room_for_a_big_one(tmp_path: Path) -> None:
    async with two_small_models_and_a_big_one(tmp_path) as (daemon, _):
        for model in ("left", "right", "big", "right", "left"):
            status, answer = await daemon.ask(model)
            assert (status, answer["answered_by"]) == (200, model)
    assert calls(tmp_path)[:3] == ["small", "big", "small"]


async def test_crashed_member_of_a_set_heals_and_the_other_one_stays(tmp_path: Path) -> None:
    async with two_small_models_and_a_big_one(tmp_path) as (daemon, ports):
        before = {model: (await daemon.ask(model))[1]["pid"] for model in ("left", "right")}
        os.kill(before["right"], signal.SIGKILL)
        await event(until(lambda: refuses(ports["right"])))
        status, answer = await daemon.ask("right")
        assert (status, answer["answered_by"]) == (200, "right")
        assert answer["pid"] != before["right"]
        assert (await daemon.ask("left"))[1]["pid"] == before["left"]
    assert calls(tmp_path)[:2] == ["small", "small"]


async def test_model_that_a_reload_takes_out_of_the_loaded_set_needs_a_swap_of_its_own(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat, set="pair"), entry(code, set="pair")]
    async with shared_jano(models) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
        so_far = len(calls(tmp_path))
        await daemon.reload([entry(chat, set="pair"), entry(code)])
        assert (await daemon.ask("chat"))[0] == 200
        assert calls(tmp_path)[so_far:] == []  # it is loaded still
        assert (await daemon.ask("code"))[0] == 200
        assert calls(tmp_path)[so_far:] == ["code"]


async def test_model_that_a_reload_puts_into_the_loaded_set_is_served(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """The script was told to load the set before the model was in it."""
    await code.stop()

    async def start_code() -> None:
        await event(until(lambda: calls(tmp_path)[-1:] == ["pair"]))
        await code.start(code.port)

    models = [entry(chat, set="pair"), entry(code)]
    script = swap_script(tmp_path, status='echo "chat: loaded"')
    async with shared_jano(models, script) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
        await daemon.reload([entry(chat, set="pair"), entry(code, set="pair")])
        starting = daemon.background(start_code())
        assert (await event(daemon.ask("code")))[0] == 200
        await starting


async def test_model_that_a_reload_removes_holds_up_its_set_no_longer(
    shared_jano: Shared, chat: Backend, code: Backend
) -> None:
    gone = {"name": "gone", "url": "http://127.0.0.1:1", "set": "pair"}
    async with shared_jano([entry(chat), entry(code, set="pair"), gone]) as daemon:
        await daemon.reload([entry(chat), entry(code, set="pair")])
        assert (await daemon.ask("code"))[0] == 200


async def test_set_may_get_another_name_while_it_loads(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    async with shared_jano([entry(chat), entry(code)], gated_script(tmp_path)) as daemon:
        [client] = await daemon.queued("code")
        await event(until(lambda: calls(tmp_path) == ["code"]))
        client.cancel()
        await daemon.logged("client disconnected")
        await daemon.reload([entry(chat), entry(code, set="pair")])
        (tmp_path / "go").touch()
        await daemon.logged("swap ready")
        assert (await daemon.ask("code"))[0] == 200
        assert (await daemon.ask("chat"))[0] == 200
    assert calls(tmp_path) == ["code", "pair", "chat"]


# Loading and unloading on demand


async def post_path(daemon: Running, path: str) -> tuple[int, Any]:
    """POST without a body: the answer's status and JSON."""
    async with daemon.session.post(daemon.url + path) as answer:
        return answer.status, await answer.json(content_type=None)


async def test_load_answers_once_the_model_is_there_and_asks_its_backend_nothing(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    async with shared_jano([entry(chat), entry(code)], gated_script(tmp_path)) as daemon:
        load = daemon.background(post_path(daemon, "/load?model=code"))
        await event(until(lambda: calls(tmp_path) == ["code"]))
        await daemon.shows(swapping="code")
        assert not load.done()
        (tmp_path / "go").touch()
        assert (await event(load))[0] == 200
        await daemon.shows(currentModel="code", swapping=None, inFlight=0, queueDepth=0)
        assert not code.requests


async def test_load_waits_for_its_turn_in_the_queue(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    async with shared_jano([entry(chat), entry(code)]) as daemon:
        asks = await daemon.queued("chat")
        await event(chat.arrived.get())
        load = daemon.background(post_path(daemon, "/load?model=code"))
        await asyncio.sleep(0.15)  # nothing may happen, so there is nothing to wait for
        asks += await daemon.queued("chat")
        assert calls(tmp_path) == []
        chat.release.set()
        assert await statuses(asks) == [200, 200]
        assert (await event(load))[0] == 200
    assert calls(tmp_path) == ["code"]


@pytest.fixture(scope="module")
async def on_demand(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """A jano with chat (alias fast) loaded, and bad, whose swaps fail."""
    folder = tmp_path_factory.mktemp("on demand")
    script = swap_script(folder, '[ "$1" != bad ]', status='echo "chat: loaded"')
    async with running_backend("chat") as chat:
        models = [entry(chat, aliases=["fast"]), entry(chat, name="bad", group="bad")]
        async with running_jano(folder, models, script) as daemon:
            await daemon.logged("worker started", loaded="chat")
            yield daemon


async def test_load_of_what_is_loaded_runs_no_script(on_demand: Running) -> None:
    assert (await post_path(on_demand, "/load?model=fast"))[0] == 200
    assert "chat" not in calls(on_demand.folder)


async def test_no_more_loads_may_wait_than_requests(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models, script = [entry(chat), entry(code)], gated_script(tmp_path)
    async with running_jano(tmp_path, models, script, MAX_QUEUE=3) as daemon:
        loads = [daemon.background(post_path(daemon, "/load?model=code")) for _ in range(5)]
        done, _ = await event(asyncio.wait(loads, return_when=asyncio.FIRST_COMPLETED))
        assert {load.result()[1]["error"]["code"] for load in done} == {"queue_full"}
        (tmp_path / "go").touch()
        answers = [status for status, _ in await event(asyncio.gather(*loads))]
    assert sorted(answers) == [200, 200, 200, 503, 503]


async def test_load_of_an_unknown_model_is_refused(on_demand: Running) -> None:
    status, answer = await post_path(on_demand, "/load?model=no")
    assert (status, answer["error"]["code"]) == (400, "model_not_found")


async def test_load_that_fails_says_why(on_demand: Running) -> None:
    status, answer = await post_path(on_demand, "/load?model=bad")
    assert (status, answer["error"]["code"]) == (503, "swap_failed")
    assert "script exited with code 1" in answer["error"]["message"]


async def unload_during_a_request(
    daemon: Running, chat: Backend
) -> tuple[asyncio.Task[Any], asyncio.Task[Any]]:
    """Ask to unload while chat holds back its answer to a request; the tasks of both."""
    [running] = await daemon.queued("chat")
    await event(chat.arrived.get())
    unload = daemon.background(post_path(daemon, "/unload"))
    await asyncio.sleep(0.15)  # nothing may happen, so there is nothing to wait for
    return running, unload


async def test_unload_lets_what_runs_finish_and_then_frees_the_memory(
    tmp_path: Path, chat: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        running, unload = await unload_during_a_request(daemon, chat)
        assert calls(tmp_path) == []
        chat.release.set()
        assert (await event(unload))[0] == 200
        assert await statuses([running]) == [200]
        assert calls(tmp_path, environ=True) == ["unload previous=chat"]
        await daemon.shows(currentModel=None, loadedModels=[], backendHealth={"chat": "unknown"})


async def test_request_that_comes_during_an_unload_is_served_after_it(
    tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)], gated_script(tmp_path, "unload")) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
        so_far = len(calls(tmp_path))
        unload = daemon.background(post_path(daemon, "/unload"))
        await event(until(lambda: calls(tmp_path)[so_far:] == ["unload"]))
        asks = await daemon.queued("chat")
        (tmp_path / "go").touch()
        assert (await event(unload))[0] == 200
        assert await statuses(asks) == [200]
        assert calls(tmp_path)[so_far:] == ["unload", "chat"]


async def test_request_that_comes_while_an_unload_drains_is_served_after_it(
    tmp_path: Path, chat: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat, slots=2)]) as daemon:
        running, unload = await unload_during_a_request(daemon, chat)
        waiting = await daemon.queued("chat")
        chat.release.set()
        assert (await event(unload))[0] == 200
        assert await statuses([running, *waiting]) == [200, 200]
        assert calls(tmp_path) == ["unload", "chat"]


async def test_unload_frees_every_group(tmp_path: Path, chat: Backend, code: Backend) -> None:
    models = [entry(chat), entry(code, group="gpu1")]
    async with running_jano(tmp_path, models) as daemon:
        assert await statuses(await daemon.queued("chat", "code")) == [200, 200]
        assert (await post_path(daemon, "/unload"))[0] == 200
    unloads = [call for call in calls(tmp_path, environ=True) if call.startswith("unload")]
    assert sorted(unloads) == ["unload previous=chat", "unload previous=code group=gpu1"]


async def test_unloads_that_wait_for_another_one_run_no_script(
    tmp_path: Path, chat: Backend
) -> None:
    """Their clients may long have left."""
    async with running_jano(tmp_path, [entry(chat)], gated_script(tmp_path, "unload")) as daemon:
        first = daemon.background(post_path(daemon, "/unload"))
        await event(until(lambda: calls(tmp_path) == ["unload"]))
        others = [daemon.background(post_path(daemon, "/unload")) for _ in range(3)]
        await asyncio.sleep(0.15)  # nothing may happen, so there is nothing to wait for
        (tmp_path / "go").touch()
        assert await event(first) == (200, {"unloaded": ["chat"]})
        assert await event(asyncio.gather(*others)) == [(200, {"unloaded": []})] * 3
    assert calls(tmp_path) == ["unload"]


async def test_unload_that_fails_says_so(tmp_path: Path, chat: Backend) -> None:
    script = swap_script(tmp_path, '[ "$1" != unload ]')
    async with running_jano(tmp_path, [entry(chat)], script) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
        assert (await post_path(daemon, "/unload"))[0] >= 500
        await daemon.logged("unload failed", code=1)
        assert (await daemon.ask("chat"))[0] == 200


async def test_unload_that_fails_after_its_client_has_left_is_no_bug(
    tmp_path: Path, chat: Backend
) -> None:
    script = gated_script(tmp_path, "unload", then="exit 1")
    async with running_jano(tmp_path, [entry(chat)], script) as daemon:
        unload = daemon.background(post_path(daemon, "/unload"))
        await event(until(lambda: calls(tmp_path) == ["unload"]))
        unload.cancel()
        (tmp_path / "go").touch()
        await daemon.logged("unload failed")
        assert (await daemon.ask("chat"))[0] == 200


async def test_unload_waits_until_it_is_known_what_is_loaded(tmp_path: Path, chat: Backend) -> None:
    script = gated_script(tmp_path, "status", then='echo "chat: loaded"')
    async with running_jano(tmp_path, [entry(chat)], script) as daemon:
        unload = daemon.background(post_path(daemon, "/unload"))
        await asyncio.sleep(0.15)  # nothing may happen, so there is nothing to wait for
        assert calls(tmp_path) == []
        (tmp_path / "go").touch()
        assert await event(unload) == (200, {"unloaded": ["chat"]})


async def test_script_never_runs_twice_at_once(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """Swaps, unloading on demand and unloading when idle all want it, again and again."""
    busy = tmp_path / "busy"
    script = swap_script(
        tmp_path,
        f'mkdir "{busy}" || echo "$1" >>"{tmp_path}/overlaps"; sleep 0.03; rmdir "{busy}"',
    )
    models = [entry(chat), entry(code)]
    settings: dict[str, Any] = {"IDLE_UNLOAD_MS": 1, "MAX_TURN_MS": 1, "LINGER_MS": 0}
    async with running_jano(tmp_path, models, script, **settings) as daemon:

        async def asks(model: str) -> None:
            for _ in range(4):
                assert (await daemon.ask(model))[0] == 200

        async def unloads() -> None:
            for _ in range(4):
                assert (await post_path(daemon, "/unload"))[0] == 200
                await asyncio.sleep(0.02)

        async def loads() -> None:
            for _ in range(4):
                assert (await post_path(daemon, "/load?model=code"))[0] == 200

        await event(asyncio.gather(asks("chat"), asks("code"), unloads(), unloads(), loads()))
    assert not (tmp_path / "overlaps").exists()
    assert {"chat", "code", "unload"} <= set(calls(tmp_path))


# Unloading when idle


async def test_idle_model_is_unloaded_once(tmp_path: Path, chat: Backend, code: Backend) -> None:
    models = [entry(chat), entry(code)]
    async with running_jano(tmp_path, models, IDLE_UNLOAD_MS=100) as daemon:
        await event(until(lambda: calls(tmp_path) == ["unload"]))  # idle since the start
        await asyncio.sleep(0.15)  # nothing may happen, so there is nothing to wait for
        assert (await daemon.ask("code"))[0] == 200
        await event(until(lambda: len(calls(tmp_path)) == 3))
    assert calls(tmp_path, environ=True) == [
        "unload previous=chat",
        "code previous=",
        "unload previous=code",
    ]


async def test_idle_model_is_unloaded_though_a_reload_has_renamed_its_set(
    tmp_path: Path, chat: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)], IDLE_UNLOAD_MS=100) as daemon:
        asks = await daemon.queued("chat")
        await event(chat.arrived.get())
        await daemon.reload([entry(chat, set="pair")])
        chat.release.set()
        assert await statuses(asks) == [200]
        so_far = len(calls(tmp_path))
        await event(until(lambda: calls(tmp_path)[so_far:] == ["unload"]))


@pytest.mark.parametrize(
    ("body", "fault"),
    [("exit 3", "exited with code 3"), ("exec sleep 60", "runs on after 0.3 s")],
)
async def test_unload_that_fails_or_hangs_costs_no_request(
    tmp_path: Path, chat: Backend, body: str, fault: str
) -> None:
    script = swap_script(tmp_path, f'if [ "$1" = unload ]; then {body}; fi')
    settings: dict[str, Any] = {"IDLE_UNLOAD_MS": 100, "SWAP_WAIT_TIMEOUT_MS": 300}
    async with running_jano(tmp_path, [entry(chat)], script, **settings) as daemon:
        await event(until(lambda: calls(tmp_path) == ["unload"]))
        asks = await daemon.queued("chat")
        assert await statuses(asks) == [200]
        await daemon.logged("unload failed", err=f"the script {fault}")
    assert calls(tmp_path)[:2] == ["unload", "chat"]


# ---------------------------------------------------------------------------------- swap ----

ODD_NAME = """it's "$(touch oops)"; `touch oops` *"""


@pytest.fixture(scope="module")
async def script_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a script saw and did whose model has an odd name and whose jano has a key.

    It prints 50 MB and leaves a child that holds its output; the swap must succeed all the same.
    """
    folder = tmp_path_factory.mktemp("script run")
    script = swap_script(
        folder,
        f"""
        cd "{folder}"
        echo $# >count; printf %s "$1" >argument; env >environ
        {sys.executable} -c "import os; print(os.getsid(0) == os.getppid())" >leads_session
        ls -l /proc/$$/fd/1 /proc/$$/fd/2 >outputs; ls -l /proc/$$/fd/0 >input
        head -c 50000000 /dev/zero; head -c 100000 /dev/urandom | tee /dev/stderr
        sleep 60 & echo $! >child""",
        "my swap.sh",
        status='echo "chat: loaded"',
    )
    async with running_backend("chat") as chat:
        models = [entry(chat, group="gpu 1"), entry(chat, name=ODD_NAME, group="gpu 1")]
        async with running_jano(folder, models, script, JANO_API_KEY="hush-hush") as daemon:
            daemon.session.headers["x-api-key"] = "hush-hush"
            assert (await event(daemon.ask(ODD_NAME)))[0] == 200
    os.kill(int((folder / "child").read_text()), signal.SIGKILL)
    return {file.name: file.read_text() for file in folder.iterdir()}


async def test_script_gets_the_model_as_its_one_argument(script_run: dict[str, str]) -> None:
    assert (script_run["count"], script_run["argument"]) == ("1\n", ODD_NAME)


async def test_script_runs_without_a_shell(script_run: dict[str, str]) -> None:
    assert "oops" not in script_run


async def test_script_learns_previous_model_and_group(script_run: dict[str, str]) -> None:
    environ = script_run["environ"].splitlines()
    assert {"JANO_PREVIOUS_MODEL=chat", "JANO_GROUP=gpu 1"} <= set(environ)


async def test_script_is_told_to_restart_nothing_without_a_reason(
    script_run: dict[str, str],
) -> None:
    assert "JANO_RESTART=1" not in script_run["environ"].splitlines()


async def test_script_does_not_learn_the_key(script_run: dict[str, str]) -> None:
    assert "hush-hush" not in script_run["environ"]


async def test_script_leads_a_session_of_its_own(script_run: dict[str, str]) -> None:
    assert script_run["leads_session"] == "True\n"


@linux_only
async def test_script_writes_into_a_named_file_and_reads_nothing(
    script_run: dict[str, str],
) -> None:
    """A pipe would block a server that inherits it, and a deleted file would grow unseen."""
    targets = [line.partition(" -> ")[2] for line in script_run["outputs"].splitlines()]
    for target in targets:
        assert target.startswith(tempfile.gettempdir())
        assert not target.endswith("(deleted)")
    assert script_run["input"].endswith("-> /dev/null\n")


@linux_only
async def test_files_of_scripts_do_not_pile_up(tmp_path: Path, chat: Backend) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    models = [entry(chat), entry(chat, name="other")]
    async with running_jano(tmp_path, models, TMPDIR=folder) as daemon:
        counts = []
        for model in ("chat", "other") * 4:
            assert (await daemon.ask(model))[0] == 200
            counts.append(len([*folder.iterdir()]))
    assert counts[-1] <= counts[1]


# How a swap succeeds or fails. Each model has a group of its own, so all are swapped at once.

SWAPS = [  # a model; what its script does; how its backend's health path answers
    ("fails", "echo /home/me >&2; exit 3", 503),
    ("killed", "kill -9 $$", 503),
    ("hangs", "sleep 60", 503),
    ("deaf", "trap '' TERM; sleep 60; sleep 60", 503),
    ("deaf-child", "(trap '' TERM; sleep 60; sleep 60) & wait", 503),
    ("loading", "", 503),
    ("guarded", "", 401),
    ("broken", "", 500),
    ("redirects", "", 302),
    ("silent", "", "never"),
    ("refuses", "", "refused"),
    ("lost", "", "404, then 401"),  # so /v1/models is asked
    ("works", "", "404, then 200 at last"),
]


@dataclass
class Swaps:
    answers: dict[str, aiohttp.ClientResponse]  # by model
    faults: dict[str, dict[str, Any]]  # the log's `swap failed` lines, by model
    held_pipe: str  # the models whose script had its processes ended


async def answer_health(request: web.Request, looks: Counter[str], forever: asyncio.Event) -> int:
    """The status for GET /MODEL/health or /MODEL/v1/models, as SWAPS says."""
    _, model, route = request.path.split("/", 2)
    looks[request.path] += 1
    behaviour = {name: health for name, _, health in SWAPS}[model]
    if isinstance(behaviour, int):
        return behaviour
    if behaviour == "never":
        await forever.wait()
    if route == "health":
        return 404
    if behaviour == "404, then 401":
        return 401
    return 200 if looks[request.path] > 2 else 503


async def run_swaps(folder: Path) -> Swaps:
    """Asks for all of SWAPS at once, with a deadline of 1.2 s for each swap."""
    looks = Counter[str]()
    pipe = folder / "held open by every process of a script"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    cases = "\n".join(f"{model}) {script};;" for model, script, _ in SWAPS)
    script = swap_script(folder, f'exec 9>"{pipe}"\necho "$1" >&9\ncase $1 in\n{cases}\nesac')
    settings: dict[str, Any] = {"SWAP_WAIT_TIMEOUT_MS": 1200, "HEALTH_POLL_INTERVAL_MS": 60_000}
    async with running_backend("chat") as chat:

        async def look(request: web.Request) -> web.Response:
            status = await answer_health(request, looks, chat.release)
            return web.Response(status=status, headers={"Location": "/elsewhere"})

        chat.look = look
        models = []
        for model, _, health in SWAPS:
            url = "http://127.0.0.1:1" if health == "refused" else f"{chat.url}/{model}"
            models.append({"name": model, "url": url, "group": model})
        async with running_jano(folder, models, script, **settings) as daemon:
            asks = [daemon.background(daemon.post(model)) for model, _, _ in SWAPS]
            answers = await event(asyncio.gather(*asks))
            os.set_blocking(reader, True)
            with os.fdopen(reader) as held:  # it ends when nobody is left who could write to it
                held_pipe = await event(asyncio.to_thread(held.read))
    names = [model for model, _, _ in SWAPS]
    failed = {line["model"]: line for line in daemon.log("swap failed")}
    return Swaps(dict(zip(names, answers, strict=True)), failed, held_pipe)


@dataclass
class LongLoads:
    answers: dict[str, aiohttp.ClientResponse]  # by model
    seconds: dict[str, float]  # until the answer
    faults: dict[str, dict[str, Any]]  # the log's `swap failed` lines
    noted: list[str]  # all calls of the script


async def run_long_loads(folder: Path) -> LongLoads:
    """Asks for models that take some seconds to load, each in a group of its own.

    dies: `status` names it once and then no more. plain: its script knows no status, and its
    server needs 4.5 s. slow: its health takes 3 s to answer.
    """
    status = f"""case $JANO_GROUP in
        dies) [ -e "{folder}/dies" ] && echo "dies: loaded"; rm -f "{folder}/dies";;
        slow) echo "slow: loading";;
        *) exit 1;;
    esac"""
    body = f"""case $1 in
        dies) touch "{folder}/dies"; echo "CUDA error: out of memory" >&2;;
        plain) touch "{folder}/plain";;
    esac"""
    answers: dict[str, aiohttp.ClientResponse] = {}
    seconds: dict[str, float] = {}
    async with running_backend("backend") as backend:

        async def look(request: web.Request) -> web.Response:
            if request.path.startswith("/plain"):
                begun = folder / "plain"
                if begun.exists() and time.time() - begun.stat().st_mtime > 4.5:
                    return web.Response()
            if request.path.startswith("/slow") and (folder / "calls").read_text().count("slow p"):
                await asyncio.sleep(3)
                return web.Response()
            return web.Response(status=503)

        backend.look = look
        names = ["dies", "plain", "slow"]
        models = [{"name": n, "url": f"{backend.url}/{n}", "group": n} for n in names]
        script = swap_script(folder, body, status=status)
        async with running_jano(folder, models, script) as daemon:
            await daemon.logged("worker started", len(names))

            async def ask(model: str) -> None:
                begin = time.monotonic()
                answers[model] = await daemon.post(model)
                seconds[model] = time.monotonic() - begin

            await event(asyncio.gather(*(ask(name) for name in names)))
    faults = {line["model"]: line for line in daemon.log("swap failed")}
    return LongLoads(answers, seconds, faults, (folder / "calls").read_text().splitlines())


@pytest.fixture(scope="session", autouse=True)
async def begun_slow_swaps(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Awaitable[tuple[Swaps, LongLoads]] | None:
    """They spend their time waiting: so both begin with the session, beside the other tests."""
    names = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    if not names & {"swaps", "long_loads"}:
        return None
    folders = [tmp_path_factory.mktemp(name) for name in ("swaps", "loads")]
    return asyncio.gather(run_swaps(folders[0]), run_long_loads(folders[1]))


@pytest.fixture(scope="module")
async def swaps(begun_slow_swaps: Awaitable[tuple[Swaps, LongLoads]]) -> Swaps:
    return (await begun_slow_swaps)[0]


@pytest.fixture(scope="module")
async def long_loads(begun_slow_swaps: Awaitable[tuple[Swaps, LongLoads]]) -> LongLoads:
    return (await begun_slow_swaps)[1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("fails", "the script exited with code 3"),
        ("killed", "the script was killed by signal 9"),
        ("hangs", "the script runs on after 1.2 s"),
        ("deaf", "the script runs on after 1.2 s"),
        ("deaf-child", "the script runs on after 1.2 s"),
        ("loading", "the backend is not ready after 1.2 s (GET /health: 503)"),
        ("guarded", "the backend is not ready after 1.2 s (GET /health: 401)"),
        ("broken", "the backend is not ready after 1.2 s (GET /health: 500)"),
        ("redirects", "the backend is not ready after 1.2 s (GET /health: 302)"),
        ("silent", "the backend is not ready after 1.2 s"),
        ("refuses", "the backend is not ready after 1.2 s (GET /health: "),
        ("lost", "the backend is not ready after 1.2 s (GET /v1/models: 401)"),
    ],
)
async def test_swap_that_fails_says_why_to_client_and_log(
    swaps: Swaps, model: str, words: str
) -> None:
    answer = swaps.answers[model]
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (503, "swap_failed")
    assert error["message"].startswith(f'swap to "{model}" failed: {words}')
    assert words in swaps.faults[model]["err"]


async def test_client_is_not_told_to_try_a_failed_swap_again(swaps: Swaps) -> None:
    headers = swaps.answers["fails"].headers
    assert (headers["x-should-retry"], "Retry-After" in headers) == ("false", False)


async def test_what_a_script_prints_goes_to_the_log_and_not_to_the_client(swaps: Swaps) -> None:
    assert "/home/me" in swaps.faults["fails"]["stderr"]
    assert "/home/me" not in await swaps.answers["fails"].text()


async def test_backend_without_health_is_asked_for_its_models_until_it_is_ready(
    swaps: Swaps,
) -> None:
    assert swaps.answers["works"].status == 200


async def test_script_that_runs_into_the_deadline_is_stopped_with_all_its_children(
    swaps: Swaps,
) -> None:
    """Else the fixture had waited in vain for the end of the pipe that they hold."""
    assert set(swaps.held_pipe.split()) == {model for model, _, _ in SWAPS}


@pytest.mark.parametrize("damage", ["not executable", "gone"])
async def test_script_that_cannot_be_run_fails_the_swap(
    tmp_path: Path, chat: Backend, code: Backend, damage: str
) -> None:
    script = swap_script(tmp_path)
    async with running_jano(tmp_path, [entry(chat), entry(code)], script) as daemon:
        await daemon.logged("worker started")
        if damage == "gone":
            script.unlink()
        else:
            script.chmod(0o644)
        status, answer = await daemon.ask("code")
        assert (status, answer["error"]["code"]) == (503, "swap_failed")


async def test_script_whose_interpreter_is_gone_fails_the_swap_and_that_is_said(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """As that of one with a carriage return in its first line."""
    script = swap_script(tmp_path)
    script.write_text("#!/no/such/shell\n")
    async with running_jano(tmp_path, [entry(chat), entry(code)], script) as daemon:
        assert "#! line" in (await daemon.logged("status failed"))["err"]
        answer = (await daemon.ask("code"))[1]
        assert "its #! line, could not be started: No such file" in answer["error"]["message"]
        assert str(tmp_path) not in answer["error"]["message"]


@linux_only
async def test_swap_that_finds_no_free_file_fails_alone(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat), entry(code)]) as daemon:
        assert (await daemon.ask("chat"))[0] == 200  # its connection stays open
        jano_files = daemon.process.pid, resource.RLIMIT_NOFILE
        soft, hard = resource.prlimit(*jano_files)
        resource.prlimit(*jano_files, (3, hard))
        assert (await daemon.ask("code"))[0] == 503
        resource.prlimit(*jano_files, (soft, hard))
        assert (await daemon.ask("code"))[0] == 200


async def test_server_that_did_not_get_ready_twice_is_to_be_restarted(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """Once it may have loaded slowly, and goes on with that."""
    code.ready = False
    models = [entry(chat), entry(code)]
    async with running_jano(tmp_path, models, SWAP_WAIT_TIMEOUT_MS=100) as daemon:
        assert [(await daemon.ask("code"))[0] for _ in range(3)] == [503] * 3
    restarts = [call.endswith(" restart=1") for call in calls(tmp_path, environ=True)]
    assert restarts == [False, False, True]


async def test_status_that_hangs_delays_no_swap(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    asked = tmp_path / "asked"  # at the start
    hang = 'trap "" TERM; sleep 60'
    script = swap_script(tmp_path, status=f'if [ -e "{asked}" ]; then {hang}; fi; touch "{asked}"')
    models = [entry(chat), entry(code, url=f"{chat.url}/code")]

    async def look(request: web.Request) -> web.Response:
        hangs = (tmp_path / "calls").read_text().count("status ") > 1
        return web.Response(status=200 if hangs else 503)

    chat.look = look
    async with shared_jano(models, script) as daemon:
        await daemon.ask("code")
        assert (await daemon.logged("swap ready"))["ms"] < 2000


async def test_health_with_a_header_of_9_kb_is_fine(
    shared_jano: Shared, chat: Backend, code: Backend
) -> None:
    async def look(_: web.Request) -> web.Response:
        return web.Response(headers={"X-Long": "x" * 9000})

    code.look = look
    async with shared_jano([entry(chat), entry(code)]) as daemon:
        assert (await daemon.ask("code"))[0] == 200


@linux_only
async def test_client_that_finds_no_free_file_waits_for_one_and_floods_no_log(
    tmp_path: Path, chat: Backend
) -> None:
    complaint = "complaint of a library"
    async with running_jano(tmp_path, [entry(chat)], may_log=complaint) as daemon:
        await daemon.status()  # on a connection that stays open
        jano_files = daemon.process.pid, resource.RLIMIT_NOFILE
        soft, hard = resource.prlimit(*jano_files)
        resource.prlimit(*jano_files, (3, hard))
        asking = asyncio.create_task(exchange(daemon, post_bytes()))
        await daemon.logged(complaint)
        await daemon.status()
        assert len(daemon.log(complaint)) <= 2
        resource.prlimit(*jano_files, (soft, hard))
        assert answered(await asking).status == 200


# What a failed swap does to others


async def test_failed_swap_fails_who_waits_for_it_and_nobody_else(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    models = [entry(chat), entry(code), {"name": "third", "url": f"{chat.url}/third"}]
    script = swap_script(tmp_path, '[ "$1" != code ]')
    async with shared_jano(models, script) as daemon:
        asks = await daemon.queued("chat", "code", "code", "third")
        chat.release.set()
        assert await statuses(asks) == [200, 503, 503, 200]
        assert not code.requests  # its health says ready, and that counts for nothing
    assert calls(tmp_path, environ=True) == ["code previous=chat", "third previous="]


@pytest.fixture
async def bad_code(tmp_path: Path, chat: Backend, code: Backend) -> AsyncIterator[Running]:
    """A jano that has marked code bad: two swaps to it have failed. They fail still."""
    script = swap_script(tmp_path, '[ "$1" != code ]')
    limits: dict[str, Any] = {"SWAP_FAILURE_LIMIT": 2, "SWAP_FAILURE_RESET_MS": 500}
    async with running_jano(tmp_path, [entry(chat), entry(code)], script, **limits) as daemon:
        for _ in range(2):
            assert (await daemon.ask("code"))[1]["error"]["code"] == "swap_failed"
        yield daemon


async def test_model_whose_swaps_fail_is_refused_at_once_and_says_until_when(
    tmp_path: Path, bad_code: Running
) -> None:
    answer = await bad_code.post("code")
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (503, "backend_unavailable")
    assert re.search('"code" .* 2 .* in 1 s', error["message"])
    assert (answer.headers["x-should-retry"], "Retry-After" in answer.headers) == ("false", False)
    assert calls(tmp_path) == ["code", "code"]
    assert (await bad_code.ask("chat"))[0] == 200


async def test_model_marked_bad_is_tried_again_after_a_while(bad_code: Running) -> None:
    """And its failures count from 0 then."""
    await asyncio.sleep(0.5)
    errors = [(await bad_code.ask("code"))[1]["error"]["code"] for _ in range(3)]
    assert errors == ["swap_failed", "swap_failed", "backend_unavailable"]


async def test_load_that_succeeds_forgets_failures(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    bad = tmp_path / "bad"
    script = swap_script(tmp_path, f'[ "$1" != code ] || [ ! -e "{bad}" ]')
    models = [entry(chat), entry(code)]
    async with running_jano(tmp_path, models, script, SWAP_FAILURE_LIMIT=2) as daemon:
        bad.touch()
        assert (await daemon.ask("code"))[0] == 503
        bad.unlink()
        assert (await daemon.ask("code"))[0] == 200
        assert (await daemon.ask("chat"))[0] == 200
        bad.touch()
        answers = [await daemon.ask("code") for _ in range(3)]
    codes = [answer["error"]["code"] for _, answer in answers]
    assert codes == ["swap_failed", "swap_failed", "backend_unavailable"]


async def test_reload_forgets_failures(bad_code: Running, chat: Backend, code: Backend) -> None:
    await bad_code.reload([entry(chat), entry(code)])
    assert (await bad_code.ask("code"))[1]["error"]["code"] == "swap_failed"


# Swaps that nobody awaits any more


async def test_swap_whose_client_has_left_the_queue_is_not_started(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    async with shared_jano([entry(chat), entry(code)]) as daemon:
        running, client = await daemon.queued("chat", "code")
        client.cancel()
        await daemon.logged("client disconnected")
        chat.release.set()
        assert await statuses([running, *await daemon.queued("chat")]) == [200, 200]
    assert calls(tmp_path) == []


async def test_swap_whose_client_has_left_is_abandoned_if_others_wait(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    script = swap_script(tmp_path, '[ "$1" != code ] || exec sleep 60')
    async with shared_jano([entry(chat), entry(code)], script) as daemon:
        [client] = await daemon.queued("code")
        await event(until(lambda: calls(tmp_path) == ["code"]))
        others = await daemon.queued("chat")
        client.cancel()
        assert await statuses(others) == [200]
        await daemon.logged("swap abandoned: nobody waits for it", model="code")
        assert daemon.log("swap failed") == []
    assert calls(tmp_path, environ=True) == ["code previous=chat", "chat previous="]


async def test_clients_with_less_patience_than_a_swap_takes_are_served_in_the_end(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """They ask again at once; but each time they leave, the other one waits."""
    script = swap_script(tmp_path, "exec sleep 0.3")
    served: set[str] = set()

    async def client(model: str) -> None:
        while model not in served:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(daemon.ask(model), 0.2)
                served.add(model)

    models = [entry(chat), entry(code), entry(chat, name="old")]
    async with running_jano(tmp_path, models, script, MAX_TURN_MS=1, LINGER_MS=0) as daemon:
        await daemon.ask("old")
        await event(asyncio.gather(client("chat"), client("code")))


async def test_swap_whose_client_has_left_goes_on_if_nobody_waits(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    async with shared_jano([entry(chat), entry(code)], gated_script(tmp_path)) as daemon:
        [client] = await daemon.queued("code")
        await event(until(lambda: calls(tmp_path) == ["code"]))
        client.cancel()
        await daemon.logged("client disconnected")
        (tmp_path / "go").touch()
        await daemon.logged("swap ready", model="code")
        await daemon.shows(currentModel="code")


# What a swap costs a request


async def test_answer_tells_how_much_of_the_wait_was_the_swap(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    script = swap_script(tmp_path, "exec sleep 0.2")
    async with shared_jano([entry(chat), entry(code)], script) as daemon:
        answer = await daemon.post("code")
    queue, swap = map(int, re.findall("dur=([0-9]+)", answer.headers["Server-Timing"]))
    assert 200 <= swap <= queue


# What is loaded at the start


@dataclass
class FoundAtStart:
    loaded: dict[str, str | None]  # by group
    statuses: list[str]  # the groups for which the script was asked


@pytest.fixture(scope="module")
async def found_at_start(tmp_path_factory: pytest.TempPathFactory) -> FoundAtStart:
    """Groups that differ in what `status` prints and in whose backend answers."""
    folder = tmp_path_factory.mktemp("start")
    status = """case $JANO_GROUP in
        names) echo "chat-large: loaded";;
        mute) ;;
        denies) echo "nap: asleep";;
        *) exit 1;;
    esac"""
    async with running_backend("up") as up, running_backend("down") as down:
        down.ready = False
        groups = {
            "names": [entry(up, name="chat"), entry(up, name="chat-large")],
            "mute": [entry(up, name="forgotten")],
            "denies": [entry(up, name="nap")],
            "healthy": [entry(down, name="first"), entry(up, name="second")],
            "twins": [entry(up, name="one"), entry(up, name="two")],
            "nobody": [entry(down, name="alone")],
        }
        models = [{**model, "group": group} for group in groups for model in groups[group]]
        async with running_jano(folder, models, swap_script(folder, status=status)) as daemon:
            await daemon.logged("worker started", len(groups))
    loaded = {line["group"]: line["loaded"] for line in daemon.log("worker started")}
    noted = re.findall("^status .*group=([a-z]+)", (folder / "calls").read_text(), re.M)
    return FoundAtStart(loaded, noted)


@pytest.mark.parametrize(
    ("group", "loaded"),
    [
        ("names", "chat-large"),  # the status names it, and no part of its name counts
        ("mute", None),  # a status that names nothing is believed
        ("denies", None),
        ("healthy", "second"),  # without a status, the first whose backend is ready
        ("twins", None),  # health cannot tell which of two that share an address it is
        ("nobody", None),
    ],
)
async def test_start_finds_what_is_loaded_by_status_or_else_by_health(
    found_at_start: FoundAtStart, group: str, loaded: str | None
) -> None:
    assert found_at_start.loaded[group] == loaded


async def test_start_asks_the_script_once_for_each_group(found_at_start: FoundAtStart) -> None:
    assert sorted(found_at_start.statuses) == sorted(found_at_start.loaded)


async def test_request_that_comes_before_it_is_known_what_is_loaded_waits_for_that(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    script = gated_script(tmp_path, "status", then='echo "code: loaded"')
    async with shared_jano([entry(chat), entry(code)], script) as daemon:
        asks = await daemon.queued("code")
        (tmp_path / "go").touch()
        assert await statuses(asks) == [200]
    assert calls(tmp_path) == []


async def test_server_that_still_loads_at_the_start_is_waited_for_and_not_restarted(
    shared_jano: Shared, tmp_path: Path, chat: Backend
) -> None:
    """The script may be asked for it: it finds it there."""
    chat.ready = False
    script = swap_script(tmp_path, status='echo "chat: loaded"')
    async with shared_jano([entry(chat)], script) as daemon:
        asks = await daemon.queued("chat")
        await asyncio.sleep(0.15)  # nothing may happen, so there is nothing to wait for
        assert not chat.requests
        chat.ready = True
        assert await statuses(asks) == [200]
    assert calls(tmp_path, environ=True) in ([], ["chat previous="])


async def test_server_that_does_not_get_ready_after_the_start_is_loaded_anew(
    tmp_path: Path, chat: Backend
) -> None:
    chat.ready = False
    script = swap_script(tmp_path, status='echo "chat: loaded"')
    async with running_jano(tmp_path, [entry(chat)], script, SWAP_WAIT_TIMEOUT_MS=500) as daemon:
        asks = await daemon.queued("chat")
        await event(until(lambda: calls(tmp_path) == ["chat"]))
        chat.ready = True
        assert await statuses(asks) == [200]


# Backends that seem up and do not answer


async def never(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def break_off(request: web.Request) -> web.StreamResponse:
    """Closes the connection without an answer."""
    assert request.transport
    request.transport.close()
    return web.Response()


FAILURES = {  # how a backend fails a request, what the client gets
    "silent": (never, 504),
    "dead": (break_off, 502),
    "confused": (says(b"{}", status=500), 500),
}


@dataclass
class Troubled:
    """A jano whose backends fail, each in a group of its own."""

    daemon: Running
    backends: dict[str, Backend]  # by what they are called: dead-ready, dead-gone, …

    def calls_for(self, name: str) -> list[str]:
        return [line for line in calls(self.daemon.folder, environ=True) if line.startswith(name)]


@pytest.fixture(scope="module")
async def troubled(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Troubled]:
    folder = tmp_path_factory.mktemp("troubled")
    names = [f"{how}-{then}" for how in FAILURES for then in ("ready", "gone")]
    script = swap_script(folder, status='echo "$JANO_GROUP: loaded"')
    async with contextlib.AsyncExitStack() as stack:
        backends = {name: await stack.enter_async_context(running_backend(name)) for name in names}
        models = [entry(backend, group=name) for name, backend in backends.items()]
        jano_ = running_jano(folder, models, script, REQUEST_TIMEOUT_MS=300)
        daemon = await stack.enter_async_context(jano_)
        await daemon.logged("worker started", len(names))
        yield Troubled(daemon, backends)


@pytest.mark.parametrize("how", FAILURES)
async def test_backend_that_failed_and_is_not_ready_is_restarted_before_the_next_turn(
    troubled: Troubled, how: str
) -> None:
    name = f"{how}-gone"
    backend = troubled.backends[name]

    async def recover() -> None:
        await event(until(lambda: bool(troubled.calls_for(name))))
        backend.ready, backend.answer = True, backend.plain

    backend.ready = False
    backend.answer, status = FAILURES[how]
    assert (await troubled.daemon.post(name)).status == status
    recovery = troubled.daemon.background(recover())
    assert (await event(troubled.daemon.ask(name))) == (200, {"answered_by": name})
    await recovery
    assert len(backend.requests) == 2
    assert troubled.calls_for(name) == [f"{name} previous= group={name} restart=1"]


@pytest.mark.parametrize("how", FAILURES)
async def test_backend_that_failed_and_is_ready_is_asked_again(
    troubled: Troubled, how: str
) -> None:
    name = f"{how}-ready"
    backend = troubled.backends[name]
    backend.answer, status = FAILURES[how]
    assert (await troubled.daemon.post(name)).status == status
    backend.answer = backend.plain
    assert (await troubled.daemon.ask(name))[0] == 200
    assert troubled.calls_for(name) == []


async def test_backend_that_answers_others_is_not_restarted(
    shared_jano: Shared, tmp_path: Path, chat: Backend
) -> None:
    """Some engines look after /health on the thread that computes."""
    asked = asyncio.Event()

    async def busy(_: web.Request) -> web.StreamResponse:
        asked.set()
        return web.Response(status=200 if chat.release.is_set() else 503)

    chat.answer = chat.held
    async with shared_jano([entry(chat, slots=2)]) as daemon:
        running = await daemon.queued("chat")
        await event(chat.arrived.get())
        chat.look, chat.answer = busy, says(b"{}", status=500)
        assert (await daemon.post("chat")).status == 500
        await event(asked.wait())
        chat.answer = chat.plain
        waiting = await daemon.queued("chat")
        chat.release.set()
        assert await statuses(running + waiting) == [200, 200]
    assert calls(tmp_path) == []


async def test_only_the_swap_after_a_failure_is_told_to_restart(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = says(b"{}", status=500)
    script = swap_script(tmp_path, status='echo "chat: loaded"')
    async with shared_jano([entry(chat), entry(code)], script) as daemon:
        await daemon.logged("worker started")
        chat.ready = False
        assert (await daemon.post("chat")).status == 500
        [again] = await daemon.queued("chat")
        await event(until(lambda: calls(tmp_path) == ["chat"]))
        chat.ready, chat.answer = True, chat.plain
        assert await statuses([again]) == [200]
        for model in ("code", "chat"):
            assert (await daemon.ask(model))[0] == 200
    assert calls(tmp_path, environ=True)[1:] == ["code previous=chat", "chat previous=code"]


async def test_script_that_fails_is_seen_to_fail_where_sigchld_is_ignored(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """Some daemons leave it so to what they start."""
    ignore = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    (tmp_path / "sitecustomize.py").write_text(ignore)
    script, models = swap_script(tmp_path, "exit 1"), [entry(chat), entry(code)]
    async with running_jano(tmp_path, models, script, PYTHONPATH=tmp_path) as daemon:
        assert (await daemon.ask("code"))[1]["error"]["code"] == "swap_failed"


# A machine without threads to spare

NO_THREADS = """
import os, threading

start = threading.Thread.start


def start_or_fail(thread):
    if os.path.exists("no threads"):
        raise RuntimeError("can't start new thread")
    start(thread)


threading.Thread.start = start_or_fail
"""


async def test_script_that_nobody_can_watch_is_killed(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """Else the next one would run beside it."""
    (tmp_path / "sitecustomize.py").write_text(NO_THREADS)
    script = swap_script(tmp_path, "sleep 0.3; echo $$ >>ended")
    models = [entry(chat), entry(code)]
    async with running_jano(tmp_path, models, script, PYTHONPATH=tmp_path) as daemon:
        await daemon.logged("worker started")
        (tmp_path / "no threads").touch()
        assert (await daemon.ask("code"))[1]["error"]["code"] == "swap_failed"
        (tmp_path / "no threads").unlink()
        assert (await daemon.ask("code"))[0] == 200
    assert len((tmp_path / "ended").read_text().splitlines()) == 1


async def test_backend_whose_name_cannot_be_looked_up_has_failed(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_THREADS)
    (tmp_path / "no threads").touch()
    models = [entry(each, url=f"http://localhost:{each.port}") for each in (chat, code)]
    models.append(entry(chat, name="asr", url=models[0]["url"], passthrough=True))
    async with running_jano(tmp_path, models, PYTHONPATH=tmp_path) as daemon:
        assert (await daemon.ask("code"))[1]["error"]["code"] == "swap_failed"
        assert (await daemon.ask("asr"))[1]["error"]["code"] == "backend_unreachable"
        (tmp_path / "no threads").unlink()
        assert (await daemon.ask("code"))[0] == 200
        assert (await daemon.ask("asr"))[0] == 200


# While readiness is awaited


# While readiness is awaited


async def test_server_that_dies_while_it_loads_fails_the_swap_within_seconds(
    long_loads: LongLoads,
) -> None:
    answer = long_loads.answers["dies"]
    assert (answer.status, (await answer.json())["error"]["code"]) == (503, "swap_failed")
    assert long_loads.seconds["dies"] < 6


async def test_last_words_of_a_server_that_died_are_in_the_log(long_loads: LongLoads) -> None:
    assert "CUDA error: out of memory" in long_loads.faults["dies"]["stderr"]


async def test_status_is_asked_until_the_server_is_gone(long_loads: LongLoads) -> None:
    asked = [line for line in long_loads.noted if line.startswith("status ") and "dies" in line]
    assert len(asked) == 3  # at the start, when it named the server, and when it did so no more


async def test_script_that_knows_no_status_is_left_in_peace(long_loads: LongLoads) -> None:
    assert long_loads.answers["plain"].status == 200
    asked = [line for line in long_loads.noted if line.startswith("status ") and "plain" in line]
    assert len(asked) <= 2  # at the start, and once more to see that it knows none


async def test_health_that_takes_three_seconds_is_waited_for(long_loads: LongLoads) -> None:
    assert long_loads.answers["slow"].status == 200


# -------------------------------------------------------------- helpers: requests in bytes ----


def request_bytes(
    method: str, path: str, *headers: str, body: bytes = b"", version: str = "1.1"
) -> bytes:
    """Any request as it goes over the wire. Host and Content-Length are added where missing."""
    names = {header.partition(":")[0].lower() for header in headers}
    lines = [f"{method} {path} HTTP/{version}", *headers]
    if "host" not in names and version == "1.1":
        lines.append("Host: localhost")
    if not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def asked(
    daemon: Running, method: str, path: str, *headers: str, body: bytes = b""
) -> http.client.HTTPResponse:
    """The answer to this request. One to HEAD has headers and nothing to read."""
    return answered(await exchange(daemon, request_bytes(method, path, *headers, body=body)))


async def nothing_comes(reader: asyncio.StreamReader, seconds: float) -> None:
    """No byte reaches the client for so long."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), seconds)


# ---------------------------------------------------- helpers: backends that tests conduct ----

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request as it came, with its body. IncompleteReadError: the connection has ended."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: ([0-9]+)\r\n", head)
    return head + await reader.readexactly(int(length[1]) if length else 0)


class Peer:
    """A backend whose every connection is conducted by `talk`, and closed when that returns."""

    jano: Running
    talk: Talk

    async def listen(self) -> None:
        self.connections: list[asyncio.StreamWriter] = []  # all that were ever made
        self.requests: list[tuple[int, bytes]] = []  # the number of its connection, what came
        self.tasks: set[asyncio.Task[None] | None] = set()
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())
        self.connections.append(writer)
        quiet = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*quiet):
            await self.talk(reader, writer)
        writer.close()

    async def read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """The next request of this connection, which is also recorded."""
        request = await read_request(reader)
        self.requests.append((self.connections.index(writer), request))
        return request

    async def forget(self) -> None:
        """End all connections and conversations, so that no test goes on with another's."""
        for task in self.tasks:
            if task:
                task.cancel()
        if self.tasks:
            await event(asyncio.wait(self.tasks))
        self.tasks.clear()
        for writer in self.connections:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await event(writer.wait_closed())
        self.connections.clear()
        self.requests.clear()


PEER = b'{"model":"peer"}'
EMPTY_OBJECT = OK + b"Content-Length: 2\r\n\r\n{}"


async def ask_peer(backend: Peer, *headers: str, body: bytes = PEER) -> tuple[int, bytes]:
    """One request for the peer: status and body of the answer, which must be whole."""
    answer = answered(await exchange(backend.jano, post_bytes(body, *headers)))
    return answer.status, answer.read()


class Pair(NamedTuple):
    """The backends of one jano: the models `chat` and `asr` are raw's, `peer` is peer's.

    asr and peer are passthrough.
    """

    raw: Raw
    peer: Peer


@contextlib.asynccontextmanager
async def running_pair(folder: Path, **settings: Any) -> AsyncIterator[Pair]:
    pair = Pair(Raw(), Peer())
    await pair.raw.listen()
    await pair.peer.listen()
    models: list[dict[str, Any]] = [
        {"name": "chat", "url": pair.raw.url},
        {"name": "asr", "url": f"{pair.raw.url}/asr", "passthrough": True},
        {"name": "peer", "url": pair.peer.url, "passthrough": True},
    ]
    async with running_jano(folder, models, **settings) as daemon:
        pair.raw.jano = pair.peer.jano = daemon
        await daemon.logged("worker started")
        yield pair
    pair.peer.server.close()
    await pair.peer.forget()
    await pair.raw.stop()


async def fresh(backend: Raw) -> Raw:
    """The same as it was at first."""
    backend.reply, backend.ready_once = Raw.reply, False
    backend.seen.clear()
    backend.talks = asyncio.Queue()
    if not backend.server.is_serving():  # the last test went wrong
        await backend.listen()
    return backend


@pytest.fixture(scope="module")
async def patient(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with running_pair(tmp_path_factory.mktemp("patient")) as pair:
        yield pair


@pytest.fixture(scope="module")
async def pure_python(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    folder = tmp_path_factory.mktemp("python")
    async with running_pair(folder, AIOHTTP_NO_EXTENSIONS="1") as pair:
        yield pair


@pytest.fixture(scope="module")
async def impatient(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    folder = tmp_path_factory.mktemp("impatient")
    async with running_pair(folder, REQUEST_TIMEOUT_MS=250) as pair:
        yield pair


@pytest.fixture
async def wire(patient: Pair) -> Raw:
    """A Raw backend of the models `chat` and `asr`, whose jano is shared by many tests."""
    return await fresh(patient.raw)


@pytest.fixture(params=["C", "Python"])
async def either_wire(request: pytest.FixtureRequest, patient: Pair, pure_python: Pair) -> Raw:
    """The same, once for each of aiohttp's parsers of HTTP."""
    return await fresh(patient.raw if request.param == "C" else pure_python.raw)


@pytest.fixture
async def impatient_wire(impatient: Pair) -> Raw:
    """The same, of a jano that bears no more than 0.25 seconds of silence."""
    return await fresh(impatient.raw)


@pytest.fixture
async def peer(patient: Pair) -> Peer:
    """A Peer of the model `peer`, whose jano is shared by many tests."""
    await patient.peer.forget()
    return patient.peer


@pytest.fixture
async def impatient_peer(impatient: Pair) -> Peer:
    """The same, of a jano that bears no more than 0.25 seconds of silence."""
    await impatient.peer.forget()
    return impatient.peer


# ---------------------------------------------------------- forward: what the backend gets ----

ODD_BODY = b'{ "model" :"chat", "prompt": "\xff\xc3\xa9\\u00e9" ,\r\n"n":1e2,"n":2}'
MADE_ANEW = {"host", "content-length", "connection"}


async def test_backend_gets_the_clients_headers_and_no_others(wire: Raw) -> None:
    headers = [
        "Content-Type: application/json; charset=utf-8",
        "Accept-Encoding: gzip, br",
        "X-Many: 1",
        "X-Other: a,  b",
        "X-Many: 2",
        "x-many: 3",
        "Cookie: a=1",
        "Cookie: b=2",
        "Authorization: Bearer k",
        "traceparent: 00-1-2-01",
        "Helicone-User: é",
        "X-Empty: ",
        "X-Forwarded-For: 10.0.0.1",
        "Via: 1.1 x",
    ]
    await exchange(wire.jano, post_bytes(ODD_BODY, *headers))
    _, got, _ = parsed(wire.seen[0])
    pairs = [header.split(": ", 1) for header in headers]
    expected = [(name.lower(), value) for name, value in pairs]
    assert [pair for pair in got if pair[0] not in MADE_ANEW] == expected
    assert Counter(name for name, _ in got)["content-length"] == 1
    assert ("host", f"127.0.0.1:{wire.port}") in got


async def test_backend_of_a_client_with_no_header_at_all_gets_none(wire: Raw) -> None:
    await exchange(wire.jano, post_bytes())
    _, got, _ = parsed(wire.seen[0])
    assert {name for name, _ in got} <= MADE_ANEW


@pytest.mark.parametrize(
    ("headers", "gone"),
    [
        (["Connection: X-A, keep-alive", "Connection: X-Hop", "X-Hop: 1"], "x-hop"),
        (["Connection: close, x-HOP", "X-Hop: 1"], "x-hop"),
        (["Keep-Alive: timeout=5"], "keep-alive"),
        (["TE: trailers"], "te"),
        (["Trailer: X-T"], "trailer"),
        (["Connection: upgrade", "Upgrade: h2c"], "upgrade"),
        (["Proxy-Connection: close"], "proxy-connection"),
        (["Proxy-Authorization: Basic eA=="], "proxy-authorization"),
        (["Expect: 100-continue"], "expect"),
        (["Expect: x"], "expect"),
    ],
)
async def test_header_that_is_for_the_next_hop_alone_ends_at_jano(
    wire: Raw, headers: list[str], gone: str
) -> None:
    await exchange(wire.jano, post_bytes(ODD_BODY, *headers))
    _, got, body = parsed(wire.seen[0])
    assert gone not in [name for name, _ in got]
    assert body == ODD_BODY


async def test_space_before_a_colon_of_an_answer_ends_at_jano(wire: Raw) -> None:
    """Else the client might see another length than jano's (RFC 9112, 5.1)."""
    wire.reply = OK + b"Content-Length : 2\r\n\r\n{}"
    message = await exchange(wire.jano, post_bytes())
    assert b" :" not in message
    assert answered(message).read() == b"{}"


async def test_connection_header_cannot_take_the_length_or_host_from_the_backend(wire: Raw) -> None:
    await exchange(wire.jano, post_bytes(ODD_BODY, "Connection: host, content-length"))
    _, got, body = parsed(wire.seen[0])
    assert {"host", "content-length"} <= {name for name, _ in got}
    assert body == ODD_BODY


@pytest.mark.parametrize(
    ("headers", "sent", "got"),
    [
        pytest.param([], ODD_BODY, ODD_BODY, id="odd bytes"),
        pytest.param([CHUNKED], in_chunks(ODD_BODY), ODD_BODY, id="chunks"),
        pytest.param([GZIP], gzip.compress(ODD_BODY), ODD_BODY, id="gzip"),
        pytest.param(
            [GZIP, CHUNKED], in_chunks(gzip.compress(ODD_BODY)), ODD_BODY, id="gzip in chunks"
        ),
        pytest.param(["X-Model: chat"], b"", b"", id="nothing"),
        pytest.param(["X-Model: chat", "Content-Type: audio/wav"], b"\0", b"\0", id="no JSON"),
        pytest.param(
            [],
            b'{"model":"chat","image":"%b"}' % (b"A" * 30_000_000),
            b'{"model":"chat","image":"%b"}' % (b"A" * 30_000_000),
            id="30 MB",
        ),
    ],
)
async def test_backend_gets_the_body_to_the_byte(
    wire: Raw, headers: list[str], sent: bytes, got: bytes
) -> None:
    await exchange(wire.jano, post_bytes(sent, *headers))
    _, pairs, body = parsed(wire.seen[0])
    names = {name for name, _ in pairs}
    assert body == got
    assert not names & {"transfer-encoding", "content-encoding"}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions?a=%2F+%20&&b",
        "//h/",
        "/../%2e%2e/x",
        "/x?a=%0d%0aX-Evil:%201&b=c+d%20",
        "/v1/%E2%9C%93/%FF",
        '/|"<>^?x',
        "/x?q=%20+%zz&&=;y&b?c=/d:@!$'()*,",
    ],
)
async def test_backend_gets_path_and_query_as_the_client_spelt_them(wire: Raw, path: str) -> None:
    await exchange(wire.jano, post_bytes(path=path))
    assert wire.seen[0].startswith(f"POST {path} HTTP/1.1\r\n".encode())


async def test_address_in_the_request_line_is_not_where_the_request_goes(wire: Raw) -> None:
    await exchange(wire.jano, post_bytes(path="http://elsewhere.example/x?y"))
    assert wire.seen[0].startswith(b"POST /x?y HTTP/1.1\r\n")


async def test_old_client_without_a_host_is_served(wire: Raw) -> None:
    sent = request_bytes("POST", "/x", body=b'{"model":"chat"}', version="1.0")
    assert answered(await exchange(wire.jano, sent)).status == 200


async def test_requests_sent_in_one_go_are_answered_in_order(peer: Peer) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await peer.read(reader, writer):
            number = request[-2:-1]
            writer.write(OK + b"X-Number: " + number + b"\r\nContent-Length: 2\r\n\r\n{}")

    peer.talk = talk
    requests = [
        post_bytes(b'{"model":"peer","n":%d}' % number, "Connection: keep-alive")
        for number in range(5)
    ]
    answers = await exchange(peer.jano, b"".join([*requests, LAST]))
    assert re.findall(rb"(?i)x-number: ([0-9])", answers) == [b"0", b"1", b"2", b"3", b"4"]


# ----------------------------------------------------------- forward: what the client gets ----

EVENTS = b"Content-Type: text/event-stream\r\n\r\n"
REPLIES = {
    "gzip stays gzip": OK
    + b"content-type: application/json\r\nserver: uvicorn\r\nDate: now\r\n"
    + b"content-encoding: gzip\r\nContent-Length: 25\r\n\r\n"
    + gzip.compress(b"words"),
    "repeated headers": b"HTTP/1.1 201 Made\r\nSet-Cookie: a=1; Path=/\r\nSet-Cookie: b=2\r\n"
    b"Set-Cookie: b=2\r\nX-Request-ID: own\r\nServer-Timing: gpu;dur=5\r\n"
    b"Content-Length: 9999\r\n\r\n" + bytes(9999),
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 5\r\n\r\nmoved",
    "control character": b"HTTP/1.1 404 No, sorry!\r\nContent-Type: text/html\r\n"
    b"X-Control: \x01\r\nContent-Length: 0\r\n\r\n",
    "hop by hop": b"HTTP/1.1 503 \r\nConnection: close\r\nConnection: X-Hop\r\nX-Hop: 1\r\n"
    b"Content-Length: 0\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
    "304": b'HTTP/1.1 304 Same\r\nETag: "x"\r\n\r\n',
    "chunks": OK + b"Transfer-Encoding: chunked\r\n" + EVENTS + b"3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n",
    "chunks with a trailer": OK
    + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-T: 1\r\n\r\n",
    "until the end": OLD + EVENTS + b"data: as mlx_lm.server does, without a length\n\n",
    "until the end of HTTP/1.1": OK + b"\r\nwithout a length",
}
END_AT_JANO = {"connection", "keep-alive", "transfer-encoding", "x-hop"}
ADDED = {"server-timing", "x-request-id", "x-accel-buffering", "date", "content-length"}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
async def test_client_gets_what_the_backend_answered(
    either_wire: Raw, reply: bytes, version: str
) -> None:
    either_wire.reply = reply
    got = answered(await exchange(either_wire.jano, post_bytes(version=version)))
    given = answered(reply)
    assert (got.status, got.reason, got.read()) == (given.status, given.reason, given.read())
    assert got.version == int(version.replace(".", ""))
    got_headers = Counter((name.lower(), value) for name, value in got.getheaders())
    given_headers = Counter((name.lower(), value) for name, value in given.getheaders())
    # aiohttp refuses to write a control character, so the header with it is not passed on as it is.
    new = {name for name, _ in got_headers - given_headers} - {"x-control"}
    lost = {name for name, _ in given_headers - got_headers} - {"x-control"}
    assert new <= ADDED | END_AT_JANO
    assert lost <= END_AT_JANO


async def test_answer_has_the_requests_id_unless_the_backend_gave_one(wire: Raw) -> None:
    answer = answered(await exchange(wire.jano, post_bytes()))
    ids = answer.headers.get_all("x-request-id")
    assert ids == [wire.jano.log("enqueued")[-1]["id"]]
    wire.reply = OK + b"X-Request-Id: own\r\nContent-Length: 2\r\n\r\n{}"
    answer = answered(await exchange(wire.jano, post_bytes()))
    assert answer.headers.get_all("x-request-id") == ["own"]


async def test_answer_says_how_long_it_waited_beside_what_the_backend_says(wire: Raw) -> None:
    wire.reply = OK + b"Server-Timing: gpu;dur=5\r\nContent-Length: 2\r\n\r\n{}"
    answer = answered(await exchange(wire.jano, post_bytes()))
    timings = ", ".join(answer.headers.get_all("Server-Timing", []))
    assert re.fullmatch(r"gpu;dur=5, queue;dur=\d+, swap;dur=\d+", timings)


@pytest.mark.parametrize(("reply", "value"), [("chunks", "no"), ("redirect", None)])
async def test_a_stream_of_events_asks_proxies_not_to_buffer_it(
    wire: Raw, reply: str, value: str | None
) -> None:
    wire.reply = REPLIES[reply]
    answer = answered(await exchange(wire.jano, post_bytes()))
    assert answer.headers["X-Accel-Buffering"] == value


@pytest.mark.parametrize(
    ("head", "version", "frame", "end"),
    [
        pytest.param(IN_CHUNKS, "1.1", b"3\r\n%b\r\n", b"0\r\n\r\n", id="chunks"),
        pytest.param(IN_CHUNKS, "1.0", b"3\r\n%b\r\n", b"0\r\n\r\n", id="chunks to HTTP/1.0"),
        pytest.param(SIZED, "1.1", b"%b", b"", id="of known length"),
        pytest.param(OLD + b"\r\n", "1.1", b"%b", b"", id="until the end"),
        pytest.param(OLD + b"\r\n", "1.0", b"%b", b"", id="until the end to HTTP/1.0"),
    ],
)
async def test_each_chunk_leaves_jano_before_the_backend_sends_the_next(
    wire: Raw, head: bytes, version: str, frame: bytes, end: bytes
) -> None:
    wire.reply = head + HELD
    async with connected(wire.jano, post_bytes(version=version)) as (reader, _):
        backend = await event(wire.talks.get())
        answer = await event(reader.readuntil(b"\r\n\r\n"))  # the head waits for no chunk, either
        for chunk in (b"<1>", b"<2>", b"<3>"):
            backend.write(frame % chunk)
            answer += await event(reader.readuntil(chunk))
        wire.say(backend, end)
        answer += await event(reader.read(-1))
    assert answered(answer).read() == b"<1><2><3>"


FRAMED_BY_THE_HEAD = [
    pytest.param("POST", b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n", id="204"),
    pytest.param("POST", b"HTTP/1.1 304 Same\r\nX-A: 1\r\n\r\n", id="304"),
    pytest.param(
        "POST", b"HTTP/1.1 304 Same\r\nX-A: 1\r\nContent-Length: 25\r\n\r\n", id="304 with a length"
    ),
    pytest.param("HEAD", OK + b"X-A: 1\r\nContent-Length: 25\r\n\r\n", id="HEAD"),
    pytest.param("HEAD", OK + b"X-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n", id="HEAD, chunks"),
]


@pytest.mark.parametrize(("method", "reply"), FRAMED_BY_THE_HEAD)
async def test_answer_without_a_body_is_followed_by_the_next_answer_and_by_nothing_else(
    peer: Peer, method: str, reply: bytes
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.read(reader, writer)
        writer.write(reply)
        await peer.read(reader, writer)  # jano may use the connection again, or not
        writer.write(EMPTY_OBJECT)

    peer.talk = talk
    first = request_bytes(method, "/x?model=peer").replace(b"Connection: close", b"X: y")
    answers = await exchange(peer.jano, first + LAST)
    head, _, rest = answers.partition(b"\r\n\r\n")
    assert b"x-a: 1" in head.lower()
    assert b"transfer-encoding" not in head.lower() or method == "HEAD"
    assert rest.startswith(b"HTTP/1.1 200 ")


# -------------------------------------------------------------- forward: answers too early ----


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 2,
    ],
    ids=["100", "102", "103", "100 twice"],
)
async def test_interim_answer_is_not_taken_for_the_answer(peer: Peer, interim: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.read(reader, writer)
        writer.write(interim)
        await asyncio.sleep(0.02)
        writer.write(EMPTY_OBJECT)

    peer.talk = talk
    message = await exchange(peer.jano, post_bytes(PEER))
    final = re.sub(rb"\A(HTTP/1.1 1\d\d .*?\r\n\r\n)+", b"", message, flags=re.DOTALL)
    assert (answered(final).status, answered(final).read()) == (200, b"{}")


@pytest.mark.parametrize("status", [401, 413])
@pytest.mark.parametrize("megabytes", [3, 5, 30])
async def test_refusal_that_came_before_the_body_was_read_reaches_the_client(
    peer: Peer, megabytes: int, status: int
) -> None:
    """The backend closes with the body unread, so the kernel resets the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 8\r\n\r\ntoo much" % status)

    peer.talk = talk
    body = b'{"model":"peer","x":"%b"}' % (b"x" * megabytes * 2**20)
    for _ in range(3):  # it is a race
        assert await ask_peer(peer, body=body) == (status, b"too much")


async def test_refusal_of_a_backend_that_reads_no_further_but_stays_reaches_the_client(
    peer: Peer,
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 8\r\n\r\ntoo much")
        await asyncio.sleep(PATIENCE)

    peer.talk = talk
    body = b'{"model":"peer","x":"%b"}' % (b"x" * 30 * 2**20)
    assert await ask_peer(peer, body=body) == (413, b"too much")


# ------------------------------------------------ forward: when a connection is used again ----


async def test_connection_is_used_again_after_an_answer_of_known_length(peer: Peer) -> None:
    """HTTP/1.1 keeps a connection unless somebody says otherwise (RFC 9112, 9.3)."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await peer.read(reader, writer):
            writer.write(EMPTY_OBJECT)

    peer.talk = talk
    for _ in range(5):
        assert await ask_peer(peer) == (200, b"{}")
    assert len(peer.connections) == 1


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}", id="close"),
        pytest.param(OK + b"connection: x, Close\r\nContent-Length: 2\r\n\r\n{}", id="x, Close"),
        pytest.param(OLD + b"Content-Length: 2\r\n\r\n{}", id="HTTP/1.0"),
    ],
)
async def test_connection_that_the_backend_will_close_is_not_used_again(
    peer: Peer, reply: bytes
) -> None:
    """The backend leaves it open for now, and reads no second request from it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.read(reader, writer)
        writer.write(reply)
        await reader.read(1)

    peer.talk = talk
    for _ in range(3):
        assert await ask_peer(peer) == (200, b"{}")
    assert len(peer.connections) == 3


@pytest.mark.parametrize("size", [20, 300_000])
async def test_body_that_a_refusing_backend_has_not_read_is_not_taken_for_the_next_request(
    peer: Peer, size: int
) -> None:
    """A small body fits into the socket's buffers, so jano cannot tell that nobody reads it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"X-Bad" in head:
            writer.write(b"HTTP/1.1 400 No\r\nContent-Length: 2\r\n\r\nno")
            await reader.readuntil(b"\r\n\r\n")  # the body, and what follows it
            writer.write(b"HTTP/1.1 400 No\r\nContent-Length: 7\r\n\r\nsmuggle")
        else:
            writer.write(EMPTY_OBJECT)

    peer.talk = talk
    body = b'{"model":"peer","x":"%b"}' % (b"x" * size)
    assert await ask_peer(peer, "X-Bad: 1", body=body) == (400, b"no")
    assert await ask_peer(peer) == (200, b"{}")


async def test_connection_that_is_closed_right_after_a_stream_loses_no_request(peer: Peer) -> None:
    """As llama-server does, which says nothing of it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.read(reader, writer)
        writer.write(IN_CHUNKS + b"4\r\nword\r\n")
        await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    peer.talk = talk
    for _ in range(200):
        assert await ask_peer(peer) == (200, b"word")


async def test_connection_that_is_closed_soon_after_a_stream_loses_no_request(peer: Peer) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.read(reader, writer)
        writer.write(IN_CHUNKS + b"4\r\nword\r\n0\r\n\r\n")
        await asyncio.sleep(0.0005)

    peer.talk = talk
    for _ in range(200):
        assert await ask_peer(peer) == (200, b"word")


async def test_answer_without_a_body_says_nothing_of_how_a_stream_ends(peer: Peer) -> None:
    """The backend keeps a connection after a 204, and closes it soon after a stream."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"X-Empty" in await peer.read(reader, writer):
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.write(IN_CHUNKS + b"4\r\nword\r\n0\r\n\r\n")
        await asyncio.sleep(0.002)

    peer.talk = talk
    assert await ask_peer(peer, "X-Empty: 1") == (204, b"")
    await asyncio.sleep(0.3)  # a connection that stays open for 0.25 s after a stream is trusted
    for _ in range(20):
        assert await ask_peer(peer) == (200, b"word")


async def test_trailers_are_no_headers_of_the_next_answer(peer: Peer) -> None:
    connections: list[asyncio.StreamWriter] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while await peer.read(reader, writer):
            writer.write(IN_CHUNKS + b"4\r\nword\r\n0\r\nX-Trailer: 1\r\n\r\n")

    peer.talk = talk
    assert await ask_peer(peer) == (200, b"word")
    await asyncio.sleep(0.3)  # a connection that stays open for 0.25 s after a stream is used again
    answer = await exchange(peer.jano, request_bytes("POST", "/x?model=peer"))
    assert len(connections) == 1
    assert b"word" in answer
    assert b"X-Trailer" not in answer


async def test_kept_connection_that_was_closed_just_before_is_not_used(peer: Peer) -> None:
    answered_first = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.read(reader, writer)
        writer.write(EMPTY_OBJECT)
        await answered_first.wait()

    peer.talk = talk
    for _ in range(100):
        answered_first.clear()
        assert await ask_peer(peer) == (200, b"{}")
        answered_first.set()
        await peer.connections[-1].wait_closed()
        assert await ask_peer(peer) == (200, b"{}")


async def test_connection_whose_request_is_not_sent_whole_is_not_kept() -> None:
    """The backend answers without reading, and the last piece of the body waits for it to read."""
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
    idle: list[jano.Upstream] = []
    loop = asyncio.get_running_loop()
    _, upstream = await loop.create_connection(lambda: jano.Upstream(idle), sock=near)
    upstream.ask(b"POST / HTTP/1.1\r\n\r\n", bytes(2**16), 5.0)
    with far:
        far.sendall(EMPTY_OBJECT)
        while upstream.head is None:
            await event(upstream.more())
        assert upstream.body.read_nowait() == b"{}"
        upstream.release()
        assert idle == []


@pytest.mark.parametrize("end", [b"", RESET], ids=["closes", "resets"])
@pytest.mark.parametrize("before", [0, 1], ids=["new connection", "kept connection"])
async def test_request_that_may_have_been_read_is_never_sent_twice(
    peer: Peer, before: int, end: bytes
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"X-Die" not in await peer.read(reader, writer):
            writer.write(EMPTY_OBJECT)
        if end == RESET:
            writer.transport.abort()

    peer.talk = talk
    for _ in range(before):
        assert await ask_peer(peer) == (200, b"{}")
    message = await exchange(peer.jano, post_bytes(PEER, "X-Die: 1"))
    assert refused(message) == 502
    assert len([request for _, request in peer.requests if b"X-Die" in request]) == 1


SURPLUS = OK + b"Content-Length: 5\r\n\r\nwrong"


@pytest.mark.parametrize(
    ("surplus", "pause"),
    [
        (SURPLUS, 0.0),
        (SURPLUS, 0.02),
        (b"\r\n", 0.0),
        (b"\r\n", 0.02),
        (b"x", 0.02),
        (b"0\r\n\r\n", 0.02),
        (OK + b"X: ", 0.02),
    ],
    ids=[
        "an answer at once",
        "an answer",
        "a line at once",
        "a line",
        "x",
        "a chunk",
        "half a head",
    ],
)
async def test_bytes_after_an_answer_spoil_nothing(
    peer: Peer, surplus: bytes, pause: float
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await peer.read(reader, writer):
            writer.write(EMPTY_OBJECT if pause else EMPTY_OBJECT + surplus)
            await asyncio.sleep(pause)
            if pause:
                writer.write(surplus)

    peer.talk = talk
    for _ in range(3):
        assert await ask_peer(peer) == (200, b"{}")
        await asyncio.sleep(2 * pause)


@pytest.mark.parametrize(("method", "reply"), FRAMED_BY_THE_HEAD)
async def test_answer_without_a_body_leaves_the_backends_connection_in_order(
    peer: Peer, method: str, reply: bytes
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await peer.read(reader, writer):
            writer.write(EMPTY_OBJECT if b"X-Last" in request else reply)

    peer.talk = talk
    await exchange(peer.jano, request_bytes(method, "/x?model=peer"))
    assert await ask_peer(peer, "X-Last: 1") == (200, b"{}")


async def test_parallel_requests_each_get_their_own_answer(peer: Peer) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await peer.read(reader, writer):
            body = request.partition(b"\r\n\r\n")[2]
            await asyncio.sleep(random.uniform(0, 0.005))
            writer.write(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def client(number: int) -> None:
        for turn in range(10):
            body = b'{"model":"peer","n":"%d of %d"}' % (turn, number)
            assert await ask_peer(peer, body=body) == (200, body)

    peer.talk = talk
    await asyncio.gather(*(client(number) for number in range(20)))


# -------------------------------------------------------------------- forward: cut answers ----

CUT_BEFORE_THE_ANSWER = {  # what the backend says: how that ends; s3 is what nobody may quote
    "nothing": (b"", 502),
    "a reset": (RESET, 502),
    "silence": (HELD, 504),
    "half a head": (OK + b"X-A: s3", 502),
    "half a head and a reset": (OK + b"X-A: s3" + RESET, 502),
    "half a head and silence": (OK + b"X-A: s3" + HELD, 504),
    "another protocol": (b"SSH-2.0-s3\r\n", 502),
    "noise": (b"s3" * 9999, 502),
    "no status": (b"HTTP/1.1 s3\r\n\r\n", 502),
    "a line that is no header": (OK + b"s3\r\n\r\n", 502),
    "an endless header": (OK + b"X: " + b"s3" * 99_999 + b"\r\n\r\n", 502),
    "two lengths": (OK + b"Content-Length: 1\r\n" * 2 + b"\r\ns3", 502),
    "length and chunks": (OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\ns3", 502),
    "another protocol unasked": (
        b"HTTP/1.1 101 s3\r\nConnection: upgrade\r\nUpgrade: s3\r\n\r\n",
        502,
    ),
}
CUT_WITHIN_THE_ANSWER = {  # the head, then what follows it once the client has seen it
    "no byte of a known length": (SIZED, b"", 502),
    "half of a known length": (SIZED, b"half", 502),
    "a reset in a known length": (SIZED, RESET, 502),
    "chunks without the last one": (IN_CHUNKS, b"4\r\nhalf\r\n", 502),
    "half a chunk": (IN_CHUNKS, b"9\r\nhalf", 502),
    "a reset in chunks": (IN_CHUNKS, RESET, 502),
    "chunks that cease to be chunks": (IN_CHUNKS, b"4\r\nhalf\r\nx\r\n" + HELD, 502),
    "silence within chunks": (IN_CHUNKS, b"4\r\nhalf\r\n" + HELD, 504),
    "silence within a known length": (SIZED, b"half" + HELD, 504),
    "silence within what lasts until the end": (OLD + b"\r\n", b"half" + HELD, 504),
    "a reset of what lasts until the end": (OLD + b"\r\n", b"half" + RESET, 502),
}


@pytest.mark.parametrize(
    ("reply", "status"), CUT_BEFORE_THE_ANSWER.values(), ids=CUT_BEFORE_THE_ANSWER
)
async def test_backend_that_gives_no_answer_is_an_error_that_does_not_quote_it(
    impatient_wire: Raw, reply: bytes, status: int
) -> None:
    impatient_wire.reply = reply
    message = await exchange(impatient_wire.jano, post_bytes())
    assert refused(message) == status
    served = await impatient_wire.jano.logged("served", len(impatient_wire.jano.log("enqueued")))
    assert served["status"] == status
    told = [message.decode(), impatient_wire.jano.lines, await impatient_wire.jano.status()]
    assert "s3" not in json.dumps(told)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(
    ("head", "rest", "status"), CUT_WITHIN_THE_ANSWER.values(), ids=CUT_WITHIN_THE_ANSWER
)
async def test_answer_that_is_cut_looks_cut(
    impatient_wire: Raw, head: bytes, rest: bytes, status: int, version: str
) -> None:
    impatient_wire.reply = head + HELD
    answer = b""
    async with connected(impatient_wire.jano, post_bytes(version=version)) as (reader, _):
        backend = await event(impatient_wire.talks.get())
        await event(reader.readuntil(b"\r\n\r\n"))
        impatient_wire.say(backend, rest)
        with pytest.raises(ConnectionResetError):
            while piece := await event(reader.read(99)):
                answer += piece
    assert b"0\r\n\r\n" not in answer
    served = await impatient_wire.jano.logged("served", len(impatient_wire.jano.log("enqueued")))
    assert served["status"] == status


async def test_backend_that_ceases_to_speak_http_has_failed(either_wire: Raw) -> None:
    either_wire.reply = IN_CHUNKS + HELD
    async with connected(either_wire.jano, post_bytes()) as (reader, _):
        backend = await event(either_wire.talks.get())
        head = await event(reader.readuntil(b"\r\n\r\n"))
        either_wire.say(backend, b"x\r\n" + HELD)
        with pytest.raises(ConnectionResetError):
            await event(reader.read(-1))
    ids = re.findall("x-request-id: ([0-9]+)", head.decode())
    await either_wire.jano.logged("served", id=ids[0], status=502)


# ----------------------------------------------------- forward: slow and vanishing clients ----


@linux_only
async def test_client_that_does_not_read_holds_the_backend_back_and_is_cut_off(
    tmp_path: Path,
) -> None:
    async with running_pair(tmp_path, REQUEST_TIMEOUT_MS=500) as (backend, _):
        backend.reply = OLD + b"\r\n" + HELD
        before = backend.jano.memory("VmRSS")
        async with connected(backend.jano, post_bytes()):
            writer = await event(backend.talks.get())
            with pytest.raises((TimeoutError, ConnectionError)):  # held back at last
                for _ in range(320):  # 80 MB
                    writer.write(bytes(2**18))
                    await asyncio.wait_for(writer.drain(), 0.2)
            assert backend.jano.memory("VmRSS") < before + 20_000
            backend.reply = Raw.reply
            assert await event(backend.jano.ask("chat")) == (200, {})
            await backend.jano.logged("served", id="1", status=499, aborted=True)


@linux_only
async def test_clients_that_leave_without_reading_leave_no_body_behind(tmp_path: Path) -> None:
    async with running_pair(tmp_path) as (backend, _):
        backend.reply = OLD + b"\r\n" + HELD
        before = backend.jano.memory("VmRSS")
        body = b'{"model":"chat","x":"%b"}' % (b"x" * 2**25)
        for _ in range(3):
            async with connected(backend.jano, post_bytes(body)):
                writer = await event(backend.talks.get())
                with pytest.raises((TimeoutError, ConnectionError)):
                    while True:
                        writer.write(bytes(2**18))
                        await asyncio.wait_for(writer.drain(), 0.2)
            await backend.jano.all_over()
        assert backend.jano.memory("VmRSS") < before + 40_000


@pytest.fixture
def many_files() -> Iterator[Callable[[], None]]:
    """Call it to open many files. What was started before has a Mac's limit, 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def waiting_crowd(daemon: Running, sent: bytes, count: int, at_once: int) -> list[bytes]:
    """Send this so often, so many at once, and leave all of them; the answers that came before."""
    asks: list[asyncio.Task[bytes]] = []
    while len(asks) < count:
        batch = min(at_once, count - len(asks))
        asks += [asyncio.create_task(exchange(daemon, sent, 60)) for _ in range(batch)]
        known = 0
        while known < len(asks):
            status = await daemon.status()
            answered_ = [ask for ask in asks if ask.done()]
            known = status["inFlight"] + status["queueDepth"] + len(answered_)
    answers = [ask.result() for ask in asks if ask.done()]
    for ask in asks:
        ask.cancel()
    return answers


@linux_only
async def test_2000_waiting_requests_take_little_memory_and_no_more_may_wait(
    tmp_path: Path, chat: Backend, many_files: Callable[[], None]
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)], MAX_QUEUE=2000) as daemon:
        many_files()
        files, before = await daemon.all_over(), daemon.memory("VmHWM")
        sent = post_bytes(b'{"model":"chat","x":"%b"}' % (b"x" * 5000))
        answers = await waiting_crowd(daemon, sent, count=2003, at_once=100)
        assert [refused(answer) for answer in answers] == [503, 503]
        assert daemon.memory("VmHWM") < before + 80 * 1024
        await event(daemon.all_over(files))
        chat.answer = chat.plain
        assert (await daemon.ask("chat"))[0] == 200


@pytest.mark.soak
@linux_only
async def test_bodies_of_more_than_a_gigabyte_may_not_wait(tmp_path: Path, chat: Backend) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        before = daemon.memory("VmHWM")
        sent = post_bytes(b'{"model":"chat","x":"%b"}' % (b"x" * 4 * 10**7))
        answers = await waiting_crowd(daemon, sent, count=30, at_once=1)
        assert [refused(answer) for answer in answers] == [503] * 4
        assert daemon.memory("VmHWM") < before + 1500 * 1024


async def test_client_that_leaves_the_queue_is_never_forwarded(wire: Raw) -> None:
    wire.reply = HELD
    async with connected(wire.jano, post_bytes()) as (reader, _):
        backend = await event(wire.talks.get())
        arrived = len(wire.jano.log("enqueued"))
        left = len(wire.jano.log("client disconnected", status=499))
        async with connected(wire.jano, post_bytes()):
            await wire.jano.logged("enqueued", arrived + 1)
        await wire.jano.logged("client disconnected", left + 1, status=499)
        wire.say(backend, Raw.reply)
        await event(reader.read(-1))
    wire.reply = Raw.reply
    assert await wire.jano.ask("chat") == (200, {})
    assert len(wire.seen) == 2


async def test_half_an_upload_is_in_no_queue(wire: Raw) -> None:
    async with connected(wire.jano, post_bytes()[:-9]):
        assert await wire.jano.ask("chat") == (200, {})
        await wire.jano.shows(inFlight=0, queueDepth=0)


async def test_passthrough_model_waits_in_no_queue(wire: Raw) -> None:
    wire.reply = HELD
    async with connected(wire.jano, post_bytes()):
        await event(wire.talks.get())
        wire.reply = Raw.reply
        assert await wire.jano.ask("asr") == (200, {})


async def test_client_that_leaves_during_its_swap_is_never_forwarded(wire: Raw) -> None:
    ready, left = len(wire.jano.log("swap ready")), len(wire.jano.log("served", status=499))
    wire.server.close()
    async with connected(wire.jano, post_bytes()):
        await swap_requested(wire.jano)
    await wire.jano.logged("served", left + 1, status=499)  # for its turn, which was refused
    await wire.listen()
    await wire.jano.logged("swap ready", ready + 1)  # the swap is not the client's
    assert await wire.jano.ask("chat") == (200, {})
    assert len(wire.seen) == 1


async def swap_requested(daemon: Running) -> None:
    """Wait until one more swap to chat was requested than were over when this was called."""
    await daemon.logged("swap requested", len(daemon.log("swap ready")) + 1, model="chat")


@pytest.mark.parametrize("begun", [b"", OK + b"\r\nbegun"], ids=["before the answer", "within it"])
async def test_client_that_leaves_its_turn_ends_the_backends_work(wire: Raw, begun: bytes) -> None:
    wire.reply = begun + HELD
    files = await wire.jano.all_over()
    so_far = len(wire.jano.log("served", status=499, aborted=True))
    async with connected(wire.jano, post_bytes()) as (reader, _):
        backend = await event(wire.talks.get())
        if begun:
            await event(reader.readuntil(b"begun"))
    with contextlib.suppress(ConnectionResetError):
        await event(backend.wait_closed())
    await wire.jano.logged("served", so_far + 1, status=499, aborted=True)
    await event(wire.jano.all_over(files))


async def test_client_that_leaves_while_its_body_is_sent_ends_that(peer: Peer) -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        began.set()
        await left.wait()
        with pytest.raises(asyncio.IncompleteReadError):
            await reader.readexactly(len(body))
        gone.set()

    peer.talk = talk
    began, left = asyncio.Event(), asyncio.Event()
    body = b'{"model":"peer","x":"%b"}' % (b"x" * 2**25)
    async with connected(peer.jano, post_bytes(body)):
        await event(began.wait())
    await peer.jano.logged("served", model="peer", status=499, aborted=True)
    left.set()
    await event(gone.wait())


async def test_300_clients_that_vanish_at_any_point_leave_nothing_behind(wire: Raw) -> None:
    dice = random.Random(300)

    async def vanish() -> None:
        body = b'{"model":"%b"}' % dice.choice([b"chat", b"asr", b"no"])
        sent = post_bytes(body, "Connection: keep-alive") * dice.randint(1, 2)
        cut = dice.choice([None, None, dice.randrange(len(sent))])
        async with connected(wire.jano, sent[:cut]) as (reader, _):
            if not cut and dice.random() < 0.5:  # else it leaves while it waits
                await event(reader.read(dice.choice([1, 1000, 10**5])))

    wire.reply = OLD + b"\r\n" + bytes(3 * 10**5)
    files = await wire.jano.all_over()
    await asyncio.gather(*(vanish() for _ in range(300)))
    await event(wire.jano.all_over(files))
    assert len(await exchange(wire.jano, post_bytes())) > 3 * 10**5


KEPT_CHAT = post_bytes(b'{"model":"chat"}', "Connection: keep-alive")
KEPT_ASR = post_bytes(b'{"model":"asr"}', "Connection: keep-alive")


@linux_only
@pytest.mark.parametrize(
    ("sent", "reply", "in_flight", "waiting"),
    [
        pytest.param(KEPT_ASR[:-9], Raw.reply, 0, 0, id="within their bodies"),
        pytest.param(KEPT_ASR[:20], Raw.reply, 0, 0, id="within their heads"),
        pytest.param(b"", Raw.reply, 0, 0, id="before a byte"),
        pytest.param(KEPT_CHAT, HELD, 1, 299, id="in the queue"),
        pytest.param(KEPT_CHAT * 2, HELD, 1, 299, id="in the queue with one more to come"),
        pytest.param(KEPT_ASR, HELD, 300, 0, id="before the answer"),
        pytest.param(KEPT_ASR * 2, HELD, 300, 0, id="before the answer with one more to come"),
        pytest.param(KEPT_ASR, OK + b"\r\nbegun" + HELD, 300, 0, id="within the answer"),
    ],
)
async def test_300_clients_that_leave_at_the_same_point_leave_nothing_behind(
    wire: Raw, sent: bytes, reply: bytes, in_flight: int, waiting: int
) -> None:
    daemon = wire.jano
    wire.reply = reply
    files, threads = await daemon.all_over(), len(daemon.open("task"))
    async with contextlib.AsyncExitStack() as clients:
        for _ in range(300):
            reader, _ = await clients.enter_async_context(connected(daemon, sent))
            if b"begun" in reply:
                await event(reader.readuntil(b"begun"))
        await event(crowd_is(daemon, in_flight, waiting, files + 300))
    await event(daemon.all_over(files))
    wire.reply = Raw.reply
    assert await event(daemon.ask("chat")) == (200, {})
    await event(until(lambda: len(daemon.open("task")) <= threads))


@linux_only
async def test_300_clients_that_leave_during_the_swap_leave_nothing_behind(
    wire: Raw,
) -> None:
    daemon = wire.jano
    assert await event(daemon.ask("chat")) == (200, {})
    files = await daemon.all_over()
    wire.server.close()
    async with contextlib.AsyncExitStack() as clients:
        for _ in range(300):
            await clients.enter_async_context(connected(daemon, KEPT_CHAT))
        await event(crowd_is(daemon, 0, 300, files + 300))
    await wire.listen()  # the swap goes on
    await event(daemon.all_over(files))
    assert await event(daemon.ask("chat")) == (200, {})


async def crowd_is(daemon: Running, in_flight: int, waiting: int, files: int) -> None:
    """Wait until so many requests run and wait, and so many files are open."""
    wanted = (in_flight, waiting)
    while True:
        status = await daemon.status()
        found = (status["inFlight"], status["queueDepth"])
        if found == wanted and len(daemon.open("fd")) >= files:
            return


# ------------------------------------------------- forward: backends that refuse or differ ----


async def test_backend_that_refuses_the_connection_is_swapped_in_and_asked_again(
    wire: Raw,
) -> None:
    swaps = (await wire.jano.status())["swapsTotal"]
    wire.server.close()
    asking = asyncio.create_task(exchange(wire.jano, post_bytes()))
    await swap_requested(wire.jano)
    await wire.listen()
    assert answered(await asking).status == 200
    assert len(wire.seen) == 1
    await wire.jano.shows(swapsTotal=swaps + 1)


async def test_backend_that_refuses_after_its_swap_too_is_asked_no_third_time(wire: Raw) -> None:
    swaps = (await wire.jano.status())["swapsTotal"]
    wire.ready_once = True
    wire.server.close()
    asking = asyncio.create_task(exchange(wire.jano, post_bytes()))
    await swap_requested(wire.jano)
    await wire.listen()
    assert refused(await asking) == 502
    assert wire.seen == []
    await wire.jano.shows(swapsTotal=swaps + 1)


async def test_passthrough_backend_that_refuses_is_a_502_at_once(wire: Raw) -> None:
    so_far = len(calls(wire.jano.folder))
    wire.server.close()
    status, answer = await wire.jano.ask("asr")
    assert (status, answer["error"]["code"]) == (502, "backend_unreachable")
    assert len(calls(wire.jano.folder)) == so_far


@contextlib.asynccontextmanager
async def tls_backend(folder: Path, name: str) -> AsyncIterator[tuple[int, Path]]:
    """A backend with a certificate for this name that it signed itself: its port, that file.

    A request with X-Die ends its connection before the body has come.
    """
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
    make += ["-pkeyopt", "ec_paramgen_curve:prime256v1"]  # made sooner than one of RSA
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    run = await asyncio.create_subprocess_exec(
        *make, *names, *files, stderr=asyncio.subprocess.DEVNULL
    )
    assert await event(run.wait()) == 0
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while b"X-Die" not in (head := await reader.readuntil(b"\r\n\r\n")):
                length = re.search(rb"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(EMPTY_OBJECT)
        writer.transport.abort()

    server = await asyncio.start_server(talk, "localhost", 0, family=socket.AF_INET, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], certificate


async def test_backend_may_speak_tls(tmp_path: Path) -> None:
    async with tls_backend(tmp_path, "localhost") as (port, certificate):
        models = [{"name": "chat", "url": f"https://localhost:{port}"}]
        async with running_jano(tmp_path, models, SSL_CERT_FILE=certificate) as daemon:
            assert await daemon.ask("chat") == (200, {})
            assert await daemon.ask("chat") == (200, {})
            body = b'{"model":"chat","x":"%b"}' % (b"x" * 3 * 2**20)
            assert refused(await exchange(daemon, post_bytes(body, "X-Die: 1"))) == 502
            assert await daemon.ask("chat") == (200, {})


@pytest.mark.parametrize(
    ("host", "address"),
    [("[::1]", "::1"), ("localhost", "127.0.0.1")],  # a Mac's localhost is ::1 first
)
async def test_backend_may_have_an_ipv6_address_or_a_name(
    shared_jano: Shared, chat: Backend, host: str, address: str
) -> None:
    server: Any = chat.runner.server
    listener = await asyncio.get_running_loop().create_server(server, address, 0)
    url = f"http://{host}:{listener.sockets[0].getsockname()[1]}"
    async with listener, shared_jano([entry(chat, url=url)]) as daemon:
        assert await daemon.ask("chat") == (200, {"answered_by": "chat"})


# ------------------------------------------------------------ forward: slow to the backend ----


async def test_backend_that_takes_no_bytes_is_a_504_and_others_are_served(
    tmp_path: Path, code: Backend
) -> None:
    """The kernel accepts and buffers for a server that does not read; 8 MB fit no buffer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"GET " in await reader.readuntil(b"\r\n\r\n"):
            writer.write(EMPTY_OBJECT)
        else:
            await asyncio.Event().wait()

    full = Peer()
    full.talk = talk
    await full.listen()
    models = [{"name": "chat", "url": full.url}, entry(code)]
    script = swap_script(tmp_path, status='echo "chat: loaded"')
    async with running_jano(tmp_path, models, script, REQUEST_TIMEOUT_MS=300) as daemon:
        await daemon.logged("worker started", loaded="chat")
        body = b'{"model":"chat","x":"%b"}' % (b"x" * 8 * 2**20)
        begin = time.monotonic()
        asking = asyncio.create_task(exchange(daemon, post_bytes(body)))
        await daemon.logged("enqueued")
        other = asyncio.create_task(daemon.ask("code"))
        assert refused(await event(asking)) == 504
        assert (await event(other))[0] == 200
        assert time.monotonic() - begin < 5
    full.server.close()
    await full.forget()


async def test_sending_and_the_wait_for_the_answer_have_one_deadline(impatient_peer: Peer) -> None:
    """Each step is in time, and all of them are not."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(30):
            await reader.readexactly(2**20)
            await asyncio.sleep(0.1)
        writer.write(EMPTY_OBJECT)

    impatient_peer.talk = talk
    body = b'{"model":"peer","x":"%b"}' % (b"x" * 30 * 2**20)
    begin = time.monotonic()
    assert refused(await exchange(impatient_peer.jano, post_bytes(body))) == 504
    assert time.monotonic() - begin < 2


async def test_head_that_comes_in_drops_has_the_same_deadline(impatient_peer: Peer) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await impatient_peer.read(reader, writer)
        for number in range(len(EMPTY_OBJECT)):
            writer.write(EMPTY_OBJECT[number : number + 1])
            await asyncio.sleep(0.1)

    impatient_peer.talk = talk
    begin = time.monotonic()
    assert refused(await exchange(impatient_peer.jano, post_bytes(PEER))) == 504
    assert time.monotonic() - begin < 2


async def test_answer_may_take_longer_than_that_once_it_has_begun(impatient_peer: Peer) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await impatient_peer.read(reader, writer)
        writer.write(IN_CHUNKS)
        for _ in range(5):
            await asyncio.sleep(0.06)
            writer.write(b"1\r\nx\r\n")
        writer.write(b"0\r\n\r\n")

    impatient_peer.talk = talk
    assert await ask_peer(impatient_peer) == (200, b"xxxxx")


# --------------------------------------------------------------------- forward: heartbeats ----

HEARTBEAT = 0.03  # seconds
ROUTES_WITH_HEARTBEATS = {  # what a stream of this route gets while it waits
    "/v1/chat/completions": b": waiting\n\n",
    "/v1/completions": b": waiting\n\n",
    "/v1/messages": b": waiting\n\n",
    "/v1/responses": b"event: keepalive\n",
}
STREAM = b"data: [DONE]\n\n"


class Slow(NamedTuple):
    """A jano with frequent heartbeats, and its backend, which answers as the test tells it."""

    jano: Running
    backend: Backend


@pytest.fixture(scope="module")
async def shared_slow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Slow]:
    script_folder = tmp_path_factory.mktemp("slow")
    async with running_backend("chat") as backend:
        models = [
            entry(backend, aliases=["org/api/messages"]),
            entry(backend, name="asr", passthrough=True),
            entry(backend, name="broken", group="broken"),
        ]
        fails = f"if [ $1 = broken ]; then sleep {3 * HEARTBEAT}; exit 1; fi"
        status = 'echo "chat: loaded"; echo "broken: stopped"'
        script = swap_script(script_folder, fails, status=status)
        settings: dict[str, Any] = {
            "HEARTBEAT_MS": round(HEARTBEAT * 1000),
            "SWAP_FAILURE_LIMIT": 1000,
            "JANO_CORS_ORIGINS": "*",
        }
        async with running_jano(script_folder, models, script, **settings) as daemon:
            yield Slow(daemon, backend)


@pytest.fixture
async def slow(shared_slow: Slow) -> AsyncIterator[Slow]:
    shared_slow.backend.release = asyncio.Event()
    shared_slow.backend.arrived = asyncio.Queue()
    yield shared_slow
    shared_slow.backend.release.set()
    await event(shared_slow.jano.all_over())


def later(backend: Backend, answer: Any) -> Any:
    """This answer, once the test has set backend.release."""

    async def wait(request: web.Request) -> web.StreamResponse:
        await backend.release.wait()
        response: web.StreamResponse = await answer(request)
        return response

    return wait


def stream_bytes(path: str, *headers: str, **fields: Any) -> bytes:
    """A request for a stream of this route, for the model `chat` unless the fields say not."""
    body = json.dumps({"model": "chat", "stream": True, **fields}).encode()
    return post_bytes(body, "Content-Type: application/json", *headers, path=path)


EVENT_STREAM = {"Content-Type": "text/event-stream"}


@pytest.mark.parametrize(
    ("path", "heartbeat"), ROUTES_WITH_HEARTBEATS.items(), ids=ROUTES_WITH_HEARTBEATS
)
async def test_stream_that_waits_for_its_turn_gets_heartbeats(
    slow: Slow, path: str, heartbeat: bytes
) -> None:
    backend = slow.backend
    backend.answer = later(backend, says(STREAM, headers=EVENT_STREAM))
    before = asyncio.create_task(slow.jano.post("chat"))
    await event(backend.arrived.get())
    async with connected(slow.jano, stream_bytes(path)) as (reader, _):
        head = await event(reader.readuntil(b"\r\n\r\n"))
        await event(reader.readuntil(heartbeat))
        await event(reader.readuntil(heartbeat))
        backend.release.set()
        rest = await event(reader.read(-1))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-type: text/event-stream\r\n" in head.lower()
    assert STREAM in rest
    assert (await before).status == 200


@pytest.mark.parametrize("model", ["chat", "asr"])
@pytest.mark.parametrize(
    ("path", "heartbeat"), ROUTES_WITH_HEARTBEATS.items(), ids=ROUTES_WITH_HEARTBEATS
)
async def test_stream_whose_backend_is_silent_before_its_head_gets_heartbeats(
    slow: Slow, path: str, heartbeat: bytes, model: str
) -> None:
    """As it is while it reads a long prompt."""
    backend = slow.backend
    backend.answer = later(backend, says(STREAM, headers=EVENT_STREAM))
    async with connected(slow.jano, stream_bytes(path, model=model)) as (reader, _):
        await event(reader.readuntil(heartbeat))
        await event(reader.readuntil(heartbeat))
        backend.release.set()
        assert STREAM in await event(reader.read(-1))


def head_first(backend: Backend, **headers: str) -> Any:
    """An answer whose head comes at once, and whose body once the test has set backend.release."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await backend.release.wait()
        await response.write(STREAM)
        return response

    return answer


@pytest.mark.parametrize(
    ("path", "heartbeat"), ROUTES_WITH_HEARTBEATS.items(), ids=ROUTES_WITH_HEARTBEATS
)
async def test_stream_whose_backend_is_silent_after_its_head_gets_heartbeats(
    slow: Slow, path: str, heartbeat: bytes
) -> None:
    """As vLLM is, which answers before it has read the prompt."""
    backend = slow.backend
    backend.answer = head_first(backend, **EVENT_STREAM, **{"X-A": "1"})
    async with connected(slow.jano, stream_bytes(path)) as (reader, _):
        assert b"X-A: 1" in await event(reader.readuntil(b"\r\n\r\n"))
        await event(reader.readuntil(heartbeat))
        await event(reader.readuntil(heartbeat))
        backend.release.set()
        assert (await event(reader.read(-1))).endswith(b"\r\n%b\r\n0\r\n\r\n" % STREAM)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/json"},
        {**EVENT_STREAM, "Content-Encoding": "zstd"},
        {**EVENT_STREAM, "Content-Length": str(len(STREAM))},
    ],
    ids=["no stream", "encoded", "of known length"],
)
async def test_answer_that_no_heartbeat_fits_into_gets_none(
    slow: Slow, headers: dict[str, str]
) -> None:
    slow.backend.answer = head_first(slow.backend, **headers)
    async with connected(slow.jano, stream_bytes("/v1/chat/completions")) as (reader, _):
        await event(reader.readuntil(b"\r\n\r\n"))
        await nothing_comes(reader, 2.5 * HEARTBEAT)


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "Text/Event-Stream"}, {**EVENT_STREAM, "Content-Encoding": "Identity"}],
)
async def test_stream_behind_heartbeats_may_be_called_one_in_capitals(
    slow: Slow, headers: dict[str, str]
) -> None:
    slow.backend.answer = later(slow.backend, says(STREAM, headers=headers))
    async with connected(slow.jano, stream_bytes("/v1/chat/completions")) as (reader, _):
        await event(reader.readuntil(b": waiting\n\n"))
        slow.backend.release.set()
        assert STREAM in await event(reader.read(-1))


async def test_keepalive_events_are_whole_and_say_their_type(slow: Slow) -> None:
    slow.backend.answer = later(slow.backend, says(STREAM, headers=EVENT_STREAM))
    async with connected(slow.jano, stream_bytes("/v1/responses")) as (reader, _):
        await event(reader.readuntil(b"\r\n\r\n"))
        message = await event(reader.readuntil(b"\n\n"))
        slow.backend.release.set()
    data = re.search(rb"event: keepalive\ndata: (\{.*\})\n\n", message)
    assert data
    assert json.loads(data[1])["type"] == "keepalive"


NO_HEARTBEATS = [
    pytest.param("/v1/audio/speech", {"stream": True}, "audio/pcm", id="audio"),
    pytest.param("/v1/embeddings", {"stream": True}, "application/json", id="embeddings"),
    pytest.param("/v1/images/generations", {"stream": True}, "application/json", id="images"),
    pytest.param("/api/chat", {"stream": True}, "application/x-ndjson", id="Ollama's lines"),
    pytest.param("/v1/messages/count_tokens", {"stream": True}, "application/json", id="tokens"),
    pytest.param("/v1/x", {"stream": True}, "text/plain", id="an unknown route"),
    pytest.param("/v1/chat/completions", {"stream": False}, "application/json", id="no stream"),
    pytest.param("/v1/chat/completions", {"stream": "yes"}, "application/json", id="odd stream"),
    pytest.param("/v1/responses", {"stream": None}, "application/json", id="null"),
]


@pytest.mark.parametrize("waits_for", ["its turn", "its backend"])
@pytest.mark.parametrize(("path", "fields", "kind"), NO_HEARTBEATS)
async def test_answer_of_another_kind_comes_late_and_as_it_is(
    slow: Slow, path: str, fields: dict[str, Any], kind: str, waits_for: str
) -> None:
    backend = slow.backend
    backend.answer = later(backend, says(b"\0\xff {}", headers={"Content-Type": kind}))
    before = []
    if waits_for == "its turn":
        before = await slow.jano.queued("chat")
        await event(backend.arrived.get())
    async with connected(slow.jano, stream_bytes(path, **fields)) as (reader, _):
        await nothing_comes(reader, 2.5 * HEARTBEAT)
        backend.release.set()
        answer = answered(await event(reader.read(-1)))
    assert (answer.status, answer.read()) == (200, b"\0\xff {}")
    assert answer.headers["Content-Type"] == kind
    assert answer.headers["Server-Timing"]
    await statuses(before)


async def test_error_before_the_first_heartbeat_has_its_own_status(slow: Slow) -> None:
    slow.backend.answer = says(b'{"error": {"message": "too long"}}', status=400)
    answer = answered(await exchange(slow.jano, stream_bytes("/v1/chat/completions")))
    assert (answer.status, answer.read()) == (400, b'{"error": {"message": "too long"}}')


async def after_heartbeats(slow: Slow, sent: bytes, answer: Any = None) -> list[bytes]:
    """The events that follow the heartbeats of this request, if its answer comes after some."""
    if answer:
        slow.backend.answer = later(slow.backend, answer)
    async with connected(slow.jano, sent) as (reader, _):
        message = await event(reader.readuntil(b"\r\n\r\n"))
        message += await event(reader.readuntil(b"\n\n"))
        slow.backend.release.set()
        message += await event(reader.read(-1))
    events = answered(message).read().split(b"\n\n")
    assert events.pop() == b"", "the last event is not whole"
    return [event_ for event_ in events if not event_.startswith((b": ", b"event: keepalive"))]


def event_of(message: bytes) -> tuple[str, dict[str, Any]]:
    """The name (or "") and the JSON of an event."""
    name = re.search(rb"^event: ?(.*)$", message, re.MULTILINE)
    data = re.search(rb"^data: ?(.*)$", message, re.MULTILINE)
    assert data, message
    return name[1].decode() if name else "", dict(json.loads(data[1]))


REFUSALS = {
    "OpenAI": b'{"error": {"message": "too long", "type": "invalid_request_error"}}',
    "Anthropic": b'{"type": "error", "error": {"type": "x", "message": "too long"}}',
    "vLLM": b'{"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}',
    "FastAPI": b'{"detail": "too long"}',
    "FastAPI, a list": b'{"detail": [{"loc": ["body"], "msg": "too long"}]}',
    "mlx_lm": b'{"error": "too long"}',
    "text": b"too long",
    "deeply nested": b'["too long", ' + b"[" * 50_000,
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_refusal_after_heartbeats_is_told_in_the_backends_words(
    slow: Slow, path: str, refusal: bytes
) -> None:
    [told] = await after_heartbeats(slow, stream_bytes(path), says(refusal, status=400))
    assert "too long" in event_of(told)[1]["error"]["message"]


AFTER_HEARTBEATS = [
    pytest.param("/v1/chat/completions", [], "OpenAI", id="chat"),
    pytest.param("/v1/completions", [], "OpenAI", id="completions"),
    pytest.param("/v1/messages", [], "Anthropic", id="messages"),
    pytest.param("/v1/completions", ["anthropic-version: 1"], "Anthropic", id="Anthropic's header"),
    pytest.param("/v1/responses", [], "responses", id="responses"),
]


def check_error_event(told: bytes, dialect: str, words: str) -> None:
    """This event must be an error of this dialect, with these words in its message."""
    name, data = event_of(told)
    assert words in data["error"]["message"]
    if dialect == "OpenAI":
        assert name == ""
        assert {"message", "type", "code"} <= data["error"].keys()
    elif dialect == "Anthropic":
        assert (name, data["type"]) == ("error", "error")
        assert data["error"]["type"]
    else:
        assert (name, data["type"]) == ("response.failed", "response.failed")
        assert data["response"]["status"] == "failed"
        assert words in data["response"]["error"]["message"]
        assert data["response"]["error"]["code"]


@pytest.mark.parametrize(("path", "headers", "dialect"), AFTER_HEARTBEATS)
async def test_refusal_after_heartbeats_is_told_in_the_routes_dialect(
    slow: Slow, path: str, headers: list[str], dialect: str
) -> None:
    sent = stream_bytes(path, *headers)
    [told] = await after_heartbeats(slow, sent, says(REFUSALS["vLLM"], status=400))
    check_error_event(told, dialect, "too long")


@pytest.mark.parametrize(("path", "headers", "dialect"), AFTER_HEARTBEATS)
async def test_swap_that_fails_after_heartbeats_is_told_in_the_routes_dialect(
    slow: Slow, path: str, headers: list[str], dialect: str
) -> None:
    [told] = await after_heartbeats(slow, stream_bytes(path, *headers, model="broken"))
    check_error_event(told, dialect, 'swap to "broken" failed')


async def test_models_name_does_not_tell_the_dialect_of_an_event(slow: Slow) -> None:
    sent = stream_bytes("/upstream/org/api/messages/v1/chat/completions")
    [told] = await after_heartbeats(slow, sent, says(REFUSALS["vLLM"], status=400))
    check_error_event(told, "OpenAI", "too long")


async def test_backend_that_dies_after_heartbeats_is_told_as_an_error(slow: Slow) -> None:
    async def die(request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.abort()
        return web.Response()

    [told] = await after_heartbeats(slow, stream_bytes("/v1/chat/completions"), die)
    assert "died" in event_of(told)[1]["error"]["message"]


async def test_answer_that_is_no_stream_after_heartbeats_is_told_as_an_error(slow: Slow) -> None:
    answer = says(b'{"choices": []}')
    [told] = await after_heartbeats(slow, stream_bytes("/v1/chat/completions"), answer)
    assert event_of(told)[1]["error"]["message"]


async def test_gzip_sent_unasked_after_a_heartbeat_does_not_reach_the_client(slow: Slow) -> None:
    """The head is out and says nothing of gzip; so it is plain text, or an error."""
    headers = EVENT_STREAM | {"Content-Encoding": "gzip"}
    answer = says(gzip.compress(STREAM), headers=headers)
    [told] = await after_heartbeats(slow, stream_bytes("/v1/chat/completions"), answer)
    assert told + b"\n\n" == STREAM or event_of(told)[1]["error"]["message"]


async def test_refusal_that_says_it_is_not_packed_is_told_in_the_backends_words(slow: Slow) -> None:
    answer = says(REFUSALS["vLLM"], status=400, headers={"Content-Encoding": "Identity"})
    [told] = await after_heartbeats(slow, stream_bytes("/v1/chat/completions"), answer)
    assert "too long" in event_of(told)[1]["error"]["message"]


async def test_refusal_in_gzip_after_a_heartbeat_is_an_error_too(slow: Slow) -> None:
    packed = gzip.compress(REFUSALS["OpenAI"])
    answer = says(packed, status=400, headers={"Content-Encoding": "gzip"})
    [told] = await after_heartbeats(slow, stream_bytes("/v1/chat/completions"), answer)
    assert event_of(told)[1]["error"]["message"]


async def test_backend_is_not_asked_for_an_encoding_once_a_heartbeat_is_out(slow: Slow) -> None:
    backend = slow.backend
    backend.answer = later(backend, says(STREAM, headers=EVENT_STREAM))
    before = asyncio.create_task(slow.jano.post("chat"))
    await event(backend.arrived.get())
    sent = stream_bytes("/v1/chat/completions", "Accept-Encoding: gzip")
    assert await after_heartbeats(slow, sent) == [STREAM.strip()]
    assert "Accept-Encoding" not in backend.requests[-1].headers
    await before


async def test_client_that_leaves_between_heartbeats_ends_the_backends_work(slow: Slow) -> None:
    backend = slow.backend
    backend.answer = later(backend, says(STREAM, headers=EVENT_STREAM))
    so_far = len(slow.jano.log("served", status=499))
    async with connected(slow.jano, stream_bytes("/v1/chat/completions")) as (reader, _):
        await event(reader.readuntil(b": waiting"))
    await slow.jano.logged("served", so_far + 1, status=499, aborted=True)
    await slow.jano.shows(inFlight=0)


async def test_answer_of_a_waiting_stream_is_cut_visibly_if_the_backend_dies(slow: Slow) -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=EVENT_STREAM)
        await response.prepare(request)
        await response.write(b"data: half\n\n")
        await slow.jano.status()  # so that it is read before the end
        assert request.transport
        request.transport.abort()
        return response

    slow.backend.answer = later(slow.backend, half)
    async with connected(slow.jano, stream_bytes("/v1/chat/completions")) as (reader, _):
        await event(reader.readuntil(b": waiting\n\n"))
        slow.backend.release.set()
        with pytest.raises(ConnectionResetError):
            await event(reader.read(-1))


async def test_no_heartbeats_come_where_they_are_switched_off(
    tmp_path: Path, chat: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)], HEARTBEAT_MS=0) as daemon:
        async with connected(daemon, stream_bytes("/v1/chat/completions")) as (reader, _):
            await nothing_comes(reader, 0.1)
            chat.release.set()
            assert answered(await event(reader.read(-1))).status == 200


# ----------------------------------------------------------------- helpers: the front door ----


async def echo(request: web.Request) -> web.Response:
    """Answers with the request as the backend got it."""
    body = await request.read()
    seen = {
        "line": f"{request.method} {request.raw_path}",
        "headers": [[name.lower(), value] for name, value in request.headers.items()],
        "body": body.decode("latin-1"),
    }
    return web.json_response(seen, headers={"Vary": "Accept"})


async def echo_or_health(request: web.Request) -> web.Response:
    return web.Response() if request.path.endswith("/health") else await echo(request)


class Door(NamedTuple):
    """A jano and the backend behind it, which echoes what it gets."""

    jano: Running
    backend: Backend

    async def ask(
        self, method: str, path: str, *headers: str, body: bytes = b""
    ) -> http.client.HTTPResponse:
        return await asked(self.jano, method, path, *headers, body=body)

    async def seen(
        self, method: str, path: str, *headers: str, body: bytes = b""
    ) -> dict[str, Any]:
        """What the backend got of this request: line, headers and body."""
        answer = await self.ask(method, path, *headers, body=body)
        assert answer.status == 200, answer.read()
        return dict(json.loads(answer.read()))


@contextlib.asynccontextmanager
async def running_door(folder: Path, **settings: Any) -> AsyncIterator[Door]:
    """A jano with several models, of which `code` and `down` are not loaded."""
    async with running_backend("chat") as backend:
        backend.answer, backend.look = echo, echo_or_health
        url = backend.url
        models = [
            entry(backend, aliases=["Fast"]),
            entry(backend, name="code"),
            entry(
                backend,
                name="asr",
                url=f"{url}/asr/",
                aliases=["Ünï/8b"],
                endpoints=["audio/transcriptions", "/v1/rerank/"],
                passthrough=True,
            ),
            entry(
                backend,
                name="up",
                url=f"{url}/u/p/v1/",
                upstream_model="org/Ä-7B",
                passthrough=True,
            ),
            entry(backend, name="a/b:7b", url=f"{url}/slash", passthrough=True),
        ]
        script = swap_script(folder, "exit 1", status='echo "chat: loaded"')
        async with running_jano(folder, models, script, **settings) as daemon:
            await daemon.logged("worker started")
            yield Door(daemon, backend)
            assert calls(folder) == []  # nothing here may swap


@pytest.fixture(scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    async with running_door(tmp_path_factory.mktemp("door"), MAX_BODY_MB=12) as open_door:
        yield open_door


@pytest.fixture(scope="module")
async def keyed_door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    settings = {"JANO_API_KEY": "k", "JANO_CORS_ORIGINS": "https://a.example, app://b"}
    async with running_door(tmp_path_factory.mktemp("keyed"), **settings) as locked_door:
        yield locked_door


ASK = b'{"model": "chat"}'


# ----------------------------------------------------------- front door: jano's own routes ----

HEALTH_ROUTES = ["/health", "/v1/health", "/healthz", "/readyz"]
OWN_ROUTES = [
    *HEALTH_ROUTES,
    "/",
    "/status",
    "/usage",
    "/metrics",
    "/models",
    "/v1/models",
    "/v1/models/chat",
    "/api/version",
    "/api/tags",
    "/api/ps",
]


@pytest.mark.parametrize("path", OWN_ROUTES)
async def test_own_route_answers_get_and_head_alike(door: Door, path: str) -> None:
    get = await door.ask("GET", path)
    head = await door.ask("HEAD", path)
    assert (get.status, head.status) == (200, 200)
    assert get.headers["Content-Type"] == head.headers["Content-Type"]
    assert get.headers["Server"].startswith("jano/")
    assert get.read()


async def test_head_has_no_body(door: Door) -> None:
    message = await exchange(door.jano, request_bytes("HEAD", "/status"))
    assert message.endswith(b"\r\n\r\n")
    assert message.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize("path", [*OWN_ROUTES, "/none", "/v1/chat/completions"])
async def test_options_tells_the_methods(door: Door, path: str) -> None:
    answer = await door.ask("OPTIONS", path)
    assert answer.status == 204
    assert {"GET", "HEAD", "POST", "OPTIONS"} <= set(answer.headers["Allow"].split(", "))


@pytest.mark.parametrize("path", OWN_ROUTES)
async def test_own_route_takes_no_post(door: Door, path: str) -> None:
    answer = await door.ask("POST", path, body=ASK)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    assert "error" in json.loads(answer.read())


@pytest.mark.parametrize("path", ["/none", "//", "/v1/chat/completions", "/%0a"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_unknown_path_is_a_404(door: Door, method: str, path: str) -> None:
    answer = await door.ask(method, path)
    assert answer.status == 404
    assert answer.headers["Content-Type"].startswith("application/json")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE"])
async def test_other_method_that_names_no_model_is_a_405(door: Door, method: str) -> None:
    answer = await door.ask(method, "/none")
    assert "POST" in answer.headers["Allow"]
    assert error_of(answer) == (405, "method_not_allowed")


@pytest.mark.parametrize("headers", [[], ["X-Model: chat"]])
async def test_connect_is_refused(door: Door, headers: list[str]) -> None:
    message = await exchange(door.jano, request_bytes("CONNECT", "h:1", *headers))
    assert refused(message) in (400, 404, 405)


async def test_address_without_a_path_reaches_the_backend_as_the_root(door: Door) -> None:
    seen = await door.seen("GET", "http://localhost?model=chat")
    assert seen["line"] == "GET /?model=chat"


@pytest.mark.parametrize("path", ["/v1/models/none", "/v1/models/"])
async def test_unknown_model_of_the_list_is_a_404(door: Door, path: str) -> None:
    answer = await door.ask("GET", path)
    assert error_of(answer)[0] == 404


@pytest.mark.parametrize("limit", ["-1", "1e9", "x", "1" * 99])
async def test_limit_of_usage_is_a_whole_number(door: Door, limit: str) -> None:
    assert error_of(await door.ask("GET", f"/usage?limit={limit}")) == (400, "invalid_limit")


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/realtime?model=chat", "/upstream/chat/v1/realtime"]
)
@pytest.mark.parametrize("spelling", ["websocket", "WebSocket"])
async def test_websocket_upgrade_is_a_426(door: Door, path: str, spelling: str) -> None:
    """With it Codex falls back to HTTP at its first try, with 404 at its seventh."""
    headers = [
        "Connection: Upgrade",
        f"Upgrade: {spelling}",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    assert error_of(await door.ask("GET", path, *headers))[0] == 426


# ----------------------------------------------------------- front door: unusable requests ----


@pytest.mark.parametrize(
    "body",
    [
        b" ",
        b"null",
        b"[]",
        b"7",
        b'"chat"',
        b"{",
        b"\xff",
        b"\0",
        ASK + b" x",
        b"[" * 100_000,
        b'{"model": ' * 100_000,
        b'{"model": "chat", "n": ' + b"9" * 5000 + b"}",
        *(
            b'{"model":"chat","x":%b%b' % (end, b"[" * 2**20)
            for end in (b"", b'"', b'"\\"', b"0}", b"]]", b'"\\\\"}')
        ),
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_body_that_is_no_json_object_is_a_400(door: Door, body: bytes) -> None:
    assert error_of(await door.ask("POST", "/x", body=body)) == (400, "invalid_json")


async def test_endpoint_excuses_no_body_that_is_no_json_object(door: Door) -> None:
    assert error_of(await door.ask("POST", "/rerank", body=b"[]")) == (400, "invalid_json")


async def test_old_client_without_a_body_gets_a_400(door: Door) -> None:
    message = await exchange(door.jano, b"POST /x HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert refused(message) == 400


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip", "deflate"])
async def test_body_that_cannot_be_unpacked_is_a_400(door: Door, coding: str) -> None:
    answer = await door.ask("POST", "/x", f"Content-Encoding: {coding}", body=ASK)
    assert error_of(answer) == (400, "invalid_body")


@pytest.mark.parametrize(
    "value",
    [b'"none"', b'["chat"]', b"1e999", b"9" * 4000, rb'"\ud800\n"', b'"chat\xff"', b"7", b"true"],
    ids=lambda value: repr(value[:20]),
)
async def test_unknown_model_is_a_400_that_says_which_are_accepted(
    door: Door, value: bytes
) -> None:
    answer = await door.ask("POST", "/x", body=b'{"model": %b}' % value)
    payload = json.loads(answer.read())
    assert answer.status == 400
    assert payload["error"]["code"] == "model_not_found"
    assert payload["error"]["param"] == "model"
    assert payload["accepted"] == ["chat", "Fast", "code", "asr", "Ünï/8b", "up", "a/b:7b"]


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/x", [], b"{}"),
        ("/x", [], b'{"model": null}'),
        ("/x", [], b'{"model": ""}'),
        ("/x?model=", [], b"{}"),
        ("/x", ["X-Model:"], b"{}"),
        ("/rerank/x", [], b"{}"),
        ("/x?model=no", [], b"{}"),
        ("/x", ["X-Model: no"], b"{}"),
        ("/x?model=asr", ["X-Model: asr"], b'{"model":"no"}'),
        ("/upstream/no/x", [], b"{}"),
        pytest.param("/upstream/" + "%41/" * 15_500, [], b"{}", id="a path of 62 kB"),
    ],
)
async def test_request_without_a_known_model_is_a_400(
    door: Door, path: str, headers: list[str], body: bytes
) -> None:
    so_far = len(door.backend.requests)
    answer = await door.ask("POST", path, *headers, body=body)
    assert error_of(answer) == (400, "model_not_found")
    assert len(door.backend.requests) == so_far


async def test_body_that_takes_long_to_unpack_stalls_nobody(wire: Raw) -> None:
    packed = gzip.compress(bytes(2**26))
    async with connected(wire.jano, post_bytes(packed, GZIP)) as (reader, _):
        slow = asyncio.create_task(reader.read(-1))
        await wire.jano.get("/health")
        assert not slow.done()
        assert refused(await event(slow)) == 400


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param([], b" " * 13 * 2**20, id="plain"),
        pytest.param([CHUNKED], in_chunks(b" " * 13 * 2**20), id="in chunks"),
        pytest.param([GZIP], gzip.compress(b" " * 2**25, 1), id="gzip, by what it becomes"),
    ],
)
async def test_body_beyond_the_limit_is_a_413(door: Door, headers: list[str], body: bytes) -> None:
    message = await exchange(door.jano, post_bytes(body, *headers, path="/x"))
    assert error_of(answered(message)) == (413, "body_too_large")


@pytest.mark.parametrize(
    "body",
    [b"[]," * 10**6, b"," * (2 * 10**6 + 1), b"[" * (2 * 10**6 + 1), b"{" * (2 * 10**6 + 1)],
    ids=lambda body: repr(body[:3]),
)
async def test_more_than_two_million_commas_and_brackets_are_a_400(door: Door, body: bytes) -> None:
    answer = await door.ask("POST", "/x", body=b'{"model":"chat","x":[%b0]}' % body)
    assert answer.status == 400


async def test_somewhat_fewer_commas_hold_nobody_up_for_long(door: Door) -> None:
    body = b'{"model":"chat","x":[%b0]}' % (b"0," * 1_900_000)
    asking = asyncio.create_task(exchange(door.jano, post_bytes(body)))
    longest = 0.0
    while not asking.done():
        before = time.monotonic()
        await door.jano.status()
        longest = max(longest, time.monotonic() - before)
    assert answered(asking.result()).status == 200
    assert longest < 3  # half a second of the parser, on a machine that does other things too


@pytest.mark.parametrize("megabytes", [1, 10])
async def test_large_text_in_a_body_is_no_reason_to_refuse_it(door: Door, megabytes: int) -> None:
    text = b"\\\\,[{" * (megabytes * 2**20 // 6)
    seen = await door.seen("POST", "/x", body=b'{"x":"%b","model":"chat"}' % text[: 3 * 10**6])
    assert seen["line"] == "POST /x"


# ------------------------------------------------------ front door: what is not clear HTTP ----

TE = "Transfer-Encoding:"
CHUNKS = '11\r\n{"model": "chat"}\r\n0\r\n\r\n'
JSON = ASK.decode()
UNCLEAR_HEADERS = {  # the headers of a POST after its Host, and its body
    "length and chunks": (f"Content-Length: 17\r\n{TE} chunked", CHUNKS),
    "lengths in one field": ("Content-Length: 17, 17", JSON),
    "two lengths": ("Content-Length: 1\r\nContent-Length: 17", JSON),
    "twice the same length": ("Content-Length: 17\r\nContent-Length: 17", JSON),
    "empty length": ("Content-Length:", JSON),
    "length -0": ("Content-Length: -0", JSON),
    "length +17": ("Content-Length: +17", JSON),
    "length in hex": ("Content-Length: 0x11", JSON),
    "space before the colon of the length": ("Content-Length : 17", JSON),
    "chunked in two fields": (f"{TE} chunked\r\n{TE} chunked", CHUNKS),
    "chunked twice": (f"{TE} chunked, chunked", CHUNKS),
    "chunked in a folded line": (f"{TE}\r\n chunked", CHUNKS),
    "no coding": (f"{TE}", JSON),
    "identity and a length": (f"{TE} identity\r\nContent-Length: 17", JSON),
    "vertical tab before chunked": (f"{TE}\x0bchunked", CHUNKS),
    "xchunked": (f"{TE} xchunked", CHUNKS),
    "chunked, then identity": (f"{TE} chunked, identity", CHUNKS),
    "space before the colon of the coding": ("Transfer-Encoding : chunked", CHUNKS),
    "extension that ends in a bare line feed": (f"{TE} chunked", f"11;x\n{CHUNKS[4:]}"),
    "chunk of negative size": (f"{TE} chunked", f"-{CHUNKS}"),
    "chunk of a huge size": (f"{TE} chunked", f"1000000000000000{CHUNKS}"),
    "chunk size in 0x": (f"{TE} chunked", f"0x{CHUNKS}"),
    "chunk size that ends in a bare line feed": (f"{TE} chunked", f"11\n{CHUNKS[4:]}"),
    "chunk that is longer than its size": (f"{TE} chunked", f"{CHUNKS[:21]}XX{CHUNKS[21:]}"),
    "folded line": ("X: a\r\n b: c", JSON),
    "line folded by a tab": ("X: a\r\n\tb: c", JSON),
    "bare line feed": ("X: a\nY: b", JSON),
    "bare carriage return": ("X: a\rY: b", JSON),
    "zero byte": ("X: a\0b", JSON),
    "space in a name": ("X Y: b", JSON),
    "no colon": ("X", JSON),
    "two hosts": ("Host: a\r\nHost: localhost", JSON),
}
UNCLEAR_REQUESTS = {
    "unknown version": b"GET / HTTP/9\r\nHost: localhost\r\n\r\n",
    "unknown method": b"NONE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no Host": b"POST /x HTTP/1.1\r\nContent-Length: 17\r\n\r\n" + ASK,
    "bare line feeds": b"POST /x HTTP/1.1\nHost: localhost\nContent-Length: 17\n\n" + ASK,
    "a star for a path": b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no path": b"POST @h/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n\r\n" + ASK,
    "odd scheme": b"POST x:@h/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n\r\n" + ASK,
    "byte beyond ASCII in the path": b"POST /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


async def check_unclear(door: Door, sent: bytes) -> None:
    """It is refused with one answer, the connection ends, and nothing of it is sent on."""
    so_far = len(door.backend.requests)
    message = await exchange(door.jano, sent)
    assert error_of(answered(message)) == (400, "invalid_http")
    assert message.count(b"HTTP/1.") == 1
    assert len(door.backend.requests) == so_far


@pytest.mark.parametrize(("headers", "body"), UNCLEAR_HEADERS.values(), ids=UNCLEAR_HEADERS)
async def test_request_with_unclear_headers_is_refused(door: Door, headers: str, body: str) -> None:
    length = "" if re.search("-Length|-Encoding", headers) else f"Content-Length: {len(body)}\r\n"
    sent = f"POST /x HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n{length}\r\n{body}"
    await check_unclear(door, sent.encode("latin-1"))


@pytest.mark.parametrize("sent", UNCLEAR_REQUESTS.values(), ids=UNCLEAR_REQUESTS)
async def test_request_that_is_no_clear_http_is_refused(door: Door, sent: bytes) -> None:
    await check_unclear(door, sent)


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        pytest.param("POST", "/x", ["Host: evil.example"], id="403"),
        pytest.param("POST", "/x", ["Origin: https://evil.example"], id="unknown Origin"),
        pytest.param("GET", "/none", [], id="404"),
        pytest.param("PUT", "/none", [], id="405"),
        pytest.param("GET", "/upstream/code/x", [], id="409"),
        pytest.param("POST", "/status", [], id="POST to jano's own"),
        pytest.param("OPTIONS", "/x", [], id="OPTIONS"),
        pytest.param("POST", "/x", [], id="no JSON"),
    ],
)
async def test_body_of_a_refused_request_is_not_taken_for_the_next_one(
    door: Door, method: str, path: str, headers: list[str]
) -> None:
    within = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent = request_bytes(method, path, *headers, body=within)
    message = await exchange(door.jano, sent.replace(b"Connection: close", b"X: y") + LAST)
    assert b"jano_uptime" not in message
    assert 1 <= message.count(b"HTTP/1.1 ") <= 2


@pytest.mark.parametrize(
    "chunks",
    [f"{CHUNKS[:-2]}X-Evil: 1\r\n\r\n", f'11;a=b;c="d"{CHUNKS[2:]}'],
    ids=["trailer", "chunk extensions"],
)
async def test_trailers_and_chunk_extensions_end_at_jano(door: Door, chunks: str) -> None:
    seen = await door.seen("POST", "/x", CHUNKED, body=chunks.encode())
    assert seen["body"] == JSON
    assert "x-evil" not in dict(seen["headers"])


# ----------------------------------------------------------- front door: heads up to 64 kB ----


def cookies(size: int, each: int = 4000) -> list[str]:
    """Cookie headers of so many bytes together, none much larger than `each`."""
    count = max(1, size // each)
    return [f"Cookie: c{number}={'x' * (size // count)}" for number in range(count)]


HEADS = {
    "9 kB in one field": cookies(9000, each=9000),
    "60 kB in one field": cookies(60_000, each=60_000),
    "60 kB in fifteen fields": cookies(60_000),
    "200 fields": cookies(4000, each=20),
}


@pytest.mark.parametrize("headers", HEADS.values(), ids=HEADS)
async def test_head_of_up_to_64_kb_is_fine(door: Door, headers: list[str]) -> None:
    """Programs on other ports of localhost set cookies for Jano, too."""
    assert (await door.ask("GET", "/status", *headers)).status == 200


@pytest.mark.parametrize("headers", HEADS.values(), ids=HEADS)
async def test_backend_gets_a_large_head_whole(wire: Raw, headers: list[str]) -> None:
    answer = answered(await exchange(wire.jano, post_bytes(ASK, *headers)))
    assert answer.status == 200
    _, got, _ = parsed(wire.seen[0])
    assert [f"Cookie: {value}" for name, value in got if name == "cookie"] == headers


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_header_beyond_64_kb_is_a_431_that_says_so(door: Door, method: str) -> None:
    so_far = len(door.backend.requests)
    answer = await door.ask(method, "/x", *cookies(100_000, each=100_000), body=ASK)
    error = json.loads(answer.read())["error"]
    assert answer.status == 431
    assert re.search("64 kB|65536", error["message"])
    assert error.keys() == OPENAI_KEYS
    assert len(door.backend.requests) == so_far


async def test_more_than_256_headers_are_a_431(door: Door) -> None:
    assert error_of(await door.ask("POST", "/x", *cookies(6000, each=20), body=ASK))[0] == 431


async def test_path_of_60_kb_is_fine(wire: Raw) -> None:
    path = f"/x?q={'x' * 60_000}"
    assert answered(await exchange(wire.jano, post_bytes(ASK, path=path))).status == 200
    assert wire.seen[0].startswith(f"POST {path} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize("headers", HEADS.values(), ids=HEADS)
async def test_client_gets_a_large_head_of_the_backend_whole(
    either_wire: Raw, headers: list[str]
) -> None:
    head = "".join(f"{header}\r\n" for header in headers).replace("Cookie", "Set-Cookie")
    either_wire.reply = OK + head.encode() + b"Content-Length: 2\r\n\r\n{}"
    _, got, body = parsed(await exchange(either_wire.jano, post_bytes()))
    assert [f"Cookie: {value}" for name, value in got if name == "set-cookie"] == headers
    assert body == b"{}"


async def test_head_of_the_backend_beyond_64_kb_is_a_502(wire: Raw) -> None:
    wire.reply = OK + b"X: " + b"x" * 100_000 + b"\r\nContent-Length: 2\r\n\r\n{}"
    assert refused(await exchange(wire.jano, post_bytes())) == 502


# ---------------------------------------------------------------- front door: 100 Continue ----

EXPECTING = post_bytes(ASK, "Expect: 100-continue", path="/x")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_client_that_waits_for_100_gets_it_then_its_answer(door: Door) -> None:
    head, end, body = EXPECTING.partition(b"\r\n\r\n")
    async with connected(door.jano, head + end) as (reader, writer):
        assert await event(reader.readexactly(len(CONTINUE))) == CONTINUE
        writer.write(body)
        answer = answered(await event(reader.read(-1)))
    assert answer.status == 200
    assert json.loads(answer.read())["body"] == JSON


async def test_old_client_gets_no_100(door: Door) -> None:
    """It would take it for the answer (RFC 9110, 10.1.1)."""
    sent = EXPECTING.replace(b"HTTP/1.1", b"HTTP/1.0")
    message = await exchange(door.jano, sent)
    assert b"100 Continue" not in message
    assert answered(message).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Expect: 100-continue"], 401),
        (["Expect: 100-continue", "x-api-key: no"], 401),
        (["Expect: 100-continue", "x-api-key: k", "Host: evil.example"], 403),
        (["Expect: 100-continue", "x-api-key: k", "Origin: https://evil.example"], 403),
    ],
)
async def test_client_that_may_not_ask_gets_no_100(
    keyed_door: Door, headers: list[str], status: int
) -> None:
    """Its body is not sent yet, and need not be."""
    sent = request_bytes("POST", "/x", *headers, "Content-Length: 17")
    async with connected(keyed_door.jano, sent) as (reader, _):
        head = await event(reader.readuntil(b"\r\n\r\n"))
        message = head + await event(reader.readuntil(b"}}"))
    assert refused(message) == status


@pytest.mark.parametrize("value", ["x", "100-continue, x"])
async def test_unknown_expectation_is_ignored(door: Door, value: str) -> None:
    message = await exchange(door.jano, post_bytes(ASK, f"Expect: {value}", path="/x"))
    assert answered(message.removeprefix(CONTINUE)).status == 200


# ----------------------------------------------------------------- front door: who may ask ----


@pytest.fixture(scope="module")
async def picky_door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    """It knows two hosts beside its own, and pages of some origins."""
    settings = {
        "JANO_HOST": "LocalHost",
        "JANO_ALLOWED_HOSTS": "box.local, other",
        "JANO_CORS_ORIGINS": "chrome-extension://*, http://localhost:*, file://, https://a.example",
    }
    async with running_door(tmp_path_factory.mktemp("picky"), **settings) as picky:
        yield picky


KNOWN_HOSTS = [
    "localhost",
    "LOCALHOST:1",
    "127.0.0.1",
    "127.0.0.1:8",
    "[::1]",
    "[::1]:8",
    "box.local:5",
    "Other",
    "host.docker.internal:8082",
    "host.containers.internal",
    "jano.localhost:8082",
    "gateway.docker.internal",
    "models.internal",
    socket.gethostname(),
    f"{socket.gethostname().upper()}:8082",
]
UNKNOWN_HOSTS = [
    "evil.example",
    "localhost.evil.example:1",
    "",
    "[",
    "x@localhost",
    "[::1",
    "::1",
    "127.0.0.1.h",
    "\xff",
    "evillocalhost",
    "xinternal",
    "docker.internal.evil.example",
    "internal.evil.example",
    "10.0.0.1",
]


@pytest.mark.parametrize("host", KNOWN_HOSTS)
async def test_request_for_a_known_host_is_answered(picky_door: Door, host: str) -> None:
    assert (await picky_door.ask("GET", "/status", f"Host: {host}")).status == 200


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
@pytest.mark.parametrize("host", UNKNOWN_HOSTS)
async def test_request_for_an_unknown_host_is_a_403(
    picky_door: Door, host: str, method: str
) -> None:
    """DNS rebinding: a web page's own name that points at 127.0.0.1 now."""
    answer = await picky_door.ask(method, "/", f"Host: {host}")
    assert error_of(answer) == (403, "host_not_allowed")


async def test_loopback_knows_its_hosts_however_it_is_spelt(tmp_path: Path) -> None:
    async with running_door(tmp_path, JANO_HOST="0x7F.1") as open_door:
        for host in ("0x7f.1:8", "127.0.0.1", "localhost"):
            assert (await open_door.ask("GET", "/", f"Host: {host}")).status == 200
        answer = await open_door.ask("GET", "/", "Host: evil.example")
        assert error_of(answer) == (403, "host_not_allowed")


async def test_page_shows_an_ipv6_address_as_curl_takes_it(tmp_path: Path, chat: Backend) -> None:
    async with running_jano(tmp_path, [entry(chat)], JANO_HOST="::1") as daemon:
        daemon.url = f"http://[::1]:{daemon.port}"
        assert f"curl {daemon.url}/v1" in await daemon.get("/")


def basic(user: str, password: str) -> str:
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    return f"Authorization: Basic {text}"


KEYS_SHOWN = [
    "Authorization: Bearer k",
    "authorization: bearer k",
    "x-api-key: k",
    "X-API-Key: k",
    "api-key: k",
    basic("any user", "k"),
    basic("", "k"),
]
WRONG_KEYS = [
    "X-Nothing: 1",
    "x-api-key: K",
    "x-api-key: \xff",
    "x-api-key: ",
    "api-key: no",
    "Authorization: Bearer no",
    "Authorization: Bearer",
    "Authorization: k",
    "Authorization: Basic",
    "Authorization: Basic !",
    "Authorization: Basic k",
    "Authorization: Basic /w==",
    "Authorization: Basic aw==",  # k without a colon
    basic("k", "no"),
    basic("k", ""),
]


@pytest.mark.parametrize("header", KEYS_SHOWN)
@pytest.mark.parametrize("path", ["/status", "/", "/usage", "/metrics", "/v1/models"])
async def test_key_opens_every_route(keyed_door: Door, path: str, header: str) -> None:
    assert (await keyed_door.ask("GET", path, header)).status == 200


@pytest.mark.parametrize("header", KEYS_SHOWN)
async def test_key_opens_the_backend_and_stays_with_jano(keyed_door: Door, header: str) -> None:
    seen = await keyed_door.seen("POST", "/x", header, body=ASK)
    assert {name for name, _ in seen["headers"]} <= MADE_ANEW


@pytest.mark.parametrize("header", WRONG_KEYS)
@pytest.mark.parametrize(("method", "path"), [("GET", "/status"), ("POST", "/x")])
async def test_wrong_key_is_a_401(keyed_door: Door, method: str, path: str, header: str) -> None:
    so_far = len(keyed_door.backend.requests)
    answer = await keyed_door.ask(method, path, header, body=ASK)
    assert error_of(answer) == (401, "invalid_api_key")
    assert len(keyed_door.backend.requests) == so_far


@pytest.mark.parametrize("header", ["X-Nothing: 1", "x-api-key: no"])
@pytest.mark.parametrize("path", [*OWN_ROUTES, "/none", "/props?model=chat", "/upstream/chat/x"])
async def test_nothing_but_a_bare_health_is_told_without_the_key(
    keyed_door: Door, path: str, header: str
) -> None:
    answer = await keyed_door.ask("GET", path, header)
    if path in HEALTH_ROUTES:
        assert (answer.status, json.loads(answer.read())) == (200, {"ok": True})
    else:
        assert answer.status == 401


async def test_browser_is_asked_for_the_key_of_the_page(keyed_door: Door) -> None:
    answer = await keyed_door.ask("GET", "/")
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic")


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        (["Authorization: Bearer k", "x-api-key: own"], [["x-api-key", "own"]]),
        (["Authorization: own", "x-api-key: k"], [["authorization", "own"]]),
        (["Authorization: Bearer own", "api-key: k"], [["authorization", "Bearer own"]]),
        (["api-key: own", "x-api-key: k"], [["api-key", "own"]]),
        ([basic("u", "k"), "api-key: own"], [["api-key", "own"]]),
        (["Authorization: Bearer k", "x-api-key: k", "api-key: k"], []),
    ],
)
async def test_only_the_header_that_shows_the_key_stays_with_jano(
    keyed_door: Door, headers: list[str], kept: list[list[str]]
) -> None:
    seen = await keyed_door.seen("POST", "/x", *headers, body=ASK)
    assert [pair for pair in seen["headers"] if pair[0] not in MADE_ANEW] == kept


# ------------------------------------------------------------------- front door: web pages ----


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/x", ["x-api-key: k"], 200),
        ("GET", "/models", ["x-api-key: k"], 200),
        ("POST", "/x", [], 401),
        ("GET", "/none", ["x-api-key: k"], 404),
    ],
)
@pytest.mark.parametrize("origin", ["https://a.example", "app://b"])
async def test_page_of_a_known_origin_may_read_answers_and_errors(
    keyed_door: Door, method: str, path: str, headers: list[str], status: int, origin: str
) -> None:
    body = ASK if method == "POST" else b""
    answer = await keyed_door.ask(method, path, *headers, f"Origin: {origin}", body=body)
    assert answer.status == status
    assert answer.headers.get_all("Access-Control-Allow-Origin") == [origin]
    assert "Origin" in ", ".join(answer.headers.get_all("Vary", []))
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"x-request-id", "Server-Timing", "Retry-After"} <= set(exposed)


async def test_what_the_backend_says_of_vary_stays(keyed_door: Door) -> None:
    headers = ["x-api-key: k", "Origin: app://b"]
    answer = await keyed_door.ask("POST", "/x", *headers, body=ASK)
    assert "Accept" in ", ".join(answer.headers.get_all("Vary", []))


async def test_preflight_is_answered_without_the_key(keyed_door: Door) -> None:
    answer = await keyed_door.ask(
        "OPTIONS",
        "/x",
        "Origin: app://b",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: X-Api-Key, X-Stainless-Lang",
    )
    assert answer.status == 204
    assert answer.headers["Access-Control-Allow-Origin"] == "app://b"
    assert answer.headers["Access-Control-Allow-Headers"] == "X-Api-Key, X-Stainless-Lang"
    methods = answer.headers["Access-Control-Allow-Methods"].split(", ")
    assert {"GET", "HEAD", "POST"} <= set(methods)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "origin", ["https://a.example.evil", "http://localhost:1", "null", "\xff", "https://b"]
)
async def test_unknown_origin_is_a_403(keyed_door: Door, origin: str, method: str) -> None:
    answer = await keyed_door.ask(method, "/x", "x-api-key: k", f"Origin: {origin}")
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert error_of(answer) == (403, "origin_not_allowed")


@pytest.mark.parametrize("origin", ["http://localhost", "HTTP://LOCALHOST", "https://localhost"])
async def test_janos_own_page_may_ask(keyed_door: Door, origin: str) -> None:
    answer = await keyed_door.ask("GET", "/status", "x-api-key: k", f"Origin: {origin}")
    assert answer.status == 200


@pytest.mark.parametrize("origin", ["http://any", "https://a.example:5", "file://", "null"])
async def test_star_allows_every_origin(slow: Slow, origin: str) -> None:
    slow.backend.answer = says(b"{}")
    answer = await asked(slow.jano, "POST", "/x", f"Origin: {origin}", body=ASK)
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin


async def test_backends_own_word_on_origins_does_not_come_twice(slow: Slow) -> None:
    """Two values, even if they are the same, are none to a browser."""
    slow.backend.answer = says(b"{}", headers={"Access-Control-Allow-Origin": "*"})
    answer = await asked(slow.jano, "POST", "/x", "Origin: http://a", body=ASK)
    assert answer.headers.get_all("Access-Control-Allow-Origin") == ["http://a"]


async def test_backends_own_word_on_origins_counts_where_no_page_asks(slow: Slow) -> None:
    slow.backend.answer = says(b"{}", headers={"Access-Control-Allow-Origin": "*"})
    answer = await asked(slow.jano, "POST", "/x", body=ASK)
    assert answer.headers.get_all("Access-Control-Allow-Origin") == ["*"]


async def test_page_may_read_a_stream_that_begins_with_a_heartbeat(slow: Slow) -> None:
    slow.backend.answer = slow.backend.held
    sent = stream_bytes("/v1/chat/completions", "Origin: http://a")
    async with connected(slow.jano, sent) as (reader, _):
        head = await event(reader.readuntil(b"\r\n\r\n"))
    assert answered(head).headers["Access-Control-Allow-Origin"] == "http://a"


@pytest.mark.parametrize(
    "origin",
    [
        "chrome-extension://abcdefghijklmnop",
        "Chrome-Extension://abc",
        "http://localhost:3000",
        "http://LOCALHOST:80",
        "http://localhost",
        "file://",
        "https://a.example",
    ],
)
async def test_origin_may_be_allowed_by_a_pattern(picky_door: Door, origin: str) -> None:
    headers = [f"Origin: {origin}", "Host: 127.0.0.1"]  # so that none is the origin of jano's page
    answer = await picky_door.ask("POST", "/x", *headers, body=ASK)
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin


@pytest.mark.parametrize(
    "origin",
    [
        "moz-extension://abc",
        "https://chrome-extension",
        "chrome-extension-evil://abc",
        "http://localhost.evil.example:3000",
        "http://evil.example:3000",
        "http://evil-localhost:3000",
        "http://localhost@evil.example",
        "https://localhost:3000",
        "https://a.example:444",
        "https://a.example.evil",
        "https://evil.a.example",
        "file://evil.example",
        "null",
    ],
)
async def test_pattern_allows_no_other_origin(picky_door: Door, origin: str) -> None:
    answer = await picky_door.ask("POST", "/x", f"Origin: {origin}", body=ASK)
    assert error_of(answer) == (403, "origin_not_allowed")


PRIVATE_NETWORK = "Access-Control-Request-Private-Network: true"


async def test_known_origin_may_reach_the_private_network(picky_door: Door) -> None:
    headers = ["Origin: https://a.example", "Access-Control-Request-Method: POST"]
    answer = await picky_door.ask("OPTIONS", "/x", *headers, PRIVATE_NETWORK)
    assert answer.status == 204
    assert answer.headers["Access-Control-Allow-Private-Network"] == "true"


async def test_unknown_origin_may_not_reach_the_private_network(picky_door: Door) -> None:
    headers = ["Origin: https://evil.example", "Access-Control-Request-Method: POST"]
    answer = await picky_door.ask("OPTIONS", "/x", *headers, PRIVATE_NETWORK)
    assert answer.status == 403
    assert "Access-Control-Allow-Private-Network" not in answer.headers


# ---------------------------------------------------------- front door: errors in dialects ----

DIALECTS = [
    pytest.param("/v1/chat/completions", [], "OpenAI", id="OpenAI"),
    pytest.param("/v1/responses", [], "OpenAI", id="responses"),
    pytest.param("/v1/messages", [], "Anthropic", id="Anthropic"),
    pytest.param("/v1/messages/count_tokens", [], "Anthropic", id="count_tokens"),
    pytest.param("/x", ["anthropic-version: 2023-06-01"], "Anthropic", id="Anthropic's header"),
    pytest.param("/api/chat", [], "Ollama", id="Ollama"),
]


def check_dialect(answer: http.client.HTTPResponse, dialect: str, words: str) -> None:
    """It must be an error of this dialect, with these words in it."""
    payload = json.loads(answer.read())
    if dialect == "Ollama":
        assert isinstance(payload["error"], str)
        assert words in payload["error"]
        return
    assert words in payload["error"]["message"]
    if dialect == "OpenAI":
        assert payload["error"].keys() == OPENAI_KEYS
    else:
        assert payload["type"] == "error"
        assert payload["error"]["type"].endswith(("_error", "_request"))


@pytest.mark.parametrize(("path", "headers", "dialect"), DIALECTS)
@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        pytest.param(b'{"model": "none"}', 400, "none", id="unknown model"),
        pytest.param(b"{", 400, "JSON", id="no JSON"),
        pytest.param(b" " * 13 * 2**20, 413, "12 MB", id="too large"),
    ],
)
async def test_refusal_is_in_the_dialect_of_who_asks(
    door: Door, path: str, headers: list[str], dialect: str, body: bytes, status: int, words: str
) -> None:
    answer = await door.ask("POST", path, *headers, body=body)
    assert answer.status == status
    check_dialect(answer, dialect, words)


@pytest.mark.parametrize(
    ("path", "headers", "dialect"),
    [
        *DIALECTS,
        ("/messages", [], "Anthropic"),
        ("/upstream/a/model/v1/messages", [], "Anthropic"),
        ("/upstream/a/model/api/chat", [], "Ollama"),
        ("/upstream/a/model/x", [], "OpenAI"),
    ],
)
async def test_wrong_key_is_told_in_the_dialect_of_who_asks(
    keyed_door: Door, path: str, headers: list[str], dialect: str
) -> None:
    answer = await keyed_door.ask("POST", path, *headers, body=ASK)
    assert answer.status == 401
    check_dialect(answer, dialect, "key")


@pytest.mark.parametrize(("path", "headers", "dialect"), DIALECTS)
async def test_unknown_host_is_told_in_the_dialect_of_who_asks(
    door: Door, path: str, headers: list[str], dialect: str
) -> None:
    answer = await door.ask("POST", path, *headers, "Host: evil.example", body=ASK)
    assert answer.status == 403
    check_dialect(answer, dialect, "Host")


async def test_anthropic_client_that_lists_models_gets_its_errors_too(door: Door) -> None:
    answer = await door.ask("GET", "/v1/models/none", "anthropic-version: 2023-06-01")
    assert answer.status == 404
    check_dialect(answer, "Anthropic", "none")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error")],
)
async def test_anthropics_errors_have_the_types_of_its_api(
    keyed_door: Door, status: int, kind: str
) -> None:
    headers = {400: ["x-api-key: k"], 401: [], 403: ["Host: evil.example"]}[status]
    answer = await keyed_door.ask("POST", "/v1/messages", *headers, body=b"{")
    assert answer.status == status
    assert json.loads(answer.read())["error"]["type"] == kind


# ---------------------------------------------------- front door: which model is asked for ----

FORM = "Content-Type: multipart/form-data; boundary=B"
SPEECH = "/v1/audio/transcriptions"


def form_bytes(*parts: tuple[bytes, bytes], end: bytes = b"--") -> bytes:
    """A form with these fields; its boundary is B."""
    head = b'--B\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    return b"".join(head % part for part in parts) + b"--B" + end + b"\r\n"


TEN_MB = b"x" * 10**7
NAMED = {  # the path, headers and body of a POST, and the path that the backend gets
    "JSON": ("/x", [], b'{"model":"chat"}', "/x"),
    "JSON, other case": ("/x", [], b'{"model":"CHAT"}', "/x"),
    "JSON, an alias": ("/x", [], b' {"model" : "fAST" }\n', "/x"),
    "JSON, bytes beyond UTF-8": ("/x", [], b'{"model":"chat","x":"\xff"}', "/x"),
    "JSON, byte order mark": ("/x", [], b"\xef\xbb\xbf" + ASK, "/x"),
    "JSON, an alias beyond ASCII": ("/infill", [], '{"model":"üNÏ/8B"}'.encode(), "/asr/infill"),
    "JSON with a body type": ("/x", ["Content-Type: text/plain"], ASK, "/x"),
    "form": (SPEECH, [FORM], form_bytes((b"a", b"b"), (b"model", b"chat")), SPEECH),
    "form as .NET writes it": (
        "/x",
        ['Content-Type: multipart/form-data; boundary="B"'],
        b"--B\r\nX: y\r\ncontent-disposition: form-data; name=model\r\n\r\nasr\r\n--B--\r\n",
        "/asr/x",
    ),
    "form with more about its parts": (
        "/x",
        [FORM],
        b'--B\r\nContent-Disposition: form-data ; filename="name=model"; name="model"; x=y\r\n\r\n'
        b"asr\r\n--B--\r\n",
        "/asr/x",
    ),
    "form with a form in a file": (
        SPEECH,
        [FORM],
        form_bytes((b"file", form_bytes((b"model", b"chat"))[1:-6]), (b"model", b"Asr")),
        f"/asr{SPEECH}",
    ),
    "query": ("/x?model=chat", [], b'{ "n":1 }', "/x?model=chat"),
    "query, encoded": (
        "/v1/a?q=%20+%zz&&=;y&model=%C3%BCn%c3%af%2F8b",
        [],
        b"\0\xff",
        "/asr/v1/a?q=%20+%zz&&=;y&model=%C3%BCn%c3%af%2F8b",
    ),
    "header": ("/x", ["X-Model: asr"], b"", "/asr/x"),
    "header, an odd path": (
        "//v1/../a/./%2fb%C3%A9",
        ["X-Model: asr"],
        b"\xff",
        "/asr//v1/../a/./%2fb%C3%A9",
    ),
    "a path with /v1 twice": ("/v1/x/v1/", [], b'{"model":"ASR"}', "/asr/v1/x/v1/"),
    "header, no JSON": ("/x", ["X-Model: Asr", "Content-Type: audio/wav"], b"RIFF\0", "/asr/x"),
    "header, no form": ("/x", ["X-Model: asr", FORM], b"no form", "/asr/x"),
    "path": ("/upstream/chat/tokenize", [], b'{"content": "x"}', "/tokenize"),
    "path, an alias": ("/upstream/Fast/v1/x?a=%2F", [], b"{}", "/v1/x?a=%2F"),
    "path, other case and encoded": ("/upstream/%41SR/x", [], b"{}", "/asr/x"),
    "path, a name with a slash": ("/upstream/a%2Fb:7b/props", [], b"{}", "/slash/props"),
    "path, a body that is no JSON": ("/upstream/asr/x", [], b"\0", "/asr/x"),
    "path, an odd rest": ("/upstream/chat//h/../%2e?x=%2F", [], b"{}", "//h/../%2e?x=%2F"),
    "endpoint": ("/v1/rerank", [], b"{}", "/asr/v1/rerank"),
    "endpoint without /v1": ("/rerank", [], b"{}", "/asr/rerank"),
    "endpoint, a form": (SPEECH, [FORM], form_bytes((b"file", b"\0")), f"/asr{SPEECH}"),
    "body before query": ("/x?model=chat", [], b'{"model":"asr"}', "/asr/x?model=chat"),
    "body before header": ("/x", ["X-Model: chat"], b'{"model":"asr"}', "/asr/x"),
    "query before header": ("/x?model=asr", ["X-Model: chat"], b"{}", "/asr/x?model=asr"),
    "body before endpoint": ("/v1/rerank", [], b'{"model":"chat"}', "/v1/rerank"),
    "an empty name is none, endpoint": ("/rerank", [], b'{"model":""}', "/asr/rerank"),
    "an empty name is none, query": ("/x?model=chat", [], b'{"model":""}', "/x?model=chat"),
    "an empty name is none, header": ("/x?model=", ["X-Model: asr"], b"{}", "/asr/x?model="),
    "an empty name is none, form": (
        SPEECH,
        [FORM],
        form_bytes((b"model", b""), (b"file", b"\0")),
        f"/asr{SPEECH}",
    ),
    "null is none": ("/x?model=asr", [], b'{"model":null}', "/asr/x?model=asr"),
}


@pytest.mark.parametrize(("path", "headers", "body", "line"), NAMED.values(), ids=NAMED)
async def test_model_is_found(
    door: Door, path: str, headers: list[str], body: bytes, line: str
) -> None:
    seen = await door.seen("POST", path, *headers, body=body)
    assert seen["line"] == f"POST {line}"
    assert seen["body"].encode("latin-1") == body


async def test_form_of_a_common_client_is_understood(door: Door) -> None:
    form: Any = aiohttp.FormData({"model": "ASR", "file": io.BytesIO(b"RIFF")})()
    kind = f"Content-Type: {form.headers['Content-Type']}"
    seen = await door.seen("POST", "/x", kind, body=await form.as_bytes())
    assert seen["line"] == "POST /asr/x"


NESTED = b"--B%b\r\nContent-Type: multipart/mixed; boundary=B%d\r\n\r\n"
ASR = (b"model", b"asr")
BAD_FORMS = {  # what is appended to the Content-Type, and the body
    "empty": ("", b""),
    "cut": ("", form_bytes(ASR)[:20]),
    "no end": ("", form_bytes(ASR, end=b"")),
    "another boundary": ("C", form_bytes(ASR)),
    "a long boundary": ("B" * 70, form_bytes(ASR)),
    "a boundary beyond UTF-8": ("\xff", form_bytes(ASR)),
    "two models": ("", form_bytes(ASR, ASR)),
    "two models, one in a file": ("", form_bytes(ASR, (b'model"; filename="x', b"asr"))),
    "a model beyond UTF-8": ("", form_bytes((b"model", b"\xff"))),
    "a model of 10 MB": ("", form_bytes((b"model", TEN_MB))),
    "more than 1000 parts": ("", form_bytes(ASR, *[(b"a", b"b")] * 10_000)),
    "thousands of parameters": (
        "",
        b"--B\r\nContent-Disposition: form-data%b;!\r\n\r\nx\r\n--B--\r\n"
        % (b";name=model" * 30_000),
    ),
    "a part that begins with 8 MB of parameters": (
        "",
        b"--B\r\nContent-Disposition: form-data%b\r\n\r\nx\r\n" % (b";a=b" * 2_000_000)
        + form_bytes(ASR),
    ),
    "a header of 10 MB": ("", b"--B\r\nX: " + TEN_MB + b"\r\n\r\n\r\n--B--\r\n"),
    "a form within": (
        "",
        NESTED % (b"", 0) + b"--B0\r\n\r\nx\r\n--B0--\r\n\r\n" + form_bytes(ASR),
    ),
    "3000 forms within": ("0", b"".join(NESTED % (b"%d" % n, n + 1) for n in range(3000))),
    "an odd disposition": (
        "",
        b'--B\r\nContent-Disposition: form-data; name="model"; odd\r\n\r\nchat\r\n--B--',
    ),
    "another disposition": (
        "",
        b'--B\r\nContent-Disposition: form data; name="model"\r\n\r\nchat\r\n--B--',
    ),
}


@pytest.mark.parametrize(("more", "body"), BAD_FORMS.values(), ids=BAD_FORMS)
async def test_form_that_is_not_clear_is_a_400(door: Door, more: str, body: bytes) -> None:
    so_far = len(door.backend.requests)
    answer = await door.ask("POST", "/x", FORM + more, body=body)
    assert error_of(answer)[0] == 400
    assert len(door.backend.requests) == so_far


@pytest.mark.parametrize(
    "body",
    [
        b'{"n":1.5,"model":"UP","deep":[{"model":"up"}],"big":%d}' % 2**70,
        b'{"a":"\\\\","b":["}",{"model":1}],"model" : "UP","c":"\\"%b"}\n' % TEN_MB,
        b'{"model":"up","text":"\\ud800 \xc3\xa9 \\u0000"}',
        b'\xef\xbb\xbf{"model":"up"}',
    ],
    ids=["numbers", "10 MB", "text", "byte order mark"],
)
async def test_backend_gets_its_own_name_of_the_model_in_json(door: Door, body: bytes) -> None:
    seen = await door.seen("POST", "/v1/x", body=body)
    assert seen["line"] == "POST /u/p/v1/x"
    expected = json.loads(body.decode("utf-8-sig"))
    assert json.loads(seen["body"].encode("latin-1")) == expected | {"model": "org/Ä-7B"}


@pytest.mark.parametrize(
    "number",
    [
        b"1" * 400,
        b"0.1234567890123456789",
        b"-0.0",
        b"1e-400",
        b"12345678901234567890.5",
        b"-1e400",
    ],
)
async def test_number_stays_a_number_where_the_name_is_replaced(door: Door, number: bytes) -> None:
    seen = await door.seen("POST", "/x", body=b'{"model":"up","n":%b}' % number)
    assert json.loads(seen["body"])["n"] == json.loads(number)


@pytest.mark.parametrize(
    "body",
    [
        form_bytes((b"a", b"b"), (b"model", b"up"), (b"file", TEN_MB)),
        form_bytes((b"model", b"UP")),
        b'--B\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: text/plain\r\n\r\n'
        b"up\r\n--B--\r\n",
        b"--B\r\ncontent-disposition: form-data; name=model\r\n\r\nup\r\n--B--\r\n",
    ],
    ids=["with a file", "alone", "with a type", "unquoted"],
)
async def test_backend_gets_its_own_name_of_the_model_in_a_form(door: Door, body: bytes) -> None:
    seen = await door.seen("POST", SPEECH, FORM, body=body)
    expected = re.sub(rb"(?i)\r\n\r\nup\r\n", "\r\n\r\norg/Ä-7B\r\n".encode(), body)
    assert seen["body"].encode("latin-1") == expected
    assert dict(seen["headers"])["content-length"] == str(len(expected))


async def test_body_stays_as_it_is_where_the_name_is_not_in_it(door: Door) -> None:
    body = b'{ "n":1e2 , "n":2 }'
    seen = await door.seen("POST", "/x?model=up", body=body)
    assert seen["body"].encode("latin-1") == body


# --------------------------------------------------------------- front door: other methods ----

OTHERS = {  # method, path, headers, and what the backend gets
    "query": ("GET", "/props?model=chat", [], "/props?model=chat"),
    "header": ("GET", "/props", ["X-Model: FAST"], "/props"),
    "path": ("GET", "/upstream/chat/props?a=%2F&b", [], "/props?a=%2F&b"),
    "path, passthrough": ("GET", "/upstream/asr/slots", [], "/asr/slots"),
    "path, a name with a slash": ("GET", "/upstream/a%2Fb:7b/x", [], "/slash/x"),
    "path, the backend's root": ("GET", "/upstream/chat/", [], "/"),
    "DELETE": ("DELETE", "/v1/files/7?model=chat", [], "/v1/files/7?model=chat"),
    "PUT": ("PUT", "/x?model=asr", [], "/asr/x?model=asr"),
    "PATCH": ("PATCH", "/upstream/Fast/x", [], "/x"),
}


@pytest.mark.parametrize(("method", "path", "headers", "line"), OTHERS.values(), ids=OTHERS)
async def test_other_method_goes_to_a_loaded_model_at_once(
    door: Door, method: str, path: str, headers: list[str], line: str
) -> None:
    seen = await door.seen(method, path, *headers)
    assert seen["line"] == f"{method} {line}"
    assert seen["body"] == ""


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
async def test_other_method_may_have_a_body(door: Door, method: str) -> None:
    seen = await door.seen(method, "/x?model=chat", body=b"\0\xff")
    assert seen["body"] == "\0\xff"


async def test_get_without_a_body_has_none_at_the_backend(peer: Peer) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.read(reader, writer)
        writer.write(EMPTY_OBJECT)

    peer.talk = talk
    sent = b"GET /x?model=peer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert answered(await exchange(peer.jano, sent)).status == 200
    _, got, body = parsed(peer.requests[0][1])
    assert body == b""
    assert "transfer-encoding" not in dict(got)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/props?model=code", []),
        ("/props", ["X-Model: code"]),
        ("/upstream/code/props", []),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT"])
async def test_other_method_for_a_model_that_is_not_loaded_is_a_409(
    door: Door, method: str, path: str, headers: list[str]
) -> None:
    """Only POST ever swaps."""
    so_far = len(door.backend.requests)
    answer = await door.ask(method, path, *headers)
    assert answer.status == 409
    if method != "HEAD":
        assert json.loads(answer.read())["error"].keys() == OPENAI_KEYS
    assert len(door.backend.requests) == so_far
    assert calls(door.jano.folder) == []


@pytest.mark.parametrize("path", ["/props?model=none", "/upstream/none/props", "/upstream/"])
async def test_other_method_for_an_unknown_model_is_an_error(door: Door, path: str) -> None:
    assert error_of(await door.ask("GET", path))[0] in (400, 404)


async def test_janos_own_route_stays_its_own_where_a_model_is_named(door: Door) -> None:
    answer = await door.ask("GET", "/v1/models?model=chat")
    assert json.loads(answer.read())["object"] == "list"


async def test_get_does_not_wait_for_a_turn(slow: Slow) -> None:
    slow.backend.answer = slow.backend.held
    busy = await slow.jano.queued("chat", "chat")
    await event(slow.backend.arrived.get())
    assert (await asked(slow.jano, "GET", "/slots?model=chat")).status == 200
    slow.backend.release.set()
    assert await statuses(busy) == [200, 200]


# ------------------------------------------------------------- front door: lists of models ----


class Rich(NamedTuple):
    """A jano whose entries have the keys that are new in 2.0, and their backend."""

    door: Door
    models: list[dict[str, Any]]


@pytest.fixture(scope="module")
async def rich(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rich]:
    folder = tmp_path_factory.mktemp("rich")
    async with running_backend("chat") as backend:
        backend.answer, backend.look = echo, echo_or_health
        models = [
            entry(
                backend,
                name="a/b:7b",
                label="A B!",
                aliases=["Fast"],
                metadata={"context_length": 32768, "meta": {"n_ctx": 32768}, "id": "no", "n": 1},
            ),
            entry(backend, name="code", upstream_model="org/code"),
            entry(backend, name="embed", unlisted=True, passthrough=True),
            entry(
                backend,
                name="far",
                passthrough=True,
                headers={"Authorization": "Bearer s3cret", "X-Team": "t"},
            ),
        ]
        script = swap_script(folder, "exit 1", status='echo "a/b:7b: loaded"')
        async with running_jano(folder, models, script) as daemon:
            await daemon.logged("worker started")
            yield Rich(Door(daemon, backend), models)
            assert calls(folder) == []


async def test_models_are_listed_for_all_kinds_of_clients(rich: Rich) -> None:
    listed = await rich.door.jano.get("/v1/models")
    assert listed["object"] == "list"
    first, second, third = listed["data"]
    assert first.pop("created") <= time.time()
    assert first == {
        "id": "a/b:7b",
        "object": "model",
        "owned_by": "jano",
        "name": "A B!",
        "root": "a/b:7b",
        "aliases": ["Fast"],
        "status": {"value": "loaded"},
        "context_length": 32768,
        "meta": {"n_ctx": 32768},
        "n": 1,
    }
    assert (second["id"], second["name"], second["status"]) == (
        "code",
        "code",
        {"value": "unloaded"},
    )
    assert (third["id"], third["status"]) == ("far", {"value": "loaded"})
    assert await rich.door.jano.get("/models") == await rich.door.jano.get("/v1/models")


@pytest.mark.parametrize("name", ["a/b:7b", "a%2Fb:7b", "A%2fB%3A7b", "fast"])
async def test_model_is_listed_alone_by_any_of_its_names(rich: Rich, name: str) -> None:
    listed = await rich.door.jano.get("/v1/models")
    assert await rich.door.jano.get(f"/v1/models/{name}") == listed["data"][0]


async def test_model_that_is_being_loaded_is_listed_so(
    shared_jano: Shared, chat: Backend, code: Backend
) -> None:
    code.ready = False
    async with shared_jano([entry(chat), entry(code)]) as daemon:
        asked_ = asyncio.create_task(daemon.ask("code"))
        await daemon.logged("swap requested")
        listed = (await daemon.get("/v1/models"))["data"]
        assert [model["status"]["value"] for model in listed] == ["unloaded", "loading"]
        code.ready = True
        assert (await asked_)[0] == 200


async def test_unlisted_model_is_in_no_list_and_served(rich: Rich) -> None:
    models = (await rich.door.jano.get("/v1/models"))["data"]
    tags = (await rich.door.jano.get("/api/tags"))["models"]
    running = (await rich.door.jano.get("/api/ps"))["models"]
    names = [model["id"] for model in models] + [model["name"] for model in tags + running]
    assert "embed" not in names
    assert (await rich.door.seen("POST", "/v1/embeddings", body=b'{"model":"embed"}'))["line"]


# --------------------------------------------------- front door: Ollama's describing calls ----


async def test_ollamas_version_is_a_version(rich: Rich) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", (await rich.door.jano.get("/api/version"))["version"])


async def test_ollamas_tags_are_the_models(rich: Rich) -> None:
    models = (await rich.door.jano.get("/api/tags"))["models"]
    assert [model["name"] for model in models] == ["a/b:7b", "code", "far"]
    for model in models:
        assert model["model"] == model["name"]
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", model["modified_at"])
        assert isinstance(model["size"], int)
        assert re.fullmatch("[0-9a-f]{64}", model["digest"])
        details = {"format", "family", "families", "parameter_size", "quantization_level"}
        assert details <= model["details"].keys()


async def test_ollamas_ps_are_the_loaded_models(rich: Rich) -> None:
    models = (await rich.door.jano.get("/api/ps"))["models"]
    assert [model["name"] for model in models] == ["a/b:7b", "far"]
    for model in models:
        assert isinstance(model["size_vram"], int)
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", model["expires_at"])


@pytest.mark.parametrize(
    "body", [b'{"model":"a/b:7b"}', b'{"name":"FAST"}', b'{"model":"fast","verbose":true}']
)
async def test_ollamas_show_tells_the_context_length(rich: Rich, body: bytes) -> None:
    answer = await rich.door.ask("POST", "/api/show", body=body)
    shown = json.loads(answer.read())
    assert answer.status == 200
    assert {"completion"} <= set(shown["capabilities"])
    architecture = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{architecture}.context_length"] == 32768
    assert shown["details"]["family"]


async def test_ollamas_show_of_another_model_claims_no_length(rich: Rich) -> None:
    answer = await rich.door.ask("POST", "/api/show", body=b'{"model":"code"}')
    assert not [name for name in json.loads(answer.read())["model_info"] if "length" in name]


@pytest.mark.parametrize("body", [b'{"model":"none"}', b"{}", b'{"model":7}', b"[", b"[]"])
async def test_ollamas_show_of_an_unknown_model_is_an_error_in_text(
    rich: Rich, body: bytes
) -> None:
    answer = await rich.door.ask("POST", "/api/show", body=body)
    assert answer.status in (400, 404)
    assert isinstance(json.loads(answer.read())["error"], str)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed"])
async def test_ollamas_other_calls_go_to_the_backend(rich: Rich, path: str) -> None:
    seen = await rich.door.seen("POST", path, body=b'{"model":"far"}')
    assert seen["line"] == f"POST {path}"


# ----------------------------------------------------- front door: a backend's own headers ----


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization: Bearer of the client"],
        ["AUTHORIZATION: Bearer of the client", "x-team: mine", "X-TEAM: mine too"],
    ],
)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("POST", "/x", b'{"model":"far"}'), ("GET", "/upstream/far/x", b"")],
)
async def test_headers_of_an_entry_take_the_place_of_the_clients(
    rich: Rich, method: str, path: str, body: bytes, headers: list[str]
) -> None:
    seen = await rich.door.seen(method, path, *headers, body=body)
    got = [pair for pair in seen["headers"] if pair[0] not in MADE_ANEW]
    assert sorted(got) == [["authorization", "Bearer s3cret"], ["x-team", "t"]]


async def test_other_models_do_not_get_these_headers(rich: Rich) -> None:
    seen = await rich.door.seen("POST", "/x", "X-Own: 1", body=b'{"model":"embed"}')
    assert [pair for pair in seen["headers"] if pair[0] not in MADE_ANEW] == [["x-own", "1"]]


async def test_headers_of_an_entry_go_with_its_probes(
    shared_jano: Shared, chat: Backend, code: Backend
) -> None:
    """Or a server that wants a key would never be ready."""

    async def guarded(request: web.Request) -> web.Response:
        known = request.headers.get("Authorization") == "Bearer s3cret"
        return web.Response(status=200 if known else 401)

    code.look = guarded
    models = [entry(chat), entry(code, headers={"authorization": "Bearer s3cret"})]
    async with shared_jano(models) as daemon:
        assert (await event(daemon.ask("code")))[0] == 200


# ------------------------------------------------------- front door: what cannot be served ----


@pytest.mark.parametrize(("path", "headers", "dialect"), DIALECTS)
async def test_failed_swap_is_told_in_the_dialect_of_who_asks(
    slow: Slow, path: str, headers: list[str], dialect: str
) -> None:
    answer = await asked(slow.jano, "POST", path, *headers, body=b'{"model":"broken"}')
    assert answer.status == 503
    assert answer.headers["x-should-retry"] == "false"
    check_dialect(answer, dialect, 'swap to "broken" failed: the script exited with code 1')


# ----------------------------------------------------------- faults of the field: backends ----


async def test_server_that_was_stopped_is_replaced_after_its_first_silence(tmp_path: Path) -> None:
    """To the script it still seems to run, so it is told that it does not."""
    port = free_port()
    server = toy_server(tmp_path, "chat", port)
    script = swap_script(
        tmp_path,
        f"""cd "{tmp_path}"
        if [ -n "$JANO_RESTART" ]; then kill -KILL "$(cat pid)"; rm pid; fi
        if ! [ -e pid ]; then {server} >server.log 2>&1 & echo $! >pid; fi""",
        status='echo "chat: loaded"',
    )
    models = [{"name": "chat", "url": f"http://127.0.0.1:{port}"}]
    try:
        async with running_jano(tmp_path, models, script, REQUEST_TIMEOUT_MS=300) as daemon:
            first = (await daemon.ask("chat"))[1]["pid"]
            os.kill(first, signal.SIGSTOP)
            assert (await daemon.ask("chat"))[0] == 504
            status, answer = await event(daemon.ask("chat"))
            assert status == 200
            assert answer["pid"] != first
            assert calls(tmp_path, environ=True) == ["chat previous=", "chat previous= restart=1"]
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_backend_that_dies_within_an_answer_and_is_not_well_is_restarted(
    shared_jano: Shared, tmp_path: Path, chat: Backend
) -> None:
    restarted = tmp_path / "restarted"

    async def look(_: web.Request) -> web.Response:
        return web.Response(status=200 if chat.ready or restarted.exists() else 503)

    async def die(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"{")
        chat.ready, chat.answer = False, chat.plain
        assert request.transport
        request.transport.abort()
        return response

    chat.look, chat.answer = look, die
    script = swap_script(tmp_path, f'[ -z "$JANO_RESTART" ] || touch "{restarted}"')
    async with shared_jano([entry(chat)], script) as daemon:
        await daemon.logged("worker started", loaded="chat")
        with pytest.raises(aiohttp.ClientError):
            await daemon.post("chat")
        assert (await event(daemon.ask("chat")))[0] == 200
        assert calls(tmp_path, environ=True) == ["chat previous= restart=1"]


async def test_backend_that_refuses_requests_is_not_asked_for_its_health(
    shared_jano: Shared, chat: Backend
) -> None:
    """A 4xx is the client's fault."""
    looks = 0

    async def look(_: web.Request) -> web.Response:
        nonlocal looks
        looks += 1
        return web.Response()

    chat.look, chat.answer = look, says(b"{}", status=400)
    async with shared_jano([entry(chat)]) as daemon:
        await daemon.logged("worker started", loaded="chat")
        assert [(await daemon.ask("chat"))[0] for _ in range(3)] == [400] * 3
        assert looks == 1


async def test_backend_whose_certificate_nobody_knows_is_not_ready_and_that_is_said(
    tmp_path: Path,
) -> None:
    async with tls_backend(tmp_path, "localhost") as (port, _):
        models = [{"name": "chat", "url": f"https://localhost:{port}"}]
        async with running_jano(tmp_path, models, SWAP_WAIT_TIMEOUT_MS=300) as daemon:
            status, answer = await daemon.ask("chat")
            assert status == 503
            assert "certificate" in answer["error"]["message"]
            assert "certificate" in (await daemon.logged("swap failed"))["err"]


# -------------------------------------------------------- faults of the field: the machine ----


async def test_answer_that_came_while_the_machine_slept_is_passed_on(impatient_wire: Raw) -> None:
    """After a suspension all deadlines have passed; but what came in time came in time."""
    impatient_wire.reply = HELD
    for _ in range(3):
        asking = asyncio.create_task(exchange(impatient_wire.jano, post_bytes()))
        writer = await event(impatient_wire.talks.get())
        async with suspended(impatient_wire.jano):
            impatient_wire.say(writer, Raw.reply)
        assert answered(await asking).status == 200


async def test_client_whose_request_came_while_the_machine_slept_is_served(
    impatient_wire: Raw,
) -> None:
    async with suspended(impatient_wire.jano):
        asking = asyncio.create_task(exchange(impatient_wire.jano, post_bytes()))
    assert answered(await asking).status == 200


@contextlib.asynccontextmanager
async def suspended(daemon: Running) -> AsyncIterator[None]:
    """It sleeps until after the block, for longer than the 0.25 seconds of its patience."""
    daemon.kill(signal.SIGSTOP)
    try:
        yield
        await asyncio.sleep(0.3)
    finally:
        daemon.kill(signal.SIGCONT)


# ---------------------------------------------------------------------------------- safety ----


async def test_backends_words_after_heartbeats_are_told_to_the_client_alone(slow: Slow) -> None:
    """They may quote a prompt."""
    answer = says(b'{"error": "no: s3cret-prompt"}', status=500)
    [told] = await after_heartbeats(slow, stream_bytes("/v1/chat/completions"), answer)
    assert b"s3cret-prompt" in told
    shown = [await slow.jano.get(path) for path in ("/status", "/usage", "/")]
    assert "s3cret-prompt" not in str((shown, slow.jano.lines))


async def test_key_of_a_backend_is_told_to_nobody(rich: Rich) -> None:
    daemon = rich.door.jano
    routes = ("/status", "/usage", "/metrics", "/", "/v1/models", "/api/tags")
    shown = [await daemon.get(path) for path in routes]
    assert "s3cret" not in str((shown, daemon.lines))


HOSTILE_NAMES = [
    'it\'s "so"',
    "$(touch oops)",
    "`touch oops`; a",
    "<script>alert(1)</script>",
    "back\\slash\\n",
    "🦙",
    "-rf",
    "../../etc",
    "x" * 200,
    "%s%2F{}",
]


async def test_hostile_names_arrive_everywhere_as_they_are(tmp_path: Path, chat: Backend) -> None:
    script = swap_script(tmp_path, f"cd '{tmp_path}'; printf '%s|' \"$@\" >>argv")
    models = [entry(chat, name=name) for name in HOSTILE_NAMES]
    async with running_jano(tmp_path, models, script) as daemon:
        for name in HOSTILE_NAMES:
            assert (await daemon.ask(name))[0] == 200
            assert json.loads(chat.bodies[-1])["model"] == name
            found = await daemon.get(f"/v1/models/{quote(name, safe='')}")
            assert (found["id"], found["status"]) == (name, {"value": "loaded"})
        assert (tmp_path / "argv").read_text() == "|".join([*HOSTILE_NAMES, ""])
        ready = [line["model"] for line in daemon.log("swap ready")]
        assert ready == HOSTILE_NAMES
        label = r'jano_requests_total\{model="((?:\\.|[^\\"\n])*)",status="200"\} 1'
        labels = re.findall(label, await daemon.get("/metrics"))
        assert [re.sub(r"\\(.)", r"\1", name) for name in labels] == HOSTILE_NAMES
        assert "<script>alert" not in await daemon.get("/")
    assert not (tmp_path / "oops").exists()


# ------------------------------------------------------------------------------------ fuzz ----

METHODS = ["POST"] * 6 + ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"]
TARGETS = ["/v1/chat/completions"] * 5 + [
    "/",
    "//",
    "/../../x",
    "/x?model=%00",
    "/x?model",
    "/x?model=chat&model=%ff",
    "/upstream/chat/x",
    "/upstream/chat",
    "/upstream/%ff/%00",
    "/upstream//",
    "/v1/models/",
    "/v1/models/%2F%ff",
    "/status",
    "/health",
    "/metrics",
    "/api/tags",
    "/api/show",
    "/api/chat",
    "/v1/messages",
    "/v1/responses",
    "/usage?limit=-1",
    "/usage?limit=1e9",
    "/v1/audio/transcriptions",
    "/x?[]=%C3",
    "/;x=y?a=%F0%9F",
    "//[",
    "//evil.example/x",
]
ODD_HEADERS = [  # odd, but the end of the request is where it seems to be
    "Content-Type: multipart/form-data; boundary=b",
    "Content-Type: multipart/mixed; boundary=b",
    "Content-Type: multipart/form-data",
    'Content-Type: multipart/form-data; boundary="',
    "Content-Type: ;",
    "Content-Type: a/b; charset=\xff",
    "Content-Encoding: x",
    "Content-Encoding: gzip, x",
    "Origin: null",
    "Origin: http://\xff",
    "X-Model: \xff",
    "X-Model: chat",
    "Expect: 100-continue",
    "TE: trailers",
    "Connection: host, content-length",
    "Connection: ,, ,",
    "Authorization: \xff",
    "Authorization: Basic \xff",
    "api-key: \xff",
    "Cookie: \xff=;;=",
    "Range: bytes=9-",
    "Access-Control-Request-Headers: \xff",
    "Access-Control-Request-Private-Network: \xff",
    "Accept-Encoding: \xff",
    "Accept: text/html",
    "anthropic-version: \xff",
    "Content-Disposition: \xff",
    "Keep-Alive: x",
    "Y: " + "y" * 8000,
]
BAD_HEADERS = [  # with these nobody may know where the request ends
    "Content-Length: 1",
    "Content-Length: -1",
    "Content-Length: 1, 1",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked, x",
    "Content-Encoding: gzip",
    "Content-Encoding: br",
    "Content-Encoding: deflate",
    "Content-Encoding: zstd",
    "Host: [",
    "Host: evil.example",
    "Host:",
    "Expect: x",
    "Connection: upgrade\r\nUpgrade: h2c",
    "Connection: upgrade\r\nUpgrade: websocket",
    "Connection: close, ,x",
    " folded",
    "no colon",
    "a\0b: c",
    ": x",
    "Trailer: x",
    "X: y\rz",
    "X: y\0",
    "Y: " + "y" * 70_000,
]
PART_HEADERS = [
    "Content-Length: x",
    "Content-Transfer-Encoding: x",
    "Content-Transfer-Encoding: base64",
    "Content-Type: multipart/mixed; boundary=c",
    "Content-Type: multipart/mixed",
    "Content-Encoding: gzip",
    "Content-Disposition: form-data; name=_charset_",
    "Content-Type: ;",
    "X: y",
]
WHOLE_FORM = (
    b'--b\r\n%sContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n--b\r\n'
    b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n\xff\r\n--b--\r\n'
)
ODD_VALUES = [
    b"9" * 5000,
    b"null",
    b"[]",
    b'""',
    b"{}",
    b"0",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"true",
    b'"chat"',
    b'"CHAT"',
    b'"no"',
    b'"\\ud800"',
    b'"\xff"',
    b'"\\u0000"',
    b'{"a":1}',
    b"[[]]",
    b"\xef\xbb\xbf",
]


def one_header(dice: random.Random, headers: list[str]) -> bytes:
    return dice.choice(headers).encode("latin-1") + b"\r\n"


def damaged(dice: random.Random, data: bytes) -> bytes:
    """The same with something cut out, repeated, replaced or put in."""
    begin, end = sorted(dice.choices(range(len(data) + 1), k=2))
    part = data[begin:end]
    rest = dice.choice([data[end:], data[begin + 1 :], b""])
    changed = [b"", part * 2, part[::-1], dice.randbytes(9), b"\r\n", b"\0", part.swapcase()]
    return data[:begin] + dice.choice(changed) + rest


def odd_body(dice: random.Random) -> bytes:
    value = dice.choice(ODD_VALUES)
    depth = dice.choice([9, 960, 980, 2000, 90_000])
    bodies = [
        value,
        b'{"model": %s}' % value,
        b'{"model": "chat", "stream": %s}' % value,
        b'{"model": "chat", "service_tier": %s}' % value,
        b'{"model": "chat", "stream": true, "x": %s}' % value,
        b'{"":' * depth,
        b'{"model": %s}' % (b"[" * depth + b"]" * depth),
        WHOLE_FORM % (one_header(dice, PART_HEADERS), value),
        WHOLE_FORM % (b"", b"chat"),
    ]
    body = dice.choice(bodies)
    return damaged(dice, body) if dice.random() < 0.3 else body


def malformed(dice: random.Random, headers: list[str]) -> bytes:
    """A request with one of these headers and an odd body."""
    body = odd_body(dice)
    start_line = f"{dice.choice(METHODS)} {dice.choice(TARGETS)} HTTP/1.1\r\nHost: localhost\r\n"
    head = start_line.encode() + one_header(dice, headers)
    if body and dice.random() < 0.2:
        chunks = b"%x;x=y\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(body), body)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def what_comes_back(daemon: Running, sent: bytes) -> bytes:
    """Until the connection ends, or nothing has come for a second."""
    message = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with connected(daemon, sent) as (reader, _):
            while piece := await asyncio.wait_for(reader.read(2**16), 1):
                message += piece
    return message


async def fuzz(daemon: Running, seed: int) -> list[int]:
    """Send ten malformed requests, eight of them in one go; the statuses of the answers."""
    dice = random.Random(seed)
    in_one_go = b"".join(malformed(dice, ODD_HEADERS) for _ in range(8))
    messages = await what_comes_back(daemon, in_one_go + LAST)
    for wild in (malformed(dice, BAD_HEADERS), damaged(dice, malformed(dice, ODD_HEADERS))):
        end = dice.randbytes(9) if dice.random() < 0.1 else b"\r\n\r\n0\r\n\r\n" + LAST
        messages += await what_comes_back(daemon, wild + end)
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", messages)]


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.soak)])
async def test_no_malformed_request_harms_jano(tmp_path: Path, chat: Backend, count: int) -> None:
    answers = Counter[int]()
    seeds = iter(range(count // 10))

    async def client(daemon: Running) -> None:
        for seed in seeds:
            answers.update(await fuzz(daemon, seed))

    models = [entry(chat, upstream_model="x", endpoints=["audio/transcriptions"])]
    settings: dict[str, Any] = {"JANO_CORS_ORIGINS": "*", "HEARTBEAT_MS": 1}
    async with running_jano(tmp_path, models, **settings) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
        files = await daemon.all_over()
        await asyncio.gather(*(client(daemon) for _ in range(50)))
        await event(daemon.all_over(files))
        assert answers.total() > count // 2
        assert max(answers) < 500
        assert (await daemon.ask("chat"))[0] == 200
        await daemon.shows(ok=True, inFlight=0, queueDepth=0, queueByModel={"chat": 0})


# ----------------------------------------------------------------------------- telemetry ----


def epoch(stamp: str) -> float:
    """The time that a time stamp of jano says, in seconds since 1970."""
    return datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()


KNOWN = (
    b'{"usage": {"prompt_tokens": 9, "completion_tokens": 60},'
    b' "timings": {"prompt_per_second": 300.04, "predicted_per_second": 50}}'
)


@dataclass
class Story:
    """A day in the life of a jano with the models chat (found loaded), code, ears (passthrough)."""

    began: float  # seconds since 1970
    idle: dict[str, Any]  # /status when nobody has asked for anything
    paths: dict[str, Any]  # what was answered at the same time under the other paths
    swapping: dict[str, Any]  # /status while code is loaded and one request waits for it
    waited_ms: tuple[float, float]  # how long that had waited then, at least and at most
    busy: dict[str, Any]  # while two requests run and three wait
    after: dict[str, Any]  # in the end, after one that failed
    log: list[dict[str, Any]]

    def swap_ms(self) -> list[int]:
        return [line["ms"] for line in self.log if line["msg"] == "swap ready"]


@pytest.fixture(scope="module")
async def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    began = time.time() - 1
    async with running_backend("chat") as chat, running_backend("code") as code:
        models = [entry(chat), entry(code), entry(chat, name="ears", passthrough=True)]
        async with running_jano(folder, models, gated_script(folder)) as daemon:
            await daemon.logged("worker started")
            idle = await daemon.status()
            paths = {path: await daemon.get(path) for path in HEALTH_ROUTES}

            chat.answer, code.answer = says(KNOWN), code.held
            for model in ("chat", "ears"):
                assert (await daemon.ask(model))[0] == 200
            asks = await daemon.queued("code")
            came = epoch((await daemon.logged("enqueued", 2))["t"])
            await daemon.logged("swap requested")
            least = time.time() - came
            swapping = await daemon.status()
            most = time.time() - came

            (folder / "go").touch()
            await event(code.arrived.get())
            chat.answer, chat.arrived = chat.held, asyncio.Queue()
            asks.append(daemon.background(daemon.post("ears")))
            await event(chat.arrived.get())
            asks += await daemon.queued("chat", "code", "chat")
            busy = await daemon.status()
            chat.release.set()
            code.release.set()
            assert await statuses(asks) == [200] * 5

            chat.answer = says(b"{}", status=500)
            assert (await daemon.ask("chat"))[0] == 500
            after = await daemon.status()
    waited_ms = (least * 1000, most * 1000)
    return Story(began, idle, paths, swapping, waited_ms, busy, after, daemon.lines)


NOBODY = {"chat": 0, "code": 0, "ears": 0}


def shown(status: dict[str, Any], **wanted: Any) -> None:
    """These fields of a /status have these values."""
    assert {name: status.get(name) for name in wanted} == wanted


async def test_status_before_the_first_request_says_that_nothing_happened(story: Story) -> None:
    shown(
        story.idle,
        ok=True,
        currentModel="chat",
        loadedModels=["chat"],
        swapping=None,
        inFlight=0,
        queueDepth=0,
        queueByModel=NOBODY,
        oldestWaitingMs=0,
        active=[],
        lastSwapDurationMs=None,
        recentSwaps=[],
        swapsTotal=0,
        swapsAvoided=0,
        swapTimeSavedMs=None,
        tokSByModel={},
        requestsServedTotal=0,
        requestsByModel=NOBODY,
        tokensGeneratedTotal=0,
        tokensByModel=NOBODY,
        lastError=None,
        backendHealth={"chat": "up", "code": "unknown", "ears": "unknown"},
    )


async def test_status_says_since_when_jano_and_the_model_are_up(story: Story) -> None:
    assert story.began < epoch(story.idle["currentModelLoadedAt"]) < story.began + PATIENCE
    assert 0 <= story.idle["uptimeSeconds"] <= PATIENCE


async def test_status_of_a_lone_group_does_not_show_groups(story: Story) -> None:
    assert "groups" not in story.idle


@pytest.mark.parametrize("path", HEALTH_ROUTES)
async def test_health_says_what_status_says(story: Story, path: str) -> None:
    health = story.paths[path]
    assert health | {"uptimeSeconds": 0} == story.idle | {"uptimeSeconds": 0}


async def test_status_during_a_swap_says_so_and_who_waits(story: Story) -> None:
    shown(
        story.swapping,
        currentModel=None,
        currentModelLoadedAt=None,
        loadedModels=[],
        swapping="code",
        inFlight=0,
        queueDepth=1,
        queueByModel=NOBODY | {"code": 1},
    )
    least, most = story.waited_ms
    assert least - 5 <= story.swapping["oldestWaitingMs"] <= most + 5


async def test_status_counts_what_runs_and_what_waits(story: Story) -> None:
    shown(
        story.busy,
        currentModel="code",
        swapping=None,
        inFlight=2,
        queueDepth=3,
        queueByModel=NOBODY | {"chat": 2, "code": 1},
        swapsTotal=1,
        swapsAvoided=3,
    )


async def test_status_lists_what_runs_and_what_waits(story: Story) -> None:
    active = story.busy["active"]
    assert [(call["id"], call["model"], call["state"]) for call in active] == [
        ("3", "code", "running"),
        ("4", "ears", "running"),
        ("5", "chat", "waiting"),
        ("6", "code", "waiting"),
        ("7", "chat", "waiting"),
    ]


async def test_status_tells_the_wait_of_a_request_from_all_its_time(story: Story) -> None:
    behind_swap, passed, waiting = story.busy["active"][:3]
    assert behind_swap["queue_ms"] >= story.waited_ms[0] > passed["queue_ms"]
    assert behind_swap["total_ms"] > behind_swap["queue_ms"]
    assert story.busy["oldestWaitingMs"] == waiting["queue_ms"] == waiting["total_ms"]


async def test_status_afterwards_counts_all_that_happened(story: Story) -> None:
    shown(
        story.after,
        currentModel="chat",
        inFlight=0,
        queueDepth=0,
        active=[],
        swapsTotal=2,
        swapsAvoided=2,
        tokSByModel={"chat": 50.0, "ears": 50.0},
        requestsServedTotal=7,
        requestsByModel={"chat": 3, "code": 2, "ears": 2},
        tokensGeneratedTotal=120,
        tokensByModel={"chat": 60, "code": 0, "ears": 60},
        backendHealth={"chat": "up", "code": "unknown", "ears": "up"},
    )


async def test_status_tells_the_latest_swaps(story: Story) -> None:
    first, second = story.swap_ms()
    stamps = [swap["ts"] for swap in story.after["recentSwaps"]]
    assert story.after["recentSwaps"] == [
        {"ts": stamps[0], "from": "chat", "to": "code", "ms": first, "ok": True},
        {"ts": stamps[1], "from": "code", "to": "chat", "ms": second, "ok": True},
    ]
    assert story.began < epoch(stamps[0]) <= epoch(stamps[1]) <= time.time()
    assert story.after["lastSwapDurationMs"] == second


async def test_time_saved_is_that_of_the_swaps_avoided(story: Story) -> None:
    """Two were made and two avoided, so it is just the time that swaps took."""
    assert story.after["swapTimeSavedMs"] == pytest.approx(sum(story.swap_ms()), abs=2)


async def test_status_tells_the_last_error(story: Story) -> None:
    error = story.after["lastError"]
    assert (error["model"], error["message"]) == ("chat", "the backend answered 500")
    assert story.began < epoch(error["ts"]) <= time.time()


async def test_last_line_of_the_log_sums_up(story: Story) -> None:
    last = story.log[-1]
    assert last["msg"] == "jano stopped"
    assert (last["served"], last["swaps"], last["swapsAvoided"]) == (7, 2, 2)
    assert last["swapTimeSavedMs"] == pytest.approx(sum(story.swap_ms()), abs=2)


async def test_request_is_counted_before_its_client_can_tell_that_it_is_over(
    tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        for count in range(1, 61):
            chat.answer = says(b"x" * 99_999) if count % 2 else says(b"in", b"chunks")
            await daemon.post("chat")
            await daemon.shows(requestsServedTotal=count, inFlight=0)


async def test_two_groups_are_shown_apart(tmp_path: Path, chat: Backend, code: Backend) -> None:
    code.ready, chat.answer, code.answer = False, chat.held, code.held
    models = [entry(chat, group="a"), entry(code, group="b")]
    async with running_jano(tmp_path, models, gated_script(tmp_path)) as daemon:
        asks = await daemon.queued("code", "chat")
        await event(chat.arrived.get())
        await daemon.logged("swap requested")
        status = await daemon.shows(currentModel="chat", swapping=None, inFlight=1, queueDepth=1)
        shown(status["groups"]["a"], currentModel="chat", swapping=None, queueDepth=0, inFlight=1)
        shown(status["groups"]["b"], currentModel=None, swapping="code", queueDepth=1, inFlight=0)
        assert status["groups"]["a"]["currentModelLoadedAt"] == status["currentModelLoadedAt"]
        (tmp_path / "go").touch()
        code.ready = True
        await event(code.arrived.get())
        status = await daemon.shows(currentModel="chat", inFlight=2, queueDepth=0)
        shown(status["groups"]["b"], currentModel="code", swapping=None, queueDepth=0, inFlight=1)
        chat.release.set()
        code.release.set()
        assert await statuses(asks) == [200, 200]


# /usage


@dataclass
class UsageStory:
    """What became of six requests: answered, refused by the backend or the swap, left, late."""

    usage: dict[str, Any]
    limited: dict[str, Any]  # with ?limit=2
    first: dict[str, Any]  # the record of the first one, which is forgotten in the end
    served: dict[str, Any]  # the log's line of the first one
    status: dict[str, Any]


@pytest.fixture(scope="module")
async def usage_story(tmp_path_factory: pytest.TempPathFactory) -> UsageStory:
    folder = tmp_path_factory.mktemp("usage")
    script = swap_script(folder, '[ "$1" != code ]', status='echo "chat: loaded"')
    settings: dict[str, Any] = {"REQUEST_TIMEOUT_MS": 300, "USAGE_RECORDS_MAX": 5}
    async with running_backend("chat") as chat:
        gone = {"name": "gone", "url": f"http://127.0.0.1:{free_port()}", "passthrough": True}
        models = [
            entry(chat),
            entry(chat, name="code", url=f"{chat.url}/code"),
            entry(chat, name="slow", passthrough=True),
            gone,
        ]
        async with running_jano(folder, models, script, **settings) as daemon:
            chat.answer = says(KNOWN)
            assert (await daemon.ask("chat"))[0] == 200
            served = await daemon.logged("served", model="chat", status=200)
            [first] = (await daemon.get("/usage"))["records"]
            assert (await daemon.ask("gone"))[0] == 502
            assert (await daemon.ask("code"))[0] == 503
            chat.answer, chat.arrived = chat.held, asyncio.Queue()
            slow = daemon.background(daemon.ask("slow"))
            running, waiting = await daemon.queued("chat", "chat")
            await event(chat.arrived.get())
            await event(chat.arrived.get())
            waiting.cancel()
            await daemon.logged("client disconnected", model="chat", status=499)
            running.cancel()
            await daemon.logged("served", model="chat", status=499, aborted=True)
            assert (await slow)[0] == 504
            usage, limited = await daemon.get("/usage"), await daemon.get("/usage?limit=2")
            status = await daemon.status()
    return UsageStory(usage, limited, first, served, status)


async def test_usage_tells_tokens_and_times_of_a_request(usage_story: UsageStory) -> None:
    record, served = usage_story.first, usage_story.served
    assert record == record | {
        "id": served["id"],
        "model": "chat",
        "path": "/v1/chat/completions",
        "status": 200,
        "total_ms": served["ms"],
        "prompt_tokens": 9,
        "gen_tokens": 60,
        "gen_tok_s": 50.0,
        "prompt_tok_s": 300.0,
    }
    assert abs(epoch(record["ts"]) - epoch(served["t"])) < 0.1
    assert 0 <= record["queue_ms"] <= record["queue_ms"] + record["ttfb_ms"] <= served["ms"] + 1


async def test_log_line_of_a_request_has_its_fields_in_this_order(usage_story: UsageStory) -> None:
    assert list(usage_story.served) == [
        "t",
        "level",
        "msg",
        "id",
        "model",
        "status",
        "ms",
        "aborted",
    ]
    assert usage_story.served["aborted"] is False


async def test_usage_has_the_latest_requests_first_and_no_more_than_it_may(
    usage_story: UsageStory,
) -> None:
    found = [(record["model"], record["status"]) for record in usage_story.usage["records"]]
    left, refused_ = ("chat", 499), [("code", 503), ("gone", 502)]
    assert found == [("slow", 504), left, left, *refused_]
    assert usage_story.usage["count"] == 5


async def test_usage_may_be_limited(usage_story: UsageStory) -> None:
    latest = usage_story.usage["records"][:2]
    assert usage_story.limited == {"count": 2, "records": latest}


@pytest.mark.parametrize("number", range(5))
async def test_usage_claims_nothing_of_what_never_was(usage_story: UsageStory, number: int) -> None:
    record = usage_story.usage["records"][number]
    never_known = ["ttfb_ms", "prompt_tokens", "gen_tokens", "gen_tok_s", "prompt_tok_s"]
    assert [record[key] for key in never_known] == [None] * 5


async def test_usage_tells_the_wait_for_a_turn_from_that_for_an_answer(
    usage_story: UsageStory,
) -> None:
    late, _, left, *_ = usage_story.usage["records"]
    assert 0 <= late["queue_ms"] < 300 <= late["total_ms"]
    assert left["queue_ms"] == left["total_ms"]  # it never had its turn


async def test_status_knows_which_backends_and_swaps_failed(usage_story: UsageStory) -> None:
    status = usage_story.status
    health = {"chat": "up", "code": "down", "gone": "down", "slow": "down"}
    shown(status, requestsServedTotal=1, swapsTotal=1, backendHealth=health)
    swaps = [(swap["from"], swap["to"], swap["ok"]) for swap in status["recentSwaps"]]
    assert swaps == [("chat", "code", False), (None, "chat", True)]
    assert status["lastSwapDurationMs"] == status["recentSwaps"][1]["ms"]


# Tokens

LONG = 'data: {"choices": [{"delta": {"content": "token"}}]}\n\n' * 50_000  # 3 MB
BEGIN = 'data: {"message": {"usage": {"input_tokens":25,"output_tokens":1}}}\n\n'
END = 'data: {"usage": {"output_tokens": 15}}\n\n'
TOKENS = {  # an answer, "|" between its chunks; prompt and generated tokens, then each a second
    "OpenAI": (
        '{"usage":{"prompt_tokens":9,"completion_tokens":0,"x_tokens":{}}}',
        9,
        0,
        None,
        None,
    ),
    "cut within a word": (
        'data: {"usage":{"prompt_tok|ens":9,"completion_tokens":6}}|\n\ndata: [DONE]',
        *(9, 6, None, None),
    ),
    "long stream": (
        LONG + '|data: {"usage":{"prompt_tokens":9,"completion_tokens":6}}',
        *(9, 6, None, None),
    ),
    "llama.cpp": (
        '{"timings":{"prompt_n":5,"prompt_ms":50.1,"prompt_per_second":99.76,"predicted_n":7,'
        '"predicted_per_second":5.0e1}}',
        *(5, 7, 50.0, 99.8),
    ),
    "Ollama": (
        '{"done":false}\n|{"done":true,"prompt_eval_count":11,"prompt_eval_duration":1000000000,'
        '"eval_count":30,"eval_duration":2000000000}\n',
        *(11, 30, 15.0, 11.0),
    ),
    "Ollama in no time": ('{"eval_count": 30, "eval_duration": 0}', None, 30, None, None),
    "other tokens beside": (
        '{"usage":{"input_tokens":7,"output_tokens":8,"cache_input_tokens":9}}',
        *(7, 8, None, None),
    ),
    "Anthropic": (BEGIN + "|" + END, 25, 15, None, None),
    "long one of Anthropic": (BEGIN + "|" + LONG + "|" + END, 25, 15, None, None),
    "long one of Anthropic, begun in pieces": (
        BEGIN[:9] + "||" + BEGIN[9:] + LONG + END,
        *(25, 15, None, None),
    ),
    "Responses": (
        'data: {"type":"response.completed","response":{"usage":{"input_tokens":36,'
        '"input_tokens_details":{"cached_tokens":0},"output_tokens":87}}}',
        *(36, 87, None, None),
    ),
    "within a text": (
        r'{"content": "he said \"prompt_tokens\": 5, \"eval_count\": 6"}',
        *(None, None, None, None),
    ),
    "no numbers": (
        '{"usage": {"prompt_tokens": null, "completion_tokens": "7"}}',
        *(None, None, None, None),
    ),
    "just a word": ('{"answer": "9 tokens"}', None, None, None, None),
    "endless prompt": (
        '{"usage":{"prompt_tokens":1e999,"completion_tokens":3}}',
        *(None, 3, None, None),
    ),
    "endless speed of Ollama": (
        '{"eval_count": 1, "eval_duration": 0.%s1}' % ("0" * 310),
        *(None, 1, None, None),
    ),
    "endless speed": (
        '{"timings":{"predicted_n":3,"predicted_per_second":1e999}}',
        *(None, 3, None, None),
    ),
}
counts = itemgetter("prompt_tokens", "gen_tokens", "gen_tok_s", "prompt_tok_s")


@pytest.fixture(scope="module")
async def counting(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Running, Backend]]:
    async with running_backend("chat") as chat:
        async with running_jano(tmp_path_factory.mktemp("tokens"), [entry(chat)]) as daemon:
            yield daemon, chat


async def record_of(daemon: Running, **fields: Any) -> dict[str, Any]:
    """What /usage says of a new request."""
    assert (await daemon.post("chat", **fields)).status == 200
    return dict((await daemon.get("/usage?limit=1"))["records"][0])


@pytest.mark.parametrize("kind", TOKENS)
async def test_tokens_are_read_from_every_kind_of_answer(
    counting: tuple[Running, Backend], kind: str
) -> None:
    daemon, chat = counting
    text, *wanted = TOKENS[kind]
    assert isinstance(text, str)
    chat.answer = says(*text.encode().split(b"|"))
    assert list(counts(await record_of(daemon))) == wanted
    assert "Infinity" not in json.dumps(await daemon.status())


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'the log said "prompt_tokens": 5', {"Content-Type": "text/plain"}),
        (gzip.compress(KNOWN), {"Content-Encoding": "gzip"}),
    ],
    ids=["plain text", "gzip"],
)
async def test_nothing_else_is_taken_for_tokens(
    counting: tuple[Running, Backend], body: bytes, headers: dict[str, str]
) -> None:
    daemon, chat = counting
    chat.answer = says(body, headers=headers)
    assert counts(await record_of(daemon)) == (None, None, None, None)


async def test_speed_of_a_stream_that_names_none_is_measured(
    counting: tuple[Running, Backend],
) -> None:
    daemon, chat = counting
    chat.answer = says(BEGIN.encode(), b"", END.encode())
    record = await record_of(daemon, stream=True)
    took = (record["total_ms"] - record["queue_ms"] - record["ttfb_ms"]) / 1000
    assert counts(record) == (25, 15, pytest.approx(15 / took, rel=0.05), None)


async def test_speed_of_an_answer_that_came_all_at_once_is_unknown(
    counting: tuple[Running, Backend],
) -> None:
    daemon, chat = counting
    chat.answer = says((BEGIN + END).encode())
    assert counts(await record_of(daemon, stream=True)) == (25, 15, None, None)


# Swaps avoided: what a proxy that swaps at each change of the model would have done, less ours


async def test_request_for_what_turns_out_to_be_loaded_saves_no_swap(
    tmp_path: Path, chat: Backend
) -> None:
    script = gated_script(tmp_path, "status", then='echo "chat: loaded"')
    async with running_jano(tmp_path, [entry(chat)], script) as daemon:
        early = await daemon.queued("chat")
        (tmp_path / "go").touch()
        assert await statuses(early) == [200]
        await daemon.shows(swapsTotal=0, swapsAvoided=0)


async def test_swap_after_an_unload_is_no_swap_saved(tmp_path: Path, chat: Backend) -> None:
    """Any other proxy would have to load the model anew, too."""
    async with running_jano(tmp_path, [entry(chat)], IDLE_UNLOAD_MS=100) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
        await daemon.logged("unload requested")
        await daemon.logged("unload requested")
        assert (await daemon.ask("chat"))[0] == 200
        await daemon.shows(swapsTotal=1, swapsAvoided=0)


async def test_unload_does_not_hide_what_was_saved_before(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat), entry(code)], IDLE_UNLOAD_MS=300) as daemon:
        await daemon.logged("worker started", loaded="chat")
        asks = await daemon.queued("chat", "code", "chat")
        chat.release.set()
        assert await statuses(asks) == [200] * 3
        await daemon.logged("unload requested")
        assert (await daemon.ask("chat"))[0] == 200
        await daemon.shows(swapsTotal=2, swapsAvoided=1)


async def test_failed_swaps_save_nothing(tmp_path: Path, chat: Backend, code: Backend) -> None:
    models, script = [entry(chat), entry(code)], swap_script(tmp_path, '[ "$1" != code ]')
    async with running_jano(tmp_path, models, script, SWAP_FAILURE_LIMIT=1) as daemon:
        for model, status in [("chat", 200), ("code", 503)] * 3 + [("chat", 200)]:
            assert (await daemon.ask(model))[0] == status
        await daemon.logged("failing fast: backend marked bad", 2)
        await daemon.shows(swapsTotal=1, swapsAvoided=0, swapTimeSavedMs=0)


async def test_who_waits_for_a_swap_that_fails_is_not_in_flight(
    tmp_path: Path, code: Backend
) -> None:
    code.ready = False
    script = gated_script(tmp_path, then="exit 1")
    async with running_jano(tmp_path, [entry(code)], script) as daemon:
        asks = await daemon.queued(*["code"] * 50, stream=True)
        (tmp_path / "go").touch()
        looks = LAST.replace(b"Connection: close", b"X: y") * 300 + LAST
        seen = await exchange(daemon, looks)
        assert await statuses(asks) == [503] * 50
        assert set(re.findall(rb'"inFlight": (\d+)', seen)) == {b"0"}


# /metrics

Samples = list[tuple[str, str, str]]  # name without jano_, labels, value


def promtool(text: str, *check: str) -> None:
    """Let Prometheus' own tool check this text, where there is one."""
    tool = shutil.which("promtool")
    if not tool:
        return
    command = [tool, "check", *(check or ["metrics"])]
    said = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    assert (said.returncode, said.stderr) == (0, b"")
    assert check or not said.stdout


EVIL = 'he said "hi"\\n{evil="1"} 7\x85\u2028é\\'


@dataclass
class MetricsStory:
    """Two requests for a model with an odd name, one with status 404, one whose swap failed."""

    empty: str  # /metrics before the first request
    text: str  # /metrics in the end
    status: dict[str, Any]

    def samples(self) -> Samples:
        odd = EVIL.replace("\\", "\\\\").replace('"', '\\"')
        return re.findall(
            "^jano_([^#{ ]+)(?:{(.*)})? ([^ ]+)$", self.text.replace(odd, "evil"), re.M
        )

    def values(self) -> dict[str, float]:
        """Of all but the buckets, by name and labels: 'queue_depth model=code'."""
        values = {}
        for name, labels, value in self.samples():
            if not name.endswith("_bucket"):
                values[" ".join([name, *labels.replace('"', "").split(",")]).strip()] = float(value)
        return values


@pytest.fixture(scope="module")
async def metrics(tmp_path_factory: pytest.TempPathFactory) -> MetricsStory:
    folder = tmp_path_factory.mktemp("metrics")
    script = swap_script(folder, '[ "$1" != no ]', status=":")  # nothing is loaded at the start
    async with running_backend("chat") as chat, running_backend("code") as code:
        chat.ready = code.ready = False
        models = [entry(chat, name=EVIL), entry(code), entry(chat, name="no")]
        async with running_jano(folder, models, script) as daemon:
            await daemon.logged("worker started", loaded=None)
            empty = await daemon.get("/metrics")
            chat.ready = code.ready = True
            chat.answer, code.answer = says(KNOWN), says(b"", status=404)
            for model, status in [(EVIL, 200), ("code", 404), (EVIL, 200), ("no", 503)]:
                assert (await daemon.post(model)).status == status
            return MetricsStory(empty, await daemon.get("/metrics"), await daemon.status())


async def test_metrics_are_what_prometheus_reads(metrics: MetricsStory) -> None:
    promtool(metrics.empty)
    promtool(metrics.text)


async def test_metrics_agree_with_status(metrics: MetricsStory) -> None:
    status = metrics.status
    swap_seconds = sum(swap["ms"] for swap in status["recentSwaps"] if swap["ok"]) / 1000
    wanted = {
        "uptime_seconds": pytest.approx(status["uptimeSeconds"], abs=1.5),
        "in_flight": 0,
        "swaps_avoided": status["swapsAvoided"],
        "swap_time_saved_seconds": pytest.approx(status["swapTimeSavedMs"] / 1000),
        "swap_duration_seconds_count": status["swapsTotal"],
        "swap_duration_seconds_sum": pytest.approx(swap_seconds, abs=0.002),
        "model_loaded model=no": 0,
        "model_loaded model=code": 0,
        "model_loaded model=evil": 0,
        "queue_depth model=no": 0,
        "queue_depth model=code": 0,
        "queue_depth model=evil": 0,
        "backend_up model=no": 0,
        "backend_up model=code": 0,
        "backend_up model=evil": 0,
        "swaps_total from= to=evil": 1,
        "swaps_total from=evil to=code": 1,
        "swaps_total from=code to=evil": 1,
        "swap_failures_total model=no": 1,
        "requests_total model=evil status=200": status["requestsByModel"][EVIL],
        "requests_total model=code status=404": 1,
        "requests_total model=no status=503": 1,
        "tokens_generated_total model=evil": status["tokensByModel"][EVIL],
        "prompt_tokens_total model=evil": 18,
        "generation_tokens_per_second model=evil": status["tokSByModel"][EVIL],
    }
    assert metrics.values() == wanted


async def test_buckets_of_swap_durations_add_up(metrics: MetricsStory) -> None:
    buckets = [float(value) for name, _, value in metrics.samples() if name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == metrics.status["swapsTotal"] == 3


def dashboard_targets() -> list[dict[str, str]]:
    panels = json.loads((JANO.parent / "contrib/grafana.json").read_text())["panels"]
    return [target for panel in panels for target in panel["targets"]]


def metric_name(sample: str) -> str:
    return re.sub("_(bucket|sum|count)$", "", sample)


async def test_dashboard_draws_all_metrics_that_there_are_and_no_more(
    metrics: MetricsStory,
) -> None:
    drawn: set[str] = set()
    for target in dashboard_targets():
        names = re.findall(r"jano_(\w+)", target["expr"])
        assert names
        drawn.update(metric_name(name) for name in names)
    assert drawn == {metric_name(name) for name, _, _ in metrics.samples()}


async def test_dashboard_uses_labels_that_there_are(metrics: MetricsStory) -> None:
    labels: dict[str, set[str]] = {}  # of each sample
    for name, text, _ in metrics.samples():
        labels.setdefault(name, {"instance"}).update(re.findall('([a-z]+)="', text))
    for target in dashboard_targets():
        used = set(re.findall(r"(\w+)=|{{(\w+)}}", target["expr"] + target["legendFormat"]))
        used_names = {name for pair in used for name in pair if name}
        for group in re.findall(r"by \((.+?)\)", target["expr"]):
            used_names.update(group.split(", "))
        for name in re.findall(r"jano_(\w+)", target["expr"]):
            assert used_names <= labels[name], target


def test_dashboards_queries_are_what_prometheus_reads() -> None:
    rules = []
    for number, target in enumerate(dashboard_targets()):
        expression = re.sub(r"\$__\w+", "5m", target["expr"])
        rules.append({"record": f"x{number}", "expr": expression})
    promtool(json.dumps({"groups": [{"name": "x", "rules": rules}]}), "rules", "/dev/stdin")


# Names that programs read, and what nobody may read


@dataclass
class Told:
    """All that a jano with a key and a failing swap tells."""

    answers: dict[str, Any]  # by path
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
async def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("told")
    script = swap_script(folder, '[ "$1" != code ]', status='echo "chat: loaded"')
    settings: dict[str, Any] = {"JANO_API_KEY": "secret-key", "SWAP_FAILURE_LIMIT": 1}
    async with running_backend("chat") as chat, running_backend("code") as code:
        chat.answer = chat.held
        async with running_jano(folder, [entry(chat), entry(code)], script, **settings) as daemon:
            daemon.session.headers["Authorization"] = "Bearer secret-key"
            running, waiting = await daemon.queued("chat", "chat", prompt="secret-prompt")
            waiting.cancel()
            await daemon.logged("client disconnected", id="2")
            chat.release.set()
            assert await statuses([running]) == [200]
            for model, status in [("code", 503), ("code", 503), ("chat", 200)]:
                assert (await daemon.ask(model))[0] == status
            paths = ["/status", "/usage", "/v1/models"]
            answers = {path: await daemon.get(path) for path in paths}
    return Told(answers, daemon.lines)


ANCESTORS_LOG = {  # what programs may read of a line of the TypeScript Jano 0.3.0, by message
    "jano listening": {"host", "port", "models"},
    "enqueued": {"id", "model"},
    "swap requested": {"model"},
    "swap ready": {"model", "ms"},
    "swap failed": {"model", "fails", "err"},
    "received signal": {"sig"},
    "failing fast: backend marked bad": {"id", "model", "fails"},
    "served": {"id", "model", "status", "ms", "aborted"},
}


@pytest.mark.parametrize("msg", ANCESTORS_LOG)
async def test_log_lines_of_the_ancestor_are_kept(told: Told, msg: str) -> None:
    lines = [line for line in told.log if line["msg"] == msg]
    assert lines
    for line in lines:
        assert ANCESTORS_LOG[msg] <= line.keys()


async def test_new_log_lines_are_there(told: Told) -> None:
    messages = {line["msg"] for line in told.log}
    assert {"worker started", "client disconnected", "jano stopped"} <= messages


async def test_names_of_the_ancestor_in_status_are_kept(told: Told) -> None:
    status = told.answers["/status"]
    kept = """ok currentModel queueDepth queueByModel oldestWaitingMs currentModelLoadedAt inFlight
        lastSwapDurationMs tokSByModel uptimeSeconds
        requestsServedTotal requestsByModel tokensGeneratedTotal tokensByModel lastError
        backendHealth"""
    assert set(kept.split()) <= status.keys()
    assert {"ts", "model", "message"} <= status["lastError"].keys()


async def test_names_of_the_ancestor_in_usage_are_kept(told: Told) -> None:
    kept = "ts model status total_ms ttfb_ms prompt_tokens gen_tokens gen_tok_s prompt_tok_s"
    for record in told.answers["/usage"]["records"]:
        assert set(kept.split()) <= record.keys()


async def test_names_of_the_ancestor_in_the_models_list_are_kept(told: Told) -> None:
    for model in told.answers["/v1/models"]["data"]:
        assert {"id", "object", "created", "owned_by", "aliases"} <= model.keys()


async def test_log_line_begins_with_time_level_and_message(told: Told) -> None:
    for line in told.log:
        assert list(line)[:3] == ["t", "level", "msg"]
        assert line["t"].endswith("Z")
        assert line["level"] in ("info", "warn", "error")
        assert isinstance(line.get("id", ""), str)


async def test_neither_key_nor_prompt_nor_answer_is_logged(told: Told) -> None:
    for word in ("secret-key", "secret-prompt", "answered_by"):
        assert word not in str(told.log)


LEAKS = [  # a request that has s3cret in it, and its status
    (500, "chat", "x-api-key: s3cret-key\r\nAuthorization: s3cret\r\nCookie: s3cret"),
    (502, "bad", "x-api-key: s3cret-key"),
    (400, "s3cret", "x-api-key: s3cret-key"),
    (401, "chat", "x-api-key: s3cret"),
    (400, "chat", "x-api-key: s3cret-key\r\nContent-Type: multipart/form-data; boundary=s3cret"),
    (400, "chat", "x-api-key: s3cret-key\r\ns3cret"),
    (400, "chat", "x-api-key: s3cret-key\r\ns3cret: \0s3cret"),
]


async def test_what_is_confided_to_jano_is_told_to_nobody(tmp_path: Path, chat: Backend) -> None:
    """Neither in the log, nor in files, nor in what it shows."""
    bad = Raw()
    bad.reply = b"s3cret\r\n\r\n"
    await bad.listen()
    chat.answer = says(b'{"answer": "s3cret"}', status=500, headers={"X-Answer": "s3cret"})
    models = [entry(chat), {"name": "bad", "url": bad.url, "passthrough": True}]
    async with running_jano(tmp_path, models, JANO_API_KEY="s3cret-key") as daemon:
        for status, model, headers in LEAKS:
            body = json.dumps({"model": model, "prompt": "s3cret"})
            request = (
                f"POST /v1/x?key=s3cret HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"{headers}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            )
            answer = await exchange(daemon, request.encode())
            assert answered(answer).status == status
        daemon.session.headers["x-api-key"] = "s3cret-key"
        shown_to_all = [await daemon.get(path) for path in ("/status", "/usage", "/metrics", "/")]
    await bad.stop()
    assert b"s3cret" in chat.bodies[0]
    files = [path.read_text() for path in tmp_path.iterdir()]
    assert "s3cret" not in str((shown_to_all, daemon.lines, files))


# The log that nobody reads


async def answers_as_jano(port: int) -> None:
    """Wait until a jano answers on this port."""
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{port}/health") as answer:
                    if answer.headers["Server"].startswith("jano/"):
                        return
            await asyncio.sleep(0.02)


ENOUGH = 100 if sys.platform == "linux" else 800  # requests whose lines do not fit into the pipe


@dataclass
class Unread:
    """A jano whose log goes into a pipe that nobody reads, unless the test does: it is full."""

    daemon: Running
    log: io.FileIO  # the pipe's other end


@contextlib.asynccontextmanager
async def talkative(folder: Path, chat: Backend, log: str) -> AsyncIterator[Running]:
    """A jano that has told this file about ENOUGH requests."""
    port = free_port()
    write_models(folder, [entry(chat)])
    process = await start(folder, redirection=f'>"{log}"', JANO_PORT=port)
    async with aiohttp.ClientSession() as session:
        daemon = Running(process, session, folder)
        daemon.port, daemon.url = port, f"http://127.0.0.1:{port}"
        try:
            await event(answers_as_jano(port))
            for _ in range(ENOUGH):
                assert (await event(daemon.ask("chat")))[0] == 200
            yield daemon
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.fixture
async def unread(tmp_path: Path, chat: Backend) -> AsyncIterator[Unread]:
    pipe = str(tmp_path / "log")
    os.mkfifo(pipe)
    log = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    if sys.platform == "linux":
        fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 4096)  # so that it is full sooner
    async with talkative(tmp_path, chat, pipe) as daemon:
        with os.fdopen(log, "rb", buffering=0) as end:
            yield Unread(daemon, end)


async def test_log_that_nobody_reads_costs_no_request(unread: Unread) -> None:
    await unread.daemon.shows(requestsServedTotal=ENOUGH)


async def test_terminal_that_nobody_reads_costs_no_request(tmp_path: Path, chat: Backend) -> None:
    ends = os.openpty()
    async with talkative(tmp_path, chat, os.ttyname(ends[1])) as daemon:
        await daemon.shows(requestsServedTotal=ENOUGH)
    for end in ends:
        os.close(end)


async def test_jano_whose_log_nobody_reads_stops_when_it_is_told_to(unread: Unread) -> None:
    unread.daemon.kill(signal.SIGTERM)
    assert await event(unread.daemon.process.wait()) == 0


async def test_lines_that_were_lost_are_counted_as_soon_as_there_is_room(unread: Unread) -> None:
    """With the lines that came through they are no more than there can have been."""
    asked = ENOUGH
    log = b""
    while b"lost" not in log:
        log += unread.log.read() or b""
        asked += 1
        assert (await event(unread.daemon.ask("chat")))[0] == 200
    lines = [json.loads(line) for line in log.decode().splitlines()]
    told = next(line for line in lines if "lost" in line["msg"])
    [lost] = [value for value in told.values() if isinstance(value, int)]
    assert 0 < lost + len(lines) <= 2 * asked + 5  # "enqueued" and "served", and at the start
    assert lost > ENOUGH / 2


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
async def test_jano_serves_on_and_ends_well_where_its_log_cannot_be_written(
    tmp_path: Path, redirection: str
) -> None:
    port = free_port()
    write_models(tmp_path, [ENTRY])
    pipe = asyncio.subprocess.PIPE
    process = await start(tmp_path, redirection=redirection, stderr=pipe, JANO_PORT=port)
    await event(answers_as_jano(port))
    process.send_signal(signal.SIGTERM)
    assert await event(process.communicate()) == (b"", b"")
    assert process.returncode == 0


@linux_only
@pytest.mark.soak
async def test_what_is_remembered_stops_growing(tmp_path: Path, chat: Backend) -> None:
    models = [entry(chat), entry(chat, name="other")]
    settings: dict[str, Any] = {"USAGE_RECORDS_MAX": 100, "IDLE_UNLOAD_MS": 10**9}
    async with running_jano(tmp_path, models, **settings) as daemon:
        chat.answer = says(KNOWN)

        async def many() -> int:
            for number in range(10_000):
                await daemon.post("chat" if number % 50 else "other")
            return daemon.memory("VmRSS")

        first = await many()
        assert await many() < first + 1000  # kB


# ---------------------------------------------------------------- reloading and stopping ----


async def test_reload_loses_neither_a_waiting_request_nor_the_loaded_model(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    async with shared_jano([entry(chat), entry(code)]) as daemon:
        asks = await daemon.queued("chat", "code", "chat")
        await daemon.reload([entry(chat), entry(code, name="new")])
        asks += await daemon.queued("new")
        chat.release.set()
        assert await statuses(asks) == [200] * 4
    assert calls(tmp_path) == ["code", "new"]  # chat was not loaded anew


async def test_model_that_a_reload_has_dropped_is_unknown(
    shared_jano: Shared, chat: Backend, code: Backend
) -> None:
    async with shared_jano([entry(chat), entry(code)]) as daemon:
        await daemon.reload([entry(chat)])
        status, answer = await daemon.ask("code")
        assert (status, answer["error"]["code"]) == (400, "model_not_found")


async def test_reload_with_a_fault_changes_nothing(tmp_path: Path, chat: Backend) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        (tmp_path / "models.json").write_text("{")
        daemon.kill(signal.SIGHUP)
        await daemon.logged("models not reloaded")
        assert (await daemon.ask("chat"))[0] == 200


async def test_waiting_request_goes_where_a_reload_has_moved_its_model(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    before = entry(code, url="http://127.0.0.1:1")
    async with shared_jano([entry(chat), before]) as daemon:
        asks = await daemon.queued("chat", "code")
        await daemon.reload([entry(chat), entry(code)])
        chat.release.set()
        assert await statuses(asks) == [200, 200]
    assert calls(tmp_path) == ["code"]


@pytest.mark.parametrize("place", [{"group": "gpu1"}, {"passthrough": True}], ids=str)
async def test_waiting_request_goes_to_the_group_to_which_a_reload_has_moved_its_model(
    tmp_path: Path, chat: Backend, code: Backend, place: dict[str, Any]
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat), entry(code)]) as daemon:
        asks = await daemon.queued("chat", "code")
        await event(chat.arrived.get())
        await daemon.reload([entry(chat), entry(code, **place)])
        assert await statuses(asks[1:]) == [200]
        chat.release.set()
        assert await statuses(asks) == [200, 200]
    assert "code previous=chat" not in calls(tmp_path, environ=True)


async def test_more_slots_count_at_once(shared_jano: Shared, chat: Backend) -> None:
    chat.answer = chat.held
    async with shared_jano([entry(chat)]) as daemon:
        asks = await daemon.queued("chat", "chat")
        await event(chat.arrived.get())
        await daemon.reload([entry(chat, slots=2)])
        await event(chat.arrived.get())
        chat.release.set()
        assert await statuses(asks) == [200, 200]


async def test_model_that_becomes_resident_is_served_beside_what_runs(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    ears = entry(chat, name="ears", group="gpu1")
    async with running_jano(tmp_path, [entry(code), ears]) as daemon:
        asks = await daemon.queued("ears")
        await event(chat.arrived.get())
        moved = entry(code, name="moved", group="gpu1")
        await daemon.reload([ears | {"url": code.url, "passthrough": True}, moved])
        assert await daemon.ask("ears") == (200, {"answered_by": "code"})
        asks += await daemon.queued("moved")  # it waits for the request that runs still
        chat.release.set()
        assert await statuses(asks) == [200, 200]
        assert "groups" not in await daemon.status()  # the default one has no model any more
    assert calls(tmp_path, environ=True) == ["moved previous=ears group=gpu1"]


async def test_reload_counts_at_once_during_a_swap_of_a_model_that_it_drops(
    shared_jano: Shared, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    """Who waits for that model already is served."""
    async with shared_jano([entry(chat), entry(code)], gated_script(tmp_path)) as daemon:
        asks = await daemon.queued("code")
        await event(until(lambda: calls(tmp_path) == ["code"]))
        await daemon.reload([entry(chat)])
        assert (await daemon.ask("code"))[0] == 400
        (tmp_path / "go").touch()
        assert await statuses(asks) == [200]
    assert calls(tmp_path) == ["code"]


async def test_two_reloads_in_a_row_end_with_the_second(shared_jano: Shared, chat: Backend) -> None:
    chat.answer = chat.held
    async with shared_jano([entry(chat)]) as daemon:
        asks = await daemon.queued("chat")
        await event(chat.arrived.get())
        await daemon.reload([entry(chat), entry(chat, name="first")])
        await daemon.reload([entry(chat), entry(chat, name="second")])
        listed = [model["id"] for model in (await daemon.get("/v1/models"))["data"]]
        assert listed == ["chat", "second"]
        chat.release.set()
        assert await statuses(asks) == [200]


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stop_finishes_what_runs_and_refuses_what_waits(
    tmp_path: Path, chat: Backend, code: Backend, number: signal.Signals
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat), entry(code)]) as daemon:
        running, *waiting = await daemon.queued("chat", "chat", "code")
        await event(chat.arrived.get())
        await daemon.status()  # leaves an idle connection, which must not delay the end
        daemon.kill(number)
        for answer in await event(asyncio.gather(*waiting)):
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        chat.release.set()
        assert await statuses([running]) == [200]
        assert await event(daemon.process.wait()) == 0


async def test_load_that_comes_while_jano_stops_is_refused(tmp_path: Path, chat: Backend) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        running = await stop_during_a_request(daemon, chat)
        status, answer = await event(post_path(daemon, "/load?model=chat"))
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        chat.release.set()
        assert await statuses([running]) == [200]
        assert await event(daemon.process.wait()) == 0


async def test_next_jano_starts_only_when_the_last_one_forwards_no_more(
    tmp_path: Path, chat: Backend
) -> None:
    """Else it would swap away what the last one still serves."""
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        running = await stop_during_a_request(daemon, chat)
        assert (await daemon.ask("chat"))[1]["error"]["code"] == "shutting_down"
        daemon.kill(signal.SIGHUP)  # comes too late to start anything
        assert (await output_of(tmp_path, JANO_PORT=str(daemon.port)))[0] == 1
        chat.release.set()
        assert await statuses([running]) == [200]
        assert await event(daemon.process.wait()) == 0
        assert daemon.log("models reloaded") == []


async def test_stop_leaves_a_script_alone(tmp_path: Path, chat: Backend, code: Backend) -> None:
    script = gated_script(tmp_path, then=f'touch "{tmp_path}/done"')
    async with running_jano(tmp_path, [entry(chat), entry(code)], script) as daemon:
        waiting = await daemon.queued("code")
        await event(until(lambda: calls(tmp_path) == ["code"]))
        daemon.kill(signal.SIGTERM)
        assert await statuses(waiting) == [503]
        assert await event(daemon.process.wait()) == 0
    (tmp_path / "go").touch()
    await event(until((tmp_path / "done").exists))


async def stop_during_a_request(daemon: Running, chat: Backend) -> asyncio.Task[Any]:
    """Tell jano to stop while chat holds back its answer to a request; that request's task."""
    [running] = await daemon.queued("chat")
    await event(chat.arrived.get())
    daemon.kill(signal.SIGTERM)
    await daemon.logged("received signal")
    return running


async def test_request_that_runs_when_the_time_to_stop_is_over_breaks_visibly(
    tmp_path: Path, chat: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)], SHUTDOWN_TIMEOUT_MS=100) as daemon:
        running = await stop_during_a_request(daemon, chat)
        with pytest.raises(aiohttp.ClientError):
            await event(running)
        await event(daemon.process.wait())  # or it would be told to stop a second time


async def test_http_1_0_answer_that_jano_breaks_when_it_stops_does_not_look_complete(
    tmp_path: Path, chat: Backend
) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"hello")
        return await never(request)

    chat.answer = endless
    sent = post_bytes(b'{"model":"chat"}', version="1.0")
    async with running_jano(tmp_path, [entry(chat)], SHUTDOWN_TIMEOUT_MS=100) as daemon:
        async with connected(daemon, sent) as (reader, _):
            await event(reader.readuntil(b"hello"))
            daemon.kill(signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                await event(reader.read(-1))
        await event(daemon.process.wait())
        await daemon.logged("served", status=503, aborted=False, reason="jano stopped")


async def test_unload_that_still_waits_when_jano_stops_is_refused(
    tmp_path: Path, chat: Backend
) -> None:
    """The next jano must not find the script at work."""
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        running, unload = await unload_during_a_request(daemon, chat)
        daemon.kill(signal.SIGTERM)
        await daemon.logged("received signal")
        chat.release.set()
        assert (await event(unload))[1]["error"]["code"] == "shutting_down"
        assert await statuses([running]) == [200]
        assert await event(daemon.process.wait()) == 0
    assert calls(tmp_path) == []


@pytest.mark.parametrize(("second", "exit_code"), [(signal.SIGTERM, 1), (signal.SIGKILL, -9)])
async def test_second_signal_ends_jano_at_once_and_breaks_what_runs_visibly(
    tmp_path: Path, chat: Backend, second: signal.Signals, exit_code: int
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)], ends_with=exit_code) as daemon:
        running = await stop_during_a_request(daemon, chat)
        daemon.kill(second)
        with pytest.raises(aiohttp.ClientError):
            await event(running)


async def test_start_after_a_killed_jano_finds_what_is_loaded(
    tmp_path: Path, chat: Backend, code: Backend
) -> None:
    code.ready = False
    models = [entry(code), entry(chat)]
    async with running_jano(tmp_path, models, ends_with=-signal.SIGKILL) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
        daemon.kill(signal.SIGKILL)
    async with running_jano(tmp_path, models) as daemon:
        assert (await daemon.ask("chat"))[0] == 200
    assert calls(tmp_path) == []


# Starting beside another


async def test_second_start_beside_a_jano_ends_well_and_asks_no_script(
    tmp_path: Path, chat: Backend
) -> None:
    """So that cron may start one each minute."""
    async with running_jano(tmp_path, [entry(chat)]) as daemon:
        await daemon.logged("worker started")
        code, out, err = await output_of(tmp_path, JANO_PORT=str(daemon.port))
        assert (code, "another jano" in out + err) == (0, True)
    assert (tmp_path / "calls").read_text().count("status ") == 1  # the first one's


async def test_second_start_beside_a_stranger_fails_and_names_the_port(
    tmp_path: Path, chat: Backend
) -> None:
    write_models(tmp_path, [ENTRY])
    code, out, err = await output_of(tmp_path, JANO_PORT=str(chat.port))
    assert (code, str(chat.port) in out + err) == (1, True)
    assert not (tmp_path / "calls").exists()


async def test_start_on_an_address_of_another_machine_is_a_fault(tmp_path: Path) -> None:
    """So that whoever keeps jano alive does not try it again and again."""
    write_models(tmp_path, [ENTRY])
    code, _, err = await output_of(tmp_path, JANO_HOST="192.0.2.1")
    assert (code, "cannot listen on 192.0.2.1" in err) == (2, True)
