"""A batch of few-shot episodes, and what a learner returns for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metafast import _check


def check_set(x_name: str, x: Tensor, y_name: str, y: Tensor, mask_name: str = "", mask: Tensor | None = None) -> None:
    """Check one (support or query) set: inputs (T, N, ...), labels (T, N) or targets (T, N, ...), mask (T, N).

    Of samples that the mask leaves out, inputs and labels may be anything.
    """
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
    if y.dtype == torch.int64 and y.dim() != 2:
        raise ValueError(f"{y_name}: expected int64 labels of shape (T, N), got {_check.describe(y)}")
    if mask is not None:
        _check_mask(mask_name, mask, x_name, x)
        x, y = x[mask], y[mask]
    if y.dtype == torch.int64 and int(y.min()) < 0:
        raise ValueError(f"{y_name}: expected labels from 0 up, got {int(y.min())}")
    _check.finite(x_name, x)
    _check.finite(y_name, y)


def _check_mask(name: str, mask: Tensor, x_name: str, x: Tensor) -> None:
    """Refuse a mask that does not fit x (T, N, ...), or leaves a task without a sample."""
    _check.tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {_check.describe(mask)}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name}: expected (T, N) = {tuple(x.shape[:2])} as in {x_name}, got {_check.describe(mask)}")
    if mask.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, that of {x_name}, got {_check.describe(mask)}")
    there = mask.any(1)
    if not bool(there.all()):
        raise ValueError(f"{name}: expected a sample in every task, task {int((~there).nonzero()[0])} has none")


@dataclass(frozen=True, eq=False)
class Episodes:
    """T few-shot tasks as four tensors; classification when the labels are int64, else regression.

    Tasks of different sizes, ragged ones, are padded to the largest, with masks that say what is theirs.

    Args:
        support_x: (T, Ns, ...) inputs that the inner loop adapts on, floating or int64.
        support_y: (T, Ns) int64 labels from 0 up, or (T, Ns, ...) floating targets.
        query_x: (T, Nq, ...) inputs that the adapted model is judged on.
        query_y: (T, Nq) int64 labels, or (T, Nq, ...) floating targets.
        support_mask: (T, Ns) bool, which support samples a task has; None: all. What it leaves out is padding, may be
            anything (NaN too) and is never looked at.
        query_mask: (T, Nq) bool, which queries a task has; None: all.

    Raises:
        TypeError: an argument is no tensor or has a dtype of another kind.
        ValueError: shapes or devices that do not fit, an empty set, a task without a sample, negative labels, NaN or
            infinity.

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
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    # Tensors' version counters at the last check, and what was seen then.
    _versions: tuple[int, ...] | None = field(default=None, init=False, repr=False)
    _classes: int | None = field(default=None, init=False, repr=False)
    _signature: Hashable = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check the contents; costs nothing while no tensor has changed since the last check."""
        if self._versions is not None and self._versions == self._now():
            return
        versions = self._now() if _counted(self._tensors() + self._masks()) else None
        check_set("support_x", self.support_x, "support_y", self.support_y, "support_mask", self.support_mask)
        check_set("query_x", self.query_x, "query_y", self.query_y, "query_mask", self.query_mask)
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
            sides = ((self.support_y, self.support_mask), (self.query_y, self.query_mask))
            classes = max(int((y if mask is None else y[mask]).max()) for y, mask in sides) + 1
        sx, sy, qx, qy = self._tensors()
        shapes = (sx.shape[1:], sy.shape[1:], qx.shape[1:], qy.shape[1:])
        # Frozen for its users; these only remember what was checked.
        object.__setattr__(self, "_classes", classes)
        object.__setattr__(self, "_signature", (*shapes, sx.dtype, sy.dtype, sx.device, classes, self.masked))
        object.__setattr__(self, "_versions", versions)

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support_x.shape[0]

    @property
    def signature(self) -> tuple[Hashable, bool]:
        """All that decides whether a model takes the episodes, but the number of tasks and the numbers themselves."""
        self.validate()
        return self._signature, self.support_x.requires_grad or self.query_x.requires_grad

    @property
    def classes(self) -> int | None:
        """Largest label + 1 over support and query; None for regression."""
        self.validate()
        return self._classes

    @property
    def masked(self) -> bool:
        """Whether there are masks, and so, perhaps, tasks of several sizes."""
        return self.support_mask is not None or self.query_mask is not None

    @classmethod
    def ragged(cls, tasks: Iterable[Sequence[Tensor]]) -> Episodes:
        """Tasks of different sizes as one batch: padded with zeros, with masks where there is padding.

        Args:
            tasks: for each task (support_x (Ns, ...), support_y (Ns,) or (Ns, ...), query_x (Nq, ...), query_y), Ns and
                Nq its own; also fit to be a DataLoader's ``collate_fn``.

        Raises:
            TypeError, ValueError: a task that is no such four tensors, of other samples, dtype or device than the
                first, or empty; named by its number.

        Example:
            >>> import torch
            >>> def side(n):
            ...     return torch.zeros(n, 3), torch.arange(n)
            >>> episodes = Episodes.ragged([(*side(2), *side(4)), (*side(3), *side(1))])
            >>> episodes.support_mask.tolist(), episodes.query_x.shape
            ([[True, True, False], [True, True, True]], torch.Size([2, 4, 3]))
        """
        given = [tuple(task) for task in tasks]
        if not given:
            raise ValueError("tasks: expected at least one task, got none")
        _check_ragged(given)
        padded = [pad_sequence(list(column), batch_first=True) for column in zip(*given)]
        masks = [_mask_of([len(task[side]) for task in given], given[0][0].device) for side in (0, 2)]
        return cls(*padded, *masks)

    def groups(self, by_ways: bool = False) -> list[tuple[list[int], Episodes]]:
        """The tasks of each size together, without padding and masks: (their numbers, their episodes).

        Args:
            by_ways: tell tasks of different ways, largest support label + 1, apart as well.
        """
        self.validate()
        index = range(self.tasks)
        if not (self.masked or by_ways):
            return [(list(index), self)]
        sides = ((self.support_x, self.support_mask), (self.query_x, self.query_mask))
        sizes = [[x.shape[1]] * self.tasks if mask is None else mask.sum(1).tolist() for x, mask in sides]
        if by_ways:
            sizes.append(self.ways.tolist())
        found: dict[tuple[int, ...], list[int]] = {}
        for task, key in zip(index, zip(*sizes)):
            found.setdefault(key, []).append(task)
        return [(tasks, self._dense(tasks)) for tasks in found.values()]

    @property
    def ways(self) -> Tensor:
        """(T,) largest support label of each task + 1."""
        y = self.support_y
        return (y if self.support_mask is None else y.where(self.support_mask, 0)).amax(1) + 1

    def _dense(self, tasks: list[int]) -> Episodes:
        """Some tasks of one size, without their padding."""

        def there(values: Tensor, mask: Tensor | None) -> Tensor:
            chosen = values[tasks]
            return chosen if mask is None else chosen[mask[tasks]].unflatten(0, (len(tasks), -1))

        s, q = self.support_mask, self.query_mask
        return Episodes(
            there(self.support_x, s), there(self.support_y, s), there(self.query_x, q), there(self.query_y, q)
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Episodes:
        """The same episodes elsewhere; ``dtype`` casts floating tensors and leaves labels alone."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return self._each(move)

    def pin_memory(self) -> Episodes:
        """The same episodes in page-locked memory, from which copies to a GPU run asynchronously."""
        return self._each(Tensor.pin_memory)

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
        return self._each(lambda t: t[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Episodes:
        masks = (None if mask is None else change(mask) for mask in (self.support_mask, self.query_mask))
        return Episodes(*map(change, self._tensors()), *masks)

    def _now(self) -> tuple[int, ...]:
        """Counters that any in-place change raises, where all tensors have such."""
        versions = self.support_x._version, self.support_y._version, self.query_x._version, self.query_y._version
        return versions + tuple(mask._version for mask in self._masks()) if self.masked else versions

    def _masks(self) -> tuple[Tensor, ...]:
        return tuple(mask for mask in (self.support_mask, self.query_mask) if mask is not None)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y


def _check_ragged(tasks: list[tuple[Tensor, ...]]) -> None:
    """Refuse tasks that do not go into one batch."""
    names = ("support_x", "support_y", "query_x", "query_y")
    for number, task in enumerate(tasks):
        if len(task) != len(names):
            raise ValueError(f"tasks: expected {', '.join(names)} of each, task {number} has {len(task)}")
        for name, value, first in zip(names, task, tasks[0]):
            label = f"{name} of task {number}"
            _check.tensor(label, value)
            if value.dim() == 0 or 0 in value.shape:
                raise ValueError(f"{label}: expected (N, ...) with a sample or more, got {_check.describe(value)}")
            if (value.shape[1:], value.dtype, value.device) != (first.shape[1:], first.dtype, first.device):
                raise ValueError(
                    f"{label}: expected samples as of task 0, {_check.describe(first)}, got {_check.describe(value)}"
                )
        for x, y in ((0, 1), (2, 3)):
            if len(task[x]) != len(task[y]):
                raise ValueError(
                    f"{names[y]} of task {number}: expected {len(task[x])} as in {names[x]}, got {len(task[y])}"
                )


def _mask_of(sizes: list[int], device: torch.device) -> Tensor | None:
    """(T, N) True for a task's first so many; None where all have as many."""
    if len(set(sizes)) == 1:
        return None
    return torch.arange(max(sizes), device=device) < torch.tensor(sizes, device=device).unsqueeze(1)


def _counted(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all have counters that any in-place change raises; inference tensors have none."""
    return all(isinstance(t, Tensor) and not t.is_inference() for t in tensors)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a learner returns for a batch of episodes.

    Attributes:
        loss: scalar, the meta-objective sum_t w_t losses_t (the mean over tasks where no weights were given).
        losses: (T,) query loss of each task after adaptation.
        logits: (T, Nq, C) what the adapted models said of the queries; 0 for queries that a mask leaves out.
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


def check_dense(episodes: Episodes, who: str) -> None:
    """Refuse masks, for what takes whole batches alone."""
    if episodes.masked:
        raise ValueError(f"episodes: {who} takes tasks of one size; expected no masks, got some: call it by groups()")


def outcome(losses: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Outcome:
    """Put losses (T,), logits (T, Nq, ...) and query targets together as an :class:`Outcome`."""
    accuracy = None
    if targets.dtype == torch.int64:
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == targets).to(losses.dtype).mean(1)
    loss = losses.mean() if weights is None else (weights * losses).sum()
    return Outcome(loss, losses, logits, accuracy)
