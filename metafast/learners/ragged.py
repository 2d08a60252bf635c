"""Tasks of different sizes: those of each size are one dense batch, which the learner takes as any other.

Nothing of this is approximate: no padding goes through a layer, so none gets into batch statistics, means or losses,
and the native engine runs each group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metafast.engine.autocast import backward
from metafast.engine.guard import hooked
from metafast.episodes import Episodes, Outcome, check_weights

if TYPE_CHECKING:
    from metafast.learners.learner import Learner


def by_groups(learner: Learner, episodes: Episodes, weights: Tensor | None, accumulate: bool = False) -> Outcome:
    """The outcome of masked episodes, task by task in their order.

    Args:
        learner: whose ``forward`` or ``accumulate_grad`` takes each group.
        episodes: masked ones.
        weights: (T,), 1/T each when None.
        accumulate: whether the second door was asked.
    """
    if accumulate and hooked(learner.parameters()):
        # Its hooks are to see one gradient, that of all groups.
        with torch.enable_grad():
            out = by_groups(learner, episodes, weights)
        if out.loss.requires_grad:
            backward(out.loss)
        return out.detach()
    dtype, by_ways = learner._task.dtype, learner._by_ways
    check_weights(weights, episodes, dtype)
    groups = episodes.groups(by_ways)
    if weights is None and len(groups) > 1:
        device = episodes.support_x.device
        weights = torch.full((episodes.tasks,), 1 / episodes.tasks, dtype=dtype, device=device)
    parts = [(dense, None if weights is None else weights[tasks]) for tasks, dense in groups]
    # All before any: a group that is refused must not find the others' gradients added.
    for part in parts:
        learner._check(*part)
    found: list[Outcome] = [(learner.accumulate_grad if accumulate else learner)(*part) for part in parts]
    order = torch.tensor([task for tasks, _ in groups for task in tasks], device=episodes.support_x.device).argsort()
    accuracies = [out.accuracy for out in found if out.accuracy is not None]
    return Outcome(
        torch.stack([out.loss for out in found]).sum(0),
        torch.cat([out.losses for out in found])[order],
        _logits(episodes, [out.logits for out in found], order, by_ways),
        torch.cat(accuracies)[order] if accuracies else None,
    )


def _logits(episodes: Episodes, parts: list[Tensor], order: Tensor, by_ways: bool) -> Tensor:
    """(T, Nq, C): each query where it was, 0 for those that are none; -inf for the classes that a task lacks."""
    if by_ways:
        most = max(part.shape[2] for part in parts)
        parts = [nn.functional.pad(part, (0, most - part.shape[2]), value=-torch.inf) for part in parts]
    queries = episodes.query_x.shape[1]
    padded = [torch.cat([p, p.new_zeros(p.shape[0], queries - p.shape[1], *p.shape[2:])], dim=1) for p in parts]
    logits = torch.cat(padded)[order]
    if episodes.query_mask is None:
        return logits
    # Groups have a task's queries first; queries that are there may have been anywhere.
    place = (episodes.query_mask.cumsum(1) - 1).clamp_(min=0)
    place, there = (t.reshape(*t.shape, *[1] * (logits.dim() - 2)) for t in (place, episodes.query_mask))
    return logits.gather(1, place.expand_as(logits)).where(there, 0)
