"""Does the policy keep its promises? Jano's own Schedule, in virtual time.

    python bench/policy.py [--quick]
    python bench/policy.py --trace FILE [--load SECONDS]

The same requests are played under three policies: fifo is strictly in order of arrival, greedy is
MAX_TURN_MS=0, and jano has the defaults. The simulated worker does what the real one does: whatever
happens, it calls Schedule.advance, and swaps when a swap is due and nothing is in flight. A service
takes its time however many run beside it, and scripts never fail. docs/policy.md says what the
columns mean and what a trace looks like. Needs numpy.
"""

import argparse
import heapq
import itertools
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Figure, promises, table, verdict

from jano import Schedule, Ticket

# ----------------------------------------------------------------------------- simulation ----

Span = tuple[float, float]  # seconds, drawn evenly from between the two
Draw = Callable[[random.Random], float]


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
    helper: "Client | None" = None  # asks once, a little before each request of this client


@dataclass(frozen=True, eq=False)
class Work:
    """What is asked of one group of models, and how they load."""

    load: dict[str, float]  # model -> seconds it takes to load
    clients: list[Client]
    end: float = math.inf  # in seconds; without one, when all are served
    loaded: str | None = None  # at the start
    slots: int = 1
    turn: float = 60  # jano's two settings
    linger: float = 5
    vary: Draw = lambda _: 1  # draws by how much longer a load takes
    prefill: float = 0  # seconds more for each client's first request after a load: a lost cache
    seed: int = 0
    utilisation: float = 0  # of the streams that a best policy is known for


@dataclass(eq=False, kw_only=True)
class Request(Ticket):
    """A ticket, and who asked."""

    client: Client
    rng: random.Random
    tries: int
    service: float = 0
    waited: float = math.inf  # until its turn, until its client gave up, or until the end


class Fifo(Schedule):
    """Greed that sees nothing but the oldest ticket is first in, first out."""

    def heads(self) -> list[Ticket]:
        return super().heads()[:1]


class Run:
    """A worker and its clients, played to the end."""

    def __init__(self, work: Work, policy: str = "jano") -> None:
        self.work = work
        turn, linger = (work.turn, work.linger) if policy == "jano" else (0, 0)
        self.schedule = (Fifo if policy == "fifo" else Schedule)(turn, linger)
        self.schedule.slots = dict.fromkeys(work.load, work.slots)
        self.schedule.set_of = {model: model for model in work.load}
        if work.loaded:
            self.schedule.note_loaded(work.loaded, 0)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.event_number = itertools.count()  # orders events of the same time
        self.requests: list[Request] = []
        self.latencies: list[float] = []  # of those that were served
        self.swapping = False
        self.swaps: list[float] = []  # begun when
        self.loads: list[float] = []  # seconds of each swap
        self.forced_time = 0.0
        # Of models, to be loaded: how long, and with what patience.
        self.model_waits: list[tuple[float, float]] = []
        self.longest_trip = 0.0
        self.cached: set[Client] = set()  # whose prompts the loaded model remembers
        self.load_rng = random.Random(work.seed)
        self.play()

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
        for request in self.requests:
            request.waited = min(request.waited, self.now - request.arrived)
        for model in self.schedule.waiting_since:
            self.note_model_wait(model)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.event_number), action))

    def advance(self) -> None:
        """Worker.advance, and what its coroutine then does."""
        for request in self.schedule.advance(self.now):
            assert isinstance(request, Request)
            request.waited = self.now - request.arrived
            if request.client not in self.cached:
                self.cached.add(request.client)
                request.service += self.work.prefill
            self.at(self.now + request.service, partial(self.finish, request))
        _, swap_to, until = self.schedule.decision
        if swap_to is not None and not self.swapping and not self.schedule.in_flight:
            self.swap(swap_to)
        elif until is not None:
            self.at(until, lambda: None)

    def begin(self, client: Client, rng: random.Random, when: float) -> None:
        """The client asks at that time; its helper a little before."""
        if client.helper is not None:
            self.at(when, partial(self.ask, client.helper, rng))
            when += rng.uniform(0.1, 0.3)
        self.at(when, partial(self.ask, client, rng))

    def ask(self, client: Client, rng: random.Random, tries: int = 1) -> None:
        request = Request(client.model, self.now, client=client, rng=rng, tries=tries)
        request.service = rng.uniform(*client.service)
        self.requests.append(request)
        self.schedule.arrive(request, self.now)
        if client.time_out < math.inf:
            self.at(self.now + client.time_out, lambda: self.give_up(request))

    def give_up(self, request: Request) -> None:
        if request.granted is None:
            self.schedule.leave(request, self.now)
            request.waited = self.now - request.arrived
            if request.client.think is not None:
                self.ask(request.client, request.rng, request.tries + 1)

    def finish(self, request: Request) -> None:
        self.latencies.append(self.now - request.arrived)
        self.schedule.leave(request, self.now)
        client = request.client
        if client.think:
            self.begin(client, request.rng, self.now + request.rng.uniform(*client.think))

    def swap(self, model: str) -> None:
        draining_since = self.schedule.draining_since
        assert draining_since is not None
        seconds = self.work.load[model] * self.work.vary(self.load_rng)
        self.swaps.append(self.now)
        self.loads.append(seconds)
        if self.schedule.loaded and any(self.schedule.waiting(self.schedule.loaded)):
            self.forced_time += seconds
        self.schedule.note_unloaded(self.now)
        self.cached.clear()
        self.swapping = True
        self.at(self.now + seconds, lambda: self.swapped(model, draining_since))

    def swapped(self, model: str, draining_since: float) -> None:
        self.note_model_wait(model)
        self.schedule.note_loaded(model, self.now, self.now - draining_since)
        self.swapping = False
        self.longest_trip = max(self.longest_trip, sum(sorted(self.schedule.cost.values())[-2:]))

    def note_model_wait(self, model: str) -> None:
        if any(self.schedule.waiting(model)):
            since = self.schedule.waiting_since[model]
            patience = self.schedule.patient_until.get(model, since) - since
            self.model_waits.append((self.now - since, patience))

    def waits(self, model: str | None = None) -> list[float]:
        return [request.waited for request in self.requests if model in (None, request.model)]

    def wait_to_bound(self) -> float:
        """The longest of all models' waits, each as a share of what docs/policy.md promises it."""
        others = len(self.work.load) - 1
        load = max(self.loads, default=0.0)
        service = max(request.service for request in self.requests)
        shares = [0.0]
        for seconds, patience in self.model_waits:
            turn = max(self.work.turn, patience) + 2 * self.longest_trip
            shares.append(seconds / (others * (load + turn + service) + load))
        return max(shares)


# ------------------------------------------------------------------ the best orders, policies ----

State = tuple[frozenset[Client], str | None]  # who has been served, what is loaded
Way = tuple[float, float]  # seconds: the end of it, and the latencies in it, added up
Grid = NDArray[np.float64]  # a value for each state: [queue of the loaded model, of the other]
SERVICE = 7.0  # seconds in the mean, of streams


@cache
def optimum(work: Work) -> float:
    """The least mean latency, of all orders; a load may begin before the request that needs it."""
    ways: dict[State, list[Way]] = {(frozenset(), work.loaded): [(0, 0)]}
    for _ in work.clients:
        longer: dict[State, list[Way]] = defaultdict(list)
        for (served, loaded), pairs in ways.items():
            for client in set(work.clients) - served:
                load = work.load[client.model] if client.model != loaded else 0
                for now, total in pairs:
                    end = max(now + load, client.start) + client.service[0]
                    pair = end, total + end - client.start
                    longer[served | {client}, client.model].append(pair)
        ways = defaultdict(list)
        for state, pairs in longer.items():
            for now, total in sorted(pairs):  # none but those that no other beats in both
                if not ways[state] or total < ways[state][-1][1]:
                    ways[state].append((now, total))
    return min(total for pairs in ways.values() for _, total in pairs) / len(work.clients)


@cache
def best_policy(work: Work) -> tuple[float, int]:
    """The least mean wait, and how many requests for the other model make an idle machine swap.

    Relative value iteration on the uniformised chain (Puterman, Markov Decision Processes, 8.5),
    until the mean is known to within 0.5 %. Arrivals, services and loads are exponential, two
    models are asked for equally often; the policy knows the rates and both queues.
    """
    utilisation, load = work.utilisation, work.load["A"]
    total = utilisation / SERVICE  # arrivals per second
    steps = total + max(1 / SERVICE, 1 / load)  # of the chain, per second
    # The mean wait if both queues are served in turn until empty (Takagi 1986): a first guess.
    switching = load * (2 - utilisation) / (1 - utilisation)
    guess = load / 2 + (2 * utilisation * SERVICE / (1 - utilisation) + switching) / 2
    lengths = np.arange(20 + int(4 * total * guess), dtype=np.float64)
    waiting = np.add.outer(lengths, lengths)

    def step(stay: Grid, done: Grid, rate: float) -> Grid:
        """A request may come, and what runs may be done."""
        more = np.vstack([stay[1:], stay[-1:]]) + np.hstack([stay[:, 1:], stay[:, -1:]])
        nothing = (steps - total - rate) * stay
        return waiting + (total / 2 * more + rate * done + nothing) / steps

    # What lies ahead: while it serves, while the first queue's model loads, and while it idles.
    serving = loading = idling = np.zeros_like(waiting)
    while True:
        free = np.minimum(idling, loading.T)
        free[1:] = np.minimum(free[1:], serving[:-1])
        after = step(serving, free, 1 / SERVICE), step(loading, free, 1 / load), step(free, free, 0)
        growth = np.subtract(after, (serving, loading, idling))
        serving, loading, idling = np.subtract(after, after[2][0, 0])  # relative to an idle machine
        if np.ptp(growth) < 0.005 * growth.min():
            mean = (growth.min() + growth.max()) / 2
            return float(mean / total), int(np.argmax(loading.T[0] < idling[0]))


# ----------------------------------------------------------------------------- scenarios ----

FEW: Span = (4, 10)  # a service of a few seconds; loads take 20 s where nothing else is said
Cases = Iterable[tuple[str, list[Work]]]  # a name, and what is played


def loads(models: Iterable[str], seconds: float = 20) -> dict[str, float]:
    return dict.fromkeys(sorted(set(models)), seconds)


def once(models: Iterable[str], service: Span = FEW, start: float = 0) -> list[Client]:
    """One request each, a hundredth of a second apart."""
    return [Client(model, start + i / 100, service) for i, model in enumerate(models)]


def loops(models: str, think: Span = (0, 0), service: Span = FEW) -> list[Client]:
    """Clients that ask again and again; at first a second apart."""
    return [Client(model, i, service, think) for i, model in enumerate(models)]


def people() -> Cases:
    bursts = []
    for seed in range(20):
        models = random.Random(seed).choices("ABC", k=200)
        bursts.append(Work(loads("ABC"), once(models), seed=seed))
    agents = Work(loads("AB"), loops("AB", (0.2, 3)), 36000)
    varied = replace(agents, vary=lambda rng: 1 + rng.uniform(-0.6, 0.6))
    four = Work(loads("AB"), loops("ABAB", (0.2, 30)), 36000, prefill=20)
    looping = [*loops("AAA"), Client("B", 300, FEW, (60, 1200))]
    batch = [*once("A" * 500), Client("B", 100, FEW, (60, 300))]
    yield "six requests", [Work(loads("AB", 2), once("ABAABB", (1, 1)), loaded="A")]
    yield "burst of 200", bursts
    yield "two agents", [agents]
    yield "two agents, loads of 8 to 32 s", [varied]
    yield "four agents, prefill of 20 s", [four]
    yield "person beside endless loops", [Work(loads("AB"), looping, 86400)]
    yield "person beside a batch of 500", [Work(loads("AB"), batch, 5400)]
    yield "a public trace", [read_trace(Path(__file__).with_name("trace.csv"), 20)]


def read_trace(path: Path, load: float) -> Work:
    clients = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            arrival, model, service = line.split(",")
            clients.append(Client(model, float(arrival), (float(service), float(service))))
    return Work(loads([client.model for client in clients], load), clients)


def endless(hours: int) -> Cases:
    """Do turns grow with time?"""
    for models, count in (("AB", 3), ("ABC", 1), ("ABC", 3), ("ABCD", 3), ("AB", 40)):
        work = Work(loads(models), loops(models * count), hours * 3600)
        yield f"endless loops, {count} on each of {len(models)}", [work]


def poisson(quick: bool) -> Cases:
    """Each request for a model picked from the letters of the mix."""
    mixes = ["AB", "ABC", "ABCD", "AAAAB", "AAAAAABBBC", "AAAAABBBBBC", "AAAAAAABBCC", "AAAAAAAAAB"]
    for mix, utilisation in itertools.product(mixes, (0.6, 0.8, 0.95)):
        works = []
        for seed in range(2 if quick else 6):
            rng = random.Random(f"{mix} {seed}")
            arrivals = stream(rng, mix, utilisation, lambda rng: rng.uniform(*FEW))
            clients = itertools.islice(arrivals, 2000 if quick else 5000)
            works.append(Work(loads(mix), list(clients)))
        shares = " : ".join(str(mix.count(model)) for model in works[0].load)
        kind = "Poisson" if len(mix) <= 4 else "lopsided" if shares == "9 : 1" else "uneven"
        yield f"{kind} {shares}, {utilisation}", works


def exponential(quick: bool) -> Cases:
    """Two models, services and loads that are exponential, too."""
    utilisations = (0.3, 0.6) if quick else (0.3, 0.5, 0.7, 0.8, 0.9)
    for load, utilisation in itertools.product((5, 20, 60), utilisations):
        rng = random.Random(0)
        arrivals = stream(rng, "AB", utilisation, lambda rng: rng.expovariate(1 / SERVICE))
        clients = list(itertools.islice(arrivals, 20_000 if quick else 100_000))
        work = Work(loads("AB", load), clients, utilisation=utilisation)
        varied = replace(work, vary=lambda rng: rng.expovariate(1))
        yield f"loads of {load} s, {utilisation}", [varied]


def stream(rng: random.Random, mix: str, utilisation: float, draw: Draw) -> Iterator[Client]:
    """Poisson arrivals without an end; the seconds of a service are drawn."""
    now = 0.0
    while True:
        now += rng.expovariate(utilisation / SERVICE)
        seconds = draw(rng)
        yield Client(rng.choice(mix), now, (seconds, seconds))


def impatient(hours: int) -> Cases:
    """Three clients on C give up after 300 s and ask again, where turns last longer than that."""
    for busy, load in (("AAA", 65), ("AAABBB", 40)):
        asking = [Client("C", start, FEW, (60, 600), 300) for start in (100, 400, 900)]
        work = Work(loads(busy + "C", load), [*loops(busy), *asking], hours * 3600)
        yield f"time-outs beside {len(busy)} endless loops", [work]


def helpers(hours: int) -> Cases:
    """A request for B 0.1 to 0.3 s before each one for A: a title, a completion."""
    for think, patience in itertools.product(((6, 30), (60, 300)), (3, math.inf)):
        ahead = Client("B", 0, (0.5, 1), time_out=patience)
        work = Work(loads("AB"), [Client("A", 0, FEW, think, helper=ahead)], hours * 3600)
        yield f"helpers, {patience} s, each {think[0]} to {think[1]} s", [work]


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
    load = {model: rng.uniform(2, 60) for model in models}
    slots = rng.choice((1, 1, 2, 4))
    turn = rng.choice((15, 30, 60, 120))
    linger = rng.choice((0, 5, 10))
    return Work(load, clients, 7200, slots=slots, turn=turn, linger=linger, seed=seed)


def eight_requests(seed: int) -> Work:
    """Eight within ten seconds, on two or three models."""
    rng = random.Random(seed)
    models = "ABC"[: rng.randint(2, 3)]
    clients = []
    for _ in range(8):
        seconds = rng.uniform(*FEW)
        clients.append(Client(rng.choice(models), rng.uniform(0, 10), (seconds, seconds)))
    return Work({model: rng.uniform(10, 30) for model in models}, clients, loaded="A")


# --------------------------------------------------------------------- measures and figures ----


def waits_of_rarest(run: Run) -> list[float]:
    """Of the requests for the model that is asked for least: a person's."""
    return min((run.waits(model) for model in run.work.load), key=len)


def growth(run: Run) -> float:
    """How many times longer turns are in the last hour than in the second: from swap to swap."""
    hours: dict[int, list[float]] = defaultdict(list)
    for when in run.swaps:
        hours[int(when / 3600)].append(when)
    turns = [(times[-1] - times[0]) / (len(times) - 1) for times in hours.values()]
    return turns[-1] / turns[1]


MEASURES: dict[str, Callable[[list[Run]], float]] = {
    "swaps": lambda runs: fmean(len(run.swaps) for run in runs),
    "most swaps": lambda runs: max(len(run.swaps) for run in runs),
    "makespan s": lambda runs: fmean(run.now for run in runs),
    "requests/h": lambda runs: fmean(len(run.latencies) / run.now * 3600 for run in runs),
    "in swaps": lambda runs: sum(sum(run.loads) for run in runs) / sum(run.now for run in runs),
    "mean wait s": lambda runs: fmean(wait for run in runs for wait in run.waits()),
    "longest": lambda runs: max(max(run.waits()) for run in runs),
    "rarest's mean": lambda runs: fmean(wait for run in runs for wait in waits_of_rarest(run)),
    "rarest's longest": lambda runs: max(max(waits_of_rarest(run)) for run in runs),
    "turns, last hour's / 2nd's": lambda runs: growth(*runs),
    "most tries": lambda runs: max(request.tries for request in runs[0].requests),
    "swaps a helper": lambda runs: len(runs[0].swaps) / len(runs[0].waits("B")),
    "main request's wait s": lambda runs: fmean(runs[0].waits("A")),
    "wait / bound": lambda runs: max(run.wait_to_bound() for run in runs),
    "in forced swaps": lambda runs: max(run.forced_time / run.now for run in runs),
    "latency / optimum": lambda runs: fmean(
        fmean(run.latencies) / optimum(run.work) for run in runs
    ),
    "mean wait / optimum": lambda runs: fmean(runs[0].waits()) / best_policy(runs[0].work)[0],
    "optimum s": lambda runs: best_policy(runs[0].work)[0],
    "optimum swaps at": lambda runs: best_policy(runs[0].work)[1],
    "swaps above the fewest": lambda runs: max(
        len(run.swaps) - len({client.model for client in run.work.clients} - {"A"}) for run in runs
    ),
}
PEOPLE = "swaps; most swaps; makespan s; requests/h; in swaps; mean wait s; longest; "
PEOPLE += "rarest's mean; rarest's longest"
Values = dict[tuple[str, str], dict[str, float]]  # case and policy -> measures


def play(title: str, policies: str, columns: str, cases: Cases) -> Values:
    """Play them and print a table."""
    rows = []
    values: Values = {}
    for case, works in cases:
        for policy in policies.split():
            runs = [Run(work, policy) for work in works]
            own = {column: MEASURES[column](runs) for column in columns.split("; ")}
            values[case, policy] = own
            cells = {what: f"{x:.0f}" if x >= 100 else f"{x:.2f}" for what, x in own.items()}
            rows.append({"": case, "policy": policy} | cells)
    table(title, rows)
    return values


def play_all(quick: bool) -> Values:
    hours = 4 if quick else 24
    mixtures = [mixture(seed) for seed in range(100 if quick else 400)]
    eights = [eight_requests(seed) for seed in range(50 if quick else 300)]
    ahead = "swaps a helper; main request's wait s"
    worst = "wait / bound; in forced swaps"
    optimum = "optimum s; mean wait / optimum; optimum swaps at"
    best = "latency / optimum; swaps above the fewest"
    return (
        play("People, bursts, a trace", "fifo greedy jano", PEOPLE, people())
        | play("Endless loops", "jano", "turns, last hour's / 2nd's; longest", endless(hours))
        | play("Random arrivals", "greedy jano", "mean wait s; in swaps", poisson(quick))
        | play("Clients that ask again", "jano", "most tries", impatient(hours // 2))
        | play("Requests ahead of others", "jano", ahead, helpers(hours))
        | play("The worst of random mixtures", "jano", worst, [("mixtures", mixtures)])
        | play("Beside the best policy", "greedy jano", optimum, exponential(quick))
        | play("Beside a clairvoyant", "fifo greedy jano", best, [("eight requests", eights)])
    )


def figures(values: Values, quick: bool) -> list[Figure]:
    found = []
    for prefix, measure, other, sign, limit in promises("policy", quick):
        measured = []
        for (case, policy), own in values.items():
            if policy == "jano" and case.startswith(prefix):
                measured.append(own[measure] / (values[case, other][measure] if other else 1))
        name = f"{prefix}: {measure}" + f", times {other}'s" * bool(other)
        worst = max(measured) if sign == "<=" else min(measured)
        found.append(Figure(name, worst, sign, limit))
    return found


# ------------------------------------------------------------------------ by hand, and main ----


def check_by_hand() -> None:
    """What is known otherwise of the optimum and of the best policy."""
    # A at 1 is worth waiting for: 1 and 13 s, where greedy takes 11 and 21.
    work = Work(loads("AB", 10), [Client("B", 0, (1, 1)), Client("A", 1, (1, 1))], loaded="A")
    assert (optimum(work), fmean(Run(work, "greedy").latencies)) == (7, 16)
    # Where loads take no time, the two queues are one: M/M/1, which waits for 7 s at 0.5.
    work = Work(loads("AB", 0.01), [], utilisation=0.5)
    assert abs(best_policy(work)[0] - SERVICE) < 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulate jano's policy beside others.")
    parser.add_argument("--quick", action="store_true", help="fewer requests, about 10 s")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="play this file, nothing else")
    parser.add_argument("--load", type=float, default=20, help="seconds of a load, for --trace")
    options = parser.parse_args()
    check_by_hand()
    if options.trace:
        trace = [(options.trace.name, [read_trace(options.trace, options.load)])]
        play("A trace", "fifo greedy jano", PEOPLE, trace)
        return 0
    return verdict(figures(play_all(options.quick), options.quick))


if __name__ == "__main__":
    sys.exit(main())
