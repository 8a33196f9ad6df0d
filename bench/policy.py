"""Does the policy keep its promises? Jano's own `decide` and `Schedule`, in virtual time.

    python bench/policy.py [--quick] [--scenario NAME]

Every scenario plays the same requests under each policy:

    fifo        strictly in order of arrival
    greedy      jano with MAX_TURN_MS=0: the loaded model's requests first, with no ceiling
    max-batch   greedy, but after 8 requests in a row while others wait it is the oldest's turn
    max-wait    greedy, but a request that has waited for more than 60 s goes first
    jano        the defaults: MAX_TURN_MS=60000, LINGER_MS=5000

and the smallest ones under a clairvoyant, too, who knows all that will come (exact search). The
simulated worker makes the same calls in the same order as Worker.run. A service takes its time
however many run beside it, scripts never fail, clients never leave. At the start no cost is known.

wait          seconds from arrival to turn; who has none at the end has waited until then
latency       seconds from arrival to the end of the service
in swaps      share of the whole time in which a model loads; a drain is service and does not count
forced swap   one that begins while the model that goes has tickets in the queue
model's wait  from when a model has tickets and is not loaded, until it is loaded; see `bound`
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jano import DEFAULT, Decision, Schedule, Ticket, decide

# ------------------------------------------------------------------------------- policies ----

Policy = Callable[[Schedule, float], Decision]


def heads(state: Schedule) -> dict[str, Ticket]:
    """Model -> its oldest ticket, the model with the oldest of all first."""
    oldest = [next(iter(tickets)) for tickets in state.tiers[DEFAULT].values()]
    return {ticket.model: ticket for ticket in sorted(oldest, key=lambda t: t.arrived)}


def fifo(state: Schedule, now: float) -> Decision:
    for model, ticket in heads(state).items():
        if model != state.loaded:
            return Decision(swap_to=model)
        return Decision(ticket if len(state.in_flight) < state.slots[model] else None)
    return Decision()


def max_batch(most: int = 8) -> Policy:
    count, since = 0, 0.0  # turns in a row with others waiting, of what was loaded at that time

    def policy(state: Schedule, now: float) -> Decision:
        nonlocal count, since
        others = [model for model in heads(state) if model != state.loaded]
        if not others or since != state.loaded_at:
            count, since = 0, state.loaded_at
        if count >= most:
            return Decision(swap_to=others[0])
        decision = decide(state, now)
        count += bool(decision.serve and others)
        return decision

    return policy


def max_wait(state: Schedule, now: float, most: float = 60) -> Decision:
    late = any(now - head.arrived > most for head in heads(state).values())
    return fifo(state, now) if late else decide(state, now)


POLICIES: dict[str, Callable[[], Policy]] = {
    "fifo": lambda: fifo, "greedy": lambda: decide, "max-batch": max_batch,
    "max-wait": lambda: max_wait, "jano": lambda: decide}

# ----------------------------------------------------------------------------- simulation ----

Span = tuple[float, float]  # seconds, drawn evenly from between the two


@dataclass(frozen=True)
class Client:
    """Asks once; or, if it has a think time, again and again, so long after each answer."""

    model: str
    start: float
    service: Span
    think: Span | None = None


@dataclass(frozen=True)
class Work:
    """What is asked of one group of models."""

    load: dict[str, float]  # model -> seconds it takes to load
    clients: list[Client]
    end: float = math.inf  # in seconds; without one, when all are served
    loaded: str | None = None  # at the start
    slots: int = 1
    turn: float = 60  # jano's two settings
    linger: float = 5
    seed: int = 0


class Run:
    """A worker and its clients, played to the end."""

    def __init__(self, work: Work, policy: str) -> None:
        self.work, self.policy = work, POLICIES[policy]()
        jano = policy == "jano"
        self.state = Schedule(work.turn if jano else 0, work.linger if jano else 0)
        self.state.slots = dict.fromkeys(work.load, work.slots)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()  # of events at the same time
        self.swapping = False
        self.draining_since: float | None = None
        self.services: dict[Ticket, float] = {}  # every ticket -> seconds
        self.asked_by: dict[Ticket, tuple[Client, random.Random]] = {}
        self.latencies: dict[Ticket, float] = {}  # tickets served -> seconds
        self.swaps: list[tuple[float, str]] = []  # begun when, to what
        self.swap_time = self.forced_time = self.trip = 0.0  # trip: the longest one
        self.model_waits = dict.fromkeys(work.load, 0.0)  # model -> the longest
        if work.loaded:
            self.state.load(work.loaded, 0)
        rng = random.Random(work.seed)  # one for all who ask once: their order is always the same
        for number, client in enumerate(work.clients):
            own = random.Random(f"{work.seed} {number}") if client.think else rng
            self.at(client.start, self.ask, client, own)
        while self.events and self.events[0][0] <= work.end:
            self.now, _, action, args = heapq.heappop(self.events)
            action(*args)
            self.wake()
        self.now = work.end if work.end < math.inf else self.now
        for model in work.load.keys() - {self.state.loaded}:
            self.note_model_wait(model)

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (when, next(self.order), action, args))

    def wake(self) -> None:
        """Worker.run: decide and act, until all that is left is to wait."""
        while not self.swapping:
            serve, swap_to, until = self.policy(self.state, self.now)
            if swap_to is None:
                self.draining_since = None
            elif self.draining_since is None:
                self.draining_since = self.now
            if serve is not None:
                self.state.grant(serve, self.now)
                self.at(self.now + self.services[serve], self.finish, serve)
            elif swap_to is not None and not self.state.in_flight:
                self.swap(swap_to)
            else:
                if until is not None:
                    self.at(until, lambda: None)
                break

    def ask(self, client: Client, rng: random.Random) -> None:
        ticket = Ticket(client.model, self.now)
        self.services[ticket] = rng.uniform(*client.service)
        self.asked_by[ticket] = client, rng
        self.state.add(ticket)

    def finish(self, ticket: Ticket) -> None:
        self.state.remove(ticket, self.now)
        self.latencies[ticket] = self.now - ticket.arrived
        client, rng = self.asked_by[ticket]
        if client.think:
            self.at(self.now + rng.uniform(*client.think), self.ask, client, rng)

    def swap(self, model: str) -> None:
        seconds = self.work.load[model]
        self.swaps.append((self.now, model))
        self.swap_time += seconds
        if self.state.loaded and self.state.depth(self.state.loaded):
            self.forced_time += seconds
        self.state.unload(self.now)
        self.swapping = True
        self.at(self.now + seconds, self.swapped, model)

    def swapped(self, model: str) -> None:
        assert self.draining_since is not None
        self.note_model_wait(model)
        self.state.load(model, self.now, self.now - self.draining_since)
        self.swapping, self.draining_since = False, None
        self.trip = max(self.trip, sum(sorted(self.state.cost.values())[-2:]))

    def note_model_wait(self, model: str) -> None:
        if model in self.state.tiers[DEFAULT]:
            since = max(heads(self.state)[model].arrived, self.state.left.get(model, 0))
            self.model_waits[model] = max(self.model_waits[model], self.now - since)

    def waits(self, model: str = "") -> list[float]:
        return [(self.now if ticket.granted is None else ticket.granted) - ticket.arrived
                for ticket in self.services if model in ("", ticket.model)]

    def served(self) -> str:
        """Models, in the order of their turns."""
        turns = [ticket for ticket in self.services if ticket.granted is not None]
        return "".join(t.model for t in sorted(turns, key=lambda t: t.granted or 0))

    def timeline(self, step: float, length: int) -> str:
        """A character each step: the model that serves, or a load (>), or nothing (.)."""
        busy = [(t.granted, self.services[t], t.model) for t in self.services
                if t.granted is not None]
        busy += [(begin, self.work.load[model], ">") for begin, model in self.swaps]
        return "".join(next((mark for begin, seconds, mark in busy
                             if begin <= i * step < begin + seconds), ".") for i in range(length))


def bound(run: Run) -> float:
    """The longest that a model can wait, with the longest load, service and round trip of the run.

    A model waits since w = max(head.arrived, left), and the next is the one with the least w. One
    that has left since our w comes after us. So each of the others has one turn more at most: a
    load, T until nothing is admitted any more, and what is in flight. Then ours loads.
    """
    others, load = len(run.work.load) - 1, max(run.work.load.values())
    turn = run.work.turn + 2 * run.trip + max(run.services.values())
    return others * (load + turn) + load


Ways = dict[tuple[frozenset[Client], str | None], list[Span]]


def optimum(work: Work) -> float:
    """The least mean latency, of all orders; a load may begin before the request that needs it."""
    ways: Ways = {(frozenset(), work.loaded): [(0, 0)]}  # who is served, what is loaded: time, sum
    for _ in work.clients:
        longer: Ways = defaultdict(list)
        for (served, loaded), pairs in ways.items():
            for client in set(work.clients) - served:
                load = work.load[client.model] if client.model != loaded else 0
                for now, total in pairs:
                    end = max(now + load, client.start) + client.service[0]
                    pair = end, total + end - client.start
                    longer[served | {client}, client.model].append(pair)
        ways = {}
        for key, pairs in longer.items():  # a way goes on if none as early has a sum as small
            least = math.inf
            for now, total in sorted(pairs):
                if total < least:
                    least = total
                    ways.setdefault(key, []).append((now, total))
    return min(total for pairs in ways.values() for _, total in pairs) / len(work.clients)

# ------------------------------------------------------------------------------ scenarios ----

Figure = tuple[str, float, str, float]  # what, how much, "<=" or ">=", the limit
FEW: Span = (4, 10)  # a service of a few seconds; loads take 20 s where nothing else is said
AB, ABC = dict.fromkeys("AB", 20.0), dict.fromkeys("ABC", 20.0)


def once(models: str, service: Span = (1, 1), start: float = 0) -> list[Client]:
    """One request each, a hundredth of a second apart."""
    return [Client(model, start + i / 100, service) for i, model in enumerate(models)]


SIX = Work({"A": 2, "B": 2}, once("ABAABB"), loaded="A")


def table(title: str, rows: list[dict[str, str]]) -> None:
    """Markdown, with the keys of the first row as its head."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    print(f"\n{title}\n\n| {' | '.join(key.rjust(widths[key]) for key in widths)} |")
    print("|" + "|".join("-" * (width + 1) + ":" for width in widths.values()) + "|")
    for row in rows:
        print(f"| {' | '.join(row[key].rjust(widths[key]) for key in widths)} |", flush=True)


def mean_wait(runs: list[Run]) -> float:
    return fmean(wait for run in runs for wait in run.waits())


def per_hour(runs: list[Run]) -> float:
    return 3600 * sum(len(run.latencies) for run in runs) / sum(run.now for run in runs)


def in_swaps(runs: list[Run]) -> float:
    return sum(run.swap_time for run in runs) / sum(run.now for run in runs)


def compare(title: str, works: list[Work], person: str = "") -> dict[str, list[Run]]:
    """Play the works under each policy and print a table; with one model's own waits, if asked."""
    results, rows = {policy: [Run(work, policy) for work in works] for policy in POLICIES}, []
    for policy, runs in results.items():
        waits = sorted(wait for run in runs for wait in run.waits())
        row = {"policy": policy, "swaps": f"{fmean(len(run.swaps) for run in runs):.1f}",
               "makespan s": f"{fmean(run.now for run in runs):.0f}",
               "mean wait s": f"{fmean(waits):.1f}", "p95": f"{waits[len(waits) * 95 // 100]:.0f}",
               "max": f"{waits[-1]:.0f}"}
        if person:
            own = [wait for run in runs for wait in run.waits(person)]
            row |= {f"{person}: mean": f"{fmean(own):.1f}", f"{person}: max": f"{max(own):.0f}"}
        row |= {"requests/h": f"{per_hour(runs):.0f}", "in swaps": f"{in_swaps(runs):.0%}"}
        rows.append(row)
    table(title, rows)
    return results


def six(quick: bool) -> list[Figure]:
    runs = compare("Six requests at once, A B A A B B; A loaded, services 1 s, loads 2 s", [SIX])
    return [("six requests: swaps", len(runs["jano"][0].swaps), "<=", 1)]


def burst(quick: bool) -> list[Figure]:
    works = [Work(ABC, once("".join(random.Random(seed).choices("ABC", k=200)), FEW), seed=seed)
             for seed in range(20)]
    runs = compare("A burst of 200 over three models, none loaded; 20 of them", works)["jano"]
    return [("burst of 200: swaps, the most of 20", max(len(r.swaps) for r in runs), "<=", 15)]


def agents(quick: bool) -> list[Figure]:
    loops = [Client(model, i, FEW, (0.2, 3)) for i, model in enumerate("AB")]
    runs = compare("Two agents, on A and on B, who think for 0.2 to 3 s; ten hours",
                   [Work(AB, loops, 36000)])
    print("\nThe first ten minutes, 6 s a character: who is served; > a load; . nothing\n")
    for policy in ("greedy", "jano"):
        print(f"    {policy:6} {runs[policy][0].timeline(6, 100)}")
    gain = per_hour(runs["jano"]) / per_hour(runs["greedy"])
    return [("agents: requests per hour, times greedy's", gain, ">=", 2),
            ("agents: share of the time in swaps", in_swaps(runs["jano"]), "<=", 0.35)]


def starved(quick: bool) -> list[Figure]:
    loops = [Client("A", i, FEW, (0, 0)) for i in range(3)]
    runs = compare("Three endless loops on A; a person on B who thinks for 1 to 20 min; a day",
                   [Work(AB, [*loops, Client("B", 300, FEW, (60, 1200))], 86400)], "B")
    return [("endless loops: B's longest wait, s", max(runs["jano"][0].waits("B")), "<=", 180)]


def batch(quick: bool) -> list[Figure]:
    person = Client("B", 100, FEW, (60, 300))
    compare("A batch of 500 on A; a person on B who thinks for 1 to 5 min; 1.5 h",
            [Work(AB, [*once("A" * 500, FEW), person], 5400)], "B")
    return []


def slots(quick: bool) -> list[Figure]:
    loops = [Client(model, i, (30, 180), (0, 120)) for model in "AB" for i in range(5)]
    compare("Four slots; five clients each on A and B, generations of 30 to 180 s; ten hours",
            [Work(AB, loops, 36000, slots=4)])
    return []


def poisson(models: str, utilisation: float, seed: int, count: int, load: float = 20,
            skewed: bool = False) -> Work:
    """Services of 7 s in the mean: FEW, or if skewed exponential."""
    rng = random.Random(f"{models} {seed}")
    clients, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(utilisation / 7)
        seconds = rng.expovariate(1 / 7) if skewed else rng.uniform(*FEW)
        clients.append(Client(rng.choice(models), now, (seconds, seconds)))
    return Work(dict.fromkeys(models, load), clients)


def mixes(quick: bool) -> list[Figure]:
    figures: list[Figure] = []
    seeds, count = (3, 2000) if quick else (6, 5000)
    for models, utilisation in itertools.product(("AB", "ABC", "ABCD"), (0.6, 0.8, 0.95)):
        title = f"Poisson, {len(models)} models, utilisation {utilisation}"
        runs = compare(f"{title}; {seeds} times {count} requests",
                       [poisson(models, utilisation, seed, count) for seed in range(seeds)])
        if models == "ABC" and utilisation < 0.9:
            ratio = mean_wait(runs["jano"]) / mean_wait(runs["greedy"])
            figures.append((f"{title}: mean wait, times greedy's", ratio, "<=", 1.15))
    return figures


def price(quick: bool) -> list[Figure]:
    """Where a bounded wait is cheap, and where it is not."""
    seeds, count = (3, 2000) if quick else (6, 5000)
    rows = []
    for skewed, utilisation in itertools.product((False, True), (0.6, 0.7, 0.8)[2 * quick:]):
        row = {"services": "exponential" if skewed else "4 to 10 s", "util.": f"{utilisation}"}
        for load in (5, 10, 20, 40):
            works = [poisson("ABC", utilisation, i, count, load, skewed) for i in range(seeds)]
            jano, greedy = ([Run(work, policy) for work in works] for policy in ("jano", "greedy"))
            row[f"{load} s"] = f"{mean_wait(jano) / mean_wait(greedy):.2f}"
        rows.append(row)
    table("Jano's mean wait, times greedy's: Poisson, 3 models, by seconds of load", rows)
    return []


def mixture(seed: int) -> Work:
    """Two hours of anything: streams, loops and batches on two to four models."""
    rng = random.Random(f"mixture {seed}")
    models, clients = "ABCD"[:rng.randint(2, 4)], []
    for model in models:
        service = rng.choice(((0.5, 3), FEW, (10, 40), (5, 90)))
        kinds = rng.sample(("stream", "loops", "batch"), rng.randint(1, 2))
        if "stream" in kinds:
            gap, when = len(models) * fmean(service) / rng.uniform(0.05, 1.2), 0.0
            while (when := when + rng.expovariate(1 / gap)) < 7200:
                clients.append(Client(model, when, service))
        if "loops" in kinds:
            think = rng.choice(((0, 0), (0.2, 3), (3, 30), (60, 900)))
            clients += [Client(model, i, service, think) for i in range(rng.randint(1, 4))]
        if "batch" in kinds:
            clients += once(model * rng.randint(10, 500), service, rng.uniform(0, 5000))
    return Work({model: rng.uniform(2, 60) for model in models}, clients, 7200,
                slots=rng.choice((1, 1, 2, 4)), turn=rng.choice((15, 30, 60, 120)),
                linger=rng.choice((0, 5, 10)), seed=seed)


def mixtures(quick: bool) -> list[Figure]:
    rows = []
    for policy in ("jano",) if quick else POLICIES:
        runs = [Run(mixture(seed), policy) for seed in range(400)]
        waits = [max(run.model_waits.values()) for run in runs]
        two, more = (max(wait / bound(run) for wait, run in zip(waits, runs, strict=True)
                         if (len(run.work.load) > 2) == many) for many in (False, True))
        forced = max(run.forced_time / run.now for run in runs)
        rows.append({"policy": policy, "model's wait s": f"{max(waits):.0f}",
                     "/ bound, 2 models": f"{two:.2f}", "/ bound, 3 or 4": f"{more:.2f}",
                     "forced swaps": f"{forced:.0%}"})
    table("400 random mixtures of streams, loops and batches, two hours each: the worst", rows)
    return [("mixtures: a model's longest wait, times its bound", max(two, more), "<=", 1),
            ("mixtures: share of the time in forced swaps", forced, "<=", 0.25)]


def clairvoyant(quick: bool) -> list[Figure]:
    rows, figures = [], []
    for span in (10, 60, 120):
        works = []
        for seed in range(50 if quick else 300):
            rng = random.Random(seed)
            models = "ABC"[:rng.randint(2, 3)]
            clients = [Client(rng.choice(models), rng.uniform(0, span), (seconds, seconds))
                       for seconds in (rng.uniform(*FEW) for _ in range(8))]
            works.append(Work({m: rng.uniform(10, 30) for m in models}, clients, loaded="A"))
        best = [optimum(work) for work in works]
        fewest = [len({client.model for client in work.clients} - {"A"}) for work in works]
        for policy in POLICIES:
            runs = [Run(work, policy) for work in works]
            ratios = [fmean(r.latencies.values()) / b for r, b in zip(runs, best, strict=True)]
            extra = [len(r.swaps) - f for r, f in zip(runs, fewest, strict=True)]
            rows.append({"within": f"{span} s", "policy": policy,
                         "latency / optimum": f"{fmean(ratios):.2f}", "worst": f"{max(ratios):.2f}",
                         "swaps above the fewest": f"{fmean(extra):.2f}", "most": f"{max(extra)}"})
        if span == 10:
            figures = [("clairvoyant: mean latency, times the optimum", fmean(ratios), "<=", 1.5),
                       ("clairvoyant: swaps above the fewest possible", max(extra), "<=", 1)]
    table("Eight requests on two or three models, A loaded, loads of 10 to 30 s, by the time in"
          "\nwhich they come: latency to the optimum, swaps above the fewest that serve all", rows)
    return figures


SCENARIOS = {scenario.__name__: scenario for scenario in (
    six, burst, agents, starved, batch, slots, mixes, price, mixtures, clairvoyant)}

# ----------------------------------------------------------------------- by hand, and main ----


def check_by_hand() -> None:
    """Small cases computed with pencil and paper."""
    def same(what: str, got: object, expected: object) -> None:
        if got != expected:
            print(f"computed by hand: {what}: got {got}, expected {expected}", file=sys.stderr)
            sys.exit(2)

    def swaps(run: Run) -> list[float]:
        return [when for when, _ in run.swaps]

    for policy, order, times in (("fifo", "ABAABB", [1, 4, 8]), ("greedy", "AAABBB", [3]),
                                 ("max-wait", "AAABBB", [3]), ("jano", "AAABBB", [3])):
        run = Run(SIX, policy)
        same(f"six, {policy}", (run.served(), swaps(run)), (order, times))
    # Eight of A in a row while B waits; the first A came before B.
    run = Run(Work({"A": 2, "B": 2}, once("AB" + "A" * 10), loaded="A"), "max-batch")
    same("max-batch", run.served(), "A" * 9 + "B" + "AA")
    # Two on A for ever, ten seconds each. B comes at 5: none of A begins after 65, so B loads from
    # 70 to 90, and A again from 91 to 111. Now the round trip is known to be 40 s, so T is 140 s: B
    # of 200 waits until 340, then for the A that began at 331, then for its load.
    clients = [Client("A", 0, (10, 10), (0, 0))] * 2 + once("B", start=5) + once("B", start=200)
    for policy, times, waits in (("greedy", [], [395, 200]),
                                 ("max-wait", [70, 91, 261, 282], [85, 81]),
                                 ("jano", [70, 91, 341, 362], [85, 161])):
        run = Run(Work(AB, clients, 400, "A"), policy)
        same(f"ceiling, {policy}", (swaps(run), run.waits("B")), (times, waits))
    # Services of 4 s, pauses of 1.5 s, loads of 10 s. At 4 and 18 no pause is known yet. Then A
    # comes back in time again and again, until the round trip is over, from 28 to 48.
    clients = [Client(model, i, (4, 4), (1.5, 1.5)) for i, model in enumerate("AB")]
    run = Run(Work({"A": 10, "B": 10}, clients, 60, "A"), "jano")
    same("linger", (swaps(run), run.served()), ([4, 18, 48.5], "ABAAAAB"))
    # A at 1 is worth waiting for: 1 and 13 s, where greedy takes 11 and 21.
    work = Work({"A": 10, "B": 10}, once("B") + once("A", start=1), loaded="A")
    greedy = fmean(Run(work, "greedy").latencies.values())
    same("optimum", (optimum(work), greedy), (7, 16))


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulate jano's policy beside others.")
    parser.add_argument("--quick", action="store_true", help="fewer requests, within a minute")
    parser.add_argument("--scenario", choices=SCENARIOS, help="only this one")
    options = parser.parse_args()
    begin = time.monotonic()
    check_by_hand()
    figures = [figure for name, scenario in SCENARIOS.items()
               if options.scenario in (None, name) for figure in scenario(options.quick)]
    print("\nFigures\n")
    missed = 0
    for what, value, sign, limit in figures:
        kept = value <= limit if sign == "<=" else value >= limit
        missed += not kept
        print(f"{'kept  ' if kept else 'MISSED'}  {what:58} {value:7.2f} {sign} {limit:g}")
    print(f"\n{missed} missed; took {time.monotonic() - begin:.0f} s")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
