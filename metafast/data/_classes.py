"""The table behind every few-shot classification dataset: all items of all classes in one tensor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from metafast import _check
from metafast.episodes import Episodes

Table = TypeVar("Table", bound="ClassTable")


def check_generator(generator: torch.Generator | None, device: torch.device | None = None) -> None:
    """Refuse what is no generator, and one that lives on another device than the data."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {_check.describe(generator)}")
    if device is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device}, where the data is, got one on {generator.device}")


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what is no floating dtype."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype}")


def distinct(sizes: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``count`` distinct integers out of 0..size-1 for every size: a uniform sample in uniform order.

    Args:
        sizes: (...) int64, each at least ``count``.
        count: how many to draw for each size.
        generator: source of randomness, on the device of ``sizes``.

    Returns:
        (..., count) int64.

    Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", CACM 1987) on all sizes at once: the i-th
    draw is uniform in 0..last, last = size - count + i, and where that number is taken already the answer is
    ``last``, which cannot be. The work depends on ``count`` and not on the sizes. Floyd's sample is uniform
    as a set only, so it is shuffled afterwards.
    """
    shape, device = (*sizes.shape, count), sizes.device
    last = sizes.unsqueeze(-1) - count + torch.arange(count, device=device)
    # float64: its 53 bits make floor(u * n) uniform to 1e-9 for any n that fits in memory.
    drawn = (torch.rand(shape, generator=generator, dtype=torch.float64, device=device) * (last + 1)).long()
    for i in range(1, count):
        taken = (drawn[..., :i] == drawn[..., i, None]).any(-1)
        drawn[..., i] = torch.where(taken, last[..., i], drawn[..., i])
    order = torch.rand(shape, generator=generator, dtype=torch.float64, device=device).argsort(-1)
    return drawn.gather(-1, order)


def _largest(name: str, size: int | tuple[int, int]) -> int:
    """Of a number, or of a range (low, high)."""
    if not isinstance(size, tuple):
        return _check.integer(name, size, minimum=1)
    if len(size) != 2:
        raise ValueError(f"{name}: expected an int or (low, high), got {size}")
    low, high = (_check.integer(name, end, minimum=1) for end in size)
    if low > high:
        raise ValueError(f"{name}: expected (low, high) with low at most high, got {size}")
    return high


def _draw(size: int | tuple[int, int], tasks: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(T,) a number a task."""
    low, high = size if isinstance(size, tuple) else (size, size)
    return torch.randint(low, high + 1, (tasks,), generator=generator, device=device)


class ClassTable:
    """Items of many classes, from which episodes are sampled by one gather.

    Args:
        items: (M, ...) all items, sorted by class: uint8 (sampled as floats in [0, 1]), floating, or int64
            (tokens, sampled as they are).
        counts: the number of items of each class, in the order of ``items``; they need not be equal.
        names: a name for each class; their indices by default.

    Raises:
        TypeError: items of another dtype or kind.
        ValueError: counts that do not add up to M or are not positive, another number of names, NaN or
            infinity.

    Example:
        >>> import torch
        >>> table = ClassTable(torch.rand(12, 1, 28, 28), counts=[5, 4, 3])
        >>> table.classes
        3
        >>> generator = torch.Generator().manual_seed(0)
        >>> episodes = table.sample(tasks=2, ways=3, shots=1, queries=2, generator=generator)
        >>> episodes.query_x.shape, episodes.query_y[0].tolist()
        (torch.Size([2, 6, 1, 28, 28]), [0, 0, 1, 1, 2, 2])
    """

    items: Tensor
    counts: Tensor
    names: tuple[str, ...]

    def __init__(self, items: Tensor, counts: Sequence[int], names: Sequence[str] | None = None) -> None:
        _check.tensor("items", items)
        if not (items.is_floating_point() or items.dtype in (torch.uint8, torch.int64)):
            raise TypeError(f"items: expected a uint8, floating or int64 tensor, got {_check.describe(items)}")
        if not len(counts):
            raise ValueError("counts: expected at least one class, got none")
        for count in counts:
            _check.integer("counts", count, minimum=1)
        if items.dim() < 1 or items.shape[0] != sum(counts):
            raise ValueError(f"items: expected {sum(counts)} items, the sum of counts, got {_check.describe(items)}")
        _check.finite("items", items)
        if names is not None and len(names) != len(counts):
            raise ValueError(f"names: expected {len(counts)} names, one a class, got {len(names)}")
        self.items = items
        self.counts = torch.tensor(counts, device=items.device)
        self.names = tuple(map(str, range(len(counts)))) if names is None else tuple(names)
        self._offsets = self.counts.cumsum(0) - self.counts
        self._smallest = min(range(len(counts)), key=lambda i: counts[i])

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    def of(self, index: int) -> Tensor:
        """(count, ...) all items of one class, as stored."""
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"index: expected an int, the class, got {_check.describe(index)}")
        if not 0 <= index < self.classes:
            raise IndexError(f"index: expected a class in 0..{self.classes - 1}, got {index}")
        start = int(self._offsets[index])
        return self.items[start : start + int(self.counts[index])]

    def to(self: Table, device: torch.device | str) -> Table:
        """The same table with its items on another device, where episodes are then sampled."""
        moved = copy.copy(self)
        for name in ("items", "counts", "_offsets"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def sample(
        self,
        tasks: int = 32,
        ways: int | tuple[int, int] = 5,
        shots: int | tuple[int, int] = 1,
        queries: int = 15,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Episodes:
        """Sample a batch of episodes: distinct classes in a task, distinct items in a class.

        Args:
            tasks: T, how many episodes.
            ways: classes an episode, drawn uniformly and given the labels 0..ways-1 in random order. (low, high): for
                each episode its own number, uniform from low to high, both possible.
            shots: support items a class, likewise: an episode's classes have the same number.
            queries: query items a class, none of them in the support.
            generator: source of randomness; the same seed gives the same bits. Default: torch's own.
            dtype: floating dtype of the inputs.

        Returns:
            Episodes with support_x (T, ways * shots, ...), query_x (T, ways * queries, ...) and int64 labels,
            all sorted by label; with masks where ways or shots are ranges, as large as the largest possible.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a count below one, a range that is none, more ways than classes, shots + queries beyond the
                smallest class, a generator on another device than the items.
        """
        for name, value in (("tasks", tasks), ("queries", queries)):
            _check.integer(name, value, minimum=1)
        sizes, (ways, shots) = (ways, shots), (_largest("ways", ways), _largest("shots", shots))
        check_generator(generator, self.items.device)
        check_dtype(dtype)
        if ways > self.classes:
            raise ValueError(f"ways: expected at most {self.classes}, the number of classes, got {ways}")
        fewest = int(self.counts[self._smallest])
        if shots + queries > fewest:
            raise ValueError(
                f"shots + queries: expected at most {fewest}, the items of class "
                f"{self.names[self._smallest]!r}, got {shots} + {queries}"
            )
        device = self.items.device
        chosen = distinct(torch.full((tasks,), self.classes, device=device), ways, generator)  # (T, ways)
        within = distinct(self.counts[chosen], shots + queries, generator)  # (T, ways, shots + queries)
        index = self._offsets[chosen].unsqueeze(-1) + within
        labels = torch.arange(ways, device=device)
        masks: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(isinstance(size, tuple) for size in sizes):
            own_ways, own_shots = (_draw(size, tasks, device, generator) for size in sizes)
            there = labels < own_ways.unsqueeze(1)
            given = there.unsqueeze(2) & (torch.arange(shots, device=device) < own_shots.unsqueeze(1)).unsqueeze(1)
            masks = given.flatten(1), there.repeat_interleave(queries, dim=1)
        return Episodes(
            self._gather(index[..., :shots], dtype),
            labels.repeat_interleave(shots).repeat(tasks, 1),
            self._gather(index[..., shots:], dtype),
            labels.repeat_interleave(queries).repeat(tasks, 1),
            *masks,
        )

    def _gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The items of ``index`` (T, ways, n) as (T, ways * n, ...)."""
        tasks = index.shape[0]
        x = self.items.index_select(0, index.reshape(-1)).reshape(tasks, -1, *self.items.shape[1:])
        if x.dtype == torch.uint8:
            return x.to(dtype).div_(255)
        return x.to(dtype) if x.is_floating_point() else x

    def __repr__(self) -> str:
        item = "x".join(map(str, self.items.shape[1:])) or "scalar"
        return f"{type(self).__name__}({self.classes} classes, {self.items.shape[0]} items of {item})"
