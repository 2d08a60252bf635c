"""Pure tensor functions under ``torch.func``, recorded once for a signature and replayed as plain ATen calls.

vmap(vjp(grad(...))) passes every operation through three interpreters in Python and C++, which costs a small net far
more than its mathematics. The recording (``make_fx``) is the same operations with the interpreters gone: the same
bits, three times faster on the sinusoid net.

A recording is true for as long as what Python decided while recording stays as it was. So nothing is recorded of a
module with state that :func:`fingerprint` cannot see, of a function that captures tensors (they would be frozen into
it), nor before a signature has come a dozen times; and a recording is used only if it first gives the same bits.
What cannot be seen is a module-level variable that a hand-written ``forward`` reads: change none between calls.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from metafast.engine.autocast import autocast_state
from metafast.engine.recent import remember

Function = Callable[..., Tensor]

_CALLS_BEFORE_RECORDING = 12
_MOST_COUNTED, _MOST_RECORDINGS = 1024, 64
_OPAQUE = object()


class Traced:
    """``function(*tensor trees) -> tensor``, called under no_grad, with a recording for each signature that recurs.

    Args:
        function: pure; its arguments are tensors or tuples of tensors.
        state: what the recording hangs on besides the arguments (a fingerprint), or None to record nothing now.
    """

    def __init__(self, function: Function, state: Callable[[], Hashable | None]) -> None:
        self._function = function
        self._state = state
        self._calls: OrderedDict[Hashable, int] = OrderedDict()
        self._recordings: OrderedDict[Hashable, GraphModule | None] = OrderedDict()

    def __call__(self, *arguments: Tensor | tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            state = self._state()
            if state is None:
                return self._function(*arguments)
            key = (state, torch.get_default_dtype(), _autocast(arguments), _signature(arguments))
            recording = self._recordings.get(key)
            if recording is not None:
                result: Tensor = recording(*_flat(arguments))
                return result
            eager = self._function(*arguments)
            if key not in self._recordings:
                calls = remember(self._calls, key, self._calls.get(key, 0) + 1, _MOST_COUNTED)
                if calls > _CALLS_BEFORE_RECORDING:
                    recording = _record(self._function, arguments, eager)
                    remember(self._recordings, key, recording, _MOST_RECORDINGS)
            return eager

    def __getstate__(self) -> dict[str, Any]:
        # Recordings know their module by identity: a copy, or another process, makes its own.
        return self.__dict__ | {"_calls": OrderedDict(), "_recordings": OrderedDict()}


def _record(function: Function, arguments: tuple[Any, ...], wanted: Tensor) -> GraphModule | None:
    """The recording of a call, or None where it would not be the same function."""
    # Imported late: it pulls in sympy, a second's wait that only recording needs.
    from torch.fx.experimental.proxy_tensor import make_fx

    sizes = [len(a) if isinstance(a, tuple) else None for a in arguments]

    def flat(*tensors: Tensor) -> Tensor:
        parts = iter(tensors)
        return function(*(next(parts) if n is None else tuple(next(parts) for _ in range(n)) for n in sizes))

    recording = make_fx(flat)(*_flat(arguments))
    _drop_no_ops(recording.graph)
    recording.graph.eliminate_dead_code()
    if any(node.op == "get_attr" for node in recording.graph.nodes):
        return None
    recording.recompile()
    return recording if torch.equal(recording(*_flat(arguments)), wanted) else None


def _drop_no_ops(graph: Graph) -> None:
    """Take out the views that the batching rules leave behind: each costs a call and changes nothing."""
    aten = torch.ops.aten
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            continue
        same = False
        if node.target in (aten.view.default, aten.expand.default, aten._unsafe_view.default):
            old, new = source.meta["val"], node.meta["val"]
            same = old.shape == new.shape and old.stride() == new.stride()
        elif node.target is aten.mul.Scalar:
            same = node.args[1] == 1
        elif node.target is aten.transpose.int and source.target is aten.transpose.int:
            before = source.args[0]
            if node.args[1:] == source.args[1:] and isinstance(before, Node):
                source, same = before, True
        if same:
            node.replace_all_uses_with(source)


def _flat(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [t for a in arguments for t in (a if isinstance(a, tuple) else (a,))]


def _autocast(arguments: tuple[Any, ...]) -> Hashable:
    return autocast_state(next(iter(_flat(arguments))).device)


def _signature(arguments: tuple[Any, ...]) -> Hashable:
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in _flat(arguments))


def fingerprint(model: nn.Module) -> Hashable | None:
    """What a module's forward may hang on besides its tensors; None where some of it cannot be seen.

    Its submodules by identity, their modes and plain attributes (numbers, strings, tuples and so on). Hooks,
    parametrisations, tensors that are neither parameter nor buffer and other objects cannot be seen through.
    """
    seen: list[Hashable] = []
    for module in model.modules():
        seen.append((id(module), type(module)))
        for name, value in vars(module).items():
            # Mostly numbers, strings and empty tables of hooks: this runs at every call.
            if type(value) in _ATOMS:
                seen.append(value)
            elif name not in _STRUCTURE:
                plain = _plain(value)
                if plain is _OPAQUE:
                    return None
                seen.append((name, plain))
    return tuple(seen)


_ATOMS = frozenset({bool, int, float, str, type(None)})
_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


def _plain(value: object) -> Hashable:
    if type(value) in _ATOMS or isinstance(value, (torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        items = tuple(_plain(v) for v in value)
        return _OPAQUE if _OPAQUE in items else items
    if isinstance(value, dict):
        return _plain(tuple(value.items())) if value else None
    return _OPAQUE
