"""Whether a module still is what was lowered, asked at every call: identities, modes, hooks, plain attributes.

What cannot be seen is what a hand-written ``forward`` reads from outside of its modules, a module-level variable for
instance: change none between calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import types
from collections.abc import Iterable
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from metafast._native import native

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(_torch_module, f"_global_{name}")
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
)
_UNSEEN = frozenset(
    {
        *_HOOKS,  # these must be empty
        "_buffers",
        "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_compiled_call_impl",  # Module.compile: the same mathematics
        "_reversed_padding_repeated_twice",  # of a Conv2d with a padding mode that is not lowered
    }
)
# What the batch-norm policy sets while a learner runs, for these layers whatever the user had.
_POLICY = frozenset({"training", "track_running_stats"})

_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type(...), slice, range})
_FIXED = (
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
)
_DEEPEST = 8


class NotLowered(Exception):
    """A module that the engine does not take.

    Attributes:
        reason: one sentence that names the layer and says why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def hooked(parameters: Iterable[Tensor]) -> bool:
    """Whether a parameter has hooks, which only autograd calls."""
    extension = native()
    if extension is not None:
        found: bool = extension.hooked(parameters)
        return found
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module, not its children, does more than its forward."""
    return any(getattr(module, name) for name in _HOOKS) or any(_GLOBAL_HOOKS)


class Watched(NamedTuple):
    """What must be as it was, flat, so that one pass in C looks at all: ``csrc/torch/unchanged.cpp``, in this order.

    Attributes:
        tables, keys, values: tables[i][keys[i]] is values[i].
        empty: dictionaries without entries.
        sized, sizes: tables that must not grow, and how many entries each has.
        ordered, orders: tables, and their keys in their order.
        typed, kinds: tables, and the classes of their values.
        modules, types, attributes: types[i] is the class of modules[i], attributes[i] its ``__dict__``.
        parameters, requires_grad: which of the parameters require gradients.
        classes, forwards: classes of modules, and their forwards.
    """

    tables: list[dict[str, Any]]
    keys: list[str]
    values: list[object]
    empty: list[dict[Any, Any]]
    sized: list[dict[str, Any]]
    sizes: list[int]
    ordered: list[dict[str, Any]]
    orders: list[list[str]]
    typed: list[dict[str, Any]]
    kinds: list[list[type]]
    modules: list[nn.Module]
    types: list[type]
    attributes: list[dict[str, Any]]
    parameters: list[nn.Parameter]
    requires_grad: list[bool]
    classes: list[type]
    forwards: list[object]

    def and_modules(self, modules: list[nn.Module], unseen: frozenset[str]) -> Watched:
        """This, and of other modules their class and attributes but ``unseen`` ones, children and parameters."""
        tables = [table for m in modules for table in (vars(m), vars(m)["_modules"], vars(m)["_parameters"])]
        wider = self.and_entries([(table, key) for table in tables for key in table if key not in unseen])
        return wider._replace(
            sized=self.sized + tables,
            sizes=self.sizes + list(map(len, tables)),
            modules=self.modules + modules,
            types=self.types + list(map(type, modules)),
            attributes=self.attributes + [vars(m) for m in modules],
        )

    def and_entries(self, entries: list[tuple[dict[str, Any], str]]) -> Watched:
        """This, and entries of other tables by their keys."""
        return self._replace(
            tables=self.tables + [table for table, _ in entries],
            keys=self.keys + [key for _, key in entries],
            values=self.values + [table[key] for table, key in entries],
        )


class Guard:
    """Remembers a module as it is now; ``holds()`` says in a few microseconds whether it still is the same.

    For every submodule: its class, the identity of its attributes, children and parameters, which of these require
    gradients, its mode, that it has no hooks; lists, dictionaries and the like by a deep copy of their contents.
    Names and shapes of trainable parameters are left to :meth:`metafast.engine.layout.Layout.parameters`.

    Raises:
        NotLowered: a module has hooks, a forward of its own instead of its class's, or state that could change unseen.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self._known = frozenset(id(module) for _, module in named)
        extension = native()
        self._unchanged = unchanged if extension is None else extension.unchanged
        modules = [module for _, module in named]
        classes: list[type] = list(dict.fromkeys(map(type, modules)))
        parameters = list(model.parameters())
        self.watched = Watched(
            tables=[],
            keys=[],
            values=[],
            empty=list(_GLOBAL_HOOKS),
            sized=[],
            sizes=[],
            ordered=[],  # children, which a Sequential calls in their order
            orders=[],
            typed=[],  # buffers, only whether each is there: no lowered layer reads one
            kinds=[],
            modules=modules,
            types=[type(module) for module in modules],
            attributes=[vars(module) for module in modules],
            parameters=parameters,
            requires_grad=list(map(_requires_grad, parameters)),
            classes=classes,
            forwards=[],
        )
        self._snapshots: list[tuple[object, object]] = []
        if any(_GLOBAL_HOOKS):
            raise NotLowered("torch has hooks on every module now, which only torch runs")
        for name, module in named:
            self._record(f"layer {name!r} ({type(module).__name__})" if name else _the(model), module)
        self.watched.forwards.extend(map(_forward, classes))
        self._frozen = [(p, p.shape) for p in parameters if not p.requires_grad]

    @property
    def is_plain(self) -> bool:
        """Whether :attr:`watched` is all there is to look at."""
        return not (self._frozen or self._snapshots)

    def holds(self) -> bool:
        """Whether nothing has changed that could change what the module computes."""
        return (
            self._unchanged(self.watched)
            and (not self._frozen or all(p.shape == shape for p, shape in self._frozen))
            and (not self._snapshots or all(_same(value, shot, self._known) for value, shot in self._snapshots))
        )

    def _record(self, label: str, module: nn.Module) -> None:
        table = vars(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise NotLowered(f"{label} is compiled by torch.jit, which only torch runs")
        if "forward" in table:
            raise NotLowered(f"{label} has a forward of its own instead of its class's, which only torch runs")
        for hooks in _HOOKS:
            if table[hooks]:
                raise NotLowered(f"{label} has hooks ({hooks.strip('_')}), which only torch runs")
            self.watched.empty.append(table[hooks])
        unseen = _UNSEEN | _POLICY if isinstance(module, (_BatchNorm, _InstanceNorm)) else _UNSEEN
        seen = [key for key in table if key not in unseen]
        for key in seen:
            value = table[key]
            if key in ("_modules", "_parameters") or _immutable(value):
                continue
            try:
                self._snapshots.append((value, _snapshot(value, self._known)))
            except _Opaque:
                raise NotLowered(
                    f"{label} has an attribute {key!r} ({type(value).__name__}) that could change unseen"
                ) from None
        self._watch(table, seen)
        for inner in (table["_modules"], table["_parameters"]):
            self._watch(inner, list(inner))
        if len(table["_modules"]) > 1:
            self.watched.ordered.append(table["_modules"])
            self.watched.orders.append(list(table["_modules"]))
        if table["_buffers"]:
            self.watched.typed.append(table["_buffers"])
            self.watched.kinds.append(_kinds(table["_buffers"]))
        else:
            self.watched.empty.append(table["_buffers"])

    def _watch(self, table: dict[str, Any], keys: list[str]) -> None:
        watched = self.watched
        if not table:
            watched.empty.append(table)
            return
        watched.tables.extend([table] * len(keys))
        watched.keys.extend(keys)
        watched.values.extend(table[key] for key in keys)
        watched.sized.append(table)
        watched.sizes.append(len(table))


def unchanged(watched: Watched) -> bool:
    """Whether all is as it was, for where there is no extension."""
    w = watched
    try:
        same = all(map(is_, map(getitem, w.tables, w.keys), w.values))
    except KeyError:
        return False
    return (
        same
        and not any(w.empty)
        and list(map(len, w.sized)) == w.sizes
        and list(map(list, w.ordered)) == w.orders
        and list(map(_kinds, w.typed)) == w.kinds
        and list(map(type, w.modules)) == w.types
        and all(map(is_, map(vars, w.modules), w.attributes))
        and list(map(_requires_grad, w.parameters)) == w.requires_grad
        and list(map(_forward, w.classes)) == w.forwards
    )


def _kinds(table: dict[str, Any]) -> list[type]:
    return list(map(type, table.values()))


_requires_grad = attrgetter("requires_grad")
_forward = attrgetter("forward")


def _the(model: nn.Module) -> str:
    return f"the model ({type(model).__name__})"


class _Opaque(Exception):
    """A value that can change without our seeing it."""


def _immutable(value: object) -> bool:
    if type(value) in _ATOMS or isinstance(value, _FIXED):
        return True
    return isinstance(value, (tuple, frozenset)) and not hasattr(value, "__dict__") and all(map(_immutable, value))


def _snapshot(value: object, known: frozenset[int], depth: int = 0) -> object:
    """A copy of a plain value's contents, to compare by ==; functions and modules of the model (``known``) themselves.

    Not their id: that of one that is gone may come again.
    """

    def below(*values: object) -> tuple[object, ...]:
        return tuple(_snapshot(v, known, depth + 1) for v in values)

    if type(value) in _ATOMS:
        return type(value), value
    if isinstance(value, _FIXED) or id(value) in known:
        return value
    if isinstance(value, types.MethodType) and id(value.__self__) in known:
        return value.__self__, value.__func__
    if depth == _DEEPEST:
        raise _Opaque
    inner: tuple[object, ...] = ()
    if isinstance(value, (tuple, list)):
        inner = below(*value)
    elif isinstance(value, (set, frozenset)):
        inner = (frozenset(below(*value)),)
    elif isinstance(value, dict):
        inner = below(*value.keys(), *value.values())
    elif isinstance(value, functools.partial):
        inner = below(value.func, value.args, value.keywords)
    elif not (hasattr(value, "__dict__") and _is_record(value)):
        raise _Opaque
    return type(value), inner, below(getattr(value, "__dict__", None))


def _is_record(value: object) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, (argparse.Namespace, types.SimpleNamespace))


def _same(value: object, snapshot: object, known: frozenset[int]) -> bool:
    try:
        return _snapshot(value, known) == snapshot
    except _Opaque:
        return False
