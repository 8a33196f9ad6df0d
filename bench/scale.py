"""Does Jano stay quick and small when a lot is asked of it, and does it see at once who is ready?

    python bench/scale.py [--quick]

decision     Schedule alone: a ticket comes, is granted and leaves, while others wait
arrival      CPU time of the process for one request more, while so many clients wait for a turn
slow reader  a streamed answer read at a tenth of the possible speed: what piles up in Jano
readiness    from the moment in which a new backend is ready to the first byte of its answer;
             refused: it listens only then; 503: it listens at once, and /health says 503 until then
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from statistics import median
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools
from tools import Bench, Client, Figure, cpu_seconds, free_port, post, rss_mb, table, verdict

from jano import Schedule, Ticket

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LOADING = OK.replace(b"200 OK", b"503 Loading")


# ----------------------------------------------------------------------------------- decision


def decision(bench: Bench, quick: bool) -> list[Figure]:
    rows = []
    figures = []
    for models in (2, 10, 50):
        schedules = {waiting: crowded(waiting, models) for waiting in (10, 1000, 10_000)}
        rounds: dict[int, list[float]] = {waiting: [] for waiting in schedules}
        for _ in range(20 if quick else 100):
            for waiting, schedule in schedules.items():
                rounds[waiting].append(seconds_of_a_turn(schedule, 50))
        row = {"models": str(models)}
        for waiting, times in rounds.items():
            row[f"{waiting:,} wait, µs"] = f"{median(times) * 1e6:.1f}"
        growth = median(most / few for few, most in zip(rounds[10], rounds[10_000]))
        row["10,000 / 10"] = f"{growth:.2f}"
        rows.append(row)
        if models <= 10:  # with more, ten that wait are not of all the models
            figures.append(Figure(f"turn, {models} models: 10,000 wait / 10", growth, "<=", 1.1))
    microseconds = median(rounds[1000]) * 1e6 / 3
    figures.append(Figure("decision, 50 models, 1,000 wait, µs", microseconds, "<=", 100))
    table("A ticket comes, is granted and leaves: three decisions", rows)
    return figures


def crowded(waiting: int, models: int) -> Schedule:
    """A schedule with so many waiting tickets, spread over the models; m0 is loaded."""
    schedule = Schedule(turn=60, linger=5)
    schedule.slots = {f"m{number}": 1 for number in range(models)}
    schedule.set_of = {model: model for model in schedule.slots}
    schedule.load("m0", 0.0)
    for number in range(waiting):
        schedule.arrive(Ticket(f"m{number % models}", number / waiting), number / waiting)
    return schedule


def seconds_of_a_turn(schedule: Schedule, count: int) -> float:
    """From arrival to leaving, while the others keep waiting; the mean of `count` turns."""
    begin = time.perf_counter()
    for _ in range(count):
        schedule.arrive(Ticket("m0", 2.0), 2.0)
        for ticket in schedule.advance(2.0):
            schedule.leave(ticket, 2.0)
        schedule.advance(2.0)
    return (time.perf_counter() - begin) / count


# ------------------------------------------------------------------- arrivals and connections


class Backend(tools.Backend):
    """Answers GET at once, /stream/N with N MB in chunks of 64 kB, any other POST never."""

    def answer(self, head: bytes, body: bytes) -> None:
        method, path = head.split(b" ", 2)[:2]
        if method == b"GET":
            self.transport.write(OK)
        elif path.startswith(b"/stream/"):
            self.streaming = asyncio.ensure_future(self.stream(int(path[8:])))

    async def stream(self, megabytes: int) -> None:
        self.transport.write(tools.STREAM_HEAD + b"\r\n")
        for _ in range(megabytes * 16):
            await self.may_write.wait()
            self.transport.write(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
        self.transport.write(tools.LAST_CHUNK)


def start(bench: Bench, models: int = 1) -> tuple[int, int]:
    """A jano in front of a Backend that is all its models m0, m1, …: its port and pid."""
    jano, port = free_port(), free_port()
    bench.start(port, sys.executable, __file__, "--serve", port)
    entries = [{"name": f"m{n}", "url": f"http://127.0.0.1:{port}"} for n in range(models)]
    return jano, bench.jano(jano, entries, MAX_QUEUE="20000")


def arrivals(bench: Bench, quick: bool) -> list[Figure]:
    port, pid = start(bench, models=50)
    clients: list[Client] = []
    rows = []
    figures = []
    for waiting in (10, 1000) if quick else (10, 1000, 8000):
        arrive(port, clients, waiting)
        size = rss_mb(pid)
        costs = []
        for _ in range(5):
            cpu = cpu_seconds(pid)
            arrive(port, clients, len(clients) + 100)
            costs.append((cpu_seconds(pid) - cpu) * 10)
        row = {"clients that wait": f"{waiting:,}", "arrival, CPU ms": f"{median(costs):.3f}"}
        row["MB"] = f"{size:.0f}"
        row["kB each"] = f"{(rss_mb(pid) - size) / 500 * 1024:.0f}"
        rows.append(row)
        if waiting == 1000:
            figures.append(Figure("arrival, 1,000 wait, CPU ms", median(costs), "<=", 0.15))
    table("Clients that wait, over 50 models", rows)
    return figures


def arrive(port: int, clients: list[Client], count: int) -> None:
    """Add clients until there are so many; return once all of them are in jano."""
    while len(clients) < count:
        client = Client(port)
        client.socket.sendall(post(model=f"m{len(clients) % 50}"))
        clients.append(client)
    while requests_in(port) < count:
        time.sleep(0.1)


def requests_in(port: int) -> int:
    """How many requests wait in jano or are in flight."""
    with urlopen(f"http://127.0.0.1:{port}/status") as answer:
        status = json.load(answer)
    return int(status["queueDepth"] + status["inFlight"])


def slow_reader(bench: Bench, quick: bool) -> list[Figure]:
    port, pid = start(bench)
    megabytes = 100 if quick else 1024
    before = most = rss_mb(pid)
    begin = time.monotonic()
    with urlopen(f"http://127.0.0.1:{port}/stream/{megabytes}", b'{"model": "m0"}') as answer:
        for read in range(megabytes):
            answer.read(2**20)
            time.sleep(max(0, begin + read / 40 - time.monotonic()))  # 40 MB a second
            most = max(most, rss_mb(pid))
    row = {"MB streamed": f"{megabytes}", "s": f"{time.monotonic() - begin:.1f}"}
    row["MB of jano before"] = f"{before:.1f}"
    row["at most"] = f"{most:.1f}"
    table("A reader of 40 MB a second", [row])
    return [Figure("slow reader: MB that jano grows by", most - before, "<=", 10)]


# ---------------------------------------------------------------------------------- readiness

SWAP = f"""[ "$1" != status ] || exit 1
if [ -e pid ]; then kill -9 "$(cat pid)"; fi
{sys.executable} {__file__} --load "$1" $(cat load) >/dev/null 2>&1 &
echo $! >pid
"""


def load(port: int, seconds: float, style: str) -> None:
    """A backend that is ready after so many seconds, and writes down when that was."""
    ready = time.monotonic() + seconds
    if style == "refused":
        time.sleep(seconds)
    with socket.create_server(("127.0.0.1", port)) as listener:
        ready = max(ready, time.monotonic())
        Path(f"{port}.ready").write_text(str(ready))
        while True:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                head = OK if time.monotonic() >= ready else LOADING
                client.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):  # what is left unread would make the close a reset
                    pass


def readiness(bench: Bench, quick: bool) -> list[Figure]:
    jano = free_port()
    ports = [free_port(), free_port()]
    models = [{"name": str(port), "url": f"http://127.0.0.1:{port}"} for port in ports]
    bench.jano(jano, models, SWAP, MAX_TURN_MS="0", LINGER_MS="0")
    client = Client(jano)
    rng = random.Random(1)
    rows = []
    worst = 0.0
    for style in ("refused", "503"):
        for seconds in (0.3, 1) if quick else (0.3, 1, 3, 10):
            lags = []
            shares = []
            for _ in range(3 if quick else 7):
                about = seconds * rng.uniform(0.8, 1.2)  # no rhythm of probes fits by chance
                (bench.folder / "load").write_text(f"{about} {style}")
                ports.reverse()
                begin = time.monotonic()
                first, _ = client.ask(post(model=str(ports[0])))
                ready = float((bench.folder / f"{ports[0]}.ready").read_text())
                lags.append(begin + first - ready)
                shares.append(lags[-1] / max(0.06, 0.1 * about))
            worst = max(worst, median(shares))
            row = {"backend": style, "ready after s": f"{seconds:g}"}
            row["lag, median ms"] = f"{median(lags) * 1000:.0f}"
            row["longest ms"] = f"{max(lags) * 1000:.0f}"
            row["median / limit"] = f"{median(shares):.2f}"
            rows.append(row)
    os.kill(int((bench.folder / "pid").read_text()), signal.SIGKILL)
    table("From ready to the first byte; the limit: 60 ms or 10 % of the load, the larger", rows)
    return [Figure("readiness: lag, times the limit, the largest median", worst, "<=", 1)]


# --------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure jano under many requests.")
    parser.add_argument("--quick", action="store_true", help="smaller, within half a minute")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(Backend.serve(options.serve))
    if options.load:
        port, seconds, style = options.load
        load(int(port), float(seconds), style)
    figures = []
    for measure in (decision, arrivals, slow_reader, readiness):
        with Bench() as bench:
            figures += measure(bench, options.quick)
    return verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
