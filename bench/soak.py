"""Does anything ever get lost? Seeded chaos on one jano process, and a count of what went wrong.

    python bench/soak.py [--seconds 60] [--seed 1]

Clients of all kinds (KINDS) ask for four models in three sets. Their servers are toy processes that
a monkey kills, stalls, makes sick and restarts (FAULTS); the script, soak.sh, fails, or its servers
die while they load. RESULTS.md says what is a violation.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from zlib import crc32

import aiohttp
import tools

SCRIPT = Path(__file__).with_suffix(".sh")
SET_OF = {"chat": "talk", "embed": "talk", "code": "code", "math": "math"}
MODELS = list(SET_OF)
PATIENCE = 60  # seconds that any request may take
WARM_UP = 10  # seconds
SETTINGS = {  # everything happens often
    "SWAP_WAIT_TIMEOUT_MS": "6000",
    "REQUEST_TIMEOUT_MS": "2500",
    "MAX_TURN_MS": "1500",
    "HEALTH_POLL_INTERVAL_MS": "200",
    "LINGER_MS": "200",
    "HEARTBEAT_MS": "300",
    "MAX_QUEUE": "15",
    "SWAP_FAILURE_RESET_MS": "2000",
}
ASKING = (*("one-shot", "stream") * 4, "priority", "flex", "upstream", "junk", "refused")
LEAVING = ("leaves the queue", "leaves a stream", "half upload")
SLOW = ("slow reader", "stopped reader", "slow upload", "large upload", "late head")
KINDS = (*ASKING * 2, *LEAVING * 3, *SLOW, "load", "unload")
STREAMS = ("stream", "leaves a stream", "slow reader", "stopped reader", "late head")
FAULTS = (*("killed", "stalled") * 2, "stalled for good", "sick", "restarted")
JUNK = (b"", b"null", b"[]", b"{", b'{"model": 1}', b'{"model": "no"}', b"\xff\xfe", b"[" * 9999)
WORDS = "the prompt is too long"
ERROR_OBJECT = {"error": {"message": WORDS, "type": "invalid_request_error"}}
REFUSALS = (ERROR_OBJECT, {"message": WORDS}, {"detail": WORDS}, {"error": WORDS}, WORDS)
SICK = json.dumps({"error": {"message": "CUDA error", "type": "server_error"}})
NEVER_SENT = {"swap_failed", "backend_unavailable", "queue_full"}  # with status 503
ERRORS = {503: NEVER_SENT, 504: {"backend_timeout"}, 502: {"backend_died", "backend_unreachable"}}
ERRORS[200] = {"backend_error"}.union(*ERRORS.values())  # in a stream
FAILURES = (b'"handler failed"', b'"worker died"', b'"complaint of a library"')  # of jano, logged
Reach = tuple[int, int]  # how often a request must and may have reached a server

# -------------------------------------------------------------------------------------- servers
# All processes work in one temporary folder; its files are what they know of each other.


def loaded() -> list[str]:
    """The models whose servers may be asked now."""
    name, since = Path("loaded").read_text().split()
    return [model for model in MODELS if SET_OF[model] == name and float(since) <= time.time()]


def note(file: str, line: str) -> None:
    with open(file, "a") as lines:
        print(line, file=lines)


def script(*words: str) -> None:
    subprocess.run([SCRIPT, *words])


def event_for(nonce: str, size: int, body: bytes) -> str:
    """What the answer to this body consists of."""
    return f"data: {nonce} {crc32(body)} {'x' * size}\n\n"


class Server(tools.Backend):
    """A toy model server. It gets a request's nonce in a header, and the rest as JSON."""

    model = ""
    health_seconds = 2.5 if random.random() < 0.1 else 0

    def answer(self, head: bytes, body: bytes) -> None:
        live, sick = self.model in loaded(), Path(f"{self.model}.sick").exists()
        if head.startswith(b"GET"):
            status = 500 if sick else 200 if live else 503
            asyncio.get_running_loop().call_later(self.health_seconds, self.say, status, b"{}")
        else:
            nonce = head.partition(b"\r\nX-Nonce: ")[2].partition(b"\r\n")[0].decode()
            self.working = asyncio.ensure_future(self.work(nonce, body, live, sick))

    async def work(self, nonce: str, body: bytes, live: bool, sick: bool) -> None:
        note("reached", nonce)
        if not live:
            # What came while this process was stalled is no stray: jano has hung up since.
            await asyncio.sleep(0.3)
            if not self.transport.is_closing():
                note("strays", f"{nonce} reached {self.model}, which was not loaded")
        request = json.loads(body)
        await asyncio.sleep(request["silent"])
        if sick:
            self.say(500, SICK.encode())
        elif request["refusal"]:
            self.say(400, json.dumps(request["refusal"]).encode())
        else:
            event = {"event": event_for(nonce, request["size"], body)}
            super().answer(b"", json.dumps(request | event).encode())


# -------------------------------------------------------------------------------------- clients


def compose(rng: random.Random, kind: str) -> dict[str, Any]:
    """What is asked for; most of it says what the server shall do."""
    reads_slowly = kind.endswith("reader")
    return {
        "model": rng.choice(MODELS),
        "stream": kind in STREAMS or rng.random() < 0.2,
        "service_tier": kind,
        "text": "x" * (8_000_000 if kind == "large upload" else rng.choice((9, 99_999))),
        "size": 60_000 if reads_slowly else rng.choice((9, 999, 60_000)),
        "chunks": 20 if reads_slowly else rng.randrange(1, 6),
        "pause": rng.uniform(0, 0.03),
        "silent": rng.uniform(0.3, 1.5) if kind == "late head" else 0,  # seconds at first
        "server": "silent" if rng.random() < 0.9 else "dying",
        "refusal": rng.choice(REFUSALS) if kind == "refused" else None,
    }


async def upload(body: bytes, pause: float) -> AsyncIterator[bytes]:
    yield body[: len(body) // 2]
    await asyncio.sleep(pause)
    yield body[len(body) // 2 :]


class Soak:
    """What has been asked of jano and what has come of that."""

    session: aiohttp.ClientSession
    status: dict[str, Any]  # jano's latest

    def __init__(self, seed: int, port: int, pid: int) -> None:
        self.seed = seed
        self.url = f"http://127.0.0.1:{port}"
        self.pid = pid
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by kind of client
        self.reach: dict[str, Reach] = {}  # by nonce
        self.violations: list[str] = []

    async def run(self, seconds: float) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as self.session:
            before = await self.together(WARM_UP)
            after = await self.together(seconds - WARM_UP)
        print(f"  at rest: requests, open files, threads, MB {before} -> {after}")
        before[3] += 60  # malloc keeps some of what large bodies took
        if any(now > limit for now, limit in zip(after, before)):
            self.violations.append("traces are left")

    async def together(self, seconds: float) -> list[int]:
        """All at it for so long. Jano at rest then: requests, open files, threads, MB."""
        monkey = asyncio.create_task(self.monkey())
        observer = asyncio.create_task(self.observe())
        await asyncio.gather(*(self.client(number, seconds) for number in range(16)))
        monkey.cancel()
        await asyncio.sleep(5)  # a script may still be running
        observer.cancel()
        ends = await asyncio.gather(monkey, observer, return_exceptions=True)
        self.violations += [repr(end) for end in ends if isinstance(end, Exception)]
        await asyncio.sleep(1)  # until the observer's connection is gone
        files, threads = (len(os.listdir(f"/proc/{self.pid}/{what}")) for what in ("fd", "task"))
        requests = self.status["inFlight"] + self.status["queueDepth"]
        return [requests, files, threads, int(tools.rss_mb(self.pid))]

    async def client(self, number: int, seconds: float) -> None:
        until = time.time() + seconds
        rng = random.Random(f"{self.seed} {number} {seconds}")
        while time.time() < until:
            kind = rng.choice(KINDS)
            nonce = f"{number}-{rng.getrandbits(64):x}"
            try:
                outcome, self.reach[nonce] = await self.ask(rng, kind, nonce)
            except Exception as error:
                outcome = "VIOLATION"
                self.violations.append(f"{kind}: {error!r}")
            self.outcomes[kind, outcome] += 1
            await asyncio.sleep(rng.uniform(0, 0.3))
            beat = time.time() % 25
            if beat > 15:  # a flex request needs ten seconds of calm
                await asyncio.sleep(25 - beat)

    async def ask(self, rng: random.Random, kind: str, nonce: str) -> tuple[str, Reach]:
        """One request: what came of it, and how often it must and may have reached a server."""
        request = compose(rng, kind)
        body = rng.choice(JUNK) if kind == "junk" else json.dumps(request).encode()
        path = "/v1/chat/completions"
        if kind == "upstream":
            path = f"/upstream/{request['model']}{path}"
        if kind in ("load", "unload"):
            path, body = f"/{kind}?model={request['model']}", b""
        pause = {"half upload": PATIENCE, "slow upload": rng.uniform(0, 2)}.get(kind)
        leaves = kind in ("leaves the queue", "half upload")
        patience = PATIENCE * 5 if kind == "flex" else PATIENCE  # it waits for all others
        text = b""
        try:
            async with self.session.post(
                self.url + path,
                headers={"X-Nonce": nonce},
                data=upload(body, pause) if pause else body,
                timeout=aiohttp.ClientTimeout(rng.uniform(0.01, 1.5) if leaves else patience),
            ) as answer:
                if kind == "leaves a stream" and answer.status == 200:
                    await answer.content.readany()
                    return "left", (0, 1)
                await asyncio.sleep(4 if kind == "stopped reader" else 0)
                async for piece in answer.content.iter_any():
                    text += piece
                    await asyncio.sleep(0.03 if kind == "slow reader" else 0)
        except aiohttp.ClientError:
            return "broken connection", (0, 1)
        except TimeoutError:
            assert leaves, "lost: no answer"
            return "left", (0, 0 if kind == "half upload" else 1)
        times = request["chunks"] if request["stream"] else 1
        right = event_for(nonce, request["size"], body) * times
        return judge(kind, right, answer.status, text.decode())

    async def monkey(self) -> None:
        rng = random.Random(self.seed)
        while True:
            await asyncio.sleep(rng.uniform(0.4, 2))
            model = rng.choice(MODELS if rng.random() < 0.3 else loaded() or MODELS)
            fault = rng.choice(FAULTS)
            note("faults", f"server {fault}")
            if fault in ("killed", "restarted"):
                script("KILL", model)
            if fault == "restarted":
                script("START", model)
            if fault == "sick":
                note(f"{model}.sick", "until it is started again")
            if fault.startswith("stalled"):
                script("STOP", model)
                await asyncio.sleep(8 if fault == "stalled for good" else rng.uniform(0.1, 3))
                script("CONT", model)

    async def observe(self) -> None:
        timeout = aiohttp.ClientTimeout(total=5)
        while True:
            await asyncio.sleep(0.1)
            async with self.session.get(f"{self.url}/status", timeout=timeout) as answer:
                self.status = status = await answer.json()
            running = [call["model"] for call in status["active"] if call["state"] == "running"]
            assert status["ok"], status
            assert len(running) == len(set(running)), status
            assert len({SET_OF[model] for model in running}) <= 1, status


def judge(kind: str, right: str, status: int, text: str) -> tuple[str, Reach]:
    """As Soak.ask: is this an answer that jano may give?"""
    seen = f"{kind}: {status} {text[:300]!r} … {text[-300:]!r}"
    text = re.sub(r"(?m)^:.*\n\n", "", text)  # heartbeats
    if (kind, status) in (("junk", 400), ("load", 200), ("unload", 200)):
        return str(status), (0, 0)
    if kind == "refused" and WORDS in text:
        return f"{status}, the server's words", (1, 1)
    if text == SICK:
        return f"{status}, sick", (0, 1)
    if (status, text) == (200, right):
        assert kind not in ("junk", "refused"), seen
        return "complete", (1, 1)
    *_, last = text.strip().split("\n\n")
    code = json.loads(last.removeprefix("data: ")).get("error", {}).get("code")
    assert code in ERRORS.get(status, ()), seen
    return f"{status} {code}", (0, 0 if code in NEVER_SENT else 1)


def report(soak: Soak) -> int:
    reached = Counter(Path("reached").read_text().split())
    soak.violations += Path("strays").read_text().splitlines()
    for nonce, (least, most) in soak.reach.items():
        if not least <= reached[nonce] <= most:
            soak.violations.append(f"{nonce} reached a server {reached[nonce]} times")
    for (kind, outcome), count in sorted(soak.outcomes.items()):
        print(f"  {kind:18} {outcome:26} {count:6}")
    for file in "swaps", "faults":
        print(f"  {file}: {dict(Counter(Path(file).read_text().splitlines()))}")
    violations = len(soak.violations)
    print(f"seed {soak.seed}, {soak.outcomes.total()} requests, {violations} violations")
    print(*soak.violations[:20], sep="\n")
    return int(violations > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Count broken promises in seeded chaos.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # what a server of ours is
    options = parser.parse_args()
    if options.serve:
        signal.alarm(3600)  # if nobody else ends it
        Server.model = options.serve
        asyncio.run(Server.serve(json.loads(os.environ["PORTS"])[options.serve]))
    ports = {model: tools.free_port() for model in MODELS}
    os.environ |= {"SOAK": f"{sys.executable} {__file__}", "SEED": str(options.seed)}
    os.environ["PORTS"] = json.dumps(ports)
    with tools.Bench() as bench:
        os.chdir(bench.folder)
        for file in ("reached", "strays", "swaps", "faults"):
            Path(file).touch()
        Path("loaded").write_text(f"talk {time.time() + 2}")  # jano finds it loading
        script("START", "chat")
        script("START", "embed")
        models = [tools.model(model, port, set=SET_OF[model]) for model, port in ports.items()]
        port, pid = bench.jano(models, f'exec {SCRIPT} "$1"', **SETTINGS)
        soak = Soak(options.seed, port, pid)
        try:
            asyncio.run(soak.run(options.seconds))
            jano = bench.processes[0]
            jano.terminate()
            if jano.wait():
                soak.violations.append(f"jano ended with {jano.returncode}")
        finally:
            for model in MODELS:
                script("KILL", model)
        for line in Path(f"{port}.log").read_bytes().splitlines():
            if not line.startswith(b'{"t"') or any(failure in line for failure in FAILURES):
                soak.violations.append(f"jano said {line.decode()}")
        return report(soak)


if __name__ == "__main__":
    sys.exit(main())
