"""All cases on a device, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from metafast import _check
from metafast.backend import BACKENDS, current_backend, use_backend
from metafast.checks.compare import Case, Finding, examine
from metafast.checks.learners import learner_cases
from metafast.checks.operators import operator_cases


def cases(quick: bool = False) -> list[Case]:
    """Every operator and every learner; ``quick`` leaves out larger sizes and 5 steps."""
    return [*operator_cases(quick), *learner_cases(quick)]


def run(device: str = "cpu", backend: str | None = None, quick: bool = False) -> Iterator[list[Finding]]:
    """Examine all cases; the findings of a case in one dtype come as soon as they are made.

    Args:
        device: where metafast computes; the float64 it is compared with is always the CPU's.
        backend: the one to force; None for the one in force.
        quick: fewer sizes and steps.

    Raises:
        TypeError, ValueError: no such device or backend here, before any work.

    Example:
        >>> [(f.subject, f.quantity, f.passed) for f in next(run(quick=True))][0]
        ('inner_update', 'values', True)
    """
    where = _device(device)
    _check.flag("quick", quick)
    backend = current_backend() if backend is None else _check.choice("backend", backend, BACKENDS)
    with use_backend(backend):
        pass  # refuses one that this build does not have
    return _findings(where, backend, quick)


def _findings(device: torch.device, backend: str, quick: bool) -> Iterator[list[Finding]]:
    for case in cases(quick):
        for dtype in case.dtypes:
            with use_backend(backend):
                found = examine(case, device, dtype)
            yield found


def _device(name: str) -> torch.device:
    if not isinstance(name, str):
        raise TypeError(f"device: expected a name like 'cpu' or 'cuda:0', got {_check.describe(name)}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: expected one that this machine and torch have, got {name!r}: {reason}") from error
    return device
