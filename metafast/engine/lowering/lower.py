"""From a module to a :class:`Lowered`: walk through the forward's graph, then hold the result against the module."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from metafast import _check
from metafast.engine import batch_norm as norms
from metafast.engine.guard import Guard, NotLowered
from metafast.engine.lowering.build import INPUT, Network, Value, Weight
from metafast.engine.lowering.call import Call
from metafast.engine.lowering.lowered import Lowered
from metafast.engine.lowering.replay import replay
from metafast.engine.lowering.rows import Row
from metafast.engine.lowering.table import FUNCTIONS, METHODS, MODULES, reads_shape
from metafast.engine.lowering.trace import PREFIX, copy_of, first_line, trace

# Of float64: what is lowered is the same operations in the same order. Below the floor a gradient may be rounding
# alone (that of a bias before a batch norm is).
_TOLERANCE, _FLOOR = 1e-9, 1e-11


def lower(model: nn.Module, sample_shape: Sequence[int], batch_norm: str) -> Lowered:
    """The module as the engine runs it on samples of a shape.

    Works on a copy: the module, its buffers and torch's generators stay as they are. The result is only given if,
    replayed by torch on random numbers, it has the outputs and the gradient of the module itself.

    Args:
        model: its forward takes (N, *sample_shape) and gives (N, D).
        sample_shape: shape of one sample.
        batch_norm: ``"batch"`` or ``"running"``, as of :class:`metafast.MAML`.

    Raises:
        NotLowered: the engine does not take it; the reason names the layer.
        TypeError, ValueError: an argument of the wrong kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(0.0), nn.Linear(3, 1))
        >>> [(layer.name, layer.kind.name, layer.weight) for layer in lower(net, (2,), "batch").layers]
        [('0', 'linear', 0), ('1', 'relu', -1), ('3', 'linear', 9)]
    """
    _check.module("model", model)
    _check.choice("batch_norm", batch_norm, norms.POLICIES)
    shape = tuple(_check.integer("sample_shape", n, minimum=1) for n in sample_shape)
    Guard(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter:
            raise NotLowered(f"parameter {name!r} is a {type(parameter).__name__}, the engine takes plain ones")
    if not any(p.requires_grad for p in parameters.values()):
        raise NotLowered(f"the model ({type(model).__name__}) has no parameters that require gradients")
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        shadow = copy_of(model)
        with norms.policy(shadow, batch_norm):
            unchanged = Guard(shadow)
            graph = trace(shadow)
            _check_unchanged(unchanged)
            lowered = _Walk(shadow, parameters, shape, batch_norm).through(graph)
            _compare(shadow, lowered, shape)
            _check_unchanged(unchanged)
    return lowered


def _check_unchanged(guard: Guard) -> None:
    if not guard.holds():
        raise NotLowered("the model's forward changes its own attributes, which only torch runs")


class _Walk:
    """Turns a graph's nodes into layers, one after the other."""

    def __init__(
        self, shadow: nn.Module, parameters: dict[str, nn.Parameter], shape: tuple[int, ...], batch_norm: str
    ) -> None:
        self._shadow = shadow
        self._shape = shape
        self._batch_norm = batch_norm
        self._network = Network(parameters)
        self._weights = {id(p): Weight(name, tuple(p.shape)) for name, p in shadow.named_parameters()}
        self._values: dict[Node, Any] = {}

    def through(self, graph: Graph) -> Lowered:
        (output,) = graph.find_nodes(op="output")
        result = output.args[0]
        needed = _ancestors(output)
        for node in graph.nodes:
            if node.op == "placeholder":
                self._values[node] = Value(INPUT, self._shape, "input")
            elif node.op == "get_attr":
                self._values[node] = self._attribute(str(node.target))
            elif node.op != "output" and not (node not in needed and self._has_no_effect(node)):
                self._values[node] = self._call(node)
        value = self._values[result] if isinstance(result, Node) else None
        if not isinstance(value, Value):
            kind = "something else" if isinstance(result, Node) else f"a {type(result).__name__}"
            raise NotLowered(f"the model's forward gives {kind}, the engine gives one tensor")
        return self._network.finish(value)

    def _attribute(self, target: str) -> object:
        """A parameter; anything else (a buffer, a constant) is opaque to every row."""
        found: Any = None
        first, _, rest = target.partition(".")
        if first == PREFIX:
            found = self._shadow
            for part in rest.split("."):
                found = getattr(found, part)
        return self._weights.get(id(found), _Opaque(target))

    def _call(self, node: Node) -> object:
        row, name, what = self._row(node)
        call = Call(
            self._network, name, what, self._batch_norm, self._weights, lambda value: self._sole_user(node, value)
        )
        if row is None:
            call.refuse("has no row in the lowering table")
        args: Any = map_aggregate(node.args, self._resolve)
        kwargs: Any = map_aggregate(node.kwargs, self._resolve)
        if node.op == "call_module":
            args = (self._module(node), *args)
        try:
            inspect.signature(row).bind(call, *args, **kwargs)
        except TypeError as error:
            call.refuse(f"is called as its row in the lowering table does not know: {error}")
        return row(call, *args, **kwargs)

    def _row(self, node: Node) -> tuple[Row | None, str, str]:
        """The row, the name for messages and the class or function."""
        if node.op == "call_module":
            kind = type(self._module(node))
            name = str(node.target).removeprefix(PREFIX).removeprefix(".")
            return MODULES.get(kind), name or kind.__name__, kind.__name__
        if node.op == "call_method":
            return METHODS.get(str(node.target)), node.name, f"Tensor.{node.target}"
        assert callable(node.target)
        return FUNCTIONS.get(node.target), node.name, getattr(node.target, "__name__", repr(node.target))

    def _module(self, node: Node) -> nn.Module:
        return self._shadow.get_submodule(str(node.target).removeprefix(PREFIX).removeprefix("."))

    def _resolve(self, argument: Any) -> Any:
        return self._values[argument] if isinstance(argument, Node) else argument

    def _has_no_effect(self, node: Node) -> bool:
        """Whether a call, whose result nobody needs, changes nothing else either; where in doubt, it is looked at."""
        self._values[node] = _Opaque(node.name)
        if node.op == "call_function":
            return node.target is operator.getitem
        return node.op == "call_module" and not getattr(self._module(node), "inplace", False)

    def _sole_user(self, node: Node, value: Value) -> bool:
        """Whether ``node`` alone reads the memory of ``value``: the layer's output and all that are views of it."""
        if value.source == INPUT:
            return False
        same = {n for n, v in self._values.items() if isinstance(v, Value) and v.source == value.source}
        return {user for n in same for user in n.users if not reads_shape(user)} - same <= {node}


class _Opaque:
    """What no row takes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    todo = [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _compare(shadow: nn.Module, lowered: Lowered, shape: tuple[int, ...]) -> None:
    """Refuse unless the replay has the outputs and gradient of the module, which gets random parameters here."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu")

    with torch.enable_grad():
        parameters = dict(shadow.named_parameters())
        for p in (p for p in parameters.values() if p.is_floating_point()):
            fan = p.numel() // p.shape[0] if p.dim() > 1 and p.shape[0] else 1
            p.data = random(*p.shape) / fan**0.5
        adapting = [p for p in parameters.values() if p.requires_grad]
        constants = [parameters[name] for name in lowered.constants]
        flat = torch.cat([p.detach().reshape(-1) for p in adapting + constants]).requires_grad_()
        x = random(3, *shape).requires_grad_()
        cotangent = random(3, *lowered.output)
        try:
            wanted = shadow(x.clone())
            if not isinstance(wanted, torch.Tensor) or wanted.shape != cotangent.shape:
                raise NotLowered("the model's forward is not what torch.fx sees of it: its output is of another shape")
            found = replay(lowered, flat, x)
            _same("outputs", found.detach(), wanted.detach())
            # Of scalars: for other outputs torch imports sympy first, a second's wait.
            by_flat, by_x = torch.autograd.grad((found * cotangent).sum(), (flat, x), materialize_grads=True)
            parts = torch.autograd.grad((wanted * cotangent).sum(), (*adapting, x), materialize_grads=True)
            gradients = torch.cat([g.reshape(-1) for g in parts])
            _same("gradients", torch.cat([by_flat[: lowered.adapting], by_x.reshape(-1)]), gradients)
        except NotLowered:
            raise
        # Any class of error, as it is the user's forward; torch will say so again.
        except Exception as error:
            raise NotLowered(f"the model ({type(shadow).__name__}) fails in torch: {first_line(error)}") from error


def _same(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = float((found - wanted).norm())
    if not error <= _TOLERANCE * float(wanted.norm()) + _FLOOR:
        raise NotLowered(
            f"the model's forward is not what torch.fx sees of it: the {what} differ by {error:.1e} "
            f"on random numbers of {float(wanted.norm()):.1e}"
        )
