"""What the measurements share: processes, a raw HTTP client and backend, tables."""

from __future__ import annotations

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

JANO = Path(__file__).resolve().parent.parent / "jano.py"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"


class Bench:
    """A temporary folder and the processes that work in it; none outlives it."""

    def __enter__(self) -> Bench:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and soft < hard:  # for thousands of connections
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
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
        command = [str(argument) for argument in argv]
        path = self.folder / f"{port}.log"
        with open(path, "wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env=clean | environ
            )
        self.processes.append(process)
        patience = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < patience:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return process.pid
            time.sleep(0.02)
        raise SystemExit(f"{command} does not listen on {port}:\n{path.read_text()}")

    def jano(
        self,
        port: int,
        models: list[dict[str, Any]],
        swap: str = "exit 0",
        command: Sequence[object] = (sys.executable, JANO),
        **settings: str,
    ) -> int:
        """Start a jano in front of `models`; `swap` is the text of its script. Its pid."""
        (self.folder / f"{port}.json").write_text(json.dumps({"models": models}))
        script = self.folder / f"{port}.sh"
        script.write_text(f"#!/bin/sh\n{swap}\n")
        script.chmod(0o700)
        settings["SWAP_COMMAND"] = shlex.quote(str(script))
        settings["MODELS_FILE"] = f"{port}.json"
        settings["JANO_PORT"] = str(port)
        return self.start(port, *command, **settings)


def absolute_path(text: str) -> Path:
    """For command lines: processes are started in another folder."""
    return Path(text).resolve()


def free_port() -> int:
    """A port that is free now, below the range that outgoing connections use (Linux: 32768)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have used so far (Linux)."""
    nanoseconds = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((thread / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def rss_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ------------------------------------------------------------------------- client and backend


class Lost(Exception):
    """A request got no 200, or no whole answer."""


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
        """Seconds until the first byte of the answer's body, and until it is whole. Raises Lost."""
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
            raise Lost(data.decode(errors="replace"))
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        while len(body) < int(length) if length else not body.endswith(LAST_CHUNK):
            body += self.receive()
        return first, time.perf_counter() - begin

    def receive(self) -> bytes:
        data = self.socket.recv(2**18)
        if not data:
            raise Lost("the connection was closed in the middle of an answer")
        return data


class Backend(asyncio.Protocol):
    """A raw server: `answer` gets each whole request; `may_write` is set while the peer reads."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""
        self.may_write = asyncio.Event()
        self.may_write.set()

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    def data_received(self, data: bytes) -> None:
        """Collect one request; no client sends a second one before it has the answer."""
        self.received += data
        head, end_of_head, body = self.received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if end_of_head and len(body) >= int(length or 0):
            self.received = b""
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        raise NotImplementedError

    @classmethod
    async def serve(cls, port: int) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(cls, "127.0.0.1", port, backlog=1024)
        await server.serve_forever()


def post(path: str = "/v1/chat/completions", **fields: Any) -> bytes:
    """A chat request to model "m" as a client sends it; the fields are added to its JSON."""
    messages = [{"role": "user", "content": "Who was it that looked both ways?"}]
    body = json.dumps({"model": "m", "messages": messages} | fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# ------------------------------------------------------------------------- figures and tables


class Figure(NamedTuple):
    what: str
    measured: float
    sign: str  # "<=" or ">="
    limit: float

    def is_kept(self) -> bool:
        if self.sign == "<=":
            return self.measured <= self.limit
        return self.measured >= self.limit


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
    for figure in figures:
        row = {"figure": figure.what, "measured": f"{figure.measured:.2f}"}
        row["limit"] = f"{figure.sign} {figure.limit:g}"
        row[""] = "kept" if figure.is_kept() else "MISSED"
        rows.append(row)
    table("Figures", rows)
    return int(not all(figure.is_kept() for figure in figures))
