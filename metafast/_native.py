"""The compiled extension: whether it is there, why not, and which operator calls it may take.

``setup.py`` leaves what it built in ``_build_info.json``. No extension built is no fault, and quiet: :func:`status` and
``metafast info`` tell. An extension that was built but cannot be used is loud: a RuntimeWarning with the reason and the
remedy on import, and PyTorch's operations from then on.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metafast import _check
from metafast.backend import Refusal, current_backend

_INFO = Path(__file__).parent / "_build_info.json"
_REMEDY = (
    "build it again with `make build` in a clone, or with `pip install --no-build-isolation --force-reinstall "
    "--no-deps metafast`"
)
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class BuildInfo:
    """What ``setup.py`` decided; see ``Decision`` there."""

    extension: bool
    reason: str
    torch: str
    python: str
    machine: str
    compiler: str
    isas: tuple[str, ...]
    sanitizers: tuple[str, ...]
    simt: bool
    cuda: str
    cuda_reason: str
    cuda_archs: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> BuildInfo:
        """From the JSON that setup.py wrote."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError(f"expected an object, got {type(fields).__name__}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**values)


@dataclass(frozen=True)
class Status:
    """The extension as found on import.

    Attributes:
        available: it is loaded.
        reason: why not; empty if it is.
        build: what was built, None where nothing ever was.
        backends: those that it has kernels for, of ``"cpu"``, ``"simt"`` and ``"cuda"``.
        isas: CPU instruction sets of the build that this machine runs, ascending.
        isa: the one in use; empty without the extension.
    """

    available: bool
    reason: str
    build: BuildInfo | None
    backends: tuple[str, ...]
    isas: tuple[str, ...]
    isa: str


class _Unusable(Exception):
    """Built, but not to be used: the reason."""


def _load() -> tuple[ModuleType | None, BuildInfo | None, str]:
    """The extension or None, what was built, and why there is none."""
    if not _INFO.exists():
        return None, None, f"metafast was not installed, only its sources are here; {_REMEDY}"
    built = None
    try:
        try:
            built = BuildInfo.parse(_INFO.read_text())
        except (ValueError, TypeError) as error:
            raise _Unusable(f"{_INFO.name} is not this version's: {error}") from error
        if not built.extension:
            return None, built, built.reason
        return _import(built), built, ""
    except _Unusable as error:
        reason = f"the extension cannot be used: {error}"
        warnings.warn(
            f"metafast: {reason}. PyTorch's operations are used, slower; {_REMEDY}.", RuntimeWarning, stacklevel=2
        )
        return None, built, reason


def _import(built: BuildInfo) -> ModuleType:
    # Before loading: another torch's symbols may be there and mean something else.
    if built.torch != torch.__version__:
        raise _Unusable(f"it was built for torch {built.torch}, this is {torch.__version__}")
    try:
        module = importlib.import_module("metafast._C")
        inside = BuildInfo.parse(module.build_info())
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:
        raise _Unusable(f"{type(error).__name__}: {error}") from error
    if inside != built:
        raise _Unusable(f"it is from another build than {_INFO.name}")
    return module


_module, _built, _reason = _load()
if _module is not None:
    _module.isa()  # reads METAFAST_CPU_ISA; a bad one is an error now, not at the first kernel
elif "METAFAST_CPU_ISA" in os.environ:
    raise ValueError(f"METAFAST_CPU_ISA: there is no extension to use it: {_reason}")


def native() -> Any | None:
    """The loaded extension module, None without it."""
    return _module


def status() -> Status:
    """What was built and loaded, and why not."""
    if _module is None or _built is None:
        return Status(False, _reason, _built, (), (), "")
    backends = ("cpu", *["simt"] * _built.simt, *["cuda"] * bool(_built.cuda))
    return Status(True, "", _built, backends, tuple(_module.isas()), _module.isa())


_BACKENDS = status().backends


def missing(backend: str) -> str:
    """Why there are no kernels for a backend or device; empty if there are."""
    if backend in _BACKENDS:
        return ""
    if _module is None or _built is None:
        return _reason
    return "the extension was built without METAFAST_SIMT=1" if backend == "simt" else _built.cuda_reason


def force_simt(on: bool) -> None:
    """CPU tensors go to the emulated CUDA kernels, or no longer."""
    if "simt" in _BACKENDS and _module is not None:
        _module.force_simt(on)


force_simt(current_backend() == "simt")


def runs(name: str, *tensors: Tensor, kernels: tuple[str, ...], obstacle: str | None = None) -> bool:
    """Whether an operator's kernels run on these tensors; if not, its PyTorch twin does.

    ``auto`` takes the kernels for float32 and float64 on the devices of the build. It leaves to the twin what
    ``torch.library``'s operators cannot do: ``torch.func`` derivatives (refused there) and forward-mode derivatives
    (silently zero there).

    Args:
        name: of the first tensor, for the message.
        tensors: those that the operator gets, of one device and dtype.
        kernels: the backends that the operator has kernels for.
        obstacle: what else stands in the kernels' way in this call, None: nothing.

    Raises:
        ValueError: a native backend is forced that cannot run this: it never falls back.
    """
    backend = current_backend()
    if backend == "torch":
        return False
    device = tensors[0].device.type
    obstacle = obstacle or _obstacle(tensors, device if backend == "auto" else backend, kernels)
    if backend == "auto":
        return obstacle is None
    if device != ("cpu" if backend == "simt" else backend):
        raise ValueError(f"{name}: backend {backend!r} is forced, got {_check.describe(tensors[0])}")
    if obstacle is not None:
        raise Refusal(f"{name}: backend {backend!r} is forced, but {obstacle}")
    return True


def _obstacle(tensors: tuple[Tensor, ...], backend: str, kernels: tuple[str, ...]) -> str | None:
    """Why a backend's kernels cannot take an operator call, None if they can."""
    first = tensors[0]
    if backend not in _BACKENDS:
        return f"there are no kernels for {backend}: {missing(backend)}"
    if backend not in kernels:
        return f"this operator has no kernels for {backend}"
    if first.dtype not in _DTYPES:
        return f"the kernels take float32 and float64, got {_check.describe(first)}"
    if _differentiated(tensors):
        return "its kernels have no derivative under torch.func's grad and jvp and in forward mode"
    return None


def _differentiated(tensors: tuple[Tensor, ...]) -> bool:
    """A torch.func derivative or a forward-mode one is being taken along a tensor."""
    if torch._C._are_functorch_transforms_active():
        # torch.compile cannot trace the question, and fuses the twin's operations.
        return torch.compiler.is_compiling() or any(torch._C._functorch.is_gradtrackingtensor(t) for t in tensors)
    # Outside of forward mode, where unpack_dual says the same of each tensor, in more time than a small kernel takes.
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
