"""Ctrl-C as a request: the step at hand is finished, so that what is saved is a whole state."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """Within the block, SIGINT and SIGTERM only set :attr:`signal`; a second one raises KeyboardInterrupt at once.

    Example:
        >>> with Interrupt() as interrupt:
        ...     interrupt.signal is None
        True
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
