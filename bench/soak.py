"""Does anything ever get lost? Seeded chaos on one jano process, and a count of what went wrong.

    python bench/soak.py                        a minute; --seconds 3600 for an hour, --seed 7

Clients of all kinds ask for three models, whose backends are toy processes that a monkey kills,
stalls and restarts; the swap script fails one time in ten. What breaks a promise is a violation:

loaded    no request reaches a backend that the script has not made the live one
whole     an answer is complete (nonce and checksums are right), an error of the README's, or
          visibly cut off; and it comes within a minute
once      no request reaches a backend twice; one that jano refused (a broken or half body, a
          failed swap) never does, one with a complete answer has done so
single    at most one request is in flight, as slots is 1, and none while nothing is loaded
alive     /status answers all the time, and jano's log has no failure of jano itself
traces    are not left: at rest, requests, open files, threads and MB are as after ten seconds
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from zlib import crc32

import aiohttp
from aiohttp import web

MODELS = ("chat", "code", "math")
PATIENCE = 60  # seconds that any request may take
WARM_UP = 10  # seconds
SETTINGS = {  # everything happens often
    "JANO_PORT": "0", "SWAP_WAIT_TIMEOUT_MS": "4000", "REQUEST_TIMEOUT_MS": "2500",
    "MAX_TURN_MS": "1500", "HEALTH_POLL_INTERVAL_MS": "200", "LINGER_MS": "200",
    "HEARTBEAT_MS": "300", "MAX_QUEUE": "14", "SWAP_FAILURE_RESET_MS": "2000"}
KINDS = {  # of clients, and how often
    "one-shot": 20, "stream": 20, "priority": 5, "flex": 5, "multipart": 8, "slow reader": 4,
    "stopped reader": 1, "leaves the queue": 12, "leaves a stream": 8, "half upload": 6, "junk": 8,
    "slow upload": 5, "pipelines": 5}
JUNK = (b"", b"null", b"[]", b"{", b'{"model": 1}', b'{"model": "no"}', b"\xff\xfe", b"[" * 9999)
NEVER_SENT = {"swap_failed", "backend_unavailable", "queue_full"}  # with status 503
ERRORS = {503: NEVER_SENT, 504: {"backend_timeout"}, 502: {"backend_died", "backend_unreachable"}}
ERRORS[200] = {"backend_error"}.union(*ERRORS.values())  # within a stream

# ------------------------------------------------------------------------------- backends ----
# All processes work in one temporary folder; its files are what they know of each other.


def port_of(name: str) -> int:
    """Not one of those given to clients: it must be free again after the backend was killed."""
    return int(Path("port").read_text()) + MODELS.index(name)


def now_loaded(name: str, since: float) -> None:
    """Replace the file, so that nobody ever reads half of it."""
    Path("loaded.new").write_text(f"{name} {since}")
    Path("loaded.new").replace("loaded")


def loaded() -> str:
    name, since = Path("loaded").read_text().split()
    return name if float(since) <= time.time() else "nobody"


def note(file: str, *words: str) -> int:
    """One line more in the file; how long that is now."""
    with open(file, "a") as lines:
        print(*words, file=lines)
        return lines.tell()


def backend(name: str) -> None:
    """Several may run, but only the one that is loaded may be asked."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        live = loaded() == name
        if request.method == "GET":
            return web.Response(status=200 if live else 503)
        nonce, plan = request.headers["X-Nonce"], json.loads(request.headers["X-Plan"])
        # What came while we were stalled is no stray: jano has hung up since.
        await asyncio.sleep(0 if live else 0.3)
        note("reached", nonce, name, "fine" if live or request.transport is None else "stray")
        pieces = [json.dumps({"nonce": nonce, "text": "x" * plan["size"]})] * plan["pieces"]
        sums = {"got": crc32(body), "said": crc32("".join(pieces).encode())}
        pieces.append(json.dumps({"nonce": nonce, **sums}))
        lines = [f"data: {piece}\n\n".encode() for piece in pieces]
        response = web.StreamResponse()
        if plan["stream"]:
            response.content_type = "text/event-stream"
        else:
            response.content_length = sum(map(len, lines))
        if plan["most"]:
            await response.prepare(request)
        for line in lines[: plan["most"]]:
            await asyncio.sleep(plan["pause"])
            await response.write(line)
        if len(lines) > plan["most"] and request.transport:
            request.transport.close()
        return response

    def watch() -> None:
        while Path("port").exists():
            time.sleep(1)
        os._exit(0)  # the soak is over

    threading.Thread(target=watch, daemon=True).start()
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", answer)
    with socket.create_server(("127.0.0.1", port_of(name)), backlog=128) as listener:
        Path(f"{name}.pid").write_text(str(os.getpid()))
        web.run_app(app, sock=listener, print=None, access_log=None)


def start(name: str) -> None:
    """If it runs already, the second one finds its port taken and is gone at once."""
    subprocess.Popen([sys.executable, __file__, "backend", name], start_new_session=True,
                     stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def send(name: str, number: signal.Signals) -> None:
    file = Path(f"{name}.pid")
    with contextlib.suppress(OSError, ValueError):
        pid = int(file.read_text())
        if number == signal.SIGKILL:  # its number may be another process's one day
            file.unlink()
        os.kill(pid, number)


def swap(name: str) -> None:
    """SWAP_COMMAND: the old one is killed, or only put to sleep; one time in ten all is in vain."""
    if name == "status":
        return
    now_loaded("nobody", 0)
    dice = random.Random(f"{Path('seed').read_text()} {note('swaps', name)}")
    if dice.random() < 0.5 and (previous := os.environ["JANO_PREVIOUS_MODEL"]):
        send(previous, signal.SIGKILL)
    if dice.random() < 0.1:
        note("faults", "swap failed")
        time.sleep(dice.choice((0, 0, 0, 9)))  # 9: jano has to end it
        sys.exit(1)
    send(name, signal.SIGCONT)
    start(name)
    now_loaded(name, time.time() + dice.uniform(0, 0.3))

# -------------------------------------------------------------------------------- clients ----


class Soak:
    """What has been asked of jano and what has come of that."""

    def __init__(self, seed: int, url: str, session: aiohttp.ClientSession) -> None:
        self.seed, self.url, self.session = seed, url, session
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by kind of client
        self.reach: dict[str, tuple[int, int]] = {}  # nonce -> how often it must, may arrive
        self.violations: list[str] = []

    async def client(self, number: int, seconds: float) -> None:
        until, rng = time.time() + seconds, random.Random(f"{self.seed} {number} {seconds}")
        while time.time() < until:
            kind, = rng.choices([*KINDS], [*KINDS.values()])
            nonce = f"{number}-{rng.getrandbits(64):x}"
            try:
                outcome, self.reach[nonce] = await self.ask(rng, kind, nonce)
            except Exception as error:
                outcome = "VIOLATION"
                self.violations.append(f"{kind} {nonce}: {error!r}")
            self.outcomes[kind, outcome] += 1
            await asyncio.sleep(rng.uniform(0, 0.3))
            if (beat := time.time() % 25) > 15:  # a flex request needs ten seconds of calm
                await asyncio.sleep(25 - beat)

    async def ask(self, rng: random.Random, kind: str, nonce: str) -> tuple[str, tuple[int, int]]:
        """One request: what came of it, and how often it must and may have reached a backend."""
        slow, model = kind.endswith("reader"), rng.choice(MODELS)
        stream = slow or kind in ("stream", "leaves a stream") or rng.random() < 0.2
        plan = {"stream": stream, "pieces": 20 if slow else rng.randrange(1, 6),
                "size": 60_000 if slow else rng.choice((9, 999, 60_000)),
                "pause": rng.uniform(0, 0.03),  # "most": where it breaks off
                "most": 99 if rng.random() < 0.9 else rng.choice((0, 0, 1, 3))}
        headers = {"X-Nonce": nonce, "X-Plan": json.dumps(plan)}
        body = json.dumps({"model": model, "stream": stream, "service_tier": kind,
                           "text": "x" * rng.choice((9, 99_999))}).encode()
        if kind == "junk":
            body = rng.choice(JUNK)
        elif kind == "multipart":
            headers["Content-Type"] = "multipart/form-data; boundary=b"
            part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
            body = part % (b"model", model.encode()) + part % (b"file", rng.randbytes(9**5))
            body += b"--b--"

        async def slowly(pause: float) -> AsyncIterator[bytes]:
            yield body[: len(body) // 2]
            await asyncio.sleep(pause)
            yield body[len(body) // 2 :]

        if kind == "pipelines":
            return await self.pipeline(rng, nonce, headers, body)
        upload = {"half upload": slowly(PATIENCE), "slow upload": slowly(rng.uniform(0, 2))}
        leaves = kind.startswith("leaves the") or kind == "half upload"
        timeout = aiohttp.ClientTimeout(total=rng.uniform(0.01, 1.5) if leaves else PATIENCE)
        try:
            async with self.session.post(f"{self.url}/v1/x", headers=headers, timeout=timeout,
                                         data=upload.get(kind, body)) as answer:
                if kind == "leaves a stream" and answer.status == 200:
                    await answer.content.readany()
                    return "left", (0, 1)
                await asyncio.sleep(4 if kind == "stopped reader" else 0)
                pieces = []
                async for piece in answer.content.iter_any():
                    pieces.append(piece)
                    await asyncio.sleep(rng.uniform(0, 0.05) if slow else 0)
        except aiohttp.ClientError:
            return "broken connection", (0, 1)
        except asyncio.TimeoutError:
            assert leaves, "lost: no answer"
            return "left", (0, int(kind != "half upload"))
        status, text = answer.status, b"".join(pieces).decode()
        seen = f"{status} {text[:300]!r} … {text[-300:]!r}"
        *lines, last = (line.removeprefix("data: ") for line in text.split("\n\n")
                        if line and line[0] != ":")
        end = json.loads(last)
        if code := end.get("error", {}).get("code"):
            if (status, kind) == (400, "junk"):
                return "400", (0, 0)
            assert code in ERRORS.get(status, ()), f"undocumented: {seen}"
            assert 0 <= int(answer.headers.get("Retry-After", 0)) <= 60, f"{answer.headers}"
            return f"{status} {code}", (0, 0 if code in NEVER_SENT else 1)
        nonces = {json.loads(line)["nonce"] for line in [*lines, last]}
        assert (nonces, kind == "junk") == ({nonce}, False), f"not the answer to this: {seen}"
        assert end["got"] == crc32(body), f"the body was damaged: {seen}"
        assert end["said"] == crc32("".join(lines).encode()), f"damaged: {seen}"
        return "complete", (1, 1)

    async def pipeline(self, rng: random.Random, nonce: str, headers: dict[str, str],
                       body: bytes) -> tuple[str, tuple[int, int]]:
        """Two requests in one go; sometimes it leaves before the answers are complete."""
        sent, second = "", f"{nonce}-second"
        self.reach[second] = (0, 1)
        for name, more in (nonce, "keep-alive"), (second, "close"):
            lines = [f"{key}: {value}" for key, value in (headers | {"X-Nonce": name}).items()]
            lines += [f"Content-Length: {len(body)}", f"Connection: {more}", "", body.decode()]
            sent += "\r\n".join(["POST /v1/x HTTP/1.1", "Host: localhost", *lines])
        port, leaves = int(self.url.rpartition(":")[2]), rng.random() < 0.5
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(sent.encode())
            try:
                answers = await asyncio.wait_for(
                    reader.read(-1), rng.uniform(0, 1.5) if leaves else PATIENCE)
            except ConnectionError:
                return "broken connection", (0, 1)
            except asyncio.TimeoutError:
                assert leaves, "lost: no answer"
                return "left", (0, 1)
        *_, rest = answers.partition(f'"nonce": "{second}'.encode())
        assert nonce.encode() + b'"' not in rest, "answers in the wrong order"
        return "answers" if answers else "broken connection", (0, 1)

    async def monkey(self) -> None:
        rng = random.Random(self.seed)
        while True:
            await asyncio.sleep(rng.uniform(0.4, 2))
            name = loaded()
            name = rng.choice(MODELS) if name == "nobody" or rng.random() < 0.3 else name
            fault, = rng.choices(("killed", "stalled", "restarted"), (4, 4, 2))
            note("faults", f"backend {fault}")
            send(name, signal.SIGSTOP if fault == "stalled" else signal.SIGKILL)
            if fault == "stalled":
                await asyncio.sleep(rng.uniform(0.1, 3))
                send(name, signal.SIGCONT)
            elif fault == "restarted":
                start(name)

    async def observer(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            found = await self.at_work()
            assert found["ok"], found
            assert found["inFlight"] <= bool(found["currentModel"]), found

    async def at_work(self) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=5)
        async with self.session.get(f"{self.url}/status", timeout=timeout) as answer:
            return dict(await answer.json())

    async def read_log(self, log: asyncio.StreamReader) -> None:
        async for line in log:
            if not line.startswith(b'{"t"') or any(text in line for text in (
                    b'"handler failed"', b'"worker died"', b'"complaint of a library"')):
                self.violations.append(f"jano said {line.decode()}")

    async def together(self, seconds: float, pid: int) -> list[int]:
        """All at it for so long. Jano at rest then: requests, open files, threads, MB."""
        helpers = [asyncio.create_task(work) for work in (self.monkey(), self.observer())]
        await asyncio.gather(*(self.client(number, seconds) for number in range(16)))
        for helper in helpers:
            helper.cancel()
        ends = await asyncio.gather(*helpers, return_exceptions=True)
        self.violations += [repr(end) for end in ends if isinstance(end, Exception)]
        await asyncio.sleep(5)  # a script may still be running
        found = await self.at_work()
        await asyncio.sleep(1)  # until the connection for that is gone
        return [found["inFlight"] + found["queueDepth"], *footprint(pid)]


def footprint(pid: int) -> list[int]:
    proc = Path(f"/proc/{pid}")  # not on macOS
    pages = (proc / "statm").read_text().split()[1] if proc.exists() else 0
    return [len([*proc.glob("fd/*")]), len([*proc.glob("task/*")]), int(pages) // 256]


def report(soak: Soak) -> None:
    reached: Counter[str] = Counter()
    for line in Path("reached").read_text().splitlines():
        nonce, name, how = line.split()
        reached[nonce] += 1
        if how == "stray":
            soak.violations.append(f"{nonce} reached {name}, which was not loaded")
    for nonce, (least, most) in soak.reach.items():
        if not least <= reached[nonce] <= most:
            soak.violations.append(f"{nonce} reached a backend {reached[nonce]} times")
    for (kind, outcome), count in sorted(soak.outcomes.items()):
        print(f"  {kind:18} {outcome:26} {count:6}")
    for file in "swaps", "faults":
        print(f"  {file}: {dict(Counter(Path(file).read_text().splitlines()))}")
    print(f"seed {soak.seed}, {soak.outcomes.total()} requests, {len(soak.violations)} violations",
          *soak.violations[:20], sep="\n")


async def run(seconds: float, seed: int) -> int:
    command = shlex.join([sys.executable, __file__, "swap"])
    jano = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).parent.parent / "jano.py"), limit=2**20,
        env={"PATH": os.environ["PATH"], "SWAP_COMMAND": command, **SETTINGS},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert jano.stdout
    port = json.loads(await jano.stdout.readline())["port"]
    try:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            soak = Soak(seed, f"http://127.0.0.1:{port}", session)
            reader = asyncio.create_task(soak.read_log(jano.stdout))
            before = await soak.together(WARM_UP, jano.pid)
            after = await soak.together(seconds - WARM_UP, jano.pid)
        jano.terminate()
        await reader
        if any(now > most for now, most in zip(after, [*before[:3], 1.2 * before[3] + 10])):
            soak.violations.append("traces are left")
        if await jano.wait():
            soak.violations.append(f"jano ended with {jano.returncode}")
        print(f"  at rest: requests, open files, threads, MB {before} -> {after}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            jano.kill()
        for name in MODELS:
            send(name, signal.SIGKILL)
    report(soak)
    return int(bool(soak.violations))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("child", nargs="*", help=argparse.SUPPRESS)  # what our child processes are
    options = parser.parse_args()
    if options.child:
        {"swap": swap, "backend": backend}[options.child[0]](options.child[1])
        return 0
    with tempfile.TemporaryDirectory(prefix="jano soak ") as folder:
        os.chdir(folder)
        for file, content in {"reached": "", "swaps": "", "faults": "", "seed": options.seed,
                              "port": 20_000 + 3 * random.randrange(3000)}.items():
            Path(file).write_text(str(content))
        models = [{"name": name, "url": f"http://127.0.0.1:{port_of(name)}"} for name in MODELS]
        Path("models.json").write_text(json.dumps({"models": models}))
        now_loaded("nobody", 0)
        return asyncio.run(run(options.seconds, options.seed))


if __name__ == "__main__":
    sys.exit(main())
