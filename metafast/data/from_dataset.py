"""Episodes from any dataset of (x, label) pairs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafast import _check
from metafast.data._classes import ClassTable


def from_dataset(dataset: Any, *, min_items: int = 1) -> ClassTable:
    """Read a dataset of (x, label) pairs into a table that episodes are sampled from.

    Args:
        dataset: map-style (``len`` and indices, as ``torch.utils.data.Dataset``) or any finite iterable of
            pairs. x is a tensor, a numpy array or a Pillow image (grey or RGB, becomes (1 or 3, H, W)), of
            one shape and dtype throughout: uint8 (sampled as floats in [0, 1]), floating or int64. A label is
            an integer or anything else that is hashable.
        min_items: leave out classes that have fewer items than this. ``sample`` can ask for no more items a
            class than the smallest class has.

    Returns:
        A :class:`ClassTable`; classes and items are in the order of their first appearance.

    Raises:
        TypeError: no dataset, an entry that is no pair, an x or a label of the wrong kind.
        ValueError: an empty dataset, x of different shapes or dtypes, NaN or infinity, no class with
            ``min_items`` items.

    Example:
        >>> import torch
        >>> data = [(torch.full((2,), float(i)), "even" if i % 2 == 0 else "odd") for i in range(10)]
        >>> table = from_dataset(data)
        >>> table.names, table.sample(tasks=3, ways=2, shots=1, queries=4).query_x.shape
        (('even', 'odd'), torch.Size([3, 8, 2]))
    """
    _check.integer("min_items", min_items, minimum=1)
    members: dict[Hashable, list[Tensor]] = {}
    first: Tensor | None = None
    for index, entry in enumerate(_entries(dataset)):
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise TypeError(f"dataset[{index}]: expected a pair (x, label), got {_check.describe(entry)}")
        x, label = _item(entry[0], index), _label(entry[1], index)
        first = x if first is None else first
        if x.shape != first.shape or x.dtype != first.dtype:
            raise ValueError(
                f"dataset[{index}]: expected x of the shape and dtype of the first, {tuple(first.shape)} "
                f"{first.dtype}, got {_check.describe(x)}"
            )
        _check.finite(f"dataset[{index}]", x)
        members.setdefault(label, []).append(x)
    if not members:
        raise ValueError("dataset: expected at least one pair (x, label), got none")
    kept = {label: xs for label, xs in members.items() if len(xs) >= min_items}
    if not kept:
        largest = max(map(len, members.values()))
        raise ValueError(f"min_items: expected at most {largest}, the size of the largest class, got {min_items}")
    items = torch.stack([x for xs in kept.values() for x in xs])
    return ClassTable(items, [len(xs) for xs in kept.values()], list(map(str, kept)))


def _entries(dataset: Any) -> Iterator[Any]:
    """The entries of a map-style or iterable dataset."""
    # A torch map-style dataset has no __iter__ and need not raise IndexError at its end, so len decides.
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, (dict, str)):
        return (dataset[index] for index in range(len(dataset)))
    if isinstance(dataset, Iterable) and not isinstance(dataset, (dict, str, bytes, Tensor)):
        return iter(dataset)
    raise TypeError(f"dataset: expected pairs (x, label), map-style or iterable, got {_check.describe(dataset)}")


def _item(x: Any, index: int) -> Tensor:
    """One x as a tensor."""
    # Copies throughout: an iterable may fill one buffer again and again.
    if isinstance(x, Tensor):
        item = x.detach().clone()
    elif isinstance(x, np.ndarray):
        try:
            item = torch.from_numpy(np.array(x, order="C"))
        except TypeError as error:
            raise TypeError(f"dataset[{index}]: x is a numpy array of {x.dtype}, which torch lacks") from error
    elif hasattr(x, "mode") and hasattr(x, "getbands"):  # a Pillow image, without importing Pillow
        if x.mode not in ("L", "RGB"):
            raise ValueError(f"dataset[{index}]: expected an image of mode L or RGB, got {x.mode}; convert it first")
        item = torch.from_numpy(np.array(x))
        item = item.unsqueeze(0) if x.mode == "L" else item.movedim(-1, 0)
    else:
        raise TypeError(
            f"dataset[{index}]: expected x as a tensor, numpy array or Pillow image, got {_check.describe(x)}"
        )
    if not (item.is_floating_point() or item.dtype in (torch.uint8, torch.int64)):
        raise TypeError(f"dataset[{index}]: expected x of uint8, floating or int64, got {_check.describe(item)}")
    return item


def _label(label: Any, index: int) -> Hashable:
    """One label as a plain hashable value."""
    # Tensors hash by identity, so that each would be a class of its own.
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        if label.ndim:
            raise TypeError(f"dataset[{index}]: expected a label, one value, got {_check.describe(label)}")
        label = label.item()
    if not isinstance(label, Hashable):
        raise TypeError(f"dataset[{index}]: expected a hashable label, got {_check.describe(label)}")
    if isinstance(label, float) and math.isnan(label):
        raise ValueError(f"dataset[{index}]: expected a label, got NaN")
    return label
