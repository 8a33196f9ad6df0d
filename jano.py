#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14,<4"]
# ///
"""Jano: one OpenAI-compatible front door for local models that do not fit in memory together.

    clients ──POST──▶ queue ──turn──▶ the loaded model's backend ──answer──▶ clients
                        └─ policy: time to change? ──▶ SWAP_COMMAND <model>, wait until ready

The worker grants, the handler forwards: a request's handler puts a ticket into its group's queue,
awaits its turn and forwards. Each group has one worker, which alone changes what is loaded.

model        an entry of models.json           turn         a ticket's permission to forward; a
backend      the server behind a model                      set's is its time as the loaded one
loaded       what owns the memory now          in flight    tickets' turns not yet finished
group        models that share one memory      drain        admit nothing, await what is in flight
set          models that are loaded together   swap         drain, run the script, await readiness
ticket       a request's place in the queue    passthrough  a resident model: no queue, no swap

The swap contract: `SWAP_COMMAND <name>` makes that model or set the live one and exits 0, also if
it is live already. Optional: `status` prints lines `<model>: loaded` or `<model>: dead`; `unload`
frees the memory. Its environment has JANO_PREVIOUS_MODEL (what was loaded; empty for `status`),
JANO_GROUP, and JANO_RESTART=1 if a backend seems to be up and does not answer: stop it first.

Reading order: policy, worker, swap, forward, front door, config, telemetry, page, app and main.
Times are seconds, unless the name ends in _ms; they are on `clock`, but for those that people read.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import errno
import functools
import hmac
import json
import logging
import math
import os
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from hashlib import sha256
from html import escape
from itertools import chain, islice
from operator import attrgetter, itemgetter
from pathlib import Path
from time import monotonic as clock
from typing import IO, Any, NamedTuple, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit

import aiohttp
from aiohttp import web
from aiohttp.http import HttpProcessingError, HttpResponseParser, RawResponseMessage
from aiohttp.http_exceptions import ContentEncodingError, LineTooLong

if sys.platform == "win32":
    sys.exit("jano: Windows lacks process groups and SIGHUP; run it in WSL")
VERSIONS = sys.version_info[:2], tuple(map(int, aiohttp.__version__.split(".")[:2]))
if VERSIONS[0] < (3, 11) or VERSIONS[1] < (3, 14):
    sys.exit(f"jano: found Python and aiohttp {VERSIONS}, expected 3.11 and 3.14 or later")

__version__ = "2.0.0"

# -------------------------------------------------------------------------------- policy ----

PRIORITY, DEFAULT, FLEX = range(3)  # tiers, by the request's service_tier; the lowest goes first
MEMORY = 60.0  # seconds, at most, for which a set keeps its place when its clients have left
ANTICIPATION = 0.5  # seconds, at most, that an idle set stays without LINGER_MS
PATIENCE = 8.0  # a set's patience, as a multiple of the waits in its last turn: `note_unloaded`


@dataclass(eq=False)
class Ticket:
    """One request's place in the queue."""

    model: str
    arrived: float
    tier: int = DEFAULT
    granted: float | None = None  # when its turn began; on arrival: it had one already, in vain
    admitted: asyncio.Future[None] | None = None  # what its handler awaits
    swap_wait: float = 0.0  # seconds of its wait that went into swaps
    id: str = ""  # in the log, and x-request-id


def take_next(queue: list[Ticket], loaded: Collection[str]) -> Ticket | None:
    """The oldest ticket for a loaded model, else the oldest of all, else None."""
    for ticket in queue:
        if ticket.model in loaded:
            return ticket
    return queue[0] if queue else None


class Decision(NamedTuple):
    """Grant this ticket; or swap, once drained; or wait for an event, at most until then."""

    serve: Ticket | None = None
    swap_to: str | None = None
    until: float | None = None


class Schedule:
    """What the policy looks at, for one group of models. No I/O; the clock is passed in.

    What is loaded, waits and has turns is a set (a model without one is its own); queues are of
    models.
    """

    def __init__(self, max_turn: float, linger: float) -> None:
        self.max_turn = max_turn  # MAX_TURN_MS; 0 is plain greed
        self.linger = linger  # LINGER_MS
        self.slots: dict[str, int] = {}  # model -> how many of its tickets may be in flight
        self.set_of: dict[str, str] = {}  # model -> its set, or else its own name
        # Tier and model -> its tickets, oldest first: an ordered set, which any can leave at once.
        self.queues: dict[tuple[int, str], OrderedDict[Ticket, None]] = defaultdict(OrderedDict)
        self.in_flight: set[Ticket] = set()
        self.loaded: str | None = None  # the set that owns the memory
        self.loaded_at = 0.0
        self.longest_wait = 0.0  # since loaded_at, of a ticket of the loaded set
        self.cost: dict[str, float] = {}  # set -> seconds from "admit no more" to ready
        self.waiting_since: dict[str, float] = {}  # set -> when its wait began; see MEMORY
        self.patient_until: dict[str, float] = {}  # set -> until when another's turn may go on
        self.idle_since: dict[str, float] = {}  # set -> since when nothing of it waits or runs
        self.pauses: dict[str, deque[float]] = {}  # set -> its last two idle times that ended
        self.decision = Decision()  # what remains to be done
        self.draining_since: float | None = None  # when admission stopped, for the swap that is due

    def arrive(self, ticket: Ticket, now: float) -> None:
        """A ticket comes. One that was granted a turn already, in vain, goes to the front."""
        name = self.set_of[ticket.model]
        queue = self.queues[ticket.tier, ticket.model]
        queue[ticket] = None
        queue.move_to_end(ticket, last=ticket.granted is None)
        if name in self.idle_since:  # the first ticket after a pause
            idle_since = self.idle_since.pop(name)
            if ticket.granted is None:
                self.pauses.setdefault(name, deque(maxlen=2)).append(now - idle_since)
            had_waited = idle_since - self.waiting_since.get(name, idle_since)
            if now - idle_since > min(had_waited, MEMORY):  # too late: a new wait begins
                self.waiting_since.pop(name, None)
        if name != self.loaded:
            self.waiting_since.setdefault(name, now)

    def leave(self, ticket: Ticket, now: float) -> None:
        """Its turn is over, or its client has left the queue; twice does no harm."""
        self.in_flight.discard(ticket)
        self.queues[ticket.tier, ticket.model].pop(ticket, None)
        name = self.set_of[ticket.model]
        running = [self.set_of[other.model] for other in self.in_flight]
        if name not in running and not any(self.waiting(name)):
            self.idle_since.setdefault(name, now)

    def note_unloaded(self, now: float) -> None:
        """Nothing is loaded any more: a swap begins, the memory is freed, a backend is gone."""
        if self.loaded is None:
            return
        # Its patience: for as long as its own tickets queued here, or it made others wait, if less.
        others = [ticket for ticket in self.heads() if self.set_of[ticket.model] != self.loaded]
        made_wait = now - min(map(self.waits_since, others), default=now)
        self.patient_until[self.loaded] = now + PATIENCE * min(made_wait, self.longest_wait)
        if any(self.waiting(self.loaded)):
            self.waiting_since[self.loaded] = now
        self.loaded = None

    def note_loaded(self, name: str, now: float, cost: float | None = None) -> None:
        """This set is ready; cost is the time from "admit no more", None if nobody measured."""
        self.loaded, self.loaded_at, self.longest_wait = name, now, 0.0
        self.waiting_since.pop(name, None)
        self.draining_since = None
        if cost is not None:  # the last one counts half
            self.cost[name] = (self.cost.get(name, cost) + cost) / 2
        if not any(self.waiting(name)):
            self.idle_since.setdefault(name, now)

    def advance(self, now: float) -> list[Ticket]:
        """Grant every turn that there is now; `decision` is what remains to be done."""
        granted = []
        self.decision = Decision()
        while any(self.queues.values()):
            self.decision = decide(self, now)
            ticket = self.decision.serve
            if ticket is None:
                break
            del self.queues[ticket.tier, ticket.model][ticket]
            self.in_flight.add(ticket)
            ticket.granted = now
            self.longest_wait = max(self.longest_wait, now - max(ticket.arrived, self.loaded_at))
            granted.append(ticket)
        if self.decision.swap_to is None:
            self.draining_since = None
        elif self.draining_since is None or self.loaded is None:
            self.draining_since = now
        return granted

    def waiting(self, name: str | None = None) -> Iterator[Ticket]:
        """The tickets that wait: for one set, or all."""
        for (_, model), queue in self.queues.items():
            if name in (None, self.set_of[model]):
                yield from queue

    def heads(self) -> list[Ticket]:
        """The oldest ticket of each model that waits in the most urgent tier, oldest first."""
        heads = [next(iter(queue)) for queue in self.queues.values() if queue]
        heads.sort(key=attrgetter("tier", "arrived"))
        return [ticket for ticket in heads if ticket.tier == heads[0].tier]

    def waits_since(self, ticket: Ticket) -> float:
        """Since when its set waits to be loaded."""
        return self.waiting_since.get(self.set_of[ticket.model], ticket.arrived)

    def patience(self, ticket: Ticket) -> float:
        """Seconds for which its set lets another's turn go on, if they exceed MAX_TURN_MS."""
        return self.patient_until.get(self.set_of[ticket.model], 0.0) - self.waits_since(ticket)


def decide(schedule: Schedule, now: float) -> Decision:
    """What to do now: serve the loaded set until its turn ends, then swap. It changes nothing."""
    queue, slots = schedule.heads(), schedule.slots
    favoured = [head for head in queue if schedule.set_of[head.model] == schedule.loaded]
    others = [head for head in queue if schedule.set_of[head.model] != schedule.loaded]
    running = [ticket.model for ticket in schedule.in_flight]
    ready = [head.model for head in favoured if running.count(head.model) < slots[head.model]]
    first = take_next(queue, ready)
    go_on = Decision(first if ready else None)  # None: all slots are taken
    if first is None or not others:
        return go_on
    if not schedule.max_turn:  # plain greed: no swap while the loaded set has tickets
        return go_on if favoured else Decision(swap_to=schedule.set_of[first.model])
    return serve_or_swap(schedule, favoured, others, go_on, now)


def serve_or_swap(
    schedule: Schedule, favoured: list[Ticket], others: list[Ticket], go_on: Decision, now: float
) -> Decision:
    """What to do while other sets wait; the next set is the one that has waited longest.

    A turn is limited only while another set waits: to MAX_TURN_MS and two round trips (loading the
    next set, and this one again), or slow loads would take most of the time. With long queues even
    that means too many swaps: so tickets that arrived before the turn's end are served after it,
    too, until the patience of the least patient waiting set is used up.

    What is idle stays for ANTICIPATION, or a twentieth of a round trip if that is less: a program
    may send a small request to another model just before its main one. If one of the last two
    pauses was at most LINGER_MS, the client will probably be back: then it stays for LINGER_MS, but
    the next set waits no longer than the round trip that leaving would cost.
    """
    # A wait begins anew when a set is unloaded; else one with a long queue would always be next.
    head = min(others, key=schedule.waits_since)
    name, loaded = schedule.set_of[head.model], schedule.loaded
    swap = Decision(swap_to=name)
    if loaded is None:
        return swap
    contested_since = max(schedule.loaded_at, schedule.waits_since(head))
    trip = schedule.cost.get(loaded, 0.0) + schedule.cost.get(name, 0.0)  # there and back
    begins = contested_since + 2 * trip  # MAX_TURN_MS counts from here
    ends = begins + schedule.max_turn
    if favoured and favoured[0].arrived < ends:
        ends = max(ends, begins + min(map(schedule.patience, others)))
    if now >= ends or (head.tier == PRIORITY and not favoured):
        return swap
    if favoured or schedule.in_flight:
        return go_on
    until = head.arrived + min(ANTICIPATION, trip / 20)
    if min(schedule.pauses.get(loaded, ()), default=math.inf) <= schedule.linger:
        lingering = schedule.idle_since.get(loaded, 0.0) + schedule.linger
        until = max(until, min(lingering, contested_since + trip))
    return Decision(until=until) if now < until else swap


# ---------------------------------------------------------------------------------- worker ----


class SwapFailed(Exception):
    """Why, fit for a client: no path, no output of the script. details are for the log."""

    def __init__(self, text: str, **details: Any) -> None:
        super().__init__(text)
        self.details = details


class Worker:
    """One group's owner: it grants the turns, and it alone changes what is loaded.

    Every event calls `advance`, which grants at once what can be granted. `run` does what takes
    time. It and `unload` hold the lock: two runs of SWAP_COMMAND would fight for the memory.
    """

    def __init__(self, group: str, jano: Jano) -> None:
        self.group = group
        self.jano = jano
        self.settings = jano.settings
        self.schedule = Schedule(self.settings.max_turn, self.settings.linger)
        self.models: dict[str, Model] = {}  # one gone from the file stays, for its tickets
        self.lock = asyncio.Lock()
        self.due = asyncio.Event()  # wakes `run`: a swap, a health check or an unload is to do
        self.drained = asyncio.Event()  # `unload` clears it, and awaits that nothing is in flight
        self.holds: set[str] = set()  # why no turn is granted now: "check", "unload"
        self.timer: asyncio.TimerHandle | None = None  # of the next `advance`
        self.unload_at = math.inf  # when what is loaded will have been idle for IDLE_UNLOAD_MS
        self.unloaded_at = 0.0  # when `unload` last freed the memory
        self.swapping: str | None = None  # what is being loaded
        self.swap_began = 0.0
        self.naive_loaded: str | None = None  # what a proxy without a queue would have loaded now
        self.naive_swaps = 0  # and how often it would have swapped
        self.stage = ("", "")  # what to report if the deadline passes now, and its detail
        self.deadline: asyncio.Timeout | None = None  # of the swap, if it may be abandoned
        self.abandoned: set[str] = set()  # sets whose last swap was abandoned; the next goes on
        self.restart: set[str] = set()  # sets to load with JANO_RESTART=1
        self.failures: dict[str, tuple[int, float]] = {}  # set -> failures in a row, when the last
        self.refusal: Callable[[], ApiError] | None = None  # makes the error, once it is closed
        self.task = asyncio.create_task(self.run())
        self.task.add_done_callback(self.died)

    def adopt(self, model: Model) -> None:
        """Use this entry from now on, for what waits already, too."""
        self.models[model.name] = model
        self.schedule.slots[model.name] = model.slots
        self.schedule.set_of[model.name] = model.set_name

    def members(self, name: str | None) -> list[Model]:
        """A set's models that models.json still has; if it has none of them, the old ones."""
        members = [each for each in self.models.values() if each.set_name == name]
        known = [each for each in members if self.jano.models.get(each.name) is each]
        return known or members

    @contextlib.asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncIterator[None]:
        """Queued, then granted; given back on the way out, however it ends. Raises ApiError."""
        if self.refusal:
            raise self.refusal()
        name = self.schedule.set_of[ticket.model]
        fails, last = self.failures.get(name, (0, 0.0))
        seconds = math.ceil(last + self.settings.swap_failure_reset - clock()) if fails else 0
        # After each pause, as many tries again.
        if seconds > 0 and fails % self.settings.swap_failure_limit == 0:
            facts = {"id": ticket.id, "model": name, "fails": fails, "retry_in_s": seconds}
            log("warn", "failing fast: backend marked bad", **facts)
            text = f'"{name}" failed to load {fails} times in a row; next try in {seconds} s'
            raise ApiError(503, text, "backend_unavailable", NO_RETRY)
        if ticket.granted is None:
            self.naive_swaps += name != self.naive_loaded
            self.naive_loaded = name
        ticket.admitted = asyncio.get_running_loop().create_future()
        self.schedule.arrive(ticket, clock())
        try:
            self.advance()
            await ticket.admitted
            yield
        except BackendError:
            self.backend_failed(ticket.model)
            raise
        finally:
            self.schedule.leave(ticket, clock())
            self.advance()

    def advance(self) -> None:
        """After any change: grant the turns that there are now, and note what is left to do."""
        now, schedule = clock(), self.schedule
        if not self.holds:  # else no turn begins, and the decision stays as it was
            for ticket in schedule.advance(now):
                if ticket.admitted and not ticket.admitted.done():  # done: its client has just left
                    ticket.admitted.set_result(None)
        waiting = any(schedule.queues.values())
        in_vain = self.swapping and waiting and not any(schedule.waiting(self.swapping))
        if in_vain and self.deadline and not self.deadline.expired():
            self.deadline.reschedule(0)  # expires at once: only others wait
        self.unload_at = math.inf
        if self.settings.idle_unload and schedule.loaded and not (schedule.in_flight or waiting):
            since = schedule.idle_since.get(schedule.loaded, 0.0)
            self.unload_at = max(since, schedule.loaded_at) + self.settings.idle_unload
        if not schedule.in_flight:
            self.drained.set()
            if schedule.decision.swap_to or "check" in self.holds or now >= self.unload_at:
                self.due.set()
        if self.timer:
            self.timer.cancel()
        wake_at = min(schedule.decision.until or math.inf, self.unload_at)
        if now < wake_at < math.inf:
            self.timer = asyncio.get_running_loop().call_later(wake_at - now, self.advance)

    async def run(self) -> None:
        """Find out what is loaded; then do what is due, for ever."""
        async with self.lock:
            await self.detect()
        while True:
            self.advance()
            await self.due.wait()
            self.due.clear()
            if clock() >= self.unload_at:
                with contextlib.suppress(ApiError):  # which is in the log
                    await self.unload()
            async with self.lock:
                name, swap_to = self.schedule.loaded, self.schedule.decision.swap_to
                if "check" in self.holds:
                    timeout = min(PROBE_TIMEOUT, self.settings.request_timeout)
                    fault = await first_fault(self.members(name), timeout)
                    if name and fault:
                        if self.schedule.in_flight:  # they may keep it busy: ask again after them
                            continue
                        self.schedule.note_unloaded(clock())
                        self.restart.add(name)
                        log("warn", "backend is gone", model=name, err=fault)
                    self.holds.discard("check")
                elif swap_to and not self.schedule.in_flight:
                    await self.swap(swap_to)

    async def detect(self) -> None:
        """Take as loaded the first set whose models are all likely to run, and all healthy.

        Likely are those that `status` names; if it fails, those whose address no other model has.
        """
        urls = Counter(model.url for model in self.models.values())
        likely = [model.name for model in self.models.values() if urls[model.url] == 1]
        try:
            with Script(self, "status") as asked:
                await asked.succeed(STATUS_TIMEOUT)
                likely = [each.name for each in asked.names([*self.models.values()], "loaded")]
        except SwapFailed as error:
            log("info", "status failed", group=self.group, err=str(error), **error.details)
        for name in dict.fromkeys(self.schedule.set_of.values()):
            members = self.members(name)
            all_likely = all(model.name in likely for model in members)
            if members and all_likely and await first_fault(members, PROBE_TIMEOUT) is None:
                self.schedule.note_loaded(name, clock())
                self.jano.telemetry.load_times[name] = utc(time.time())
                self.jano.telemetry.note_health(members, "up")
                # A proxy without a queue would have found it, too, and swapped once at most.
                self.naive_loaded = self.naive_loaded or name
                self.naive_swaps = int(self.naive_loaded != name)
                break
        log("info", "worker started", group=self.group, loaded=self.schedule.loaded)

    def backend_failed(self, model: str) -> None:
        """A request failed, or was answered 5xx: no turn is granted until its health was asked."""
        if self.schedule.set_of[model] == self.schedule.loaded:
            self.holds.add("check")
            self.due.set()

    async def swap(self, name: str) -> None:
        """Load this set; if that fails, the tickets that wait for it fail, too."""
        previous = self.schedule.loaded
        draining_since = self.schedule.draining_since or clock()
        # From here on nobody may be sent to the old model, nor to a half-started new one.
        self.schedule.note_unloaded(clock())
        self.swapping, self.swap_began = name, clock()
        self.jano.telemetry.note_health(self.members(previous), "unknown")
        log("info", "swap requested", model=name, previous=previous)
        failure = None
        try:
            await self.bring_up(name, previous)
        except SwapFailed as error:
            failure = error
        finally:
            self.swapping = self.deadline = None
        now = clock()
        seconds = now - self.swap_began
        for ticket in self.schedule.waiting():
            ticket.swap_wait += now - max(self.swap_began, ticket.arrived)
        facts = {"model": name, "ms": round(1000 * seconds)}
        if name in self.abandoned:
            log("info", "swap abandoned: nobody waits for it", **facts)
            return
        self.jano.telemetry.swapped(self, previous, name, seconds, ok=failure is None)
        if failure is None:
            self.failures.pop(name, None)
            self.restart.discard(name)
            self.schedule.note_loaded(name, now, now - draining_since)
            log("info", "swap ready", **facts)
            return
        fails = self.failures.get(name, (0, 0.0))[0] + 1
        self.failures[name] = (fails, now)
        if fails > 1:  # after one failure a slow load may still go on; after two, it hangs
            self.restart.add(name)
        log("error", "swap failed", **facts, fails=fails, err=str(failure), **failure.details)
        text = f'swap to "{name}" failed: {failure}'
        refusal = functools.partial(ApiError, 503, text, "swap_failed", NO_RETRY)
        self.fail(self.schedule.waiting(name), refusal)

    async def bring_up(self, name: str, previous: str | None) -> None:
        """Script and readiness, under one deadline. Raises SwapFailed."""
        goes_on = name in self.abandoned  # or clients with short time-outs would stop all swaps
        self.abandoned.discard(name)
        timeout = self.settings.swap_wait_timeout
        with Script(self, name, previous) as script:
            try:
                async with asyncio.timeout(timeout) as deadline:
                    self.deadline = None if goes_on else deadline
                    await wait_until_ready(self, name, script)
            except TimeoutError:
                if deadline.when() == 0:  # set by `advance`: nobody waits for this swap
                    self.abandoned.add(name)
                stage, detail = self.stage
                text = f"{stage} after {timeout:g} s{detail}"
                failure = SwapFailed(text, stderr=script.last_line())
                await script.stop()  # not if jano stops: then it goes on alone
                raise failure from None

    async def unload(self) -> str | None:
        """Drain, then run SWAP_COMMAND unload. Returns what was loaded. Raises ApiError."""
        asked = clock()
        async with self.lock:
            if self.unloaded_at > asked:  # meanwhile, for somebody else
                return None
            self.holds.add("unload")  # from now on turns end, and none begins
            self.drained.clear()
            try:
                self.advance()
                await self.drained.wait()
                if self.refusal:  # jano stops, and the script of a swap may still run
                    raise self.refusal()
                previous = self.schedule.loaded
                self.schedule.note_unloaded(clock())
                self.naive_loaded = None  # any other proxy has to load anew, too
                self.jano.telemetry.note_health(self.members(previous), "unknown")
                log("info", "unload requested", model=previous)
                with Script(self, "unload", previous) as script:
                    await script.succeed(min(UNLOAD_TIMEOUT, self.settings.swap_wait_timeout))
                self.unloaded_at = clock()
                return previous
            except SwapFailed as error:
                log("warn", "unload failed", group=self.group, err=str(error), **error.details)
                raise ApiError(503, f"unload failed: {error}", "unload_failed", NO_RETRY) from None
            finally:
                self.holds.discard("unload")
                self.advance()

    def fail(self, tickets: Iterator[Ticket], refusal: Callable[[], ApiError]) -> None:
        """No turn will come here for these tickets, which wait."""
        for ticket in [*tickets]:
            self.schedule.leave(ticket, clock())
            if ticket.admitted and not ticket.admitted.done():
                ticket.admitted.set_exception(refusal())

    def close(self, refusal: Callable[[], ApiError]) -> None:
        """Take no ticket any more. A script that runs, and the backends, go on."""
        self.refusal = refusal
        self.task.cancel()
        self.fail(self.schedule.waiting(), refusal)

    def died(self, task: asyncio.Task[None]) -> None:
        """The worker's coroutine has ended. Only `close` may do that."""
        if not task.cancelled():
            log("error", "worker died", group=self.group, error=kind_of(task.exception()))
            text = "jano has lost its worker; its log says why"
            self.close(lambda: ApiError(503, text, "worker_died", NO_RETRY))


# ------------------------------------------------------------------------------------ swap ----

PROBE_TIMEOUT = 5.0  # seconds that a health check may take; more once a backend loads for longer
STATUS_TIMEOUT, UNLOAD_TIMEOUT = 5.0, 30.0  # seconds that `status` and `unload` may take
STATUS_INTERVAL = 2.0  # seconds between two looks whether a loading server lives


async def wait_until_ready(worker: Worker, name: str, script: Script) -> None:
    """Wait for the script, then for the whole set. Raises SwapFailed."""
    worker.stage = ("the script runs on", "")
    await script.succeed()
    members = worker.members(name)
    if not members:  # a reload has renamed the set, so nobody waits for it
        return
    worker.stage = ("the backend is not ready", f" (GET {members[0].health}: no answer)")
    began = clock()
    death = asyncio.create_task(first_death(worker, members, script))
    try:
        while True:
            waited = clock() - began
            fault = await first_fault(members, max(PROBE_TIMEOUT, waited))
            if fault is None:
                return
            worker.stage = ("the backend is not ready", f" ({fault})")
            pause = min(worker.settings.health_poll_interval, max(0.02, 0.06 * waited))
            await asyncio.wait({death}, timeout=pause)
            if death.done():
                raise death.result()
    finally:
        death.cancel()
        await asyncio.wait({death})  # no script may run beside the next one


async def first_death(worker: Worker, members: list[Model], script: Script) -> SwapFailed:
    """Ask `status` until one of their servers has ended while it was loading; returns why."""
    alive: list[Model] = []  # whom `status` has named as loaded, the last time
    interval = STATUS_INTERVAL / 4  # many a server dies soon
    while True:
        await asyncio.sleep(interval)
        try:
            with Script(worker, "status") as asked:
                try:
                    await asked.succeed(STATUS_TIMEOUT)
                finally:  # also cancelled, as the backend is ready: leave no script behind
                    await asked.stop(grace=0)
                loaded = asked.names(members, "loaded")
                for model in asked.names(members, "dead") + alive:
                    if model not in loaded:
                        text = f'the server of "{model.name}" ended while it was loading'
                        return SwapFailed(text, stderr=asked.last_line() or script.last_line())
            alive, interval = loaded, STATUS_INTERVAL
        except SwapFailed as error:  # it says nothing of the servers
            knows_no_status = not alive and error.details.get("code", 0) > 0
            interval = math.inf if knows_no_status else STATUS_INTERVAL


async def first_fault(models: list[Model], timeout: float) -> str | None:
    """Why these backends are not all ready, such as "GET /health: 503"; None if they are.

    Ready is who answers 2xx on its health path, or on /v1/models if it has none, like Ollama.
    """
    limit = aiohttp.ClientTimeout(total=timeout)
    for model in models:
        options = {"headers": model.headers, "timeout": limit, "allow_redirects": False, **LIMITS}
        for path in (model.health, "/v1/models"):
            try:
                async with aiohttp.request("GET", model.url.geturl() + path, **options) as answer:
                    fault = "" if answer.status // 100 == 2 else str(answer.status)
            except TimeoutError:
                fault = f"no answer within {timeout:g} s"
            # RuntimeError: no thread is left to look up a name.
            except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
                fault = why(error)
            if fault != "404":  # else it has no such path
                break
        if fault:
            return f"GET {path}: {fault}"
    return None


class Script(contextlib.ExitStack[None]):
    """A run of SWAP_COMMAND: exec without a shell, its own session, output to named files.

    A server that it leaves in the background would hold a pipe open, and a file's name says whose
    output it holds. In a session of their own, the servers are spared by Ctrl-C on jano. A thread
    waits for the script's end, because asyncio's subprocess kills its child when the loop closes,
    and a script must outlive a restart of jano.
    """

    def __init__(self, worker: Worker, argument: str, previous: str | None = None) -> None:
        """Starts it. Raises SwapFailed if that cannot be done."""
        super().__init__()
        environ = dict(os.environ, JANO_PREVIOUS_MODEL=previous or "", JANO_GROUP=worker.group)
        environ.pop("JANO_API_KEY", None)
        if argument in worker.restart:
            environ["JANO_RESTART"] = "1"
        try:
            self.stdout = self.enter_context(output_file(worker, argument, "out"))
            self.stderr = self.enter_context(output_file(worker, argument, "err"))
            self.process = subprocess.Popen(
                [*worker.settings.swap_command, argument],
                stdin=subprocess.DEVNULL,
                stdout=self.stdout,
                stderr=self.stderr,
                start_new_session=True,
                env=environ,
            )
            self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._reap, daemon=True).start()
        # ValueError: a name that the locale cannot spell. RuntimeError: too many threads.
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError):  # then it runs, and nobody would know when it ends
                os.killpg(self.process.pid, signal.SIGKILL)
            self.close()
            text = f"the script, or the program in its #! line, could not be started: {why(error)}"
            raise SwapFailed(text) from None

    def _reap(self) -> None:
        code = self.process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: jano has stopped
            self.exited.get_loop().call_soon_threadsafe(self.exited.set_result, code)

    async def succeed(self, timeout: float | None = None) -> None:
        """Wait until it has ended well, or stop it after timeout seconds. Raises SwapFailed."""
        ended, _ = await asyncio.wait({self.exited}, timeout=timeout)  # await would cancel it
        code = self.exited.result() if ended else -signal.SIGTERM  # which `stop` sends
        if code:
            await self.stop()
            ending = f"exited with code {code}" if code > 0 else f"was killed by signal {-code}"
            ending = ending if ended else f"runs on after {timeout:g} s"
            raise SwapFailed(f"the script {ending}", code=code, stderr=self.last_line())

    async def stop(self, grace: float = 2) -> None:
        """If it runs, send its process group SIGTERM, and grace seconds later SIGKILL."""
        if self.exited.done():  # what it has left in the background stays
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # until nobody is left
            os.killpg(self.process.pid, signal.SIGTERM)
            for _ in range(round(grace / 0.02)):
                await asyncio.sleep(0.02)
                os.killpg(self.process.pid, 0)
            os.killpg(self.process.pid, signal.SIGKILL)
        await asyncio.wait({self.exited}, timeout=2)

    def names(self, models: list[Model], state: str) -> list[Model]:
        """The models of which it has printed that they are in this state."""
        text = os.pread(self.stdout.fileno(), 2**16, 0).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines()]
        return [model for model in models if f"{model.name}: {state}".strip() in lines]

    def last_line(self) -> str:
        """The last line on stderr, at most 300 characters."""
        end = os.fstat(self.stderr.fileno()).st_size
        text = os.pread(self.stderr.fileno(), 2**12, max(0, end - 2**12)).decode(errors="replace")
        return (text.strip().splitlines() or [""])[-1][:300]


def output_file(worker: Worker, argument: str, ending: str) -> IO[bytes]:
    """A new file in <tmp>/jano-<uid>-<port>, which is the user's own; /dev/null if that fails."""
    kind = argument if argument in ("status", "unload") else "swap"
    try:
        folder = Path(tempfile.gettempdir(), f"jano-{os.getuid()}-{worker.jano.port}")
        path = folder / f"{quote(worker.group, safe='')}.{kind}.{ending}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise PermissionError  # somebody else's
        path.unlink(missing_ok=True)  # a server of the last run may still write to that
        return open(path, "a+b")
    except OSError as error:
        log("warn", "output of the script is lost", err=why(error))
        return open(os.devnull, "a+b")


# --------------------------------------------------------------------------------- forward ----

CONNECT_TIMEOUT = 10.0  # seconds
KEEP_FOR = 0.5  # seconds that an idle connection is kept: less than any backend keeps it
BUFFER = 2**16  # bytes; twice as many may be held before reading pauses
# Of a head, on both sides: bytes, and a number of headers.
LIMITS: dict[str, Any] = {"max_line_size": 2**16, "max_field_size": 2**16, "max_headers": 256}
PARSING = {"limit": BUFFER, "read_until_eof": True, "auto_decompress": False, **LIMITS}
tls_context = functools.cache(ssl.create_default_context)  # a new one takes 20 ms


class BackendError(Exception):
    """A backend has failed, in words and with a code that are fit for a client."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code
        self.status = 504 if code == "backend_timeout" else 502


async def forward(call: Call) -> bytes:
    """Ask the backend and pass its answer on. Returns the last bytes, for the caller to write.

    Raises BackendError; ConnectionError if the client has left, TimeoutError if it does not read;
    ApiError if heartbeats have begun a stream to the client and the answer is not a stream.
    """
    upstream = await connect(call)
    try:
        upstream.ask(call.request_head(), call.body, call.jano.settings.request_timeout)
        while upstream.head is None:
            await upstream.more()
        head, body = upstream.head, upstream.body
        if head.code >= 500 and call.worker:
            call.worker.backend_failed(call.model)
        call.begin_answer(head)
        if call.beats and not call.may_beat:  # its client expects a stream
            raise await no_stream(upstream, head)
        if call.request.method == "HEAD":  # nothing follows, whatever the head says
            return b""
        while True:
            piece = body.read_nowait()
            if piece and call.first_byte is None:
                call.first_byte = clock()
                call.may_beat = False
            if piece and call.excerpt is not None:
                call.excerpt += piece
                del call.excerpt[KEEP:-KEEP]  # its middle
            if body.at_eof():
                return piece
            if piece or call.unsent:  # unsent: the answer's head, which waits for no body
                await call.write(piece)
            else:
                await upstream.more()
    except HttpProcessingError:  # from aiohttp's parser in Python, where there is none in C
        raise BackendError("sent what is not HTTP", "backend_died") from None
    finally:
        upstream.release()


async def connect(call: Call) -> Upstream:
    """A connection to the model's backend, idle or new. Raises BackendError."""
    url = call.entry.url
    idle = call.jano.idle[url.scheme, url.netloc]
    loop = asyncio.get_running_loop()
    for upstream in reversed(idle):
        in_time = upstream.usable_from <= clock() < upstream.deadline
        if in_time and not upstream.unread.poll(0):  # the backend may just have closed it
            idle.remove(upstream)
            return upstream
    tls = tls_context() if url.scheme == "https" else None
    port = url.port or (443 if tls else 80)
    try:
        async with asyncio.timeout(min(CONNECT_TIMEOUT, call.jano.settings.request_timeout)):
            _, upstream = await loop.create_connection(
                lambda: Upstream(idle), url.hostname or "", port, ssl=tls
            )
    except (OSError, RuntimeError) as error:  # as in `first_fault`
        raise BackendError(f"cannot be reached ({why(error)})", "backend_unreachable") from None
    return upstream


class Upstream(asyncio.Protocol):
    """A connection to a backend, for one request after the other.

    idle ──ask──▶ waiting for the head ──▶ body, piece by piece ──▶ complete ──release──▶ idle

    It exists because aiohttp's client costs more than all the rest of a request, sets no deadline
    for sending, and drops an answer that came before the request was sent whole. The parser is
    aiohttp's, and so is the reader that it fills: `body` pauses reading while the client is slower.
    """

    def __init__(self, idle: list[Upstream]) -> None:
        self.idle = idle  # where it waits for its next request
        self.loop = asyncio.get_running_loop()
        self.head: RawResponseMessage | None = None
        self.body: aiohttp.StreamReader = aiohttp.EMPTY_PAYLOAD
        self.rest = memoryview(b"")  # of a large body, still to be sent
        self.failure: BackendError | None = None  # told once all that came before it is taken
        # Of `more`. None: it is idle; done: its handler has not come back for more.
        self.waiter: asyncio.Future[None] | None = None
        self.timeout = 0.0  # seconds for which the backend may be silent
        self.deadline = math.inf  # of the backend's silence, or of being kept without use
        self.usable_from = 0.0  # set by its first answer in chunks
        self.unread = select.poll()  # whether there is something to read, or the end

    def ask(self, request: bytes, body: bytes, timeout: float) -> None:
        """Begin to send a request. timeout bounds that and the wait for the answer's head."""
        # Not the last answer's parser: its trailers would become headers of this one.
        self.parser = HttpResponseParser(cast(Any, self), self.loop, **PARSING)
        self.timeout = timeout
        self.deadline = clock() + timeout
        self.transport.write(request + body[:BUFFER])
        self.rest = memoryview(body)[BUFFER:]

    def more(self) -> asyncio.Future[None]:
        """Send more, and wait until more has come. Raises BackendError.

        A large body is sent in pieces, as the transport makes a copy of what it cannot send: one in
        an iteration of the loop, as a TLS transport needs several to notice that its peer is gone.
        """
        if self.failure:
            raise self.failure
        if self.head:
            self.deadline = clock() + self.timeout
        if self.rest and not self.transport.get_write_buffer_size():
            self.transport.write(self.rest[:BUFFER])
            self.rest = self.rest[BUFFER:]
            self.loop.call_soon(self.wake)
        self.waiter = self.loop.create_future()
        return self.waiter

    def wake(self) -> None:
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    resume_writing = wake  # the transport has sent all

    def release(self) -> None:
        """The request is over: keep the connection for another one if that is safe, or close it.

        Closing tells a backend that its client has left. A connection is used again only if the
        backend keeps it (RFC 9112, 9.3), and its answer was complete and no error: after an error
        the backend may take the unread rest of a request's body for the next request. llama-server
        closes after each stream and does not say so: after its first stream, a connection is used
        again only once it has stayed open for half of KEEP_FOR.
        """
        unsent = self.rest or self.transport.get_write_buffer_size()
        unfinished = self.failure or unsent or not self.body.at_eof()
        if self.head is None or self.head.should_close or self.head.code >= 400 or unfinished:
            self.close()
        else:
            self.deadline = clock() + KEEP_FOR
            if self.head.chunked:
                self.usable_from = self.usable_from or self.deadline - KEEP_FOR / 2
            self.head = self.waiter = None
            self.idle.append(self)

    def close(self, fault: str = "died", code: str = "backend_died") -> None:
        """At once; what was not sent is dropped. Whoever waits is told the first fault."""
        self.failure = self.failure or BackendError(fault, code)
        self.rest = memoryview(b"")
        self.timer.cancel()
        self.transport.abort()
        if self in self.idle:
            self.idle.remove(self)
        self.wake()

    def check_deadline(self) -> None:
        """Close it if it was idle, or the backend silent, for too long. Look again soon."""
        now = clock()
        blocked = self.waiter and self.waiter.done()  # by a client that does not read
        # Unread bytes: this process was late (the machine slept), not the backend.
        if now < self.deadline or blocked or self.unread.poll(0):
            delay = min(KEEP_FOR / 2, max(0.1, self.deadline - now))
            self.timer = self.loop.call_later(delay, self.check_deadline)
        else:
            self.close(f"was silent for {self.timeout:g} s", "backend_timeout")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(0)  # it calls resume_writing when all is sent
        self.unread.register(transport.get_extra_info("socket"), select.POLLIN)
        self.check_deadline()

    def data_received(self, data: bytes) -> None:
        if self.waiter is None:
            self.close("sent what nobody had asked for")
            return
        try:
            messages = self.parser.feed_data(data)[0]
        except Exception as error:  # whatever the parser makes of what a backend sends
            self.close(f"sent what is not HTTP ({type(error).__name__})")
            return
        for head, body in messages:
            if self.head or head.code == 101:
                self.close("sent what nobody had asked for")
            elif head.code >= 200:  # 1xx is interim, and for this hop
                self.head, self.body = head, body
        self.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc and not self.transport.get_extra_info("sslcontext"):
            # A backend may answer 413 and close without reading the request. Then sending fails,
            # and asyncio drops what it has not read yet; here, the socket is still open.
            with contextlib.suppress(OSError):
                while data := os.read(self.transport.get_extra_info("socket").fileno(), BUFFER):
                    self.data_received(data)
        if self.head and not exc and not self.failure:
            # The end of the connection ends a body without a length. A reset does not.
            with contextlib.suppress(HttpProcessingError):
                self.parser.feed_eof()
        self.close()

    def pause_reading(self) -> None:
        self.transport.pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        self.transport.resume_reading()


# ------------------------------------------------------------------------------ front door ----

CLIENT_LEFT = 499  # nginx's status for it
MAX_HELD = 2**30  # bytes of all bodies together, once they are read; a lone one may be larger
TIERS = {"priority": PRIORITY, "flex": FLEX}
STREAMS = {"chat/completions", "completions", "messages", "responses"}  # streams that are known
UPSTREAM = "/upstream/"  # followed by a model's name, and a path for its backend
PREFLIGHT = {
    "Allow": "GET, HEAD, POST, OPTIONS",
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Private-Network": "true",
}
HEALTH_ROUTES = ("/health", "/v1/health", "/healthz", "/readyz")
OLLAMA_DETAILS = {"format": "gguf", "family": "jano", "families": ["jano"]} | dict.fromkeys(
    ("parent_model", "parameter_size", "quantization_level"), ""
)
# Makes a response, or what is sent as JSON; or a coroutine that does.
Handler = Callable[[web.BaseRequest], Any]


class Jano:
    """All the state, and the front door: who may ask, what for, and what becomes of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.telemetry = Telemetry(settings.usage_records_max)
        self.models: dict[str, Model] = {}
        self.names: dict[str, Model] = {}  # names and aliases, without their case
        self.workers: dict[str, Worker] = {}  # by group; a passthrough model is of none
        self.calls: dict[Call, asyncio.Task[Any]] = {}  # until the last byte is out, oldest first
        self.held_bytes = 0  # of their bodies
        self.idle: defaultdict[tuple[str, str], list[Upstream]] = defaultdict(list)  # by origin
        self.last_id = 0
        self.port = 0
        self.hosts: set[str] = set()  # whose names are known; empty: any
        self.stopping = asyncio.Event()
        self.routes: dict[str, tuple[str, Handler]] = {
            **dict.fromkeys((*HEALTH_ROUTES, "/status"), ("GET", self.get_health)),
            **dict.fromkeys(("/models", "/v1/models", "/v1/models/"), ("GET", self.get_models)),
            "/usage": ("GET", self.get_usage),
            "/metrics": ("GET", lambda _: metrics(self)),
            "/": ("GET", lambda _: page(self)),
            "/load": ("POST", self.post_load),
            "/unload": ("POST", self.post_unload),
            **dict.fromkeys(("/api/version", "/api/tags", "/api/ps"), ("GET", self.get_ollama)),
            "/api/show": ("POST", self.post_show),
        }

    def adopt(self, models: list[Model]) -> None:
        """Use these models. What is loaded stays; tickets move with their models."""
        self.models = {model.name: model for model in models}
        self.names = {key: model for model in models for key in model.keys}
        for model in models:
            if model.group:
                if model.group not in self.workers:
                    self.workers[model.group] = Worker(model.group, self)
                self.workers[model.group].adopt(model)
        for worker in self.workers.values():
            worker.failures.clear()
            elsewhere = {model.name for model in models if model.group != worker.group}
            waiting = worker.schedule.waiting()
            worker.fail((ticket for ticket in waiting if ticket.model in elsewhere), MOVED)
            worker.advance()

    def state_of(self, model: Model) -> str:
        """What /v1/models says of it."""
        worker = self.workers.get(model.group)
        if worker is None or model.set_name == worker.schedule.loaded:
            return "loaded"
        return "loading" if model.set_name == worker.swapping else "unloaded"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; every error in the dialect of who asks."""
        path, headers = request.path, request.headers
        method = "GET" if request.method == "HEAD" else request.method
        route = "/v1/models/" if path.startswith("/v1/models/") else path
        allowed, handler = self.routes.get(route, ("POST", None))
        name = request.query.get("model") or headers.get("X-Model", "")
        named = name or path.startswith(UPSTREAM)
        try:
            self.check_client(request)
            if handler and method == allowed:
                made = handler(request)
                made = await made if asyncio.iscoroutine(made) else made
                response = made if isinstance(made, web.Response) else web.json_response(made)
                if path in ("/load", "/unload") and "text/html" in headers.get("Accept", ""):
                    response = web.Response(status=303, headers={"Location": "/"})  # a browser
            elif method == "OPTIONS":  # before a page of another origin may ask (Fetch, 3.2)
                asked = headers.get("Access-Control-Request-Headers", "*")
                allow = {"Access-Control-Allow-Headers": asked, "Access-Control-Max-Age": "600"}
                response = web.Response(status=204, headers=PREFLIGHT | allow)
            elif headers.get("Upgrade", "").lower() == "websocket":
                upgrade = {"Upgrade": "HTTP/1.1", "Connection": "upgrade"}  # RFC 9110, 15.5.22
                raise ApiError(426, "WebSockets are not served here", "no_websocket", upgrade)
            elif handler is None and (method == "POST" or (named and method != "CONNECT")):
                return await self.serve(await self.read_call(request, name))
            elif handler is None and method == "GET":
                text = f"there is no {shown(path)} here; name a model to ask its backend"
                raise ApiError(404, text, "unknown_route")
            else:
                allow = {"Allow": f"{allowed}, OPTIONS".replace("GET", "GET, HEAD")}
                raise ApiError(405, f"{method} is not for this path", "method_not_allowed", allow)
        except ApiError as error:
            response = error.response(request)
        response.headers["Server"] = f"jano/{__version__}"
        response.headers.update(self.cors_headers(request))
        return response

    def check_client(self, request: web.BaseRequest) -> None:
        """Host and Origin must be allowed, and the key right. Raises ApiError 403 or 401."""
        host, origin = request.headers.get("Host", "localhost"), request.headers.get("Origin")
        name = host_name(host)
        if self.hosts and name not in self.hosts and not name.endswith((".localhost", ".internal")):
            # DNS rebinding: a web page's own name that points at 127.0.0.1 now.
            text = f"unknown Host {shown(host)}, see JANO_ALLOWED_HOSTS"
            raise ApiError(403, text, "host_not_allowed")
        same = origin and re.sub("^https?://", "", origin.lower()) == host.lower()
        if origin and not same and not self.cors_headers(request):
            text = f"unknown Origin {shown(origin)}, see JANO_CORS_ORIGINS"
            raise ApiError(403, text, "origin_not_allowed")
        open_to_all = request.method == "OPTIONS" or request.path in HEALTH_ROUTES
        if self.settings.api_key and not open_to_all and not self.key_headers(request):
            # A browser that opens the page asks its user; no program is made to ask anybody.
            ask = {"WWW-Authenticate": 'Basic realm="jano"'} if request.path == "/" else {}
            text = "the API key is missing or wrong: send it as Authorization: Bearer"
            raise ApiError(401, text, "invalid_api_key", ask)

    def key_headers(self, request: web.BaseRequest) -> set[bytes]:
        """The headers that show JANO_API_KEY, in lower case. They are for jano alone."""
        keys = {name: request.headers.get(name, "") for name in ("x-api-key", "api-key")}
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            keys["authorization"] = credentials.strip()
        elif scheme.lower() == "basic":  # with any user name (RFC 7617)
            with contextlib.suppress(ValueError):
                _, _, password = base64.b64decode(credentials).decode().partition(":")
                keys["authorization"] = password.strip()
        right = os.fsencode(self.settings.api_key)
        equal = hmac.compare_digest  # in a time that tells nothing
        return {name.encode() for name, key in keys.items() if equal(os.fsencode(key), right)}

    def cors_headers(self, request: web.BaseRequest) -> dict[str, str]:
        """For a page of an allowed origin, so that it may read the answer (Fetch standard, 3.2)."""
        origin = request.headers.get("Origin")
        allowed = self.settings.cors_origins
        if origin is None or not any(re.fullmatch(each, origin.lower()) for each in allowed):
            return {}
        exposed = "x-request-id, Server-Timing, Retry-After"
        headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        return headers | {"Access-Control-Expose-Headers": exposed}

    async def read_call(self, request: web.BaseRequest, hint: Any) -> Call:
        """Read what is asked of which model; hint is the query's or header's, if any."""
        body = await self.read_body(request)
        values: dict[str, Any] = {}
        part = None  # where in a form its model stands
        try:
            if request.content_type.startswith("multipart/"):
                part = form_model(request.headers["Content-Type"], body)
                values = {"model": body[part].decode(errors="replace")} if part else {}
            elif request.method == "POST":
                values = parse_object(body)
        except ApiError:
            if not (hint or request.path.startswith(UPSTREAM)):
                raise  # else the body is the backend's matter
        name = values.get("model") or hint  # the path counts more than both
        path, target = request.path, request.raw_path.partition("#")[0]
        if not target.startswith("/"):  # an address, or * (RFC 9112, 3.2)
            target = "/" + request.rel_url.raw_path_qs.removeprefix("/")
        if path.startswith(UPSTREAM):
            name, target = self.split_upstream(target)
            path = unquote(target.partition("?")[0])
        model = self.find_model(name, path)
        if model.upstream_model and part:
            body = body[: part.start] + model.upstream_model.encode() + body[part.stop :]
        elif model.upstream_model and "model" in values:
            body = json.dumps({**values, "model": model.upstream_model}).encode()
        tier = TIERS.get(str(values.get("service_tier")), DEFAULT)
        call = Call(model.name, clock(), tier, jano=self, request=request, entry=model, body=body)
        self.last_id += 1
        call.id, call.target = str(self.last_id), target
        if values.get("stream") is True and bare(path) in STREAMS:
            call.stream = bare(path)
        if request.method == "POST":
            call.worker = self.workers.get(model.group)
        elif self.state_of(model) != "loaded":
            text = f'"{model.name}" is not loaded; POST /load?model=… loads a model'
            raise ApiError(409, text, "model_not_loaded")
        return call

    async def read_body(self, request: web.BaseRequest) -> bytes:
        """The whole body, unpacked if it came packed. Raises ApiError."""
        limit, size = self.settings.max_body_mb * 2**20, request.content_length or 0
        # curl asks by itself. HTTP/1.0 knows no such question (RFC 9110, 10.1.1).
        asks = request.headers.get("Expect", "").lower() == "100-continue"
        if asks and request.version >= (1, 1) and size <= limit:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        try:
            while size <= limit and (piece := await request.content.readany()):
                body += piece
                size = len(body)
                if size > BUFFER:  # aiohttp unpacks a large one without a pause
                    await asyncio.sleep(0)
        except (web.RequestPayloadError, ValueError):
            raise ApiError(400, "the body is damaged", "invalid_body") from None
        if size > limit:
            text = f"the body is larger than {self.settings.max_body_mb} MB (MAX_BODY_MB)"
            raise ApiError(413, text, "body_too_large")
        return bytes(body)

    def split_upstream(self, target: str) -> tuple[str, str]:
        """/upstream/{model}/… as the model's name, and path and query for its backend."""
        path, mark, query = target.partition("?")
        steps = path.removeprefix(UPSTREAM).split("/")
        most = 1 + max(name.count("/") for name in self.names)  # a name may have slashes
        for end in range(min(most, len(steps)), 0, -1):
            name = unquote("/".join(steps[:end]))
            if name.casefold() in self.names:
                return name, f"/{'/'.join(steps[end:])}{mark}{query}"
        return unquote(steps[0]), "/"

    def find_model(self, name: object, path: str = "", status: int = 400) -> Model:
        """By its name or an alias; if there is no name, by `endpoints`. Raises ApiError."""
        if isinstance(name, str) and name.casefold() in self.names:
            return self.names[name.casefold()]
        for model in self.models.values():
            if not name and bare(path) in map(bare, model.endpoints):
                return model
        accepted = [each for model in self.models.values() for each in (model.name, *model.aliases)]
        text = f"unknown model {shown(name)}" if name else "no model is named"
        text += f"; accepted: {', '.join(accepted)}"
        raise ApiError(status, text, "model_not_found", accepted=accepted)

    async def serve(self, call: Call) -> web.StreamResponse:
        """Serve the call to its end. Who has its last byte, or its error, finds it counted."""
        if self.stopping.is_set():
            raise SHUTTING_DOWN()
        size = len(call.body)
        if call.worker:
            # To count who waits is slow: only where the limit may have been reached.
            if len(self.calls) >= self.settings.max_queue or self.held_bytes + size > MAX_HELD:
                self.refuse_if_full(size)
            log("info", "enqueued", id=call.id, model=call.model)
        self.calls[call] = cast("asyncio.Task[Any]", asyncio.current_task())
        self.held_bytes += size
        if call.stream and self.settings.heartbeat:
            call.timer = asyncio.get_running_loop().call_later(self.settings.heartbeat, call.beat)
        try:
            last = await self.take_turn(call)
            self.settle(call)
            await call.write(last, last=True)
        except ApiError as error:
            self.settle(call, error)
            error.headers["x-request-id"] = call.id
            if not call.beats:
                raise
            call.send(error.event(call), last=True)
        except BaseException as error:
            if call.outcome is None:  # else its last bytes could not be written
                self.settle(call, error)
            abort(call.request)  # when jano stops, too: the answer must not look complete
            if not isinstance(error, (BackendError, ConnectionError, TimeoutError)):
                raise
        finally:
            self.held_bytes -= size
            call.body = b""  # tracebacks may keep the call for a while
            del self.calls[call]
        return WRITTEN[call.keep_alive]

    def refuse_if_full(self, size: int = 0) -> None:
        """Raises ApiError if there is no room for one more that waits, with a body of this size."""
        waiting = sum(group_status(self, group)["queueDepth"] for group in self.workers)
        full = self.held_bytes and self.held_bytes + size > MAX_HELD
        if full or waiting >= self.settings.max_queue:
            text = f"{waiting} requests wait, with {self.held_bytes >> 20} MB"
            raise ApiError(503, f"the queue is full: {text}", "queue_full", RETRY_SOON)

    async def take_turn(self, call: Call) -> bytes:
        """Forward in the call's turn, twice if the backend was gone. Returns the last bytes."""
        worker, had_turn = call.worker, call.granted is not None
        try:
            if worker is None:
                call.granted = clock()
                return await forward(call)
            async with worker.turn(call):
                call.entry = worker.models[call.model]  # a reload may have changed it meanwhile
                return await forward(call)
        except Moved:
            call.entry = self.models[call.model]
            call.worker = self.workers.get(call.entry.group)
        except BackendError as error:
            if call.relaying:
                raise
            if error.code != "backend_unreachable" or had_turn or worker is None:
                text = f'backend "{call.model}" {error}'
                raise ApiError(error.status, text, error.code) from None
        # Moved, or not reached in its first turn, so the backend's health is asked: it waits again.
        return await self.take_turn(call)

    def settle(self, call: Call, error: BaseException | None = None) -> None:
        """The request is over: count it. error is what has cut it short."""
        if call.timer:
            call.timer.cancel()
        status, failure = call.sent_status, ""
        if isinstance(error, ApiError):
            status, failure = error.status, str(error)
            if error.code == "backend_error":  # its own words may quote a prompt
                failure = f"the backend answered {status}"
        elif isinstance(error, BackendError):
            status = error.status
            failure = f'backend "{call.model}" {error} in the middle of an answer'
        elif isinstance(error, asyncio.CancelledError) and call.request.transport:
            status, failure = 503, "jano stopped"
        elif isinstance(error, (ConnectionError, TimeoutError, asyncio.CancelledError)):
            status = CLIENT_LEFT  # then aiohttp cancels its handler, see `run`
        elif error:
            status, failure = 500, "jano failed"
        call.outcome, now = status, clock()
        self.telemetry.settled(call, now, failure)
        took = round(1000 * (now - call.arrived))
        facts = {"id": call.id, "model": call.model, "status": status, "ms": took}
        if call.granted is not None:
            facts["aborted"] = status == CLIENT_LEFT
            if failure:
                facts["reason"] = failure
            log("error" if failure else "info", "served", **facts)
        elif status == CLIENT_LEFT:
            log("info", "client disconnected", **facts)
        else:
            log("warn", "not served", **facts, reason=failure)

    def get_health(self, request: web.BaseRequest) -> web.Response:
        """/status for those who show the key, and its first word for all."""
        payload = snapshot(self)
        code = 200 if payload["ok"] else 503
        if self.settings.api_key and not self.key_headers(request):
            payload = {"ok": payload["ok"]}
        return web.json_response(payload, status=code)

    def get_models(self, request: web.BaseRequest) -> dict[str, Any]:
        """The listed models, or the one in the path (OpenAI API reference, "Models")."""
        if request.path.startswith("/v1/models/"):
            model = self.find_model(request.path.removeprefix("/v1/models/"), status=404)
            return self.model_entry(model)
        data = [self.model_entry(model) for model in self.models.values() if not model.unlisted]
        return {"object": "list", "data": data}

    def model_entry(self, model: Model) -> dict[str, Any]:
        """What `metadata` says is merged in, but changes nothing that jano says itself."""
        entry: dict[str, Any] = {"id": model.name, "object": "model", "owned_by": "jano"}
        entry |= {"aliases": model.aliases, "root": model.upstream_model or model.name}
        entry |= {"created": int(self.telemetry.started), "name": model.label or model.name}
        return {**model.metadata, **entry, "status": {"value": self.state_of(model)}}

    def get_usage(self, request: web.BaseRequest) -> dict[str, Any]:
        """The latest requests, newest first, ?limit= of them."""
        limit = request.query.get("limit", "50")
        if not re.fullmatch("[0-9]{1,9}", limit):
            text = f"limit: found {shown(limit)}, expected a whole number below 10^9"
            raise ApiError(400, text, "invalid_limit")
        latest = islice(reversed(self.telemetry.records), int(limit))
        records = [{**record, "ts": utc(record["ts"])} for record in latest]
        return {"count": len(records), "records": records}

    async def post_load(self, request: web.BaseRequest) -> dict[str, Any]:
        """Bring a model in, through the queue like any request; answers when it is there."""
        model = self.find_model(request.query.get("model"))
        worker = self.workers.get(model.group)
        if worker:
            self.refuse_if_full()
            async with worker.turn(Ticket(model.name, clock())):
                pass
        return {"model": model.name, "status": {"value": "loaded"}}

    async def post_unload(self, request: web.BaseRequest) -> dict[str, Any]:
        """Drain, and free the memory: of the group of ?model=, or of all groups."""
        group = self.find_model(request.query["model"]).group if "model" in request.query else None
        workers = [worker for worker in self.workers.values() if group in (None, worker.group)]
        # Shielded: a client that leaves must not let go of the lock while the script runs.
        unloads = asyncio.gather(*(worker.unload() for worker in workers), return_exceptions=True)
        names = await asyncio.shield(unloads)
        for name in names:
            if isinstance(name, BaseException):
                raise name
        return {"unloaded": [name for name in names if name]}

    def get_ollama(self, request: web.BaseRequest) -> dict[str, Any]:
        """Ollama's version, the listed models, or those that are loaded."""
        if request.path == "/api/version":
            return {"version": "0.12.6"}  # clients refuse one that is too old
        listed = [model for model in self.models.values() if not model.unlisted]
        if request.path == "/api/ps":
            listed = [model for model in listed if self.state_of(model) == "loaded"]
        entry: dict[str, Any] = {"details": OLLAMA_DETAILS}
        entry |= {"modified_at": utc(self.telemetry.started), "expires_at": "2318-04-04T00:00:00Z"}
        entry |= {"digest": "0" * 64, "size": 0, "size_vram": 0}
        return {"models": [{"name": each.name, "model": each.name, **entry} for each in listed]}

    async def post_show(self, request: web.BaseRequest) -> dict[str, Any]:
        """What clients ask before they offer tools or cut a prompt; `metadata` may tell."""
        asked = parse_object(await self.read_body(request))
        model = self.find_model(asked.get("model") or asked.get("name"), status=404)
        known = model.metadata
        meta = known["meta"] if isinstance(known.get("meta"), dict) else {}
        length = known.get("context_length") or known.get("max_model_len") or meta.get("n_ctx")
        info = {"general.architecture": "jano", "general.basename": model.name}
        info |= {"jano.context_length": length} if length else {}
        payload = {"details": OLLAMA_DETAILS, "modified_at": utc(self.telemetry.started)}
        payload["capabilities"] = known.get("capabilities", ["completion", "tools"])
        return payload | {"model_info": info}


@functools.lru_cache(100)
def host_name(host: str) -> str:
    """A Host header without its port, and an IPv6 address without its brackets; "" if it is bad."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^.:\[\]\s/*@][^:\[\]\s/*@]*)(:[0-9]*)?", host.lower())
    return match[1].strip("[]") if match else ""


def bare(route: str) -> str:
    """A route without outer slashes or a leading v1, such as "chat/completions"."""
    return f"/{route.strip('/')}".removeprefix("/v1/").strip("/")


MAX_VALUES = 2_000_000  # in a JSON body, more or less: half a second of parsing
MAX_PARTS, MAX_PART_HEAD = 1000, 2**13  # of a form; bytes
PARAMETER = rb';[ \t]*([a-z*]+)=("[^"\r\n]*"|[^\s;"]+)[ \t]*'
# *+ keeps what it has matched: with * a client could stop jano for minutes.
PART = rb"(?im)^content-disposition:[ \t]*form-data[ \t]*((?:" + PARAMETER + rb")*+)\r"


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in body; bytes beyond UTF-8, or a BOM, are no fault. Raises ApiError 400."""
    # What is none, such as a file, would take long to decode.
    if not body.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        raise ApiError(400, "the body is not a JSON object", "invalid_json")
    if len(body) > MAX_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values", "invalid_json")
    try:
        values: dict[str, Any] = json.loads(body.decode(errors="replace").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", "invalid_json") from None
    return values


def form_model(content_type: str, body: bytes) -> slice | None:
    """Where a form's `model` stands in its body (RFC 7578), None if it has none. Raises ApiError if
    it is not one whole form: what somebody else might read otherwise is not passed on."""
    match = re.search(r'boundary=(?:"([^"]+)"|([^\s;"]+))', content_type, re.IGNORECASE)
    line = b"--" + os.fsencode((match[1] or match[2]) if match else "")
    at = len(line) if body.startswith(line) else len(body)
    models: list[slice] = []
    for _ in range(MAX_PARTS):
        content = body.find(b"\r\n\r\n", at, at + MAX_PART_HEAD) + 4  # 3: there is none
        end = body.find(b"\r\n" + line, content - 2)
        if content < 4 or end < 0 or not body.startswith(b"\r\n", at):
            break
        for parameters, *_ in re.findall(PART, body[at:content]):
            for name, value in re.findall(b"(?i)" + PARAMETER, parameters):
                if name.lower() == b"name" and value.strip(b'"') == b"model":
                    models.append(slice(content, max(content, end)))
        at = end + 2 + len(line)
        if body.startswith(b"--", at) and not body[at + 2 :].strip() and len(models) < 2:
            return models[0] if models else None
    text = f"the body is not one whole form, of up to {MAX_PARTS} parts, with one model"
    raise ApiError(400, text, "invalid_form")


# Hop by hop (RFC 9110, 7.6.1), and what is made anew for the next hop.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade"
    b" proxy-authenticate proxy-authorization content-length host expect".split()
)
CONTROL = bytes([*range(9), *range(10, 32), 127])  # never in a header's value (RFC 9110, 5.5)


@dataclass(eq=False)
class Call(Ticket):
    """A request from its arrival to its end; for the policy it is a ticket like any other.

    nothing sent ──beat──▶ heartbeats ──begin_answer──▶ relaying ──settle──▶ over

    Without heartbeats begin_answer is the first step. An error is a response of its own where
    nothing was sent, an event behind heartbeats, and a broken connection within an answer.
    """

    _: KW_ONLY
    jano: Jano
    request: web.BaseRequest
    entry: Model  # the model's entry in models.json
    body: bytes
    worker: Worker | None = None  # None: it needs no turn
    target: str = ""  # path and query for the backend, in the client's own spelling
    stream: str = ""  # which of STREAMS it asks for; "": any other answer
    unsent: bytes = b""  # the head of the answer; it goes out with what comes first
    chunked: bool = False  # the answer's body is sent in chunks
    keep_alive: bool = True
    beats: int = 0  # heartbeats sent
    may_beat: bool = True  # another one may be sent: until the answer's first byte
    timer: asyncio.TimerHandle | None = None  # of the next one
    relaying: bool = False  # the backend's answer has begun
    sent_status: int = 0  # what the client is told
    excerpt: bytearray | None = None  # both ends of the answer, where its tokens are counted
    first_byte: float | None = None
    outcome: int | None = None  # the status with which it is counted, once it is over

    @property
    def running(self) -> bool:
        return self.worker is None or self in self.worker.schedule.in_flight

    def request_head(self) -> bytes:
        """For the backend: the client's start line and headers, less what is for this hop."""
        request, url = self.request, self.entry.url
        start = f"{request.method} {url.path}{self.target} HTTP/1.1"
        lines = [start.encode("utf-8", "surrogateescape"), b"Host: " + url.netloc.encode()]
        drop = self.jano.key_headers(request) if self.jano.settings.api_key else set()
        for name, value in self.entry.headers.items():
            drop.add(name.lower().encode())
            lines.append(f"{name}: {value}".encode())
        if request.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate", "br", "zstd"):
            drop.add(b"content-encoding")  # aiohttp has unpacked the body
        if self.stream:  # a heartbeat's head names no encoding
            drop.add(b"accept-encoding")
        if self.body or request.method in ("POST", "PUT", "PATCH"):
            lines.append(b"Content-Length: %d" % len(self.body))
        return b"\r\n".join([*lines, *end_to_end(request, drop), b"\r\n"])

    def begin_answer(self, head: RawResponseMessage) -> None:
        """Prepare the backend's status line and headers, and jano's, unless a head is out."""
        self.relaying = True
        length = None if head.chunked else head.headers.get("Content-Length")
        content_type = head.headers.get("Content-Type", "").lower()
        events = "event-stream" in content_type
        no_length = self.beats > 0 or not length  # is told to the client
        self.may_beat = head.code == 200 and events and no_length and not head.compression
        if events or "json" in content_type:
            self.excerpt = bytearray()
        if self.beats:
            return
        # Jano's own word on who may read it counts.
        drop = {b"access-control-allow-origin"} if "Origin" in self.request.headers else set()
        lines = end_to_end(head, drop)
        if "Date" not in head.headers:
            lines.append(gmt("Date: %a, %d %b %Y %H:%M:%S GMT", int(time.time())).encode())
        if "x-request-id" not in head.headers:
            lines.append(b"x-request-id: " + self.id.encode())
        if events:
            lines.append(b"X-Accel-Buffering: no")
        queue_ms = 1000 * ((self.granted or self.arrived) - self.arrived)
        timing = (queue_ms, 1000 * self.swap_wait)
        lines.append(b"Server-Timing: queue;dur=%.0f, swap;dur=%.0f" % timing)
        self.set_head(head.code, head.reason, lines, length)

    def set_head(self, status: int, reason: str, lines: list[bytes], length: str | None) -> None:
        """length is the body's, None if nobody knows it yet (RFC 9112, 6.3)."""
        major, minor = self.request.version
        self.sent_status, self.keep_alive = status, self.request.keep_alive
        if length is not None and status != 204:
            lines.append(b"Content-Length: " + length.encode())
        elif self.request.method != "HEAD" and status not in (204, 304):
            self.chunked = minor > 0
            self.keep_alive = self.keep_alive and self.chunked
            if self.chunked:
                lines.append(b"Transfer-Encoding: chunked")
        if self.keep_alive != (minor > 0):  # otherwise it goes without saying
            lines.append(b"Connection: keep-alive" if self.keep_alive else b"Connection: close")
        for name, value in self.jano.cors_headers(self.request).items():
            lines.append(os.fsencode(f"{name}: {value}"))
        start = f"HTTP/{major}.{minor} {status} {reason}".encode("utf-8", "surrogateescape")
        self.unsent = b"\r\n".join([start.translate(None, CONTROL), *lines, b"\r\n"])

    def send(self, piece: bytes, last: bool = False) -> None:
        """A piece of the body, behind the head if that is not out (RFC 9112, 7.1)."""
        if self.chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
            piece += b"0\r\n\r\n" if last else b""
        transport = self.request.transport
        if transport:  # else the client has left, and the handler is cancelled
            transport.write(self.unsent + piece)
        self.unsent = b""

    async def write(self, piece: bytes, last: bool = False) -> None:
        """Send, and wait while the client does not read. Raises ConnectionError, TimeoutError."""
        self.send(piece, last)
        if self.request.protocol.writing_paused:
            async with asyncio.timeout(self.jano.settings.request_timeout):
                await self.request.writer.drain()

    def beat(self) -> None:
        """Send a sign of life. If no answer has begun, a 200 goes first; errors are events then."""
        if not self.may_beat:
            return
        data = b": waiting\n\n"  # a comment, which clients skip (HTML standard, 9.2.6)
        if self.stream == "responses":  # Codex wants events
            data = b'event: keepalive\ndata: {"type":"keepalive","sequence_number":%d}\n\n'
            data %= self.beats
        if not self.sent_status:
            lines = [b"Content-Type: text/event-stream", b"Cache-Control: no-cache"]
            lines += [b"X-Accel-Buffering: no", b"x-request-id: " + self.id.encode()]
            self.set_head(200, "OK", lines, None)
        self.beats += 1
        self.send(data)  # the transport buffers what its client does not read
        self.timer = asyncio.get_running_loop().call_later(self.jano.settings.heartbeat, self.beat)


def end_to_end(head: Any, drop: set[bytes]) -> list[bytes]:
    """The header lines, less those to drop and those for this hop (RFC 9110, 7.6.1)."""
    if "Connection" in head.headers:
        for token in ",".join(head.headers.getall("Connection")).split(","):
            drop.add(os.fsencode(token.strip().lower()))
    lines = []
    for name, value in head.raw_headers:
        name = name.rstrip()  # in an answer, there may be space (RFC 9112, 5.1)
        lower = name.lower()
        if lower not in HOP_BY_HOP and lower not in drop:
            lines.append((name + b": " + value).translate(None, CONTROL))
    return lines


async def no_stream(upstream: Upstream, head: RawResponseMessage) -> ApiError:
    """Why there is no stream for a client that has had heartbeats: the backend's own words."""
    body = upstream.body.read_nowait()
    with contextlib.suppress(BackendError):
        while len(body) < BUFFER and not upstream.body.at_eof():
            await upstream.more()
            body += upstream.body.read_nowait()
    text = "" if head.compression else body.decode(errors="replace").strip()
    said: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
    for key in ("error", "message", "detail"):  # of OpenAI, vLLM, FastAPI
        if isinstance(said, dict):
            said = said.get(key, said)
    words = said[:500] if isinstance(said, str) else text[:500]
    words = words or f"the backend answered {head.code} and no stream"
    return ApiError(head.code if head.code >= 400 else 502, words, "backend_error")


# The SDKs of OpenAI and Anthropic would ask again for minutes, and tell their user nothing.
NO_RETRY = {"x-should-retry": "false"}
RETRY_SOON = {"Retry-After": "5"}
ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class ApiError(Exception):
    """A failure as the client is told of it; more stands beside OpenAI's `error`."""

    def __init__(self, status: int, text: str, code: str, headers: Any = (), **more: Any) -> None:
        super().__init__(text)
        self.status, self.code, self.headers, self.more = status, code, dict(headers), more

    def payload(self, dialect: str) -> dict[str, Any]:
        """In the shape of OpenAI's, Anthropic's or Ollama's API."""
        if dialect == "ollama":
            return {"error": str(self)}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if dialect == "anthropic":
            kind = ANTHROPIC_TYPES.get(self.status, kind.replace("server", "api"))
            return {"type": "error", "error": {"type": kind, "message": str(self)}}
        param = "model" if "accepted" in self.more else None
        error = {"message": str(self), "type": kind, "param": param, "code": self.code}
        return {"error": error, **self.more}

    def response(self, request: web.BaseRequest) -> web.Response:
        """For a client that has got nothing yet."""
        dialect = "ollama" if re.match(f"({UPSTREAM}.+)?/api/", request.path) else "openai"
        messages = re.match(f"({UPSTREAM}.+)?(/v1)?/messages", request.path)
        if messages or "anthropic-version" in request.headers:
            dialect = "anthropic"
        return web.json_response(self.payload(dialect), status=self.status, headers=self.headers)

    def event(self, call: Call) -> bytes:
        """For one that has got heartbeats: the end of its stream."""
        anthropic = call.stream == "messages" or "anthropic-version" in call.request.headers
        payload = self.payload("anthropic" if anthropic else "openai")
        payload["error"]["type"] = self.code  # at "server_error" or "api_error", agents ask again
        if call.stream == "responses":
            response = {"object": "response", "status": "failed", "error": payload["error"]}
            payload |= {"type": "response.failed", "response": response}
        name = f"event: {payload['type']}\n" if "type" in payload else ""
        return f"{name}data: {compact(payload)}\n\n".encode()


class Moved(ApiError):
    """A reload has given the model of a waiting ticket to another group, or made it passthrough."""


MOVED = functools.partial(Moved, 503, "the model was moved meanwhile", "model_moved", RETRY_SOON)
SHUTTING_DOWN = functools.partial(ApiError, 503, "jano shuts down", "shutting_down", RETRY_SOON)


# ---------------------------------------------------------------------------------- config ----

LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class ConfigError(ValueError):
    """What is wrong with the configuration, in a line."""

    def __init__(self, where: str, found: str, expected: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}")


class Kind(NamedTuple):
    """How a setting or a key is read: by a pattern for each text in it, or by a converter."""

    expected: str
    check: str | Callable[[Any], Any]  # if it returns None or fails, the value is bad
    json_type: type = str
    is_secret: bool = False

    def read(self, where: str, value: Any) -> Any:
        """What is used of the value. Raises ConfigError."""
        used = None
        with contextlib.suppress(ValueError, TypeError, LookupError, OSError):
            if type(value) is self.json_type:
                used = self.check(value) if callable(self.check) else fitting(self.check, value)
        if used is None:
            raise ConfigError(where, shown(value, self.is_secret), self.expected)
        return used


def fitting(pattern: str, value: Any) -> Any:
    """The value, if all of each text in it fits, else None; an object's texts are `key: text`."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(value, dict):
        texts = map(": ".join, value.items())
    return value if all(re.fullmatch(pattern, text) for text in texts) else None


def number(least: int, most: int = 10**9, unit: float = 1, json_type: type = str) -> Kind:
    """A whole number, in plain digits, which is multiplied by unit."""

    def convert(value: Any) -> float | None:
        digits = re.fullmatch("[0-9]{1,10}", str(value))
        return int(value) * unit if digits and least <= int(value) <= most else None

    return Kind(f"a whole number from {least} to {most}", convert, json_type)


def each_of(text: str, convert: Callable[[str], str]) -> list[str] | None:
    """The parts of a comma-separated text in lower case, converted; None if one becomes ""."""
    parts = [convert(part.strip().lower()) for part in text.split(",") if part.strip()]
    return parts if all(parts) else None


def origin_regex(origin: str) -> str:
    """For what a browser may say of its page (RFC 6454, 6.2); "" if nothing can match it."""
    host = r"([^\s/*?#@:\[\]]+|\[[0-9a-f:.]+\])"
    forms = rf"\*|null|file://|[a-z][a-z0-9+.-]*://(\*|{host}(:\*|(?!:(80|443)\Z):[0-9]+)?)"
    port = urlsplit(origin.removesuffix("*")).port  # fails if it is out of range
    pattern = re.escape(origin).replace(r":\*", "(:[0-9]+)?").replace(r"\*", ".*")
    return pattern if re.fullmatch(forms, origin) and port != 0 else ""


def address(text: str) -> SplitResult | None:
    """A backend's, without a trailing "/" or "/v1"; None if it is none."""
    url = urlsplit(text.rstrip("/").removesuffix("/v1").rstrip("/"))
    # These fail if the name is none that can be looked up, or the port is out of range.
    good = (url.hostname or "").encode("idna") and url.port != 0
    return url if good and re.fullmatch(r"https?://[^\s?#@\\]+", text) else None


def command(text: str) -> list[str] | None:
    """SWAP_COMMAND's argv: the path of a script (spaces and ~ allowed), or a command line."""
    argv = [text] if os.path.isfile(os.path.expanduser(text)) else shlex.split(text)
    argv = [os.path.expanduser(part) for part in argv]
    path = shutil.which(os.path.abspath(argv[0])) or shutil.which(argv[0])
    return [path, *argv[1:]] if path else None


# Fit to be a script's argument: no control character, no half surrogate.
FIT = r"[^\0-\x1f\x7f\ud800-\udfff]+"
HEADER = rf"(?i)(?!({b'|'.join(HOP_BY_HOP).decode()}):)[!#$%&'*+.^_`|~0-9a-z-]+: [\t -~]*"
TEXT = Kind("a text", FIT)
LOADABLE = Kind('a text other than "status" and "unload"', rf"(?i)(?!(status|unload)\Z){FIT}")
TEXTS = Kind("a list of texts", FIT, list)
ROUTES = Kind("a list of paths such as /v1/embeddings", r"[^\s?#*:]+", list)
TRUTH = Kind("true or false", bool, bool)
OBJECT = Kind("an object", dict, dict)
HEADERS = Kind("headers, none that jano makes, and their ASCII texts", HEADER, dict, is_secret=True)
ADDRESS = Kind("an http or https address such as http://127.0.0.1:8081", address)
KEY = Kind("printable text, no spaces around it", rf"(?!\s)({FIT})?(?<!\s)", is_secret=True)
FILE = Kind("a path", lambda text: os.path.abspath(os.path.expanduser(text)))
SCRIPT = Kind("the path of your swap script, executable (chmod +x), without $VARIABLES", command)
ORIGINS = Kind("* or origins such as http://localhost:*", lambda text: each_of(text, origin_regex))
HOSTS = Kind("host names such as box.lan, or [::1]", lambda text: each_of(text, host_name))
HOST = Kind("a name or address such as ::1", r"(?i)[\w.-]+|[\da-f]*:[\da-f]*:[\da-f:.]*(%\w+)?")
milliseconds = functools.partial(number, unit=1 / 1000)


def option(kind: Kind, default: Any = None, variable: str = "") -> Any:
    """A field: how its value is read; and the value if there is none, for a variable as a text."""
    return field(metadata={"kind": kind, "default": default, "variable": variable})


@dataclass(frozen=True)
class Settings:
    """The variables of the environment or .env as they are used: times in seconds."""

    swap_command: list[str] = option(SCRIPT, None, "SWAP_COMMAND")
    models_file: str = option(FILE, "./models.json", "MODELS_FILE")
    host: str = option(HOST, "127.0.0.1", "JANO_HOST")
    port: int = option(number(0, 65535), "8082", "JANO_PORT")
    swap_wait_timeout: float = option(milliseconds(1), "180000", "SWAP_WAIT_TIMEOUT_MS")
    health_poll_interval: float = option(milliseconds(1), "1000", "HEALTH_POLL_INTERVAL_MS")
    request_timeout: float = option(milliseconds(1), "600000", "REQUEST_TIMEOUT_MS")
    max_turn: float = option(milliseconds(0), "60000", "MAX_TURN_MS")
    linger: float = option(milliseconds(0), "5000", "LINGER_MS")
    swap_failure_limit: int = option(number(1), "3", "SWAP_FAILURE_LIMIT")
    swap_failure_reset: float = option(milliseconds(0), "300000", "SWAP_FAILURE_RESET_MS")
    max_queue: int = option(number(1), "1000", "MAX_QUEUE")
    max_body_mb: int = option(number(1), "256", "MAX_BODY_MB")
    heartbeat: float = option(milliseconds(0), "15000", "HEARTBEAT_MS")
    idle_unload: float = option(milliseconds(0), "0", "IDLE_UNLOAD_MS")
    api_key: str = option(KEY, "", "JANO_API_KEY")
    cors_origins: list[str] = option(ORIGINS, "", "JANO_CORS_ORIGINS")
    allowed_hosts: list[str] = option(HOSTS, "", "JANO_ALLOWED_HOSTS")
    usage_records_max: int = option(number(1), "500", "USAGE_RECORDS_MAX")
    shutdown_timeout: float = option(milliseconds(0), "30000", "SHUTDOWN_TIMEOUT_MS")

    def netloc(self, port: int) -> str:
        """Host and port, as they stand in an address."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


@dataclass(frozen=True, eq=False)
class Model:
    """An entry of models.json; the fields are its keys."""

    name: str = option(LOADABLE)
    url: SplitResult = option(ADDRESS)
    aliases: list[str] = option(TEXTS, [])
    label: str = option(TEXT, "")
    group: str = option(TEXT, "default")
    set: str = option(LOADABLE, "")
    slots: int = option(number(1, json_type=int), 1)
    passthrough: bool = option(TRUTH, False)
    endpoints: list[str] = option(ROUTES, [])
    upstream_model: str = option(TEXT, "")
    health: str = option(Kind("a path such as /health", r"/[^\s#\0-\x1f\x7f]*"), "/health")
    headers: dict[str, str] = option(HEADERS, {})
    unlisted: bool = option(TRUTH, False)
    metadata: dict[str, Any] = option(OBJECT, {})

    @property
    def set_name(self) -> str:
        """What SWAP_COMMAND loads for it: its set, or else itself."""
        return self.set or self.name

    @property
    def keys(self) -> frozenset[str]:
        """Its names as they are looked up: in any case."""
        return frozenset(name.casefold() for name in (self.name, *self.aliases))


def load_settings(environ: Mapping[str, str]) -> Settings:
    """From environ, else ./.env, else the defaults; empty means unset. Raises ConfigError."""
    names = "|".join(each.metadata["variable"] for each in fields(Settings))
    file = Path(".env")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines() if file.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(".env", why(error), "KEY=value lines") from None
    dotenv: dict[str, str] = {}
    for index, line in enumerate(lines, 1):
        match = re.match(rf"""\s*(?:export\s+)?(["']?)({names})\b(\s*=)?(.*)""", line)
        if match:
            mark, name, equals, text = match.groups()
            if mark or not equals:
                raise ConfigError(f".env: line {index}", f"{name} without =", "KEY=value")
            inner = re.fullmatch(r"""(["'])((?:(?!\1).)*)\1(\s+#.*)?""", text.strip())
            dotenv[name] = inner[2] if inner else re.sub(r"\s+#.*", "", text).strip()
    values: dict[str, Any] = {}
    for each in fields(Settings):
        kind, default, name = each.metadata.values()
        text = environ.get(name) or dotenv.get(name) or default
        if text is None:
            raise ConfigError(f"{name}: not set", f"none in {os.getcwd()}/.env", kind.expected)
        where = "environment" if environ.get(name) else ".env"
        values[each.name] = kind.read(f"{where}: {name}", text)
    return Settings(**values)


def load_models(settings: Settings) -> list[Model]:
    """The entries of MODELS_FILE, in its order. Raises ConfigError."""
    file = settings.models_file
    try:
        registry = json.loads(Path(file).read_bytes(), object_pairs_hook=unique)
        json.dumps(registry, allow_nan=False)  # fails for NaN and 1e400, which loads takes
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(file, why(error), "a JSON file such as models.example.json") from None
    keys = [*registry] if isinstance(registry, dict) else []
    if keys != ["models"] or not isinstance(registry["models"], list):
        raise ConfigError(file, f"the keys {shown(keys)}", '{"models": [ … ]} and nothing else')
    models: list[Model] = []
    table = {each.name: each.metadata.values() for each in fields(Model)}
    for index, entry in enumerate(registry["models"]):
        where = f"{file}: models[{index}]"
        OBJECT.read(where, entry)
        where += f" {shown(entry['name'])}" if "name" in entry else ""
        for key in entry.keys() - table.keys():
            raise ConfigError(where, f"the key {shown(key)}", f"one of {', '.join(table)}")
        values = {}
        for key, (kind, default, _) in table.items():
            if key not in entry and default is None:
                raise ConfigError(f"{where}: {key}", "it missing", kind.expected)
            values[key] = kind.read(f"{where}: {key}", entry[key]) if key in entry else default
        if values["passthrough"]:
            values["group"] = ""  # it is of none
        model = Model(**values)
        check_model(where, model, models, settings)
        models.append(model)
    if all(model.passthrough for model in models):
        raise ConfigError(f"{file}: models", "none to swap", "one that is not passthrough")
    return models


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if a key is in it twice."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {shown(key)} twice in an object")
    return dict(pairs)


def check_model(where: str, model: Model, earlier: list[Model], settings: Settings) -> None:
    """What an entry must not share with jano or with an earlier one. Raises ConfigError."""
    url, host = model.url, settings.host.lower()
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    same_host = url.hostname == host or {url.hostname, host} <= LOOPBACK | {"0.0.0.0", "::"}
    if same_host and port == settings.port:
        raise ConfigError(f"{where}: url", f"{shown(url.geturl())}, jano itself", "a backend")
    if model.set and model.passthrough:
        raise ConfigError(f"{where}: set", "it with passthrough", "one of the two")
    for other in earlier:
        for name in model.keys & other.keys:
            expected = f"none that {shown(other.name)} has, in any case"
            raise ConfigError(where, f"the name {shown(name)}", expected)
        shared = {model.name, model.set} & {other.name, other.set} - {""}
        if shared and (model.group, model.set) != (other.group, other.set):
            found = f"{shown(min(shared))}, which means something else at {shown(other.name)}"
            raise ConfigError(f"{where}: set", found, "another name, or the same set and group")


def shown(value: object, is_secret: bool = False) -> str:
    """A value as JSON, without what may be a password or key, cut to what fits into a line."""
    brief = value[:999] if isinstance(value, str) else value
    line = re.sub('(?<=//)[^/@":]*:[^/@"]+@', "...@", json.dumps(brief))
    if is_secret:  # then names are shown alone
        line = re.sub(r'"(?:\\.|[^"\\])*"(:?)', lambda hit: hit[0] if hit[1] else '"..."', line)
    return line if len(line) <= 80 else line[:80] + "…"


def why(error: BaseException) -> str:
    """An exception in words."""
    first = re.search(r"\[Errno ([0-9]+)\]", str(error))  # of several, where asyncio tried them
    code = getattr(error, "errno", None) or (int(first[1]) if first else 0)
    if code > 1:  # OpenSSL's are all 1
        return os.strerror(code)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ------------------------------------------------------------------------------- telemetry ----

BUCKETS = ("0.5", "1", "2", "5", "10", "20", "30", "60", "120", "300", "+Inf")  # seconds of a swap
compact = json.JSONEncoder(separators=(",", ":")).encode
quoted = json.encoder.encode_basestring_ascii
# What the log tells is of these types, mostly; `compact` takes ten times as long.
ENCODERS: dict[type, Any] = {str: quoted, int: str, bool: {False: "false", True: "true"}.get}


class Log:
    """One compact JSON object a line, on stdout. Never a prompt, an answer, a header or a key.

    Whoever reads it cannot stop jano: a pipe that nobody empties, a full disk, a closed stdout lose
    lines, and the next line that can be written is preceded by how many.
    """

    def __init__(self) -> None:
        self.lost = 0
        self.broken = ""  # a newline, if the last line is not whole
        self.is_file = os.path.isfile(1)  # then it is always ready
        self.ready = select.poll()
        self.ready.register(1, select.POLLOUT)

    def __call__(self, level: str, msg: str, **facts: object) -> None:
        if self.lost:
            lost, self.lost = self.lost, 0
            self("warn", "log lines lost", lost=lost)
            if self.lost:  # that line, too: it stands for this one, which is not written
                self.lost += lost
                return
        line = f'{{"t":"{utc(time.time())}","level":"{level}","msg":"{msg}"'
        for name, value in facts.items():
            encode = ENCODERS.get(type(value), compact)
            line += f',"{name}":{encode(value)}'
        rest = data = f"{self.broken}{line}}}\n".encode()
        try:  # what is ready takes PIPE_BUF bytes at once
            while rest and (self.is_file or self.ready.poll(0)):
                rest = rest[os.write(1, rest[: select.PIPE_BUF]) :]
        except OSError:
            pass  # the rest is lost
        if len(rest) < len(data):
            self.broken = "\n" if rest else ""
        self.lost += bool(rest)


log = Log()


@functools.lru_cache(4)
def gmt(form: str, second: int) -> str:
    return time.strftime(form, time.gmtime(second))


def utc(epoch: float) -> str:
    """As RFC 3339 has it, with milliseconds."""
    return f"{gmt('%Y-%m-%dT%H:%M:%S', int(epoch))}.{int(epoch * 1000) % 1000:03d}Z"


KEEP = 2**13  # bytes at either end of an answer, where its token counts stand
HINTS = (b'"usage"', b'"timings"', b'"prompt_eval_count"', b'"eval_count"')
# A name and its number, unless that is too large for a count or a speed, such as 1e999.
NUMBER = re.compile(
    rb'"(\w++)"\s*:\s*([0-9]{1,15}(?:\.[0-9]{1,20})?(?:[eE][-+]?0?[0-9])?)(?![\w.])'
)
COUNTS = {  # in /usage -> in answers of llama.cpp, Ollama, Anthropic, OpenAI; the last one counts
    "prompt_tokens": (b"prompt_n", b"prompt_eval_count", b"input_tokens", b"prompt_tokens"),
    "gen_tokens": (b"predicted_n", b"eval_count", b"output_tokens", b"completion_tokens"),
}
RATES = {  # in /usage -> in answers of llama.cpp; or of Ollama: a number, and its nanoseconds
    "gen_tok_s": (b"predicted_per_second", b"eval_count", b"eval_duration"),
    "prompt_tok_s": (b"prompt_per_second", b"prompt_eval_count", b"prompt_eval_duration"),
}


def token_counts(excerpt: bytes | bytearray) -> dict[str, float | None]:
    """As /usage has them, from both ends of an answer; None where the backend does not say.

    It is not parsed, as its middle is gone. But what reads `"eval_count": 1` is no part of a text,
    where quotes are escaped.
    """
    starts = {*map(excerpt.find, HINTS)} - {-1}
    at = min(starts, default=len(excerpt))  # as the pattern is slow
    numbers = dict(NUMBER.findall(excerpt, at))  # the last of a name counts, as streams add up
    tokens: dict[str, float | None] = dict.fromkeys((*COUNTS, *RATES))
    for meaning, names in COUNTS.items():
        for name in names:
            if name in numbers:
                tokens[meaning] = int(float(numbers[name]))
    for meaning, (rate, count, duration) in RATES.items():
        nanoseconds = float(numbers.get(duration, 0))
        if nanoseconds:
            numbers.setdefault(rate, float(numbers.get(count, 0)) / nanoseconds * 1e9)
        if rate in numbers:
            tokens[meaning] = round(float(numbers[rate]), 1)
    return tokens


class Telemetry:
    """What has happened since the start, in bounded memory however long that was."""

    def __init__(self, records_max: int) -> None:
        self.started = time.time()
        self.records: deque[dict[str, Any]] = deque(maxlen=records_max)  # of /usage, oldest first
        self.requests: Counter[tuple[str, int]] = Counter()  # by model and status
        self.tokens: Counter[str] = Counter()  # generated, by model
        self.prompt_tokens: Counter[str] = Counter()
        self.rates: dict[str, deque[float]] = {}  # model -> tokens a second of its last answers
        self.last_error: dict[str, Any] | None = None
        self.health: dict[str, str] = {}  # model -> "up", "down" or "unknown", as it is by default
        self.load_times: dict[str, str] = {}  # set -> when it was last loaded
        self.swaps: Counter[tuple[str, str]] = Counter()  # by from and to, the good ones
        self.swap_failures: Counter[str] = Counter()
        self.recent_swaps: deque[dict[str, Any]] = deque(maxlen=50)
        self.swap_buckets = dict.fromkeys(BUCKETS, 0)  # bound -> good ones that took no longer
        self.swap_seconds = 0.0  # of the good ones

    def settled(self, call: Call, now: float, failure: str) -> None:
        """Count a request that is over; now is on the clock."""
        model, code = call.model, call.outcome or 0
        granted = call.granted or now
        record: dict[str, Any] = {
            "ts": time.time(),
            "id": call.id,
            "model": model,
            "path": call.request.path,
            "status": code,
            "queue_ms": round(1000 * (granted - call.arrived)),
            "total_ms": round(1000 * (now - call.arrived)),
            "ttfb_ms": round(1000 * (call.first_byte - granted)) if call.first_byte else None,
            **token_counts(call.excerpt or b""),
        }
        generated = record["gen_tokens"] or 0
        if record["gen_tok_s"] is None and generated and call.stream and call.first_byte:
            took = now - call.first_byte
            record["gen_tok_s"] = round(generated / took, 1) if took >= 0.05 else None  # in one go
        self.records.append(record)
        self.requests[model, code] += 1
        if code >= 500:
            words = failure or f"the backend answered {code}"
            self.last_error = {"ts": utc(record["ts"]), "model": model, "message": words}
        if code in (502, 504):
            self.health[model] = "down"
        if 200 <= code < 300:
            self.health[model] = "up"
            self.tokens[model] += generated
            self.prompt_tokens[model] += record["prompt_tokens"] or 0
            if record["gen_tok_s"] is not None:
                self.rates.setdefault(model, deque(maxlen=30)).append(record["gen_tok_s"])

    def note_health(self, models: list[Model], health: str) -> None:
        self.health |= {model.name: health for model in models}

    def swapped(self, worker: Worker, old: str | None, name: str, seconds: float, ok: bool) -> None:
        """A swap has ended, well or not."""
        swap = {"ts": time.time(), "from": old, "to": name, "ms": round(1000 * seconds), "ok": ok}
        self.recent_swaps.append(swap)
        self.note_health(worker.members(name), "up" if ok else "down")
        if ok:
            self.load_times[name] = utc(time.time())
            self.swaps[old or "", name] += 1
            self.swap_seconds += seconds
            for bound in BUCKETS:
                self.swap_buckets[bound] += seconds <= float(bound)
        else:
            self.swap_failures[name] += 1


def snapshot(jano: Jano) -> dict[str, Any]:
    """The payload of /health and /status."""
    now, telemetry, models = clock(), jano.telemetry, jano.models
    active = [call for call in jano.calls if call.outcome is None]
    waiting = [call for call in active if not call.running]
    queued = Counter(call.model for call in waiting)
    used = [model.group for model in models.values() if model.group]
    groups = {group: group_status(jano, group) for group in dict.fromkeys(used)}
    served = Counter(dict.fromkeys(models, 0))
    for (model, code), count in telemetry.requests.items():
        served[model] += count if 200 <= code < 300 else 0
    made = telemetry.swaps.total()
    naive = sum(worker.naive_swaps for worker in jano.workers.values())
    avoided = max(0, naive - made - telemetry.swap_failures.total())
    took = [swap["ms"] for swap in telemetry.recent_swaps if swap["ok"]]
    rates = {model: round(sum(last) / len(last), 1) for model, last in telemetry.rates.items()}
    return {
        "ok": not any(worker.refusal for worker in jano.workers.values()),
        **next(iter(groups.values())),  # the first group's; sums stand in place of its counts
        "queueDepth": len(waiting),
        "inFlight": len(active) - len(waiting),
        "queueByModel": {model: queued[model] for model in models},
        "oldestWaitingMs": round(1000 * (now - waiting[0].arrived)) if waiting else 0,
        "lastSwapDurationMs": took[-1] if took else None,
        "recentSwaps": [{**swap, "ts": utc(swap["ts"])} for swap in telemetry.recent_swaps],
        "swapsTotal": made,
        "swapsAvoided": avoided,
        "swapTimeSavedMs": round(1000 * avoided * telemetry.swap_seconds / made) if made else None,
        "tokSByModel": rates,
        "uptimeSeconds": int(time.time() - telemetry.started),
        "requestsServedTotal": served.total(),
        "requestsByModel": served,
        "tokensGeneratedTotal": telemetry.tokens.total(),
        "tokensByModel": {model: telemetry.tokens[model] for model in models},
        "lastError": telemetry.last_error,
        "backendHealth": {model: telemetry.health.get(model, "unknown") for model in models},
        "active": [call_status(call, now) for call in active[:200]],
        **({"groups": groups} if len(groups) > 1 else {}),
    }


def call_status(call: Call, now: float) -> dict[str, Any]:
    return {
        "id": call.id,
        "model": call.model,
        "state": "running" if call.running else "waiting",
        "queue_ms": round(1000 * ((call.granted or now) - call.arrived)),
        "total_ms": round(1000 * (now - call.arrived)),
    }


def group_status(jano: Jano, group: str) -> dict[str, Any]:
    worker = jano.workers[group]
    loaded = worker.schedule.loaded
    return {
        "currentModel": loaded,
        "currentModelLoadedAt": jano.telemetry.load_times.get(loaded or ""),
        "loadedModels": [model.name for model in worker.members(loaded)],
        "swapping": worker.swapping,
        "queueDepth": sum(map(len, worker.schedule.queues.values())),
        "inFlight": len(worker.schedule.in_flight),
    }


def metrics(jano: Jano) -> web.Response:
    """status, and what it leaves out, as Prometheus text (exposition format 0.0.4)."""
    telemetry, payload, models = jano.telemetry, snapshot(jano), jano.models
    loaded = {name: int(jano.state_of(model) == "loaded") for name, model in models.items()}
    up = {name: int(health == "up") for name, health in payload["backendHealth"].items()}
    saved = {} if payload["swapTimeSavedMs"] is None else {"": payload["swapTimeSavedMs"] / 1000}
    families: list[tuple[str, str, str, Mapping[Any, object]]] = [
        # Name and labels, type, help; the values of the labels -> that of the metric.
        ("uptime_seconds", "gauge", "Since the start.", {"": time.time() - telemetry.started}),
        ("in_flight", "gauge", "Requests at a backend.", {"": payload["inFlight"]}),
        ("model_loaded model", "gauge", "1: it is loaded.", loaded),
        ("queue_depth model", "gauge", "Requests that wait.", payload["queueByModel"]),
        ("requests_total model status", "counter", "Requests that are over.", telemetry.requests),
        ("tokens_generated_total model", "counter", "Tokens of answers.", telemetry.tokens),
        ("prompt_tokens_total model", "counter", "Tokens of prompts.", telemetry.prompt_tokens),
        ("generation_tokens_per_second model", "gauge", "Lately.", payload["tokSByModel"]),
        ("swaps_total from to", "counter", "Swaps made.", telemetry.swaps),
        ("swap_failures_total model", "counter", "Swaps failed.", telemetry.swap_failures),
        ("swaps_avoided", "gauge", "By the queue.", {"": payload["swapsAvoided"]}),
        ("swap_time_saved_seconds", "gauge", "Avoided swaps times their mean.", saved),
        ("backend_up model", "gauge", "1: it was fine when last heard of.", up),
        ("swap_duration_seconds", "histogram", "From the script's start until ready.", {}),
    ]
    lines = []
    for name_and_labels, kind, text, samples in families:
        name, *labels = name_and_labels.split()
        lines += [f"# HELP jano_{name} {text}", f"# TYPE jano_{name} {kind}"]
        for key, value in samples.items():
            values = key if isinstance(key, tuple) else (key,)
            # JSON escapes what this format does, since names of models hold no control character.
            texts = [json.dumps(str(each), ensure_ascii=False) for each in values]
            pairs = ",".join(map("=".join, zip(labels, texts)))
            lines.append(f"jano_{name}{{{pairs}}} {value}" if pairs else f"jano_{name} {value}")
    for bound, count in telemetry.swap_buckets.items():
        lines.append(f'jano_swap_duration_seconds_bucket{{le="{bound}"}} {count}')
    lines.append(f"jano_swap_duration_seconds_sum {telemetry.swap_seconds}")
    lines.append(f"jano_swap_duration_seconds_count {payload['swapsTotal']}")
    headers = {"Content-Type": "text/plain; version=0.0.4"}
    return web.Response(text="\n".join([*lines, ""]), headers=headers)


# ------------------------------------------------------------------------------------ page ----

CSS = """:root { color-scheme: light dark; background: Canvas; font: 1rem/1.4 system-ui }
body { max-width: 66rem; margin: auto; padding: 1rem; overflow-wrap: anywhere } h1, h2 { margin: 0 }
h2 { color: light-dark(#00704a, #6fd3a5) } #down { color: light-dark(#b3261e, #ff8a80) }
.c0 { --hue: 255 } .c1 { --hue: 55 } .c2 { --hue: 310 } .c3 { --hue: 200 } .bad { --hue: 25 }
li, rect { --ink: light-dark(oklch(64% .14 var(--hue)), oklch(53% .14 var(--hue))) }
ul { display: flex; flex-flow: wrap; gap: 9px; padding: 0; list-style: none } form { float: right }
li { flex: 1 15rem; border-left: .5rem solid var(--ink); padding: .4rem .7rem; background: #8882 }
rect { stroke-width: 2 } .swap { overflow: visible } .swap rect { fill: #8883; stroke: none }
rect { width: 100%; height: 100%; stroke: var(--ink); fill: none } rect + rect { fill: var(--ink) }
body > svg { width: 100%; margin-top: 1em; background: #8881; fill: CanvasText; font-size: 12px }"""
JS = """async function refresh() {
  const answer = await fetch("/", {signal: AbortSignal.timeout(9e3)}); if (!answer.ok) throw answer;
  const next = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (document.querySelector("button:active") || next.body.isEqualNode(document.body)) return;
  const id = document.activeElement.id; document.title = next.title; document.body = next.body;
  document.getElementById(id)?.focus({preventScroll: true});
} setInterval(() => document.hidden || refresh().catch(() => down.hidden = false), 1000)"""
HASHES = [base64.b64encode(sha256(part.encode()).digest()).decode() for part in (CSS, JS)]
CSP = "default-src 'none'; connect-src 'self'; form-action 'self'; img-src data:; base-uri 'none'; "
CSP += f"frame-ancestors 'none'; style-src 'sha256-{HASHES[0]}'; script-src 'sha256-{HASHES[1]}'"
PAGE_HEADERS = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": CSP}
PAGE_HEADERS |= {"Cache-Control": "no-cache"}


def page(jano: Jano) -> web.Response:
    """HTML: what is loaded, who waits, and who was served when."""
    payload, heads, cards = snapshot(jano), [], ""
    for index, model in enumerate(islice(jano.models.values(), 50)):
        name, state = model.name, jano.state_of(model)
        group = f"{isolated(model.group)}: " if model.group and len(jano.workers) > 1 else ""
        verb = "unload" if state == "loaded" else "load"
        if state != "unloaded":
            heads.append(f"{group}{isolated(name)} is {state}")
        cards += f"""<li class="c{index % 4}"><form method="post" {"hidden" * model.passthrough}
action="/{verb}?model={quote(name, "")}"><button id="b{index}" aria-label="{verb} {isolated(name)}">
{verb}</button></form><b dir="auto">{escape(name[:200])}</b><br>{group}{state},
{payload["queueByModel"][name]} waiting, {payload["requestsByModel"][name]} answered"""
    heading = "; ".join(heads) or "nothing is loaded"
    html = f"""<!doctype html><html lang="en"><link rel="icon" href="data:,"><style>{CSS}</style>
<script>{JS}</script><meta name="viewport" content="width=device-width"><title>{heading}, \
{payload["queueDepth"]} waiting · jano</title><body>
<div id="down" role="alert" {"hidden" * payload["ok"]}>jano does not answer</div><h1>{heading}</h1>
<h2>Swaps avoided: {payload["swapsAvoided"]}, about
{(payload["swapTimeSavedMs"] or 0) / 1000:.1f} s saved</h2>
Swaps made: {payload["swapsTotal"]}, waiting: {payload["queueDepth"]}, running:
{payload["inFlight"]}, answered: {payload["requestsServedTotal"]}
{timeline(jano, payload["active"])}<ul>{cards}</ul>{len(jano.models)} models"""
    return web.Response(text=html, headers=PAGE_HEADERS)


def isolated(name: str) -> str:
    """As text for HTML, cut to fit, in a writing direction of its own (Unicode, UAX 9)."""
    return escape(f"\u2068{name if len(name) < 30 else name[:29] + '…'}\u2069")


def timeline(jano: Jano, active: list[dict[str, Any]]) -> str:
    """An SVG: a lane for each model with its latest requests, and a stripe for each swap."""
    now = time.time()
    bars = [*active[:30], *islice(reversed(jano.telemetry.records), 60)][:60]
    if not bars:
        ask = {"model": next(iter(jano.models)), "messages": [{"role": "user", "content": "Hi"}]}
        return f"""<p><code>curl http://{jano.settings.netloc(jano.port)}/v1/chat/completions --json
{escape(shlex.quote(json.dumps(ask)))}</code>"""
    swaps = list(jano.telemetry.recent_swaps)
    for worker in filter(attrgetter("swapping"), jano.workers.values()):
        took = 1000 * (clock() - worker.swap_began)
        swaps.append({"from": "", "to": worker.swapping, "ms": took})
    for swap in swaps:
        label = f"{isolated(swap['from'] or '')} → {isolated(swap['to'])} {swap['ms'] / 1000:.1f} s"
        bars.append({**swap, "model": "", "id": label, "total_ms": swap["ms"]})
    spans = [(bar.get("ts", now) - bar["total_ms"] / 1000, bar.get("ts", now), bar) for bar in bars]
    spans.sort(key=itemgetter(0))
    last = max(end for _, end, _ in spans)
    scale = min(300, last - spans[0][0] + 0.1)  # seconds
    drawn, y = "", 0
    for index, name in enumerate(["", *jano.models], -1):  # "": of the swaps
        taken: list[float] = []  # of each row: up to where, in % of the width
        for start, end, bar in spans:
            if bar["model"] == name and end > last - scale:
                x, width = 88 * (1 - (last - start) / scale), max(0.3, 88 * (end - start) / scale)
                row = next((row for row, busy in enumerate(taken) if busy <= x), len(taken))
                taken[row : row + 1] = [x + (width if name else 75)]  # this row, or one more
                wait = round(100 * bar.get("queue_ms", 0) / max(bar["total_ms"], 1), 1)  # in %
                bad = bar.get("status", 200) >= 400 or not bar.get("ok", True)
                drawn += f"""<svg class="{f"c{index % 4}" if name else "swap"} {"bad" * bad}"
x="{x:.2f}%" y="{y + 20 + 16 * row}" width="{width:.2f}%" height="{13 if name else "100%"}"><rect/>
<rect x="{wait}%"/><text x="{wait % 100}%" dx="3" y="11">{"✕" * bad}{bar["id"]}</text></svg>"""
        if taken:
            drawn += f'<text x="8" y="{y + 14}">{isolated(name) if name else "swaps"}</text>'
            y += 24 + 16 * len(taken)
    return f"""<svg role="img" height="{y}" aria-label="Timeline">{drawn}</svg>{scale:.0f} s until
{time.strftime("%X %Z", time.localtime(last))}: hollow waits, solid runs, ✕ failed, grey swaps"""


# ---------------------------------------------------------------------------- app and main ----

# What is worked around in aiohttp 3.14: its server writes an answer once the handler has returned
# it, while jano writes by itself and hands back one that is out; its errors have no shape of ours.


class Written(web.StreamResponse):
    """For aiohttp's server: an answer that is out already."""

    keep_alive = False  # a property in the base class

    async def write_eof(self, *_: Any, **__: Any) -> None:
        """Nothing is left to do."""

    prepare = write_eof


WRITTEN = {False: Written(), True: Written()}  # by whether the connection is kept
WRITTEN[True].keep_alive = True


class Connection(web.RequestHandler):
    """aiohttp's HTTP; but its own errors take an API's shape, and quote no client in the log."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: Any = None, message: Any = None
    ) -> web.StreamResponse:
        level, msg = ("error", "handler failed") if status >= 500 else ("warn", "bad request")
        log(level, msg, error=kind_of(exc))
        text, code = "this is not valid HTTP; jano does not speak https", "invalid_http"
        if isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
            status, text, code = 431, "the headers are larger than 64 kB", "headers_too_large"
        elif isinstance(exc, ContentEncodingError):  # br or zstd, without their packages
            text, code = "send the body as gzip, deflate or plain", "invalid_body"
        elif status >= 500:
            text, code = "jano failed; its log says where", "bug"
        response = ApiError(status, text, code).response(request)
        response.force_close()
        return response


def kind_of(error: BaseException | None) -> str:
    """An exception's type and place. Not its message, which may quote a client or a backend."""
    trace = traceback.extract_tb(error.__traceback__ if error else None)
    place = f" at {trace[-1].name}:{trace[-1].lineno}" if trace else ""
    return type(error).__name__ + place


def abort(request: web.BaseRequest) -> None:
    """Reset the connection: with its plain end, a cut HTTP/1.0 answer would look whole."""
    if request.transport:
        client = request.transport.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()


async def run(settings: Settings, models: list[Model]) -> int:
    """Serve until a signal. The exit code."""
    loop = asyncio.get_running_loop()
    jano = Jano(settings)
    make_request = functools.partial(web.BaseRequest, loop=loop)
    server = web.Server(jano.handle, request_factory=make_request, handler_cancellation=True)
    accept = functools.partial(Connection, server, loop=loop, access_log=cast(Any, None), **LIMITS)
    try:  # the port first: a second jano shall not even call `SWAP_COMMAND status`
        listener = await loop.create_server(accept, settings.host, settings.port, backlog=1024)
    except (OSError, UnicodeError) as error:
        return await explain_port(settings, error)
    jano.port = listener.sockets[0].getsockname()[1]
    addresses = {listening.getsockname()[0] for listening in listener.sockets}
    # JANO_HOST does not tell: it may be 0x7f.1, or the machine's name, which often is loopback.
    if all(each == "::1" or each.startswith("127.") for each in addresses):
        own_names = {settings.host.lower(), socket.gethostname().lower()} - {""}
        jano.hosts = LOOPBACK | addresses | own_names | {*settings.allowed_hosts}
    jano.adopt(models)
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(each, on_signal, jano, each)
    log("info", "jano listening", host=settings.host, port=jano.port, models=list(jano.models))
    if not (jano.hosts or settings.api_key):
        log("warn", "everybody who reaches this host may ask: set JANO_API_KEY")
    await jano.stopping.wait()
    for worker in jano.workers.values():  # what is queued fails; what is in flight may finish
        worker.close(SHUTTING_DOWN)
    if jano.calls:
        await asyncio.wait(jano.calls.values(), timeout=settings.shutdown_timeout)
    listener.close()  # not before: the next jano shall not swap while this one still forwards
    for task in jano.calls.values():  # before aiohttp does, which first drops their connections
        task.cancel()
    await server.shutdown(0.1)
    for upstream in [*chain(*jano.idle.values())]:
        upstream.close()
    await asyncio.sleep(0)  # until what has been closed is
    payload = snapshot(jano)
    facts = {"served": payload["requestsServedTotal"], "swaps": payload["swapsTotal"]}
    facts |= {name: payload[name] for name in ("swapsAvoided", "swapTimeSavedMs")}
    log("info", "jano stopped", **facts)
    return 0


def on_signal(jano: Jano, received: signal.Signals) -> None:
    """SIGHUP: read models.json again; one with a fault changes nothing. Else stop."""
    log("info", "received signal", sig=received.name)
    if received != signal.SIGHUP:
        if jano.stopping.is_set():
            os._exit(1)  # it was told twice
        jano.stopping.set()
    elif not jano.stopping.is_set():
        try:
            jano.adopt(load_models(jano.settings))
            log("info", "models reloaded", models=list(jano.models))
        except ConfigError as error:
            log("error", "models not reloaded", fault=str(error))


async def explain_port(settings: Settings, error: Exception) -> int:
    """The exit code: 0 if another jano answers (cron starts one a minute), 1 if in use, else 2."""
    place = settings.netloc(settings.port)  # 0.0.0.0 and :: reach this machine, too
    elsewhere = getattr(error, "errno", 0) == errno.EADDRNOTAVAIL  # an address of another machine
    with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
        limit = aiohttp.ClientTimeout(total=5)
        async with aiohttp.request("GET", f"http://{place}/health", timeout=limit) as answer:
            if answer.headers.get("Server", "").startswith("jano/") and not elsewhere:
                state = "has not stopped yet" if answer.status == 503 else "answers already"
                log("info", f"another jano {state}", address=place)
                return int(answer.status == 503)
    print(f"jano: cannot listen on {place}: {why(error)}; no jano answers there", file=sys.stderr)
    return 1 if getattr(error, "errno", 0) == errno.EADDRINUSE else 2


class LibraryLog(logging.Handler):
    """The complaints of aiohttp and asyncio, without the bytes that they quote."""

    last = ("", 0)  # place and second: while no file is free, asyncio complains a thousand times

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        place = kind_of(error) if error else f"{record.module}:{record.lineno}"
        this = (place, int(record.created))
        # RequestPayloadError is a client's fault, and refused.
        if this != self.last and not isinstance(error, web.RequestPayloadError):
            log("warn", "complaint of a library", library=record.name, error=place)
        self.last = this


def main() -> int:
    parser = argparse.ArgumentParser(
        description="One OpenAI-compatible front door for local models that share one memory.",
        epilog="Settings: the environment or ./.env, and models.json; the README lists them.",
    )
    parser.add_argument("--check", action="store_true", help="check the configuration, then exit")
    parser.add_argument("--version", action="version", version=f"jano {__version__}")
    options = parser.parse_args()
    while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a standard stream was closed (>&-), and a socket must not get its number
    os.close(unused)
    with contextlib.suppress(OSError):  # a terminal that nobody reads says it is ready, and blocks
        os.dup2(os.open(os.ttyname(1), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), 1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, every script's exit code is 0
    logging.basicConfig(handlers=[LibraryLog()], level=logging.WARNING)
    try:
        settings = load_settings(os.environ)
        models = load_models(settings)
    except (ConfigError, OSError) as error:
        gone = isinstance(error, OSError)
        print(f"the working directory: {why(error)}" if gone else error, file=sys.stderr)
        return 2
    if options.check:
        print(f"jano: the configuration is fine: {json.dumps([model.name for model in models])}")
        return 0
    import resource  # not above: there, Windows would fail before it is told why

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 10_240:  # a Mac's 256 open files would be gone before MAX_QUEUE is reached
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(10_240, hard), hard))
    return asyncio.run(run(settings, models))


if __name__ == "__main__":
    sys.exit(main())
