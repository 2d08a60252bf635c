"""Prototypical Networks (Snell, Swersky & Zemel 2017, arXiv:1703.05175)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.engine.networks import NativeNetwork
from metafast.engine.shared import SharedForward
from metafast.engine.task_model import TaskModel
from metafast.engine.untraced import untraced
from metafast.episodes import Episodes, Outcome, check_set, check_weights, outcome
from metafast.learners.learner import Learner
from metafast.losses import resolve_loss
from metafast.ops.prototypes import METRICS, prototype_head, prototype_logits, prototypes


class ProtoNets(Learner):
    """Classifies a query by the nearest class mean in a learned embedding; no inner loop.

        p_c = mean_{support of c} f(x);   logits[q, c] = -||f(q) - p_c||^2;   loss = cross-entropy

    In each task of the episodes every class 0..ways-1 must have support. With masks, ways is the task's own, and -inf
    is the logit of a class that it lacks.

    Args:
        encoder: module (N, ...) -> (N, D), or (N, ...) which is flattened.
        metric: ``"sqeuclidean"`` (the paper), ``"euclidean"``, -||f(q) - p_c||, or ``"cosine"``.
        batch_norm: ``"batch"``: statistics of each episode, its support and query together, in training and
            evaluation; ``"running"``: the stored running statistics as constants. Neither writes them.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; an encoder without trainable parameters.

    Example:
        >>> import metafast as mf
        >>> x, y = torch.randn(2, 10, 8), torch.arange(5).repeat(2, 2)
        >>> proto = mf.ProtoNets(nn.Linear(8, 4))
        >>> out = proto(mf.Episodes(x, y, x, y))
        >>> out.loss.backward()
        >>> out.logits.shape
        torch.Size([2, 10, 5])
    """

    _by_ways = True

    def __init__(self, encoder: nn.Module, metric: str = "sqeuclidean", batch_norm: str = "batch") -> None:
        super().__init__()
        self.encoder = _check.module("encoder", encoder)
        self.metric = _check.choice("metric", metric, METRICS)
        self._task = TaskModel(encoder, resolve_loss("cross_entropy"), batch_norm, argument="encoder")
        self._shared = SharedForward(self._task)

    def _dense(self, episodes: Episodes, weights: Tensor | None) -> Outcome:
        ways = self._check(episodes, weights)
        network = self._one_call(episodes, weights)
        if network is not None:
            return Outcome(*network.prototypes(episodes, ways, self.metric, weights))
        shots = episodes.support_x.shape[1]
        # Together through the encoder, so that batch statistics are the episode's.
        embedded = self._embed(torch.cat([episodes.support_x, episodes.query_x], dim=1))
        support, query = embedded[:, :shots], embedded[:, shots:]
        losses, logits = prototype_head(support, episodes.support_y, query, episodes.query_y, ways, self.metric)
        return outcome(losses, logits, episodes.query_y, weights)

    def _accumulated(self, episodes: Episodes, weights: Tensor | None) -> Outcome | None:
        ways = self._check(episodes, weights)
        network = self._one_call(episodes, weights)
        if network is None or network.hooked():
            return None
        return Outcome(*network.prototypes(episodes, ways, self.metric, weights, accumulate=True))

    def _one_call(self, episodes: Episodes, weights: Tensor | None) -> NativeNetwork | None:
        """The native encoder, where the step and its gradient are one call of it."""
        if weights is not None and weights.requires_grad:
            return None
        return self._task.native(episodes.support_x)

    @untraced
    def adapt(self, support_x: Tensor, support_y: Tensor) -> AdaptedPrototypes:
        """The class means of T tasks from support_x (T, Ns, ...) and support_y (T, Ns); no gradient step.

        With batch statistics, support and queries are then normalised by their own statistics, each set apart.

        Raises:
            TypeError, ValueError: a set that does not fit, before any work.
        """
        check_set("support_x", support_x, "support_y", support_y)
        self._task.check_inputs("support_x", support_x)
        ways = _count_ways("support_y", support_y)
        check_every_class(support_y, ways)
        return AdaptedPrototypes(self, prototypes(self._embed(support_x), support_y, ways))

    def extra_repr(self) -> str:
        return f"metric={self.metric}, batch_norm={self._task.batch_norm}"

    def _embed(self, x: Tensor) -> Tensor:
        """(T, N, D) embeddings of x (T, N, ...), a task at a time as far as batch statistics go."""
        return self._shared(x).reshape(*x.shape[:2], -1)

    def _check(self, episodes: Episodes, weights: Tensor | None) -> int:
        """The number of ways; raises where the episodes do not fit."""
        if not isinstance(episodes, Episodes):
            raise TypeError(f"episodes: expected metafast.Episodes, got {_check.describe(episodes)}")
        episodes.validate()
        ways = _count_ways("support_y", episodes.support_y)
        check_every_class(episodes.support_y, ways)
        top = int(episodes.query_y.max())
        if top >= ways:
            raise ValueError(f"query_y: expected labels below {ways}, the classes with support, got {top}")
        # Of one task, support and query together, as they will go through the encoder.
        self._task.check_inputs("support_x", torch.cat([episodes.support_x[:1], episodes.query_x[:1]], dim=1))
        if weights is not None:
            check_weights(weights, episodes, self._task.dtype)
        return ways

    def _check_classes(self, episodes: Episodes) -> None:
        """Refuse masked episodes in which a class below a task's ways has no support."""
        episodes.validate()
        _count_ways("support_y", episodes.support_y)
        check_every_class_of_each(episodes, episodes.ways)


class AdaptedPrototypes:
    """T sets of class means; ``adapted(x (T, N, ...))`` gives logits (T, N, ways)."""

    def __init__(self, learner: ProtoNets, means: Tensor) -> None:
        self._learner = learner
        self.prototypes = means

    @untraced
    def __call__(self, x: Tensor) -> Tensor:
        """Logits (T, N, ways) for x (T, N, ...); ValueError or TypeError where x does not fit."""
        tasks, ways, _ = self.prototypes.shape
        _check.tensor("x", x)
        if x.dim() < 2 or x.shape[0] != tasks or x.shape[1] == 0:
            raise ValueError(f"x: expected (T, N, ...) with T = {tasks} and N > 0, got {_check.describe(x)}")
        _check.finite("x", x)
        self._learner._task.check_inputs("x", x)
        labels = torch.arange(ways, device=x.device).expand(tasks, ways)
        return prototype_logits(self.prototypes, labels, self._learner._embed(x), ways, self._learner.metric)


def _count_ways(name: str, labels: Tensor) -> int:
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: ProtoNets classifies, expected int64 labels, got {_check.describe(labels)}")
    return int(labels.max()) + 1


def check_every_class(labels: Tensor, ways: int) -> None:
    """Refuse a task in which a class has no support, before the encoder runs."""
    present = torch.zeros(labels.shape[0], ways, dtype=torch.bool, device=labels.device)
    present.scatter_(1, labels, True)
    if not bool(present.all()):
        task, label = (~present).nonzero()[0].tolist()
        raise ValueError(f"support_y: every class 0..{ways - 1} needs support, task {task} has none of {label}")


def check_every_class_of_each(episodes: Episodes, ways: Tensor) -> None:
    """The same for masked episodes with ways (T,), a number a task."""
    labels, mask = episodes.support_y, episodes.support_mask
    if mask is not None:
        labels = labels.where(mask, labels[mask].min())
    classes = torch.arange(int(max(ways.max(), labels.max() + 1)), device=labels.device)
    seen = labels.unsqueeze(2) == classes
    if mask is not None:
        seen &= mask.unsqueeze(2)
    missing = ~seen.any(1) & (classes < ways.unsqueeze(1))
    if bool(missing.any()):
        task, label = missing.nonzero()[0].tolist()
        raise ValueError(
            f"support_y: every class 0..{int(ways[task]) - 1} needs support, task {task} has none of {label}"
        )
