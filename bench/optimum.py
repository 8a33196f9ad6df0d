"""How far from the best possible policy is Jano's? A yardstick for two models.

    python bench/optimum.py [--quick]

Two models are asked for equally often: Poisson arrivals, services of 7 s in the mean, one at a
time. Services and loads are exponential, and a load runs to its end. The optimum has the least mean
number of requests that wait, and so (Little) the least mean wait. It knows the rates and both
queues, but not the future. It is found by relative value iteration on the uniformised chain
(Puterman, Markov Decision Processes, section 8.5), until its mean is known to within 0.5 %. Jano
and plain greed play the same in the simulation of bench/policy.py.

swaps at   requests for the other model that make an idle optimum swap; from 1 on, it waits for more
leaves     requests of the loaded model that the optimum leaves behind at most, to swap
queues     of at most so many requests are looked at; more must never matter

Needs numpy.
"""

from __future__ import annotations

import argparse
import random
import sys

import numpy as np
from numpy.typing import NDArray
from policy import Client, Run, Work, mean_wait
from tools import table

SERVICE = 7.0  # seconds in the mean

Grid = NDArray[
    np.float64
]  # a value for each state: [queue of the loaded model, queue of the other]


def polling_wait(utilisation: float, load: float) -> float:
    """Mean wait if both queues are served in turn until empty (Takagi 1986): a first guess."""
    services = utilisation / SERVICE * 2 * SERVICE**2
    return load / 2 + (services + load * (2 - utilisation)) / (2 * (1 - utilisation))


class Optimum:
    """The best policy for one utilisation and mean load."""

    def __init__(self, utilisation: float, load: float) -> None:
        total = utilisation / SERVICE
        self.arrivals = total / 2  # of each model, per second
        self.services = 1 / SERVICE
        self.loads = 1 / load
        self.steps = total + max(self.services, self.loads)  # of the uniformised chain, per second
        self.size = 20 + int(4 * total * polling_wait(utilisation, load))
        lengths = np.arange(self.size, dtype=np.float64)
        self.cost: Grid = np.add.outer(lengths, lengths)  # how many wait
        # What lies ahead, relative to an idle machine: while it serves, while the model of the
        # first queue loads, and while it idles.
        self.serving: Grid = np.zeros_like(self.cost)
        self.loading: Grid = np.zeros_like(self.cost)
        self.idling: Grid = np.zeros_like(self.cost)
        self.mean_wait = self.solve() / total

    def solve(self) -> float:
        """Iterate; the mean number that waits."""
        while True:
            free = self.free()
            serving = self.after_a_step(self.serving, free, self.services)
            loading = self.after_a_step(self.loading, free, self.loads)
            idling = self.after_a_step(free, free, 0)
            growth = [serving - self.serving, loading - self.loading, idling - self.idling]
            least = min(float(grid.min()) for grid in growth)
            most = max(float(grid.max()) for grid in growth)
            base = idling[0, 0]
            self.serving, self.loading, self.idling = serving - base, loading - base, idling - base
            if most - least < 0.005 * least:
                return (most + least) / 2

    def free(self) -> Grid:
        """The best that can be done when nothing runs: idle, swap or serve."""
        best = np.minimum(self.idling, self.loading.T)
        best[1:] = np.minimum(best[1:], self.serving[:-1])
        return best

    def after_a_step(self, stay: Grid, done: Grid, rate: float) -> Grid:
        """One step: a request may come, and what runs may be done."""
        more = np.vstack([stay[1:], stay[-1:]]) + np.hstack([stay[:, 1:], stay[:, -1:]])
        nothing = self.steps - 2 * self.arrivals - rate
        return self.cost + (self.arrivals * more + rate * done + nothing * stay) / self.steps

    def swaps_at(self) -> int:
        """How many requests for the other model make an idle machine swap."""
        swaps = self.loading.T[0] < self.idling[0]
        return int(np.argmax(swaps))

    def leaves(self) -> int:
        """The most requests that it leaves behind, with at most half the queue's size waiting."""
        half = self.size // 2
        best = np.minimum(self.idling[1:half, :half], self.serving[: half - 1, :half])
        behind, _ = np.nonzero(self.loading.T[1:half, :half] < best)
        return int(behind.max()) + 1 if behind.size else 0


class ExponentialLoads(Run):
    def load_seconds(self, model: str) -> float:
        return self.load_rng.expovariate(1 / self.work.load[model])


def simulate(policy: str, utilisation: float, load: float, count: int) -> float:
    """Jano's mean wait, or greed's."""
    rng = random.Random(0)
    clients = []
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(utilisation / SERVICE)
        seconds = rng.expovariate(1 / SERVICE)
        clients.append(Client(rng.choice("AB"), now, (seconds, seconds)))
    return mean_wait([ExponentialLoads(Work({"A": load, "B": load}, clients), policy)])


def check_by_hand() -> None:
    """Where loads take no time, the two queues are one: M/M/1, which waits for 7 s at 0.5."""
    wait = Optimum(0.5, 0.01).mean_wait
    if abs(wait - SERVICE) > 0.1:
        sys.exit(f"computed by hand: a mean wait of {SERVICE} s, got {wait}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Jano's mean wait beside the least possible.")
    parser.add_argument("--quick", action="store_true", help="fewer cases, about 20 s")
    quick = parser.parse_args().quick
    check_by_hand()
    count = 20_000 if quick else 100_000
    rows = []
    for load in (5, 20, 60):
        for utilisation in (0.3, 0.6) if quick else (0.3, 0.5, 0.7, 0.8, 0.9):
            optimum = Optimum(utilisation, load)
            jano = simulate("jano", utilisation, load, count)
            greedy = simulate("greedy", utilisation, load, count)
            rows.append(
                {
                    "load s": f"{load}",
                    "utilisation": f"{utilisation}",
                    "optimum s": f"{optimum.mean_wait:.1f}",
                    "swaps at": f"{optimum.swaps_at()}",
                    "leaves": f"{optimum.leaves()}",
                    "queues": f"{optimum.size}",
                    "greedy s": f"{greedy:.1f}",
                    "jano s": f"{jano:.1f}",
                    "greedy / optimum": f"{greedy / optimum.mean_wait:.2f}",
                    "jano / optimum": f"{jano / optimum.mean_wait:.2f}",
                }
            )
    table(f"Mean waits for two models; {count} requests a line are simulated", rows)


if __name__ == "__main__":
    main()
