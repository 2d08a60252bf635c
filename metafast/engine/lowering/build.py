"""Layers as they are found, in the order of the forward, and the finished network with its numbers and offsets.

A reshape is nothing by itself: a :class:`Value` is a layer's output *seen as* samples of some shape, and only when a
layer takes an image's pixels as features does a flatten layer come into being. All views of the input cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import nn

from metafast.engine.guard import NotLowered
from metafast.engine.lowering.lowered import Kind, Lowered, LoweredLayer, elements

INPUT = -1

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """The output of a draft (or the input: source INPUT), its samples seen as of this shape.

    Attributes:
        name: the operation that gave it this shape.
    """

    source: int
    shape: Shape
    name: str


@dataclass(frozen=True)
class Weight:
    """A parameter of the module, by the name that ``named_parameters`` gives it."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Draft:
    """A layer whose inputs are still named by draft, and its parameters by name."""

    layer: LoweredLayer
    inputs: tuple[Value, ...]
    what: str
    weight: Weight | None = None
    bias: Weight | None = None

    @property
    def label(self) -> str:
        return f"layer {self.layer.name!r} ({self.what})"

    def refuse(self, why: str) -> NoReturn:
        raise NotLowered(f"{self.label} {why}")


class Network:
    """The drafts of one module's forward on samples of one shape."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._drafts: list[Draft] = []
        self._flattened: dict[int, Value] = {}

    def add(self, draft: Draft) -> Value:
        """Append a layer; its inputs become features or images if they were other views of one."""
        inputs = tuple(self._as_seen(value, draft.refuse) for value in draft.inputs)
        if min(draft.layer.output) < 1:
            draft.refuse(f"leaves nothing: samples of shape {draft.layer.output}")
        self._drafts.append(replace(draft, inputs=inputs))
        return Value(len(self._drafts) - 1, draft.layer.output, draft.layer.name)

    def finish(self, output: Value) -> Lowered:
        """The network as far as the output needs it."""
        if len(output.shape) == 1:
            output = self._as_seen(output, _no_output)
        if output.source == INPUT:
            raise NotLowered("the model gives its input back: it has no layers to run")
        last = self._drafts[output.source]
        if len(output.shape) != 1:
            last.refuse(f"is the last one and gives samples of shape {output.shape}, the engine's outputs are (N, D)")
        order = self._needed(output.source)
        shape, flat = self._input_shape(order)
        layers: list[LoweredLayer] = []
        # Value indices: of the input by the shape it is seen with, of layers by draft.
        index: dict[tuple[int, Shape], int] = {(INPUT, shape): 0}
        if flat is not None:
            size = elements(shape)
            layers.append(LoweredLayer(flat, Kind.flatten, (0,), (size,), size))
            index[INPUT, (size,)] = 1
        offsets = self._offsets(order)
        for source in order:
            draft = self._drafts[source]
            inputs = tuple(index[v.source, v.shape] for v in draft.inputs)
            layers.append(_placed(draft, inputs, offsets))
            index[source, draft.layer.output] = len(layers)
        used = {w.name for s in order for w in (self._drafts[s].weight, self._drafts[s].bias) if w is not None}
        frozen = {n: p for n, p in self._parameters.items() if not p.requires_grad and n in used}
        adapting = sum(p.numel() for p in self._parameters.values() if p.requires_grad)
        total = sum(p.numel() for p in frozen.values())
        return Lowered(shape, tuple(layers), output.shape, adapting, tuple(frozen), total)

    def _as_seen(self, value: Value, refuse: Callable[[str], NoReturn]) -> Value:
        """The value as a layer's input; makes the flatten layer where an image's pixels are taken as features."""
        if value.source == INPUT:
            return value
        own = self._drafts[value.source].layer.output
        if value.shape == own:
            return value
        if len(own) != 3 or value.shape != (elements(own),):
            refuse(
                f"takes samples of shape {own} as {value.shape}, by {value.name!r}: "
                "only the input and an image to features are reshaped"
            )
        if value.source not in self._flattened:
            layer = LoweredLayer(value.name, Kind.flatten, (), value.shape, value.shape[0])
            image = replace(value, shape=own)
            self._drafts.append(Draft(layer, (image,), "flatten"))
            self._flattened[value.source] = Value(len(self._drafts) - 1, value.shape, value.name)
        return self._flattened[value.source]

    def _needed(self, source: int) -> list[int]:
        """The drafts that this one hangs on and itself, in order."""
        found: set[int] = set()
        todo = [source]
        while todo:
            draft = todo.pop()
            if draft not in found and draft != INPUT:
                found.add(draft)
                todo += [value.source for value in self._drafts[draft].inputs]
        return sorted(found)

    def _input_shape(self, order: list[int]) -> tuple[Shape, str | None]:
        """What the layers take the input for; and, if for an image and for features too, the name of the flatten."""
        seen: dict[Shape, str] = {}
        for source in order:
            for value in self._drafts[source].inputs:
                if value.source == INPUT:
                    seen.setdefault(value.shape, value.name)
        image, *rest = sorted(seen, key=len, reverse=True)
        if not rest:
            return image, None
        flat = rest[0]
        if len(rest) == 1 and len(image) == 3 and flat == (elements(image),):
            return image, seen[flat]
        users = [d for d in (self._drafts[s] for s in order) if any(v.source == INPUT for v in d.inputs)]
        users[-1].refuse(f"and others take the input's samples as of several shapes: {', '.join(map(str, seen))}")

    def _offsets(self, order: list[int]) -> dict[str, int]:
        """Where each parameter begins in the flat vector: the adapting ones first, then the frozen ones in use."""
        users: dict[str, Draft] = {}
        for source in order:
            draft = self._drafts[source]
            for weight in (draft.weight, draft.bias):
                if weight is None:
                    continue
                if weight.name in users and draft.label == users[weight.name].label:
                    draft.refuse("is called more than once, so that its parameters are shared")
                if weight.name in users:
                    draft.refuse(f"shares the parameter {weight.name!r} with {users[weight.name].label}")
                users[weight.name] = draft
        named = self._parameters.items()
        like = next(p for _, p in named if p.requires_grad)
        offsets: dict[str, int] = {}
        begin = 0
        for name, p in [(n, p) for n, p in named if p.requires_grad] + [(n, p) for n, p in named if n in users]:
            if name in offsets:
                continue
            if name in users and (p.dtype, p.device) != (like.dtype, like.device):
                users[name].refuse(
                    f"has the parameter {name!r} of {p.dtype} on {p.device}, "
                    f"others are of {like.dtype} on {like.device}"
                )
            offsets[name] = begin
            begin += p.numel()
        return offsets


def _placed(draft: Draft, inputs: tuple[int, ...], offsets: dict[str, int]) -> LoweredLayer:
    changes: dict[str, Any] = {"inputs": inputs}
    count = 0
    for field, weight in (("weight", draft.weight), ("bias_offset", draft.bias)):
        if weight is not None:
            changes[field] = offsets[weight.name]
            count += elements(weight.shape)
    return replace(draft.layer, parameters=count, **changes)


def _no_output(why: str) -> NoReturn:
    raise NotLowered(f"the model's output {why}")
