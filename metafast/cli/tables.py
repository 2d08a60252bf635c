"""Tables on the command line, and a line that says what is going on until one comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

# Wide enough for every table here: a log file has no edge to wrap at.
WIDTH_ELSEWHERE = 200


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], bad: Sequence[str] = ()) -> None:
    """Print rows under column heads, numbers to the right; a row whose last cell is one of ``bad`` is red."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    cells = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = all(row[index][:1].isdigit() or not row[index] for row in cells)
        table.add_column(Text(column), justify="right" if numeric else "left")
    for row in cells:
        # Text, since a cell like "[0]" would be read as markup.
        table.add_row(*(Text(cell) for cell in row), style="bold red" if row[-1] in bad else "")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_ELSEWHERE)
    console.print(Text(title, style="bold"), table, sep="\n")


class Notice:
    """A line on a terminal that the next one replaces; nothing elsewhere. It is still: nothing runs beside the work."""

    def __init__(self) -> None:
        self._console = Console()

    def __call__(self, text: str) -> None:
        """Show ``text`` in place of what was there; an empty one clears the line."""
        if self._console.is_terminal:
            self._console.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN))
            self._console.print(Text(text, style="dim"), end="", no_wrap=True, overflow="ellipsis")
