"""What the measurements share: processes, a raw HTTP client and backend, figures and tables.

python bench/tools.py PORT starts the Backend; its options are at the end.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import select
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

JANO = Path(__file__).resolve().parent.parent / "jano.py"
ANSWER = b"""{"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message":
 {"role": "assistant", "content": "Jano."}, "finish_reason": "stop"}],
 "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}"""
HEAD = b"HTTP/1.%d %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
STREAM_HEAD = b" 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": " word"}}]}\n\n'
LAST_CHUNK = b"0\r\n\r\n"
KEEP_ALIVE = b"Keep-Alive: timeout=5, max=100\r\n"


class Bench:
    """A temporary folder and the processes that work in it; none outlives it."""

    def __enter__(self) -> Self:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # for thousands of connections
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.temporary = tempfile.TemporaryDirectory(prefix="jano-bench-")
        self.folder = Path(self.temporary.name)
        self.processes: list[subprocess.Popen[bytes]] = []
        return self

    def __exit__(self, fault: object, *_: object) -> None:
        if fault:
            for log in self.folder.glob("*.log"):
                print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
        for process in self.processes:
            process.kill()
            process.wait()
        self.temporary.cleanup()

    def start(self, port: int, *argv: object, **environ: str) -> int:
        """Start a process, wait until it listens on `port`, return its pid; it logs to PORT.log."""
        clean = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
        clean |= {"PYTHONHASHSEED": "0"} | environ
        command = [str(argument) for argument in argv]
        path = self.folder / f"{port}.log"
        with open(path, "wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=clean)
        self.processes.append(process)
        patience = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < patience:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return process.pid
            time.sleep(0.02)
        raise SystemExit(f"{command} does not listen on {port}:\n{path.read_text()}")

    def backend(self) -> tuple[int, int]:
        """Start a Backend: its port and pid."""
        port = free_port()
        return port, self.start(port, sys.executable, __file__, port)

    def jano(
        self, models: list[dict[str, Any]], swap: str = "exit 0", *command: object, **settings: str
    ) -> tuple[int, int]:
        """Start a jano in front of `models`: its port and pid. `swap`: the text of its script."""
        port = free_port()
        (self.folder / f"{port}.json").write_text(json.dumps({"models": models}))
        script = self.folder / f"{port}.sh"
        script.write_text(f"#!/bin/sh\n{swap}\n")
        script.chmod(0o700)
        settings["SWAP_COMMAND"] = shlex.quote(str(script))
        settings["MODELS_FILE"] = f"{port}.json"
        settings["JANO_PORT"] = str(port)
        return port, self.start(port, *(command or (sys.executable, JANO)), **settings)


def model(name: str, port: int, **more: Any) -> dict[str, Any]:
    """An entry of models.json."""
    return {"name": name, "url": f"http://127.0.0.1:{port}"} | more


def free_port() -> int:
    """A port that is free now, below the range that outgoing connections use (Linux: 32768)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have used so far (Linux)."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def rss_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ------------------------------------------------------------------------- client and backend


class Client:
    """One blocking connection, with as little between clock and socket as possible."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connect()

    def connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port), 600)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.readable = select.poll()
        self.readable.register(self.socket, select.POLLIN)

    def ask(self, request: bytes) -> tuple[float, float]:
        """Seconds to the first byte of a 200's body, and to its end, else a ConnectionError."""
        if self.readable.poll(0):  # between two answers that is the end of the connection
            self.connect()
        begin = time.perf_counter()
        self.socket.sendall(request)
        data = self.receive()
        while data.startswith(b"HTTP/1.1 200 ") and not data.partition(b"\r\n\r\n")[2]:
            data += self.receive()
        first = time.perf_counter() - begin
        head, _, body = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ConnectionError(data.decode(errors="replace"))
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        while len(body) < int(length) if length else not body.endswith(LAST_CHUNK):
            body += self.receive()
        return first, time.perf_counter() - begin

    def receive(self) -> bytes:
        data = self.socket.recv(2**18)
        if not data:
            raise ConnectionError("the connection was closed in the middle of an answer")
        return data


class Backend(asyncio.Protocol):
    """A raw model server that does what a request's JSON says. It is one of these servers:

    silent, promising or closing, as RESULTS.md describes them; dying, if it closes the connection
    in the middle of an answer; or mute, if it answers nothing but GET.
    """

    transport: asyncio.Transport
    # A connection is closed after so many idle seconds, without a word. At once: that is HTTP/1.0.
    idle: float | None = None
    ready = 0.0  # until then it answers 503

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""
        self.may_write = asyncio.Event()  # set while the peer reads
        self.may_write.set()
        self.end: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    def data_received(self, data: bytes) -> None:
        """Collect one request; no client sends a second one before it has the answer."""
        if self.end:
            self.end.cancel()
        self.received += data
        head, end_of_head, body = self.received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if end_of_head and len(body) >= int(length or 0):
            self.received = b""
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        if time.monotonic() < self.ready:
            self.say(503, b"")
            return
        request = json.loads(body or b'{"server": "silent", "stream": false}')  # GET has no body
        server = request["server"]
        promise = KEEP_ALIVE if server in ("promising", "closing") else b""
        if request["stream"] and self.idle != 0:
            self.transport.write(b"HTTP/1.1" + STREAM_HEAD + promise + b"\r\n")
            self.streaming = asyncio.ensure_future(self.stream(request))
        elif server == "dying":
            self.transport.close()
        elif server != "mute":
            self.say(200, request.get("event", "").encode() or ANSWER, promise)
            self.rest()

    def say(self, status: int, data: bytes, promise: bytes = b"") -> None:
        version = 0 if self.idle == 0 else 1
        self.transport.write(HEAD % (version, status, len(data), promise) + data)

    async def stream(self, request: dict[str, Any]) -> None:
        data = request.get("event", "").encode() or EVENT * request["events"]
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        for _ in range(request["chunks"]):
            await self.may_write.wait()
            self.transport.write(chunk)
            if request["pause"]:
                await asyncio.sleep(request["pause"])
        if request["server"] != "dying":
            self.transport.write(LAST_CHUNK)
        if request["server"] in ("closing", "dying"):
            self.transport.close()
        self.rest()

    def rest(self) -> None:
        if self.idle is not None:
            self.end = asyncio.get_running_loop().call_later(self.idle, self.transport.close)

    @classmethod
    async def serve(cls, port: int, loading: float = 0, refuses: bool = False) -> None:
        """Be ready after so many seconds, and write into PORT.ready when that was."""
        cls.ready = time.monotonic() + loading
        await asyncio.sleep(loading if refuses else 0)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(cls, "127.0.0.1", port, backlog=1024)
        cls.ready = max(cls.ready, time.monotonic())
        Path(f"{port}.ready").write_text(str(cls.ready))  # noqa: ASYNC240
        await server.serve_forever()


def one_shot(server: str = "silent", **fields: Any) -> bytes:
    """A chat request to model "m" as a client sends it; the fields are added to its JSON."""
    messages = [{"role": "user", "content": "Who was it that looked both ways?"}]
    request = {"model": "m", "messages": messages, "server": server, "stream": False}
    body = json.dumps(request | fields).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\n"
        f"Accept: */*\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def stream(server: str = "silent", chunks: int = 2, pause: float = 0, events: int = 1) -> bytes:
    """The same for a stream of so many chunks, each of so many events; a pause is seconds."""
    return one_shot(server, stream=True, chunks=chunks, pause=pause, events=events)


# ------------------------------------------------------------------------- figures and tables


class Figure(NamedTuple):
    what: str
    measured: float
    sign: str  # "<=" or ">="
    limit: float


def promises(script: str, quick: bool) -> Iterator[tuple[str, str, str, str, float]]:
    """The script's lines of figures.csv: case, measure, times what, sign, limit."""
    for line in Path(__file__).with_name("figures.csv").read_text().splitlines():
        name, *fields = line.split(";")
        if name == script or (name == f"{script} full" and not quick):
            case, measure, other, sign, limit = fields
            yield case, measure, other, sign, float(limit)


def table(title: str, rows: list[dict[str, str]]) -> None:
    """Print rows as Markdown: the first column is text, the others are numbers."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    print(f"\n{title}\n")
    for first, *others in [lines[0], rules, *lines[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print(f"| {' | '.join([first.ljust(widths[0]), *cells])} |", flush=True)


def verdict(figures: list[Figure]) -> int:
    """Print each figure beside its limit. The exit code: 1 if one is missed."""
    rows = []
    for what, measured, sign, limit in figures:
        kept = measured <= limit if sign == "<=" else measured >= limit
        row = {"figure": what, "measured": f"{measured:.2f}", "limit": f"{sign} {limit:g}"}
        rows.append(row | {"": "kept" if kept else "MISSED"})
    table("Figures", rows)
    return int(any(row[""] == "MISSED" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A model server for measurements.")
    parser.add_argument("port", type=int)
    parser.add_argument("--idle", type=float, help="close connections after so many seconds")
    parser.add_argument("--loading", type=float, default=0, help="be ready after so many seconds")
    parser.add_argument("--refuses", action="store_true", help="listen only then")
    options = parser.parse_args()
    Backend.idle = options.idle
    asyncio.run(Backend.serve(options.port, options.loading, options.refuses))
