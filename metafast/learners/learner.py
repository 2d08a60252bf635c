"""What all learners have: episodes in, an outcome or gradients out, whatever the sizes of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.engine.autocast import backward
from metafast.engine.task_model import TaskModel
from metafast.engine.untraced import untraced
from metafast.episodes import Episodes, Outcome
from metafast.learners.captured import Captured
from metafast.learners.ragged import by_groups


class Learner(nn.Module, ABC):
    """Takes episodes by two doors, autograd's and :meth:`accumulate_grad`; masked ones a size at a time."""

    _task: TaskModel
    # Whether tasks of different ways are groups of their own.
    _by_ways = False

    def forward(self, episodes: Episodes, weights: Tensor | None = None) -> Outcome:
        """Adapt to every task's support set and judge on its query set; ``out.loss.backward()`` is exact.

        Args:
            episodes: T tasks. With masks, those of each size are one call of the engine.
            weights: (T,) factors w_t of the tasks' losses; 1/T each when None.

        Returns:
            :class:`Outcome` with loss (scalar), losses (T,), logits (T, Nq, ...) and accuracy (T,).

        Raises:
            TypeError, ValueError: episodes or weights that do not fit the model, before any work.
        """
        return self._again(episodes, weights, False) or self._forward(episodes, weights)

    def accumulate_grad(self, episodes: Episodes, weights: Tensor | None = None) -> Outcome:
        """Add the meta-gradient to ``.grad`` and return the detached outcome; the second door.

        The same numbers as ``out = learner(episodes); out.loss.backward()``; arguments and errors as there, and
        RuntimeError in ``torch.inference_mode``, which makes no gradients. Under ``torch.autocast`` the backward pass
        runs outside of it.
        """
        return self._again(episodes, weights, True) or self._accumulate_grad(episodes, weights)

    def _again(self, episodes: Episodes, weights: Tensor | None, accumulate: bool) -> Outcome | None:
        """The outcome where this call is like one before; None, before any work, where it may not be."""
        # First of all: torch.compile would compile anew for every other `again`.
        if torch.compiler.is_compiling() or weights is not None:
            return None
        again = self._task.native.again
        return None if again is None else again(self, episodes, accumulate)

    @untraced
    def _forward(self, episodes: Episodes, weights: Tensor | None) -> Outcome:
        if self._masked(episodes):
            return by_groups(self, episodes, weights)
        return self._dense(episodes, weights)

    @untraced
    def _accumulate_grad(self, episodes: Episodes, weights: Tensor | None) -> Outcome:
        _check.gradients_are_made()
        if self._masked(episodes):
            return by_groups(self, episodes, weights, accumulate=True)
        added = self._accumulated(episodes, weights)
        if added is not None:
            return added
        with torch.enable_grad():
            out: Outcome = self(episodes, weights)
        if out.loss.requires_grad:
            backward(out.loss)
        return out.detach()

    def capture(self, episodes: Episodes, weights: Tensor | None = None) -> Captured:
        """``accumulate_grad`` for episodes of this size as a CUDA graph: ``captured(episodes)`` replays it.

        See :class:`~metafast.learners.captured.Captured` for arguments, errors and where gradients go.
        """
        return Captured(self, episodes, weights)

    @abstractmethod
    def _dense(self, episodes: Episodes, weights: Tensor | None) -> Outcome:
        """The outcome of episodes without masks; refuses what does not fit."""

    @abstractmethod
    def _accumulated(self, episodes: Episodes, weights: Tensor | None) -> Outcome | None:
        """The same by one native call that adds to ``.grad``; None where it is not to be had, before any work."""

    @abstractmethod
    def _check(self, episodes: Episodes, weights: Tensor | None) -> object:
        """Refuse episodes or weights that do not fit."""

    def _check_classes(self, episodes: Episodes) -> None:
        """Refuse masked episodes in which a task lacks classes that the learner needs."""

    def _masked(self, episodes: Episodes) -> bool:
        if not (isinstance(episodes, Episodes) and episodes.masked):
            return False
        self._check_classes(episodes)
        return True
