"""Times of several sides in one process, in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from metafast import _check

# Seconds that so many calls of a side take.
Stopwatch = Callable[[Callable[[], object], int], float]

# metafast's engine records its operations after a dozen calls; after these every side is as fast as it gets.
WARM_UP_CALLS = 16
MIN_ROUNDS = 3
# A round of one side takes at least this long, so that the clock and the change of sides do not count.
ROUND_SECONDS = 0.02
# What goes before it untimed: threads of OpenMP keep a core busy for up to 8 ms after the call that wanted them. Calls
# of many times as long hardly notice.
LEAD_SECONDS = 0.01
LONG_SECONDS = 0.1


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


def by_clock(clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """For the CPU, where a call that has returned is done."""

    def measure(side: Callable[[], object], calls: int) -> float:
        before = clock()
        for _ in range(calls):
            side()
        return clock() - before

    return measure


def by_events(new_event: Callable[[], Any], stream: Callable[[], Any]) -> Stopwatch:
    """For a GPU: the time between two events of a stream; nothing waits for the calls but the end of the second.

    It is the longer of what the calls take on the GPU and of what the host takes to start them. What computes outside
    the stream, as JAX does, is in it as far as the host waits for it.

    Args:
        new_event: makes an event, with ``record(stream)``, ``synchronize()`` and ``elapsed_time(event)`` in ms.
        stream: the stream in which the calls are.
    """

    def measure(side: Callable[[], object], calls: int) -> float:
        before, after = new_event(), new_event()
        before.record(stream())
        for _ in range(calls):
            side()
        after.record(stream())
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    return measure


def stopwatch(device: torch.device) -> tuple[str, Stopwatch]:
    """What times a device, and its name: CUDA's events on a GPU, the clock elsewhere."""
    if device.type != "cuda":
        return "perf_counter", by_clock()
    events = by_events(lambda: torch.cuda.Event(enable_timing=True), lambda: torch.cuda.current_stream(device))
    return "cuda events", events


def alternate(
    sides: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    measure: Stopwatch | None = None,
) -> dict[str, Timing]:
    """Time the sides in turns.

    Each is warmed up, for at most a quarter of the time. Then in every round each side runs for 10 ms untimed, since
    the one before left the caches full of its own and its threads waiting for more, unless a call takes 0.1 s and more,
    and is timed for at least 20 ms; the order changes from round to round.

    Args:
        sides: what to time, by name.
        seconds: how long, warm-up and all sides together; at least three rounds are run however long they take.
        clock: seconds that have passed.
        measure: times calls; by the clock if None.

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
    measure = by_clock(clock) if measure is None else measure
    start = clock()
    share = seconds / 4 / len(sides)
    warm = {name: _warm_up(side, share, clock, measure) for name, side in sides.items()}
    calls = {name: max(1, round(ROUND_SECONDS / each)) for name, each in warm.items()}
    lead = {name: math.ceil(LEAD_SECONDS / each) if each < LONG_SECONDS else 0 for name, each in warm.items()}
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    while len(rounds[order[0]]) < MIN_ROUNDS or clock() - start < seconds:
        for name in order:
            side, count = sides[name], calls[name]
            if lead[name] > 0:
                measure(side, lead[name])
            rounds[name].append(measure(side, count) / count)
        order = order[1:] + order[:1]
    return {name: Timing(tuple(rounds[name]), calls[name]) for name in sides}


def _warm_up(side: Callable[[], object], seconds: float, clock: Callable[[], float], measure: Stopwatch) -> float:
    """Seconds of the fastest of the warm-up calls."""
    start = clock()
    fastest = float("inf")
    for _ in range(WARM_UP_CALLS):
        fastest = min(fastest, measure(side, 1))
        if clock() - start > seconds:
            break
    return max(fastest, 1e-7)
