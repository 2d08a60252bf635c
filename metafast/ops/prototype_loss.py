"""Losses of prototypes, of which the CPU's kernel makes the gradients at once.

From the public function to the loop: here -> csrc/torch/prototype_loss.cpp (labels and masks, the first derivative) ->
csrc/cpu/prototypes_kernel.h. Where no derivative is asked for, and on other devices, by the head of prototypes.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast import _native
from metafast.backend import current_backend
from metafast.ops.prototypes import KERNELS, MASKS, by_folding, check_arguments, check_plan, head, second_pull

_LIBRARY = torch.library.Library("metafast", "FRAGMENT")
_HEAD = "Tensor support, Tensor support_labels, Tensor query, Tensor query_labels, int ways, str metric"
# d_support and d_query are the gradients of scale * losses, for the backward.
_LIBRARY.define(f"prototype_loss({_HEAD}, {MASKS}, float scale) -> (Tensor losses, Tensor d_support, Tensor d_query)")
# The same for the cotangent d_losses of the losses.
_LIBRARY.define(
    f"prototype_loss_backward(Tensor d_losses, {_HEAD}, {MASKS}, Tensor d_support, Tensor d_query, float scale)"
    " -> (Tensor, Tensor)"
)


def prototype_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    ways: int,
    metric: str = "sqeuclidean",
    *,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    ways_mask: Tensor | None = None,
) -> Tensor:
    """(T,) mean cross-entropy of the queries that are there under :func:`prototype_logits`.

        loss_t = -mean_q log softmax(logits[t, q])[query_labels[t, q]]

    Args, errors: those of :func:`prototype_logits`, and ``query_labels`` (T, Nq) int64 in 0..ways-1.

    Example:
        >>> support, labels = torch.tensor([[[0.0], [2.0]]]), torch.tensor([[0, 1]])
        >>> prototype_loss(support, labels, torch.tensor([[[1.0]]]), torch.tensor([[1]]), ways=2)
        tensor([0.6931])
    """
    arguments = (support, support_labels, query, query_labels, ways, metric, support_mask, query_mask, ways_mask)
    # What an operator's schema would make an integer or a string of goes the way that refuses it.
    if type(ways) is not int or type(metric) is not str or not _at_once(support, query):
        _check_arguments(*arguments)
        return head(*arguments)[0]
    try:
        losses: Tensor = torch.ops.metafast.prototype_loss(*arguments, 1 / len(support))[0]
        return losses
    except Exception as error:
        refusal = error
    _check_arguments(*arguments)  # the operator's own checks are faster, these say more
    raise refusal


def _check_arguments(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int, metric: str, *masks: Any
) -> None:
    check_arguments(support, support_labels, query, ways, metric, *masks)
    check_plan("query_labels", query_labels, (query.shape[0], query.shape[1]), torch.int64, query.device)


def _at_once(support: Tensor, query: Tensor) -> bool:
    """Whether losses and gradients come in one pass: the CPU's kernel, and a derivative is asked for."""
    if not (isinstance(support, Tensor) and isinstance(query, Tensor) and torch.is_grad_enabled()):
        return False
    if not ((support.requires_grad or query.requires_grad) and support.is_cpu and current_backend() != "simt"):
        return False
    return _native.runs("support", support, query, kernels=KERNELS)


def _operator(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int, metric: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator by those of the head."""
    *masks, scale = rest
    arguments = (support, support_labels, query, query_labels)
    plain = (ways, metric, *masks)
    losses, *kept = torch.ops.metafast.prototype_head(*arguments, *plain)
    d_losses = torch.full_like(losses, scale)
    back = torch.ops.metafast.prototype_head_backward
    d_support, d_query = back(d_losses, None, *arguments, *kept, *plain)
    return losses, d_support, d_query


def _fake(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int, metric: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *masks, _ = rest
    _check_arguments(support, support_labels, query, query_labels, ways, metric, *masks)  # one may be on `meta` alone
    return support.new_empty(support.shape[0]), support.new_empty(support.shape), query.new_empty(query.shape)


def _operator_backward(d_losses: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, d_support, d_query, scale = rest
    factor = (d_losses / scale).view(-1, 1, 1)
    return d_support * factor, d_query * factor


def _fake_backward(
    d_losses: Tensor, support: Tensor, support_labels: Tensor, query: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return support.new_empty(support.shape), query.new_empty(query.shape)


# The CPU's kernel brings its first derivative along (csrc/torch/prototype_loss.cpp); this one is the others'.
def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ways, ctx.metric, first, second, third, ctx.scale = inputs
    _, d_support, d_query = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(d_support, d_query)
    ctx.save_for_backward(*tensors, first, second, third, d_support, d_query)


def _backward(ctx: Any, d_losses: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_losses is None:
        return (None,) * 10
    *tensors, first, second, third, d_support, d_query = ctx.saved_tensors
    d_support, d_query = torch.ops.metafast.prototype_loss_backward(
        d_losses, *tensors, ctx.ways, ctx.metric, first, second, third, d_support, d_query, ctx.scale
    )
    return d_support, None, d_query, *(None,) * 7


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # Not the gradients: they are functions of support and query, through which alone this goes.
    d_losses, support, support_labels, query, query_labels, ctx.ways, ctx.metric, *masks, _, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_losses, None, support, query, support_labels, query_labels, *masks)


def _backward_again(ctx: Any, dd_support: Tensor | None, dd_query: Tensor | None) -> tuple[Any, ...]:
    if dd_support is None and dd_query is None:
        return (None,) * 13
    of_losses, _, of_support, of_query = second_pull(ctx, dd_support, dd_query)
    return of_losses, of_support, None, of_query, *(None,) * 9


_LIBRARY.impl("prototype_loss", _operator, "CompositeExplicitAutograd")
_LIBRARY.impl("prototype_loss_backward", _operator_backward, "CompositeExplicitAutograd")
torch.library.register_fake("metafast::prototype_loss", _fake, lib=_LIBRARY)
torch.library.register_fake("metafast::prototype_loss_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("metafast::prototype_loss", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd(
    "metafast::prototype_loss_backward", _backward_again, setup_context=_keep_backward, lib=_LIBRARY
)
torch.library.register_vmap("metafast::prototype_loss", by_folding(torch.ops.metafast.prototype_loss), lib=_LIBRARY)
torch.library.register_vmap(
    "metafast::prototype_loss_backward", by_folding(torch.ops.metafast.prototype_loss_backward), lib=_LIBRARY
)
