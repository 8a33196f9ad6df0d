"""Does Jano ever lose a request to a backend's connection that was about to be closed?

    python bench/reuse.py [--requests 30000] [--server COMMAND …]

A server is a command in which {port} stands for the port it shall listen on, for instance
--server "llama-server -m tiny.gguf --port {port}". Without one, three servers are tried that close
idle connections in different ways: Python's http.server as HTTP/1.0 (closes after each answer, as
mlx_lm.server does) and as HTTP/1.1 (closes after an idle second), and uvicorn if it is installed
(after five). None of them says so.

A hundred clients ask at once, twice in a row, half of it streams. Then all pause for about 0.5, 1
or 5 s, so that Jano's connections are as old as that, and ask again. What is not answered with 200
and a whole body is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import http.server
import importlib.util
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import tools
from tools import Bench, Figure, free_port

PAUSES = (0.5, 0.5, 0.5, 1, 1, 5)  # seconds; the short ones are the more dangerous
JITTER = 0.05
CLIENTS = 100
EVENTS = [b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"]


# ------------------------------------------------------------------------------------ servers


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 1  # idle seconds, then the connection is closed

    def do_GET(self) -> None:
        self.answer(b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if json.loads(body)["stream"] and self.protocol_version == "HTTP/1.1":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in [*EVENTS, b""]:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        else:
            self.answer(b"".join(EVENTS))

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def serve(version: str, port: int) -> None:
    Handler.protocol_version = version
    http.server.ThreadingHTTPServer.request_queue_size = CLIENTS
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """The same for uvicorn: chunked, as it gives no length."""
    if scope["type"] != "http":
        return
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    await send({"type": "http.response.start", "status": 200})
    for event in EVENTS:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body"})


def own_servers() -> dict[str, str]:
    """Name -> command."""
    python, me = shlex.quote(sys.executable), shlex.quote(__file__)
    commands = {
        "http.server, HTTP/1.0": f"{python} {me} --serve HTTP/1.0 {{port}}",
        "http.server, HTTP/1.1": f"{python} {me} --serve HTTP/1.1 {{port}}",
    }
    if importlib.util.find_spec("uvicorn"):
        folder = shlex.quote(str(Path(__file__).parent))
        uvicorn = f"{python} -m uvicorn --log-level warning --port {{port}}"
        commands["uvicorn"] = f"{uvicorn} --app-dir {folder} reuse:app"
    return commands


# ------------------------------------------------------------------------------------ clients


async def play(url: str, requests: int) -> Counter[str]:
    """Send that many requests; how many came to which end."""
    ends: Counter[str] = Counter()
    rng = random.Random(1)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        await ask(session, stream=False)  # the model is loaded
        while ends.total() < requests:
            pause = rng.choice(PAUSES)
            clients = [ask_twice(session, rng, pause, ends) for _ in range(CLIENTS)]
            await asyncio.gather(*clients)
    return ends


async def ask_twice(
    session: aiohttp.ClientSession, rng: random.Random, pause: float, ends: Counter[str]
) -> None:
    await asyncio.sleep(pause + rng.uniform(-JITTER, JITTER))
    for _ in range(2):
        stream = rng.random() < 0.5
        end = await ask(session, stream)
        kind = "stream" if stream else "one-shot"
        ends[end if end == "whole" else f"{kind} after {pause} s: {end}"] += 1


async def ask(session: aiohttp.ClientSession, stream: bool) -> str:
    messages = [{"role": "user", "content": "Who looked both ways?"}]
    request = {"model": "m", "messages": messages, "stream": stream, "max_tokens": 3}
    try:
        async with session.post("/v1/chat/completions", json=request) as answer:
            body = await answer.text()
    except aiohttp.ClientError as error:
        return repr(error)
    if answer.status == 200 and body and '"error"' not in body:
        return "whole"
    return f"{answer.status} {body[:200]}"


# --------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description="Count requests lost to closing connections.")
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--jano", type=tools.absolute_path, default=tools.JANO, metavar="FILE")
    parser.add_argument("--server", action="append", metavar="COMMAND")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        version, port = options.serve
        serve(version, int(port))
    servers = own_servers()
    if options.server:
        servers = {Path(shlex.split(command)[0]).name: command for command in options.server}
    figures = []
    for name, command in servers.items():
        with Bench() as bench:
            jano, port = free_port(), free_port()
            bench.start(port, *shlex.split(command.replace("{port}", str(port))))
            models = [{"name": "m", "url": f"http://127.0.0.1:{port}", "slots": CLIENTS}]
            bench.jano(jano, models, command=(sys.executable, options.jano))
            ends = asyncio.run(play(f"http://127.0.0.1:{jano}", options.requests))
        print(f"{name}:", *(f"{count:7} {end}" for end, count in ends.most_common()), sep="\n")
        lost = ends.total() - ends["whole"]
        figures.append(Figure(f"{name}: lost of {ends.total():,}", lost, "<=", 0))
    return tools.verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
