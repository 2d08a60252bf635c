"""LOMAML: MAML whose inner update is made by a learned, differentiable optimiser, an LSTM as a rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from metafast.coordinatewise import CoordinatewiseOptimizer
from metafast.learners.base import GradientLearner
from metafast.losses import LossSpec
from metafast.lstm import LSTMOptimizer
from metafast.rules import LearnedRule, moving


class LOMAML(GradientLearner):
    """Learned-optimiser MAML: the coordinatewise LSTM of Andrychowicz et al. 2016 as the inner update rule.

        phi_0 = theta;  phi_{k+1} = phi_k - lr O(g_k, s_k; psi),  g_k = grad L_support(phi_k)

    Both theta (unless ``learn_init=False``) and the optimiser's weights psi receive the exact meta-gradient of
    sum_t w_t L_query(phi_K). The LSTM's state is carried over the K steps of a task.

    Args:
        model: any module whose forward takes (N, ...) and returns one tensor (N, ...).
        optimizer: the learned optimiser O: an ``LSTMOptimizer``, an ``MLPOptimizer`` or your own
            ``CoordinatewiseOptimizer``; a fresh ``LSTMOptimizer()`` when None.
        lr: factor of the optimiser's output, at least 0; Andrychowicz et al.'s output scale.
        steps: K, inner steps, at least 0.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs (N, ...), targets (N, ...)) -> scalar.
        first_order: treat the gradients g_k as constants (as Andrychowicz et al. do): no Hessian term.
        learn_init: whether theta is meta-learned too.
        batch_norm: ``"batch"`` statistics (default) or the stored ``"running"`` ones; see :class:`GradientLearner`.
        adapts: names of the parameters or modules that the inner loop moves; see :class:`~metafast.rules.PartialSGD`.
            None: all.
        query_weights: v_1..v_K: judge sum_k v_k L_query(phi_k), as Andrychowicz et al. do with v_k = 1; see
            :class:`GradientLearner`. None: the last step alone.
        support_batch: support samples of an inner step; see :class:`GradientLearner`.
        truncate: cut backpropagation every so many steps; see :class:`GradientLearner`. None: no cut.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, named.

    Example:
        >>> import metafast as mf
        >>> episodes = mf.data.Sinusoid().sample(tasks=4, shots=10, queries=10)
        >>> lo = mf.LOMAML(mf.models.MLP(1, (8, 8), 1), mf.LSTMOptimizer(hidden=4), steps=2, loss="mse")
        >>> lo(episodes).loss.backward()
        >>> all(w.grad is not None for w in lo.optimizer.parameters())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: CoordinatewiseOptimizer | None = None,
        lr: float = 0.1,
        steps: int = 5,
        loss: LossSpec = "cross_entropy",
        first_order: bool = False,
        learn_init: bool = True,
        batch_norm: str = "batch",
        adapts: Sequence[str] | None = None,
        query_weights: Sequence[float] | None = None,
        support_batch: int | None = None,
        truncate: int | None = None,
    ) -> None:
        moves = None if adapts is None else moving(model, adapts)
        rule = LearnedRule(LSTMOptimizer() if optimizer is None else optimizer, lr, moves)
        super().__init__(
            model, rule, steps, loss, first_order, learn_init, batch_norm, query_weights, support_batch, truncate
        )

    @property
    def optimizer(self) -> CoordinatewiseOptimizer:
        """The learned optimiser O; it can be saved, loaded and used alone, on other networks too."""
        optimizer = self.rule.optimizer
        assert isinstance(optimizer, CoordinatewiseOptimizer)  # nn.Module attributes are untyped
        return optimizer
