"""One comparison: a computation of metafast's, the same in plain PyTorch, and how far apart they may be.

float64: relative error at most 1e-10 against plain float64 on the CPU.
float32: against plain float64 on the CPU, of the same float32 inputs, at most twice the error that plain float32
PyTorch makes on the same device (without TF32), plus 1e-5; never more than 1e-2, or a case on which PyTorch itself is
lost would pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafast.backend import Refusal
from metafast.episodes import Episodes

BAR_FLOAT64 = 1e-10
FACTOR_FLOAT32 = 2.0
FLOOR_FLOAT32 = 1e-5
MOST_FLOAT32 = 1e-2

Input = Tensor | nn.Module | Episodes
Inputs = dict[str, Input]
Quantities = dict[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One subject in one configuration.

    Attributes:
        subject: the operator or learner.
        name: the configuration, in words.
        inputs: makes the inputs, seeded, float64 on the CPU; several draws, and the worst counts.
        metafast: what is checked: inputs to named quantities, a few tensors each.
        plain: the same quantities in plain PyTorch.
        dtypes: those that the case is for.
        by_torch: PyTorch's own derivatives do it on every backend.
        only: the backends that alone have it; all have where empty.
    """

    subject: str
    name: str
    inputs: tuple[Callable[[], Inputs], ...]
    metafast: Callable[[Inputs], Quantities]
    plain: Callable[[Inputs], Quantities]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    by_torch: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """The worst relative error of one quantity, in one dtype, and the bar it is held to.

    ``note`` says what went wrong where there is no error to compare: the computation raised. ``by`` is what computed,
    a backend's kernels or torch, and ``refusal`` why it was not the kernels.
    """

    subject: str
    case: str
    quantity: str
    dtype: str
    error: float
    bar: float
    note: str = ""
    by: str = ""
    refusal: str = ""

    @property
    def passed(self) -> bool:
        """Within the bar."""
        return self.error <= self.bar


def flat_gradient(parameters: Iterable[Tensor]) -> Tensor:
    """The .grad of all parameters that require gradients, one after the other; zeros where there is none."""
    of = [p for p in parameters if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in of])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in the 2-norm, in float64 on the CPU.

    Infinite where either is not finite, and where ``wanted`` is zero and ``found`` is not.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"found: expected shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
    found, wanted = (t.detach().to("cpu", torch.float64) for t in (found, wanted))
    distance, size = float((found - wanted).norm()), float(wanted.norm())
    if distance == 0.0:
        return 0.0
    error = distance / size if size > 0.0 else math.inf
    # No comparison with NaN is true: it would get lost among other errors.
    return math.inf if math.isnan(error) else error


def moved(inputs: Inputs, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """Copies of the inputs on a device, what is floating in ``dtype``."""

    def move(value: Input) -> Input:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(device=device, dtype=dtype)
        if isinstance(value, Episodes):
            return value.to(device, dtype)
        return value.detach().clone().to(device, dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 with all its digits on a GPU too, where cuDNN's convolutions keep ten bits of them (TF32) otherwise."""
    places: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)  # whose settings have no types
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, allowed in zip(places, before):
            place.allow_tf32 = allowed


def examine(
    case: Case, device: torch.device | str, dtype: torch.dtype, by: str = "", refusal: str = ""
) -> list[Finding]:
    """The findings of a case in one dtype, a quantity each.

    What the computation raises becomes a finding that fails, so that one broken operator does not hide the others.

    Args:
        case: what to examine.
        device: where.
        dtype: in what.
        by: what computes, for the findings.
        refusal: why the kernels do not, for the findings.

    Raises:
        Refusal: a backend is forced that has no kernels for the case.
    """
    name = str(dtype).removeprefix("torch.")
    errors: dict[str, float] = {}
    plain_errors: dict[str, float] = {}
    try:
        for draw in case.inputs:
            inputs = moved(draw(), "cpu", dtype)
            wanted = case.plain(moved(inputs, "cpu", torch.float64))
            found = case.metafast(moved(inputs, device, dtype))
            _keep_worst(errors, found, wanted)
            if dtype != torch.float64:
                _keep_worst(plain_errors, case.plain(moved(inputs, device, dtype)), wanted)
    except Refusal:
        raise
    except Exception as error:
        note = f"{type(error).__name__}: {error}"
        return [Finding(case.subject, case.name, "all", name, math.inf, BAR_FLOAT64, note, by, refusal)]
    bars = {quantity: _bar(dtype, plain_errors.get(quantity, 0.0)) for quantity in errors}
    return [
        Finding(case.subject, case.name, quantity, name, error, bars[quantity], "", by, refusal)
        for quantity, error in errors.items()
    ]


def _keep_worst(errors: dict[str, float], found: Quantities, wanted: Quantities) -> None:
    if list(found) != list(wanted):
        raise ValueError(f"quantities: expected {list(wanted)}, got {list(found)}")
    for quantity, tensors in found.items():
        for error in _errors(tensors, wanted[quantity]):
            errors[quantity] = max(error, errors.get(quantity, 0.0))


def _errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterator[float]:
    if len(found) != len(wanted):
        raise ValueError(f"tensors: expected {len(wanted)}, got {len(found)}")
    return (relative_error(f, w) for f, w in zip(found, wanted))


def _bar(dtype: torch.dtype, plain_error: float) -> float:
    if dtype == torch.float64:
        return BAR_FLOAT64
    return min(MOST_FLOAT32, FACTOR_FLOAT32 * plain_error + FLOOR_FLOAT32)
