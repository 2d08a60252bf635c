"""Prototypes and the distances to them: the head of Prototypical Networks (Snell et al. 2017, arXiv:1703.05175)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast import _check

METRICS = ("sqeuclidean", "cosine")


def _check_arguments(support: Tensor, support_labels: Tensor, query: Tensor, ways: int, metric: str) -> None:
    _check.tensor("support", support)
    _check.tensor("support_labels", support_labels)
    _check.tensor("query", query)
    _check.integer("ways", ways, minimum=1)
    _check.choice("metric", metric, METRICS)
    if support.dim() != 3 or 0 in support.shape or not support.is_floating_point():
        raise ValueError(f"support: expected a floating (T, Ns, D), none of them 0, got {_check.describe(support)}")
    tasks, samples, features = support.shape
    if query.dim() != 3 or 0 in query.shape or (query.shape[0], query.shape[2]) != (tasks, features):
        raise ValueError(f"query: expected (T, Nq, D) = ({tasks}, Nq, {features}), got {_check.describe(query)}")
    _check.like("query", query, dtype=support.dtype, device=support.device, owner="support")
    if not query.is_floating_point():
        raise TypeError(f"query: expected dtype {support.dtype}, got {_check.describe(query)}")
    check_labels("support_labels", support_labels, (tasks, samples), ways, support.device)


def check_labels(name: str, labels: Tensor, shape: tuple[int, int], ways: int, device: torch.device) -> None:
    """Refuse labels that are not int64 of the shape (T, N), on the device and in 0..ways-1."""
    _check.tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 labels, got {_check.describe(labels)}")
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {_check.describe(labels)}")
    if labels.device != device:
        raise ValueError(f"{name}: expected device {device}, got {_check.describe(labels)}")
    if int(labels.min()) < 0 or int(labels.max()) >= ways:
        raise ValueError(f"{name}: expected labels 0..{ways - 1}, got {int(labels.min())}..{int(labels.max())}")


def prototypes(support: Tensor, support_labels: Tensor, ways: int) -> Tensor:
    """(T, ways, D) class means of support (T, Ns, D); ValueError for a class without support."""
    member = F.one_hot(support_labels, ways).to(support.dtype)
    counts = member.sum(1)
    if bool((counts == 0).any()):
        task, label = (counts == 0).nonzero()[0].tolist()
        raise ValueError(f"support_labels: every class 0..{ways - 1} needs support, task {task} has none of {label}")
    return torch.einsum("tnc,tnd->tcd", member, support) / counts.unsqueeze(-1)


def prototype_logits(
    support: Tensor, support_labels: Tensor, query: Tensor, ways: int, metric: str = "sqeuclidean"
) -> Tensor:
    """Class logits of queries from their nearness to class means.

        p_c = mean of support with label c;   logits[q, c] = -||q - p_c||^2   or   q.p_c / (|q| |p_c|)

    Args:
        support: (T, Ns, D) embeddings.
        support_labels: (T, Ns) int64 in 0..ways-1, in any order; every class must occur in every task.
        query: (T, Nq, D) embeddings.
        ways: number of classes.
        metric: ``"sqeuclidean"`` (Snell et al. 2017) or ``"cosine"``.

    Returns:
        (T, Nq, ways) logits, differentiable in both embeddings, twice too.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or labels that do not fit; a class without support.

    Example:
        >>> support, labels = torch.tensor([[[0.0], [2.0], [8.0]]]), torch.tensor([[0, 0, 1]])
        >>> prototype_logits(support, labels, torch.tensor([[[4.0]]]), ways=2)
        tensor([[[ -9., -16.]]])
    """
    _check_arguments(support, support_labels, query, ways, metric)
    means = prototypes(support, support_labels, ways)
    if metric == "cosine":
        return F.normalize(query, dim=-1) @ F.normalize(means, dim=-1).transpose(1, 2)
    # Differences around a common centre: |q|^2 - 2 q.p + |p|^2 cancels less when both are small.
    centre = means.mean(1, keepdim=True)
    q, p = query - centre, means - centre
    return 2 * q @ p.transpose(1, 2) - (q * q).sum(-1, keepdim=True) - (p * p).sum(-1).unsqueeze(1)


def prototype_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    ways: int,
    metric: str = "sqeuclidean",
) -> Tensor:
    """(T,) mean cross-entropy of the queries under :func:`prototype_logits`.

        loss_t = -mean_q log softmax(logits[t, q])[query_labels[t, q]]

    Args, errors: those of :func:`prototype_logits`, and ``query_labels`` (T, Nq) int64 in 0..ways-1.

    Example:
        >>> support, labels = torch.tensor([[[0.0], [2.0]]]), torch.tensor([[0, 1]])
        >>> prototype_loss(support, labels, torch.tensor([[[1.0]]]), torch.tensor([[1]]), ways=2)
        tensor([0.6931])
    """
    _check_arguments(support, support_labels, query, ways, metric)
    check_labels("query_labels", query_labels, (query.shape[0], query.shape[1]), ways, query.device)
    logits = prototype_logits(support, support_labels, query, ways, metric)
    return -logits.log_softmax(-1).gather(-1, query_labels.unsqueeze(-1)).squeeze(-1).mean(1)
