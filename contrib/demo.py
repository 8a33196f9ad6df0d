#!/usr/bin/env python3
"""Jano in a minute: two toy models that share one memory, and six requests for them.

Run `python contrib/demo.py` where aiohttp is installed. The toy models are processes, changed by a
real swap script behind the real jano.py. It prints who was served when, and what a naive proxy
would have done; the page stays open until Ctrl-C.
"""

import http.server
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

JANO = Path(__file__).resolve().parents[1] / "jano.py"
REQUESTS = ["1.chat", "2.code", "3.chat", "4.chat", "5.code", "6.code"]
SWAP_SCRIPT = """#!/bin/sh
# Stop the toy model that runs, then start the one that is asked for.
cd "$(dirname "$0")"
if [ "$1" = status ]; then exec cat loaded; fi
if [ -e pid ]; then kill "$(cat pid)"; rm pid loaded; fi
if [ "$1" = unload ]; then exit; fi
PYTHON DEMO toy "$(cat "$1.port")" >/dev/null 2>&1 &
echo $! >pid
echo "$1: loaded" >loaded
"""


class Toy(http.server.BaseHTTPRequestHandler):
    """A model that loads for two seconds, answers in one, and says that it made 60 tokens."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"timings": {"predicted_n": 60, "predicted_per_second": 60}}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(1)
        self.do_GET()


def run_toy(port: int) -> None:
    time.sleep(2)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Toy).serve_forever()


def prepare(folder: Path) -> Path:
    """Write models.json and the swap script; return the script's path."""
    models = []
    for model in ("chat", "code"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (folder / f"{model}.port").write_text(str(port))
        models.append({"name": model, "url": f"http://127.0.0.1:{port}"})
    (folder / "models.json").write_text(json.dumps({"models": models}))
    script = folder / "swap.sh"
    text = SWAP_SCRIPT.replace("PYTHON", shlex.quote(sys.executable))
    script.write_text(text.replace("DEMO", shlex.quote(str(Path(__file__).resolve()))))
    script.chmod(0o700)
    return script


def send_requests(url: str) -> list[str]:
    """Send the six requests, a tenth of a second apart; return them in the order of the answers."""
    answered = []
    began = time.monotonic()

    def ask(name: str) -> None:
        number, model = name.split(".")
        time.sleep(int(number) / 10)
        body = json.dumps({"model": model}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        urllib.request.urlopen(request).read()
        answered.append(name)
        print(f"  {time.monotonic() - began:4.1f} s  {name} is answered", flush=True)

    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        list(threads.map(ask, REQUESTS))
    return answered


def picture(title: str, names: list[str]) -> str:
    """The names in a row, with a mark wherever the model changes, and how often it does."""
    row = names[0]
    for before, name in itertools.pairwise(names):
        row += f"  {name}" if before[2:] == name[2:] else f"  ▶ swap ▶  {name}"
    swaps = row.count("swap")
    return f"\n{title}: {swaps} swap{'s' if swaps > 1 else ''}\n  {row}"


def show(folder: Path, script: Path) -> None:
    print("Two toy models share one memory. Loading chat takes two seconds.", flush=True)
    subprocess.run([script, "chat"], check=True)
    time.sleep(2.5)
    settings = {"SWAP_COMMAND": str(script), "JANO_PORT": "0", "TMPDIR": str(folder)}
    argv = [sys.executable, str(JANO)]
    jano = subprocess.Popen(
        argv, cwd=folder, env={**os.environ, **settings}, stdout=subprocess.PIPE
    )
    assert jano.stdout
    try:
        listening = next(line for line in jano.stdout if b"jano listening" in line)
        url = f"http://127.0.0.1:{json.loads(listening)['port']}"
        print(f"Six requests go to {url}:  {'  '.join(REQUESTS)}\n", flush=True)
        answered = send_requests(url)
        print(picture("A naive proxy, in order of arrival", REQUESTS))
        print(picture("Jano", answered))
        print(f"\nThe same on its page: {url}/\nCtrl-C ends the demo.", flush=True)
        jano.stdout.read()  # the rest of its log, until it is stopped
    finally:
        jano.terminate()
        jano.wait()


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end it as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="jano-demo-") as name:
        script = prepare(Path(name))
        try:
            show(Path(name), script)
        except KeyboardInterrupt:
            print()
        finally:
            subprocess.run([script, "unload"], check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["toy"]:
        run_toy(int(sys.argv[2]))
    else:
        main()
