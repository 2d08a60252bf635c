"""torch.autocast around the engine: what is remembered hangs on it, and backward passes run outside of it."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor


def autocast_state(device: torch.device) -> tuple[tuple[str, torch.dtype], ...]:
    """The devices and dtypes of the autocast in force, for work on ``device`` and the CPU; () outside of it."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", device.type) if _on(kind))


def backward(loss: Tensor) -> None:
    """``loss.backward()`` as if called behind the autocast block, where PyTorch wants it.

    A backward pass takes the types of its forward pass by itself; inside the block it would be rounded once more.
    """
    with ExitStack() as outside:
        for kind, _ in autocast_state(loss.device):
            outside.enter_context(torch.autocast(kind, enabled=False))
        loss.backward()


def _on(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
