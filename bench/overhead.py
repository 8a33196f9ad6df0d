"""What does jano add to a request? Beside the least that a proxy on aiohttp can add, in one run.

    python bench/overhead.py [--quick] [--peer NAME=URL …] [--backend-port PORT]

direct       the backend itself: raw asyncio, answers at once; Keep-Alive as from llama-server
minimal      a few lines of aiohttp that forward with a pooled ClientSession and do nothing else
jano         with room for all (slots), its log in a file
no records   jano with the recorders of its telemetry stubbed out (Telemetry, Tail)
haproxy      and nginx, if they are on the PATH: one thread, kept connections, no buffering
--peer       anything with an OpenAI-compatible API in front of the backend, which then needs
             --backend-port; the model is called "m"

The machine's mood changes within seconds. So every figure is taken in rounds, the targets in turn
within each, in one-shot requests one by one; a ratio is the median of the rounds' own ratios.

added        of one connection: a target's time minus direct's, medians (p95: of 95th percentiles)
first byte   until the first byte of a stream's body
lateness     how long after the backend wrote it a chunk arrives, in a stream with pauses
chunks/s     of one stream that goes as fast as it can
CPU          user and system time of the process in between, in seconds
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import tools
from aiohttp import web
from tools import Bench, Client, Figure, cpu_seconds, free_ports, post, quantile, rss_mb

CONNECTIONS = (1, 8, 64)
STUBBED = f"""import sys; sys.path.insert(0, {str(tools.JANO.parent)!r})
import jano
jano.Telemetry.settled = jano.Telemetry.arrived = jano.Tail.feed = lambda *_: None
sys.exit(jano.main())"""
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

# -------------------------------------------------------------------- backend and minimal ----

ANSWER = json.dumps({
    "id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": {
        "role": "assistant", "content": "Jano."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}).encode()
ONE_SHOT = (b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5, max=100\r\n"  # as llama-server does
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER)


class Backend(tools.Backend):
    """Answers at once; a stream has as many chunks, and pauses, as its request says."""

    data = b""  # of a request, so far

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not found or len(rest) < int(length or 0):
            return
        self.data = b""  # no client here sends a second request before it has the answer
        if b'"stream": true' not in rest:
            self.transport.write(ONE_SHOT)
            return
        self.streaming = asyncio.ensure_future(self.stream(**json.loads(rest)))

    async def stream(self, chunks: int, pause: float = 0, **more: Any) -> None:
        self.transport.write(tools.STREAM)
        for _ in range(chunks):
            delta = {"choices": [{"index": 0, "delta": {"content": " word"}}]}
            line = f'data: {{"at": {time.monotonic():.6f}, {json.dumps(delta)[1:]}\n\n'
            self.transport.write(b"%x\r\n%b\r\n" % (len(line), line.encode()))
            await (asyncio.sleep(pause) if pause else self.may_write.wait())
        self.transport.write(b"0\r\n\r\n")


HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}
SESSION = web.AppKey("SESSION", aiohttp.ClientSession)


async def minimal(request: web.Request) -> web.StreamResponse:
    """The practical limit: what everyone would write."""
    url = request.app[BACKEND] + request.path_qs
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


BACKEND = web.AppKey("BACKEND", str)


def run_minimal(port: int, url: str) -> None:
    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(auto_decompress=False) as app[SESSION]:
            yield

    app = web.Application(client_max_size=2**30)
    app[BACKEND] = url
    app.cleanup_ctx.append(lifespan)
    app.router.add_post("/{path:.*}", minimal)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)

# --------------------------------------------------------------------------- measurements ----


class Target:
    def __init__(self, name: str, port: int, pid: int | None) -> None:
        self.name, self.port, self.pid, self.client = name, port, pid, Client(port)
        self.rounds: dict[str, list[float]] = {}  # figure -> one value a round

    def note(self, figure: str, value: float) -> None:
        self.rounds.setdefault(figure, []).append(value)

    def cpu(self) -> float:
        return cpu_seconds(self.pid) if self.pid else 0.0


def one_by_one(targets: list[Target], count: int, stream: bool) -> None:
    """The latency of requests, one at a time, the targets in turn."""
    request, what = post(stream=stream, chunks=2), "first byte" if stream else "one-shot"
    times: dict[Target, list[float]] = {target: [] for target in targets}
    for _ in range(count):
        for target in targets:
            times[target].append(target.client.ask(request)[0 if stream else 1] * 1000)
    for target in targets:
        for share in (50, 95):
            least = quantile(times[targets[0]], share / 100)
            target.note(f"{what} p{share}", quantile(times[target], share / 100) - least)


async def load(target: Target, connections: int, seconds: float, most: int = 10**9) -> int:
    """How many requests that many clients get through, each with one at a time."""
    request, done, end = post(), 0, time.monotonic() + seconds

    async def client() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        while time.monotonic() < end and done < most:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"{target.name} under load: {head.decode()}")
            await reader.readexactly(len(ANSWER))
            done += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return done


def under_load(targets: list[Target], connections: int, seconds: float) -> None:
    for target in targets:
        begin, cpu = time.monotonic(), target.cpu()
        done = asyncio.run(load(target, connections, seconds))
        target.note(f"requests/s, {connections}", done / (time.monotonic() - begin))
        if connections == 8:
            target.note("CPU s per 1,000 requests", (target.cpu() - cpu) / done * 1000)


def long_stream(targets: list[Target], chunks: int) -> None:
    for target in targets:
        cpu, seconds = target.cpu(), target.client.ask(post(stream=True, chunks=chunks))[1]
        target.note("chunks/s", chunks / seconds)
        target.note("CPU s per 100,000 chunks", (target.cpu() - cpu) / chunks * 1e5)


def slow_stream(targets: list[Target], chunks: int) -> None:
    """A chunk must not wait for the next one, which comes 10 ms later."""
    for target in targets:
        client, late = target.client, []
        client.send(post(stream=True, chunks=chunks, pause=0.01))
        client.begin()
        while not client.whole():
            now, (_, found, rest) = time.monotonic(), client.body.rpartition(b'"at": ')
            late.append((now - float(rest.partition(b",")[0])) * 1000 if found else 0.0)
            client.body = client.receive()
        target.note("lateness", quantile(late, 0.5))


def ratio(target: Target, other: Target, figure: str) -> float:
    return median(a / b for a, b in zip(target.rounds[figure], other.rounds[figure]))

# ----------------------------------------------------------------------------------- main ----


def start(bench: Bench, peers: list[str], backend_port: int | None) -> list[Target]:
    """direct, minimal, jano, no records, then the others."""
    ports, me = free_ports(6), [sys.executable, __file__]
    ports[0] = backend_port or ports[0]
    url = f"http://127.0.0.1:{ports[0]}"
    model = {"name": "m", "url": url, "slots": 10_000}
    targets = [Target("direct", ports[0], bench.start(ports[0], *me, "--serve", ports[0])),
               Target("minimal", ports[1], bench.start(ports[1], *me, "--serve", ports[1], url)),
               Target("jano", ports[2], bench.jano(ports[2], [model])),
               Target("no records", ports[3], bench.jano(ports[3], [model], run=("-c", STUBBED)))]
    for name, config, flags, port in (("haproxy", HAPROXY, ["-db", "-f"], ports[4]),
                                      ("nginx", NGINX, ["-c"], ports[5])):
        if program := shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin"):
            path = bench.folder / f"{name}.conf"
            path.write_text(config.format(port=port, backend=ports[0], folder=bench.folder))
            targets.append(Target(name, port, bench.start(port, program, *flags, path)))
    for peer in peers:
        name, _, address = peer.partition("=")
        targets.append(Target(name, urlsplit(address).port or 80, None))
    return targets


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what jano adds to a request.")
    parser.add_argument("--quick", action="store_true", help="a minute, and no run of 100,000")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--backend-port", type=int, metavar="PORT")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)  # as one of the processes
    options = parser.parse_args()
    if options.serve:
        port, *url = options.serve
        run_minimal(int(port), *url) if url else asyncio.run(Backend.serve(int(port)))
        return 0
    quick = options.quick
    with Bench() as bench:
        targets = start(bench, options.peer, options.backend_port)
        direct, minimal, jano, stubbed = targets[:4]
        for target in targets:
            asyncio.run(load(target, 8, 60, 500))  # warm up
        for _ in range(3 if quick else 7):
            one_by_one(targets, 200 if quick else 400, stream=False)
            one_by_one(targets, 100 if quick else 200, stream=True)
            for connections in CONNECTIONS:
                under_load(targets, connections, 0.5 if quick else 1)
            long_stream(targets, 5000 if quick else 20_000)
            slow_stream(targets, 50)
        rows = [{"median of the rounds": figure, **{
            target.name: f"{median(target.rounds[figure]):.4g}" for target in targets}}
            for figure in direct.rounds]
        memory = {target.name: f"{rss_mb(target.pid):.0f}" if target.pid else "-"
                  for target in targets}
        rows.append({"median of the rounds": "MB", **memory})
        tools.table("Latencies are ms above direct's; lateness in ms", rows)
        asyncio.run(load(jano, 8, 600, 10_000))
        after = [rss_mb(jano.pid or 0)]
        if not quick:
            asyncio.run(load(jano, 8, 600, 90_000))
            after.append(rss_mb(jano.pid or 0))
    figures: list[Figure] = [
        (f"{what}, added, times the minimal forwarder's", ratio(jano, minimal, what), "<=", 1.25)
        for what in ("one-shot p50", "one-shot p95", "first byte p50", "first byte p95")]
    figures.append(("one-shot p50, added, times the one without records",
                    ratio(jano, stubbed, "one-shot p50"), "<=", 1.1))
    for what, least in (*((f"requests/s, {n}", 0.8) for n in CONNECTIONS), ("chunks/s", 0.9)):
        figures.append((f"{what}, times the minimal forwarder's",
                        ratio(jano, minimal, what), ">=", least))
    figures.append(("chunk's lateness, ms", median(jano.rounds["lateness"]), "<=", 5))
    figures.append(("MB after 10,000 requests more", after[0], "<=", 50))
    if not quick:
        figures.append(("MB after 100,000, times that", after[1] / after[0], "<=", 1.05))
    return tools.verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
