"""The metrics file of a run: a JSON object a line, {"iteration", "loss", "accuracy", "seconds"}."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

NAME = "metrics.jsonl"
Line = dict[str, float]


def append(path: Path, line: Line) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def read(path: Path, until: int | None = None) -> list[Line]:
    """The lines, those up to an iteration where one is given; what a crash left of a last line is left out.

    Raises:
        ValueError: another line is not of this form; the message names the file.
    """
    if not path.is_file():
        return []
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r}: expected lines of JSON, got no text: {error}") from error
    # A line without its end is one that a crash cut off.
    whole = text.split("\n")[:-1]
    for number, row in enumerate(whole, 1):
        try:
            line = json.loads(row)
            if until is None or line["iteration"] <= until:
                lines.append({name: float(value) for name, value in line.items()} | {"iteration": line["iteration"]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{str(path)!r}, line {number}: expected a JSON object with iteration and loss") from error
    return lines


def write(path: Path, lines: list[Line]) -> None:
    """Replace the file by these lines."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
