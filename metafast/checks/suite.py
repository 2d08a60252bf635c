"""All cases on a device, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from metafast import _check, _native
from metafast.backend import BACKENDS, Refusal, current_backend, use_backend
from metafast.checks.compare import BAR_FLOAT64, Case, Finding, examine, full_float32
from metafast.checks.learners import learner_cases
from metafast.checks.operators import operator_cases


def cases(quick: bool = False, subjects: Sequence[str] = (), kernels: str = "") -> list[Case]:
    """Every operator and every learner.

    Args:
        quick: without larger sizes and 5 steps.
        subjects: these alone; all where empty.
        kernels: the backend whose kernels may be had, for the cases that only some have.
    """
    every = [*operator_cases(quick), *learner_cases(quick)]
    known = list(dict.fromkeys(case.subject for case in every))
    for subject in subjects:
        _check.choice("subject", subject, known)
    return [
        case for case in every if (not subjects or case.subject in subjects) and (not case.only or kernels in case.only)
    ]


def run(
    device: str = "cpu", backend: str | None = None, quick: bool = False, subjects: Sequence[str] = ()
) -> Iterator[list[Finding]]:
    """Examine all cases; the findings of a case in one dtype come as soon as they are made.

    Where no backend is forced, the kernels of the device's type compute what they can and torch the rest, and each
    finding says which. A forced backend computes all, and what it refuses fails.

    Args:
        device: where metafast computes; the float64 it is compared with is always the CPU's.
        backend: the one to force; None for the one in force.
        quick: fewer sizes and steps.
        subjects: these operators and learners alone; all where empty.

    Raises:
        TypeError, ValueError: no such device, backend or subject here, before any work.

    Example:
        >>> [(f.subject, f.quantity, f.passed) for f in next(run(quick=True))][0]
        ('inner_update', 'values', True)
    """
    where = _device(device)
    _check.flag("quick", quick)
    backend = current_backend() if backend is None else _check.choice("backend", backend, BACKENDS)
    with use_backend(backend):
        pass  # refuses one that this build does not have
    if (backend == "cuda") != (where.type == "cuda") and backend not in ("auto", "torch"):
        computes = "cuda" if backend == "cuda" else "cpu"
        raise ValueError(f"backend: {backend!r} computes on {computes} tensors, the device is {device!r}")
    kernels = kernels_of(where, backend)
    return _findings(where, backend, kernels, cases(quick, subjects, kernels))


def kernels_of(device: torch.device, backend: str) -> str:
    """The backend whose kernels a run has, empty: torch alone."""
    if backend != "auto":
        return backend.replace("torch", "")
    return "" if _native.missing(device.type) else device.type


def _findings(device: torch.device, backend: str, kernels: str, chosen: list[Case]) -> Iterator[list[Finding]]:
    for case in chosen:
        for dtype in case.dtypes:
            with full_float32():
                found = _examine(case, device, dtype, backend, kernels)
            yield found


def _examine(case: Case, device: torch.device, dtype: torch.dtype, backend: str, kernels: str) -> list[Finding]:
    refusal = ""
    if kernels and not case.by_torch:
        try:
            with use_backend(kernels):
                return examine(case, device, dtype, kernels)
        except Refusal as error:
            refusal = str(error)
        if backend == kernels:
            name = str(dtype).removeprefix("torch.")
            return [Finding(case.subject, case.name, "all", name, float("inf"), BAR_FLOAT64, refusal, "", refusal)]
    with use_backend(backend):
        return examine(case, device, dtype, "torch", refusal)


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
