"""Times of several sides in one process, in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from metafast import _check

# metafast's engine records its operations after a dozen calls; after these every side is as fast as it gets.
WARM_UP_CALLS = 16
MIN_ROUNDS = 3
# A round of one side takes at least this long, so that the clock and the change of sides do not count.
ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one side, a mean for each round of ``calls`` calls."""

    rounds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """The median over the rounds, seconds a call."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile over the rounds, seconds a call."""
        first, _, third = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return first, third


def alternate(
    sides: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time the sides in turns.

    Each is warmed up, for at most a quarter of the time. Then in every round each side runs once more untimed, since
    the one before left the caches full of its own, and is timed for at least 20 ms; the order changes from round to
    round.

    Args:
        sides: what to time, by name.
        seconds: how long, warm-up and all sides together; at least three rounds are run however long they take.
        clock: seconds that have passed.

    Raises:
        TypeError, ValueError: seconds is no number of at least 0, there are no sides.

    Example:
        >>> timings = alternate({"sum": lambda: sum(range(1000)), "pass": lambda: None}, seconds=0.2)
        >>> timings["sum"].median > timings["pass"].median
        True
    """
    _check.number("seconds", seconds, minimum=0.0)
    if not sides:
        raise ValueError("sides: expected at least one, got none")
    start = clock()
    share = seconds / 4 / len(sides)
    calls = {name: max(1, round(ROUND_SECONDS / _warm_up(side, share, clock))) for name, side in sides.items()}
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    while len(rounds[order[0]]) < MIN_ROUNDS or clock() - start < seconds:
        for name in order:
            side, count = sides[name], calls[name]
            if count > 1:
                side()
            before = clock()
            for _ in range(count):
                side()
            rounds[name].append((clock() - before) / count)
        order = order[1:] + order[:1]
    return {name: Timing(tuple(rounds[name]), calls[name]) for name in sides}


def _warm_up(side: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of the warm-up calls."""
    start = clock()
    fastest = float("inf")
    for _ in range(WARM_UP_CALLS):
        before = clock()
        side()
        after = clock()
        fastest = min(fastest, after - before)
        if after - start > seconds:
            break
    return max(fastest, 1e-7)
