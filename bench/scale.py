"""Does Jano stay quick and small when a lot is asked of it, and does it see at once who is ready?

    python bench/scale.py [--quick]

RESULTS.md says what is measured.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from statistics import median
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools
from tools import Bench, Client, Figure, model, one_shot, rss_mb, table

from jano import Schedule, Ticket

SWAP = f"""[ "$1" != status ] || exit 1
if [ -e pid ]; then kill -9 "$(cat pid)"; fi
{sys.executable} {tools.__file__} "$1" $(cat loading) >/dev/null 2>&1 &
echo $! >pid
"""


def decision(bench: Bench, quick: bool) -> list[Figure]:
    rows = []
    figures = []
    for models in (2, 10, 50):
        schedules = {}
        for waiting in (10, 1000, 10_000):
            schedules[waiting] = schedule = Schedule(max_turn=60, linger=5)
            schedule.slots = {f"m{number}": 1 for number in range(models)}
            schedule.set_of = {model: model for model in schedule.slots}
            schedule.note_loaded("m0", 0.0)
            for number in range(waiting):
                arrived = number / waiting
                schedule.arrive(Ticket(f"m{number % models}", arrived), arrived)
        rounds: dict[int, list[float]] = {waiting: [] for waiting in schedules}
        for _ in range(20 if quick else 100):
            for waiting, schedule in schedules.items():
                begin = time.perf_counter()
                for _ in range(50):
                    schedule.arrive(Ticket("m0", 2.0), 2.0)
                    for ticket in schedule.advance(2.0):
                        schedule.leave(ticket, 2.0)
                    schedule.advance(2.0)
                rounds[waiting].append((time.perf_counter() - begin) / 50 * 1e6)
        row = {f"{waiting:,} wait, µs": f"{median(times):.1f}" for waiting, times in rounds.items()}
        growth = median(most / few for few, most in zip(rounds[10], rounds[10_000]))
        rows.append({"models": str(models)} | row | {"10,000 / 10": f"{growth:.2f}"})
        if models <= 10:  # with more, ten that wait are not of all the models
            figures.append(Figure(f"turn, {models} models: 10,000 wait / 10", growth, "<=", 1.1))
    table("A ticket comes, is granted and leaves: three decisions", rows)
    one = median(rounds[1000]) / 3
    return [*figures, Figure("decision, 50 models, 1,000 wait, µs", one, "<=", 100)]


def arrivals(bench: Bench, quick: bool) -> list[Figure]:
    backend, _ = bench.backend()
    models = [model(f"m{number}", backend) for number in range(50)]
    port, pid = bench.jano(models, MAX_QUEUE="20000")
    clients: list[Client] = []
    rows = []
    figures = []
    for waiting in (10, 1000) if quick else (10, 1000, 8000):
        arrive(port, clients, waiting)
        size = rss_mb(pid)
        costs = []
        for _ in range(5):
            cpu = tools.cpu_seconds(pid)
            arrive(port, clients, len(clients) + 100)
            costs.append((tools.cpu_seconds(pid) - cpu) * 10)
        row = {"clients that wait": f"{waiting:,}", "arrival, CPU ms": f"{median(costs):.3f}"}
        row |= {"MB": f"{size:.0f}", "kB each": f"{(rss_mb(pid) - size) / 500 * 1024:.0f}"}
        rows.append(row)
        if waiting == 1000:
            figures.append(Figure("arrival, 1,000 wait, CPU ms", median(costs), "<=", 0.15))
    table("Clients that wait, over 50 models", rows)
    return figures


def arrive(port: int, clients: list[Client], count: int) -> None:
    """Add clients until there are so many; return once all of them are in jano."""
    while len(clients) < count:
        client = Client(port)
        client.socket.sendall(one_shot("mute", model=f"m{len(clients) % 50}"))
        clients.append(client)
    arrived = 0
    while arrived < count:
        time.sleep(0.1)
        with urlopen(f"http://127.0.0.1:{port}/status") as answer:
            status = json.load(answer)
        arrived = status["queueDepth"] + status["inFlight"]


def slow_reader(bench: Bench, quick: bool) -> list[Figure]:
    backend, _ = bench.backend()
    port, pid = bench.jano([model("m", backend)])
    megabytes = 100 if quick else 1024
    client = Client(port)
    before = most = rss_mb(pid)
    begin = time.monotonic()
    client.socket.sendall(tools.stream(chunks=megabytes * 16, events=1000))  # of about 64 kB
    received = 0
    end = b""
    while end != tools.LAST_CHUNK:
        data = client.receive()
        received += len(data)
        end = (end + data)[-len(tools.LAST_CHUNK) :]
        time.sleep(max(0, begin + received / 40e6 - time.monotonic()))
        most = max(most, rss_mb(pid))
    row = {"MB streamed": f"{megabytes}", "s": f"{time.monotonic() - begin:.1f}"}
    row |= {"MB of jano before": f"{before:.1f}", "at most": f"{most:.1f}"}
    table("A reader of 40 MB a second", [row])
    return [Figure("slow reader: MB that jano grows by", most - before, "<=", 10)]


def readiness(bench: Bench, quick: bool) -> list[Figure]:
    ports = [tools.free_port(), tools.free_port()]
    models = [model(str(port), port) for port in ports]
    jano, _ = bench.jano(models, SWAP, MAX_TURN_MS="0", LINGER_MS="0")
    client = Client(jano)
    rng = random.Random(1)
    rows = []
    worst = 0.0
    for style, option in (("refused", "--refuses"), ("503", "")):
        for seconds in (0.3, 1) if quick else (0.3, 1, 3, 10):
            lags = []
            shares = []
            for _ in range(3 if quick else 7):
                about = seconds * rng.uniform(0.8, 1.2)  # no rhythm of probes fits by chance
                (bench.folder / "loading").write_text(f"--loading {about} {option}")
                ports.reverse()
                begin = time.monotonic()
                first, _ = client.ask(one_shot(model=str(ports[0])))
                ready = float((bench.folder / f"{ports[0]}.ready").read_text())
                lags.append((begin + first - ready) * 1000)
                shares.append(lags[-1] / max(60, 100 * about))
            worst = max(worst, median(shares))
            row = {"backend": style, "ready after s": f"{seconds:g}"}
            row |= {"lag, median ms": f"{median(lags):.0f}", "longest ms": f"{max(lags):.0f}"}
            rows.append(row | {"median / limit": f"{median(shares):.2f}"})
    os.kill(int((bench.folder / "pid").read_text()), signal.SIGKILL)
    table("From ready to the first byte; the limit: 60 ms or 10 % of the load, the larger", rows)
    return [Figure("readiness: lag, times the limit, the largest median", worst, "<=", 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure jano under many requests.")
    parser.add_argument("--quick", action="store_true", help="smaller, within half a minute")
    quick = parser.parse_args().quick
    figures = []
    for measure in (decision, arrivals, slow_reader, readiness):
        with Bench() as bench:
            figures += measure(bench, quick)
    return tools.verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
