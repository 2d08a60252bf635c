"""The one gradient-based learner: an inner loop with an update rule, and the meta-gradient through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.engine.again import again, is_good
from metafast.engine.batches import check_batch
from metafast.engine.networks import Inner, NativeNetwork
from metafast.engine.recent import remember
from metafast.engine.select import Engine, EngineChoice
from metafast.engine.task_model import TaskModel
from metafast.engine.untraced import untraced
from metafast.episodes import Episodes, Outcome, check_set, check_weights, outcome
from metafast.learners.hand import TaskLearner
from metafast.learners.learner import Learner
from metafast.losses import LossSpec, resolve_loss
from metafast.rules import UpdateRule

_MOST_SIZES = 4  # of episodes that alternate, training's and evaluation's for instance


class GradientLearner(Learner):
    """Learns an initialisation theta (and the rule's psi) from which a few inner steps solve a task.

        phi_0 = theta
        phi_{k+1}, s_{k+1} = U(phi_k, grad L_support(phi_k), s_k; psi)
        objective = sum_t w_t L_query(phi_K)

    :class:`MAML` and :class:`LOMAML` are this with their rule U; give your own :class:`~metafast.rules.UpdateRule`
    for another one.

    Args:
        model: any module whose forward takes (N, ...) and returns one tensor (N, ...).
        rule: the update rule.
        steps: K, inner steps, at least 0.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs (N, ...), targets (N, ...)) -> scalar.
        first_order: drop the second-order term H lam_g of the meta-gradient.
        learn_init: whether theta receives a meta-gradient; the rule's parameters always do.
        batch_norm: ``"batch"``: statistics of the support or query batch itself, in training and evaluation (MAML
            paper); ``"running"``: the stored running statistics as constants. Neither writes them.
        query_weights: v_1..v_K: the objective is then sum_t w_t sum_k v_k L_query(phi_k), MAML++'s multi-step loss
            (Antoniou et al. 2019, arXiv:1810.09502); may be set anew between calls, as it anneals them.
        support_batch: samples of the support set that an inner step sees: step k the k-th so many, round and round;
            a divisor of the support set's size. None: all of them.
        truncate: n, at least 1: backpropagation is cut every n steps, as in truncated backpropagation through time.
            With cut(.) the identity whose derivative is 0,

                phi_{k+1}, s_{k+1} = U(c(phi_k), grad L_support(c(phi_k)), c(s_k); psi)

            where c = cut for k = n, 2n, ... and the identity for other k. A query loss after step k so reaches the
            steps back to the last multiple of n below k, and theta only if k <= n: without ``query_weights`` and with
            K > n the meta-gradient of theta is 0. None: no cut.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, named; a model without trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: UpdateRule,
        steps: int = 5,
        loss: LossSpec = "cross_entropy",
        first_order: bool = False,
        learn_init: bool = True,
        batch_norm: str = "batch",
        query_weights: Sequence[float] | None = None,
        support_batch: int | None = None,
        truncate: int | None = None,
    ) -> None:
        super().__init__()
        self.model = _check.module("model", model)
        if not isinstance(rule, UpdateRule):
            raise TypeError(f"rule: expected a metafast.UpdateRule, got {_check.describe(rule)}")
        self.rule = rule
        self.steps = _check.integer("steps", steps, minimum=0)
        self.first_order = _check.flag("first_order", first_order)
        self.learn_init = _check.flag("learn_init", learn_init)
        self._task = TaskModel(model, resolve_loss(loss), batch_norm)
        self._engines = EngineChoice(self._task, rule, first_order)
        self.query_weights = query_weights
        self.support_batch = support_batch
        self.truncate = truncate

    @property
    def query_weights(self) -> tuple[float, ...] | None:
        """v_1..v_K, how much the query loss after each step counts; None: only that after the last."""
        return self._query_weights

    @query_weights.setter
    def query_weights(self, weights: Sequence[float] | None) -> None:
        if weights is not None:
            if not isinstance(weights, Sequence) or isinstance(weights, str):
                raise TypeError(f"query_weights: expected numbers, one a step, got {_check.describe(weights)}")
            weights = tuple(_check.number("query_weights", w) for w in weights)
        self._query_weights = weights
        self._check_query_weights()

    @property
    def support_batch(self) -> int | None:
        """Support samples that an inner step sees; None: all of them."""
        return self._support_batch

    @support_batch.setter
    def support_batch(self, batch: int | None) -> None:
        self._support_batch = None if batch is None else _check.integer("support_batch", batch, minimum=1)

    @property
    def truncate(self) -> int | None:
        """Steps between the cuts of backpropagation; None: no cut."""
        return self._truncate

    @truncate.setter
    def truncate(self, steps: int | None) -> None:
        self._truncate = None if steps is None else _check.integer("truncate", steps, minimum=1)

    def _check_query_weights(self) -> None:
        """Again before use, since the number of steps may have been set anew."""
        weights = self._query_weights
        if weights is None:
            return
        if self.steps == 0:
            raise ValueError(f"query_weights: expected None for a learner of no steps, got {weights}")
        if len(weights) != self.steps:
            raise ValueError(f"query_weights: expected {self.steps} numbers, one a step, got {len(weights)}")

    @untraced
    def adapt(self, support_x: Tensor, support_y: Tensor, steps: int | None = None) -> Adapted:
        """Adapt to T tasks at once.

        Args:
            support_x: (T, Ns, ...) inputs.
            support_y: (T, Ns) labels or (T, Ns, ...) targets.
            steps: inner steps, the learner's own when None.

        Returns:
            :class:`Adapted`, the T adapted models: ``adapted(query_x)`` gives (T, Nq, ...).

        Raises:
            TypeError, ValueError: a set that does not fit the model, before any work.
        """
        steps = self.steps if steps is None else _check.integer("steps", steps, minimum=0)
        check_set("support_x", support_x, "support_y", support_y)
        shape = self._task.check_inputs("support_x", support_x)
        self._task.loss.check("support_x", "support_y", support_y, shape)
        check_batch(self.support_batch, "support_x", support_x.shape[1])
        phi = self._inner_loop(support_x, support_y, steps)
        return Adapted(self._task, self._engine(support_x, support_y), phi)

    def clone(self) -> TaskLearner:
        """One task by hand: ``learner.adapt(loss_fn(learner(x), y))`` steps, ``.backward()`` reaches this learner."""
        return TaskLearner(self._task, self.rule, self._theta(), self.first_order, self.truncate)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, loss={self._task.loss.name}, first_order={self.first_order}"

    def _dense(self, episodes: Episodes, weights: Tensor | None) -> Outcome:
        network = self._check(episodes, weights)
        inner = None if network is None else self._fused(episodes, weights)
        if network is not None and inner is not None:
            self._remember(network, inner, episodes, weights)
            return Outcome(*network.meta_step(episodes, inner, weights))
        losses, logits = self._query(episodes)
        return outcome(losses, logits, episodes.query_y, weights)

    def _accumulated(self, episodes: Episodes, weights: Tensor | None) -> Outcome | None:
        network = self._check(episodes, weights)
        inner = None if network is None else self._fused(episodes, weights)
        if network is None or inner is None or self._learned(inner) or network.hooked():
            return None
        self._remember(network, inner, episodes, weights)
        return Outcome(*network.meta_step(episodes, inner, weights, accumulate=True))

    def _remember(self, network: NativeNetwork, inner: Inner, episodes: Episodes, weights: Tensor | None) -> None:
        """For the next call like this one, if such calls have a short way."""
        if weights is not None or torch.is_inference_mode_enabled():
            return
        networks, signature = self._task.native, episodes.signature
        found = networks.agains.get(signature)
        if found is None or not is_good(found, self, network):
            found = again(self, GradientLearner, network, inner, episodes)
            if found is not None:
                remember(networks.agains, signature, found, _MOST_SIZES)
        networks.again = found

    def _theta(self) -> Tensor:
        theta = self._task.theta()
        return theta if self.learn_init else theta.detach()

    def _start(self, x: Tensor, y: Tensor) -> Tensor:
        """phi_0 for support sets x (T, Ns, ...), y (T, Ns, ...): (P,), or (T, P) where it differs between tasks."""
        return self._theta()

    def _engine(self, x: Tensor, y: Tensor) -> Engine:
        if self._engines.rule is not self.rule or self._engines.first_order != self.first_order:
            self._engines = EngineChoice(self._task, self.rule, self.first_order)  # they were set anew
        return self._engines(x, y)

    def _inner_loop(self, x: Tensor, y: Tensor, steps: int) -> Tensor:
        """phi_K, (T, P)."""
        if steps == 0:
            return self._start(x, y).expand(x.shape[0], -1)
        last = self._path(x, y, [*[False] * (steps - 1), True])[-1]
        assert last is not None  # it was wanted
        return last

    def _path(self, x: Tensor, y: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        return self._engine(x, y).path(self._start(x, y), x, y, wanted, self.support_batch, self.truncate)

    def _query(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Losses (T,) and the last step's logits (T, Nq, ...), by the engine's four functions."""
        x, y = episodes.support_x, episodes.support_y
        engine, weights = self._engine(x, y), self.query_weights

        def judged(phi: Tensor) -> tuple[Tensor, Tensor]:
            logits = engine.forward(phi, episodes.query_x)
            return self._task.loss.per_task(logits, episodes.query_y), logits

        if weights is None:
            return judged(self._inner_loop(x, y, self.steps))
        wanted = [*(weight != 0 for weight in weights[:-1]), True]  # the last for its logits
        parts = [(weight, *judged(phi)) for weight, phi in zip(weights, self._path(x, y, wanted)) if phi is not None]
        return torch.stack([weight * losses for weight, losses, _ in parts]).sum(0), parts[-1][2]

    def _learned(self, inner: Inner) -> bool:
        # Asked of the parameters: what is made of them requires no gradient under no_grad.
        return isinstance(inner.rates, Tensor) and any(p.requires_grad for p in self.rule.parameters())

    def _fused(self, episodes: Episodes, weights: Tensor | None) -> Inner | None:
        """The inner loop where it and its adjoint are one native call: the rule is phi - rate g, or an LSTM's."""
        if weights is not None and weights.requires_grad:
            return None
        # Looked up by nn.Module it would take longer than all the rest here.
        rule = cast(UpdateRule, self._modules["rule"])
        optimizer = rule.plain_optimizer()
        rates = rule.plain_rates(self.steps, episodes.support_x.dtype)
        if rates is None:
            return None
        return Inner(
            self.steps,
            rates,
            self.first_order,
            self._support_batch,
            self._query_weights,
            self._truncate,
            self.learn_init,
            optimizer,
        )

    def _check(self, episodes: Episodes, weights: Tensor | None) -> NativeNetwork | None:
        """The native network for the episodes, if there is one; raises where they do not fit."""
        if not isinstance(episodes, Episodes):
            raise TypeError(f"episodes: expected metafast.Episodes, got {_check.describe(episodes)}")
        signature = (episodes.signature, self._support_batch)  # validates them
        if weights is not None:
            check_weights(weights, episodes, self._task.dtype)
        check_batch(self._support_batch, "support_x", episodes.support_x.shape[1])
        self._check_query_weights()
        network = self._task.native.known(signature)
        if network is not None:
            return network
        self._check_fit(episodes)
        network = self._task.native(episodes.support_x)
        if network is not None:
            self._task.native.remember(signature, network)
        return network

    def _check_fit(self, episodes: Episodes) -> None:
        """Refuse episodes that the model does not take, for what it gives."""
        for part in ("support", "query"):
            x_name, y_name = f"{part}_x", f"{part}_y"
            shape = self._task.check_inputs(x_name, getattr(episodes, x_name))
            self._task.loss.check(x_name, y_name, getattr(episodes, y_name), shape)
        if self.support_batch is not None:
            # So few at once may be what a layer refuses: batch norm a single one.
            self._task.check_inputs("support_x", episodes.support_x[:, : self.support_batch])


class Adapted:
    """T adapted models, called as one: ``adapted(x (T, N, ...))`` -> outputs (T, N, ...).

    Attributes:
        parameters: the adapted parameters by name, each (T, *shape).
    """

    def __init__(self, task: TaskModel, engine: Engine, phi: Tensor) -> None:
        self._task = task
        self._engine = engine
        self._phi = phi

    @property
    def tasks(self) -> int:
        """T, the number of tasks adapted to."""
        return self._phi.shape[0]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The adapted parameters by name, each (T, *shape)."""
        return self._task.layout.unflatten(self._phi)

    @untraced
    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (T, N, ...) for inputs x (T, N, ...); ValueError or TypeError where x does not fit."""
        _check.tensor("x", x)
        if x.dim() < 2 or x.shape[0] != self.tasks or x.shape[1] == 0:
            raise ValueError(f"x: expected (T, N, ...) with T = {self.tasks} and N > 0, got {_check.describe(x)}")
        _check.finite("x", x)
        self._task.check_inputs("x", x)
        return self._engine.forward(self._phi, x)
