"""Code written for learn2learn, with the import changed: ``import metafast.l2l as l2l``.

``l2l.algorithms.MAML`` and ``MetaSGD`` with ``clone()`` and ``adapt()``, and the module tools below them, with the
names, arguments and results of learn2learn 0.2.0 (Arnold et al. 2020, arXiv:2008.12284). One task after the other, by
autograd: :class:`metafast.MAML` takes them all in one call, see ``examples/``.

Where learn2learn prints a warning or a traceback and goes on, this raises: for a parameter that the loss does not use
or that requires no gradient, and for gradients of another number than the parameters. And tied parameters stay tied
under ``MetaSGD``.
"""

from __future__ import annotations

from metafast.l2l import algorithms, utils
from metafast.l2l.utils import (
    accuracy,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_module,
    magic_box,
    update_module,
)

__all__ = [
    "accuracy",
    "algorithms",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_module",
    "magic_box",
    "update_module",
    "utils",
]


def __getattr__(name: str) -> object:
    if name in ("data", "gym", "nn", "optim", "text", "vision"):
        raise AttributeError(f"metafast.l2l has learn2learn's algorithms and utils, not {name!r}; see metafast.data")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
