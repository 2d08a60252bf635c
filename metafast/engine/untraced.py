"""torch.compile and the learners: a learner's call is a graph break, made of the same kernels as without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def untraced(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a method as it is under torch.compile, which else follows the engine's checks and caches for minutes.

    Only then is torch's own decorator put on: it imports the compiler, which takes seconds.
    """

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            opaque: Callable[_P, _R] = torch.compiler.disable(method)
            return opaque(*args, **kwargs)
        return method(*args, **kwargs)

    return run
