"""One flat parameter vector of length P for a module: where each parameter lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metafast import _check


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the parameters that adapt: those that require gradients, in module order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, argument: str = "model") -> Layout:
        """The layout of a module's trainable parameters.

        Raises:
            ValueError: none are there, or they are of several dtypes or devices.
            TypeError: they are not floating.
        """
        named = trainable(model)
        if not named:
            raise ValueError(f"{argument}: expected parameters that require gradients, got none in {_kind(model)}")
        first_name, first = next(iter(named.items()))
        for name, parameter in named.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{argument}: parameter {name!r} is lazy; run the model once before")
            if not parameter.is_floating_point():
                raise TypeError(f"{argument}: parameter {name!r} should be real, got {_check.describe(parameter)}")
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise ValueError(
                    f"{argument}: expected parameters of one dtype and device, got {_check.describe(first)} as "
                    f"{first_name!r} and {_check.describe(parameter)} as {name!r}"
                )
        return cls(
            tuple(named),
            tuple(p.shape for p in named.values()),
            tuple(p.numel() for p in named.values()),
        )

    def parameters(self, model: nn.Module) -> tuple[nn.Parameter, ...]:
        """The module's parameters in this order; raises when the module is no longer the one laid out."""
        if any(torch._C._functorch.is_functorch_wrapped_tensor(p) for p in model.parameters()):
            raise RuntimeError(
                "model: torch.func's transforms (grad, vmap, jvp) do not go through a whole learner, which batches and "
                "differentiates by itself; use learner(episodes).loss.backward() or torch.autograd.grad, and one batch "
                "of episodes for vmap"
            )
        named = trainable(model)
        if tuple(named) != self.names or any(named[n].shape != s for n, s in zip(self.names, self.shapes)):
            raise ValueError("model: its trainable parameters changed since the learner was made; make a new learner")
        return tuple(named.values())

    def flatten(self, model: nn.Module) -> Tensor:
        """(P,) vector of the module's parameters, connected to them in autograd."""
        return torch.cat([p.reshape(-1) for p in self.parameters(model)])

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views of (..., P), each (..., *shape), in layout order."""
        lead = flat.shape[:-1]
        return tuple(part.view(lead + s) for s, part in zip(self.shapes, flat.split(self.sizes, dim=-1)))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """(T, P) of one tensor (T, *shape) a parameter: the inverse of :meth:`split`."""
        return torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of (..., P) by name, each (..., *shape)."""
        return dict(zip(self.names, self.split(flat)))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require gradients, by name; shared ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _kind(model: nn.Module) -> str:
    return type(model).__name__
