"""Does jano stay quick and small when a lot is asked of it?

    python bench/scale.py [--quick]

decision     Schedule and decide alone: a ticket comes, is granted and leaves, while others wait
arrival      CPU time of the process for one request more, while so many clients wait for a turn;
             with the time of a GET /status beside it, and memory per client that waits
slow reader  a streamed answer read at a tenth of the speed that is possible: what piles up in jano
idle         connections that have asked once and stay open
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools
from tools import Bench, Client, Figure, cpu_seconds, free_ports, post, rss_mb, table, verdict

from jano import Schedule, Ticket, decide

STATUS = b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

# --------------------------------------------------------------------------------- backend ----


class Backend(tools.Backend):
    """Answers /health at once, /stream with so many MB in chunks of 64 kB, anything else never."""

    def data_received(self, data: bytes) -> None:
        method, path = data.split(b" ", 2)[:2]
        if method == b"GET":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        elif method == b"POST" and path.startswith(b"/stream/"):
            self.streaming = asyncio.ensure_future(self.stream(int(path[8:])))

    async def stream(self, megabytes: int) -> None:
        self.transport.write(tools.STREAM)
        for _ in range(megabytes * 16):
            await self.may_write.wait()
            self.transport.write(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
        self.transport.write(b"0\r\n\r\n")

# --------------------------------------------------------------------------- measurements ----


def decision(bench: Bench, quick: bool) -> list[Figure]:
    rows, growths = [], {}
    counts = (10, 100, 1000, 10_000)
    for models in (2, 10, 50):
        states = {count: queue_of(count, models) for count in counts}
        rounds: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(20 if quick else 100):
            for count, state in states.items():  # in turn, as the machine has moods
                rounds[count].append(turns(state, 50))
        cost = {count: median(times) for count, times in rounds.items()}
        growths[models] = median(b / a for a, b in zip(rounds[10], rounds[10_000]))
        rows.append({"models, times in µs": f"{models}",
                     **{f"{count:,} wait": f"{cost[count] * 1e6:.1f}" for count in counts},
                     "10,000 / 10": f"{growths[models]:.2f}"})
    table("A ticket comes, is granted, leaves: three decisions. Ten that wait are of at most\n"
          "ten models, so the last line compares 50 models that wait with 10", rows)
    return [("decision: with 10,000 waiting, times one with 10", max(growths[2], growths[10]),
             "<=", 3), ("decision: the same, and five times the models", growths[50], "<=", 5)]


def queue_of(count: int, models: int) -> Schedule:
    """So many tickets that wait, spread over the models; the first of these is loaded."""
    state = Schedule(60, 5)
    state.slots = {f"m{number}": 1 for number in range(models)}
    state.load("m0", 0)
    for number in range(count):
        state.add(Ticket(f"m{number % models}", number / count))
    return state


def turns(state: Schedule, count: int) -> float:
    """Seconds that each of so many requests takes from arrival to leaving."""
    begin = time.perf_counter()
    for number in range(count):
        state.add(Ticket("m0", 1 + number / count))
        ticket = decide(state, 2.0).serve
        if ticket is None:
            raise SystemExit("no ticket is granted, though the loaded model has some")
        state.grant(ticket, 2.0)
        decide(state, 2.0)
        state.remove(ticket, 2.0)
        decide(state, 2.0)
    return (time.perf_counter() - begin) / count


def arrivals(bench: Bench, quick: bool) -> list[Figure]:
    rows, figures = [], []
    waiting: list[Client] = []
    jano, port = free_ports(2)
    url = start_backend(bench, port)
    models = [{"name": f"m{n}" if n else "m", "url": url} for n in range(50)]
    pid = bench.jano(jano, models, MAX_QUEUE="20000")
    status = Client(jano)
    status.ask(STATUS)
    empty = 0.0
    for count in (10, 1000) if quick else (10, 100, 1000, 8000):
        while len(waiting) < count:
            waiting.append(arrive(jano, len(waiting) % 50))
        wait_for(status, count)
        empty = empty or rss_mb(pid)
        size, cpu = rss_mb(pid), cpu_seconds(pid)
        more = [arrive(jano, number % 50) for number in range(500)]
        wait_for(status, count + len(more), pause=0.5)
        cost = (cpu_seconds(pid) - cpu) / len(more) * 1000
        asked = median(status.ask(STATUS)[1] for _ in range(20)) * 1000
        rows.append({"clients that wait": f"{count:,}", "arrival, CPU ms": f"{cost:.2f}",
                     "/status with 500 more, ms": f"{asked:.1f}", "MB": f"{size:.0f}",
                     "kB each": f"{(rss_mb(pid) - size) / len(more) * 1024:.0f}"})
        if count == 1000:
            figures.append(("arrival with 1,000 waiting, CPU ms", cost, "<=", 2.0))
        waiting += more
    for client in waiting:
        client.socket.close()
    table("Clients that wait, over 50 models", rows)
    return figures


def start_backend(bench: Bench, port: int) -> str:
    bench.start(port, sys.executable, __file__, "--serve", port)
    return f"http://127.0.0.1:{port}"


def arrive(port: int, number: int) -> Client:
    client = Client(port)
    client.send(post(model=f"m{number}" if number else "m"))
    return client


def wait_for(status: Client, count: int, pause: float = 0.1) -> None:
    """Until so many are in jano; asking seldom, as this is its CPU time, too."""
    while True:
        time.sleep(pause)
        status.ask(STATUS)
        depth = int(status.body.partition(b'"queueDepth": ')[2].partition(b",")[0])
        flying = int(status.body.partition(b'"inFlight": ')[2].partition(b",")[0])
        if depth + flying >= count:
            return


def slow_reader(bench: Bench, quick: bool) -> list[Figure]:
    jano, port = free_ports(2)
    pid = bench.jano(jano, [{"name": "m", "url": start_backend(bench, port)}])
    megabytes = 100 if quick else 1024
    client = Client(jano)
    client.ask(STATUS)
    before = most = rss_mb(pid)
    client.send(post(path=f"/stream/{megabytes}"))
    client.begin()
    read, begin, tail = len(client.body), time.monotonic(), b""
    while not tail.endswith(b"\r\n0\r\n\r\n"):
        piece = client.receive()
        read, tail = read + len(piece), tail[-9:] + piece[-9:]
        if (ahead := read / 2**20 / 40 - (time.monotonic() - begin)) > 0.05:  # 40 MB a second
            time.sleep(ahead)
            most = max(most, rss_mb(pid))
    seconds = time.monotonic() - begin
    table("A reader of 40 MB a second", [{
        "MB streamed": f"{read / 2**20:.0f}", "s": f"{seconds:.1f}", "MB of jano before":
        f"{before:.1f}", "at most": f"{most:.1f}"}])
    return [("slow reader: MB that jano grows by", most - before, "<=", 10)]


def idle(bench: Bench, quick: bool) -> list[Figure]:
    jano, other, port = free_ports(3)
    models = [{"name": "m", "url": start_backend(bench, port)}]
    pid, _ = bench.jano(jano, models), bench.jano(other, models)
    asking = Client(jano), Client(other)
    for client in asking * 300:  # warm up
        client.ask(STATUS)
    size = rss_mb(pid)
    crowd = [Client(jano) for _ in range(1000)]
    for client in crowd:
        client.ask(STATUS)
    times = [[client.ask(STATUS)[1] * 1000 for client in asking] for _ in range(1000)]
    with_them, without = (median(column) for column in zip(*times))
    cpu = cpu_seconds(pid)
    time.sleep(2)
    used = (cpu_seconds(pid) - cpu) / 2
    table("1,000 connections that are open and do nothing, beside a jano that has none", [{
        "MB before": f"{size:.0f}", "with them": f"{rss_mb(pid):.0f}", "/status, ms with them":
        f"{with_them:.2f}", "without": f"{without:.2f}", "CPU at rest": f"{used:.1%}"}])
    for client in crowd:
        client.socket.close()
    return [("idle connections: /status with 1,000, times without", with_them / without, "<=", 1.5),
            ("idle connections: kB each", (rss_mb(pid) - size) * 1.024, "<=", 64)]

# ------------------------------------------------------------------------------------ main ----


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure jano under many requests.")
    parser.add_argument("--quick", action="store_true", help="smaller, within half a minute")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)  # as the backend
    options = parser.parse_args()
    if options.serve:
        asyncio.run(Backend.serve(options.serve))
    figures = []
    for measure in (decision, arrivals, slow_reader, idle):
        with Bench() as bench:
            figures += measure(bench, options.quick)
    return verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
