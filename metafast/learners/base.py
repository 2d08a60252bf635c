"""The one gradient-based learner: an inner loop with an update rule, and the meta-gradient through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.engine.networks import NativeNetwork
from metafast.engine.select import Engine, EngineChoice
from metafast.engine.task_model import TaskModel
from metafast.episodes import Episodes, Outcome, check_set, check_weights, outcome
from metafast.learners.hand import TaskLearner
from metafast.losses import LossSpec, resolve_loss
from metafast.rules import SGD, UpdateRule


class GradientLearner(nn.Module):
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

    def forward(self, episodes: Episodes, weights: Tensor | None = None) -> Outcome:
        """Adapt to every task's support set and judge on its query set; ``out.loss.backward()`` is exact.

        Args:
            episodes: T tasks.
            weights: (T,) factors w_t of the tasks' losses; 1/T each when None.

        Returns:
            :class:`Outcome` with loss (scalar), losses (T,), logits (T, Nq, ...) and accuracy (T,).

        Raises:
            TypeError, ValueError: episodes or weights that do not fit the model, before any work.
        """
        network = self._check(episodes, weights)
        if network is not None and self._fused(weights):
            return self._meta_step(network, episodes, weights, accumulate=False)
        phi = self._inner_loop(episodes.support_x, episodes.support_y, self.steps)
        logits = self._engine(episodes.support_x, episodes.support_y).forward(phi, episodes.query_x)
        losses = self._task.loss.per_task(logits, episodes.query_y)
        return outcome(losses, logits, episodes.query_y, weights)

    def accumulate_grad(self, episodes: Episodes, weights: Tensor | None = None) -> Outcome:
        """Add the meta-gradient to ``.grad`` and return the detached outcome; the second door.

        The same numbers as ``out = learner(episodes); out.loss.backward()``; arguments and errors as there.
        """
        network = self._check(episodes, weights)
        if network is not None and self._fused(weights):
            return self._meta_step(network, episodes, weights, accumulate=True)
        with torch.enable_grad():
            out: Outcome = self(episodes, weights)
        if out.loss.requires_grad:
            out.loss.backward()
        return out.detach()

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
        phi = self._inner_loop(support_x, support_y, steps)
        return Adapted(self._task, self._engine(support_x, support_y), phi)

    def clone(self) -> TaskLearner:
        """One task by hand: ``learner.adapt(loss_fn(learner(x), y))`` steps, ``.backward()`` reaches this learner."""
        return TaskLearner(self._task, self.rule, self._theta(), self.first_order)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, loss={self._task.loss.name}, first_order={self.first_order}"

    def _theta(self) -> Tensor:
        theta = self._task.theta()
        return theta if self.learn_init else theta.detach()

    def _engine(self, x: Tensor, y: Tensor) -> Engine:
        return self._engines(x, y)

    def _inner_loop(self, x: Tensor, y: Tensor, steps: int) -> Tensor:
        return self._engine(x, y).inner_loop(self._theta(), x, y, steps)

    def _fused(self, weights: Tensor | None) -> bool:
        """Whether inner loop and adjoint are one native call: the rule is phi - lr g, and theta is what is learned."""
        return type(self.rule) is SGD and self.learn_init and (weights is None or not weights.requires_grad)

    def _meta_step(
        self, network: NativeNetwork, episodes: Episodes, weights: Tensor | None, *, accumulate: bool
    ) -> Outcome:
        assert isinstance(self.rule, SGD)
        return Outcome(*network.meta_step(episodes, self.steps, self.rule.lr, self.first_order, weights, accumulate))

    def _check(self, episodes: Episodes, weights: Tensor | None) -> NativeNetwork | None:
        """The native network for the episodes, if there is one; raises where they do not fit."""
        if not isinstance(episodes, Episodes):
            raise TypeError(f"episodes: expected metafast.Episodes, got {_check.describe(episodes)}")
        episodes.validate()
        check_weights(weights, episodes, episodes.support_x.dtype)
        signature = episodes.signature
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

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (T, N, ...) for inputs x (T, N, ...); ValueError or TypeError where x does not fit."""
        _check.tensor("x", x)
        if x.dim() < 2 or x.shape[0] != self.tasks or x.shape[1] == 0:
            raise ValueError(f"x: expected (T, N, ...) with T = {self.tasks} and N > 0, got {_check.describe(x)}")
        _check.finite("x", x)
        self._task.check_inputs("x", x)
        return self._engine.forward(self._phi, x)
