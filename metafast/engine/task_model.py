"""A module as a function of its parameters: f(params, x (N, ...)) -> (N, ...)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast import _check
from metafast.engine import batch_norm as norms
from metafast.engine.layout import Layout
from metafast.engine.networks import Networks
from metafast.engine.recent import remember
from metafast.engine.traced import fingerprint
from metafast.losses import Loss

# One tensor a parameter, in layout order. Not one flat vector: inside torch.func its split and the joins of its
# derivatives would cost as much as a small net's mathematics.
Params = tuple[Tensor, ...]
_MOST_SHAPES = 1024


def _constants(model: nn.Module) -> dict[str, Tensor]:
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return dict(model.named_buffers()) | frozen


class TaskModel:
    """What the engines need of a module: its layout, its forward as a function, its loss, its batch-norm policy.

    Constants go in as copies, so that a layer which writes to them (its own running statistics, a counter) changes
    nothing: no task may see another one's.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch_norm: str, argument: str = "model") -> None:
        self.model = _check.module(argument, model)
        self.argument = argument
        self.layout = Layout.of(model, argument)
        self.loss = loss
        self.batch_norm = norms.check_policy(batch_norm, model)
        self.warned_of_loop = False
        self.native = Networks(self)
        self._output_shapes: OrderedDict[tuple[object, ...], torch.Size] = OrderedDict()

    def theta(self) -> Tensor:
        """(P,) the meta-parameters, connected to the module's parameters in autograd."""
        return self.layout.flatten(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of all but labels and whole-number inputs."""
        return next(iter(self.layout.parameters(self.model))).dtype

    def mode(self) -> tuple[bool, ...]:
        """Train or eval, layer by layer: what a layer does (dropout) may hang on it."""
        return tuple(m.training for m in self.model.modules())

    @contextmanager
    def policy(self) -> Iterator[None]:
        """Hold the batch-norm policy; needed around every call of :meth:`forward`."""
        with norms.policy(self.model, self.batch_norm):
            yield

    def constants(self) -> Params:
        """What does not adapt: the module's buffers and frozen parameters, in the order of its names."""
        return tuple(_constants(self.model).values())

    def forward(self, params: Params, constants: Params, x: Tensor) -> Tensor:
        """Outputs (N, ...) of the model with the given parameters and constants for one task's inputs (N, ...)."""
        values = {name: c.clone() for name, c in zip(_constants(self.model), constants)}
        values.update(zip(self.layout.names, params))
        result = functional_call(self.model, values, (x,))
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{self.argument}: expected a forward that returns one tensor, got {_check.describe(result)}"
            )
        return result

    def task_loss(self, params: Params, constants: Params, x: Tensor, y: Tensor) -> Tensor:
        """Scalar loss of one task with the given parameters and constants, inputs (N, ...) and targets (N, ...)."""
        value = self.loss.function(self.forward(params, constants, x), y)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"loss: expected a scalar tensor from {self.loss.name}, got {_check.describe(value)}")
        return value

    def fingerprint(self) -> Hashable | None:
        """What a recording of the model's functions hangs on; None where they must not be recorded.

        A callable loss may hang on anything, a schedule for instance.
        """
        return fingerprint(self.model) if self.loss.named else None

    def check_inputs(self, x_name: str, x: Tensor) -> torch.Size:
        """Shape of the outputs for one task of x (T, N, ...); refuses inputs that the model does not take.

        The model itself says so: it runs once, on the first task, for each new shape, without touching the
        generators' state.
        """
        first = next(iter(self.layout.parameters(self.model)))
        _check.like(x_name, x, dtype=first.dtype, device=first.device, owner="the model")
        if x.requires_grad:
            raise ValueError(
                f"{x_name}: gradients to inputs do not flow through the batched call; detach it or use clone()"
            )
        key = (x.shape[1:], x.dtype, x.device, self.mode())
        known = self._output_shapes.get(key)
        if known is None:
            cuda = [x.device] if x.device.type == "cuda" else []
            with torch.no_grad(), self.policy(), torch.random.fork_rng(devices=cuda):
                try:
                    outputs = self.forward(self.layout.parameters(self.model), self.constants(), x[0])
                except (RuntimeError, ValueError, IndexError) as error:
                    raise ValueError(
                        f"{x_name}: the model ({type(self.model).__name__}) does not take samples of shape "
                        f"{tuple(x.shape[2:])}, {x.shape[1]} at once: {error}"
                    ) from error
            if outputs.dim() == 0 or outputs.shape[0] != x.shape[1]:
                raise ValueError(
                    f"{self.argument}: expected {x.shape[1]} outputs for {x.shape[1]} samples, "
                    f"got {_check.describe(outputs)}"
                )
            known = remember(self._output_shapes, key, outputs.shape, _MOST_SHAPES)
        return known
