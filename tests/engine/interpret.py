"""Lowered networks in the tests' terms: a module's flat vector, and the network run from it by torch in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafast.engine.layout import Layout
from metafast.engine.lowering import Lowered, replay


def flat_parameters(model: nn.Module, lowered: Lowered) -> Tensor:
    """(P + constants,) the module's parameters as the lowered layers index them, connected in autograd."""
    named = dict(model.named_parameters())
    constants = [named[name].detach().reshape(-1) for name in lowered.constants]
    return torch.cat([Layout.of(model).flatten(model), *constants])


def interpret(lowered: Lowered, flat: Tensor, x: Tensor) -> Tensor:
    """Outputs (N, D) of samples x (N, ...), by torch's operations on the dtype given."""
    return replay(lowered, flat, x)
