"""Reptile (Nichol, Achiam & Schulman 2018, arXiv:1803.02999)."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from metafast.episodes import Episodes
from metafast.learners.base import GradientLearner
from metafast.losses import LossSpec
from metafast.rules import SGD


class Reptile(GradientLearner):
    """Moves the initialisation towards what each task's training leads to; no derivative of the inner loop.

        phi_0 = theta;  phi_{k+1} = phi_k - lr grad L_support(phi_k);  meta-gradient = sum_t w_t (theta - phi_K)

    ``out.loss`` is the query loss, as everywhere, but its ``backward()`` gives this meta-gradient: the queries only
    judge. An outer ``torch.optim.SGD`` of rate eps is the paper's theta + eps (phi_K - theta); Adam takes it as well.

    Args:
        model: any module whose forward takes (N, ...) and returns one tensor (N, ...).
        lr: inner learning rate, at least 0.
        steps: K, inner steps, at least 0. From 2 on it learns more than a joint training of the tasks would.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs (N, ...), targets (N, ...)) -> scalar.
        batch_norm: ``"batch"`` statistics (default) or the stored ``"running"`` ones; see :class:`GradientLearner`.
        support_batch: support samples of an inner step, the paper's minibatches: steps that see different samples are
            what makes the initialisation generalise. Episodes are sorted by label, so shuffle the support sets before.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, named.

    Example:
        >>> import metafast as mf
        >>> episodes = mf.data.Sinusoid().sample(tasks=4, shots=10, queries=10)
        >>> reptile = mf.Reptile(mf.models.MLP(1, (8, 8), 1), lr=0.02, steps=5, loss="mse")
        >>> reptile(episodes).loss.backward()
        >>> adapted = reptile.adapt(episodes.support_x, episodes.support_y).parameters["layers.0.bias"]
        >>> bias = reptile.model.layers[0].bias
        >>> torch.allclose(bias.grad, (bias - adapted).mean(0), atol=1e-6)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        steps: int = 5,
        loss: LossSpec = "cross_entropy",
        batch_norm: str = "batch",
        support_batch: int | None = None,
    ) -> None:
        super().__init__(
            model, SGD(lr), steps, loss, first_order=True, batch_norm=batch_norm, support_batch=support_batch
        )

    def clone(self) -> NoReturn:
        """Refused: the meta-gradient is no derivative of a loss made by hand.

        Raises:
            TypeError: always.
        """
        raise TypeError("Reptile: a clone's loss has no Reptile gradient; call the learner, or adapt() and subtract")

    def _check_query_weights(self) -> None:
        if self.query_weights is not None:
            raise ValueError(f"query_weights: queries teach Reptile nothing, expected None, got {self.query_weights}")

    def _fused(self, episodes: Episodes, weights: Tensor | None) -> None:
        return None

    def _query(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        theta = self._theta()
        with torch.no_grad():
            x, y = episodes.support_x, episodes.support_y
            phi = self._inner_loop(x, y, self.steps)
            logits = self._engine(x, y).forward(phi, episodes.query_x)
            losses = self._task.loss.per_task(logits, episodes.query_y)
        # Worth 0, and its gradient is theta - phi.
        pull = 0.5 * (theta - phi).square().sum(1)
        return losses + (pull - pull.detach()), logits
