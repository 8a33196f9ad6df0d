"""Does the policy keep its promises? Jano's own Schedule, in virtual time.

    python bench/policy.py [--quick] [--scenario NAME]
    python bench/policy.py --trace FILE [--load SECONDS]

Every scenario plays the same requests under three policies:

    fifo     strictly in order of arrival
    greedy   MAX_TURN_MS=0: the loaded model's requests first, with no ceiling
    jano     the defaults: MAX_TURN_MS=60000, LINGER_MS=5000

The simulated worker does what the real one does: whatever happens, it calls Schedule.advance, and
swaps when a swap is due and nothing is in flight. A service takes its time however many run beside
it, and scripts never fail. At the start nothing is loaded and no cost is known, unless a title says
otherwise. A trace file has a line `arrival,model,service` for each request, in seconds; lines that
begin with # are skipped.

wait          seconds from arrival to turn; who has none at the end has waited until then
latency       seconds from arrival to the end of the service
in swaps      share of the whole time in which a model loads; a drain is service and does not count
forced swap   one that begins while the model that goes has tickets in the queue
model's wait  from when a model is asked for and not loaded, until it is loaded
utilisation   seconds of service asked for each second; swaps come on top

Exit code 1: a figure at the end is missed. 2: a case computed by hand comes out otherwise, and
then no figure means anything.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Figure, table, verdict

from jano import Schedule, Ticket

# ----------------------------------------------------------------------------- simulation ----

Span = tuple[float, float]  # seconds, drawn evenly from between the two


@dataclass(frozen=True)
class Client:
    """Asks once; or, if it has a think time, again and again, so long after each answer.

    Without a turn within its time-out it gives up; if it has a think time, it asks again at once.
    """

    model: str
    start: float
    service: Span
    think: Span | None = None
    time_out: float = math.inf
    helper: Client | None = None  # asks once, a little before each request of this client


@dataclass(frozen=True)
class Work:
    """What is asked of one group of models, and how they load."""

    load: dict[str, float]  # model -> seconds it takes to load
    clients: list[Client]
    end: float = math.inf  # in seconds; without one, when all are served
    loaded: str | None = None  # at the start
    slots: int = 1
    turn: float = 60  # jano's two settings
    linger: float = 5
    jitter: float = 0  # a load takes up to so many times longer or shorter than it should
    prefill: float = 0  # seconds more for each client's first request after a load: a lost cache
    seed: int = 0


@dataclass(eq=False, kw_only=True)
class Request(Ticket):
    """A ticket, and who asked."""

    client: Client
    rng: random.Random
    service: float
    tries: int = 1
    ended: float | None = None  # served, or given up


class Fifo(Schedule):
    """Greed that sees nothing but the oldest ticket is first in, first out."""

    def heads(self) -> list[Ticket]:
        return super().heads()[:1]


class ModelWait(NamedTuple):
    """A wait of a model to be loaded."""

    seconds: float
    patience: float  # for how long it lets others' turns grow


class Run:
    """A worker and its clients, played to the end."""

    def __init__(self, work: Work, policy: str = "jano") -> None:
        self.work = work
        self.schedule = self.new_schedule(policy)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.event_number = itertools.count()  # orders events of the same time
        self.requests: list[Request] = []
        self.swapping = False
        self.swaps: list[float] = []  # begun when
        self.loads: list[float] = []  # seconds of each swap
        self.forced_time = 0.0
        self.model_waits: list[ModelWait] = []
        self.longest_trip = 0.0
        self.cached: set[Client] = set()  # whose prompts the loaded model remembers
        self.load_rng = random.Random(work.seed)
        self.play()

    def new_schedule(self, policy: str) -> Schedule:
        if policy == "fifo":
            schedule: Schedule = Fifo(0, 0)
        elif policy == "greedy":
            schedule = Schedule(0, 0)
        else:
            schedule = Schedule(self.work.turn, self.work.linger)
        schedule.slots = dict.fromkeys(self.work.load, self.work.slots)
        schedule.set_of = {model: model for model in self.work.load}
        if self.work.loaded:
            schedule.load(self.work.loaded, 0)
        return schedule

    def play(self) -> None:
        shared = random.Random(self.work.seed)  # of all who ask once: their order never changes
        for number, client in enumerate(self.work.clients):
            rng = random.Random(f"{self.work.seed} {number}") if client.think else shared
            self.begin(client, rng, client.start)
        while self.events and self.events[0][0] <= self.work.end:
            self.now, _, action = heapq.heappop(self.events)
            action()
            self.advance()
        if self.work.end < math.inf:
            self.now = self.work.end
        for model in self.schedule.waiting_since:
            self.note_model_wait(model)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.event_number), action))

    def advance(self) -> None:
        """Worker.advance, and what its coroutine then does."""
        for ticket in self.schedule.advance(self.now):
            assert isinstance(ticket, Request)
            self.serve(ticket)
        _, swap_to, until = self.schedule.decision
        if swap_to is not None and not self.swapping and not self.schedule.in_flight:
            self.swap(swap_to)
        elif until is not None:
            self.at(until, lambda: None)

    def begin(self, client: Client, rng: random.Random, when: float) -> None:
        """The client asks at that time; its helper a little before."""
        if client.helper is not None:
            helper = client.helper
            self.at(when, lambda: self.ask(helper, rng))
            when += rng.uniform(0.1, 0.3)
        self.at(when, lambda: self.ask(client, rng))

    def ask(self, client: Client, rng: random.Random, tries: int = 1) -> None:
        service = rng.uniform(*client.service)
        request = Request(
            model=client.model,
            arrived=self.now,
            client=client,
            rng=rng,
            service=service,
            tries=tries,
        )
        self.requests.append(request)
        self.schedule.arrive(request, self.now)
        if client.time_out < math.inf:
            self.at(self.now + client.time_out, lambda: self.give_up(request))

    def give_up(self, request: Request) -> None:
        if request.granted is None:
            self.schedule.leave(request, self.now)
            request.ended = self.now
            if request.client.think is not None:
                self.ask(request.client, request.rng, request.tries + 1)

    def serve(self, request: Request) -> None:
        if request.client not in self.cached:
            self.cached.add(request.client)
            request.service += self.work.prefill
        self.at(self.now + request.service, lambda: self.finish(request))

    def finish(self, request: Request) -> None:
        request.ended = self.now
        self.schedule.leave(request, self.now)
        client = request.client
        if client.think:
            self.begin(client, request.rng, self.now + request.rng.uniform(*client.think))

    def load_seconds(self, model: str) -> float:
        jitter = self.load_rng.uniform(-self.work.jitter, self.work.jitter)
        return self.work.load[model] * (1 + jitter)

    def swap(self, model: str) -> None:
        draining_since = self.schedule.draining_since
        assert draining_since is not None
        seconds = self.load_seconds(model)
        self.swaps.append(self.now)
        self.loads.append(seconds)
        if self.schedule.loaded and self.schedule.depth(self.schedule.loaded):
            self.forced_time += seconds
        self.schedule.unload(self.now)
        self.cached.clear()
        self.swapping = True
        self.at(self.now + seconds, lambda: self.swapped(model, draining_since))

    def swapped(self, model: str, draining_since: float) -> None:
        self.note_model_wait(model)
        self.schedule.load(model, self.now, self.now - draining_since)
        self.swapping = False
        two_longest = sorted(self.schedule.cost.values())[-2:]
        self.longest_trip = max(self.longest_trip, sum(two_longest))

    def note_model_wait(self, model: str) -> None:
        if self.schedule.depth(model):
            since = self.schedule.waiting_since[model]
            patience = self.schedule.patient_until.get(model, since) - since
            self.model_waits.append(ModelWait(self.now - since, patience))

    # ------------------------------------------------------------------- what can be read ----

    def waits(self, model: str | None = None) -> list[float]:
        """Of each request, until its turn, until its client gave up, or until the end."""
        waits = []
        for request in self.requests:
            if model in (None, request.model):
                ends = [request.granted, request.ended, self.now]
                until = next(end for end in ends if end is not None)
                waits.append(until - request.arrived)
        return waits

    def latencies(self) -> list[float]:
        """Of the requests that were served."""
        served = [request for request in self.requests if request.granted is not None]
        return [request.ended - request.arrived for request in served if request.ended is not None]

    def served(self) -> str:
        """Models, in the order of their turns."""
        turns = [(r.granted, r.model) for r in self.requests if r.granted is not None]
        return "".join(model for _, model in sorted(turns))

    def timeline(self, step: float, length: int) -> str:
        """A character each step: the model that serves, or a load (>), or nothing (.)."""
        marks = ["."] * length
        spans = [(r.granted, r.service, r.model) for r in self.requests if r.granted is not None]
        spans += [(when, load, ">") for when, load in zip(self.swaps, self.loads)]
        for begin, seconds, mark in spans:
            for place in range(math.ceil(begin / step), math.ceil((begin + seconds) / step)):
                if place < length:
                    marks[place] = mark
        return "".join(marks)

    def wait_to_bound(self) -> float:
        """The longest of all models' waits, each as a share of what docs/policy.md promises it."""
        others = len(self.work.load) - 1
        load = max(self.loads, default=0.0)
        service = max(request.service for request in self.requests)
        shares = [0.0]
        for wait in self.model_waits:
            turn = max(self.work.turn, wait.patience) + 2 * self.longest_trip
            shares.append(wait.seconds / (others * (load + turn + service) + load))
        return max(shares)


Ways = dict[tuple[frozenset[Client], str | None], list[tuple[float, float]]]


def optimum(work: Work) -> float:
    """The least mean latency, of all orders; a load may begin before the request that needs it."""
    # Who has been served and what is loaded -> the ways to get there: time, sum of latencies.
    ways: Ways = {(frozenset(), work.loaded): [(0, 0)]}
    for _ in work.clients:
        longer: Ways = defaultdict(list)
        for (served, loaded), pairs in ways.items():
            for client in set(work.clients) - served:
                load = work.load[client.model] if client.model != loaded else 0
                for now, total in pairs:
                    end = max(now + load, client.start) + client.service[0]
                    pair = end, total + end - client.start
                    longer[served | {client}, client.model].append(pair)
        ways = {state: undominated(pairs) for state, pairs in longer.items()}
    return min(total for pairs in ways.values() for _, total in pairs) / len(work.clients)


def undominated(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those for which none is as early and has a sum as small."""
    best: list[tuple[float, float]] = []
    for now, total in sorted(pairs):
        if not best or total < best[-1][1]:
            best.append((now, total))
    return best


# -------------------------------------------------------------------------------- tables ----

POLICIES = ("fifo", "greedy", "jano")
Cell = str | float


def show(title: str, columns: str, rows: list[list[Cell]]) -> None:
    """Print a table; its columns are separated by commas."""
    names = columns.split(", ")
    table(title, [dict(zip(names, map(text, row), strict=True)) for row in rows])


def text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if cell >= 100 else f"{cell:.2f}"
    return str(cell)


def mean_wait(runs: list[Run]) -> float:
    return fmean(wait for run in runs for wait in run.waits())


def per_hour(runs: list[Run]) -> float:
    return 3600 * sum(len(run.latencies()) for run in runs) / sum(run.now for run in runs)


def in_swaps(runs: list[Run]) -> float:
    return sum(sum(run.loads) for run in runs) / sum(run.now for run in runs)


def compare(title: str, works: list[Work], person: str = "") -> dict[str, list[Run]]:
    """Play the works under each policy and print a table; with one model's own waits, if asked."""
    results = {policy: [Run(work, policy) for work in works] for policy in POLICIES}
    columns = "policy, swaps, makespan s, requests/h, in swaps, mean wait s, p95, longest"
    rows: list[list[Cell]] = []
    for policy, runs in results.items():
        swaps = fmean(len(run.swaps) for run in runs)
        makespan = fmean(run.now for run in runs)
        waits = sorted(wait for run in runs for wait in run.waits())
        p95 = waits[len(waits) * 95 // 100]
        row: list[Cell] = [policy, swaps, makespan, per_hour(runs), in_swaps(runs)]
        row += [fmean(waits), p95, waits[-1]]
        if person:
            own = [wait for run in runs for wait in run.waits(person)]
            row += [fmean(own), max(own)]
        rows.append(row)
    show(title, f"{columns}, {person}'s mean, {person}'s longest" if person else columns, rows)
    return results


# ----------------------------------------------------------------------------- scenarios ----

FEW: Span = (4, 10)  # a service of a few seconds; loads take 20 s where nothing else is said


def loads(models: str, seconds: float = 20) -> dict[str, float]:
    return dict.fromkeys(models, seconds)


def once(models: Iterable[str], service: Span = (1, 1), start: float = 0) -> list[Client]:
    """One request each, a hundredth of a second apart."""
    return [Client(model, start + i / 100, service) for i, model in enumerate(models)]


def loops(models: str, think: Span, service: Span = FEW) -> list[Client]:
    """Clients that ask again and again; at first a second apart."""
    return [Client(model, i, service, think) for i, model in enumerate(models)]


SIX = Work(loads("AB", 2), once("ABAABB"), loaded="A")


def six(quick: bool) -> list[Figure]:
    runs = compare("Six requests at once, A B A A B B; A loaded, services 1 s, loads 2 s", [SIX])
    return [Figure("six requests: swaps", len(runs["jano"][0].swaps), "<=", 1)]


def burst(quick: bool) -> list[Figure]:
    works = []
    for seed in range(20):
        models = random.Random(seed).choices("ABC", k=200)
        works.append(Work(loads("ABC"), once(models, FEW), seed=seed))
    runs = compare("A burst of 200 over three models, none loaded; 20 of them", works)
    most = max(len(run.swaps) for run in runs["jano"])
    makespan = fmean(run.now for run in runs["jano"]) / fmean(run.now for run in runs["greedy"])
    return [
        Figure("burst of 200: swaps, the most of 20", most, "<=", 8),
        Figure("burst of 200: makespan, times greedy's", makespan, "<=", 1.06),
    ]


def agents(quick: bool) -> list[Figure]:
    work = Work(loads("AB"), loops("AB", (0.2, 3)), 36000)
    runs = compare("Two agents, on A and on B, who think for 0.2 to 3 s; ten hours", [work])
    print("\nThe first ten minutes, 6 s a character: who is served; > a load; . nothing\n")
    for policy in ("greedy", "jano"):
        print(f"    {policy:6} {runs[policy][0].timeline(6, 100)}")
    gain = per_hour(runs["jano"]) / per_hour(runs["greedy"])
    return [
        Figure("agents: requests per hour, times greedy's", gain, ">=", 2),
        Figure("agents: share of the time in swaps", in_swaps(runs["jano"]), "<=", 0.35),
    ]


def person(quick: bool) -> list[Figure]:
    clients = [*loops("AAA", (0, 0)), Client("B", 300, FEW, (60, 1200))]
    title = "Three endless loops on A; a person on B who thinks for 1 to 20 min; a day"
    runs = compare(title, [Work(loads("AB"), clients, 86400)], "B")
    behind_loops = max(runs["jano"][0].waits("B"))
    clients = [*once("A" * 500, FEW), Client("B", 100, FEW, (60, 300))]
    title = "A batch of 500 on A; a person on B who thinks for 1 to 5 min; 1.5 h"
    runs = compare(title, [Work(loads("AB"), clients, 5400)], "B")
    beside_batch = max(runs["jano"][0].waits("B"))
    return [
        Figure("endless loops: B's longest wait, s", behind_loops, "<=", 180),
        Figure("batch of 500: B's longest wait, s", beside_batch, "<=", 180),
    ]


def endless(quick: bool) -> list[Figure]:
    """Do turns grow with time? In the first hour what loads cost is not known yet."""
    rows: list[list[Cell]] = []
    hours = 4 if quick else 24
    growth = 0.0
    for models, count in (("AB", 3), ("ABC", 1), ("ABC", 3), ("ABCD", 3), ("AB", 40)):
        run = Run(Work(loads(models), loops(models * count, (0, 0)), hours * 3600))
        first, second, last = (mean_turn(run, hour) for hour in (0, 1, hours - 1))
        rows.append([len(models), count, first, second, last, max(run.waits())])
        growth = max(growth, last / second)
    columns = f"models, loops on each, 1st hour s, 2nd s, {hours}th s, longest wait s"
    show("Endless loops on every model: from one swap to the next, in the mean", columns, rows)
    return [Figure("endless loops: turns in the last hour, times the second's", growth, "<=", 1.05)]


def mean_turn(run: Run, hour: int) -> float:
    """Seconds from one swap to the next in this hour, in the mean."""
    times = [when for when in run.swaps if hour <= when / 3600 < hour + 1]
    return (times[-1] - times[0]) / (len(times) - 1)


def poisson(mix: str, utilisation: float, seed: int, count: int) -> Work:
    """Requests of 7 s in the mean, each for a model picked from the letters of the mix."""
    rng = random.Random(f"{mix} {seed}")
    clients = []
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(utilisation / 7)
        seconds = rng.uniform(*FEW)
        clients.append(Client(rng.choice(mix), now, (seconds, seconds)))
    return Work(loads("".join(sorted(set(mix)))), clients)


LOPSIDED = "AAAAAAAAAB"  # of ten requests for A one for B: A's turns are too short for that

# Mean waits of jano 1.0 under the same requests, in seconds.
WAITS_OF_1_0 = {
    ("AB", 0.6): 40.63,
    ("AB", 0.8): 96.76,
    ("ABC", 0.6): 65.33,
    ("ABC", 0.8): 135.62,
    ("ABCD", 0.6): 90.01,
    ("ABCD", 0.8): 185.15,
}


def arrivals(quick: bool) -> list[Figure]:
    """Random arrivals; the models are asked for equally often, or not."""
    rows: list[list[Cell]] = []
    figures: list[Figure] = []
    seeds, count = (2, 2000) if quick else (6, 5000)
    uneven = 0.0
    mixes = ("AB", "ABC", "ABCD", "AAAAB", "AAAAAABBBC", "AAAAABBBBBC", "AAAAAAABBCC", LOPSIDED)
    for mix, utilisation in itertools.product(mixes, (0.6, 0.8, 0.95)):
        works = [poisson(mix, utilisation, seed, count) for seed in range(seeds)]
        greedy, jano = ([Run(work, policy) for work in works] for policy in ("greedy", "jano"))
        ratio = mean_wait(jano) / mean_wait(greedy)
        shares = " : ".join(str(mix.count(model)) for model in works[0].load)
        row: list[Cell] = [shares, utilisation, mean_wait(greedy), mean_wait(jano), ratio]
        rows.append([*row, in_swaps(greedy), in_swaps(jano)])
        title = f"Poisson, {len(mix)} models, utilisation {utilisation}: mean wait, times"
        if mix == LOPSIDED:
            continue
        if len(mix) > 4:
            uneven = max(uneven, ratio)
        elif utilisation > 0.9:
            figures.append(Figure(f"{title} greedy's", ratio, "<=", 5 if mix == "AB" else 2))
        elif mix == "ABC":
            figures.append(Figure(f"{title} greedy's", ratio, "<=", 1.15))
        if (mix, utilisation) in WAITS_OF_1_0 and not quick:
            change = mean_wait(jano) / WAITS_OF_1_0[mix, utilisation]
            figures.append(Figure(f"{title} 1.0's", change, "<=", 1.02))
    columns = "shares of the models, utilisation, greedy s, jano s, jano / greedy"
    columns += ", greedy in swaps, jano in swaps"
    show(f"Poisson, mean waits; {seeds} times {count} requests a line", columns, rows)
    title = "Poisson, shares up to 6 to 1: mean wait, times greedy's, the worst"
    return [*figures, Figure(title, uneven, "<=", 3)]


def time_outs(quick: bool) -> list[Figure]:
    """Clients that give up after 300 s and ask again, where a turn lasts longer than that."""
    rows: list[list[Cell]] = []
    hours = 2 if quick else 12
    most = 0
    for busy, load in (("AAA", 65), ("AAABBB", 40)):
        asking = [Client("C", start, FEW, (60, 600), 300) for start in (100, 400, 900)]
        models = loads("".join(sorted({*busy, "C"})), load)
        run = Run(Work(models, [*loops(busy, (0, 0)), *asking], hours * 3600))
        tries = [request.tries for request in run.requests if request.model == "C"]
        first, second, third = (tries.count(number) for number in (1, 2, 3))
        rows.append([" and ".join(sorted(set(busy))), load, first - second, second - third, third])
        most = max(most, *tries)
    columns = "endless loops on, load s, served at the first try, at the second, later or never"
    show(f"Three clients on C that give up after 300 s and ask again; {hours} h", columns, rows)
    return [Figure("time-outs after 300 s: tries until served, the most", most, "<=", 2)]


def helper(quick: bool) -> list[Figure]:
    """A request for another model 0.1 to 0.3 s before each main one: a title, a completion."""
    rows: list[list[Cell]] = []
    hours = 4 if quick else 24
    most = 0.0
    for think, patience in itertools.product(((6, 30), (60, 300)), (3, math.inf)):
        ahead = Client("B", 0, (0.5, 1), time_out=patience)
        run = Run(Work(loads("AB"), [Client("A", 0, FEW, think, helper=ahead)], hours * 3600))
        helpers = len(run.waits("B"))
        swaps = len(run.swaps) / helpers
        pause = f"{think[0]} to {think[1]} s"
        until = f"{patience} s" if patience < math.inf else "until served"
        rows.append([pause, until, helpers, swaps, fmean(run.waits("A"))])
        if patience < math.inf:
            most = max(most, swaps)
    columns = (
        "the client thinks, the helper waits, helper requests, swaps for each, A's mean wait s"
    )
    show(f"A request for B 0.1 to 0.3 s before each one for A; {hours} h", columns, rows)
    return [Figure("helpers that give up after 3 s: swaps for each", most, "<=", 0.1)]


def mixture(seed: int) -> Work:
    """Two hours of anything: streams, loops and batches on two to four models."""
    rng = random.Random(f"mixture {seed}")
    models = "ABCD"[: rng.randint(2, 4)]
    clients = []
    for model in models:
        service = rng.choice(((0.5, 3), FEW, (10, 40), (5, 90)))
        kinds = rng.sample(("stream", "loops", "batch"), rng.randint(1, 2))
        if "stream" in kinds:
            gap = len(models) * fmean(service) / rng.uniform(0.05, 1.2)
            when = rng.expovariate(1 / gap)
            while when < 7200:
                clients.append(Client(model, when, service))
                when += rng.expovariate(1 / gap)
        if "loops" in kinds:
            think = rng.choice(((0, 0), (0.2, 3), (3, 30), (60, 900)))
            clients += loops(model * rng.randint(1, 4), think, service)
        if "batch" in kinds:
            clients += once(model * rng.randint(10, 500), service, rng.uniform(0, 5000))
    return Work(
        load={model: rng.uniform(2, 60) for model in models},
        clients=clients,
        end=7200,
        slots=rng.choice((1, 1, 2, 4)),
        turn=rng.choice((15, 30, 60, 120)),
        linger=rng.choice((0, 5, 10)),
        seed=seed,
    )


def mixtures(quick: bool) -> list[Figure]:
    rows: list[list[Cell]] = []
    count = 100 if quick else 400
    for policy in ("jano",) if quick else POLICIES:
        runs = [Run(mixture(seed), policy) for seed in range(count)]
        share = max(run.wait_to_bound() for run in runs)
        forced = max(run.forced_time / run.now for run in runs)
        rows.append([policy, share, forced])
    title = f"{count} random mixtures of streams, loops and batches, two hours each: the worst"
    show(title, "policy, model's wait / its bound, in forced swaps", rows)
    return [
        Figure("mixtures: a model's longest wait, times its bound", share, "<=", 1),
        Figure("mixtures: share of the time in forced swaps", forced, "<=", 0.25),
    ]


def clairvoyant(quick: bool) -> list[Figure]:
    """Beside the best order there is, found by exact search, for few requests."""
    rows: list[list[Cell]] = []
    figures: list[Figure] = []
    for span in (10, 60, 120):
        works = [few_requests(seed, span) for seed in range(50 if quick else 300)]
        best = [optimum(work) for work in works]
        fewest = [len({client.model for client in work.clients} - {"A"}) for work in works]
        for policy in POLICIES:
            runs = [Run(work, policy) for work in works]
            ratios = [fmean(run.latencies()) / least for run, least in zip(runs, best)]
            extra = [len(run.swaps) - least for run, least in zip(runs, fewest)]
            row: list[Cell] = [f"{span} s", policy, fmean(ratios), max(ratios)]
            rows.append([*row, fmean(extra), max(extra)])
        if span == 10:
            figures = [
                Figure("clairvoyant: mean latency, times the optimum", fmean(ratios), "<=", 1.5),
                Figure("clairvoyant: swaps above the fewest possible", max(extra), "<=", 1),
            ]
    title = "Eight requests on two or three models, A loaded, loads of 10 to 30 s"
    columns = "they come within, policy, latency / optimum, worst, swaps above the fewest, most"
    show(title, columns, rows)
    return figures


def few_requests(seed: int, span: float) -> Work:
    """Eight, on two or three models, that come within so many seconds."""
    rng = random.Random(seed)
    models = "ABC"[: rng.randint(2, 3)]
    clients = []
    for _ in range(8):
        seconds = rng.uniform(*FEW)
        clients.append(Client(rng.choice(models), rng.uniform(0, span), (seconds, seconds)))
    return Work({model: rng.uniform(10, 30) for model in models}, clients, loaded="A")


def trace(quick: bool) -> list[Figure]:
    runs = play_trace(Path(__file__).with_name("trace.csv"), 20)
    ratio = mean_wait(runs["jano"]) / mean_wait(runs["greedy"])
    return [Figure("trace of a cloud's requests: mean wait, times greedy's", ratio, "<=", 1.3)]


def play_trace(path: Path, load: float) -> dict[str, list[Run]]:
    """Its lines are `arrival,model,service`, times in seconds."""
    clients = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            arrival, model, service = line.split(",")
            clients.append(Client(model, float(arrival), (float(service), float(service))))
    models = sorted({client.model for client in clients})
    asked = sum(client.service[0] for client in clients)
    seconds = max(client.start for client in clients)
    title = f"{path.name}: {len(clients)} requests on {len(models)} models in {seconds:.0f} s, "
    title += f"utilisation {asked / seconds:.2f}, loads of {load:g} s"
    return compare(title, [Work(dict.fromkeys(models, load), clients)])


def jitter(quick: bool) -> list[Figure]:
    """Loads that take longer or shorter than they should."""
    rows: list[list[Cell]] = []
    for share in (0, 0.3, 0.6):
        pair = Work(loads("AB"), loops("AB", (0.2, 3)), 36000, jitter=share)
        stream = replace(poisson("ABC", 0.8, 0, 5000), jitter=share)
        done = [per_hour([Run(pair, policy)]) for policy in POLICIES]
        waits = [mean_wait([Run(stream, policy)]) for policy in ("greedy", "jano")]
        rows.append([f"{share:.0%}", *done, *waits])
    columns = "give or take, fifo /h, greedy /h, jano /h, greedy s, jano s"
    title = (
        "Random loads of about 20 s: two agents' requests per hour; mean wait of a Poisson stream"
    )
    show(title, columns, rows)
    return [Figure("loads of 8 to 32 s: agents, times greedy's", done[2] / done[1], ">=", 2)]


def cache(quick: bool) -> list[Figure]:
    """A swap loses the prompt cache, and each client's first request after it takes longer."""
    rows: list[list[Cell]] = []
    for seconds in (0, 5, 20):
        work = Work(loads("AB"), loops("ABAB", (0.2, 30)), 36000, prefill=seconds)
        runs = [Run(work, policy) for policy in POLICIES]
        done = [per_hour([run]) for run in runs]
        rows.append([seconds, *done, *(fmean(run.latencies()) for run in runs)])
    columns = "prefill s, fifo /h, greedy /h, jano /h, fifo s, greedy s, jano s"
    title = (
        "Two clients each on A and B, who think for 0.2 to 30 s: requests per hour, mean latency"
    )
    show(title, columns, rows)
    return [Figure("prefill of 20 s: agents, times greedy's", done[2] / done[1], ">=", 0.95)]


SCENARIOS = [six, burst, agents, person, endless, arrivals, time_outs, helper, mixtures]
SCENARIOS += [clairvoyant, trace, jitter, cache]

# ------------------------------------------------------------------------ by hand, and main ----


def check_by_hand() -> None:
    """Small cases computed with pencil and paper."""
    orders = {policy: Run(SIX, policy).served() for policy in POLICIES}
    same("six, order", orders, {"fifo": "ABAABB", "greedy": "AAABBB", "jano": "AAABBB"})
    same("six, swaps", Run(SIX, "fifo").swaps, [1, 4, 8])
    same("six, swaps", Run(SIX).swaps, [3])
    # Two on A for ever, ten seconds each. B comes at 5: none of A begins after 65, so B loads from
    # 70 to 90, and A again from 91 to 111. Now the round trip is known to be 40 s, so T is 140 s: B
    # of 200 waits until 340, then for the A that began at 331, then for its load.
    clients = [*[Client("A", 0, (10, 10), (0, 0))] * 2, *once("B", start=5), *once("B", start=200)]
    run = Run(Work(loads("AB"), clients, 400, "A"))
    same("turn, swaps", run.swaps, [70, 91, 341, 362])
    same("turn, waits of B", run.waits("B"), [85, 161])
    # Services of 4 s, pauses of 1.5 s, loads of 10 s. At 4 and 18 no pause is known yet. Then A
    # comes back in time again and again, until the round trip is over, from 28 to 48.
    run = Run(Work(loads("AB", 10), loops("AB", (1.5, 1.5), (4, 4)), 60, "A"))
    same("linger, swaps", run.swaps, [4, 18, 48.5])
    same("linger, order", run.served(), "ABAAAAB")
    # A at 1 is worth waiting for: 1 and 13 s, where greedy takes 11 and 21.
    work = Work(loads("AB", 10), [*once("B"), *once("A", start=1)], loaded="A")
    same("optimum", optimum(work), 7)
    same("optimum, greedy", fmean(Run(work, "greedy").latencies()), 16)


def same(what: str, got: object, expected: object) -> None:
    if got != expected:
        print(f"computed by hand: {what}: got {got}, expected {expected}", file=sys.stderr)
        sys.exit(2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulate jano's policy beside others.")
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser.add_argument("--quick", action="store_true", help="fewer requests, about 20 s")
    parser.add_argument("--scenario", choices=names, help="only this one")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="play this file, no scenario")
    parser.add_argument("--load", type=float, default=20, help="seconds of a load, for --trace")
    options = parser.parse_args()
    if options.trace is not None:
        play_trace(options.trace, options.load)
        return 0
    begin = time.monotonic()
    check_by_hand()
    figures = []
    for scenario in SCENARIOS:
        if options.scenario in (None, scenario.__name__):
            figures += scenario(options.quick)
    code = verdict(figures)
    print(f"\ntook {time.monotonic() - begin:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
