"""What the command line prints: rich on a terminal, plain lines elsewhere, and an error as one red line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

BAD_INPUT = 2
INTERRUPTED = 130
SECONDS_A_REFRESH = 0.1
# Where there is no terminal, a line this often is enough to see that it runs.
SECONDS_A_LINE = 5.0


def say(text: str = "", style: str = "") -> None:
    """Print a line as it is: nothing in it is markup, and only a terminal's own width wraps it."""
    Console().print(Text(text, style=style), soft_wrap=True)


def say_error(text: str) -> None:
    """Print an error as one red line on the standard error."""
    Console(stderr=True).print(Text("metafast: " + " ".join(text.split()), style="bold red"), soft_wrap=True)


@contextmanager
def bad_input() -> Iterator[None]:
    """Around what reads a user's options and files: an error there is one red line and exit code 2.

    Not around the work itself, where an exception is a defect that deserves its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        say_error(str(error))
        raise typer.Exit(BAD_INPUT) from error


class ProgressLine:
    """A bar on a terminal; elsewhere a plain line now and then.

    Args:
        name: what is being done.
        total: how many there are.
        done: how many are behind us already.
        unit: what one is called in the rate: "tasks" gives "tasks/s".
        lines: whether to print lines where there is no terminal.
        silent: whether to print nothing at all.

    Example:
        >>> with ProgressLine("counting", total=2, lines=False) as progress:
        ...     progress.advance(2, lambda: "loss 0.1")
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        unit: str = "steps",
        lines: bool = True,
        silent: bool = False,
    ) -> None:
        self._name, self._total, self._start, self._done, self._unit = name, total, done, done, unit
        console = Console()
        self._terminal, self._lines = console.is_terminal and not silent, lines and not silent
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, status="")
        self._began = self._shown = time.perf_counter()

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int, status: Callable[[], str]) -> None:
        """``count`` more are done; ``status`` says how things stand and is asked only when it will be shown."""
        self._done += count
        now = time.perf_counter()
        if self._done < self._total and now - self._shown < (SECONDS_A_REFRESH if self._terminal else SECONDS_A_LINE):
            return
        self._shown = now
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        text = f"{status()}  {rate:.3g} {self._unit}/s".strip()
        if self._terminal:
            self._bar.update(self._task, completed=self._done, status=text)
        elif self._lines:
            say(f"{self._name} {self._done}/{self._total}  {text}")
