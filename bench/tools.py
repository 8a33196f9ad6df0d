"""What the measurements share: processes that end with them, a raw HTTP client and
backend, and tables."""

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

JANO = Path(__file__).resolve().parent.parent / "jano.py"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Figure = tuple[str, float, str, float]  # what, measured, "<=" or ">=", limit


class Bench:
    """Processes in one temporary folder; none outlives it."""

    def __enter__(self) -> Bench:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # for thousands of connections
        if hard != resource.RLIM_INFINITY and soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.temporary = tempfile.TemporaryDirectory(prefix="jano-bench-")
        self.folder = Path(self.temporary.name)
        self.processes: list[subprocess.Popen[bytes]] = []
        return self

    def __exit__(self, fault: object, *_: object) -> None:
        for log in self.folder.glob("*.log") if fault else ():
            print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
        for process in self.processes:
            process.kill()
            process.wait()
        self.temporary.cleanup()

    def start(self, port: int, *argv: object, **environ: str) -> int:
        """A process that listens on port once this returns; its pid. Its output is in PORT.log."""
        environ = {name: value for name, value in os.environ.items()
                   if not name.startswith("PYTHON")} | environ
        with open(self.folder / f"{port}.log", "wb") as log:
            process = subprocess.Popen(
                list(map(str, argv)), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=environ)
        self.processes.append(process)
        while process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return process.pid
            time.sleep(0.02)
        raise SystemExit((self.folder / f"{port}.log").read_text())

    def jano(self, port: int, models: list[dict[str, Any]], swap: str = 'echo "m: loaded"',
             run: tuple[object, ...] = (JANO,), **settings: str) -> int:
        """A jano in front of these models; swap is what its script does. Its pid."""
        (self.folder / f"{port}.json").write_text(json.dumps({"models": models}))
        script = self.folder / f"{port}.sh"
        script.write_text(f"#!/bin/sh\n{swap}\n")
        script.chmod(0o700)
        return self.start(port, sys.executable, *run, SWAP_COMMAND=shlex.quote(str(script)),
                          MODELS_FILE=f"{port}.json", JANO_PORT=str(port), **settings)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, below those that connections are given (32768 on Linux)."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


class Client:
    """One connection, with as little between clock and socket as there can be."""

    def __init__(self, port: int) -> None:
        self.port, self.body = port, b""
        self.length: int | None = None  # of the answer's body; None: it is chunked
        self.connect()

    def connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port), 600)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ended = select.poll()  # as select itself knows no more than 1,024 files
        self.ended.register(self.socket, select.POLLIN)

    def send(self, request: bytes) -> None:
        if self.ended.poll(0):  # the end: Node closes after 5 idle seconds
            self.connect()
        self.socket.sendall(request)

    def ask(self, request: bytes) -> tuple[float, float]:
        """Seconds until the answer's first byte of body, and until it is whole."""
        begin = time.perf_counter()
        self.send(request)
        first = self.begin()
        while not self.whole():
            self.body += self.receive()
        return first - begin, time.perf_counter() - begin

    def begin(self) -> float:
        """Read until the body begins; when it did so."""
        data = b""
        while not (data.partition(b"\r\n\r\n")[2] or b"content-length: 0\r\n" in data.lower()):
            data += self.receive()
        head, _, self.body = data.partition(b"\r\n\r\n")
        if b" 200 " not in head[:13]:
            raise SystemExit(f"not a 200: {data.decode(errors='replace')}")
        found = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        self.length = int(found) if found else None
        return time.perf_counter()

    def whole(self) -> bool:
        if self.length is None:
            return self.body.endswith(b"0\r\n\r\n")
        return len(self.body) >= self.length

    def receive(self) -> bytes:
        if data := self.socket.recv(2**18):
            return data
        raise SystemExit("the connection was closed in the middle of an answer")


class Backend(asyncio.Protocol):
    """The other end: may_write is set as long as what is written goes out."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.may_write = transport, asyncio.Event()
        self.may_write.set()

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    @classmethod
    async def serve(cls, port: int) -> None:
        server = await asyncio.get_running_loop().create_server(
            cls, "127.0.0.1", port, backlog=1024)
        await server.serve_forever()


def post(path: str = "/v1/chat/completions", **fields: Any) -> bytes:
    """A request as a client sends it."""
    messages = [{"role": "user", "content": "Who was it that looked both ways?"}]
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    head = (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, its threads included (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def table(title: str, rows: list[dict[str, str]]) -> None:
    """As Markdown: the first column is text, the others are numbers."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}

    def line(cells: Iterable[str]) -> str:
        first, *others = zip(cells, widths.values())
        return " | ".join([f"| {first[0]:{first[1]}}", *(f"{c:>{w}}" for c, w in others)]) + " |"

    rules = ["-" * width for width in widths.values()]
    print(f"\n{title}\n\n{line(widths)}")
    print("|-" + rules[0] + "-|" + "".join(f"-{rule}:|" for rule in rules[1:]))
    for row in rows:
        print(line(row[name] for name in widths), flush=True)


def verdict(figures: list[Figure]) -> int:
    """Print each figure beside its limit. The exit code: 1 if one is missed."""
    rows, missed = [], 0
    for what, value, sign, limit in figures:
        kept = value <= limit if sign == "<=" else value >= limit
        missed += not kept
        rows.append({"figure": what, "measured": f"{value:.2f}", "limit": f"{sign} {limit:g}",
                     "": "kept" if kept else "MISSED"})
    table("Figures", rows)
    return int(missed > 0)
