"""What batch normalisation does inside a learner: one policy, chosen once.

``"batch"`` (the default, as in the MAML paper): statistics of the very batch that goes through, support or query, in
training and in evaluation alike. ``"running"``: the stored running statistics, as constants. Neither ever writes them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from metafast import _check

POLICIES = ("batch", "running")

_lock = threading.Lock()
# For each norm under a policy now: (users, policy, training, track_running_stats) with its own flags to put back.
_held: weakref.WeakKeyDictionary[nn.Module, tuple[int, str, bool, bool]] = weakref.WeakKeyDictionary()


def check_policy(batch_norm: str, model: nn.Module) -> str:
    """The policy's name; ``"running"`` is refused for a norm that keeps no running statistics."""
    _check.choice("batch_norm", batch_norm, POLICIES)
    if batch_norm == "running":
        for name, norm in _norms(model):
            if norm.running_mean is None:
                raise ValueError(f"batch_norm: 'running' needs running statistics, layer {name!r} keeps none")
    return batch_norm


@contextmanager
def policy(model: nn.Module, batch_norm: str) -> Iterator[None]:
    """Run the module's batch norms under a policy; their own flags come back afterwards.

    Several threads may hold the same policy on one module; two policies at once raise a RuntimeError.
    """
    norms = [norm for _, norm in _norms(model)]
    taken = []
    try:
        with _lock:
            for norm in norms:
                _take(norm, batch_norm)
                taken.append(norm)
        yield
    finally:
        with _lock:
            for norm in taken:
                _give_back(norm)


def _norms(model: nn.Module) -> list[tuple[str, _BatchNorm | _InstanceNorm]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, (_BatchNorm, _InstanceNorm))]


def _take(norm: nn.Module, batch_norm: str) -> None:
    held = _held.get(norm)
    if held is not None:
        users, now, training, tracking = held
        if now != batch_norm:
            raise RuntimeError(f"batch_norm: {now!r} is in use by another thread, {batch_norm!r} cannot be as well")
        _held[norm] = (users + 1, now, training, tracking)
        return
    _held[norm] = (1, batch_norm, norm.training, bool(norm.track_running_stats))
    # Without tracking, forward passes no buffers on, so there is nothing to read or to write.
    norm.training = batch_norm == "batch"
    norm.track_running_stats = batch_norm == "running"  # type: ignore[assignment]


def _give_back(norm: nn.Module) -> None:
    users, now, training, tracking = _held[norm]
    if users > 1:
        _held[norm] = (users - 1, now, training, tracking)
        return
    del _held[norm]
    norm.training = training
    norm.track_running_stats = tracking  # type: ignore[assignment]
