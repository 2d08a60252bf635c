"""Proto-MAML (Triantafillou et al. 2020, arXiv:1903.03096)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.engine.shared import SharedForward
from metafast.engine.task_model import TaskModel
from metafast.episodes import Episodes
from metafast.learners.base import GradientLearner
from metafast.learners.protonets import check_every_class, check_every_class_of_each
from metafast.losses import resolve_loss
from metafast.ops.prototypes import prototypes
from metafast.rules import SGD


class ProtoMAML(GradientLearner):
    """MAML whose linear head starts, in each task, as the classifier of Prototypical Networks.

        p_c = mean_{support of c} f(x; theta);  W_c = 2 p_c,  b_c = -||p_c||^2
        phi_0 = (theta, W, b);  phi_{k+1} = phi_k - lr grad L_support(phi_k);  objective = sum_t w_t L_query(phi_K)

    L is the cross-entropy of W f(x) + b. Encoder and head adapt; the meta-gradient goes through the head's start too,
    also with ``first_order``. After no step the logits are ProtoNets', -||f(x) - p_c||^2 + ||f(x)||^2.

    Args:
        encoder: module (N, ...) -> (N, D), or (N, ...) which is flattened.
        features: D, numbers of an embedding.
        ways: classes of a task, at least 2.
        lr: inner learning rate, at least 0.
        steps: K, inner steps, at least 0.
        first_order: drop the Hessian term of the meta-gradient.
        batch_norm: ``"batch"``: statistics of the support or query set itself, the support set's for the head's start;
            or the stored ``"running"`` ones; see :class:`GradientLearner`.
        query_weights: see :class:`GradientLearner`.
        support_batch: support samples of an inner step; the head starts from all of them.

    Attributes:
        model: encoder, flattening and head. The head's own numbers are never used and get a zero gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, named; a task in which a class has no
            support.

    Example:
        >>> import metafast as mf
        >>> x, y = torch.randn(2, 10, 8), torch.arange(5).repeat(2, 2)
        >>> learner = mf.ProtoMAML(nn.Linear(8, 4), features=4, ways=5, lr=0.1, steps=2)
        >>> out = learner(mf.Episodes(x, y, x, y))
        >>> out.loss.backward()
        >>> out.logits.shape
        torch.Size([2, 10, 5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        ways: int,
        lr: float = 0.01,
        steps: int = 5,
        first_order: bool = False,
        batch_norm: str = "batch",
        query_weights: Sequence[float] | None = None,
        support_batch: int | None = None,
    ) -> None:
        flat = nn.Sequential(_check.module("encoder", encoder), nn.Flatten())
        shared = TaskModel(flat, resolve_loss("cross_entropy"), batch_norm, argument="encoder")
        _check.integer("features", features, minimum=1)
        _check.integer("ways", ways, minimum=2)
        head = nn.Linear(features, ways).to(next(encoder.parameters()))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        super().__init__(
            nn.Sequential(*flat, head),
            SGD(lr),
            steps,
            "cross_entropy",
            first_order,
            batch_norm=batch_norm,
            query_weights=query_weights,
            support_batch=support_batch,
        )
        self.ways = ways
        self._shared = SharedForward(shared)

    def clone(self) -> NoReturn:
        """Refused: without a support set there is no head to start from.

        Raises:
            TypeError: always.
        """
        raise TypeError("ProtoMAML: a clone has no support set for its head to start from; call the learner or adapt()")

    def _check_classes(self, episodes: Episodes) -> None:
        episodes.validate()
        if episodes.support_y.dtype == torch.int64:
            ways = torch.full((episodes.tasks,), self.ways, device=episodes.support_y.device)
            check_every_class_of_each(episodes, ways)

    def _start(self, x: Tensor, y: Tensor) -> Tensor:
        check_every_class(y, self.ways)
        means = prototypes(self._shared(x), y, self.ways)
        head = torch.cat([2 * means.flatten(1), -means.square().sum(2)], dim=1)
        encoder = self._theta()[: -head.shape[1]]
        return torch.cat([encoder.expand(x.shape[0], -1), head], dim=1)

    def _fused(self, episodes: Episodes, weights: Tensor | None) -> None:
        return None  # that call starts all tasks from one theta
