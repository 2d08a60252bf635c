"""What a run of the benchmark found, for people: rows of a table and a picture, both from the JSON document alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Document = dict[str, Any]

# The two doors, which the others are compared with.
_OURS = ("metafast", "accumulate_grad")


def write(document: Document, path: Path) -> None:
    """Write the document as JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def timed(result: Document) -> list[Document]:
    """The sides of a workload's result that ran."""
    return [side for side in result["sides"] if "median_seconds" in side]


def summary(result: Document) -> list[tuple[str, ...]]:
    """Rows of a workload's table, a side each.

    Median ms; the distance of the quartiles in percent of it; how many times as long as metafast takes, through
    autograd and by ``accumulate_grad``; peak of memory in MiB, if it was measured; the errors in float64 and float32;
    what that makes of the gradient.
    """
    sides = timed(result)
    ours = {side["side"]: side["median_seconds"] for side in sides}
    rows = []
    for side in sides:
        median, (first, third) = side["median_seconds"], side["quartile_seconds"]
        ratios = [f"{median / ours[name]:.1f}x" if name in ours else "" for name in _OURS]
        version = f" {side['version']}" if side["version"] else ""
        rows.append(
            (
                side["side"] + version,
                milliseconds(median),
                f"{100 * (third - first) / median:.0f} %",
                *ratios,
                mebibytes(side["peak_bytes"]) if "peak_bytes" in side else "",
                _error(side["error_float64"]),
                _error(side["error_float32"]),
                side["status"],
            )
        )
    return rows


def absent(result: Document) -> list[str]:
    """Which sides did not run and why, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for side in result["sides"]:
        if "median_seconds" in side:
            continue
        reason = f"failed, {side['reason']}" if side["status"] == "failed" else side["status"]
        reasons.setdefault(reason, []).append(side["side"])
    return [f"{reason}: {', '.join(names)}" for reason, names in reasons.items()]


def by_torch(result: Document) -> list[str]:
    """Which of metafast's own sides torch computed, though it need not, and why."""
    reasons: dict[str, list[str]] = {}
    for side in timed(result):
        _, refused, reason = side.get("by", "").partition("torch: ")
        if refused:
            reasons.setdefault(reason, []).append(side["side"])
    return [f"by torch: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def busy(document: Document) -> str:
    """A warning where others kept the machine busy when the run began; empty where they did not."""
    load, cpus = document["machine"]["load_average"], document["machine"]["logical_cpus"]
    # Up to the number of processors it may have been what this user just ran, and that is over.
    if not load or not cpus or load < 1.5 * cpus:
        return ""
    return f"the machine was busy with other work (load {load} on {cpus} processors): these times are not to be quoted"


def computer(document: Document) -> str:
    """What computed: the GPU's name, or the CPU's and the number of threads."""
    machine = document["machine"]
    if document["settings"].get("device", "cpu").startswith("cuda"):
        return str(machine["gpu"])
    return f"{machine['torch_threads']} threads, {machine['cpu']}"


def ceilings(document: Document) -> str:
    """The measured ceilings, in one line."""
    found = document["roofline"]["ceilings"]
    return (
        f"copy {found['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"float32 {found['float32_flops_per_second'] / 1e12:.3g} TFLOP/s, "
        f"float64 {found['float64_flops_per_second'] / 1e12:.3g} TFLOP/s, "
        f"launch {found['launch_seconds'] * 1e6:.3g} us"
    )


def operators(document: Document) -> list[tuple[str, ...]]:
    """Rows of the roofline's table: ms, GFLOP, MB, and the share of the roofline in percent."""
    return [
        (
            work["name"],
            milliseconds(work["seconds"]),
            f"{work['flops'] / 1e9:.3g}",
            f"{work['bytes'] / 1e6:.3g}",
            f"{100 * work['share']:.0f} %",
        )
        for work in document["roofline"]["operators"]
    ]


def problems(document: Document) -> list[str]:
    """What is wrong with metafast's own sides, in words; empty if all are exact."""
    lines = []
    for result in document["workloads"]:
        for side in (side for side in result["sides"] if side["ours"]):
            who = f"{result['workload']['name']}: {side['side']} {side['status']}"
            if side["status"] == "failed":
                lines.append(f"{who}, {side['reason']}")
            elif "median_seconds" in side and side["status"] != "exact":
                errors = _error(side["error_float64"]), _error(side["error_float32"])
                lines.append(f"{who}, relative error {errors[0]} in float64 and {errors[1]} in float32")
    return lines


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(size: float) -> str:
    """MiB with three digits."""
    value = size / 2**20
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.0e}"


def plot(document: Document, path: Path) -> None:
    """Draw the medians as bars, a panel for each workload, to a PNG file; the axis is logarithmic."""
    # Imported here: only a plot needs matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = document["workloads"]
    counts = [max(1, len(timed(result))) for result in results]
    figure = Figure(figsize=(9.0, 1.0 + sum(0.32 * count + 0.75 for count in counts)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=[count + 1.0 for count in counts])[:, 0]
    for axes, result in zip(panels, results):
        _draw(axes, result)
    machine = document["machine"]
    panels[-1].set_xlabel("median ms a meta-step (logarithmic)")
    figure.suptitle(
        f"metafast {machine['metafast']}, {computer(document)}, torch {machine['torch']}, {machine['date'][:10]}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(path, dpi=120)


def _draw(axes: Any, result: Document) -> None:
    sides = timed(result)
    medians = [side["median_seconds"] * 1e3 for side in sides]
    colours = ["#1f77b4" if side["ours"] else "#9a9a9a" for side in sides]
    bars = axes.barh([side["side"] for side in sides], medians, color=colours)
    fastest = min(m for m, side in zip(medians, sides) if side["ours"])
    labels = [f"{milliseconds(m / 1e3)} ms" + ("" if m == fastest else f"   {m / fastest:.1f}x") for m in medians]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(medians) / 3, max(medians) * 6)
    axes.invert_yaxis()
    axes.set_title(result["workload"]["title"], fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
