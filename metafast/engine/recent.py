"""What is remembered of the latest calls alone: episodes of ever new sizes must not add up for ever."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def remember(kept: OrderedDict[Key, Value], key: Key, value: Value, most: int) -> Value:
    """Put an entry in; beyond so many, the one that was put in first goes. Safe from several threads.

    Example:
        >>> squares = OrderedDict()
        >>> for n in range(5):
        ...     _ = remember(squares, n, n * n, most=2)
        >>> list(squares.items())
        [(3, 9), (4, 16)]
    """
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)
    return value
