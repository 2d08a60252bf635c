"""Prints README tables of results of ``metafast bench``: ``python benchmarks/table.py benchmarks/results/*.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plain(number: float) -> str:
    """Three digits, more in front of the point, and no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def cell(sides: dict[str, dict[str, Any]], name: str) -> str:
    """Median, ratio, the peak of memory where it was measured, and by how much a gradient is wrong that is."""
    side, words = sides.get(name, {}), []
    if median := side.get("median_seconds"):
        words.append(f"{plain(1e3 * median)} ms ({plain(median / sides['accumulate_grad']['median_seconds'])}x)")
    if "peak_bytes" in side:
        words.append(f"{plain(side['peak_bytes'] / 2**20)} MiB")
    if side.get("status", "").startswith("differs"):
        error = side["error_float64"]
        words.append("**not finite**" if error is None else f"**off by {plain(100 * error)} %**")
    return ", ".join(words) or "-"


def table(path: Path) -> str:
    """A Markdown table: a row a side, a column a workload, :func:`cell` in it; the file's
    numbers and no others."""
    document = json.loads(path.read_text())
    machine, workloads = document["machine"], document["workloads"]
    sides = list(dict.fromkeys(side["side"] for w in workloads for side in w["sides"]))
    lines = ["| | " + " | ".join(w["workload"]["title"] for w in workloads) + " |", "|---" * (len(workloads) + 1) + "|"]
    for name in sides:
        cells = [cell({side["side"]: side for side in w["sides"]}, name) for w in workloads]
        if set(cells) != {"-"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    where = f"{machine['cpu']}, {machine['torch_threads']} threads, {machine['isa']}"
    if document["settings"].get("device", "cpu").startswith("cuda"):
        where = machine["gpu"]
    lines += ["", f"{where}, torch {machine['torch']}."]
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
