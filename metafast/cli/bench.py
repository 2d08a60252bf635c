"""``metafast bench``: the meta-step against plain PyTorch and other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metafast import _check
from metafast.bench import SUITES, WORKLOADS, plot, problems, roofline, run, summary, write
from metafast.bench.report import absent, busy, by_torch, ceilings, operators
from metafast.cli.common import Device, Threads, use_device
from metafast.cli.console import bad_input, say, say_error
from metafast.cli.tables import Notice, show

COLUMNS = (
    "side",
    "median\nms",
    "spread",
    "times\nmetafast",
    "times\naccum.",
    "peak\nMiB",
    "error\nfloat64",
    "error\nfloat32",
    "gradient",
)
ROOF_COLUMNS = ("operator", "ms", "GFLOP", "MB", "share of\nthe roof")


def bench(
    suite: Annotated[
        str, typer.Option(help=f"Who takes part: {', '.join(SUITES)}. peers also compiles, which takes minutes.")
    ] = "reference",
    workload: Annotated[
        list[str] | None, typer.Option(help=f"Only these, of {', '.join(WORKLOADS)}; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the picture.")] = Path("runs/bench"),
    seconds: Annotated[float, typer.Option(help="Seconds of timing for each workload.")] = 3.0,
    device: Device = "cpu",
    roof: Annotated[
        bool | None,
        typer.Option("--roofline/--no-roofline", help="Measure ceilings, and operators against them; a GPU's default."),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure the peak of memory too, each side in its own process.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Time the meta-step against the reference loops and the libraries that are installed.

    Every side's meta-gradient is first compared with the float64 reference: in float64 on two of the tasks (exact is
    a relative error below 1e-10), and in float32 on what is then timed. Then the sides are timed in turns in one
    process. Suites: "reference" is small and takes a minute; "engine" has the full sizes; "peers" adds torch.compile
    and JAX to them. Libraries that are not installed are named. On a GPU times are between CUDA's events, float32 is
    without TF32, and the meta-step as a CUDA graph takes part. Exit code 1 if metafast itself is not exact.
    """
    with bad_input():
        chosen = SUITES[_check.choice("--suite", suite, SUITES)]
        names = [_check.choice("--workload", name, WORKLOADS) for name in workload or chosen.workloads]
        _check.number("--seconds", seconds, minimum=0.0)
        where = use_device(device, threads)
        if memory and where.type != "cpu":
            raise ValueError(f"--memory: expected --device cpu, got {where}")
        out.mkdir(parents=True, exist_ok=True)
    notice = Notice()

    def finished(result: dict[str, Any]) -> None:
        notice("")
        _print(result)

    document = run(chosen, [WORKLOADS[name] for name in names], seconds, notice, finished, where, memory)
    if roof or (roof is None and where.type == "cuda"):
        notice("roofline")
        document["roofline"] = roofline.measure(where, seconds / 4)
        notice("")
        show(f"roofline: {ceilings(document)}", ROOF_COLUMNS, operators(document))
        say()
    if warning := busy(document):
        say(warning, style="yellow")
    name = suite if where.type == "cpu" else f"{suite}-{where.type}"
    write(document, out / f"{name}.json")
    plot(document, out / f"{name}.png")
    say(f"wrote {out / f'{name}.json'} and {out / f'{name}.png'}")
    wrong = problems(document)
    for line in wrong:
        say_error(line)
    if wrong:
        raise typer.Exit(1)


def _print(result: dict[str, Any]) -> None:
    show(result["workload"]["title"], COLUMNS, summary(result), bad=("differs", "off"))
    for line in (*absent(result), *by_torch(result)):
        say(line, style="dim")
    say()
