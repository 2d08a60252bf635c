"""Random networks, episodes and learners on the CPU's kernels against plain autograd: 50 here, 1,000 by ``make fuzz``.
Some small ones go by the emulated kernels too.

Batch n of 50 is drawn from seed n, so that the first is the slice that CI runs. In even batches all choices are as
likely; in odd ones hypothesis makes each, which likes extremes, and shrinks what fails. Cases
that say nothing are drawn anew, and counted: where the reference refuses or is not finite, where a kink is so near
that a rounding decides, and where roundings of the numbers given change the reference by more than the bar allows.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, seed, settings
from hypothesis import strategies as st

from metafast import _native
from metafast.checks.compare import relative_error
from tests.backends import in_order, native
from tests.engine import fuzz

BAR = 1e-10
EACH = 50
BATCHES = max(int(os.environ.get("METAFAST_FUZZ", "50")) // EACH, 1)
NEAR = 1e-9  # what two computations of an activation may differ by, with much to spare


class Seeded(random.Random):
    """A source of equally likely choices that tells its seed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __repr__(self) -> str:
        return f"Seeded({self.number})"


class SaysNothing(Exception):
    """Of a case: why."""


def reference(case: fuzz.Case) -> fuzz.Result:
    """The plain result, of a case that says something."""
    try:
        with fuzz.Margin() as margin:
            wanted = fuzz.plain(case)
    except (ValueError, RuntimeError) as error:
        known = ("Expected more than 1 value per channel", "element 0 of tensors does not require grad")
        if not str(error).startswith(known):
            raise
        raise SaysNothing("refused") from error
    if not all(bool(t.isfinite().all()) for t in wanted.tensors.values()):
        raise SaysNothing("not finite")
    if margin.smallest < NEAR:
        raise SaysNothing("kink")
    return wanted


def errors(found: fuzz.Result, wanted: fuzz.Result) -> dict[str, float]:
    return {name: relative_error(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors}


def known_digits(case: fuzz.Case, wanted: fuzz.Result) -> dict[str, float]:
    """By how much a few roundings of what is given change each quantity."""
    moves = [errors(fuzz.plain(fuzz.moved(case, s)), wanted) for s in range(3)]
    return {name: max(move[name] for move in moves) for name in wanted.tensors}


def by_turns(case: fuzz.Case, backend: str) -> tuple[fuzz.Result, fuzz.Result]:
    """By several threads and by one; emulated, in another order of threads and blocks and in ascending order."""
    if backend == "cpu":
        return fuzz.native(case, case.threads), fuzz.native(case, 1)
    with in_order(backend, case.threads):
        other = fuzz.native(case, 1, backend)
    return other, fuzz.native(case, 1, backend)


def check(case: fuzz.Case, backend: str = "cpu") -> None:
    wanted = reference(case)
    found, alone = by_turns(case, backend)
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, alone.tensors[name]), f"{name}: other bits by threads, or order, {case.threads}"
    wrong = {name: error for name, error in errors(found, wanted).items() if not error <= BAR}
    if wrong:
        digits = known_digits(case, wanted)
        # A derivative that is zero but for rounding, for instance: amplified 10,000 times, one is not to be had.
        unknown = {name for name in wrong if digits[name] > BAR / 10}
        assert wrong.keys() <= unknown, f"errors {wrong}, where roundings make {digits}"
        raise SaysNothing("ill-conditioned")
    if case.episodes.query_y.dtype == torch.int64:
        assert found.accuracy is not None and torch.equal(found.accuracy, alone.accuracy)
        top = wanted.tensors["logits"].topk(min(2, wanted.tensors["logits"].shape[-1])).values
        if bool((top[..., 0] - top[..., -1] > NEAR).all()):
            assert torch.equal(found.accuracy, wanted.accuracy)


@native
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_learners_on_random_networks(batch: int) -> None:
    seen: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    even = batch % 2 == 0
    sources = st.integers(0, 2**62).map(Seeded) if even else st.randoms(use_true_random=False)

    @seed(batch)
    @settings(
        max_examples=EACH,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(sources)
    def run(r: random.Random) -> None:
        case = fuzz.draw(r)
        note(str(case))
        try:
            check(case)
        except SaysNothing as why:
            dropped[str(why)] += 1
            assume(False)
        seen.update(("cases", case.kind, case.door, f"{case.threads} threads", f"{case.steps} steps"))

    run()
    print(f"{batch}: {dict(seen)}, dropped: {dict(dropped)}")
    assert seen["cases"] >= EACH
    assert not even or all(seen[name] > 0 for name in (*fuzz.KINDS, *fuzz.DOORS, "3 threads", "3 steps"))
    assert dropped.total() <= seen["cases"] // 4


@pytest.mark.skipif(bool(_native.missing("simt")), reason=_native.missing("simt"))
def test_small_random_learners_on_the_emulated_kernels() -> None:
    """Of 60 draws those that the emulator has done in a blink, and in which something is learned."""
    seen: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for case in map(fuzz.draw, map(random.Random, range(20, 80))):
        e = case.episodes
        samples = e.tasks * (e.query_x.shape[1] + max(case.steps, 1) * e.support_x.shape[1])
        if (case.steps == 0 and case.kind != "protonets") or samples * e.support_x[0, 0].numel() > 300:
            continue
        try:
            check(case, "simt")
        except SaysNothing as why:
            dropped[str(why)] += 1
            continue
        seen.update(("cases", case.kind, case.door, f"{case.threads} threads"))
    print(f"{dict(seen)}, dropped: {dict(dropped)}")
    assert all(seen[name] > 0 for name in (*fuzz.KINDS, *fuzz.DOORS, "3 threads"))
    assert dropped.total() <= seen["cases"] // 4


@native
def test_a_wrong_rule_is_found() -> None:
    """The comparison is one that can fail."""
    case = next(c for c in map(fuzz.draw, map(random.Random, range(99))) if c.kind == "momentum" and c.steps and c.lr)
    wanted = fuzz.plain(case)
    assert max(errors(fuzz.native(case, 1), wanted).values()) <= BAR
    case.lr *= 1 + 1e-8
    assert max(errors(fuzz.native(case, 1), wanted).values()) > BAR
