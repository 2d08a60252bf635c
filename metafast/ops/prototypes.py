"""Prototypes and the distances to them: the head of Prototypical Networks (Snell et al. 2017, arXiv:1703.05175).

From the public functions to the loop: here (checks of shapes, with the user's names) -> csrc/torch/prototypes.cpp
(labels and masks, the first derivative) -> csrc/cpu/prototypes_kernel.h or csrc/cuda/prototypes.cuh. Without kernels
for the tensors at hand, and for second derivatives: :func:`_twin`. Losses with their gradients: prototype_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast import _check, _native

METRICS = ("sqeuclidean", "euclidean", "cosine")

_LIBRARY = torch.library.Library("metafast", "FRAGMENT")
MASKS = "Tensor? support_mask, Tensor? query_mask, Tensor? ways_mask"
# means (T, C, D) and residual (T, C, Nq in whole groups of 16), softmax less one-hot, are for the backward; without
# query labels losses and residual are empty.
_LIBRARY.define(
    "prototype_head(Tensor support, Tensor support_labels, Tensor query, Tensor? query_labels, int ways, str metric,"
    f" {MASKS}) -> (Tensor losses, Tensor logits, Tensor means, Tensor residual)"
)
_LIBRARY.define(
    "prototype_head_backward(Tensor? d_losses, Tensor? d_logits, Tensor support, Tensor support_labels, Tensor query,"
    " Tensor? query_labels, Tensor logits, Tensor means, Tensor residual, int ways, str metric,"
    f" {MASKS}) -> (Tensor, Tensor)"
)
KERNELS = ("cpu", "simt", "cuda")
_QUERY_GROUP = 16  # csrc/prototypes.h


def check_arguments(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    ways: int,
    metric: str,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    ways_mask: Tensor | None,
) -> None:
    """Raises where shapes, dtypes or devices do not fit; the contents of labels and masks are looked at later."""
    _check.tensor("support", support)
    _check.tensor("query", query)
    _check.integer("ways", ways, minimum=1)
    if metric not in METRICS:
        _check.choice("metric", metric, METRICS)
    if support.dim() != 3 or 0 in support.shape or not support.is_floating_point():
        raise ValueError(f"support: expected a floating (T, Ns, D), none of them 0, got {_check.describe(support)}")
    tasks, samples, features = support.shape
    if query.dim() != 3 or 0 in query.shape or (query.shape[0], query.shape[2]) != (tasks, features):
        raise ValueError(f"query: expected (T, Nq, D) = ({tasks}, Nq, {features}), got {_check.describe(query)}")
    _check.like("query", query, dtype=support.dtype, device=support.device, owner="support")
    if not query.is_floating_point():
        raise TypeError(f"query: expected dtype {support.dtype}, got {_check.describe(query)}")
    check_plan("support_labels", support_labels, (tasks, samples), torch.int64, support.device)
    if support_mask is not None:
        check_plan("support_mask", support_mask, (tasks, samples), torch.bool, support.device)
    if query_mask is not None:
        check_plan("query_mask", query_mask, (tasks, query.shape[1]), torch.bool, support.device)
    if ways_mask is not None:
        check_plan("ways_mask", ways_mask, (tasks, ways), torch.bool, support.device)


def check_plan(name: str, plan: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse labels and masks of another dtype, shape or device."""
    _check.tensor(name, plan)
    if plan.dtype != dtype:
        kind = "int64 labels" if dtype == torch.int64 else "a bool mask"
        raise TypeError(f"{name}: expected {kind}, got {_check.describe(plan)}")
    if plan.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {_check.describe(plan)}")
    if plan.device != device:
        raise ValueError(f"{name}: expected device {device}, got {_check.describe(plan)}")


def _check_contents(
    support_labels: Tensor,
    query_labels: Tensor | None,
    ways: int,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    ways_mask: Tensor | None,
) -> None:
    """What csrc/torch/prototypes.cpp checks, for the twin; the same messages."""
    labelled = [("support_labels", support_labels, support_mask)]
    if query_labels is not None:
        labelled.append(("query_labels", query_labels, query_mask))
    for name, labels, mask in labelled:
        there = labels if mask is None else labels[mask]
        if there.numel() and (int(there.min()) < 0 or int(there.max()) >= ways):
            raise ValueError(f"{name}: expected labels 0..{ways - 1}, got {int(there.min())}..{int(there.max())}")
        if ways_mask is not None:
            known = ways_mask.gather(1, labels if mask is None else labels.where(mask, 0))
            lost = ~known if mask is None else ~known & mask
            if bool(lost.any()):
                task, index = lost.nonzero()[0].tolist()
                label = int(labels[task, index])
                raise ValueError(f"{name}: expected classes of ways_mask, task {task} does not have {label}")
    empty = _members(support_labels, ways, support_mask, torch.int64).sum(1) == 0
    if ways_mask is not None:
        empty &= ways_mask
    if bool(empty.any()):
        task, label = empty.nonzero()[0].tolist()
        raise ValueError(f"support_labels: every class 0..{ways - 1} needs support, task {task} has none of {label}")
    if query_mask is not None and not bool(query_mask.any(1).all()):
        task = int((~query_mask.any(1)).nonzero()[0])
        raise ValueError(f"query_mask: every task needs a query, task {task} has none")


def _members(labels: Tensor, ways: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(T, N, ways) whether a sample is of a class."""
    if mask is None:
        return F.one_hot(labels, ways).to(dtype)
    return (F.one_hot(labels.where(mask, 0), ways) * mask.unsqueeze(-1)).to(dtype)


def prototypes(support: Tensor, support_labels: Tensor, ways: int) -> Tensor:
    """(T, ways, D) class means of support (T, Ns, D); ValueError for a class without support."""
    _check_contents(support_labels, None, ways, None, None, None)
    return _means(support, support_labels, ways, None)


def _means(support: Tensor, support_labels: Tensor, ways: int, support_mask: Tensor | None) -> Tensor:
    member = _members(support_labels, ways, support_mask, support.dtype)
    if support_mask is not None:
        support = support.where(support_mask.unsqueeze(-1), 0)  # what is not there may be NaN
    return torch.einsum("tnc,tnd->tcd", member, support) / member.sum(1).clamp(min=1).unsqueeze(-1)


def prototype_logits(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    ways: int,
    metric: str = "sqeuclidean",
    *,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    ways_mask: Tensor | None = None,
) -> Tensor:
    """Class logits of queries from their nearness to class means.

        p_c = mean of support with label c
        logits[q, c] = -||q - p_c||^2   or   -||q - p_c||   or   q.p_c / (max(|q|, e) max(|p_c|, e)),  e = 1e-12

    Args:
        support: (T, Ns, D) embeddings.
        support_labels: (T, Ns) int64 in 0..ways-1, in any order; every class must occur in every task.
        query: (T, Nq, D) embeddings.
        ways: number of classes.
        metric: ``"sqeuclidean"`` (Snell et al. 2017), ``"euclidean"``, whose gradient at distance 0 is 0, or
            ``"cosine"``, with a vector of norm 0 as :func:`torch.nn.functional.normalize` has it.
        support_mask: (T, Ns) bool, which samples are there; embeddings and labels of the others may be anything.
        query_mask: (T, Nq) bool, which queries are there; likewise.
        ways_mask: (T, ways) bool, which classes a task has; all when None.

    Returns:
        (T, Nq, ways) logits, differentiable in both embeddings, twice too; those of absent classes are -inf, the others
        of absent queries 0.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or labels that do not fit; a class without support, a task
            without a query.

    Example:
        >>> support, labels = torch.tensor([[[0.0], [2.0], [8.0]]]), torch.tensor([[0, 0, 1]])
        >>> prototype_logits(support, labels, torch.tensor([[[4.0]]]), ways=2)
        tensor([[[ -9., -16.]]])
    """
    masks = (support_mask, query_mask, ways_mask)
    check_arguments(support, support_labels, query, ways, metric, *masks)
    return head(support, support_labels, query, None, ways, metric, *masks)[1]


def prototype_head(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    ways: int,
    metric: str,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    ways_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses of :func:`prototype_loss` and logits of :func:`prototype_logits` by one operator."""
    masks = (support_mask, query_mask, ways_mask)
    check_arguments(support, support_labels, query, ways, metric, *masks)
    check_plan("query_labels", query_labels, (query.shape[0], query.shape[1]), torch.int64, query.device)
    return head(support, support_labels, query, query_labels, ways, metric, *masks)


def head(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    ways: int,
    metric: str,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    ways_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    masks = (support_mask, query_mask, ways_mask)
    if _native.runs("support", support, query, kernels=KERNELS):
        losses, logits, _, _ = torch.ops.metafast.prototype_head(
            support, support_labels, query, query_labels, ways, metric, *masks
        )
        return losses, logits
    _check_contents(support_labels, query_labels, ways, *masks)
    losses, logits, _ = _twin(support, support_labels, query, query_labels, ways, metric, *masks)
    return losses, logits


def _twin(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    ways: int,
    metric: str,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    ways_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, logits and means in PyTorch's own operations."""
    means = _means(support, support_labels, ways, support_mask)
    if query_mask is not None:
        query = query.where(query_mask.unsqueeze(-1), 1)  # not 0, where a norm has no second derivative
    there = means if ways_mask is None else means.where(ways_mask.unsqueeze(-1), 1)
    logits = _scores(query, there, metric)
    if query_mask is not None:
        logits = logits.where(query_mask.unsqueeze(-1), 0)
    if ways_mask is not None:
        logits = logits.where(ways_mask.unsqueeze(1), -torch.inf)
    if query_labels is None:
        return logits.new_empty(0), logits, means
    if query_mask is None:
        return -logits.log_softmax(-1).gather(-1, query_labels.unsqueeze(-1)).squeeze(-1).mean(1), logits, means
    labels = query_labels.where(query_mask, 0).unsqueeze(-1)
    each = -logits.log_softmax(-1).gather(-1, labels).squeeze(-1).where(query_mask, 0)
    return each.sum(1) / query_mask.sum(1), logits, means


def _scores(query: Tensor, means: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        return F.normalize(query, dim=-1) @ F.normalize(means, dim=-1).transpose(1, 2)
    if metric == "euclidean":
        # Differences, a class at a time: the square root would lay bare what the expansion of the square cancels.
        squares = torch.stack([(query - mean.unsqueeze(1)).square().sum(-1) for mean in means.unbind(1)], dim=-1)
        apart = squares > 0
        # The where inside keeps the derivatives at 0 finite, and 0.
        return -squares.where(apart, 1).sqrt().where(apart, 0)
    # Differences around a common centre: |q|^2 - 2 q.p + |p|^2 cancels less when both are small.
    centre = means.mean(1, keepdim=True)
    q, p = query - centre, means - centre
    return 2 * q @ p.transpose(1, 2) - (q * q).sum(-1, keepdim=True) - (p * p).sum(-1).unsqueeze(1)


def _operator(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    ways: int,
    metric: str,
    *masks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator by the twin, and by its checks."""
    support_mask, query_mask, ways_mask = masks
    _check_contents(support_labels, query_labels, ways, support_mask, query_mask, ways_mask)
    arguments = (support, support_labels, query, query_labels, ways, metric)
    losses, logits, means = _twin(*arguments, support_mask, query_mask, ways_mask)
    residual = logits.new_zeros(_residual_shape(query, query_labels, ways))
    if query_labels is not None:
        less = logits.softmax(-1) - _members(query_labels, ways, query_mask, logits.dtype)
        if query_mask is not None:
            less = less.where(query_mask.unsqueeze(-1), 0)
        residual[..., : query.shape[1]] = less.transpose(1, 2)
    return losses, logits, means, residual


def _residual_shape(query: Tensor, query_labels: Tensor | None, ways: int) -> tuple[int, int, int]:
    groups = (query.shape[1] + _QUERY_GROUP - 1) // _QUERY_GROUP
    return 0 if query_labels is None else query.shape[0], ways, groups * _QUERY_GROUP


def _fake(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    ways: int,
    metric: str,
    *masks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tasks, queries = query.shape[:2]
    return (
        support.new_empty(0 if query_labels is None else tasks),
        support.new_empty(tasks, queries, ways),
        support.new_empty(tasks, ways, support.shape[2]),
        support.new_empty(_residual_shape(query, query_labels, ways)),
    )


def _operator_backward(
    d_losses: Tensor | None,
    d_logits: Tensor | None,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    logits: Tensor,
    means: Tensor,
    residual: Tensor,
    ways: int,
    metric: str,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    ways_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The backward operator in PyTorch's own operations; written out, since there is no autograd below its own key."""
    d = torch.zeros_like(logits) if d_logits is None else d_logits
    if query_mask is not None:
        query = query.where(query_mask.unsqueeze(-1), 1)
        d = d.where(query_mask.unsqueeze(-1), 0)
    if ways_mask is not None:
        d = d.where(ways_mask.unsqueeze(1), 0)
    if d_losses is not None:
        each = d_losses / (query.shape[1] if query_mask is None else query_mask.sum(1))
        d = d + each.view(-1, 1, 1) * residual[..., : query.shape[1]].transpose(1, 2)
    if metric == "cosine":
        d_query = _through_normalize(d @ F.normalize(means, dim=-1), query)
        d_means = _through_normalize(d.transpose(1, 2) @ F.normalize(query, dim=-1), means)
    else:
        apart = logits != 0
        w = 2 * d if metric == "sqeuclidean" else d.where(apart, 0) / -logits.where(apart, 1)
        centre = means.mean(1, keepdim=True)
        q, p = query - centre, means - centre
        d_query = w @ p - w.sum(-1, keepdim=True) * q
        d_means = w.transpose(1, 2) @ q - w.sum(1).unsqueeze(-1) * p
    member = _members(support_labels, ways, support_mask, support.dtype)
    return member @ (d_means / member.sum(1).clamp(min=1).unsqueeze(-1)), d_query


def _through_normalize(d: Tensor, x: Tensor, least: float = 1e-12) -> Tensor:
    """The cotangent of x for that of F.normalize(x, dim=-1)."""
    norm = x.norm(dim=-1, keepdim=True)
    unit = x / norm.clamp(min=least)
    tangent = d - unit * (unit * d).sum(-1, keepdim=True)
    d_x: Tensor = tangent.where(norm >= least, d) / norm.clamp(min=least)
    return d_x


def _fake_backward(
    d_losses: Tensor | None, d_logits: Tensor | None, support: Tensor, support_labels: Tensor, query: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return support.new_empty(support.shape), query.new_empty(query.shape)


# The kernels of the CPU bring their first derivative along (csrc/torch/prototypes.cpp); this one is the others'.
def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    support, support_labels, query, query_labels, ctx.ways, ctx.metric, *masks = inputs
    _, logits, means, residual = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(means, residual)
    ctx.save_for_backward(support, support_labels, query, query_labels, logits, means, residual, *masks)


def _backward(ctx: Any, d_losses: Tensor | None, d_logits: Tensor | None, *_: Any) -> tuple[Any, ...]:
    support, support_labels, query, query_labels, logits, means, residual, *masks = ctx.saved_tensors
    nothing = (None,) * 6
    if query_labels is None:
        d_losses = None
    if d_losses is None and d_logits is None:
        return None, None, None, *nothing
    d_support, d_query = torch.ops.metafast.prototype_head_backward(
        d_losses,
        d_logits,
        support,
        support_labels,
        query,
        query_labels,
        logits.detach(),
        means,
        residual,
        ctx.ways,
        ctx.metric,
        *masks,
    )
    return d_support, None, d_query, *nothing


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # Not logits, means and residual: they are functions of support and query, through which alone this goes.
    d_losses, d_logits, support, support_labels, query, query_labels, _, _, _, ctx.ways, ctx.metric, *masks = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_losses, d_logits, support, query, support_labels, query_labels, *masks)


def _pull(
    d_losses: Tensor | None,
    d_logits: Tensor | None,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    *plain: Any,
) -> tuple[Tensor, Tensor]:
    """Cotangents of support and query through the twin, differentiable; ``plain``: ways, metric, masks."""
    losses, logits, _ = _twin(support, support_labels, query, query_labels, *plain)
    pairs = [(o, d) for o, d in ((losses, d_losses), (logits, d_logits)) if d is not None]
    d_support, d_query = torch.autograd.grad(
        [o for o, _ in pairs], [support, query], [d for _, d in pairs], create_graph=True
    )
    return d_support, d_query


def _backward_again(ctx: Any, dd_support: Tensor | None, dd_query: Tensor | None) -> tuple[Any, ...]:
    """The kernel has no second derivative of its own; the twin has them all."""
    if dd_support is None and dd_query is None:
        return (None,) * 14
    of_losses, of_logits, of_support, of_query = second_pull(ctx, dd_support, dd_query)
    return of_losses, of_logits, of_support, None, of_query, *(None,) * 9


def second_pull(ctx: Any, dd_support: Tensor | None, dd_query: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cotangents of the arguments of :func:`_pull` that have them, from those of its results; ctx has the arguments."""
    d_losses, d_logits, support, query, support_labels, query_labels, *masks = ctx.saved_tensors
    again = torch.is_grad_enabled()

    def leaf(t: Tensor) -> Tensor:
        # Of its own, or autograd would go on to where it comes from.
        return t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        support, query = leaf(support), leaf(query)
        d_losses, d_logits = (None if d is None else leaf(d) for d in (d_losses, d_logits))
        plain = (query_labels, ctx.ways, ctx.metric, *masks)
        first = _pull(d_losses, d_logits, support, support_labels, query, *plain)
    there = [t for t in (d_losses, d_logits, support, query) if t is not None]
    pairs = [(d, dd) for d, dd in zip(first, (dd_support, dd_query)) if dd is not None]
    found = torch.autograd.grad(
        [d for d, _ in pairs], there, [dd for _, dd in pairs], create_graph=again, materialize_grads=True
    )
    of_cotangents = iter(found[:-2])
    of_losses, of_logits = (None if d is None else next(of_cotangents) for d in (d_losses, d_logits))
    return of_losses, of_logits, found[-2], found[-1]


def by_folding(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The rule of vmap for an operator on tasks: a batch of them is more tasks."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size

        def fold(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            batch = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            return batch.reshape(size * batch.shape[1], *batch.shape[2:])

        outputs = operator(*(fold(value, dim) for value, dim in zip(arguments, in_dims)))
        return tuple(o.view(size, o.shape[0] // size, *o.shape[1:]) for o in outputs), (0,) * len(outputs)

    return rule


_LIBRARY.impl("prototype_head", _operator, "CompositeExplicitAutograd")
_LIBRARY.impl("prototype_head_backward", _operator_backward, "CompositeExplicitAutograd")
torch.library.register_fake("metafast::prototype_head", _fake, lib=_LIBRARY)
torch.library.register_fake("metafast::prototype_head_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("metafast::prototype_head", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd(
    "metafast::prototype_head_backward", _backward_again, setup_context=_keep_backward, lib=_LIBRARY
)
torch.library.register_vmap("metafast::prototype_head", by_folding(torch.ops.metafast.prototype_head), lib=_LIBRARY)
torch.library.register_vmap(
    "metafast::prototype_head_backward", by_folding(torch.ops.metafast.prototype_head_backward), lib=_LIBRARY
)
