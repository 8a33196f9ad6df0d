#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp>=3.14,<4"]
# ///
"""Jano: one OpenAI-compatible front door for local models that do not fit in memory together.

    clients ──POST──▶ queue ──turn──▶ the loaded model's backend ──answer──▶ clients
                        └─ policy: time to change? ──▶ SWAP_COMMAND <model>, wait until ready

The worker grants, the handler forwards. A request's handler puts a ticket in its group's queue,
awaits its turn and forwards in its own coroutine. One worker a group decides whose turn it is, and
alone changes what is loaded. So a client that hangs up cancels its own handler and nothing else.

model        an entry of models.json          turn         a ticket's permission to forward
backend      the server behind a model        in flight    turns not yet finished
loaded       the model that owns the memory   drain        admit nothing, await what is in flight
group        models that share one memory     swap         drain, run the script, await readiness
ticket       a request's place in the queue   passthrough  a resident model: no queue, no swap

The swap contract: `SWAP_COMMAND <model>` makes that backend the live one and exits 0; twice does no
harm. Optional: `status` prints lines `<model>: loaded`, `unload` frees the memory. Its environment
has JANO_PREVIOUS_MODEL (the outgoing model, empty if none is known) and JANO_GROUP.

Reading order: config, picker and policy, worker, swap, forward, telemetry, HTTP handlers, app and
main, page, demo. All times are seconds of `clock`, unless the name ends in _ms.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from itertools import accumulate, islice
from pathlib import Path
from time import monotonic as clock
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from aiohttp.typedefs import Handler

__version__ = "1.0.0"

# ---------------------------------------------------------------------------------- config ----


class ConfigError(Exception):
    """The configuration's faults, one line each: where, what was found, what is expected."""


@dataclass(frozen=True)
class Settings:
    """The variables of the README's table, in lower case, with their defaults."""

    swap_command: tuple[str, ...] = ()  # as an argv
    models_file: str = "./models.json"
    jano_host: str = "127.0.0.1"
    jano_port: int = 8082
    swap_wait_timeout_ms: int = 180_000
    health_poll_interval_ms: int = 1000
    request_timeout_ms: int = 600_000
    max_turn_ms: int = 60_000
    linger_ms: int = 5000
    swap_failure_limit: int = 3
    swap_failure_reset_ms: int = 300_000
    max_queue: int = 1000
    max_body_mb: int = 256
    heartbeat_ms: int = 15_000
    idle_unload_ms: int = 0
    jano_api_key: str = ""
    jano_cors_origins: str = ""
    jano_allowed_hosts: str = ""
    usage_records_max: int = 500
    shutdown_timeout_ms: int = 30_000


DEFAULTS = {field.name.upper(): field.default for field in fields(Settings)}
MAY_BE_0 = {"JANO_PORT", "MAX_TURN_MS", "LINGER_MS", "SWAP_FAILURE_RESET_MS", "HEARTBEAT_MS",
            "IDLE_UNLOAD_MS", "SHUTDOWN_TIMEOUT_MS"}


@dataclass(frozen=True, eq=False)
class Model:
    """An entry of models.json; the fields are its keys."""

    name: str
    url: str  # of the backend, without a trailing "/" or "/v1"
    aliases: Iterable[str] = ()
    label: str = ""
    group: str = "default"
    slots: int = 1
    passthrough: bool = False
    endpoints: Iterable[str] = ()
    upstream_model: str = ""
    health: str = "/health"
    metadata: Mapping[str, Any] | None = None


def is_text(value: object) -> bool:
    """Not empty, no control character, no half surrogate: fit to be a script's argument."""
    return isinstance(value, str) and bool(re.fullmatch(r"[^\0-\x1f\x7f\ud800-\udfff]+", value))


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_url(value: object) -> bool:
    try:
        return (isinstance(value, str) and bool(re.fullmatch(r"https?://[^\s?#@\\]+", value))
                and urlsplit(value).port != 0 and bool(urlsplit(value).hostname))
    except ValueError:  # a port out of range, half an IPv6 address
        return False


KEYS: dict[str, tuple[Callable[[Any], object], str]] = {  # of an entry: the test, what is expected
    "name": (lambda v: is_text(v) and v.casefold() not in ("status", "unload"),
             "a text other than 'status' and 'unload'"),
    "url": (is_url, "an http or https address such as http://127.0.0.1:8081"),
    "aliases": (is_texts, "a list of texts"),
    "label": (is_text, "a text"),
    "group": (is_text, "a text"),
    "slots": (lambda v: type(v) is int and v >= 1, "a whole number of at least 1"),
    "passthrough": (lambda v: isinstance(v, bool), "true or false"),
    "endpoints": (is_texts, 'a list of routes such as "audio/transcriptions"'),
    "upstream_model": (is_text, "a text"),
    "health": (lambda v: is_text(v) and re.fullmatch(r"/[^\s#]*", v), "a path such as /health"),
    "metadata": (lambda v: isinstance(v, dict), "an object"),
}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
LOCAL = {*LOOPBACK, "0.0.0.0", "::"}


def load_settings(environ: Mapping[str, str], directory: Path) -> Settings:
    """From environ, else directory/.env, else the defaults; empty means unset. Or ConfigError."""
    faults: list[str] = []
    values: dict[str, Any] = {}
    dotenv = read_dotenv(directory / ".env", faults)
    for name, default in DEFAULTS.items():
        where = "environment" if environ.get(name) else ".env"
        found = environ.get(name) or dotenv.get(name, "")
        least, most = int(name not in MAY_BE_0), 65535 if name == "JANO_PORT" else 10**9
        if name == "SWAP_COMMAND":
            values[name] = find_command(found, directory, faults)
        elif not found or isinstance(default, str):
            values[name] = found or default
        elif re.fullmatch("[0-9]{1,10}", found) and least <= int(found) <= most:
            values[name] = int(found)
        else:
            faults.append(f"{where}: {name}: found {shown(found)}, expected a whole number from"
                          f" {least} to {most}")
    faults += [f"JANO_CORS_ORIGINS: found {shown(origin)}, expected * or origins such as"
               " https://example.org" for origin in words(values["JANO_CORS_ORIGINS"])
               if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin)]
    values["MODELS_FILE"] = str(directory / os.path.expanduser(values["MODELS_FILE"]))
    settings = Settings(**{name.lower(): value for name, value in values.items()})
    if faults:
        try:  # one start shows all faults, those of the models, too
            load_models(settings)
        except ConfigError as error:
            faults.append(str(error))
        raise ConfigError("\n".join(faults))
    return settings


def read_dotenv(path: Path, faults: list[str]) -> dict[str, str]:
    """Its KEY=value lines; quotes around a value, and `export` before a key, are dropped."""
    values: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        faults.append(f".env: found what cannot be read ({why(error)}), expected KEY=value lines")
        return values
    for number, line in enumerate(map(str.strip, lines), 1):
        name, equals, value = map(str.strip, line.removeprefix("export ").partition("="))
        if not line or line.startswith("#"):
            continue
        if not equals or name not in DEFAULTS:
            faults.append(f".env: line {number}: found {shown(name)}, expected KEY=value with a KEY"
                          f" out of {', '.join(DEFAULTS)}")
        quoted = re.fullmatch(r"""(["'])(.*?)\1(\s+#.*)?""", value)
        values[name] = quoted[2] if quoted else re.sub(r"(^|\s+)#.*", "", value)
    return values


def find_command(command: str, directory: Path, faults: list[str]) -> tuple[str, ...]:
    """SWAP_COMMAND's argv: the path of a script (spaces and ~ allowed), or a command line."""
    argv, fault = [command], "which is no file"
    if not os.path.isfile(directory / os.path.expanduser(command)):
        try:
            argv = shlex.split(command) or [""]
        except ValueError as error:
            fault = str(error)
    path = str(directory / os.path.expanduser(argv[0]))
    argv[0] = path if os.path.isfile(path) else shutil.which(argv[0]) or ""
    if not os.access(argv[0], os.X_OK):
        fault = "which is not executable: chmod +x" if argv[0] else fault
        found = f"found {shown(command)} ({fault})" if command else "not set"
        faults.append(f"SWAP_COMMAND: {found}, expected the path of your swap script")
    return tuple(argv)


def load_models(settings: Settings) -> list[Model]:
    """The entries of MODELS_FILE, in its order. Raises ConfigError."""
    file = settings.models_file
    try:
        registry = json.loads(Path(file).read_bytes(), parse_constant=int)  # refuses NaN
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: found {why(error)}, expected a JSON file") from None
    if not isinstance(registry, dict) or not isinstance(registry.get("models"), list):
        raise ConfigError(f'{file}: found {shown(registry)}, expected {{"models": [ … ]}}')
    faults = [f"{file}: found unknown key {shown(key)}, expected \"models\" alone"
              for key in registry if key != "models"]
    owners: dict[str, str] = {}  # a name or alias, without its case -> the entry that has it
    models: list[Model] = []
    for index, entry in enumerate(registry["models"]):
        named = isinstance(entry, dict) and "name" in entry
        where = f"{file}: models[{index}]" + (f" {shown(entry['name'])}" if named else "")
        if wrong := [f"{where}: {fault}" for fault in check_entry(entry, settings)]:
            faults += wrong
            continue
        for name in (entry["name"], *entry.get("aliases", ())):
            other = owners.setdefault(name.casefold(), f"{where}: {name}")
            if other != f"{where}: {name}":
                faults.append(f"{where}: found the name {shown(name)}, expected one that differs by"
                              f" more than case from {other}")
        url = entry["url"].rstrip("/").removesuffix("/v1").rstrip("/")
        models.append(Model(**{**entry, "url": url}))
    if not faults and all(model.passthrough for model in models):
        faults.append(f"{file}: models: found {len(models)} entries and none to swap, expected at"
                      " least one that is not passthrough")
    if faults:
        raise ConfigError("\n".join(faults))
    return models


def check_entry(entry: object, settings: Settings) -> list[str]:
    """The faults of one entry, each with its key."""
    if not isinstance(entry, dict):
        return [f"found {shown(entry)}, expected an object"]
    faults = [f"{key}: missing, expected {KEYS[key][1]}" for key in ("name", "url")
              if key not in entry]
    for key, value in entry.items():
        if key not in KEYS:
            faults.append(f"found unknown key {shown(key)}, expected one of {', '.join(KEYS)}")
        elif not KEYS[key][0](value):
            faults.append(f"{key}: found {shown(value)}, expected {KEYS[key][1]}")
        elif key == "url":
            parts = urlsplit(value)
            own = LOCAL if settings.jano_host.lower() in LOCAL else {settings.jano_host.lower()}
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            if parts.hostname in own and port == settings.jano_port:
                faults.append(f"url: found {shown(value)}, jano itself, expected a backend")
    return faults


def words(text: str) -> set[str]:
    """The parts of a comma-separated setting, in lower case."""
    return {part.strip().lower() for part in text.split(",")} - {""}


def shown(value: object) -> str:
    """A value as JSON, cut to what fits into a line."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "…"


def why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

# ----------------------------------------------------------------------- picker and policy ----

PRIORITY, DEFAULT, FLEX = range(3)  # tiers, by the request's service_tier; the lowest goes first


@dataclass(eq=False)
class Ticket:
    """One request's place in the queue."""

    model: str
    arrived: float
    tier: int = DEFAULT
    id: str = ""
    turn: asyncio.Future[None] | None = None  # resolves when granted, fails when it never will be
    granted: float | None = None
    swapping: float = 0.0  # seconds of its wait that went into swaps


Queue = dict[str, "OrderedDict[Ticket, None]"]  # model -> its tickets, oldest first, never none


def take_next(queue: Queue, loaded: str | None) -> Ticket | None:
    """The oldest ticket for the loaded model, else the oldest ticket of all, else None."""
    if loaded in queue:
        return next(iter(queue[loaded]))
    return min(map(next, map(iter, queue.values())), key=lambda t: t.arrived, default=None)


class Schedule:
    """What the policy looks at, for one group. No I/O, no asyncio; the clock is passed in."""

    def __init__(self, turn: float, linger: float) -> None:
        self.turn, self.linger = turn, linger  # MAX_TURN_MS and LINGER_MS, in seconds
        self.slots: dict[str, int] = {}  # model -> how many of its tickets may be in flight
        self.tiers: tuple[Queue, Queue, Queue] = ({}, {}, {})
        self.in_flight: set[Ticket] = set()
        self.loaded: str | None = None
        self.loaded_at = 0.0
        self.left: dict[str, float] = {}  # model -> when it was last unloaded
        self.cost: dict[str, float] = {}  # model -> average seconds from "admit no more" to ready
        self.idle_since: dict[str, float] = {}  # model -> since when nothing of it waits or runs
        self.gaps: dict[str, deque[float]] = {}  # model -> its last two idle times that ended

    def depth(self, model: str | None = None) -> int:
        """How many tickets wait: of one model, or of all."""
        return sum(len(tickets) for queue in self.tiers
                   for tickets in (queue.values() if model is None else [queue.get(model, ())]))

    def add(self, ticket: Ticket) -> None:
        """A ticket arrives; one that had its turn already comes back in front."""
        if ticket.model in self.idle_since:
            gap = ticket.arrived - self.idle_since.pop(ticket.model)
            if ticket.granted is None:
                self.gaps.setdefault(ticket.model, deque(maxlen=2)).append(gap)
        tickets = self.tiers[ticket.tier].setdefault(ticket.model, OrderedDict())
        tickets[ticket] = None
        tickets.move_to_end(ticket, last=ticket.granted is None)

    def grant(self, ticket: Ticket, now: float) -> None:
        self._dequeue(ticket)
        self.in_flight.add(ticket)
        ticket.granted = now

    def remove(self, ticket: Ticket, now: float) -> None:
        """A turn is over, or a ticket leaves the queue; once more does no harm."""
        self.in_flight.discard(ticket)
        self._dequeue(ticket)
        self._note_idle(ticket.model, now)

    def unload(self, now: float) -> None:
        if self.loaded is not None:
            self.left[self.loaded] = now
        self.loaded = None

    def load(self, model: str, now: float, cost: float | None = None) -> None:
        """model is ready, after cost seconds (None: nobody measured)."""
        self.loaded, self.loaded_at = model, now
        if cost is not None:
            self.cost[model] = (self.cost.get(model, cost) + cost) / 2
        self._note_idle(model, now)

    def _dequeue(self, ticket: Ticket) -> None:
        queue = self.tiers[ticket.tier]
        if ticket in queue.get(ticket.model, ()):
            del queue[ticket.model][ticket]
            if not queue[ticket.model]:
                del queue[ticket.model]

    def _note_idle(self, model: str, now: float) -> None:
        if not self.depth(model) and all(ticket.model != model for ticket in self.in_flight):
            self.idle_since.setdefault(model, now)


class Decision(NamedTuple):
    """Grant this ticket; or swap, once drained; or wait for an event, at most until then."""

    serve: Ticket | None = None
    swap_to: str | None = None
    until: float | None = None


def decide(state: Schedule, now: float) -> Decision:
    """Greedy, but never unfair and never thrashing. A pure function of state and clock."""
    queue: Queue = next((queue for queue in state.tiers if queue), {})  # greed works within a tier
    loaded, cost, left = state.loaded or "", state.cost, state.left
    ticket = take_next(queue, loaded)
    serve = ticket if len(state.in_flight) < state.slots.get(loaded, 1) else None
    heads = [next(iter(queue[model])) for model in queue if model != loaded]
    if not heads:
        return Decision(serve)
    # Next is the model that has waited longest, and none waits while it is loaded: so long queues
    # take turns, instead of the longest coming back each time.
    head = min(heads, key=lambda t: max(t.arrived, left.get(t.model, -math.inf)))
    trip = cost.get(loaded, 0.0) + cost.get(head.model, 0.0)  # there and back
    held_from = max(state.loaded_at, head.arrived)  # the clock runs only while somebody waits
    if not state.turn:  # plain greed, no ceiling
        head, held_from = min(heads, key=lambda t: t.arrived), math.inf
    if now < held_from + state.turn + 2 * trip:  # the loaded model keeps its turn
        if loaded in queue:
            return Decision(serve)
        if queue is state.tiers[PRIORITY]:
            return Decision(swap_to=head.model)
        if state.in_flight:
            return Decision()
        # Linger: a client whose pauses are short is back before a round trip would be over.
        if state.turn and min(state.gaps.get(loaded, ()), default=math.inf) <= state.linger:
            until = min(state.idle_since.get(loaded, 0) + state.linger, held_from + trip)
            if now < until:
                return Decision(until=until)
    return Decision(swap_to=head.model)

# --------------------------------------------------------------------------------- worker ----


class Worker(Schedule):
    """One group's owner: grants turns, and alone changes what is loaded.

    Handlers enqueue and leave between two awaits, and so does a reload of models.json take over:
    nobody ever sees a half changed state. A swap ends with the Model that it began with. The lock
    is held while SWAP_COMMAND runs: two at once would fight for the memory.
    """

    def __init__(self, group: str, jano: Jano) -> None:
        self.group, self.jano, self.settings = group, jano, jano.settings
        super().__init__(self.settings.max_turn_ms / 1000, self.settings.linger_ms / 1000)
        self.models: dict[str, Model] = {}
        self.lock = asyncio.Lock()
        self.changed = asyncio.Event()  # something that a decision depends on
        self.closed: tuple[Any, ...] = ()  # why it takes no ticket any more, for ApiError
        self.swapping: str | None = None
        self.swap_started = 0.0
        self.swap_seconds = 0.0  # spent in swaps so far
        self.draining_since: float | None = None  # since when nobody is admitted, for a swap
        self.failures: dict[str, tuple[int, float]] = {}  # model -> failed swaps in a row, the last
        self.task = asyncio.create_task(self.run())
        self.task.add_done_callback(self.died)

    def enqueue(self, ticket: Ticket) -> asyncio.Future[None]:
        """Queue a ticket; what comes back resolves with its turn, or fails with ApiError."""
        if self.closed:
            raise ApiError(*self.closed)
        fails, last = self.failures.get(ticket.model, (0, 0.0))
        if fails >= self.settings.swap_failure_limit:
            retry_in = math.ceil(last + self.settings.swap_failure_reset_ms / 1000 - clock())
            if retry_in > 0:
                log("warn", "failing fast: backend marked bad", id=ticket.id, model=ticket.model,
                    fails=fails)
                text = f"{fails} consecutive swap failures; retry in {retry_in} s"
                text = f'backend "{ticket.model}" is unavailable ({text})'
                raise ApiError(503, text, "backend_unavailable", retry_in)
            del self.failures[ticket.model]
        if ticket.granted is None:
            self.jano.telemetry.arrived(self, ticket.model)
        ticket.turn = asyncio.get_running_loop().create_future()
        ticket.swapping -= self.swapped_so_far()  # its grant adds that of then
        self.add(ticket)
        self.advance()
        return ticket.turn

    def leave(self, ticket: Ticket) -> None:
        """The turn is over, or the client has left the queue."""
        self.remove(ticket, clock())
        self.advance()

    def lost(self, ticket: Ticket) -> None:
        """The backend refused the connection, so its model is not loaded, whatever we thought."""
        if self.loaded == ticket.model:
            self.loaded = None
        self.leave(ticket)

    def wake(self, ticket: Ticket, error: ApiError | None = None) -> None:
        """Resolve its turn, or fail it."""
        # subtle: a client that has just left has cancelled its future, and its handler has yet to
        # run and leave; a bare set_result would kill the worker.
        if ticket.turn and not ticket.turn.done():
            if error:
                ticket.turn.set_exception(error)
            else:
                ticket.turn.set_result(None)

    def fail_waiting(self, model: str | None, *error: Any) -> None:
        """No turn will come for the tickets of this model (None: of any)."""
        for ticket in [t for queue in self.tiers for tickets in queue.values() for t in tickets]:
            if model in (None, ticket.model):
                self.remove(ticket, clock())
                self.wake(ticket, ApiError(*error))

    def close(self, *error: Any) -> None:
        """Take no ticket any more. A running script and the backends go on."""
        self.closed = error
        self.task.cancel()
        self.fail_waiting(None, *error)

    def died(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log("error", "worker died", group=self.group, error=kind_of(task.exception()))
            self.close(503, "jano has lost its worker; its log says why", "worker_died")

    def swapped_so_far(self) -> float:
        return self.swap_seconds + (clock() - self.swap_started if self.swapping else 0.0)

    def advance(self) -> None:
        """After a change: grant what can be granted, and leave the rest to run()."""
        if self.admit() != Decision() or self.settings.idle_unload_ms:
            self.changed.set()

    async def run(self) -> None:
        """Decide, act, wait for a change; for ever."""
        async with self.lock:
            loaded = await self.detect()
        if loaded:
            self.load(loaded, clock())
            self.jano.telemetry.detected(self, loaded)
        log("info", "worker started", group=self.group, loaded=loaded)
        while True:
            self.changed.clear()
            _, swap_to, until = self.admit()
            idle_until = self.unload_at()
            if swap_to and not self.in_flight:
                async with self.lock:
                    await self.swap(self.models[swap_to])
            elif idle_until is not None and clock() >= idle_until:
                async with self.lock:
                    await self.unload_idle()
            else:
                await self.wait_for_change(until or idle_until)

    def admit(self) -> Decision:
        """Grant all the turns that there are now; what remains to be done."""
        while ticket := (decision := decide(self, now := clock())).serve:
            self.grant(ticket, now)
            ticket.swapping += self.swapped_so_far()
            self.wake(ticket)
        self.draining_since = (self.draining_since or now) if decision.swap_to else None
        return decision

    async def wait_for_change(self, until: float | None) -> None:
        delay = 1e6 if until is None else until - clock()
        timer = asyncio.get_running_loop().call_later(delay, self.changed.set)
        await self.changed.wait()
        timer.cancel()

    def unload_at(self) -> float | None:
        """When the loaded model will have been idle for IDLE_UNLOAD_MS, if it stays so."""
        since = self.idle_since.get(self.loaded or "")
        if not self.settings.idle_unload_ms or since is None or self.depth():
            return None
        return max(since, self.loaded_at) + self.settings.idle_unload_ms / 1000

    # ------------------------------------------------------------------------------ swap ----

    async def swap(self, model: Model) -> None:
        """Make model the loaded one; where that fails, so do the tickets that wait for it."""
        previous, draining_since, failed = self.loaded, self.draining_since or clock(), None
        # From here on nobody may be sent to the old model, nor to a half-started new one.
        self.unload(clock())
        self.swapping, self.swap_started = model.name, clock()
        log("info", "swap requested", model=model.name, previous=previous)
        try:
            await self.bring_up(model, previous or "")
        except SwapFailed as error:
            failed = error
        finally:
            seconds = clock() - self.swap_started
            self.swap_seconds += seconds
            self.swapping = self.draining_since = None
        took = {"model": model.name, "ms": ms(seconds)}
        if failed and not failed.reason:
            log("info", "swap abandoned: nobody waits for it", **took)
            return
        self.jano.telemetry.swapped(previous, model.name, seconds, failed is None)
        if failed:
            fails = self.failures.get(model.name, (0, 0.0))[0] + 1
            self.failures[model.name] = (fails, clock())
            log("error", "swap failed", **took, fails=fails, err=failed.reason, **failed.details)
            text = f'swap to "{model.name}" failed: {failed.reason}'
            self.fail_waiting(model.name, 503, text, "swap_failed")
        else:
            self.failures.pop(model.name, None)
            self.load(model.name, clock(), clock() - draining_since)
            log("info", "swap ready", **took)

    async def bring_up(self, model: Model, previous: str) -> None:
        """Script and readiness, under one deadline. Raises SwapFailed; no reason: abandoned."""
        timeout = self.settings.swap_wait_timeout_ms / 1000
        with Script(self, model.name, previous) as script:
            ready = asyncio.create_task(self.wait_until_ready(model, script))
            ready.add_done_callback(lambda _: self.changed.set())
            try:
                while not ready.done():
                    if self.depth() and not self.depth(model.name):
                        raise SwapFailed("")
                    if clock() >= self.swap_started + timeout:
                        what = "the backend is not ready" if script.done() else "the script runs on"
                        raise SwapFailed(f"{what} after {timeout:g} s", stderr=script.last_line())
                    self.changed.clear()
                    await self.wait_for_change(self.swap_started + timeout)
                ready.result()
            except SwapFailed:
                ready.cancel()
                await script.stop()
                raise
            finally:  # when jano stops, too, and then the script goes on alone
                ready.cancel()

    async def wait_until_ready(self, model: Model, script: Script) -> None:
        if code := await script.wait():
            how = f"exited with code {code}" if code > 0 else f"was killed by signal {-code}"
            raise SwapFailed(f"the script {how}", stderr=script.last_line())
        longest, begin = self.settings.health_poll_interval_ms / 1000, clock()
        while not await self.probe(model):
            await asyncio.sleep(min(longest, max(0.02, 0.06 * (clock() - begin))))

    async def probe(self, model: Model) -> bool:
        """Whether the backend says that it is ready: 2xx on its health path."""
        get, limit = self.jano.session.get, aiohttp.ClientTimeout(total=2)
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
            for path in (model.health, "/v1/models"):  # Ollama has no /health
                async with get(model.url + path, allow_redirects=False, timeout=limit) as answer:
                    if answer.status != 404:
                        return answer.status // 100 == 2
        return False

    async def detect(self) -> str | None:
        """What is loaded already, as `SWAP_COMMAND status` says, or else the backends' health."""
        lines = {line.strip() for line in (await self.run_script("status", 5)).splitlines()}
        models = list(self.models.values())  # as a reload may change them while we ask
        for model in models:
            if f"{model.name}: loaded" in lines:
                return model.name
        urls = Counter(model.url for model in models)
        # Of two behind one address health cannot tell which, nor whether a vLLM sleeps.
        denied = {line.rpartition(":")[0] for line in lines}
        for model in models:
            if urls[model.url] == 1 and model.name not in denied and await self.probe(model):
                return model.name
        return None

    async def unload_idle(self) -> None:
        previous = self.loaded or ""
        self.unload(clock())
        self.jano.telemetry.last_arrived.pop(self.group, None)  # a naive proxy loads anew, too
        log("info", "unload requested", model=previous)
        limit = min(30, self.settings.swap_wait_timeout_ms / 1000)  # as whoever comes now waits
        await self.run_script("unload", limit, previous)

    async def run_script(self, argument: str, timeout: float, previous: str = "") -> str:
        """What the script prints, if it can be run."""
        with contextlib.suppress(SwapFailed), Script(self, argument, previous) as script:
            if code := await script.wait(timeout):
                log("warn", f"{argument} failed", group=self.group, code=code,
                    stderr=script.last_line())
            return script.output()
        return ""


class SwapFailed(Exception):
    """reason is fit for a client: no path, no output of the script. The details are for the log."""

    def __init__(self, reason: str, **details: str) -> None:
        self.reason, self.details = reason, details


class Script:
    """A run of SWAP_COMMAND: exec without a shell, its own session, output to files.

    Files: a server that the script leaves in the background would hold a pipe open. Its own
    session: Ctrl-C on jano must spare the backends. A thread waits for its end: asyncio's own
    subprocess kills its child when the loop closes, and a script must outlive a restart of jano.
    """

    def __init__(self, worker: Worker, argument: str, previous: str) -> None:
        """Raises SwapFailed if it cannot be started."""
        environ = dict(os.environ, JANO_PREVIOUS_MODEL=previous, JANO_GROUP=worker.group)
        environ.pop("JANO_API_KEY", None)
        try:
            self.stdout, self.stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                [*worker.settings.swap_command, argument], stdin=subprocess.DEVNULL,
                stdout=self.stdout, stderr=self.stderr, start_new_session=True, env=environ)
        except (OSError, ValueError) as error:  # ValueError: a name that the locale cannot spell
            raise SwapFailed("the script could not be started", error=why(error)) from None
        self.loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self.loop.create_future()
        threading.Thread(target=self._reap, daemon=True).start()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()

    def _reap(self) -> None:
        code = self.process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: jano has stopped
            self.loop.call_soon_threadsafe(self.exited.set_result, code)

    def done(self) -> bool:
        return self.exited.done()

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit code; after timeout seconds it is stopped."""
        await asyncio.wait({self.exited}, timeout=timeout)  # unlike await: never cancels the future
        await self.stop()
        return self.exited.result() if self.done() else -signal.SIGKILL

    async def stop(self) -> None:
        """If it runs still, terminate its process group; two seconds later kill what is left."""
        for number in () if self.done() else (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            await asyncio.wait({self.exited}, timeout=2)

    def output(self) -> str:
        return os.pread(self.stdout.fileno(), 2**16, 0).decode(errors="replace")

    def last_line(self) -> str:
        """Of stderr. pread, as a seek would move the place where the script writes next."""
        end = os.fstat(self.stderr.fileno()).st_size
        text = os.pread(self.stderr.fileno(), 2**12, max(0, end - 2**12)).decode(errors="replace")
        return (text.strip().splitlines() or [""])[-1][:300]

# -------------------------------------------------------------------------------- forward ----

# Hop by hop: RFC 9110, 7.6.1. Made anew: Host, Content-Length. Answered here: Expect.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding",
              "upgrade", "proxy-authenticate", "proxy-authorization"}
NOT_PASSED_ON = {"host", "content-length", "expect"}
NOT_INVENTED = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")  # as aiohttp would
INFLATED = {"gzip", "deflate", "br", "zstd"}  # request bodies that aiohttp's server unpacks
GIVEN = web.ResponseKey("GIVEN", set[str])  # a backend's header names; aiohttp's additions go
NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)  # no byte has left
BROKEN = (aiohttp.ClientError, asyncio.TimeoutError, HttpProcessingError, OSError, ValueError)


class ApiError(Exception):
    """An answer in the shape of OpenAI's errors; retry_after in seconds."""

    def __init__(self, status: int, text: str, code: str, retry_after: int | None = None,
                 param: str | None = None, **more: Any) -> None:
        super().__init__(text)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": text, "type": kind, "param": param, "code": code}
        self.status, self.payload = status, {"error": error, **more}
        self.headers = {} if retry_after is None else {"Retry-After": str(min(60, retry_after))}

    def response(self) -> web.Response:
        return web.json_response(self.payload, status=self.status, headers=self.headers)

    def event(self, anthropic: bool) -> bytes:
        """The same as a server-sent event, for a stream that has begun."""
        if not anthropic:
            return f"data: {json.dumps({'error': self.payload['error']})}\n\n".encode()
        kind = self.payload["error"].get("type") or "api_error"
        kind = "api_error" if kind == "server_error" else kind
        data = {"type": "error", "error": {**self.payload["error"], "type": kind}}
        return f"event: error\ndata: {json.dumps(data)}\n\n".encode()


@dataclass(eq=False, kw_only=True)
class Call(Ticket):
    """A ticket with its request: all that is known on the way from socket to socket."""

    jano: Jano
    request: web.Request
    to: Model
    worker: Worker | None  # None: passthrough
    body: bytes
    streaming: bool  # the client asked for server-sent events
    tail: Tail
    response: web.StreamResponse | None = None  # once it has begun
    first_byte: float | None = None
    failure: str = ""  # what went wrong, in jano's words

    @property
    def running(self) -> bool:
        return self.worker is None or self in self.worker.in_flight


async def forward(call: Call) -> web.StreamResponse:
    """Wait for the turn, then pass the answer on. Raises ApiError."""
    worker, tried = call.worker, False
    while True:
        if worker:
            await wait_for_turn(call, worker.enqueue(call))
            call.to = worker.models[call.model]  # a reload may have moved it meanwhile
        else:
            call.granted = clock()
        try:
            upstream = await open_upstream(call)
            break
        except NOT_SENT:
            if tried or not worker:
                text = f'backend "{call.model}" cannot be reached'
                raise ApiError(502, text, "backend_unreachable") from None
            tried = True
            worker.lost(call)
    try:
        return await relay(call, upstream)
    finally:  # unless the answer was whole, this closes the connection, so the backend stops
        upstream.close()


async def wait_for_turn(call: Call, turn: asyncio.Future[None]) -> None:
    """Await the turn. After HEARTBEAT_MS a streaming client gets its headers, and then comments,
    lines that every parser of server-sent events skips (HTML standard, 9.2.6)."""
    heartbeat = call.jano.settings.heartbeat_ms / 1000
    while call.streaming and heartbeat and not turn.done():
        await asyncio.wait({turn}, timeout=heartbeat)
        if turn.done():
            break
        if call.response is None:
            call.response = web.StreamResponse(headers={
                "Content-Type": "text/event-stream", "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no", "x-request-id": call.id})
            await call.response.prepare(call.request)
        await call.response.write(b": waiting\n\n")
    await turn


async def open_upstream(call: Call) -> aiohttp.ClientResponse:
    """The backend's answer, its body still to come. Raises ApiError, or one of NOT_SENT."""
    request, drop = call.request, NOT_PASSED_ON | call.jano.key_headers(call.request)
    if request.headers.get("Content-Encoding", "").lower() in INFLATED:
        drop.add("content-encoding")
    if call.response is not None:  # its headers are out and name no encoding
        drop.add("accept-encoding")
    # encoded=True: path and query in the client's own spelling.
    url = type(request.rel_url)(call.to.url + request.rel_url.raw_path_qs, encoded=True)
    try:
        return await call.jano.session.post(
            url, data=call.body if len(call.body) < 2**20 else io.BytesIO(call.body),
            headers=end_to_end(request.headers, drop), skip_auto_headers=NOT_INVENTED,
            allow_redirects=False)
    except NOT_SENT:
        raise
    except asyncio.TimeoutError:
        raise ApiError(504, f'backend "{call.model}" is silent', "backend_timeout") from None
    except BROKEN as error:  # the kind of it only: aiohttp's messages quote what the backend sent
        text = f'backend "{call.model}" died ({type(error).__name__})'
        raise ApiError(502, text, "backend_died") from None


class Answer(aiohttp.ClientResponse):
    """A backend's answer."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        await super().start(connection)
        # The next request may have this connection if the backend promises to keep it, and this is
        # a good answer of known length: after a refusal, a body that the backend has not read might
        # pass for a request, and llama-server closes after a stream whatever it has promised.
        if not self.ok or self.content_length is None or "Keep-Alive" not in self.headers:
            protocol.force_close()
            if self.content.is_eof():  # it is in the pool already
                protocol.close()
            elif (closed := protocol.closed) is not None:
                closed.add_done_callback(self.fail_reader)
        return self

    def fail_reader(self, closed: asyncio.Future[None]) -> None:
        """aiohttp closes a connection whose chunks cease to be HTTP, but wakes no reader."""
        # An answer without a length ends with its connection, but with a reset it has not ended.
        # (To look at the exception also keeps asyncio from complaining that nobody does.)
        cut = (not closed.cancelled() and closed.exception() is not None
               and self.content_length is None and "Transfer-Encoding" not in self.headers)
        if (cut or not self.content.is_eof()) and self.content.exception() is None:
            self.content.set_exception(aiohttp.ClientPayloadError())


def answer_head(call: Call, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    """The backend's status and headers, and jano's."""
    response = web.StreamResponse(status=upstream.status, reason=clean(upstream.reason or ""),
                                  headers=end_to_end(upstream.headers, set()))
    response[GIVEN] = {name.lower() for name in response.headers}
    response.headers.setdefault("x-request-id", call.id)
    waited = (call.granted or 0) - call.arrived
    timing = f"queue;dur={ms(waited)}, swap;dur={ms(call.swapping)}"
    response.headers.add("Server-Timing", timing)
    if upstream.content_type == "text/event-stream":
        response.headers["X-Accel-Buffering"] = "no"
    return response


async def relay(call: Call, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    """Pass the answer on as it comes; break the connection if the backend dies on the way."""
    response, status = call.response, upstream.status
    events = upstream.content_type == "text/event-stream"
    counted = events or upstream.content_type.endswith("json")
    if status < 200 or (response is not None and not (upstream.ok and events)):
        raise await refusal(call, upstream)
    if response is None:
        response = call.response = answer_head(call, upstream)
    left = 0 if status in (204, 304) else response.content_length  # None: until the backend ends
    if left == 0:
        call.jano.settle(call, status)
    # What has come along with the headers goes out along with them, in one packet.
    chunk = b"" if upstream.content.exception() else upstream.content.read_nowait()
    response._send_headers_immediately = not chunk
    await response.prepare(call.request)
    loop, patience = asyncio.get_running_loop(), call.jano.settings.request_timeout_ms / 1000
    while left != 0:
        try:
            chunk = chunk or await upstream.content.readany()
            if not chunk and (reset := upstream.content.exception()):
                raise reset
        except BROKEN as error:
            silent = isinstance(error, asyncio.TimeoutError)
            how = "fell silent" if silent else "died"
            call.failure = f'backend "{call.model}" {how} in the middle of an answer'
            call.jano.settle(call, 504 if silent else 502)
            abort(call.request)
            return response
        call.first_byte = call.first_byte or clock()
        if counted:
            call.tail.feed(chunk)
        left = left and left - len(chunk)
        if left == 0 or not chunk:
            call.jano.settle(call, status)
        # aiohttp's own timeout is for the backend; this one is for a client that does not read.
        cutoff = loop.call_later(patience, abort, call.request)
        try:
            await response.write(chunk)
        finally:  # or the timer would keep the request, with its body, of a client that has left
            cutoff.cancel()
        if not chunk:
            break
        chunk = b""
    return response


async def refusal(call: Call, upstream: aiohttp.ClientResponse) -> ApiError:
    """What a backend said instead of a stream, for a client whose 200 is out already."""
    text, body = f'backend "{call.model}" answered {upstream.status} and no stream', b""
    error = ApiError(502 if upstream.status < 400 else upstream.status, text, "backend_error")
    with contextlib.suppress(*BROKEN, ApiError):
        while len(body) < 2**16 and (chunk := await upstream.content.readany()):
            body += chunk
        if isinstance(found := parse_object(body).get("error"), dict):
            error.payload["error"] = found
    return error


def abort(request: web.Request) -> None:
    """Break the connection, so that nobody takes a cut answer for a whole one. With a reset: the
    plain end of a connection is how an HTTP/1.0 answer ends well."""
    if transport := request.transport:
        if client := transport.get_extra_info("socket"):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


def end_to_end(headers: Any, drop: set[str]) -> list[tuple[str, str]]:
    """What a proxy passes on, repeated headers included; drop names more, in lower case."""
    drop = drop | HOP_BY_HOP | words(",".join(headers.getall("Connection", ())))
    spelt: dict[str, str] = {}  # as at first: two spellings of a name would overwrite each other
    return [(spelt.setdefault(name.lower(), name), clean(value))
            for name, value in headers.items() if name.lower() not in drop]


def clean(text: str) -> str:
    """A header's value without what aiohttp's writer refuses: control characters, and the half
    surrogates that stand for bytes beyond UTF-8."""
    if text.isascii() and text.isprintable():
        return text
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return re.sub(r"[\0-\x08\x0a-\x1f\x7f]", "", text)

# ------------------------------------------------------------------------------ telemetry ----


def log(level: str, msg: str, **fields: object) -> None:
    """One compact JSON object a line, on stdout. Never a prompt, an answer, a header or a key."""
    line = {"t": utc(time.time()), "level": level, "msg": msg, **fields}
    # A full disk, a closed pipe, no stdout: serve on, and keep nothing that fails again at the end.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stdout.fileno(), f"{compact(line)}\n".encode())


compact = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would build one a line


def utc(epoch: float) -> str:
    text = datetime.fromtimestamp(epoch, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def ms(seconds: float) -> int:
    return round(seconds * 1000)


class Tail:
    """The first and last bytes of an answer, where its token counts stand.

    As OpenAI and Anthropic (usage), llama.cpp (timings) or Ollama (eval_count) report them. Not
    parsed, as most of the answer is gone by; but a quote within its text would be escaped, so what
    reads `"prompt_tokens": 1` is no part of that.
    """

    KEEP = 2**13  # bytes, at either end
    NUMBER = re.compile(
        rb'"((?:prompt|input|completion|output)_tokens|(?:prompt_)?eval_(?:count|duration)'
        rb'|(?:prompt|predicted)_(?:n|per_second))"\s*:\s*([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)')

    def __init__(self) -> None:
        self.head, self.tail = b"", b""

    def feed(self, chunk: bytes) -> None:
        if len(self.head) < self.KEEP:
            self.head += chunk[: self.KEEP]
        self.tail = (self.tail + chunk[-self.KEEP :])[-self.KEEP :]

    def tokens(self) -> tuple[int | None, int | None, float | None, float | None]:
        """Prompt tokens, generated tokens, each per second; None: the backend does not say."""
        found = {name.decode(): float(number)  # the last one counts, as streams add up
                 for name, number in self.NUMBER.findall(self.head + self.tail)
                 if float(number) < 1e15}

        def first(*names: str) -> int | None:
            return next((int(found[name]) for name in names if name in found), None)

        def rate(name: str, ollama: str) -> float | None:
            nanoseconds = found.get(f"{ollama}_duration")
            timed = found.get(f"{ollama}_count", 0) / nanoseconds * 1e9 if nanoseconds else None
            value = found.get(name, timed)
            return None if value is None else round(value, 1)

        return (first("prompt_tokens", "input_tokens", "prompt_eval_count", "prompt_n"),
                first("completion_tokens", "output_tokens", "eval_count", "predicted_n"),
                rate("prompt_per_second", "prompt_eval"), rate("predicted_per_second", "eval"))


class Telemetry:
    """What has happened since the start, in bounded memory however long that was."""

    BUCKETS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)  # seconds a swap takes

    def __init__(self, records_max: int) -> None:
        self.started = time.time()
        self.records: deque[dict[str, Any]] = deque(maxlen=records_max)  # of /usage, oldest first
        self.requests: Counter[tuple[str, int]] = Counter()  # by model and status
        self.tokens: Counter[str] = Counter()  # generated, by model
        self.prompt_tokens: Counter[str] = Counter()
        self.rates: dict[str, deque[float]] = {}  # "gen", "prompt" or a model's -> tokens a second
        self.finished: deque[float] = deque(maxlen=10_000)  # epoch seconds; so are the next two
        self.errors: deque[float] = deque(maxlen=10_000)
        self.swap_times: deque[float] = deque(maxlen=10_000)
        self.last_error: dict[str, Any] | None = None
        self.health: dict[str, str] = {}  # model -> "up" or "down", if known
        self.loaded_at: dict[str, str] = {}  # model -> when it was last loaded
        self.swaps: Counter[tuple[str, str]] = Counter()  # by from and to, the good ones
        self.swap_failures: Counter[str] = Counter()
        self.recent_swaps: deque[dict[str, Any]] = deque(maxlen=50)
        self.swap_buckets = [0] * (len(self.BUCKETS) + 1)
        self.swap_seconds = 0.0
        self.first_arrived: dict[str, str] = {}  # group -> model
        self.last_arrived: dict[str, str] = {}
        self.changes = 0  # of model in the order of arrival: what a naive proxy would swap

    def arrived(self, worker: Worker, model: str) -> None:
        self.first_arrived.setdefault(worker.group, model)
        self.changes += self.last_arrived.get(worker.group, worker.loaded) != model
        self.last_arrived[worker.group] = model

    def detected(self, worker: Worker, loaded: str) -> None:
        """loaded was so from the start, also when the first request came before we knew."""
        self.changes -= self.first_arrived.get(worker.group) == loaded
        self.health[loaded], self.loaded_at[loaded] = "up", utc(time.time())

    def settled(self, call: Call, status: int, now: float) -> None:
        """Count a request that is over; now is on the clock."""
        epoch, model, begin = time.time(), call.model, call.first_byte
        prompt, generated, prompt_rate, rate = call.tail.tokens()
        if rate is None and generated and call.streaming and begin and now - begin >= 0.05:
            rate = round(generated / (now - begin), 1)  # what took less came in one go
        self.records.append({
            "ts": utc(epoch), "id": call.id, "model": model, "path": call.request.path,
            "status": status, "queue_ms": ms((call.granted or now) - call.arrived),
            "total_ms": ms(now - call.arrived),
            "ttfb_ms": begin and ms(begin - (call.granted or 0)), "prompt_tokens": prompt,
            "gen_tokens": generated, "gen_tok_s": rate, "prompt_tok_s": prompt_rate})
        self.finished.append(epoch)
        self.requests[model, status] += 1
        if status >= 500:
            self.errors.append(epoch)
            text = call.failure or f"the backend answered {status}"
            self.last_error = {"ts": utc(epoch), "model": model, "message": text}
        if status in (502, 504):
            self.health[model] = "down"
        if 200 <= status < 300:
            self.health[model] = "up"
            self.tokens[model] += generated or 0
            self.prompt_tokens[model] += prompt or 0
            for name, value in (("gen", rate), ("prompt", prompt_rate), (f"of {model}", rate)):
                if value is not None:
                    self.rates.setdefault(name, deque(maxlen=30)).append(value)

    def swapped(self, previous: str | None, model: str, seconds: float, ok: bool) -> None:
        now = time.time()
        self.recent_swaps.append(
            {"ts": utc(now), "from": previous, "to": model, "ms": ms(seconds), "ok": ok})
        self.health.pop(previous or "", None)
        self.health[model] = "up" if ok else "down"
        if ok:
            self.loaded_at[model] = utc(now)
            self.swap_times.append(now)
            self.swaps[previous or "", model] += 1
            self.swap_seconds += seconds
            self.swap_buckets[bisect_left(self.BUCKETS, seconds)] += 1
        else:
            self.swap_failures[model] += 1

    def status(self, models: Iterable[str]) -> dict[str, Any]:
        """The half of /status that is history."""
        now, swaps = time.time(), self.swaps.total()
        took = [swap["ms"] for swap in self.recent_swaps if swap["ok"]]
        avoided = max(0, self.changes - swaps - self.swap_failures.total())
        served = Counter(dict.fromkeys(models, 0))
        for (model, status), count in self.requests.items():
            if 200 <= status < 300:
                served[model] += count

        def since(times: deque[float], seconds: int) -> int:
            return len(times) - bisect_left(times, now - seconds)

        def rate(name: str) -> float | None:
            rates = self.rates.get(name)
            return round(sum(rates) / len(rates), 1) if rates else None

        return {
            "lastSwapDurationMs": took[-1] if took else None,
            "recentSwaps": list(self.recent_swaps),
            "swapsLast15m": since(self.swap_times, 900),
            "swapsLastHour": since(self.swap_times, 3600),
            "swapsTotal": swaps, "swapsAvoided": avoided,
            "swapTimeSavedMs": ms(avoided * self.swap_seconds / swaps) if swaps else None,
            "recentGenTokS": rate("gen"), "recentPromptTokS": rate("prompt"),
            "tokSByModel": {model: rate(f"of {model}") for model in models
                            if f"of {model}" in self.rates},
            "uptimeSeconds": int(now - self.started),
            "requestsServedTotal": served.total(), "requestsByModel": served,
            "tokensGeneratedTotal": self.tokens.total(),
            "tokensByModel": {model: self.tokens[model] for model in models},
            "requestsPerMinute": since(self.finished, 60),
            "errorsLast15m": since(self.errors, 900), "lastError": self.last_error,
            "backendHealth": {model: self.health.get(model, "unknown") for model in models}}

    def metrics(self, status: dict[str, Any]) -> str:
        """status, and what it leaves out, as Prometheus text (exposition format 0.0.4)."""
        lines: list[str] = []

        def family(name: str, kind: str, text: str, samples: Mapping[Any, object]) -> None:
            """name has its labels' names behind it; samples: the labels' values -> the sample."""
            name, *labels = name.split()
            lines.extend([f"# HELP jano_{name} {text}", f"# TYPE jano_{name} {kind}"])
            for found, value in samples.items():
                # JSON escapes what this format does: names of models hold no control character.
                values = (json.dumps(str(each), ensure_ascii=False)
                          for each in (found if isinstance(found, tuple) else [found]))
                pairs = ",".join(map("=".join, zip(labels, values)))
                lines.append(f"jano_{name}{{{pairs}}} {value}" if pairs else f"jano_{name} {value}")

        health, saved = status["backendHealth"], status["swapTimeSavedMs"]
        loaded = [group["currentModel"] for group in status.get("groups", {"": status}).values()]
        family("uptime_seconds", "gauge", "Since the start.", {(): time.time() - self.started})
        family("in_flight", "gauge", "Requests at a backend.", {(): status["inFlight"]})
        family("model_loaded model", "gauge", "1: it owns its group's memory.",
               {model: int(model in loaded) for model in health})
        family("queue_depth model", "gauge", "Requests that wait.", status["queueByModel"])
        family("requests_total model status", "counter", "Finished requests; 499: the client left.",
               self.requests)
        family("tokens_generated_total model", "counter", "Tokens of answers.", self.tokens)
        family("prompt_tokens_total model", "counter", "Tokens of prompts.", self.prompt_tokens)
        family("generation_tokens_per_second model", "gauge", "Mean of the last 30 answers.",
               status["tokSByModel"])
        family("swaps_total from to", "counter", "Swaps made.", self.swaps)
        family("swap_failures_total model", "counter", "Swaps failed.", self.swap_failures)
        family("swaps_avoided", "gauge", "Changes of model as requests arrive, minus all swaps.",
               {(): status["swapsAvoided"]})
        family("swap_time_saved_seconds", "gauge", "Swaps avoided, times the mean swap's duration.",
               {} if saved is None else {(): saved / 1000})
        family("backend_up model", "gauge", "1: it was fine when last heard of.",
               {model: int(state == "up") for model, state in health.items()})
        family("swap_duration_seconds", "histogram", "From the script's start until ready.", {})
        for bound, count in zip((*self.BUCKETS, "+Inf"), accumulate(self.swap_buckets)):
            lines.append(f'jano_swap_duration_seconds_bucket{{le="{bound}"}} {count}')
        lines.append(f"jano_swap_duration_seconds_sum {self.swap_seconds}")
        lines.append(f"jano_swap_duration_seconds_count {sum(self.swap_buckets)}")
        return "\n".join(lines) + "\n"

# -------------------------------------------------------------------------- HTTP handlers ----


class Jano:
    """All the state: settings, models, a worker for each group, telemetry, who is being served."""

    def __init__(self, settings: Settings, session: aiohttp.ClientSession) -> None:
        self.settings, self.session = settings, session
        self.telemetry = Telemetry(settings.usage_records_max)
        self.models: dict[str, Model] = {}
        self.names: dict[str, Model] = {}  # names and aliases, without their case
        self.workers: dict[str, Worker] = {}  # by group
        self.calls: dict[Call, None] = {}  # waiting or in flight, oldest first
        self.tasks: set[asyncio.Task[Any]] = set()  # their handlers, until the last byte is out
        self.last_id = 0
        self.stopping = False
        self.origins = words(settings.jano_cors_origins)
        self.hosts: set[str] = set()  # whose names are known; empty: any

    def adopt(self, models: list[Model]) -> None:
        """Use these models from now on; queued tickets and what is loaded stay as they are."""
        for model in models:
            if not model.passthrough:
                if model.group not in self.workers:
                    self.workers[model.group] = Worker(model.group, self)
                worker = self.workers[model.group]
                worker.models[model.name] = model  # one gone from the file stays for its tickets
                worker.slots[model.name] = model.slots
        for worker in self.workers.values():
            worker.advance()
        self.models = {model.name: model for model in models}
        self.names = {name.casefold(): model
                      for model in models for name in (model.name, *model.aliases)}

    def worker_of(self, model: Model) -> Worker | None:
        """None for a passthrough model."""
        return None if model.passthrough else self.workers[model.group]

    def begin(self, call: Call) -> None:
        """From here on the request is known, and counted when settled. Or ApiError."""
        waiting = sum(worker.depth() for worker in self.workers.values())
        if self.stopping:
            raise ApiError(*SHUTTING_DOWN)
        if call.worker:
            held = sum(len(other.body) for other in self.calls)
            if waiting >= self.settings.max_queue or held > max(0, MAX_HELD - len(call.body)):
                text = f"the queue is full: {waiting} requests wait, with {held >> 20} MB"
                raise ApiError(503, text, "queue_full", 5)
            log("info", "enqueued", id=call.id, model=call.model)
        self.calls[call] = None
        if task := asyncio.current_task():
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def settle(self, call: Call, status: int) -> None:
        """The request is over: free its slot, count it; once, and before the client can tell."""
        if call not in self.calls:
            return
        del self.calls[call]
        now = clock()
        if worker := call.worker:
            worker.leave(call)
        self.telemetry.settled(call, status, now)
        told = {"id": call.id, "model": call.model, "status": status, "ms": ms(now - call.arrived)}
        if call.granted is not None:
            level = "error" if call.failure else "info"
            log(level, "served", **told, aborted=status == CLIENT_LEFT)
        elif status == CLIENT_LEFT:
            log("info", "client disconnected", **told)
        else:
            log("warn", "not served", **told, reason=call.failure)

    def status(self) -> dict[str, Any]:
        """The payload of /health and /status."""
        now, waiting = clock(), [call for call in self.calls if not call.running]
        queued = Counter(call.model for call in waiting)
        swapped = [model for model in self.models.values() if not model.passthrough]
        workers = {model.group: self.workers[model.group] for model in swapped}
        groups = {group: {
            "currentModel": worker.loaded,
            "currentModelLoadedAt": worker.loaded and self.telemetry.loaded_at[worker.loaded],
            "swapping": worker.swapping, "queueDepth": worker.depth(),
            "inFlight": len(worker.in_flight)} for group, worker in workers.items()}
        return {
            "ok": not any(worker.closed for worker in self.workers.values()),
            **next(iter(groups.values())),
            "queueDepth": len(waiting), "inFlight": len(self.calls) - len(waiting),
            "queueByModel": {model: queued[model] for model in self.models},
            "oldestWaitingMs": ms(now - waiting[0].arrived) if waiting else 0,
            **self.telemetry.status(self.models),
            "active": [{"id": call.id, "model": call.model,
                        "state": "running" if call.running else "waiting",
                        "queue_ms": ms((call.granted or now) - call.arrived),
                        "total_ms": ms(now - call.arrived)} for call in islice(self.calls, 200)],
            **({"groups": groups} if len(groups) > 1 else {})}

    def key_headers(self, request: web.Request) -> set[str]:
        """The headers that show JANO_API_KEY; they are for jano alone."""
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        found = {"authorization": bearer.strip() if scheme.lower() == "bearer" else "",
                 "x-api-key": request.headers.get("x-api-key", "")}
        key = self.settings.jano_api_key.encode("utf-8", "surrogateescape")
        return {name for name, value in found.items()
                if key and hmac.compare_digest(value.encode("utf-8", "surrogateescape"), key)}

    def may_ask(self, request: web.Request) -> bool:
        return not self.settings.jano_api_key or bool(self.key_headers(request))

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may read the answers (CORS)."""
        return bool({"*", origin.lower()} & self.origins)


JANO = web.AppKey("JANO", Jano)
CLIENT_LEFT = 499  # nginx's status for it
SHUTTING_DOWN = (503, "jano is shutting down", "shutting_down", 5)
TIERS = {"priority": PRIORITY, "flex": FLEX}
MAX_PARTS = 1000  # of a form
MAX_HELD = 2**30  # bytes of the bodies of all requests together; a lone one may be larger


async def serve(request: web.Request) -> web.StreamResponse:
    """POST anything: find the model, wait for its turn, pass the answer on."""
    jano = request.app[JANO]
    own = request.path in OWN_ROUTES or request.path.startswith("/v1/models/")
    if request.method in ("GET", "HEAD"):
        raise ApiError(404, f"there is no {shown(request.path)} here", "unknown_route")
    if request.method != "POST" or own:
        error = ApiError(405, f"{request.method} is not for this path", "method_not_allowed")
        error.headers["Allow"] = "GET, HEAD, OPTIONS" if own else "POST, OPTIONS"
        raise error
    call = await read_call(jano, request)
    jano.begin(call)
    try:
        return await forward(call)
    except ApiError as error:
        call.failure = str(error)
        jano.settle(call, error.status)
        if call.response is None:
            error.headers["x-request-id"] = call.id
            raise
        await call.response.write(error.event("anthropic-version" in request.headers))
        return call.response
    except (asyncio.CancelledError, ConnectionError):
        jano.settle(call, CLIENT_LEFT)
        abort(request)  # if it was our shutdown that cancelled, the answer must not look complete
        raise
    finally:
        jano.settle(call, 500)  # settled long since, unless jano itself is wrong


async def read_call(jano: Jano, request: web.Request) -> Call:
    """Read the body and find the model: in JSON, a form, ?model=, X-Model, else by `endpoints`."""
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        text = f"the body is larger than {jano.settings.max_body_mb} MB"
        raise ApiError(413, text, "body_too_large") from None
    except (web.RequestPayloadError, ValueError):
        raise ApiError(400, "the body is damaged", "invalid_body") from None
    fields: dict[str, Any] = {}
    found: dict[bytes, re.Match[bytes]] = {}
    name: object = None
    hint = request.query.get("model") or request.headers.get("X-Model")
    try:
        if request.content_type.startswith("multipart/"):
            name = await multipart_model(request, body)
        elif len(body) < LARGE:
            fields = parse_object(body)
        else:
            found = await members(body)
            fields = parse_object(b"{%b}" % b",".join(m[0] for m in found.values()))
    except ApiError:
        if not hint:
            raise
    name = fields.get("model", name)
    model = find_model(jano, hint if name is None else name, request.path)
    wanted = model.upstream_model if "model" in fields else ""
    if wanted and (member := (found or await members(body)).get(b"model")):
        body = body[: member.start(2)] + json.dumps(wanted).encode() + body[member.end(2) :]
    jano.last_id += 1
    tier = TIERS.get(str(fields.get("service_tier")), DEFAULT)
    # Ollama's own API, under /api/, streams lines of JSON, where an SSE comment would be an error.
    streaming = fields.get("stream") is True and not request.path.startswith("/api/")
    return Call(model=model.name, arrived=clock(), tier=tier, id=str(jano.last_id), jano=jano,
                request=request, to=model, worker=jano.worker_of(model), body=body,
                streaming=streaming, tail=Tail())


def find_model(jano: Jano, name: object, path: str) -> Model:
    """By its name or an alias; if there is no name, by the path. Raises ApiError 400."""
    if name is None:
        route = bare(path)
        model = next((m for m in jano.models.values() if route in map(bare, m.endpoints)), None)
    else:
        model = jano.names.get(name.casefold()) if isinstance(name, str) else None
    if model is None:
        accepted = [name for model in jano.models.values() for name in (model.name, *model.aliases)]
        text = "no model is named" if name is None else f"unknown model {shown(name)}"
        text += f"; accepted: {', '.join(accepted)}"
        raise ApiError(400, text, "model_not_found", param="model", accepted=accepted)
    return model


def bare(route: str) -> str:
    """As the example in `endpoints` has it, however it is written there."""
    return f"/{route.strip('/')}".removeprefix("/v1/").strip("/")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in body; bytes beyond UTF-8, or a BOM, are no fault. Raises ApiError 400."""
    try:
        value = json.loads(body.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", "invalid_json")
    return value


LARGE = 2**20  # bytes of a JSON body that is looked through, instead of parsed
BRACKET = re.compile(rb'["{}\[\]]')
MEMBER = re.compile(
    rb'"(model|stream|service_tier)"\s{0,99}:\s{0,99}("(?:[^"\\]|\\.){0,999}"|\w{1,99})')


async def members(body: bytes) -> dict[bytes, re.Match[bytes]]:
    """Where the members that matter here stand in a JSON object. A large body is not parsed, as the
    parser would hold up everybody for seconds and make a gigabyte of 50 MB; what else is wrong with
    one, its backend says. Raises ApiError 400."""
    found: dict[bytes, re.Match[bytes]] = {}
    step, at, depth, quoted = 0, 0, 0, False
    while at < len(body):
        if (step := step + 1) % 4096 == 0:  # some milliseconds
            await asyncio.sleep(0)
        if quoted:  # on to the next quote; it ends the text unless it is escaped
            if (end := body.find(b'"', at)) < 0:
                break
            piece, at = body[max(at, end - 2**16) : end], end + 1
            quoted = (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1
        elif token := BRACKET.search(body, at, at + 1024):
            at, quoted = token.end(), token[0] == b'"'
            if quoted and depth == 1 and (member := MEMBER.match(body, token.start())):
                found[member[1]] = member
            depth += {b'"': 0, b"{": 1, b"[": 1}.get(token[0], -1)
            if depth <= 0:
                break
        else:
            at += 1024
    if quoted or depth or body[at:].strip():
        raise ApiError(400, "the body is not JSON", "invalid_json")
    return found


async def multipart_model(request: web.Request, body: bytes) -> str | None:
    """The `model` of a multipart form, None if it has none. Raises ApiError 400."""
    loop, found = asyncio.get_running_loop(), []
    content = aiohttp.StreamReader(BaseProtocol(loop), len(body) + 1, loop=loop)
    content.feed_data(body)
    content.feed_eof()
    first = body.lstrip(b"\r\n")[:80].partition(b"\r\n")[0].decode("latin-1")
    named = re.search(r'boundary="?([^";]+)', request.headers["Content-Type"], re.IGNORECASE)
    try:
        if named is None or first.rstrip("- ") != f"--{named[1]}".rstrip("- "):
            raise ValueError  # lines before the form take the parser a second a megabyte
        reader = aiohttp.MultipartReader(request.headers, content)
        for _ in range(MAX_PARTS):
            part = await reader.next()
            if isinstance(part, aiohttp.MultipartReader):
                raise ValueError  # a form within the form would not be bounded
            if part is not None and part.name == "model":
                found.append((await part.read()).decode())
        if len(found) > 1 or not reader.at_eof():
            raise ValueError
    except (ValueError, AssertionError, RuntimeError, HttpProcessingError):
        text = f"the body is not one whole form, of up to {MAX_PARTS} parts, with one model"
        raise ApiError(400, text, "invalid_form", param="model") from None
    return found[0] if found else None


async def get_status(request: web.Request) -> web.Response:
    jano = request.app[JANO]
    status = jano.status()
    told = status if jano.may_ask(request) else {"ok": status["ok"]}
    return web.json_response(told, status=200 if status["ok"] else 503)


async def get_models(request: web.Request) -> web.Response:
    """The models, or the one named in the path, in the shapes of OpenAI's API reference."""
    jano, name = request.app[JANO], request.match_info.get("id")

    def entry(model: Model) -> dict[str, Any]:
        worker = jano.worker_of(model)
        loading = worker is not None and worker.swapping == model.name
        loaded = worker is None or worker.loaded == model.name
        state = "loading" if loading else "loaded" if loaded else "unloaded"
        return {"id": model.name, "object": "model", "created": int(jano.telemetry.started),
                "owned_by": "jano", "label": model.label or model.name, "aliases": model.aliases,
                "status": state, "metadata": model.metadata or {}}

    if name is None:
        data = [entry(model) for model in jano.models.values()]
        return web.json_response({"object": "list", "data": data})
    if (model := jano.names.get(name.casefold())) is None:
        raise ApiError(404, f"unknown model {shown(name)}", "model_not_found", param="model")
    return web.json_response(entry(model))


async def get_usage(request: web.Request) -> web.Response:
    """The latest requests, newest first, ?limit= of them."""
    limit = request.query.get("limit", "50")
    if not re.fullmatch("[0-9]{1,9}", limit):
        raise ApiError(400, "limit is not a whole number", "invalid_limit", param="limit")
    records = list(islice(reversed(request.app[JANO].telemetry.records), int(limit)))
    return web.json_response({"count": len(records), "records": records})


async def get_metrics(request: web.Request) -> web.Response:
    jano = request.app[JANO]
    text = jano.telemetry.metrics(jano.status())
    return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4"})


async def get_page(_: web.Request) -> web.Response:
    return web.Response(text=PAGE, headers=PAGE_HEADERS)


OWN_ROUTES = {"/health": get_status, "/status": get_status, "/v1/models": get_models,
              "/v1/models/{id:.+}": get_models, "/models": get_models, "/usage": get_usage,
              "/metrics": get_metrics, "/": get_page}


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who may ask at all; and every error in OpenAI's shape."""
    jano, headers = request.app[JANO], request.headers
    host, origin = headers.get("Host"), headers.get("Origin")
    own = f"http://{host}".lower(), f"https://{host}".lower()
    try:
        if jano.hosts and host is not None and host_name(host) not in jano.hosts:
            # DNS rebinding: a web page's own name that points at 127.0.0.1 now.
            raise ApiError(403, "unknown Host, see JANO_ALLOWED_HOSTS", "host_not_allowed")
        if origin is not None and origin.lower() not in own and not jano.allows(origin):
            raise ApiError(403, "unknown Origin, see JANO_CORS_ORIGINS", "origin_not_allowed")
        if request.method == "OPTIONS":
            asked = clean(headers.get("Access-Control-Request-Headers", "*"))
            return web.Response(status=204, headers={
                "Allow": "GET, HEAD, POST, OPTIONS", "Access-Control-Allow-Headers": asked,
                "Access-Control-Allow-Methods": "GET, HEAD, POST", "Access-Control-Max-Age": "600"})
        if not jano.may_ask(request) and request.path not in ("/", "/health"):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPException as error:
        return ApiError(error.status, error.reason, "http_error").response()


def host_name(host: str) -> str:
    """A Host header without its port, and an IPv6 address without its brackets."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::[0-9]*)?", host.lower())
    return (found[1] or found[2]) if found else ""


async def expect(request: web.Request) -> None:
    """curl sends `Expect: 100-continue` by itself; other expectations may be ignored (RFC 9110)."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer proper has not begun


async def finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    """When any response's headers go out: CORS, and nothing but a Date added to a backend's."""
    origin, headers = request.headers.get("Origin"), response.headers
    if (given := response.get(GIVEN)) is not None:
        for name in {"server", "content-type"} - given:
            headers.pop(name, None)
    else:
        headers["Server"] = f"jano/{__version__}"
    if origin is not None and request.app[JANO].allows(origin):
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = "x-request-id, Server-Timing, Retry-After"
        headers.add("Vary", "Origin")


class Connection(web.RequestHandler):
    """aiohttp's HTTP; but its own errors come in OpenAI's shape, and quote no client in the log."""

    def handle_error(self, request: web.BaseRequest, status: int = 500,
                     exc: BaseException | None = None, message: str | None = None) -> web.Response:
        if request.writer.output_size > 0:  # too late for an answer
            raise ConnectionError
        if status < 500:
            log("warn", "bad request", error=kind_of(exc))
            error = ApiError(status, "this is not valid HTTP", "invalid_http")
            if isinstance(exc, ContentEncodingError):  # br or zstd, without their packages
                error = ApiError(status, "send the body as gzip, deflate or plain", "invalid_body")
            response = error.response()
        else:
            log("error", "handler failed", error=kind_of(exc))
            response = ApiError(status, "jano failed; its log says where", "bug").response()
        response.force_close()
        return response


def kind_of(error: BaseException | None) -> str:
    """An exception's type and place. Not its message, which may quote a client or a backend."""
    frames = traceback.extract_tb(error.__traceback__)[-1:] if error else []
    return " ".join([type(error).__name__, *(f"at {f.name}:{f.lineno}" for f in frames)])

# --------------------------------------------------------------------------- app and main ----


def make_app(settings: Settings, models: list[Model]) -> web.Application:
    app = web.Application(middlewares=[guard], client_max_size=settings.max_body_mb * 2**20)

    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        silence = settings.request_timeout_ms / 1000
        async with aiohttp.ClientSession(
            # Kept for less time than any backend keeps it: one might close it just as we use it.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=0.5), response_class=Answer,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence),
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
        ) as session:
            app[JANO] = Jano(settings, session)
            app[JANO].adopt(models)
            yield

    app.cleanup_ctx.append(lifespan)
    app.on_response_prepare.append(finish_headers)
    for path, handler in OWN_ROUTES.items():
        app.router.add_get(path, handler, expect_handler=expect)
    app.router.add_route("*", "/{path:(?s:.*)}", serve, expect_handler=expect)
    return app


async def run(settings: Settings, models: list[Model],
              meanwhile: Callable[[int], Awaitable[None]] | None = None) -> int:
    """Serve until a signal; meanwhile(port) runs beside it. The exit code."""
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(
        make_app(settings, models), handler_cancellation=True, shutdown_timeout=0.1)
    try:  # the port first: a second jano shall not even call `SWAP_COMMAND status`
        listener = await loop.create_server(
            lambda: Connection(runner.server, loop=loop, access_log=None),  # type: ignore[arg-type]
            settings.jano_host, settings.jano_port, backlog=1024, start_serving=False)
    except (OSError, UnicodeError) as error:
        return await explain_port(settings, error)
    await runner.setup()
    jano, stop = runner.app[JANO], asyncio.Event()
    # Not by the name: 0x7f.1, 0:0:0:0:0:0:0:1 and often the machine's own are loopback, too.
    addresses = {str(listening.getsockname()[0]) for listening in listener.sockets}
    if all(address == "::1" or address.startswith("127.") for address in addresses):
        allowed = map(host_name, words(settings.jano_allowed_hosts))
        jano.hosts = {settings.jano_host.lower(), *LOOPBACK, *addresses, *allowed} - {""}

    def on_signal(number: signal.Signals) -> None:
        log("info", "received signal", sig=number.name)
        if number == signal.SIGHUP:
            reload(jano)
        elif stop.is_set():
            os._exit(1)
        else:
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal, number)
    await listener.start_serving()
    port = listener.sockets[0].getsockname()[1]
    log("info", "jano listening", host=settings.jano_host, port=port, models=list(jano.models))
    if not (jano.hosts or settings.jano_api_key):
        log("warn", "everybody who reaches this host may ask: JANO_API_KEY is not set")
    beside = asyncio.ensure_future(meanwhile(port)) if meanwhile else None

    await stop.wait()
    listener.close()
    await drain(jano)
    if beside:
        beside.cancel()
    status = jano.status()
    await runner.cleanup()
    log("info", "jano stopped", served=status["requestsServedTotal"], swaps=status["swapsTotal"],
        swapsAvoided=status["swapsAvoided"], swapTimeSavedMs=status["swapTimeSavedMs"])
    return 0


async def drain(jano: Jano) -> None:
    """Fail the queued, take no more, and give what is in flight SHUTDOWN_TIMEOUT_MS to finish."""
    jano.stopping = True
    for worker in jano.workers.values():
        worker.close(*SHUTTING_DOWN)
    if jano.tasks:
        await asyncio.wait(jano.tasks, timeout=jano.settings.shutdown_timeout_ms / 1000)


def reload(jano: Jano) -> None:
    """SIGHUP: read models.json again; one with faults changes nothing."""
    try:
        jano.adopt(load_models(jano.settings))
    except ConfigError as error:
        log("error", "models not reloaded", faults=str(error).splitlines())
    else:
        log("info", "models reloaded", models=list(jano.models))


async def explain_port(settings: Settings, error: Exception) -> int:
    """0 if another jano has the port: cron starts one every minute. Else 1."""
    host = settings.jano_host  # 0.0.0.0 and :: reach this machine, too
    place = f"[{host}]:{settings.jano_port}" if ":" in host else f"{host}:{settings.jano_port}"
    with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
        limit = aiohttp.ClientTimeout(total=5)
        async with aiohttp.request("GET", f"http://{place}/health", timeout=limit) as answer:
            if answer.headers.get("Server", "").startswith("jano/"):
                log("info", "another jano answers already", address=place)
                return 0
    print(f"jano: cannot listen on {place}: {why(error)}; no jano answers there", file=sys.stderr)
    return 1


class LibraryLog(logging.Handler):
    """The complaints of aiohttp and asyncio, without the bytes that they quote."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # What a client sends that has been refused, or odd headers of a form, is no complaint.
        if not isinstance(error, web.RequestPayloadError) and record.name != "aiohttp.internal":
            log("warn", "complaint of a library", library=record.name, error=kind_of(error))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="One OpenAI-compatible front door for local models that share one memory.",
        epilog="Settings: the environment or ./.env, and models.json; the README lists them.")
    parser.add_argument("--check", action="store_true", help="check the configuration, then exit")
    parser.add_argument("--demo", action="store_true", help="show the idea, with toy models")
    parser.add_argument("--version", action="version", version=f"jano {__version__}")
    options = parser.parse_args()
    if sys.platform == "win32":
        print("jano: Windows lacks process groups and SIGHUP; run it in WSL", file=sys.stderr)
        return 1
    while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:  # started with >&-: a socket must not
        pass  # get the number of a standard stream
    os.close(unused)
    logging.basicConfig(handlers=[LibraryLog()], level=logging.WARNING)
    for kind in (aiohttp.BadContentDispositionHeader, aiohttp.BadContentDispositionParam):
        warnings.simplefilter("ignore", kind)  # they quote what clients send
    if options.demo:
        return demo()
    try:
        settings = load_settings(os.environ, Path.cwd())
        models = load_models(settings)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        print(f"jano: the configuration is fine: {len(models)} models")
        return 0
    return run_loop(run(settings, models))


def run_loop(work: Coroutine[Any, Any, int]) -> int:
    """On uvloop, if that happens to be installed."""
    import resource  # which Windows lacks

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 10_240 if hard == resource.RLIM_INFINITY else min(10_240, hard)
    if 0 <= soft < enough:  # a Mac's 256 would be gone before MAX_QUEUE is reached
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    try:
        import uvloop  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return asyncio.run(work)
    return int(uvloop.run(work))

# ----------------------------------------------------------------------------------- page ----

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>jano</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --ink: light-dark(#1b1c20, #ececef); --dim: light-dark(
  #5a5d66, #a6a9b2); --card: light-dark(#fff, #1b1c20); --bad: light-dark(#b3261e, #ff8f86) }
* { box-sizing: border-box; margin: 0; padding: 0; overflow-wrap: anywhere;
  --hue: light-dark(oklch(49% .12 var(--h)), oklch(79% .1 var(--h))) } .on { fill: var(--card) }
.h0 { --h: 255 } .h1 { --h: 55 } .h2, #saved { --h: 160 } .h3 { --h: 310 } .h4 { --h: 105 }
body { max-width: 68rem; margin: auto; padding: 1rem; font: 15px/1.45 system-ui, sans-serif;
  color: var(--ink); background: light-dark(#f5f5f2, #131417) } pre { white-space: pre-wrap }
h1, h2 { font-size: 1rem; margin-top: .8rem } #saved { color: var(--hue) } rect { rx: 2px }
ul, ol { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; list-style: none }
header p, ul b { display: block; font-size: 1.8rem; font-weight: 600; line-height: 1.3 }
li, pre, input, button { padding: .2rem .6rem; font-size: 1rem } ul li { flex: 1 1 8rem }
ul li, svg, pre { background: var(--card); border: 1px solid #8884; border-radius: 8px }
ol li { background: var(--hue); color: var(--card); border-radius: 6px } .held { opacity: .14 }
.turn::before { content: "▶" / ""; position: absolute; translate: -1.8rem; color: var(--dim) }
.turn { margin-left: 1.3rem } .wait { fill: none; stroke: var(--hue) } .end { text-anchor: end }
svg { display: block; width: 100%; margin: .5rem 0; font-size: 12px; fill: var(--ink) }
text:not(.on) { paint-order: stroke; stroke: var(--card) } .run, .held { fill: var(--hue) }
.dim { fill: var(--dim); color: var(--dim) } .swap { stroke: #8888; stroke-dasharray: 1 3 }
.bad, .lost { fill: none; stroke: var(--bad); stroke-dasharray: 3 } #fault { color: var(--bad) }
</style><header><h1>jano</h1><p id="loaded" aria-live="polite">…</p><p id="saved"></p></header>
<main><p class="dim">One model fits in memory. What is asked of it is answered first; only then
is another swapped in.</p><p id="fault" role="alert"></p><form id="door" hidden><label for="key">
API key</label> <input id="key" type="password" size="14" pattern="[ -~]+" autocomplete="off">
<button>Show</button></form><div id="view" hidden><ul id="tiles"></ul><section id="idle">
<h2>Nothing has been asked yet. Try:</h2><pre id="hint"></pre></section><section id="order">
<h2>Changes of model ▶ as asked: <b id="asked-turns"></b></h2><ol id="asked"></ol>
<h2>Changes of model ▶ as answered: <b id="answered-turns"></b></h2><ol id="answered"></ol>
</section><h2>Timeline</h2><svg id="chart" role="img"><g></g><g></g></svg><p class="dim">Each bar is
a request: hollow = waiting, solid = being answered, dashed ✕ = failed. Stripe = swap, tint =
loaded. <span id="quiet"></span></p></div></main><script type="module">
const $ = id => document.getElementById(id), [under, over] = $("chart").children;
let key = sessionStorage.getItem("jano-key") ?? "", skew = 0, view = 0, begun = new Map();
function add(parent, tag, set, text = "") {                 // text stays text, whoever wrote it
  const node = parent.appendChild(document.createElementNS(parent.namespaceURI, tag));
  for (const name in set) node.setAttribute(name, set[name]); return node.append(text), node; }
const box = (g, css, x, y, width, height) => add(g, "rect", {class: css, x, y, width, height});
const write = (text, css, x, y) => add(over, "text", {class: css, x, y}, text);
const say = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
const span = ms => ms < 99500 ? (ms / 1e3).toFixed(1) + " s" : ms < 6e6 ?
  Math.round(ms / 6e4) + " min" : Math.round(ms / 36e5) + " h";
const short = (name, most = 12) => String.fromCodePoint(0x2068) + ([...name].length > most
  ? [...name].slice(0, most - 1).join("") + "…" : name) + String.fromCodePoint(0x2069);
function show(s, {records}, at) {                             // all times in epoch milliseconds
  const swaps = s.recentSwaps, bars = new Map(), now = new Map(), quiet = [], e = s.lastError;
  for (const w of swaps) w.end = Date.parse(w.ts), w.start = w.end - w.ms;
  for (const b of [...s.active, ...records]) {         // who is in both has finished in between
    b.end = b.ts ? Date.parse(b.ts) : Infinity, b.start = Math.min(b.end, at) - b.total_ms;
    b.turn = b.state === "waiting" ? b.end : Math.min(b.end, b.start + b.queue_ms);
    b.bad = b.status >= 400, b.label = (b.bad ? "✕" : "") + b.id, bars.set(b.id, b); }
  for (const [name, {currentModel, swapping: to}] of Object.entries(s.groups ?? {"": s})) {
    const was = begun.get(name) ?? {}, from = currentModel ?? (to && (was.to ?? was.from));
    if (!to || was.to !== to) begun.set(name, {from, to, start: at, end: Infinity, ok: true});
    if (to) swaps.push(begun.get(name));             // begun: group -> its swap, as first seen
    now.set(to ?? currentModel, to ? "being swapped in" : "loaded"); }
  const all = [...bars.values()].sort((a, b) => a.id - b.id);
  const recent = all.slice(0, all.findLastIndex(b => b.turn < b.end) + 7).slice(-12);
  const names = [...new Set([...Object.keys(s.backendHealth), ...all.map(b => b.model)])];
  const hue = m => "h" + names.indexOf(m) % 5, queued = new Map(Object.entries(s.queueByModel));
  const head = [...now].map(([m, is]) => `${short(m ?? "nothing", 40)} is ${is}`).join(", ");
  $("chart").ariaLabel = document.title = `${head} · ${s.queueDepth} waiting — jano`;
  const saved = s.swapTimeSavedMs ? `, about ${span(s.swapTimeSavedMs)} saved` : "";
  say("saved", `Swaps avoided: ${s.swapsAvoided}${saved}`);
  say("loaded", head), under.replaceChildren(), over.replaceChildren();
  const lists = ["tiles", "asked", "answered"].map(id => $(id).cloneNode());
  for (const [value, name] of [[s.swapsTotal, "swaps made"], [s.queueDepth, "waiting"],
    [s.inFlight, "in flight"], [s.recentGenTokS ?? "–", "tokens per second"],
    [s.requestsServedTotal, "answered"], [s.errorsLast15m, "failed in 15 min"]])
    add(add(lists[0], "li", {}), "b", {}, value).after(name);
  say("hint", `curl ${location.origin}/v1/chat/completions --json '{"model": "${names.find(m =>
    /^[-.:A-Za-z0-9_]+$/.test(m)) ?? "…"}", "messages": [{"role": "user", "content": "Hi"}]}'`);
  const li = ul => ({model, label}, i, order) => add(ul, "li", {class: hue(model) +
    (i && model !== order[i - 1].model ? " turn" : "")}, `${label} ${short(model)}`);
  $("order").hidden = !($("idle").hidden = all.length > 0), recent.forEach(li(lists[1]));
  recent.filter(b => b.turn < b.end).sort((a, b) => a.turn - b.turn).forEach(li(lists[2]));
  for (const ul of lists) if (!ul.isEqualNode($(ul.id))) $(ul.id).replaceWith(ul);
  for (const ul of lists.slice(1)) say(ul.id + "-turns", "" + ul.querySelectorAll(".turn").length);
  const to = all[0] ? Math.min(at, Math.max(...[...all, ...swaps].map(b => b.end)) + 1e3) : at;
  const need = Math.max(1e4, ...all.map(b => b.end > to - 1e4 && to - b.start));
  view = view < need || view > need * 3 ? need * 1.2 : view;     // ms on show; the last: to
  const end = $("chart").clientWidth - 24, px = end / view;
  const x = t => Math.max(-9, end + Math.min((t - to) * px, 0)); let y = 20, edge = 0;
  for (const m of names) {
    const mine = all.filter(b => b.model === m && x(b.end) > 0), rows = [], n = queued.get(m);
    if (names[8] && !now.has(m) && !mine.length) { quiet.push(" " + short(m, 30)); continue; }
    for (const b of mine)                                         // its row: the first free one
      rows[b.row = [...rows, 0].findIndex(free => free < b.start)] = b.end + 30 / px;
    const tall = Math.max(3, Math.min(18, 300 / rows.length)), top = y;
    y += 26 + tall * Math.max(rows.length, names[4] ? 1 : 3);
    if (now.get(m) === "loaded") box(under, hue(m) + " held", 0, top, end + 24, y - top);
    add(write(short(m, 30), "", 8, top + 15), "tspan", {class: "dim", dx: 8},
      [now.get(m), n && n + " waiting"].filter(Boolean).join(", "));
    for (const b of mine) {
      const x0 = x(b.start), x2 = Math.max(x(b.end), x0 + 2), x1 = b.bad ? x2 : x(b.turn);
      const spot = Math.max(x1 < x2 ? x1 : x0, 0), fits = x2 - spot > 8 * b.label.length;
      const row = top + 22 + b.row * tall, ink = fits && x1 < x2 ? "on" : "";
      box(over, b.bad ? "bad" : hue(m) + " wait", x0, row, x1 - x0, tall * .8);
      box(over, hue(m) + " run", x1, row, x2 - x1, tall * .8);
      if (tall > 11) write(b.label, ink, (fits ? spot : x2) + 3, row + 12); } }
  for (const w of swaps) {
    const x0 = x(w.start), x1 = x(w.end), mid = (x0 + x1) / 2, css = w.ok ? "swap" : "lost";
    const took = (w.ok ? "" : "✕ ") + span(Math.min(w.end, at) - w.start);
    const full = `${short(w.from ?? "–")} → ${short(w.to ?? "–")} ${took}`;
    add(under, "path", {class: css, "stroke-width": x1 - x0 + 2, d: `M${mid} 18V${y}`});
    write([full, took].find(t => t.length * 7 < x1 - edge) ?? "", "end", edge = x1, 13); }
  for (const t of [to, to - view / 2])
    write(t < at ? span(at - t) + " ago" : "now", "dim end", x(t), y + 14);
  $("chart").setAttribute("height", y + 22), say("quiet", (quiet[0] ? `Quiet:${quiet}. ` : "") +
    (e ? `Last failure: ${short(e.model)}, ${short(e.message, 200)}.` : "")); }
$("door").onsubmit = e => { e.preventDefault(), key = $("key").value, $("door").hidden = true };
for (;; await new Promise(wake => setTimeout(wake, 1000))) try {
  if (document.hidden || !$("door").hidden) continue;
  const ask = path => fetch(path, {signal: AbortSignal.timeout(5000), headers: key ?
    {Authorization: "Bearer " + key} : {}}).then(a => a.ok ? a : Promise.reject(a));
  const status = await ask("status"), usage = await ask("usage?limit=200");
  const off = Date.parse(usage.headers.get("Date")) + 500 - Date.now();     // of whole seconds
  if (Math.abs(off - skew) > 2000) skew = off;              // skew: jano's clock minus ours, ms
  $("view").hidden = false, sessionStorage.setItem("jano-key", key), say("fault", "");
  show(await status.json(), await usage.json(), Date.now() + skew); } catch ({status}) {
  if (status !== 401) { say("fault", document.title = "Jano unreachable, retrying"); continue; }
  say("fault", key && "That is not the key."), key = "";
  $("view").hidden = true, $("door").hidden = false, $("door").reset(), $("key").focus(); }
</script>
"""


SCRIPT = 'script type="module"'


def csp_hash(tag: str) -> str:
    """The source expression for the page's one style or script (CSP Level 3, 2.3.1)."""
    text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag.split()[0]}>")[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    f"script-src {csp_hash(SCRIPT)}; style-src {csp_hash('style')}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}

# ----------------------------------------------------------------------------------- demo ----

BURST = ["1.chat", "2.code", "3.chat", "4.chat", "5.code", "6.code"]
TOY_BACKEND = """import http.server, sys, time
class Toy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"timings": {"predicted_n": 60, "predicted_per_second": 60}}')
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(1)  # to answer
        self.do_GET()
time.sleep(2)  # to load
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Toy).serve_forever()
"""
TOY_SWAP = """#!/bin/sh
cd "$(dirname "$0")"
if [ $1 = status ]; then exec cat loaded; fi
if [ -e pid ]; then kill $(cat pid); rm pid loaded; fi
if [ $1 = unload ]; then exit; fi
PYTHON toy.py $(cat $1.port) >/dev/null 2>&1 & echo $! >pid
echo "$1: loaded" >loaded
"""


def demo() -> int:
    """Toy backends as real processes, a real swap script, the burst at the real port."""
    with tempfile.TemporaryDirectory(prefix="jano demo ") as name:
        folder, screen, models = Path(name), sys.stdout, []
        for model in ("chat", "code"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            (folder / f"{model}.port").write_text(str(port))
            models.append({"name": model, "url": f"http://127.0.0.1:{port}"})
        (folder / "models.json").write_text(json.dumps({"models": models}))
        (folder / "toy.py").write_text(TOY_BACKEND)
        swap = folder / "swap.sh"
        swap.write_text(TOY_SWAP.replace("PYTHON", shlex.quote(sys.executable)))
        swap.chmod(0o700)
        settings = load_settings({"SWAP_COMMAND": str(swap), "JANO_PORT": "0"}, folder)
        print("Two toy models share one memory: chat is loaded, a swap takes two seconds.")
        subprocess.run([swap, "chat"], check=True)
        time.sleep(2.5)  # until it is ready
        try:
            with open(folder / "log", "w") as file, contextlib.redirect_stdout(file):
                work = run(settings, load_models(settings), lambda port: burst(port, screen))
                return run_loop(work)
        finally:
            subprocess.run([swap, "unload"], check=False)


async def burst(port: int, screen: TextIO) -> None:
    """Fire the six requests, then print who was served when."""
    url = f"http://127.0.0.1:{port}"

    def row(steps: list[str]) -> str:
        """The steps, with a mark wherever the model changes."""
        models = ["chat", *(step[2:] for step in steps)]
        return "".join(("  " if models[i] == models[i + 1] else "  ▶ swap ▶  ") + step
                       for i, step in enumerate(steps))

    async def ask(number: int, step: str) -> None:
        await asyncio.sleep(number / 10)
        async with session.post("/v1/chat/completions", json={"model": step[2:]}) as answer:
            await answer.read()
        served.append(step)
        print(f"  {clock() - begin:4.1f} s  {step} answered", file=screen, flush=True)

    print(f"Six requests at {url}:  {'  '.join(BURST)}\n", file=screen, flush=True)
    served: list[str] = []
    begin = clock()
    async with aiohttp.ClientSession(url, raise_for_status=True) as session:
        await asyncio.gather(*(ask(number, step) for number, step in enumerate(BURST)))
        async with session.get("/status") as answer:
            status = await answer.json()
    made, saved = status["swapsTotal"], status["swapsAvoided"]
    print(f"\nA naive proxy, in order of arrival: {made + saved} swaps\n{row(BURST)}\n"
          f"Jano: {made} swap{'s' * (made != 1)}\n{row(served)}\n\n"
          f"The same as a picture: {url}/   Ctrl-C ends the demo.", file=screen, flush=True)


if __name__ == "__main__":
    sys.exit(main())
