"""Prints the README table of a result of ``metafast bench``: ``python benchmarks/table.py results/reference.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """A Markdown table, a row a workload; every number is the file's."""
    document = json.loads(path.read_text())
    machine = document["machine"]
    lines = ["| workload | reference loop | `out.loss.backward()` | `accumulate_grad` |", "|---|---|---|---|"]
    for result in document["workloads"]:
        ms = {side["side"]: 1e3 * side["median_seconds"] for side in result["sides"] if side.get("median_seconds")}
        plain = ms["reference loop"]
        doors = (f"{ms[s]:.3g} ms ({plain / ms[s]:.3g}x)" for s in ("metafast", "accumulate_grad"))
        lines.append(f"| {result['workload']['title']} | {plain:.3g} ms | " + " | ".join(doors) + " |")
    lines += ["", f"{machine['cpu']}, {machine['torch_threads']} threads, {machine['isa']}, torch {machine['torch']}."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
