"""What does Jano add to a request? Beside the least that a proxy on aiohttp can add, in one run.

    python bench/overhead.py [--quick] [--old FILE] [--ancestor COMMAND] [--llama-swap BINARY]
    python bench/overhead.py [--quick] --reuse [COMMAND …]

RESULTS.md says what the rows and columns are, and what --reuse asks. The machine's mood changes
within seconds: so each round measures the targets in turn, one-shot requests even one by one, and a
ratio is the median of the rounds' own ratios.
"""

import argparse
import asyncio
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from string import Template

import aiohttp
import tools
from aiohttp import web
from tools import Bench, Client, Figure, cpu_seconds, free_port, one_shot, rss_mb, stream

PYTHON = sys.executable
# What is measured request by request, with the kinds of server that make a difference to it.
ONE_BY_ONE = [("one-shot", "silent"), ("one-shot", "promising")]
ONE_BY_ONE += [("first byte", server) for server in ("silent", "promising", "closing")]
PAUSES = (0.5, 0.5, 0.5, 1, 1, 5)  # seconds; the short ones are the more dangerous
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}


async def serve_minimal(port: int, backend: int) -> None:
    """What everyone would write: it reads no JSON, logs nothing and queues nobody."""

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        data = await request.read()
        async with session.post(request.path_qs, data=data, headers=headers) as upstream:
            given = [(k, v) for k, v in upstream.headers.items() if k.lower() not in HOP_BY_HOP]
            response = web.StreamResponse(status=upstream.status, headers=given)
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=2**30)
    app.router.add_post("/{path:.*}", forward)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    url = f"http://127.0.0.1:{backend}"
    async with aiohttp.ClientSession(url, auto_decompress=False) as session:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


# ------------------------------------------------------------------------------------ targets


class Target:
    """One process that is measured."""

    def __init__(self, name: str, port: int, pid: int) -> None:
        self.name = name
        self.port = port
        self.pid = pid
        self.client = Client(port)
        self.rounds: dict[str, list[float]] = defaultdict(list)  # measure -> one value a round
        self.lost = 0  # requests that were not answered well


def start_targets(bench: Bench, options: argparse.Namespace, *valgrind: str) -> dict[str, Target]:
    """Those that are at hand or asked for, by name; under valgrind the ones in Python alone."""
    backend, pid = bench.backend()
    port = free_port()
    minimal = bench.start(port, *valgrind, PYTHON, __file__, "--minimal", port, backend)
    targets = [Target("direct", backend, pid), Target("minimal", port, minimal)]
    commands = {"jano": [PYTHON, tools.JANO], "old": options.old and [PYTHON, options.old]}
    programs = {}
    if not valgrind:
        commands["ancestor"] = shlex.split(options.ancestor or "")
        programs["llama-swap"] = options.llama_swap
    if not valgrind and not options.quick:
        path = os.environ["PATH"] + ":/usr/sbin"
        programs |= {name: shutil.which(name, path=path) for name in ("nginx", "haproxy")}
    for name, command in commands.items():
        if command:
            models = [tools.model("m", backend, slots=10_000)]
            targets.append(Target(name, *bench.jano(models, "exit 0", *valgrind, *command)))
    for name, program in programs.items():
        if program:
            port = free_port()
            fields = {"port": port, "backend": backend, "folder": bench.folder}
            text = Path(__file__).with_name("proxies").joinpath(f"{name}.conf").read_text()
            text = Template(text).substitute(fields)
            arguments, _, _ = text.removeprefix("# Started with: ").partition("\n")
            file = bench.folder / f"{name}.conf"
            file.write_text(text)
            targets.append(Target(name, port, bench.start(port, program, *arguments.split(), file)))
    return {target.name: target for target in targets}


# ------------------------------------------------------------------------------- measurements


def measure(targets: Sequence[Target], quick: bool) -> None:
    for target in targets:
        asyncio.run(load(target, 8, 60, 500))  # warm up
    for _ in range(3 if quick else 12):
        for shape, server in ONE_BY_ONE:
            one_by_one(targets, shape, server, 100 if quick else 200)
        for connections in (1, 8, 64):
            for target in targets:
                begin, cpu = time.monotonic(), cpu_seconds(target.pid)
                done = asyncio.run(load(target, connections, 0.3 if quick else 0.7))
                seconds, used = time.monotonic() - begin, cpu_seconds(target.pid) - cpu
                target.rounds[f"requests/s, clients: {connections}"].append(done / seconds)
                target.rounds[f"CPU ms, clients: {connections}"].append(used / done * 1000)
        chunks = 3000 if quick else 10_000
        for target in targets:
            cpu = cpu_seconds(target.pid)
            _, seconds = target.client.ask(stream(chunks=chunks))
            used = cpu_seconds(target.pid) - cpu
            target.rounds["chunks/s"].append(chunks / seconds)
            target.rounds["CPU ms, 1,000 chunks"].append(used / chunks * 1e6)
    rows = []
    for measure in targets[0].rounds:
        values = {target.name: f"{median(target.rounds[measure]):.4g}" for target in targets}
        rows.append({"": measure} | values)
    rows.append({"": "requests lost"} | {target.name: str(target.lost) for target in targets})
    tools.table("Medians of the rounds", rows)


def one_by_one(targets: Sequence[Target], shape: str, server: str, count: int) -> None:
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
            except ConnectionError:
                target.lost += 1
                target.client.connect()
        if server == "closing":
            direct.client.connect()  # its end may still be on its way
    for target in targets:
        for percent in (50, 95):
            base, taken = (quantiles(times[one], n=100)[percent - 1] for one in (direct, target))
            target.rounds[f"{shape} p{percent} added, ms, {server}"].append((taken - base) * 1000)
        used = cpu_seconds(target.pid) - cpu[target]
        target.rounds[f"CPU ms, {shape}, {server}"].append(used / count * 1000)


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
                await reader.readexactly(len(tools.ANSWER))
            done += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return done


def ratios(targets: dict[str, Target], quick: bool) -> list[Figure]:
    """Three quick rounds are few: they check what noise touches least, and with some room."""
    figures = [Figure("requests lost", targets["jano"].lost, "<=", 0)]
    for _, measure, other, sign, limit in tools.promises("overhead", quick):
        if other in targets:
            rounds = targets["jano"].rounds[measure], targets[other].rounds[measure]
            ratio = median(own / others for own, others in zip(*rounds))
            room = 1.25 if quick else 1
            figures.append(Figure(f"{measure}, times {other}'s", ratio, sign, limit * room))
    return figures


def memory(jano: Target) -> list[Figure]:
    asyncio.run(load(jano, 64, 600, 10_000))
    early = rss_mb(jano.pid)
    asyncio.run(load(jano, 64, 600, 90_000))
    late = rss_mb(jano.pid)
    what = "MB after 100,000 requests"
    ratio = Figure(f"{what}, times that after 10,000", late / early, "<=", 1.03)
    return [Figure(what, late, "<=", 48), ratio]


def instructions(bench: Bench, options: argparse.Namespace) -> list[Figure]:
    """Count them under valgrind, and print a table; jano's one-shot is a figure."""
    valgrind = ("valgrind", "--tool=callgrind", f"--callgrind-out-file={bench.folder}/callgrind.%p")
    targets = start_targets(bench, options, *valgrind)
    del targets["direct"]
    requests = {
        "one-shot": one_shot(),
        "stream, 20 chunks in one go": stream(chunks=20),
        "stream, 20 chunks one by one": stream(chunks=20, pause=0.005),
    }
    rows = {name: {"": name} for name in targets}
    for shape, request in requests.items():
        for name, target in targets.items():
            count = instructions_of(target, request, bench.folder)
            rows[name][shape] = f"{count / 1000:.0f}"
    tools.table("Instructions a request, in thousands", list(rows.values()))
    thousands = float(rows["jano"]["one-shot"])
    return [Figure("instructions, one-shot, thousands", thousands, "<=", 620)]


def instructions_of(target: Target, request: bytes, folder: Path) -> float:
    """The mean of a hundred requests, after thirty to warm up."""
    for count in (30, 100):
        for _ in range(count):
            target.client.ask(request)
        # Each dump counts what the process has run since the last one.
        subprocess.run(["vgdb", f"--pid={target.pid}", "dump"], check=True, capture_output=True)
    dumps = folder.glob(f"callgrind.{target.pid}.*")
    last = max(dumps, key=lambda path: int(path.suffix[1:]))
    return int(last.read_text().rpartition("\ntotals: ")[2]) / 100


def reuse(command: str, count: int) -> int:
    """How many of the requests are lost to connections that this server closes."""
    lost = 0
    with Bench() as bench:
        port = free_port()
        bench.start(port, *shlex.split(command.replace("{port}", str(port))))
        jano, _ = bench.jano([tools.model("m", port, slots=100)])
        clients = [Client(jano) for _ in range(100)]
        clients[0].ask(one_shot())  # the model is loaded
        with ThreadPoolExecutor(len(clients)) as pool:
            for _ in range(count // len(clients) // 2):
                pause = random.choice(PAUSES)
                lost += sum(pool.map(lambda client: ask_twice(client, pause), clients))  # noqa: B023
    return lost


def ask_twice(client: Client, pause: float) -> int:
    """After a pause of about so many seconds; how many of the two were lost."""
    time.sleep(pause + random.uniform(-0.05, 0.05))
    lost = 0
    for _ in range(2):
        try:
            client.ask(random.choice((one_shot(max_tokens=3), stream())))
        except OSError as fault:
            print(f"lost: {fault!r}")
            lost += 1
            client.connect()
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what jano adds to a request.")
    parser.add_argument("--quick", action="store_true", help="half a minute, fewer targets")
    parser.add_argument("--old", metavar="FILE", type=os.path.abspath, help="another jano.py")
    parser.add_argument("--ancestor", metavar="COMMAND")
    parser.add_argument("--llama-swap", metavar="BINARY")
    parser.add_argument("--reuse", nargs="*", metavar="COMMAND", help="only this: requests lost")
    parser.add_argument("--minimal", nargs=2, type=int, help=argparse.SUPPRESS)  # our own process
    options = parser.parse_args()
    if options.minimal:
        asyncio.run(serve_minimal(*options.minimal))
    figures = []
    if options.reuse is not None:
        idle = [f"{PYTHON} {tools.__file__} {{port}} --idle {seconds}" for seconds in (0, 1, 5)]
        for command in options.reuse or idle:
            count = 3000 if options.quick else 30_000
            lost = reuse(command, count)
            figures.append(Figure(f"lost of {count:,}: {command}", lost, "<=", 0))
        return tools.verdict(figures)
    with Bench() as bench:
        targets = start_targets(bench, options)
        measure(list(targets.values()), options.quick)
        figures += ratios(targets, options.quick)
        if not options.quick:
            figures += memory(targets["jano"])
    if shutil.which("valgrind"):
        with Bench() as bench:
            figures += instructions(bench, options)
    return tools.verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
