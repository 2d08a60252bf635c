"""What runs where: a table of a module's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.backend import current_backend


@dataclass(frozen=True)
class Layer:
    """A row of the table: a layer by name, its output's shape for one sample, its parameters, its backend."""

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    backend: str


@dataclass(frozen=True)
class Explanation:
    """The rows and why the backend is what it is; ``print`` it."""

    module: str
    layers: tuple[Layer, ...]
    reason: str

    @property
    def parameters(self) -> int:
        """P, the parameters of all layers."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        header = ("layer", "kind", "output", "parameters", "backend")
        rows = [
            (
                r.name,
                r.kind,
                "" if r.output is None else "x".join(map(str, r.output)),
                f"{r.parameters:,}",
                r.backend,
            )
            for r in self.layers
        ]
        rows.append(("total", self.module, "", f"{self.parameters:,}", ""))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (header, *rows)]
        return "\n".join([*lines, self.reason])


def explain(module: nn.Module, input_shape: Sequence[int] | None = None) -> Explanation:
    """What every layer of a module or learner runs on, and why.

    Args:
        module: a model, or a learner, whose model is meant then.
        input_shape: shape of one sample; with it the table has the layers' output shapes (two samples go through).

    Returns:
        The table; ``print(explain(model, (1, 28, 28)))``.

    Raises:
        TypeError, ValueError: no module, no shape, or a shape that the module does not take.

    Example:
        >>> print(explain(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), (2,)))
        layer  kind        output  parameters  backend
        0      Linear      3       9           torch
        1      Tanh        3       0           torch
        total  Sequential          9
        backend auto: every layer runs by torch, all tasks in one call
    """
    _check.module("module", module)
    inner = getattr(module, "model", None) or getattr(module, "encoder", None)
    model = inner if isinstance(inner, nn.Module) else module
    leaves = {name: m for name, m in model.named_modules() if not any(True for _ in m.children())}
    shapes: dict[str, tuple[int, ...]] = {}
    if input_shape is not None:
        shapes = _output_shapes(model, leaves, tuple(_check.integer("input_shape", n, minimum=1) for n in input_shape))
    layers = tuple(
        Layer(
            name or type(m).__name__,
            type(m).__name__,
            shapes.get(name),
            sum(p.numel() for p in m.parameters()),
            "torch",
        )
        for name, m in leaves.items()
    )
    reason = f"backend {current_backend()}: every layer runs by torch, all tasks in one call"
    return Explanation(type(model).__name__, layers, reason)


def _output_shapes(
    model: nn.Module, leaves: dict[str, nn.Module], input_shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Output shape of each layer for one sample, by running two samples of zeros through."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, layer in leaves.items():

        def record(_m: nn.Module, _i: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        hooks.append(layer.register_forward_hook(record))
    parameter = next(model.parameters(), torch.zeros(()))
    training = {m: m.training for m in model.modules()}
    try:
        # Evaluation mode, so that running statistics stay as they are.
        model.eval()
        with torch.no_grad():
            model(torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device))
    except RuntimeError as error:
        raise ValueError(f"input_shape: the module does not take samples of shape {input_shape}: {error}") from error
    finally:
        for m, mode in training.items():
            m.training = mode
        for hook in hooks:
            hook.remove()
    return shapes
