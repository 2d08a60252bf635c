"""One task by hand: clone, adapt, judge - the loop that learn2learn made familiar."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast import _check
from metafast.engine.batches import cuts
from metafast.engine.task_model import TaskModel
from metafast.rules import State, UpdateRule


class TaskLearner:
    """A differentiable copy of a learner's model for one task; made by ``learner.clone()``.

    Example:
        >>> import torch
        >>> import metafast as mf
        >>> maml = mf.MAML(torch.nn.Linear(2, 1), lr=0.1, steps=1, loss="mse")
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> learner = maml.clone()
        >>> learner.adapt(((learner(x) - y) ** 2).mean())
        >>> ((learner(x) - y) ** 2).mean().backward()
        >>> maml.model.weight.grad.shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        task: TaskModel,
        rule: UpdateRule,
        phi: Tensor,
        first_order: bool,
        truncate: int | None = None,
        taken: tuple[int, State] | None = None,
    ) -> None:
        self._task = task
        self._rule = rule
        self._phi = phi
        self._first_order = first_order
        self._truncate = truncate
        self._step, self._state = (0, rule.init(phi.unsqueeze(0))) if taken is None else taken

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (N, ...) of the model as adapted so far, for x (N, ...)."""
        with self._task.policy():
            return self._task.forward(self._task.layout.split(self._phi), self._task.constants(), x)

    def adapt(self, loss: Tensor) -> None:
        """One step of the update rule along the gradient of ``loss``, a scalar made from this learner's outputs.

        Raises:
            TypeError, ValueError: no scalar tensor, NaN or infinite, or one that does not depend on this learner.
        """
        _check.tensor("loss", loss)
        if loss.dim() != 0:
            raise ValueError(f"loss: expected a scalar, got {_check.describe(loss)}")
        _check.finite("loss", loss)
        if not self._phi.requires_grad:
            raise ValueError("loss: this learner's parameters do not require gradients, so it cannot adapt")
        grads = None
        if loss.requires_grad:
            (grads,) = torch.autograd.grad(
                loss, self._phi, create_graph=not self._first_order, retain_graph=True, allow_unused=True
            )
        if grads is None:
            raise ValueError("loss: expected a loss of this learner's outputs; it does not depend on its parameters")
        if cuts(self._truncate, self._step):
            self._phi, grads = self._phi.detach().requires_grad_(), grads.detach()
            self._state = tuple(s.detach() for s in self._state)
        phi, self._state = self._rule.step(self._phi.unsqueeze(0), grads.unsqueeze(0), self._state)
        self._phi = phi.squeeze(0)
        self._step += 1

    def clone(self) -> TaskLearner:
        """A second learner that goes on from here, on the same graph."""
        taken = self._step, self._state
        return TaskLearner(self._task, self._rule, self._phi, self._first_order, self._truncate, taken)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters as adapted so far, by name, connected to the meta-parameters in autograd."""
        return self._task.layout.unflatten(self._phi)
