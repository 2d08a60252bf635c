"""What every kernel test shares: the backends it runs on, its dtypes, and the error that rounding allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import metafast as mf
from metafast import _native


def kernels_of(backend: str) -> list[pytest.MarkDecorator]:
    """The marks of a test that needs a backend's kernels."""
    reason = f"no {backend} kernels: {_native.missing(backend)}"
    return [pytest.mark.native, pytest.mark.skipif(bool(_native.missing(backend)), reason=reason)]


# The twin, the CPU's kernels, and the GPU's: emulated, and on one where it is there.
GPUS = ["simt", *(["cuda"] if torch.cuda.is_available() else [])]
_NATIVE = ["cpu", *GPUS]
ON_CPU = ["torch", pytest.param("cpu", marks=kernels_of("cpu"))]
# Of tensors on the CPU, as learners' tests have them.
LEARNER_BACKENDS = [*ON_CPU, pytest.param("simt", marks=kernels_of("simt"))]
on_backends = pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(name, marks=kernels_of(name)) for name in _NATIVE)]
)
on_kernels = pytest.mark.parametrize("backend", [pytest.param(name, marks=kernels_of(name)) for name in _NATIVE])
# The CPU's kernels and the emulated ones.
on_cpu_and_simt = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=kernels_of(name)) for name in ("cpu", "simt")]
)
on_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def native(test: Any) -> Any:
    """Mark a test that needs the CPU's kernels."""
    for mark in kernels_of("cpu"):
        test = mark(test)
    return test


@contextmanager
def learners_on(backend: str, *, lowered: bool = True) -> Iterator[None]:
    """Learners run by torch, or by a backend's kernels: forced, but for a model that is known not to be ``lowered``."""
    if backend == "torch" or lowered:
        with mf.use_backend(backend):
            yield
        return
    with mf.use_backend("auto"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs by torch, without native kernels")
        yield


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


@contextmanager
def in_order(backend: str, order: int) -> Iterator[None]:
    """On simt threads and blocks run in that order: ascending, descending, or one of two random ones."""
    module: Any = _native.native()
    if backend == "simt":
        module.simt_order(order)
    try:
        yield
    finally:
        if backend == "simt":
            module.simt_order(0)


Result = TypeVar("Result", Tensor, list[Tensor])


def in_every_order(backend: str, work: Callable[[], Result]) -> Result:
    """What ``work`` computes; on simt, with the same bits in each order of threads and blocks."""
    if backend != "simt":
        return work()
    module: Any = _native.native()
    results = []
    for order in range(module.SIMT_ORDERS):
        with in_order(backend, order):
            results.append(work())
    for order, result in enumerate(results):
        assert _bits(result) == _bits(results[0]), f"order {order} of threads and blocks differs from order 0"
    return results[0]


def _bits(result: Tensor | list[Tensor]) -> list[bytes]:
    tensors = [result] if isinstance(result, Tensor) else result
    return [t.detach().contiguous().numpy().tobytes() for t in tensors]


@contextmanager
def one_launch(on: bool) -> Iterator[None]:
    """Whether a GPU does meta-steps of small MLPs in one launch, as it does where nothing is said."""
    module: Any = _native.native()
    module.one_launch_where_fit(on)
    try:
        yield
    finally:
        module.one_launch_where_fit(True)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that an operator allocates starts as NaN: what it forgets to write shows."""
    # torch.use_deterministic_algorithms without its import of the compiler, which takes seconds.
    torch._C._set_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


def wide(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.longdouble]]:
    """Exactly the same values in a type with more digits than float64."""
    return tensor.detach().cpu().numpy().astype(np.longdouble)


def rounding_of(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def random(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


class OperatorsSeen(TorchDispatchMode):
    """Records the operators that reach a device, below autograd and vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))
