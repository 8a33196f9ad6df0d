"""What does Jano add to a request? Beside the least that a proxy on aiohttp can add, in one run.

    python bench/overhead.py [--quick] [--jano FILE] [--old FILE] [--ancestor COMMAND]
                             [--llama-swap BINARY]

direct      the backend itself, raw asyncio; it behaves as three kinds of servers, see Backend
minimal     a few lines of aiohttp that forward with a pooled ClientSession and do nothing else
jano        with room for all requests (slots), its log in a file
old         another jano.py, for instance that of an earlier version
nginx       and haproxy, if they are installed: one thread, kept connections, no buffering
llama-swap  its binary, with one model and a high concurrencyLimit
ancestor    a7t-ai/jano, for instance --ancestor "node /path/src/index.ts"; one request at a time

The machine's mood changes within seconds. So each round measures the targets in turn, one-shot
requests even one by one, and a ratio is the median of the rounds' own ratios.

added       a target's time minus direct's, of one connection: medians (p95: 95th percentiles)
first byte  until the first byte of a stream's body, added as well
CPU         user and system time of the target's process (direct's is for all the targets)
chunks/s    of one stream that goes as fast as it can

Instructions in user space are counted by valgrind, if it is installed: they do not depend on what
else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import tools
from aiohttp import web
from tools import Bench, Client, Figure, cpu_seconds, free_port, post, rss_mb

CONNECTIONS = (1, 8, 64)
CASES = {  # what is measured one by one, and the kinds of server that make a difference to it
    "one-shot": ("silent", "promising"),
    "first byte": ("silent", "promising", "closing"),
}
HAPROXY = """global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
listen all
  bind 127.0.0.1:{port}
  server backend 127.0.0.1:{backend}
"""
NGINX = """daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000000; proxy_buffering off;
  proxy_http_version 1.1; proxy_set_header Connection "";
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream backend {{ server 127.0.0.1:{backend}; keepalive 64; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://backend; }} }}
}}
"""


# ----------------------------------------------------------------------- backend and minimal

ANSWER = b"""{"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message":
 {"role": "assistant", "content": "Jano."}, "finish_reason": "stop"}],
 "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(ANSWER)
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": " word"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


class Backend(tools.Backend):
    """Answers at once, as the server that the request names.

    silent     keeps connections as HTTP/1.1 does by default: uvicorn, hence vLLM; Go, hence Ollama
    promising  says that it keeps them, and does
    closing    says that it keeps them, and closes after each stream: llama-server
    """

    def answer(self, head: bytes, body: bytes) -> None:
        request = json.loads(body or b'{"server": "silent", "stream": false}')  # GET /health
        promise = b"" if request["server"] == "silent" else b"Keep-Alive: timeout=5, max=100\r\n"
        if request["stream"]:
            self.transport.write(tools.STREAM_HEAD + promise + b"\r\n")
            self.streaming = asyncio.ensure_future(self.stream(request))
        else:
            self.transport.write(HEAD + promise + b"\r\n" + ANSWER)

    async def stream(self, request: dict[str, Any]) -> None:
        for _ in range(request["chunks"]):
            await self.may_write.wait()
            self.transport.write(CHUNK)
            if request["pause"]:
                await asyncio.sleep(request["pause"])
        self.transport.write(tools.LAST_CHUNK)
        if request["server"] == "closing":
            self.transport.close()


def one_shot(server: str = "silent") -> bytes:
    return post(server=server, stream=False)


def stream(server: str = "silent", chunks: int = 2, pause: float = 0) -> bytes:
    """Ask for a stream of so many chunks; pauses are seconds."""
    return post(server=server, stream=True, chunks=chunks, pause=pause)


HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}
BACKEND_URL = web.AppKey("BACKEND_URL", str)
SESSION = web.AppKey("SESSION", aiohttp.ClientSession)


async def forward(request: web.Request) -> web.StreamResponse:
    """What everyone would write: it reads no JSON, logs nothing and queues nobody."""
    url = request.app[BACKEND_URL] + request.path_qs
    headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
    data = await request.read()
    async with request.app[SESSION].post(url, data=data, headers=headers) as upstream:
        given = [(k, v) for k, v in upstream.headers.items() if k.lower() not in HOP_BY_HOP]
        response = web.StreamResponse(status=upstream.status, headers=given)
        await response.prepare(request)
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def keep_session(app: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        app[SESSION] = session
        yield


def serve_minimal(port: int, url: str) -> None:
    app = web.Application(client_max_size=2**30)
    app[BACKEND_URL] = url
    app.cleanup_ctx.append(keep_session)
    app.router.add_post("/{path:.*}", forward)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


# ------------------------------------------------------------------------------------ targets


class Target:
    """One process that is measured."""

    def __init__(self, name: str, port: int, pid: int) -> None:
        self.name = name
        self.port = port
        self.pid = pid
        self.client = Client(port)
        self.rounds: dict[str, list[float]] = {}  # measure -> one value a round
        self.lost = 0  # requests that were not answered well

    def note(self, measure: str, value: float) -> None:
        self.rounds.setdefault(measure, []).append(value)

    def ratio(self, other: Target, measure: str) -> float:
        """The median of the rounds' ratios of this target to the other one."""
        return median(a / b for a, b in zip(self.rounds[measure], other.rounds[measure]))


class Targets:
    """Starts targets, all in front of one backend."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.backend = free_port()
        self.url = f"http://127.0.0.1:{self.backend}"
        pid = bench.start(self.backend, sys.executable, __file__, "--serve", self.backend)
        self.direct = Target("direct", self.backend, pid)

    def start(self, name: str, *argv: object) -> Target:
        """{port} in the command becomes a free port."""
        port = free_port()
        command = [str(argument).replace("{port}", str(port)) for argument in argv]
        return Target(name, port, self.bench.start(port, *command, PYTHONHASHSEED="0"))

    def minimal(self, *wrapper: object) -> Target:
        """`wrapper` is a command that runs another one, such as valgrind."""
        argv = (sys.executable, __file__, "--serve", "{port}", self.url)
        return self.start("minimal", *wrapper, *argv)

    def jano(self, name: str, *command: object) -> Target:
        port = free_port()
        models = [{"name": "m", "url": self.url, "slots": 10_000}]
        pid = self.bench.jano(port, models, command=command, PYTHONHASHSEED="0")
        return Target(name, port, pid)

    def configured(self, name: str, template: str, *command: object) -> Target:
        """A proxy that reads the file at the end of its command."""
        port = free_port()
        path = self.bench.folder / f"{name}.conf"
        fields = {"port": port, "backend": self.backend, "folder": self.bench.folder}
        path.write_text(template.format(**fields))
        return Target(name, port, self.bench.start(port, *command, path))

    def llama_swap(self, program: str) -> Target:
        """Its configuration is YAML, of which JSON is a part."""
        model: dict[str, object] = {"cmd": "sleep 3600", "checkEndpoint": "none"}
        model |= {"proxy": self.url, "concurrencyLimit": 1000}
        path = self.bench.folder / "llama-swap.yaml"
        path.write_text(json.dumps({"models": {"m": model}}))
        argv = (program, "-config", path, "-listen", "127.0.0.1:{port}")
        return self.start("llama-swap", *argv)

    def all(self, options: argparse.Namespace) -> dict[str, Target]:
        """Those that are at hand and asked for, by name."""
        path = os.environ["PATH"] + ":/usr/sbin"
        nginx, haproxy = shutil.which("nginx", path=path), shutil.which("haproxy", path=path)
        targets = [self.direct, self.minimal(), self.jano("jano", sys.executable, options.jano)]
        if options.old:
            targets.append(self.jano("old", sys.executable, options.old))
        if options.ancestor:
            targets.append(self.jano("ancestor", *shlex.split(options.ancestor)))
        if options.llama_swap:
            targets.append(self.llama_swap(options.llama_swap))
        if nginx and not options.quick:
            targets.append(self.configured("nginx", NGINX, nginx, "-c"))
        if haproxy and not options.quick:
            targets.append(self.configured("haproxy", HAPROXY, haproxy, "-db", "-f"))
        return {target.name: target for target in targets}


# ------------------------------------------------------------------------------- measurements


def measure(targets: list[Target], quick: bool) -> None:
    for target in targets:
        asyncio.run(load(target, 8, 60, 500))  # warm up
    for _ in range(3 if quick else 12):
        for shape, servers in CASES.items():
            for server in servers:
                one_by_one(targets, shape, server, 100 if quick else 200)
        for connections in CONNECTIONS:
            under_load(targets, connections, 0.3 if quick else 0.7)
        long_stream(targets, 3000 if quick else 10_000)


def one_by_one(targets: list[Target], shape: str, server: str, count: int) -> None:
    """Latency and CPU time of requests of one connection, one at a time, the targets in turn."""
    request = one_shot(server) if shape == "one-shot" else stream(server, pause=0.001)
    times: dict[Target, list[float]] = {target: [] for target in targets}
    cpu = {target: cpu_seconds(target.pid) for target in targets}
    direct = targets[0]
    for _ in range(count):
        # In a random order, as each target still tidies up while the next one is asked.
        for target in random.sample(targets, len(targets)):
            try:
                first, whole = target.client.ask(request)
                times[target].append(whole if shape == "one-shot" else first)
            except tools.Lost:
                target.lost += 1
                target.client.connect()
        if server == "closing":
            direct.client.connect()  # its end may still be on its way
    for target in targets:
        for percent in (50, 95):
            base, taken = (percentile(times[one], percent) for one in (direct, target))
            target.note(f"{shape} p{percent} added, ms, {server}", (taken - base) * 1000)
        used = cpu_seconds(target.pid) - cpu[target]
        target.note(f"CPU ms, {shape}, {server}", used / count * 1000)


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1]


def under_load(targets: list[Target], connections: int, seconds: float) -> None:
    for target in targets:
        begin, cpu = time.monotonic(), cpu_seconds(target.pid)
        done = asyncio.run(load(target, connections, seconds))
        target.note(f"requests/s, clients: {connections}", done / (time.monotonic() - begin))
        used = cpu_seconds(target.pid) - cpu
        target.note(f"CPU ms, clients: {connections}", used / done * 1000)


async def load(target: Target, connections: int, seconds: float, most: int = 10**9) -> int:
    """How many requests so many clients get through, each asking one after the other."""
    request = one_shot()
    end = time.monotonic() + seconds
    done = 0

    async def client() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        while time.monotonic() < end and done < most:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"{target.name} under load: {head.decode()}")
            if b"chunked" in head:
                await reader.readuntil(tools.LAST_CHUNK)
            else:
                await reader.readexactly(len(ANSWER))
            done += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return done


def long_stream(targets: list[Target], chunks: int) -> None:
    for target in targets:
        cpu = cpu_seconds(target.pid)
        _, seconds = target.client.ask(stream(chunks=chunks))
        target.note("chunks/s", chunks / seconds)
        target.note("CPU ms, 1,000 chunks", (cpu_seconds(target.pid) - cpu) / chunks * 1e6)


def print_measures(targets: list[Target]) -> None:
    rows = []
    for measure in targets[0].rounds:
        row = {"": measure}
        for target in targets:
            row[target.name] = f"{median(target.rounds[measure]):.4g}"
        rows.append(row)
    rows.append({"": "requests lost", **{target.name: str(target.lost) for target in targets}})
    tools.table("Medians of the rounds", rows)


def ratios(jano: Target, minimal: Target, quick: bool) -> list[Figure]:
    """Three quick rounds are few: they check what noise touches least, and with some room."""
    limits = [
        ("one-shot p50 added, ms, silent", "<=", 0.9),
        ("one-shot p50 added, ms, promising", "<=", 0.9),
        ("first byte p50 added, ms, silent", "<=", 0.95),
        ("first byte p50 added, ms, promising", "<=", 0.95),
        ("first byte p50 added, ms, closing", "<=", 0.95),
        ("CPU ms, one-shot, silent", "<=", 0.9),
        ("CPU ms, one-shot, promising", "<=", 0.9),
        ("CPU ms, clients: 8", "<=", 0.9),
    ]
    if quick:
        limits = [(measure, sign, limit * 1.25) for measure, sign, limit in limits]
    else:
        limits += [
            ("one-shot p95 added, ms, silent", "<=", 1.1),
            ("one-shot p95 added, ms, promising", "<=", 1.1),
            ("requests/s, clients: 1", ">=", 1.1),
            ("requests/s, clients: 8", ">=", 1.1),
            ("requests/s, clients: 64", ">=", 0.95),
            ("chunks/s", ">=", 0.95),
        ]
    figures = [Figure("requests lost", jano.lost, "<=", 0)]
    for measure, sign, limit in limits:
        name = f"{measure.replace(' ms,', '')}, times minimal's"
        figures.append(Figure(name, jano.ratio(minimal, measure), sign, limit))
    return figures


def beside_llama_swap(jano: Target, llama_swap: Target) -> list[Figure]:
    added = jano.ratio(llama_swap, "one-shot p50 added, ms, silent")
    cpu = jano.ratio(llama_swap, "CPU ms, one-shot, silent")
    return [
        Figure("one-shot p50 added, silent, times llama-swap's", added, "<=", 0.9),
        Figure("CPU, one-shot, silent, times llama-swap's", cpu, "<=", 0.75),
    ]


def memory(jano: Target) -> list[Figure]:
    asyncio.run(load(jano, 64, 600, 10_000))
    early = rss_mb(jano.pid)
    asyncio.run(load(jano, 64, 600, 90_000))
    late = rss_mb(jano.pid)
    return [
        Figure("MB after 100,000 requests", late, "<=", 48),
        Figure("MB after 100,000 requests, times that after 10,000", late / early, "<=", 1.03),
    ]


# ------------------------------------------------------------------------------- instructions


def instructions(bench: Bench, options: argparse.Namespace) -> list[Figure]:
    """Count them under valgrind, and print a table; jano's one-shot is a figure."""
    targets = Targets(bench)
    folder = options.profiles or bench.folder
    output = f"--callgrind-out-file={folder}/callgrind.%p"
    valgrind = ("valgrind", "--tool=callgrind", output)
    counted = [targets.jano("jano", *valgrind, sys.executable, options.jano)]
    if options.old:
        counted.append(targets.jano("old", *valgrind, sys.executable, options.old))
    if not options.quick:
        counted.append(targets.minimal(*valgrind))
    requests = {
        "one-shot": one_shot(),
        "stream, 20 chunks in one go": stream(chunks=20),
        "stream, 20 chunks one by one": stream(chunks=20, pause=0.005),
    }
    rows = []
    for target in counted:
        row = {"": target.name}
        for shape, request in requests.items():
            row[shape] = f"{instructions_of(target, request, folder) / 1000:.0f}"
        rows.append(row)
    tools.table("Instructions a request, in thousands", rows)
    return [Figure("instructions, one-shot, thousands", float(rows[0]["one-shot"]), "<=", 620)]


def instructions_of(target: Target, request: bytes, folder: Path) -> float:
    """The mean of a hundred requests."""
    for _ in range(30):  # warm up
        target.client.ask(request)
    dump_profile(target.pid, folder)
    for _ in range(100):
        target.client.ask(request)
    return dump_profile(target.pid, folder) / 100


def dump_profile(pid: int, folder: Path) -> int:
    """How many instructions a process under valgrind has run since the last call of this."""
    subprocess.run(["vgdb", f"--pid={pid}", "dump"], check=True, capture_output=True)
    dumps = sorted(folder.glob(f"callgrind.{pid}.*"), key=lambda path: int(path.suffix[1:]))
    return int(dumps[-1].read_text().rpartition("\ntotals: ")[2])


# --------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what jano adds to a request.")
    parser.add_argument("--quick", action="store_true", help="half a minute, fewer targets")
    path = tools.absolute_path
    parser.add_argument("--jano", type=path, default=tools.JANO, metavar="FILE")
    parser.add_argument("--old", type=path, metavar="FILE", help="a jano.py to compare with")
    parser.add_argument("--ancestor", metavar="COMMAND")
    parser.add_argument("--llama-swap", metavar="BINARY")
    parser.add_argument("--profiles", type=path, metavar="FOLDER", help="of callgrind, to keep")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)  # our own processes
    options = parser.parse_args()
    if options.serve:
        port, *url = options.serve
        if url:
            serve_minimal(int(port), *url)
        else:
            asyncio.run(Backend.serve(int(port)))
    with Bench() as bench:
        by_name = Targets(bench).all(options)
        measure(list(by_name.values()), options.quick)
        print_measures(list(by_name.values()))
        figures = ratios(by_name["jano"], by_name["minimal"], options.quick)
        if options.llama_swap:
            figures += beside_llama_swap(by_name["jano"], by_name["llama-swap"])
        if not options.quick:
            figures += memory(by_name["jano"])
    if shutil.which("valgrind"):
        with Bench() as bench:
            figures += instructions(bench, options)
    return tools.verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
