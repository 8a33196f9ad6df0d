"""Does anything ever get lost? Seeded chaos on one jano process, and a count of what went wrong.

    python bench/soak.py [--seconds 60] [--seed 1]

Clients of all kinds (KINDS) ask for four models in three sets. Their servers are toy processes that
a monkey kills, stalls, makes sick and restarts (FAULTS); the script fails, or starts a server that
dies while it loads. What breaks a promise is a violation:

loaded    no request reaches a server that the script has not made the live one
whole     an answer is complete (nonce and checksums are right), an error of the README's, the
          server's own refusal in its own words, or visibly cut off; it comes within a minute, or
          five if it is flex
once      no request reaches a server twice; one that jano refused (a broken or half body, a failed
          swap) never does, one with a complete answer has done so
single    at most one request a model is in flight, as slots is 1, and only of one set
alive     /status answers all the time, and jano's log has no failure of jano itself
traces    are not left: at rest, requests, open files, threads and MB are as after ten seconds
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import aiohttp
import tools

SET_OF = {"chat": "talk", "embed": "talk", "code": "code", "math": "math"}
MODELS = list(SET_OF)
PATIENCE = 60  # seconds that any request may take
WARM_UP = 10  # seconds
SETTINGS = {  # everything happens often
    "JANO_PORT": "0",
    "SWAP_WAIT_TIMEOUT_MS": "6000",
    "REQUEST_TIMEOUT_MS": "2500",
    "MAX_TURN_MS": "1500",
    "HEALTH_POLL_INTERVAL_MS": "200",
    "LINGER_MS": "200",
    "HEARTBEAT_MS": "300",
    "MAX_QUEUE": "15",
    "SWAP_FAILURE_RESET_MS": "2000",
}
CLIENTS = ("one-shot", "stream", "priority", "flex", "form", "upstream", "GET", "junk", "pipelines")
LEAVING = ("leaves the queue", "leaves a stream", "half upload")
SLOW = ("slow reader", "stopped reader", "slow upload", "large upload", "late head")
ODD = ("audio", "gzip", "refused", "early 413", "cookies", "expects", "load", "unload")
KINDS = (*("one-shot", "stream") * 6, *CLIENTS * 2, *LEAVING * 3, *SLOW, *ODD)
FAULTS = (*("killed", "stalled") * 2, "stalled for good", "sick", "restarted")
JUNK = (b"", b"null", b"[]", b"{", b'{"model": 1}', b'{"model": "no"}', b"\xff\xfe", b"[" * 9999)
WORDS = "the prompt is too long"
ERROR_OBJECT = {"error": {"message": WORDS, "type": "invalid_request_error"}}
REFUSALS = (ERROR_OBJECT, {"message": WORDS}, {"detail": WORDS}, {"error": WORDS}, WORDS)
SICK = json.dumps({"error": {"message": "CUDA error", "type": "server_error"}})
NEVER_SENT = {"swap_failed", "backend_unavailable", "queue_full"}  # with status 503
ERRORS = {503: NEVER_SENT, 504: {"backend_timeout"}, 502: {"backend_died", "backend_unreachable"}}
STREAM_ERRORS = {"backend_error"}.union(*ERRORS.values())


# ----------------------------------------------------------------------- servers and swap script
# All processes work in one temporary folder; its files are what they know of each other.


def port_of(model: str) -> int:
    """Not one of those given to clients: it must be free again after the server was killed."""
    return int(Path("ports").read_text().split()[MODELS.index(model)])


def note_loaded(name: str, since: float = 0) -> None:
    """From that time on, this set is the live one. Nobody ever reads half of the file."""
    Path("loaded.new").write_text(f"{name} {since}")
    Path("loaded.new").replace("loaded")


def loaded() -> str:
    name, since = Path("loaded").read_text().split()
    return name if float(since) <= time.time() else "nobody"


def note(file: str, *words: str) -> int:
    """Add a line to the file; how long it is now."""
    with open(file, "a") as lines:
        print(*words, file=lines)
        return lines.tell()


class Server(tools.Backend):
    """A toy model server: it does what the X-Plan header of a request says."""

    model = ""
    health_seconds = 0.0

    def data_received(self, data: bytes) -> None:
        if b'"early 413": true' in data:
            note("reached", header(data, b"X-Nonce"), self.model, "fine")
            self.say(413, WORDS)
            self.transport.close()
        elif not self.transport.is_closing():
            super().data_received(data)

    def answer(self, head: bytes, body: bytes) -> None:
        self.answering = asyncio.ensure_future(self.work(head, body))

    async def work(self, head: bytes, body: bytes) -> None:
        live = loaded() == SET_OF[self.model]
        sick = is_sick(self.model)
        if head.startswith(b"GET /things"):
            self.say(500 if sick else 200, json.dumps({"model": self.model}))
            return
        if head.startswith(b"GET"):
            await asyncio.sleep(self.health_seconds)
            self.say(500 if sick else 200 if live else 503, "{}")
            return
        plan = json.loads(header(head, b"X-Plan"))
        # What came while this process was stalled is no stray: jano has hung up since.
        await asyncio.sleep(plan["silent"] if live else 0.3)
        stray = not live and not self.transport.is_closing()
        nonce = header(head, b"X-Nonce")
        note("reached", nonce, self.model, "stray" if stray else "fine")
        if sick:
            self.say(500, SICK)
        elif plan["refusal"]:
            self.say(400, json.dumps(plan["refusal"]))
        else:
            await self.give(plan, pieces_of(plan, nonce, crc32(body)))

    async def give(self, plan: dict[str, Any], pieces: list[bytes]) -> None:
        lines = [f"Content-Type: {plan['type']}"]
        if plan["gzip"]:
            pieces = [gzip.compress(b"".join(pieces))]
            lines.append("Content-Encoding: gzip")
        if plan["stream"]:
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
            lines.append("Transfer-Encoding: chunked")
        else:
            lines.append(f"Content-Length: {sum(map(len, pieces))}")
        if plan["breaks_off"] != 0:
            self.write_head(200, lines)
        for piece in pieces[: plan["breaks_off"]]:
            await asyncio.sleep(plan["pause"])
            await self.may_write.wait()
            self.transport.write(piece)
        if plan["breaks_off"] is not None:
            self.transport.close()

    def say(self, status: int, text: str) -> None:
        self.write_head(status, [f"Content-Length: {len(text)}"])
        self.transport.write(text.encode())

    def write_head(self, status: int, lines: list[str]) -> None:
        head = "\r\n".join([f"HTTP/1.1 {status} Toy", *lines])
        self.transport.write(head.encode() + b"\r\n\r\n")


def header(head: bytes, name: bytes) -> str:
    return head.partition(b"\r\n" + name + b": ")[2].partition(b"\r\n")[0].decode()


def pieces_of(plan: dict[str, Any], nonce: str, received: int) -> list[bytes]:
    """The answer's events; the last one has the checksums of the request and of the others."""
    text = "x" * plan["size"]
    events = [json.dumps({"nonce": nonce, "text": text})] * plan["pieces"]
    said = crc32("".join(events).encode())
    events.append(json.dumps({"nonce": nonce, "got": received, "said": said}))
    return [f"data: {event}\n\n".encode() for event in events]


def serve(model: str, dies: bool) -> None:
    def watch() -> None:
        time.sleep(1)
        while Path("ports").exists() and not dies:
            time.sleep(1)
        with contextlib.suppress(OSError):
            Path(f"{model}.pid").unlink()
        os._exit(1)  # the soak is over, or this server was made to die while it loads

    threading.Thread(target=watch, daemon=True).start()
    Server.model = model
    Server.health_seconds = 2.5 if random.random() < 0.1 else 0
    asyncio.run(Server.serve(port_of(model)))


def start(model: str, *options: str) -> None:
    """Start a server that inherits the output, as careless scripts do. One that runs is kept."""
    if not send(model, 0):
        Path(f"{model}.sick").unlink(missing_ok=True)
        argv = [sys.executable, __file__, "serve", model, *options]
        process = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.DEVNULL)
        Path(f"{model}.pid").write_text(str(process.pid))


def send(model: str, number: int) -> bool:
    """Send a signal to the model's server; whether there is one."""
    file = Path(f"{model}.pid")
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(file.read_text()), number)
        if number == signal.SIGKILL:  # its number may be another process's one day
            file.unlink()
        return True
    return False


def is_sick(model: str) -> bool:
    return Path(f"{model}.sick").exists()


def run_script(name: str) -> None:
    """SWAP_COMMAND: the old servers are killed or left alone; some swaps are in vain."""
    if name == "status":
        live, _ = Path("loaded").read_text().split()
        if any(send(model, 0) for model in MODELS if SET_OF[model] == live):
            print(f"{live}: loaded")
        return
    note_loaded("nobody")
    dice = random.Random(f"{Path('seed').read_text()} {note('swaps', name)}")
    for model in MODELS:
        if SET_OF[model] == name:
            stop = "JANO_RESTART" in os.environ
        else:
            stop = name == "unload" or is_sick(model) or dice.random() < 0.5
        if stop:
            send(model, signal.SIGKILL)
    if name == "unload":
        return
    fate = dice.random()
    if fate < 0.1:
        note("faults", "swap failed")
        time.sleep(dice.choice((0, 0, 0, 9)))  # 9: jano has to end it
        sys.exit("CUDA error: out of memory")
    dies = fate < 0.15
    for model in MODELS:
        if SET_OF[model] == name:
            send(model, signal.SIGKILL if dies else signal.SIGCONT)
            start(model, *["dies"] * dies)
    if dies:
        note("faults", "died while loading")
    note_loaded(name, time.time() + (3600 if dies else dice.uniform(0, 0.3)))


# -------------------------------------------------------------------------------------- clients


@dataclass
class Request:
    """What a client asks for, and how it behaves."""

    kind: str
    nonce: str
    model: str
    plan: dict[str, Any]  # what the server shall do
    headers: dict[str, str]
    body: bytes
    path: str = "/v1/chat/completions"
    method: str = "POST"
    upload_pause: float | None = None  # seconds, in the middle of the body
    leaves_after: float | None = None  # seconds

    def upload(self) -> bytes | AsyncIterator[bytes]:
        return self.body if self.upload_pause is None else self.upload_slowly(self.upload_pause)

    async def upload_slowly(self, pause: float) -> AsyncIterator[bytes]:
        half = len(self.body) // 2
        yield self.body[:half]
        await asyncio.sleep(pause)
        yield self.body[half:]


def plan_for(rng: random.Random, kind: str) -> dict[str, Any]:
    reads_slowly = kind.endswith("reader")
    always = reads_slowly or kind in ("stream", "leaves a stream", "late head", "audio")
    return {
        "stream": always or rng.random() < 0.2,
        "type": "audio/pcm" if kind == "audio" else "text/event-stream",
        "pieces": 20 if reads_slowly else rng.randrange(1, 6),
        "size": 60_000 if reads_slowly else rng.choice((9, 999, 60_000)),
        "pause": rng.uniform(0, 0.03),
        "silent": rng.uniform(0.3, 1.5) if kind == "late head" else 0,
        "breaks_off": None if rng.random() < 0.9 else rng.choice((0, 0, 1)),  # after so many
        "gzip": kind == "gzip",  # unasked
        "refusal": rng.choice(REFUSALS) if kind == "refused" else None,
        "early 413": kind == "early 413",  # the body is not read
    }


def compose(rng: random.Random, kind: str, nonce: str) -> Request:
    live = [model for model in MODELS if SET_OF[model] == loaded()]
    model = rng.choice(live if live and kind == "GET" else MODELS)
    plan = plan_for(rng, kind)
    headers = {"X-Nonce": nonce, "X-Plan": json.dumps(plan)}
    size = {"large upload": 8_000_000, "early 413": 3_000_000}.get(kind, rng.choice((9, 99_999)))
    fields = {"stream": plan["stream"], "service_tier": kind, "text": "x" * size}
    if kind != "upstream":
        fields["model"] = model
    request = Request(kind, nonce, model, plan, headers, json.dumps(fields).encode())
    match kind:
        case "audio":
            request.path = "/v1/audio/speech"
        case "cookies":
            headers["Cookie"] = f"other={'x' * 9000}"
        case "junk":
            request.body = rng.choice(JUNK)
        case "form":
            headers["Content-Type"] = "multipart/form-data; boundary=b"
            request.body = form(model=model.encode(), file=rng.randbytes(9**5))
        case "leaves the queue":
            request.leaves_after = rng.uniform(0.01, 1.5)
        case "half upload":
            request.leaves_after = rng.uniform(0.01, 1.5)
            request.upload_pause = PATIENCE
        case "slow upload":
            request.upload_pause = rng.uniform(0, 2)
        case "upstream":
            request.path = f"/upstream/{model}{request.path}"
        case "GET":
            request.method, request.path, request.body = "GET", f"/things?model={model}", b""
        case "load" | "unload":
            request.path, request.body = f"/{kind}?model={model}", b""
    return request


def form(**parts: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    return b"".join(head % (name.encode(), part) for name, part in parts.items()) + b"--b--"


class Soak:
    """What has been asked of jano and what has come of that."""

    def __init__(self, seed: int, url: str, session: aiohttp.ClientSession) -> None:
        self.seed = seed
        self.url = url
        self.session = session
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by kind of client
        self.reach: dict[str, tuple[int, int]] = {}  # nonce -> how often it must, may arrive
        self.violations: list[str] = []
        self.gets = 0  # under way; they need no turn

    async def client(self, number: int, seconds: float) -> None:
        until = time.time() + seconds
        rng = random.Random(f"{self.seed} {number} {seconds}")
        while time.time() < until:
            kind = rng.choice(KINDS)
            request = compose(rng, kind, f"{number}-{rng.getrandbits(64):x}")
            self.gets += kind == "GET"
            try:
                if kind == "pipelines":
                    outcome, reach = await self.pipeline(request, rng)
                else:
                    outcome, reach = await self.ask(request)
                self.reach[request.nonce] = reach
            except Exception as error:
                outcome = "VIOLATION"
                self.violations.append(f"{kind} {request.nonce}: {error!r}")
            self.gets -= kind == "GET"
            self.outcomes[kind, outcome] += 1
            await asyncio.sleep(rng.uniform(0, 0.3))
            beat = time.time() % 25
            if beat > 15:  # a flex request needs ten seconds of calm
                await asyncio.sleep(25 - beat)

    async def ask(self, request: Request) -> tuple[str, tuple[int, int]]:
        """One request: what came of it, and how often it must and may have reached a server."""
        patience = PATIENCE * 5 if request.kind == "flex" else PATIENCE  # it waits for all others
        timeout = aiohttp.ClientTimeout(total=request.leaves_after or patience)
        try:
            async with self.session.request(
                request.method,
                self.url + request.path,
                headers=request.headers,
                data=request.upload(),
                timeout=timeout,
                expect100=request.kind == "expects",
            ) as answer:
                if request.kind == "leaves a stream" and answer.status == 200:
                    await answer.content.readany()
                    return "left", (0, 1)
                await asyncio.sleep(4 if request.kind == "stopped reader" else 0)
                text = await self.read(answer, 0.03 if request.kind == "slow reader" else 0)
        except aiohttp.ClientError:
            return "broken connection", (0, 1)
        except TimeoutError:
            assert request.leaves_after, "lost: no answer"
            return "left", (0, 0 if request.kind == "half upload" else 1)
        return judge(request, answer.status, text)

    async def read(self, answer: aiohttp.ClientResponse, pause: float) -> str:
        pieces = []
        async for piece in answer.content.iter_any():
            pieces.append(piece)
            await asyncio.sleep(pause)
        return b"".join(pieces).decode()

    async def pipeline(self, request: Request, rng: random.Random) -> tuple[str, tuple[int, int]]:
        """Two requests in one go; sometimes it leaves before the answers are complete."""
        second = f"{request.nonce}-second"
        self.reach[second] = (0, 1)
        sent = b""
        for nonce, more in (request.nonce, "keep-alive"), (second, "close"):
            headers = request.headers | {"X-Nonce": nonce, "Connection": more}
            headers |= {"Host": "localhost", "Content-Length": str(len(request.body))}
            lines = [f"{name}: {value}" for name, value in headers.items()]
            head = "\r\n".join([f"POST {request.path} HTTP/1.1", *lines])
            sent += head.encode() + b"\r\n\r\n" + request.body
        leaves = rng.random() < 0.5
        port = int(self.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(sent)
            try:
                async with asyncio.timeout(rng.uniform(0, 1.5) if leaves else PATIENCE):
                    answers = await reader.read(-1)
            except ConnectionError:
                return "broken connection", (0, 1)
            except TimeoutError:
                assert leaves, "lost: no answer"
                return "left", (0, 1)
        _, _, after_second = answers.partition(f'"nonce": "{second}'.encode())
        assert request.nonce.encode() + b'"' not in after_second, "answers in the wrong order"
        return "answers" if answers else "broken connection", (0, 1)

    async def monkey(self) -> None:
        rng = random.Random(self.seed)
        while True:
            await asyncio.sleep(rng.uniform(0.4, 2))
            live = [model for model in MODELS if SET_OF[model] == loaded()]
            model = rng.choice(MODELS if not live or rng.random() < 0.3 else live)
            fault = rng.choice(FAULTS)
            note("faults", f"server {fault}")
            match fault:
                case "killed":
                    send(model, signal.SIGKILL)
                case "restarted":
                    send(model, signal.SIGKILL)
                    start(model)
                case "sick":
                    note(f"{model}.sick", "since now")
                case _:
                    send(model, signal.SIGSTOP)
                    await asyncio.sleep(8 if fault == "stalled for good" else rng.uniform(0.1, 3))
                    send(model, signal.SIGCONT)

    async def observe(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            status = await self.status()
            running = [call["model"] for call in status["active"] if call["state"] == "running"]
            assert status["ok"], status
            assert len(running) <= len(set(running)) + self.gets, status
            assert len({SET_OF[model] for model in running}) <= 1 + self.gets, status

    async def status(self) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=5)
        async with self.session.get(f"{self.url}/status", timeout=timeout) as answer:
            return dict(await answer.json())

    async def read_log(self, log: asyncio.StreamReader) -> None:
        failures = (b'"handler failed"', b'"worker died"', b'"complaint of a library"')
        async for line in log:
            if not line.startswith(b'{"t"') or any(failure in line for failure in failures):
                self.violations.append(f"jano said {line.decode()}")

    async def together(self, seconds: float, pid: int) -> list[int]:
        """All at it for so long. Jano at rest then: requests, open files, threads, MB."""
        helpers = [asyncio.create_task(work) for work in (self.monkey(), self.observe())]
        await asyncio.gather(*(self.client(number, seconds) for number in range(16)))
        for helper in helpers:
            helper.cancel()
        ends = await asyncio.gather(*helpers, return_exceptions=True)
        self.violations += [repr(end) for end in ends if isinstance(end, Exception)]
        await asyncio.sleep(5)  # a script may still be running
        status = await self.status()
        await asyncio.sleep(1)  # until the connection for that is gone
        return [status["inFlight"] + status["queueDepth"], *footprint(pid)]


def judge(request: Request, status: int, text: str) -> tuple[str, tuple[int, int]]:
    """As Soak.ask: is this an answer that jano may give?"""
    seen = f"{request.kind}: {status} {text[:300]!r} … {text[-300:]!r}"
    if status == 400 and request.kind == "junk":
        return "400", (0, 0)
    if WORDS in text and (status in (400, 413) or request.plan["stream"]):
        assert request.kind in ("refused", "early 413"), seen
        return f"{status}, the server's words", (1, 1)
    if status == 500:
        assert text == SICK or request.kind == "GET", seen
        return "500, sick", (0, 1)
    if status == 200 and request.kind in ("GET", "load", "unload"):
        return "200", (0, 0)
    if status == 409 and request.kind == "GET":
        return "409", (0, 0)
    events = [event for event in text.split("\n\n") if event and event[0] != ":"]
    *lines, last = (event.removeprefix("data: ") for event in events)
    end = json.loads(last)
    error = end.get("error")
    if error:
        allowed = STREAM_ERRORS if status == 200 else ERRORS.get(status, set())
        code = error.get("code")
        assert (status, request.kind) != (200, "audio"), f"no event stream: {seen}"
        assert code in allowed, f"undocumented: {seen}"
        return f"{status} {code}", (0, 0 if code in NEVER_SENT else 1)
    nonces = {json.loads(line)["nonce"] for line in [*lines, last]}
    assert nonces == {request.nonce}, f"not the answer to this: {seen}"
    assert request.kind not in ("junk", "refused", "early 413"), f"answered: {seen}"
    assert end["got"] == crc32(request.body), f"the body was damaged: {seen}"
    assert end["said"] == crc32("".join(lines).encode()), f"the answer was damaged: {seen}"
    return "complete", (1, 1)


# ----------------------------------------------------------------------------------------- main


def footprint(pid: int) -> list[int]:
    """Open files, threads and MB of a process; zeros where there is no /proc."""
    if not Path("/proc").exists():
        return [0, 0, 0]
    proc = Path(f"/proc/{pid}")
    files = len(list(proc.glob("fd/*")))
    threads = len(list(proc.glob("task/*")))
    return [files, threads, int(tools.rss_mb(pid))]


def report(soak: Soak) -> None:
    reached: Counter[str] = Counter()
    for line in Path("reached").read_text().splitlines():
        nonce, model, how = line.split()
        reached[nonce] += 1
        if how == "stray":
            soak.violations.append(f"{nonce} reached {model}, which was not loaded")
    for nonce, (least, most) in soak.reach.items():
        if not least <= reached[nonce] <= most:
            soak.violations.append(f"{nonce} reached a server {reached[nonce]} times")
    for (kind, outcome), count in sorted(soak.outcomes.items()):
        print(f"  {kind:18} {outcome:26} {count:6}")
    for file in "swaps", "faults":
        print(f"  {file}: {dict(Counter(Path(file).read_text().splitlines()))}")
    count = len(soak.violations)
    print(f"seed {soak.seed}, {soak.outcomes.total()} requests, {count} violations")
    print(*soak.violations[:20], sep="\n")


async def run(seconds: float, seed: int, program: Path) -> int:
    script = shlex.join([sys.executable, __file__, "swap"])
    jano = await asyncio.create_subprocess_exec(
        sys.executable,
        program,
        limit=2**20,
        env={"PATH": os.environ["PATH"], "SWAP_COMMAND": script, **SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
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
        most = [*before[:3], before[3] + 60]  # malloc keeps some of what large bodies took
        if any(now > limit for now, limit in zip(after, most)):
            soak.violations.append("traces are left")
        if await jano.wait():
            soak.violations.append(f"jano ended with {jano.returncode}")
        print(f"  at rest: requests, open files, threads, MB {before} -> {after}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            jano.kill()
        for model in MODELS:
            send(model, signal.SIGKILL)
    report(soak)
    return int(bool(soak.violations))


def prepare_folder(seed: int) -> None:
    """The files, with a set whose servers run but need two more seconds to load."""
    ports = [tools.free_port() for _ in MODELS]
    Path("ports").write_text(" ".join(map(str, ports)))
    Path("seed").write_text(str(seed))
    for file in ("reached", "swaps", "faults"):
        Path(file).touch()
    models = []
    for (model, group), port in zip(SET_OF.items(), ports):
        models.append({"name": model, "set": group, "url": f"http://127.0.0.1:{port}"})
    Path("models.json").write_text(json.dumps({"models": models}))
    note_loaded("talk", time.time() + 2)
    start("chat")
    start("embed")


def main() -> int:
    parser = argparse.ArgumentParser(description="Count broken promises in seeded chaos.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jano", type=tools.absolute_path, default=tools.JANO, metavar="FILE")
    parser.add_argument("child", nargs="*", help=argparse.SUPPRESS)  # what our own processes are
    options = parser.parse_args()
    match options.child:
        case ["swap", name]:
            run_script(name)
            return 0
        case ["serve", model, *dies]:
            serve(model, bool(dies))
    with tempfile.TemporaryDirectory(prefix="jano soak ") as folder:
        os.chdir(folder)
        prepare_folder(options.seed)
        return asyncio.run(run(options.seconds, options.seed, options.jano))


if __name__ == "__main__":
    sys.exit(main())
