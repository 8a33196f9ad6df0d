"""How long does a swap take beyond what the backend needs? Real processes, a real script.

    python bench/swap.py [--quick]

Two models of one group are asked for in turn. Their backend is a process that answers so long after
it was started as it is told to, and writes down when.

refused      it listens only once it is ready
503          it listens at once, and its /health says 503 until it is ready
lag          from the moment in which it is ready until the client has the first byte of its answer
whole swap   from the request to the first byte, through swap.example.sh and with backends that are
             ready at once; by hand: the same script run here, and the backend asked every 5 ms
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from statistics import median

from tools import JANO, Bench, Client, Figure, free_ports, post, quantile, table, verdict

TOY = """import socket, sys, time
port, load, late = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "refused"
ready = time.monotonic() + load
if late:
    time.sleep(load)
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", port))
listener.listen()
ready = time.monotonic() if late else ready
with open(f"{port}.ready", "w") as file:
    file.write(str(ready))
while True:
    client, _ = listener.accept()
    with client:
        data = client.recv(65536)
        status = b"200 OK" if time.monotonic() >= ready else b"503 Loading"
        client.sendall(b"HTTP/1.1 " + status + b"\\r\\nContent-Length: 2\\r\\n"
                       b"Connection: close\\r\\n\\r\\n{}")
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):  # what is left unread would make the close a reset
            pass
"""
SWAP = f"""[ "$1" != status ] || exit 0
[ ! -e pid ] || {{ kill "$(cat pid)"; while kill -0 "$(cat pid)"; do sleep 0.01; done; }} 2>&-
{sys.executable} -ISE toy.py "$1" $(cat load) >/dev/null 2>&1 &
echo $! >pid
"""


def readiness(bench: Bench, quick: bool) -> list[Figure]:
    jano, *ports = free_ports(3)
    bench.jano(jano, [{"name": str(port), "url": f"http://127.0.0.1:{port}"} for port in ports],
               SWAP, LINGER_MS="0", MAX_TURN_MS="0")
    client, rng, worst, rows = Client(jano), random.Random(1), 0.0, []
    number = 0
    for style in ("refused", "503"):
        for seconds in (0.1, 0.3, 1) if quick else (0.1, 0.3, 1, 3, 10):
            lags, shares = [], []
            for _ in range(3 if quick else 7):
                load = seconds * rng.uniform(0.8, 1.2)  # so that no rhythm of polls fits by chance
                (bench.folder / "load").write_text(f"{load} {style}")
                number += 1
                port = ports[number % 2]
                client.send(post(model=str(port)))
                first = client.begin()  # time.perf_counter is time.monotonic on Linux and macOS
                lags.append(first - float((bench.folder / f"{port}.ready").read_text()))
                shares.append(lags[-1] / max(0.06, 0.1 * load))
            worst = max(worst, median(shares))
            rows.append({"backend": style, "ready after s": f"{seconds:g}",
                         "lag, median ms": f"{median(lags) * 1000:.0f}",
                         "longest ms": f"{max(lags) * 1000:.0f}",
                         "median / limit": f"{median(shares):.2f}"})
    os.kill(int((bench.folder / "pid").read_text()), signal.SIGKILL)
    table("From ready to the first byte; the limit: 60 ms or 10 % of the load, the larger", rows)
    return [("lag, times the limit: the largest of the medians", worst, "<=", 1)]


def whole(bench: Bench, quick: bool) -> list[Figure]:
    """Through the example script, with nothing in it changed but its table of models."""
    jano, *ports = free_ports(3)
    names = [f"m{port}" for port in ports]
    lines = (JANO.parent / "swap.example.sh").read_text().splitlines(keepends=True)
    begin = lines.index("table() {\n") + 1
    lines[begin:lines.index("}\n", begin)] = [
        f"  model {name} {sys.executable} -ISE '{bench.folder}/toy.py' {port} 0 refused\n"
        for name, port in zip(names, ports)]
    script = bench.folder / "example.sh"
    script.write_text("".join(lines))
    script.chmod(0o700)
    state = str(bench.folder / "state")
    environ = {**os.environ, "SWAP_STATE_DIR": state}
    models = [{"name": n, "url": f"http://127.0.0.1:{port}"} for n, port in zip(names, ports)]
    bench.jano(jano, models, f'exec "{script}" "$@"', LINGER_MS="0", MAX_TURN_MS="0",
               SWAP_STATE_DIR=state)
    client = Client(jano)
    by_hand, through = [], []
    try:
        for _ in range(5 if quick else 20):
            start = time.monotonic()
            subprocess.run([script, names[0]], check=True, cwd=bench.folder, env=environ)
            while not answers(ports[0]):
                time.sleep(0.005)
            by_hand.append(time.monotonic() - start)
            # For jano the second one is loaded still, or none: its first swap finds all done.
            client.ask(post(model=names[0]))
            through.append(client.ask(post(model=names[1]))[0])
    finally:
        subprocess.run([script, "unload"], check=False, cwd=bench.folder, env=environ)
    table("A whole swap through swap.example.sh, in s", [
        {"": name, "median": f"{median(times):.3f}", "longest": f"{quantile(times, 1):.3f}"}
        for name, times in (("by hand", by_hand), ("through jano", through))])
    return [("whole swap, times the script by hand: median", median(through) / median(by_hand),
             "<=", 1.1)]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        return b" 200 " in client.recv(99)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what jano adds to a swap.")
    parser.add_argument("--quick", action="store_true", help="short loads, within a minute")
    options = parser.parse_args()
    with Bench() as bench:
        (bench.folder / "toy.py").write_text(TOY)
        figures = readiness(bench, options.quick) + whole(bench, options.quick)
    return verdict(figures)


if __name__ == "__main__":
    sys.exit(main())
