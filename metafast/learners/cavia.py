"""CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann & Whiteson 2019, arXiv:1810.03642)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.engine.layout import Layout
from metafast.episodes import Episodes
from metafast.learners.base import GradientLearner
from metafast.losses import LossSpec
from metafast.rules import PartialSGD


class CAVIA(GradientLearner):
    """Adapts context parameters alone, from zero for every task; all others are shared and meta-learned.

        c_0 = 0;  c_{k+1} = c_k - lr grad_c L_support(theta, c_k);  objective = sum_t w_t L_query(theta, c_K)

    Context parameters are those named ``context``, of any module: :class:`metafast.models.ContextConcat` and
    :class:`~metafast.models.ContextFiLM` have them. They get a zero gradient, so that no optimiser moves them.

    Args:
        model: any module whose forward takes (N, ...) and returns one tensor (N, ...).
        lr: inner learning rate, at least 0.
        steps: K, inner steps, at least 0.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs (N, ...), targets (N, ...)) -> scalar.
        first_order: drop the second-order term of the meta-gradient.
        batch_norm: ``"batch"`` statistics (default) or the stored ``"running"`` ones; see :class:`GradientLearner`.
        context: names of the context parameters, or of modules all of whose parameters are. None: as above.
        query_weights: see :class:`GradientLearner`.
        support_batch: see :class:`GradientLearner`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, named; a model without context
            parameters, or with nothing else.

    Example:
        >>> import warnings
        >>> import metafast as mf
        >>> net = nn.Sequential(mf.models.ContextConcat(4), mf.models.MLP(5, (8, 8), 1))
        >>> cavia = mf.CAVIA(net, lr=1.0, steps=1, loss="mse")
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # ContextConcat has no native kernels
        ...     cavia(mf.data.Sinusoid().sample(tasks=4, shots=10, queries=10)).loss.backward()
        >>> net[0].context.grad, bool(net[1].layers[0].weight.grad.abs().sum() > 0)
        (tensor([0., 0., 0., 0.]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        steps: int = 2,
        loss: LossSpec = "cross_entropy",
        first_order: bool = False,
        batch_norm: str = "batch",
        context: Sequence[str] | None = None,
        query_weights: Sequence[float] | None = None,
        support_batch: int | None = None,
    ) -> None:
        layout = Layout.of(_check.module("model", model))
        if context is None:
            context = [name for name in layout.names if name.rpartition(".")[2] == "context"]
            if not context:
                raise ValueError(
                    "model: expected parameters named 'context', those of metafast.models.ContextConcat for instance, "
                    f"got {', '.join(layout.names)}"
                )
        rule = PartialSGD(model, context, lr)
        if bool(rule.moves.all()):
            raise ValueError("context: expected to leave parameters to be shared, got all of them")
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

    def _theta(self) -> Tensor:
        rule = self.rule
        assert isinstance(rule, PartialSGD)  # nn.Module attributes are untyped
        return torch.where(rule.moves, 0.0, super()._theta())

    def _fused(self, episodes: Episodes, weights: Tensor | None) -> None:
        return None  # that call starts from the parameters as they are
