"""Prints README tables of results of ``metafast bench``: ``python benchmarks/table.py benchmarks/results/*.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def plain(number: float) -> str:
    """Three digits, more in front of the point, and no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def table(path: Path) -> str:
    """A Markdown table: a row a side, a column a workload, medians and how many times accumulate_grad's; the file's
    numbers and no others."""
    document = json.loads(path.read_text())
    machine, workloads = document["machine"], document["workloads"]
    sides = list(dict.fromkeys(side["side"] for w in workloads for side in w["sides"]))
    lines = ["| | " + " | ".join(w["workload"]["title"] for w in workloads) + " |", "|---" * (len(workloads) + 1) + "|"]
    for name in sides:
        cells = []
        for w in workloads:
            ms = {s["side"]: 1e3 * s["median_seconds"] for s in w["sides"] if s.get("median_seconds")}
            cells.append(f"{plain(ms[name])} ms ({plain(ms[name] / ms['accumulate_grad'])}x)" if name in ms else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    where = f"{machine['cpu']}, {machine['torch_threads']} threads, {machine['isa']}"
    if document["settings"].get("device", "cpu").startswith("cuda"):
        where = machine["gpu"]
    lines += ["", f"{where}, torch {machine['torch']}."]
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
