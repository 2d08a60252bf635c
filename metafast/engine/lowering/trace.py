"""What a module's forward does, as a torch.fx graph, without touching the module, its buffers or the generators.

The trace is of a copy. It is refused where the recording could be less than the forward: where it switches gradients
or autocast off or on, changes its own attributes, or reads what torch.fx does not record.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from metafast.engine.guard import NotLowered

# The attribute of _Call by which names in its graph begin.
PREFIX = "model"

# torch.fx puts its own Module.__call__ in place while it traces: one at a time.
_tracing = threading.Lock()


class _Call(nn.Module):
    """``model(x)``: called like this, arguments with defaults have them, as when a learner calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


_ARITHMETIC = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
_IN_PLACE = (*_ARITHMETIC, "and", "or", "xor", "lshift", "rshift")


class _Proxy(Proxy):
    """Records ``x += y`` as what it is: torch.fx's own has no in-place operators, so that Python takes x + y."""


def _operator(name: str) -> Callable[[Proxy, Any], Proxy]:
    def method(self: Proxy, other: Any) -> Proxy:
        proxy: Proxy = self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})
        return proxy

    return method


for _name in _IN_PLACE:
    setattr(_Proxy, f"__i{_name}__", _operator(f"i{_name}"))


class _Tracer(Tracer):
    proxy_buffer_attributes = True  # else a forward that asks a buffer something gets today's answer for ever

    def __init__(self) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self._thread = threading.get_ident()
        self._modes = _modes()

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        if _modes() != self._modes:
            name = str(node.target).removeprefix(f"{PREFIX}.") if node.op == "call_module" else node.name
            raise NotLowered(
                f"layer {name!r} runs under no_grad, autocast or the like, or in a torch.autograd.Function"
            )
        return node


def copy_of(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float64, whose tensors are its own."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise NotLowered(f"the model ({type(model).__name__}) has tensors without values, on the meta device")
    try:
        shadow = copy.deepcopy(model)
    # Any class of error, as a module may copy itself.
    except Exception as error:
        raise NotLowered(f"the model ({type(model).__name__}) cannot be copied: {first_line(error)}") from error
    shared = {id(t) for t in model.parameters()} & {id(t) for t in shadow.parameters()}
    if shared or _parameters(shadow) != _parameters(model):
        raise NotLowered(f"the model ({type(model).__name__}) copies itself as something else")
    return shadow.cpu().double()


def trace(shadow: nn.Module) -> Graph:
    """The graph of ``shadow(x)``; names of modules and parameters in it begin with ``PREFIX``."""
    with _tracing, torch.enable_grad():
        try:
            return _Tracer().trace(_Call(shadow))
        except NotLowered:
            raise
        # Any class of error: a forward that meets a proxy instead of its tensor may fail in any way.
        except Exception as error:
            raise NotLowered(
                f"torch.fx cannot trace the model ({type(shadow).__name__}): {first_line(error)}"
            ) from error


def first_line(error: Exception) -> str:
    """An error's message in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _parameters(model: nn.Module) -> list[tuple[str, torch.Size, bool]]:
    return [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()]


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
