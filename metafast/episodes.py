"""A batch of few-shot episodes, and what a learner returns for it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metafast import _check


def check_set(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Check one (support or query) set: inputs (T, N, ...) and labels (T, N) or targets (T, N, ...)."""
    for name, value in ((x_name, x), (y_name, y)):
        _check.tensor(name, value)
        if value.dim() < 2:
            raise ValueError(f"{name}: expected (T, N, ...), tasks by samples, got {_check.describe(value)}")
        if 0 in value.shape:
            raise ValueError(f"{name}: expected at least one task and one sample, got {_check.describe(value)}")
    if not (x.is_floating_point() or x.dtype == torch.int64):
        raise TypeError(f"{x_name}: expected a floating or int64 tensor, got {_check.describe(x)}")
    if not (y.is_floating_point() or y.dtype == torch.int64):
        raise TypeError(f"{y_name}: expected int64 labels or floating targets, got {_check.describe(y)}")
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(f"{y_name}: expected (T, N) = {tuple(x.shape[:2])} as in {x_name}, got {_check.describe(y)}")
    if x.device != y.device:
        raise ValueError(f"{y_name}: expected device {x.device}, that of {x_name}, got {_check.describe(y)}")
    if y.dtype == torch.int64:
        if y.dim() != 2:
            raise ValueError(f"{y_name}: expected int64 labels of shape (T, N), got {_check.describe(y)}")
        if int(y.min()) < 0:
            raise ValueError(f"{y_name}: expected labels from 0 up, got {int(y.min())}")
    _check.finite(x_name, x)
    _check.finite(y_name, y)


@dataclass(frozen=True, eq=False)
class Episodes:
    """T few-shot tasks as four tensors; classification when the labels are int64, else regression.

    Args:
        support_x: (T, Ns, ...) inputs that the inner loop adapts on, floating or int64.
        support_y: (T, Ns) int64 labels from 0 up, or (T, Ns, ...) floating targets.
        query_x: (T, Nq, ...) inputs that the adapted model is judged on.
        query_y: (T, Nq) int64 labels, or (T, Nq, ...) floating targets.

    Raises:
        TypeError: an argument is no tensor or has a dtype of another kind.
        ValueError: shapes or devices that do not fit, an empty set, negative labels, NaN or infinity.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(4, 10, 1), torch.zeros(4, 10, 1)
        >>> episodes = Episodes(x, y, x, y)
        >>> episodes.tasks, episodes[:2].tasks
        (4, 2)

    Contents are checked when the object is made and again, before use, after an in-place change.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    # Tensors' version counters at the last check, and what was seen then.
    _versions: tuple[int, ...] | None = field(default=None, init=False, repr=False)
    _classes: int | None = field(default=None, init=False, repr=False)
    _signature: Hashable = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check the contents; costs nothing while no tensor has changed since the last check."""
        versions = _version_counters(self._tensors())
        if versions is not None and versions == self._versions:
            return
        check_set("support_x", self.support_x, "support_y", self.support_y)
        check_set("query_x", self.query_x, "query_y", self.query_y)
        for support, query in (("support_x", "query_x"), ("support_y", "query_y")):
            s, q = getattr(self, support), getattr(self, query)
            if s.shape[0] != q.shape[0]:
                raise ValueError(f"{query}: expected {s.shape[0]} tasks as in {support}, got {_check.describe(q)}")
            if s.shape[2:] != q.shape[2:]:
                raise ValueError(
                    f"{query}: expected samples of shape {tuple(s.shape[2:])} as in {support}, got {_check.describe(q)}"
                )
            if s.dtype != q.dtype:
                raise TypeError(f"{query}: expected dtype {s.dtype} as in {support}, got {_check.describe(q)}")
            if s.device != q.device:
                raise ValueError(f"{query}: expected device {s.device} as in {support}, got {_check.describe(q)}")
        classes = None
        if self.support_y.dtype == torch.int64:
            classes = int(max(self.support_y.max(), self.query_y.max())) + 1
        sx, sy, qx, qy = self._tensors()
        shapes = (sx.shape[1:], sy.shape[1:], qx.shape[1:], qy.shape[1:])
        # Frozen for its users; these only remember what was checked.
        object.__setattr__(self, "_classes", classes)
        object.__setattr__(self, "_signature", (*shapes, sx.dtype, sy.dtype, sx.device, classes))
        object.__setattr__(self, "_versions", versions)

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support_x.shape[0]

    @property
    def signature(self) -> Hashable:
        """All that decides whether a model takes the episodes, but the number of tasks and the numbers themselves."""
        self.validate()
        return self._signature, self.support_x.requires_grad or self.query_x.requires_grad

    @property
    def classes(self) -> int | None:
        """Largest label + 1 over support and query; None for regression."""
        self.validate()
        return self._classes

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Episodes:
        """The same episodes elsewhere; ``dtype`` casts floating tensors and leaves labels alone."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return Episodes(*map(move, self._tensors()))

    def pin_memory(self) -> Episodes:
        """The same episodes in page-locked memory, from which copies to a GPU run asynchronously."""
        return Episodes(*(t.pin_memory() for t in self._tensors()))

    def __len__(self) -> int:
        return self.tasks

    def __getitem__(self, index: slice | int) -> Episodes:
        """The tasks of a slice; an int gives one task, kept as a batch of one."""
        if isinstance(index, int) and not isinstance(index, bool):
            if not -self.tasks <= index < self.tasks:
                raise IndexError(f"index: expected one of {self.tasks} tasks, got {index}")
            start = index % self.tasks
            index = slice(start, start + 1)
        if not isinstance(index, slice):
            raise TypeError(f"index: expected an int or a slice of tasks, got {_check.describe(index)}")
        return Episodes(*(t[index] for t in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y


def _version_counters(tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """Counters that any in-place change raises; None where there are none (inference tensors)."""
    if not all(isinstance(t, Tensor) for t in tensors) or any(t.is_inference() for t in tensors):
        return None
    return tuple(t._version for t in tensors)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a learner returns for a batch of episodes.

    Attributes:
        loss: scalar, the meta-objective sum_t w_t losses_t (the mean over tasks where no weights were given).
        losses: (T,) query loss of each task after adaptation.
        logits: (T, Nq, C) what the adapted models said of the queries.
        accuracy: (T,) share of queries classified rightly, in 0..1; None for regression.
    """

    loss: Tensor
    losses: Tensor
    logits: Tensor
    accuracy: Tensor | None

    def detach(self) -> Outcome:
        """The same numbers without the autograd graph."""
        return Outcome(self.loss.detach(), self.losses.detach(), self.logits.detach(), self.accuracy)


# What wraps modules has to find the tensors: without it DistributedDataParallel's static_graph adds up no gradients.
torch.export.register_dataclass(Outcome, serialized_type_name="metafast.Outcome")


def check_weights(weights: Tensor | None, episodes: Episodes, dtype: torch.dtype) -> None:
    """Refuse task weights that do not fit the episodes."""
    if weights is None:
        return
    _check.tensor("weights", weights)
    _check.like("weights", weights, dtype=dtype, device=episodes.support_x.device, owner="the model")
    if not weights.is_floating_point():
        raise TypeError(f"weights: expected a floating tensor, got {_check.describe(weights)}")
    if weights.shape != (episodes.tasks,):
        raise ValueError(f"weights: expected shape ({episodes.tasks},), a task each, got {_check.describe(weights)}")
    _check.finite("weights", weights)


def outcome(losses: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Outcome:
    """Put losses (T,), logits (T, Nq, ...) and query targets together as an :class:`Outcome`."""
    accuracy = None
    if targets.dtype == torch.int64:
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == targets).to(losses.dtype).mean(1)
    loss = losses.mean() if weights is None else (weights * losses).sum()
    return Outcome(loss, losses, logits, accuracy)
