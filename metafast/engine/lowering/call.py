"""What a row of the table gets to turn one call of the forward into a layer, and how it says no."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from metafast.engine.guard import NotLowered
from metafast.engine.lowering.build import Draft, Network, Shape, Value, Weight
from metafast.engine.lowering.lowered import Kind, LoweredLayer
from metafast.engine.lowering.trace import first_line


class Batch(enum.Enum):
    """Stands for N in what the forward reads of shapes: x.size(0)."""

    N = "N"


class Call:
    """One call, by name; every method that takes something wrong refuses with that name.

    Args:
        network: gets the layers.
        name: of the module or operation.
        what: its class or function.
        batch_norm: the policy.
        weights: by identity of the parameter.
        sole_user: whether nothing but this call uses a value or what shares its memory.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        what: str,
        batch_norm: str,
        weights: dict[int, Weight],
        sole_user: Callable[[Value], bool],
    ) -> None:
        self.name = name
        self.what = what
        self.batch_norm = batch_norm
        self._network = network
        self._weights = weights
        self._sole_user = sole_user

    def refuse(self, why: str) -> NoReturn:
        raise NotLowered(f"layer {self.name!r} ({self.what}) {why}")

    def tensor(self, x: object) -> Value:
        if not isinstance(x, Value):
            self.refuse("takes something else than the input or a layer's output")
        return x

    def features(self, x: object) -> Value:
        """The value, of samples (D,)."""
        value = self.tensor(x)
        if len(value.shape) != 1:
            self.refuse(f"takes features here, (N, D), got samples of shape {value.shape}")
        return value

    def image(self, x: object) -> Value:
        """The value, of samples (C, H, W)."""
        value = self.tensor(x)
        if len(value.shape) != 3:
            self.refuse(f"takes images here, (N, C, H, W), got samples of shape {value.shape}")
        return value

    def either(self, x: object) -> Value:
        """The value, of samples (D,) or (C, H, W)."""
        value = self.tensor(x)
        if len(value.shape) not in (1, 3):
            self.refuse(f"takes features or images here, got samples of shape {value.shape}")
        return value

    def overwrites(self, x: object) -> None:
        """Refuse to write to a value that anything else reads: torch may give that other one what was written."""
        if not self._sole_user(self.tensor(x)):
            self.refuse("writes in place to what another layer or the caller uses too")

    def own(self, parameter: object) -> Weight | None:
        """The weight that a module's attribute is."""
        if parameter is None:
            return None
        if id(parameter) not in self._weights:
            self.refuse("has a weight that is no parameter of the model")
        return self._weights[id(parameter)]

    def weight(self, role: str, x: object, shape: Shape | None = None) -> Weight:
        """A parameter, of this shape if one is given."""
        if not isinstance(x, Weight):
            self.refuse(f"takes as its {role} something else than a parameter of the model")
        if shape is not None and x.shape != shape:
            self.refuse(f"takes a {role} of shape {shape}, got {x.shape}")
        return x

    def optional(self, role: str, x: object, shape: Shape) -> Weight | None:
        return None if x is None else self.weight(role, x, shape)

    def affine(self, weight: object, bias: object, shape: Shape) -> tuple[Weight | None, Weight | None]:
        """Gamma and beta of a norm: both or none."""
        if (weight is None) != (bias is None):
            self.refuse(f"has a {'bias' if weight is None else 'weight'} alone; the engine's norms have both or none")
        return self.optional("weight", weight, shape), self.optional("bias", bias, shape)

    def number(self, role: str, x: object) -> float:
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
            self.refuse(f"has the {role} {x!r}, expected a finite number")
        return float(x)

    def whole(self, role: str, x: object) -> int:
        if isinstance(x, bool) or not isinstance(x, int):
            self.refuse(f"has the {role} {x!r}, expected an int")
        return x

    def pair(self, role: str, x: object) -> tuple[int, int]:
        """An int, or one or two of them, as (height, width)."""
        parts = list(x) if isinstance(x, Sequence) and not isinstance(x, str) else [x]
        sizes = [self.whole(role, part) for part in parts]
        if len(sizes) not in (1, 2):
            self.refuse(f"has the {role} {x!r}, expected one or two ints")
        return sizes[0], sizes[-1]

    def only(self, role: str, x: object, wanted: object) -> None:
        """Refuse another setting than the one that the engine has."""
        if type(x) is not type(wanted) or x != wanted:
            self.refuse(f"has {role}={x!r}; the engine has {role}={wanted!r} only")

    def flag(self, role: str, x: object) -> bool:
        if not isinstance(x, bool):
            self.refuse(f"has {role}={x!r}, expected a bool")
        return x

    def window(
        self, x: Value, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> tuple[int, int]:
        """Height and width of what a window gives that moves over an image."""
        if min(kernel) < 1 or min(stride) < 1 or min(padding) < 0:
            self.refuse(f"has the kernel {kernel}, stride {stride} and padding {padding}")
        sides = [(s + 2 * p - k, step) for s, k, step, p in zip(x.shape[1:], kernel, stride, padding)]
        if min(left for left, _ in sides) < 0:
            self.refuse(f"does not take samples of shape {x.shape}: they are smaller than its kernel {kernel}")
        height, width = (left // step + 1 for left, step in sides)
        return height, width

    def layer(
        self,
        kind: Kind,
        inputs: tuple[Value, ...],
        output: Shape,
        weights: tuple[Weight | None, Weight | None] = (None, None),
        **fields: Any,
    ) -> Value:
        """Append a layer with these fields of :class:`LoweredLayer`."""
        layer = LoweredLayer(self.name, kind, (), output, fields.pop("channels", output[0]), **fields)
        return self._network.add(Draft(layer, inputs, self.what, *weights))

    def view(self, x: object, function: Callable[[Tensor, int], Tensor]) -> Value:
        """The value reshaped by a function of the tensor and N that keeps the order of the elements.

        Refused unless samples stay samples for any N; one of them, in which dimensions may vanish, included.
        """
        value = self.tensor(x)
        shapes = set()
        for n in (1, 2, 3):
            try:
                seen = function(torch.empty(n, *value.shape, device="cpu"), n)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                self.refuse(f"does not take samples of shape {value.shape}: {first_line(error)}")
            shapes.add(tuple(seen.shape[1:]) if seen.dim() and seen.shape[0] == n else None)
        (shape, *others) = shapes
        if others or shape is None:
            self.refuse("reshapes across samples")
        return Value(value.source, shape, self.name)
