"""Every call of the emulated engine in each order of threads and blocks, and the same bits: for `make orders`.

Operators' tests, and some of the engine's, do that by themselves; with METAFAST_SIMT_ORDERS all tests do.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import metafast as mf
from metafast import _native
from metafast.engine.guard import hooked
from tests.backends import in_every_order

WANTED = bool(os.environ.get("METAFAST_SIMT_ORDERS"))
Method = Callable[..., Any]


def in_all_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of a test, methods of the extension's engine run so where the emulator runs them."""
    engine = _native.native().Engine  # type: ignore[union-attr]
    ways: dict[str, Callable[[Method], Method]] = {
        **dict.fromkeys(("outputs", "pullback", "gradient", "hvp"), _values),
        "accumulate": _accumulated,
        "meta_step": _differentiable,
    }
    for name, way in ways.items():
        monkeypatch.setattr(engine, name, _on_simt(getattr(engine, name), way))


def _on_simt(method: Method, way: Callable[[Method], Method]) -> Method:
    repeated = way(method)

    @functools.wraps(method)
    def run(*arguments: Any) -> Any:
        return (repeated if mf.current_backend() == "simt" else method)(*arguments)

    return run


def _values(method: Method) -> Method:
    return lambda *arguments: in_every_order("simt", lambda: method(*arguments))


def _tensors(*of: Any) -> list[Tensor]:
    return [t.detach() for t in of if t is not None]


def _leaves(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Parameters, rates and the learned optimiser's weights, of the engine's arguments."""
    tensors = [*arguments[1], arguments[9], *arguments[14]]
    return [t for t in tensors if t is not None and t.requires_grad]


def _accumulated(method: Method) -> Method:
    def run(*arguments: Any) -> Any:
        leaves = [*arguments[1], *arguments[14]]
        before = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
        outcomes = []

        def once() -> list[Tensor]:
            for leaf, grad in zip(leaves, before, strict=True):
                if grad is None:
                    leaf.grad = None
                else:
                    leaf.grad.copy_(grad)
            outcomes.append(method(*arguments))
            return [t.clone() for t in _tensors(*outcomes[-1], *(leaf.grad for leaf in leaves))]

        in_every_order("simt", once)
        return outcomes[-1]

    return run


def _differentiable(method: Method) -> Method:
    def run(*arguments: Any) -> Any:
        def once() -> list[Tensor]:
            out, leaves = method(*arguments), _leaves(arguments)
            if not out[0].requires_grad or hooked(leaves):
                return _tensors(*out)
            return _tensors(*out, *torch.autograd.grad(out[0], leaves, allow_unused=True))

        in_every_order("simt", once)
        return method(*arguments)

    return run
