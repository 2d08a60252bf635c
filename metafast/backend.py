"""Which backend runs, and how to force one.

``auto`` (the default) takes the native kernels where they exist and ``torch`` for the rest. The environment variable
METAFAST_BACKEND sets the process's choice; :func:`use_backend` changes it. ``simt`` is for tests: the CUDA kernels on
an emulator, on CPU tensors, in builds with METAFAST_SIMT=1.
"""

from __future__ import annotations

import os
from types import TracebackType

from metafast import _check

BACKENDS = ("auto", "torch", "cpu", "cuda", "simt")
_VARIABLE = "METAFAST_BACKEND"


def _from_environment() -> str:
    return _check.choice(_VARIABLE, os.environ.get(_VARIABLE, "auto"), BACKENDS)


_current = _from_environment()


def current_backend() -> str:
    """The backend in force: ``"auto"`` or the one that was forced."""
    return _current


class Refusal(ValueError):
    """A backend is forced, and this has no kernels there."""


class use_backend:
    """Force a backend, for good or for a ``with`` block.

    Args:
        name: ``"auto"``, ``"torch"``, ``"cpu"``, ``"cuda"`` or ``"simt"``.

    Raises:
        ValueError: an unknown name, or a backend that this build does not have.

    Example:
        >>> with use_backend("torch"):
        ...     current_backend()
        'torch'
    """

    def __init__(self, name: str) -> None:
        _check.choice("name", name, BACKENDS)
        _require(name)
        self._before = _current
        _switch(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._before)


def _switch(name: str) -> None:
    global _current
    from metafast import _native

    _current = name
    _native.force_simt(name == "simt")


def _require(name: str) -> None:
    """Refuse a native backend that is not there: a forced backend never falls back."""
    if name in ("auto", "torch"):
        return
    from metafast import _native

    status = _native.status()
    if not status.available:
        raise ValueError(f"name: backend {name!r} needs the extension, which is not there: {status.reason}")
    if name not in status.backends:
        has = ", ".join(repr(b) for b in ("auto", "torch", *status.backends))
        raise ValueError(f"name: expected a backend of this build, {has}, got {name!r}")
