"""MAML (Finn, Abbeel & Levine 2017, arXiv:1703.03400) and its first-order form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from metafast.learners.base import GradientLearner
from metafast.losses import LossSpec
from metafast.rules import SGD, PartialSGD


class MAML(GradientLearner):
    """Model-agnostic meta-learning: an initialisation from which a few gradient steps solve a task.

        phi_0 = theta;  phi_{k+1} = phi_k - lr grad L_support(phi_k);  objective = sum_t w_t L_query(phi_K)

    The meta-gradient is exact, with all second-order terms, unless ``first_order`` (FOMAML) drops them.

    Args:
        model: any module whose forward takes (N, ...) and returns one tensor (N, ...).
        lr: inner learning rate, at least 0.
        steps: K, inner steps, at least 0.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs (N, ...), targets (N, ...)) -> scalar.
        first_order: drop the Hessian term of the meta-gradient.
        batch_norm: ``"batch"`` statistics (default) or the stored ``"running"`` ones; see :class:`GradientLearner`.
        adapts: names of the parameters or modules that the inner loop moves, as for ANIL or BOIL; see
            :class:`~metafast.rules.PartialSGD`. None: all.
        query_weights: MAML++'s multi-step loss; see :class:`GradientLearner`.
        support_batch: support samples of an inner step; see :class:`GradientLearner`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, named.

    Example:
        >>> import metafast as mf
        >>> episodes = mf.data.Sinusoid().sample(tasks=4, shots=10, queries=10)
        >>> maml = mf.MAML(mf.models.MLP(1, (40, 40), 1), lr=0.01, steps=1, loss="mse")
        >>> out = maml(episodes)
        >>> out.loss.backward()
        >>> out.losses.shape, out.logits.shape
        (torch.Size([4]), torch.Size([4, 10, 1]))
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.4,
        steps: int = 5,
        loss: LossSpec = "cross_entropy",
        first_order: bool = False,
        batch_norm: str = "batch",
        adapts: Sequence[str] | None = None,
        query_weights: Sequence[float] | None = None,
        support_batch: int | None = None,
    ) -> None:
        rule = SGD(lr) if adapts is None else PartialSGD(model, adapts, lr)
        super().__init__(
            model,
            rule,
            steps,
            loss,
            first_order,
            batch_norm=batch_norm,
            query_weights=query_weights,
            support_batch=support_batch,
        )
